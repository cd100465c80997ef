from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from wavprune.common.cache import ByteCache


def test_a_value_is_made_once_for_equal_keys() -> None:
    cache = ByteCache[bytes](100, len)
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"x"

    assert cache.get((1, "a"), make) is cache.get((1, "a"), make)
    assert len(made) == 1


def test_the_least_recently_used_goes_first() -> None:
    cache = ByteCache[bytes](10, len)
    for key in "ab":
        cache.get(key, lambda: bytes(5))
    cache.get("a", lambda: bytes(5))
    cache.get("c", lambda: bytes(5))
    assert cache.bytes == 10
    remade: list[str] = []

    def make(key: str) -> bytes:
        remade.append(key)
        return bytes(5)

    for key in "acb":
        cache.get(key, partial(make, key))
    assert remade == ["b"]


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = ByteCache[bytes](10, len)
    assert len(cache.get("a", lambda: bytes(11))) == 11
    assert (cache.bytes, len(cache)) == (0, 0)


def test_threads_leave_the_count_of_bytes_right() -> None:
    cache = ByteCache[bytes](50, len)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: cache.get(i % 20, lambda: bytes(7)), range(2000)))
    assert cache.bytes == 7 * len(cache) <= 50

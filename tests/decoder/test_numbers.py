"""The numbers of the decoder in C are those of numpy and torch, to the bit."""

from __future__ import annotations

import ctypes
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from wavprune.checkpoint.binary import Reader, Writer
from wavprune.checkpoint.norms import LARGEST_CODE, read_logs
from wavprune.checkpoint.packed_layout import ALL_DTYPES
from wavprune.checkpoint.trellis_tables import SCALES, SHAPES, family

from ..support.decoder import C99, COMPILER, ROOT, compile_

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler here")

Array = npt.NDArray[Any]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("numbers") / "numbers.so"
    source = ROOT / "tests" / "decoder" / "numbers.c"
    return ctypes.CDLL(str(compile_(target, [source], [*C99, "-O1", "-shared", "-fPIC"])))


def at(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def bits(array: Array) -> Array:
    return array.view({8: np.uint64, 4: np.uint32, 2: np.uint16}[array.itemsize])


def floats(count: int) -> npt.NDArray[np.float32]:
    """Of every magnitude, a half of them between two neighbors of fewer bits."""
    patterns = np.random.default_rng(0).integers(0, 1 << 32, count, dtype=np.uint32)
    patterns[: count // 4] &= np.uint32(0xFFFFF000)
    patterns[count // 4 : count // 2] &= np.uint32(0xFFFF8000)
    # Those that are denormal numbers of float16.
    some = patterns[::8]
    patterns[::8] = some & np.uint32(0x80FFFFFF) | np.uint32(0x33000000) + (some & (7 << 24))
    values = patterns.view(np.float32)
    return values[np.isfinite(values)]


def test_roundings(library: ctypes.CDLL) -> None:
    values = floats(1 << 18)
    half, brain = (np.zeros(len(values), np.uint16) for _ in range(2))
    library.halves(at(values), at(half), at(brain), ctypes.c_uint64(len(values)))
    tensor = torch.from_numpy(values)
    assert np.array_equal(half, bits(tensor.half().view(torch.int16).numpy()))
    assert np.array_equal(brain, bits(tensor.bfloat16().view(torch.int16).numpy()))


def test_square_roots(library: ctypes.CDLL) -> None:
    values = np.random.default_rng(0).integers(0, 0x7FF0 << 48, 1 << 16, dtype=np.uint64)
    values[:1000] >>= np.uint64(12)
    values[1000:2000] = np.arange(1000)
    numbers = np.concatenate([values.view(np.float64), np.arange(1000.0), [np.inf]])
    found = np.zeros_like(numbers)
    library.roots(at(numbers), at(found), ctypes.c_uint64(len(numbers)))
    assert np.array_equal(bits(found), bits(np.sqrt(numbers)))


def test_powers_of_two(library: ctypes.CDLL) -> None:
    values = floats(1 << 16)
    exponents = np.random.default_rng(1).integers(-1100, 1101, len(values)).astype(np.int32)
    found = np.zeros(len(values))
    library.scales(at(values), at(exponents), at(found), ctypes.c_uint64(len(values)))
    with np.errstate(over="ignore", under="ignore"):
        expected = np.ldexp(values.astype(np.float64), exponents)
    assert np.array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("code", ["F64", "F32", "F16", "BF16"])
def test_logarithms(library: ctypes.CDLL, code: str) -> None:
    count = 4 * LARGEST_CODE + 3
    writer = Writer()
    writer.numbers(range(count))
    values = torch.from_numpy(read_logs(Reader(bytes(writer.data)), count))
    found = np.zeros(count)
    number = ctypes.c_int32(ALL_DTYPES.index(code))
    library.logs(number, at(found), ctypes.c_uint64(count))
    expected = values.to(FLOATS[code]).double().numpy()
    assert np.array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("quantiser", [0, 1])
def test_the_family_of_tables(library: ctypes.CDLL, quantiser: int) -> None:
    for code, expected in enumerate(family(quantiser)[0], start=1):
        found = np.zeros(256, dtype=np.uint16)
        library.frequencies(ctypes.c_uint32(code), ctypes.c_uint32(quantiser), at(found))
        assert np.array_equal(found, expected), code
    assert code == SCALES * SHAPES


@pytest.mark.parametrize("size", [0, 1, 3, 4, 1001, 65_537])
def test_checksums(library: ctypes.CDLL, size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    library.checksum.restype = ctypes.c_uint32
    assert library.checksum(data, ctypes.c_uint64(size)) == zlib.crc32(data)

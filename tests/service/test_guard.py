"""Requests that are refused before anything else looks at them; no worker is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from wavprune.errors import WavpruneError
from wavprune.service.app import create_app
from wavprune.service.limits import Limits, Settings

TOKEN = "0123456789abcdef-token"
# Nothing here is asked to work.
NO_WORKERS: Any = None
BINARY = {"content-type": "application/octet-stream"}


@contextmanager
def service(tmp_path: Path, **settings: Any) -> Iterator[Any]:
    """Asks an application that never started its workers."""
    app: Any = create_app(Settings(tmp_path / "kept", **settings), NO_WORKERS)

    def ask(method: str, path: str, **request: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            base = request.pop("base", "http://127.0.0.1:8765")
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                return await client.request(method, path, **request)

        return asyncio.run(once())

    try:
        yield ask
    finally:
        asyncio.run(app.service.stop())


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "a:b"]
)
def test_a_name_that_leads_here_is_refused(tmp_path: Path, host: str) -> None:
    with service(tmp_path) as ask:
        answer = ask("GET", "/api/v1/models", headers={"host": host})
    assert answer.status_code == 421
    assert "allowed: numbers, localhost" in answer.json()["detail"]


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8765", "box.lan", "BOX.LAN"])
def test_its_own_names_are_taken(tmp_path: Path, host: str) -> None:
    with service(tmp_path, names=("box.lan",)) as ask:
        assert ask("GET", "/api/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_pages_of_other_sites_change_nothing(tmp_path: Path, headers: dict[str, str]) -> None:
    with service(tmp_path) as ask:
        answer = ask("POST", "/api/v1/models?name=a.pt", content=b"x", headers=BINARY | headers)
        assert answer.status_code == 403
        own = {"origin": "http://127.0.0.1:8765", "sec-fetch-site": "same-origin"}
        answer = ask("POST", "/api/v1/models?name=a.pt", content=b"x", headers=BINARY | own)
        assert answer.status_code == 201


def test_a_token_is_asked_for_and_a_browser_keeps_it(tmp_path: Path) -> None:
    with service(tmp_path, token=TOKEN) as ask:
        path = "/api/v1/models"
        assert ask("GET", "/").status_code == 200
        assert ask("GET", path).status_code == 401
        for wrong in (f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer", "Bearer é"):
            headers = {"authorization": wrong.encode()}
            assert ask("GET", path, headers=headers).status_code == 401
        assert ask("GET", path, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert ask("POST", "/api/v1/session", json={"token": "x"}).status_code == 401
        kept = ask("POST", "/api/v1/session", json={"token": TOKEN}).headers["set-cookie"]
        assert "HttpOnly" in kept
        assert "SameSite=strict" in kept
        assert TOKEN not in kept
        assert ask("GET", path, headers={"cookie": kept.split(";")[0]}).status_code == 200
        assert ask("GET", path, headers={"cookie": "wavprune=x"}).status_code == 401


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WavpruneError, match="allowed: 16 or more"):
        Settings(tmp_path, token="secret")


def test_a_token_that_no_header_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WavpruneError, match="allowed: ASCII"):
        Settings(tmp_path, token=f"{TOKEN}é")


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    with service(tmp_path) as ask:
        for path in ("/", "/api/v1/docs", "/static/app.js", "/static/style.css"):
            answer = ask("GET", path)
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            text = answer.text.replace("http://www.w3.org/", "")
            assert "http://" not in text
            assert "https://" not in text
        assert ask("GET", "/static/../app.py").status_code == 404
        assert ask("GET", "/static/%2e%2e/app.py").status_code == 404


@pytest.mark.parametrize(
    ("name", "detail"),
    [("a.exe", "'a.exe' is of no kind"), ("a", "of no kind"), ("a.pt/../b.sh", "'b.sh'")],
)
def test_other_kinds_of_files_are_refused(tmp_path: Path, name: str, detail: str) -> None:
    with service(tmp_path) as ask:
        answer = ask("POST", "/api/v1/models", params={"name": name}, content=b"x", headers=BINARY)
    assert answer.status_code == 422
    assert detail in answer.json()["detail"]


def test_names_never_become_paths(tmp_path: Path) -> None:
    with service(tmp_path) as ask:
        answer = ask(
            *("POST", "/api/v1/models"),
            params={"name": "../../<b>é\n.pt"},
            content=b"x",
            headers=BINARY,
        )
    assert answer.json()["name"] == "<b>é.pt"
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("source*")}
    assert files == {f"kept/models/{answer.json()['id']}/source.pt"}


def chunks(count: int) -> Any:
    async def parts() -> Any:
        for _ in range(count):
            yield bytes(1000)

    return parts()


def test_what_is_too_large_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    limits = Limits(upload_bytes=10_000, disk_bytes=25_000, models=3)
    with service(tmp_path, limits=limits) as ask:

        def send(**request: Any) -> httpx.Response:
            answer = ask("POST", "/api/v1/models?name=a.pt", headers=BINARY, **request)
            assert isinstance(answer, httpx.Response)
            return answer

        # One that says so, and one that only comes.
        assert send(content=bytes(10_001)).status_code == 413
        assert send(content=chunks(11)).status_code == 413
        assert send(content=b"").status_code == 422
        assert not list(tmp_path.rglob("source*"))
        assert not list((tmp_path / "kept" / "incoming").iterdir())
        assert [send(content=bytes(10_000)).status_code for _ in range(3)] == [201, 201, 507]
        assert send(content=chunks(6)).status_code == 507
        assert send(content=chunks(5)).status_code == 201
        full = send(content=b"x")
        assert full.status_code == 507
        assert "quota" in full.json()["detail"] or "3 models" in full.json()["detail"]


def test_large_json_is_refused(tmp_path: Path) -> None:
    path = f"/api/v1/models/{'0' * 32}/preview"
    with service(tmp_path) as ask:
        assert ask("POST", path, json={"basis": "x" * (1 << 16)}).status_code == 413
        assert ask("POST", path, content=chunks(1)).status_code == 411


def test_a_directory_has_one_service(tmp_path: Path) -> None:
    with service(tmp_path), pytest.raises(WavpruneError, match="in use by another service"):
        create_app(Settings(tmp_path / "kept"), NO_WORKERS)


@pytest.mark.parametrize(
    "values", [{"upload_bytes": 0}, {"queue": -1}, {"job_seconds": 0.0}, {"idle_seconds": -1.0}]
)
def test_limits_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(WavpruneError, match=next(iter(values))):
        Limits(**values)

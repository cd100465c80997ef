"""A service for tests: in a thread of this process, or alone without its workers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from safetensors.torch import save_file

import wavprune
from wavprune.service.app import create_app
from wavprune.service.launcher import Launcher
from wavprune.service.limits import Limits, Settings

SECONDS = 60.0


def demo_file(path: Path) -> Path:
    """The small ResNet for digits as a checkpoint."""
    save_file(wavprune.demo.resnet().state_dict(), str(path))
    return path


@contextmanager
def running(directory: Path, launcher: Launcher, **limits: Any) -> Iterator[str]:
    """The address of a service that listens."""
    app = create_app(Settings(directory, limits=Limits(**limits)), launcher)
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1, ws="none")
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    # Whoever asks before it has started waits.
    listening.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        listening.close()
        assert not thread.is_alive()


def upload(client: httpx.Client, path: Path) -> dict[str, Any]:
    """Upload a model and wait until its curves are measured, or it is refused."""
    answer = client.post(
        "/api/v1/models",
        params={"name": path.name},
        content=path.read_bytes(),
        headers={"content-type": "application/octet-stream"},
    )
    assert answer.status_code == 201, answer.text
    return follow(client, f"/api/v1/models/{answer.json()['id']}/events")[-1]


def follow(client: httpx.Client, path: str) -> list[dict[str, Any]]:
    """All server-sent events of a stream."""
    with client.stream("GET", path) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    return [httpx.Response(200, content=line.removeprefix("data: ")).json() for line in lines]

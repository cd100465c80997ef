"""``wavprune serve``."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..common.optional import require
from ..errors import WavpruneError
from ..service.limits import Limits, Settings
from .options import Command

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
DEFAULTS = Limits()
# Connections at a time; more are answered with 503.
CONNECTIONS = 256
GRACE_SECONDS = 3
TOKEN = "WAVPRUNE_TOKEN"


def _bytes(context: click.Context, parameter: click.Parameter, text: str) -> int:
    match = re.fullmatch(r"(\d{1,15})\s*([KMGT]?)B?", text.strip().upper(), re.ASCII)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{text!r} is no size; write it as 500M or 2GB.")
    return int(match[1]) * UNITS[match[2]]


def _size(option: str, default: int, text: str) -> Callable[[Command], Command]:
    shown = f"{default // UNITS['G']}GB"
    return click.option(option, default=shown, metavar="SIZE", callback=_bytes, help=text)


@click.command()
@click.option("--host", default="127.0.0.1", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, help="0 takes a free one.")
@click.option(
    "--token",
    envvar=TOKEN,
    help=f"What requests must bring, also as {TOKEN}; needed with an address that others can "
    "reach.  [default: none]",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="HOST",
    help="A host name that leads here, beside localhost and numbers; can be repeated.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where models and jobs are kept.  [default: wavprune/serve in the user's cache]",
)
@_size("--upload", DEFAULTS.upload_bytes, "The largest file that is taken.")
@_size("--disk", DEFAULTS.disk_bytes, "What is kept altogether.")
@_size("--memory", DEFAULTS.worker_bytes, "What a job may have.")
@click.option(
    "--queue", type=click.IntRange(1), default=DEFAULTS.queue, help="Jobs that wait or run."
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=DEFAULTS.workers, help="Jobs at once."
)
@click.option("--minutes", type=click.IntRange(1), default=60, help="How long a job may run.")
@click.option(
    "--idle", type=click.IntRange(1), default=24, help="Hours that an unused model is kept."
)
def serve(
    host: str,
    port: int,
    token: str | None,
    names: tuple[str, ...],
    directory: Path | None,
    upload: int,
    disk: int,
    memory: int,
    queue: int,
    workers: int,
    minutes: int,
    idle: int,
) -> None:
    """Prune models over HTTP, with a page in front of it.

    It listens on this machine alone, unless --host says otherwise.
    """
    uvicorn = require("uvicorn", "fastapi", extra="serve", purpose="wavprune serve")
    from ..service.app import create_app
    from ..service.launcher import forked

    if token is None and not _is_loopback(host):
        raise WavpruneError(
            f"--host {host} can be reached from other machines, so --token or {TOKEN} is needed; "
            f"for example {secrets.token_urlsafe(24)}"
        )
    limits = Limits(
        upload_bytes=upload,
        disk_bytes=disk,
        queue=queue,
        workers=workers,
        worker_bytes=memory,
        job_seconds=60.0 * minutes,
        idle_seconds=3600.0 * idle,
    )
    settings = Settings(directory or _cache(), token, names, limits)
    # Forked before anything is open that its workers should not have.
    launcher = forked()
    try:
        _run(uvicorn, create_app(settings, launcher), host, port)
    finally:
        launcher.close()


def _run(uvicorn: Any, application: Any, host: str, port: int) -> None:
    """Listen, say where, and serve until a signal comes."""
    config = uvicorn.Config(
        application,
        host=host,
        port=port,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
        ws="none",
    )
    listening = config.bind_socket()
    # Answers are small, and each would wait for the last one's receipt.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Whoever reads the line below can ask at once, and waits until it has started.
    listening.listen()
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    click.echo(f"wavprune serves http://{shown}:{port}/ (Ctrl-C ends it)")
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        listening.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "wavprune" / "serve"

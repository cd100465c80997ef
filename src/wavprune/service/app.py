"""The service as an ASGI application: API, page, and how errors are answered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from .._version import __version__
from ..common.optional import require
from ..errors import WavpruneError
from .documents import openapi_page
from .guard import Guard
from .launcher import Launcher
from .limits import Settings
from .models import NotReadyError
from .quota import FullError
from .service import Service

require("fastapi", "uvicorn", extra="serve", purpose="the service")

from fastapi import FastAPI, Request, Response  # noqa: E402
from fastapi.exceptions import RequestValidationError  # noqa: E402
from fastapi.responses import HTMLResponse, JSONResponse  # noqa: E402
from fastapi.staticfiles import StaticFiles  # noqa: E402

DESCRIPTION = (
    "Prunes convolutional networks in wavelet bases and stores them in few bytes. Upload a model, "
    "look at what pruning would do, and make a job of it."
)
STATIC = Path(str(resources.files(__package__))) / "static"


def create_app(settings: Settings, launcher: Launcher) -> Guard:
    """The application of one service.

    Args:
        settings: where it keeps things, what it allows, and its token.
        launcher: starts its workers; made before, and closed after it.

    Raises:
        WavpruneError: another service has the directory.
        ImportError: the extra ``serve`` is not installed.
    """
    from . import job_routes, routes

    service = Service(settings, launcher)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="wavprune",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_url="/api/v1/openapi.json",
        # FastAPI's own pages load their scripts from another server.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(routes.router)
    app.include_router(job_routes.router)
    _add_errors(app)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse((STATIC / "index.html").read_text())

    @app.get("/api/v1/docs", include_in_schema=False)
    async def documents() -> Response:
        return HTMLResponse(openapi_page(app.openapi()))

    app.mount("/static", StaticFiles(directory=STATIC))
    return Guard(app, service, settings.token, settings.names)


def _add_errors(app: FastAPI) -> None:
    """Every refusal is one sentence under ``detail``."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        if first["type"] == "value_error":
            # Raised here, and a sentence already.
            return _problem(422, first["msg"].removeprefix("Value error, "))
        given = "" if first["type"] == "missing" else f", not {str(first.get('input'))[:80]!r}"
        return _problem(422, f"{f'{where}: ' if where else ''}{first['msg']}{given}")

    @app.exception_handler(WavpruneError)
    async def not_allowed(request: Request, error: WavpruneError) -> Response:
        return _problem(422, str(error))

    @app.exception_handler(NotReadyError)
    async def not_ready(request: Request, error: NotReadyError) -> Response:
        return _problem(409, str(error))

    @app.exception_handler(OverflowError)
    async def too_large(request: Request, error: OverflowError) -> Response:
        return _problem(413, str(error))

    @app.exception_handler(FullError)
    async def full(request: Request, error: FullError) -> Response:
        return _problem(507, str(error))


def _problem(status: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status)

"""What a request names: the service, a model, a job, a file; and how it can be refused."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Path, Query, Request

from .service import Service
from .shapes import Identity, Problem
from .store import Job, Model

LONGEST_NAME = 100

PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The request cannot be read"},
    401: {"model": Problem, "description": "A token is needed"},
    403: {"model": Problem, "description": "The request comes from another site"},
    404: {"model": Problem, "description": "There is no such model, job or layer"},
    409: {"model": Problem, "description": "It is not ready, or over"},
    411: {"model": Problem, "description": "The length of the request is needed"},
    413: {"model": Problem, "description": "It is too large"},
    421: {"model": Problem, "description": "The host is not this service's"},
    422: {"model": Problem, "description": "Something that was sent is not allowed"},
    507: {"model": Problem, "description": "A limit is reached"},
}
BINARY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
FileName = Annotated[
    str, Query(min_length=1, max_length=255, description="its name, of which the suffix counts")
]


def service_of(request: Request) -> Service:
    """The service that a request is for."""
    found: Service = request.app.state.service
    return found


def model_of(identity: Annotated[Identity, Path(alias="model")], request: Request) -> Model:
    """The model that a path names."""
    service = service_of(request)
    try:
        model = service.store.model(identity)
    except LookupError as error:
        raise HTTPException(404, str(error.args[0])) from error
    service.models.touch(model)
    return model


def job_of(identity: Annotated[Identity, Path(alias="job")], request: Request) -> Job:
    """The job that a path names."""
    service = service_of(request)
    try:
        job = service.store.job(identity)
        service.models.touch(service.store.model(job.model))
    except LookupError as error:
        raise HTTPException(404, str(error.args[0])) from error
    return job


Served = Annotated[Service, Depends(service_of)]
Named = Annotated[Model, Depends(model_of)]
Chosen = Annotated[Job, Depends(job_of)]


def shown_name(name: str) -> str:
    """A file name as it is shown: the last part of a path, without what is no text."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(c for c in last if c.isprintable())[-LONGEST_NAME:]


def stem_of(name: str) -> str:
    """A file name without its suffix."""
    return name.rpartition(".")[0] or name


def suffix_of(name: str, allowed: tuple[str, ...]) -> str:
    """The suffix of a file name, in small letters.

    Raises:
        HTTPException: it is another one than those.
    """
    suffix = f".{name.rpartition('.')[2].lower()}" if "." in name else ""
    if suffix not in allowed:
        raise HTTPException(
            422, f"{name!r} is of no kind that is taken; allowed: {', '.join(allowed)}"
        )
    return suffix


def length_of(request: Request) -> int | None:
    """How many bytes a request says that it has."""
    text = request.headers.get("content-length")
    return int(text) if text and text.isascii() and text.isdigit() else None

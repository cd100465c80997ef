"""How models and jobs are answered: as they are now, and at each change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any

from fastapi.responses import StreamingResponse

from .service import Service
from .shapes import JobShape, ModelShape, Shape
from .state import Progress
from .store import WAITING, Job, Model

# A stream of events says at least this often that it is there.
HEARTBEAT = 15.0


def events_document(shape: type[Shape]) -> dict[int | str, dict[str, Any]]:
    """How the OpenAPI document describes a stream whose events are of a shape."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{shape.__name__}"},
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"content": {"text/event-stream": {"itemSchema": event}}}}


def model_shape(service: Service, model: Model) -> ModelShape:
    """A model as it is answered."""
    progress = service.progress.get(model.id, Progress("wait", None))
    is_open = model.state == WAITING
    values = asdict(model)
    return ModelShape(
        **{name: values[name] for name in ("id", "name", "kind", "bytes", "state", "error")},
        inputs=model.inputs,
        runs=model.runs,
        cannot_run=model.cannot_run,
        stage=progress.stage if is_open else None,
        share=progress.share if is_open else None,
    )


def job_shape(service: Service, job: Job) -> JobShape:
    """A job as it is answered."""
    progress = service.progress.get(job.id, Progress("wait", None))
    values = asdict(job)
    del values["attempts"]
    return JobShape.model_validate(
        {
            **values,
            "stage": None if job.is_over else progress.stage,
            "share": None if job.is_over else progress.share,
        }
    )


def events_of(service: Service, state: Callable[[], tuple[Any, bool]]) -> StreamingResponse:
    """Server-sent events, one at each change, until the last.

    Args:
        service: whose changes count.
        state: what is to be sent, if anything, and whether it is the last.
    """

    async def events() -> AsyncIterator[str]:
        last = None
        while True:
            # A change while an event is being sent is not missed.
            change = service.change
            shape, is_over = state()
            text = None if shape is None else shape.model_dump_json()
            if text is not None and text != last:
                yield f"data: {text}\n\n"
            elif last is not None:
                yield ": still here\n\n"
            last = text
            if is_over:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(change.wait(), HEARTBEAT)

    return StreamingResponse(events(), media_type="text/event-stream")

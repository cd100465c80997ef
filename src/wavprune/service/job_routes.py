"""The API of jobs under ``/api/v1``: what is asked for, followed, cancelled and downloaded."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, StreamingResponse

from . import tasks
from .answers import events_document, events_of, job_shape
from .preview import check
from .requests import PROBLEMS, Chosen, Named, Served, stem_of
from .shapes import JobAsked, JobShape
from .store import DONE, Job

router = APIRouter(prefix="/api/v1", responses=PROBLEMS, tags=["jobs"])


@router.get("/models/{model}/jobs")
async def list_jobs(model: Named, service: Served) -> list[JobShape]:
    """The jobs of a model, the last first."""
    return [job_shape(service, job) for job in reversed(service.store.jobs(model.id))]


@router.post("/models/{model}/jobs", status_code=201)
async def add_job(model: Named, asked: JobAsked, service: Served) -> JobShape:
    """Prune, compress, calibrate or compare; it waits for its turn.

    `calibrate` and `compare` run the network: they take an `.onnx` file or a zip of a Hugging Face
    directory, and inputs that were uploaded before. `compare` says how far what another job made
    agrees with the original.
    """
    check(service.models.curves(model), asked.basis)
    if asked.kind in ("calibrate", "compare"):
        if not model.runs:
            raise HTTPException(
                409,
                f"{asked.kind} runs the network, and {model.name} cannot be run: "
                f"{model.cannot_run}; allowed: an .onnx file of operators that torch computes, or "
                "a zip of a Hugging Face directory",
            )
        if not model.inputs:
            raise HTTPException(409, f"{asked.kind} needs inputs; upload some for the model first")
    if asked.job is not None:
        try:
            other = service.store.job(asked.job)
        except LookupError as error:
            raise HTTPException(404, str(error.args[0])) from error
        if other.model != model.id or other.state != DONE or other.kind == "compare":
            raise HTTPException(409, "that job did not make another form of this model")
    return job_shape(service, service.jobs.add(model, asked.kind, asked.model_dump()))


@router.get("/jobs/{job}")
async def show_job(job: Chosen, service: Served) -> JobShape:
    """One job."""
    return job_shape(service, job)


@router.delete("/jobs/{job}")
async def cancel_job(job: Chosen, service: Served) -> JobShape:
    """Cancel a job; one that is over stays as it is."""
    try:
        return job_shape(service, await service.jobs.cancel(job))
    except LookupError as error:
        raise HTTPException(404, str(error.args[0])) from error


@router.get(
    "/jobs/{job}/events", response_class=StreamingResponse, responses=events_document(JobShape)
)
async def follow_job(job: Chosen, service: Served) -> StreamingResponse:
    """The job at each change, as server-sent events, until it is over."""

    def state() -> tuple[JobShape | None, bool]:
        try:
            found = service.store.job(job.id)
            service.models.touch(service.store.model(found.model))
        except LookupError:
            return None, True
        return job_shape(service, found), found.is_over

    return events_of(service, state)


FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string"}}}}
}


@router.get("/jobs/{job}/model", response_class=FileResponse, responses=FILE)
async def download_model(job: Chosen, service: Served) -> FileResponse:
    """The model that a job made."""
    if job.state != DONE or not job.result or not job.result.get("file"):
        raise HTTPException(409, f"the job is {job.state} and has made no model")
    name = job.result["file"]
    stem = re.sub(r"[^\w.-]", "_", stem_of(service.store.model(job.model).name))
    suffix = name[name.index(".") :]
    return FileResponse(
        service.result(job, name),
        media_type="application/octet-stream",
        filename=f"{stem}-{_label(job)}{suffix}",
    )


@router.get(
    "/jobs/{job}/report",
    response_class=FileResponse,
    responses={200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
)
async def download_report(job: Chosen, service: Served) -> FileResponse:
    """What a job did, layer by layer, as JSON."""
    path = service.result(job, tasks.REPORT)
    if job.state != DONE or not path.exists():
        raise HTTPException(409, f"the job is {job.state} and has no report")
    return FileResponse(path, media_type="application/json", filename="report.json")


def _label(job: Job) -> str:
    settings = job.settings
    amount = f"{settings['sparsity']:g}"
    if job.kind == "compress" and settings["target_bytes"] is not None:
        amount = f"{settings['target_bytes']}B"
    return f"{job.kind}-{settings['basis']}-{amount}"

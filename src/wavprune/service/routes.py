"""The API under ``/api/v1``: what each request asks for, and how it is answered."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from .._version import __version__
from ..checkpoint import formats
from ..config import AUTO
from . import pictures, tasks
from .guard import COOKIE, same, session_of
from .preview import check, curves, preview
from .service import Progress, Service
from .shapes import (
    AboutShape,
    CurvesShape,
    Identity,
    JobAsked,
    JobShape,
    KernelsShape,
    LayerShape,
    LayersShape,
    ModelShape,
    PreviewAsked,
    PreviewShape,
    Problem,
    TokenAsked,
)
from .store import DONE, WAITING, Job, Model

# Of checkpoints that can be uploaded, and of inputs.
FILES = (*formats.SAFETENSORS, *formats.STATE_DICTS, *formats.ONNX)
ARRAYS, IMAGES = ".npz", (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_INPUTS = 4096
# A stream of events says at least this often that it is there.
HEARTBEAT = 15.0
LONGEST_NAME = 100

PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "A token is needed"},
    403: {"model": Problem, "description": "The request comes from another site"},
    404: {"model": Problem, "description": "There is no such model, job or layer"},
    409: {"model": Problem, "description": "It is not ready, or over"},
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

router = APIRouter(prefix="/api/v1", responses=PROBLEMS)


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
    service.touch(model)
    return model


def job_of(identity: Annotated[Identity, Path(alias="job")], request: Request) -> Job:
    """The job that a path names."""
    service = service_of(request)
    try:
        job = service.store.job(identity)
        service.touch(service.store.model(job.model))
    except LookupError as error:
        raise HTTPException(404, str(error.args[0])) from error
    return job


Served = Annotated[Service, Depends(service_of)]
Named = Annotated[Model, Depends(model_of)]
Chosen = Annotated[Job, Depends(job_of)]


@router.post("/session", status_code=204, tags=["session"])
async def begin_session(asked: TokenAsked, request: Request, response: Response) -> None:
    """Keep the token in a cookie of the browser, which a page cannot read."""
    token = service_of(request).settings.token
    if token is not None:
        if not same(asked.token, token):
            raise HTTPException(401, "this is not the token of the service")
        response.set_cookie(COOKIE, session_of(token), httponly=True, samesite="strict")


EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


@router.get("/about", tags=["models"])
async def about(service: Served) -> AboutShape:
    """What is taken, and how much of it."""
    limits = service.limits
    return AboutShape(
        version=__version__,
        kinds=[*FILES, tasks.ZIP],
        inputs=[ARRAYS, *IMAGES],
        upload_bytes=limits.upload_bytes,
        disk_bytes=limits.disk_bytes,
        queue=limits.queue,
        idle_seconds=limits.idle_seconds,
    )


@router.get("/models", tags=["models"])
async def list_models(service: Served) -> list[ModelShape]:
    """All models, the last first."""
    return [_model(service, model) for model in service.store.models()]


@router.post("/models", status_code=201, tags=["models"], openapi_extra=BINARY)
async def upload_model(name: FileName, request: Request, service: Served) -> ModelShape:
    """Upload a checkpoint: the body is the file.

    A `.safetensors` file, a `.pt`, `.pth` or `.bin` state dict, or a `.zip` of a Hugging Face
    directory. It is written to disk as it comes; nothing in it is run or unpickled. Then its curves
    are measured: follow `/models/{model}/events`, or ask for the model until it is `ready`.
    """
    shown = _shown(name)
    kind = _suffix(shown, (*FILES, tasks.ZIP))
    with service.incoming(_length(request)) as upload:
        async for part in request.stream():
            upload.write(part)
        if not upload.size:
            raise HTTPException(422, "the body is empty; send the file as it is")
        upload.complete()
        return _model(service, service.add_model(upload.path, shown, kind))


@router.get("/models/{model}", tags=["models"])
async def show_model(model: Named, service: Served) -> ModelShape:
    """One model."""
    return _model(service, model)


@router.delete("/models/{model}", status_code=204, tags=["models"])
async def remove_model(model: Named, service: Served) -> None:
    """Forget a model, with its jobs and all their files."""
    await service.remove_model(model)


@router.post("/models/{model}/inputs", status_code=201, tags=["models"], openapi_extra=BINARY)
async def upload_inputs(
    name: FileName, model: Named, request: Request, service: Served
) -> ModelShape:
    """Add calibration inputs: an `.npz` file with `images` `(N, C, H, W)`, or one image.

    No labels are needed. The last `.npz` file is used, or all images.
    """
    suffix = _suffix(_shown(name), (ARRAYS, *IMAGES))
    if model.inputs >= MOST_INPUTS:
        raise HTTPException(507, f"the model has {MOST_INPUTS} files of inputs, which is the most")
    service.curves(model)
    with service.incoming(_length(request)) as upload:
        async for part in request.stream():
            upload.write(part)
        upload.complete()
        try:
            found = service.store.model(model.id)
        except LookupError as error:
            raise HTTPException(404, str(error.args[0])) from error
        return _model(service, service.add_input(upload.path, found, suffix))


@router.get("/models/{model}/layers", tags=["preview"])
async def list_layers(
    model: Named, service: Served, sparsity: Annotated[float, Query(ge=0, lt=1)] = 0.5
) -> LayersShape:
    """The layers that can be pruned, each with its best basis at a sparsity."""
    found = service.curves(model)
    best = [layer.best for layer in preview(found, AUTO, sparsity).layers]
    layers = [
        LayerShape(
            name=facts.name,
            shape=list(facts.shape),
            kernel=list(facts.kernel),
            dtype=facts.dtype,
            weights=facts.numel,
            best=name,
        )
        for facts, name in zip(found.layers, best, strict=True)
    ]
    return LayersShape(
        layers=layers,
        bases=list(found.bases),
        skipped=found.skipped,
        weights=found.numel,
        bytes=found.total_bytes,
    )


@router.post("/models/{model}/preview", tags=["preview"])
async def preview_model(model: Named, asked: PreviewAsked, service: Served) -> PreviewShape:
    """What pruning with some settings would do, answered from memory."""
    found = preview(service.curves(model), asked.basis, asked.sparsity, asked.scope)
    layers = [layer._asdict() for layer in found.layers]
    return PreviewShape.model_validate({**found._asdict(), "layers": layers})


@router.get("/models/{model}/curves", tags=["preview"])
async def show_curves(
    model: Named, service: Served, layer: Annotated[str | None, Query(max_length=1024)] = None
) -> CurvesShape:
    """Error against sparsity and bytes against error in every basis, of a layer or of all."""
    found = service.curves(model)
    index = None if layer is None else _layer(found, layer)
    return CurvesShape.model_validate(curves(found, index))


KernelQuery = Annotated[str, Query(max_length=1024, description="the layer")]


@router.get("/models/{model}/kernels", tags=["preview"])
async def show_kernels(
    model: Named,
    service: Served,
    layer: KernelQuery,
    basis: Annotated[str, Query(max_length=64)] = AUTO,
    sparsity: Annotated[float, Query(ge=0, lt=1)] = 0.5,
    scope: Literal["layer", "global"] = "layer",
) -> KernelsShape:
    """The strongest kernels of a layer before and after, and their coefficients."""
    found = _kernels(service, model, layer, basis, sparsity, scope)
    arrays = {
        name: value.round(6).tolist() if name != "kept" else value.tolist()
        for name, value in found._asdict().items()
        if hasattr(value, "tolist")
    }
    return KernelsShape(
        layer=found.layer,
        basis=found.basis,
        kernel=list(found.kernel),
        grid=list(found.grid),
        **arrays,
    )


@router.get(
    "/models/{model}/kernels.svg",
    tags=["preview"],
    response_class=Response,
    responses={200: {"content": {"image/svg+xml": {"schema": {"type": "string"}}}}},
)
async def picture_kernels(
    model: Named,
    service: Served,
    layer: KernelQuery,
    basis: Annotated[str, Query(max_length=64)] = AUTO,
    sparsity: Annotated[float, Query(ge=0, lt=1)] = 0.5,
    scope: Literal["layer", "global"] = "layer",
) -> Response:
    """The same as a picture."""
    found = _kernels(service, model, layer, basis, sparsity, scope)
    policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return Response(pictures.as_svg(found), media_type="image/svg+xml", headers=policy)


@router.get(
    "/models/{model}/events",
    tags=["models"],
    response_class=StreamingResponse,
    responses=EVENTS,
)
async def follow_model(model: Named, service: Served) -> StreamingResponse:
    """The model at each change, as server-sent events, until it is ready or refused."""

    def state() -> tuple[ModelShape | None, bool]:
        try:
            found = service.store.model(model.id)
        except LookupError:
            return None, True
        service.touch(found)
        return _model(service, found), found.state != WAITING

    return _events(service, state)


@router.get("/models/{model}/jobs", tags=["jobs"])
async def list_jobs(model: Named, service: Served) -> list[JobShape]:
    """The jobs of a model, the last first."""
    return [_job(service, job) for job in reversed(service.store.jobs(model.id))]


@router.post("/models/{model}/jobs", status_code=201, tags=["jobs"])
async def add_job(model: Named, asked: JobAsked, service: Served) -> JobShape:
    """Prune, compress, calibrate or compare; it waits for its turn.

    `calibrate` and `compare` run the network: they take a zip of a Hugging Face directory, and
    inputs that were uploaded before.
    """
    check(service.curves(model), asked.basis)
    if asked.kind in ("calibrate", "compare"):
        if model.kind != tasks.ZIP:
            raise HTTPException(
                409,
                f"{asked.kind} runs the network, and {model.name} has only its weights; upload a "
                "zip of a Hugging Face directory",
            )
        if not model.inputs:
            raise HTTPException(409, f"{asked.kind} needs inputs; upload some for the model first")
    if asked.job is not None:
        try:
            other = service.store.job(asked.job)
        except LookupError as error:
            raise HTTPException(404, str(error.args[0])) from error
        made = service.result(other, tasks.DIRECTORY).is_dir()
        if other.model != model.id or other.state != DONE or not made:
            raise HTTPException(409, "that job did not make a pruned directory of this model")
    return _job(service, service.add_job(model, asked.kind, asked.model_dump()))


@router.get("/jobs/{job}", tags=["jobs"])
async def show_job(job: Chosen, service: Served) -> JobShape:
    """One job."""
    return _job(service, job)


@router.delete("/jobs/{job}", tags=["jobs"])
async def cancel_job(job: Chosen, service: Served) -> JobShape:
    """Cancel a job; one that is over stays as it is."""
    return _job(service, await service.cancel(job))


@router.get(
    "/jobs/{job}/events",
    tags=["jobs"],
    response_class=StreamingResponse,
    responses=EVENTS,
)
async def follow_job(job: Chosen, service: Served) -> StreamingResponse:
    """The job at each change, as server-sent events, until it is over."""

    def state() -> tuple[JobShape | None, bool]:
        try:
            found = service.store.job(job.id)
            service.touch(service.store.model(found.model))
        except LookupError:
            return None, True
        return _job(service, found), found.is_over

    return _events(service, state)


FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string"}}}}
}


@router.get("/jobs/{job}/model", tags=["jobs"], response_class=FileResponse, responses=FILE)
async def download_model(job: Chosen, service: Served) -> FileResponse:
    """The model that a job made."""
    if job.state != DONE or not job.result or not job.result.get("file"):
        raise HTTPException(409, f"the job is {job.state} and has made no model")
    name = job.result["file"]
    stem = re.sub(r"[^\w.-]", "_", _stem(service.store.model(job.model).name))
    suffix = name[name.index(".") :]
    return FileResponse(
        service.result(job, name),
        media_type="application/octet-stream",
        filename=f"{stem}-{_label(job)}{suffix}",
    )


@router.get(
    "/jobs/{job}/report",
    tags=["jobs"],
    response_class=FileResponse,
    responses={200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
)
async def download_report(job: Chosen, service: Served) -> FileResponse:
    """What a job did, layer by layer, as JSON."""
    path = service.result(job, tasks.REPORT)
    if job.state != DONE or not path.exists():
        raise HTTPException(409, f"the job is {job.state} and has no report")
    return FileResponse(path, media_type="application/json", filename="report.json")


def _model(service: Service, model: Model) -> ModelShape:
    progress = service.progress.get(model.id, Progress("wait", None))
    is_open = model.state == WAITING
    values = asdict(model)
    return ModelShape(
        **{name: values[name] for name in ("id", "name", "kind", "bytes", "state", "error")},
        inputs=model.inputs,
        runs=model.kind == tasks.ZIP,
        stage=progress.stage if is_open else None,
        share=progress.share if is_open else None,
    )


def _job(service: Service, job: Job) -> JobShape:
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


def _events(service: Service, state: Callable[[], tuple[Any, bool]]) -> StreamingResponse:
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


def _kernels(
    service: Service, model: Model, layer: str, basis: str, sparsity: float, scope: str
) -> pictures.Kernels:
    found = service.curves(model)
    return pictures.kernels(found, _layer(found, layer), basis, sparsity, scope)


def _layer(found: Any, name: str) -> int:
    for i, facts in enumerate(found.layers):
        if facts.name == name:
            return i
    raise HTTPException(404, f"there is no layer {name!r}")


def _shown(name: str) -> str:
    """A file name as it is shown: the last part of a path, without what is no text."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(c for c in last if c.isprintable())[-LONGEST_NAME:]


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _suffix(name: str, allowed: tuple[str, ...]) -> str:
    suffix = f".{name.rpartition('.')[2].lower()}" if "." in name else ""
    if suffix not in allowed:
        raise HTTPException(
            422, f"{name!r} is of no kind that is taken; allowed: {', '.join(allowed)}"
        )
    return suffix


def _label(job: Job) -> str:
    settings = job.settings
    amount = f"{settings['sparsity']:g}"
    if job.kind == "compress" and settings["target_bytes"] is not None:
        amount = f"{settings['target_bytes']}B"
    return f"{job.kind}-{settings['basis']}-{amount}"


def _length(request: Request) -> int | None:
    text = request.headers.get("content-length")
    return int(text) if text and text.isascii() and text.isdigit() else None

"""The API of models under ``/api/v1``: uploaded, looked at and previewed."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse

from .._version import __version__
from ..checkpoint import formats
from ..config import AUTO
from . import pictures, tasks
from .analysis import ModelCurves
from .answers import events_document, events_of, model_shape
from .guard import COOKIE, same, session_of
from .preview import curves, preview
from .requests import (
    BINARY,
    PROBLEMS,
    FileName,
    Named,
    Served,
    length_of,
    service_of,
    shown_name,
    suffix_of,
)
from .service import Service
from .shapes import (
    AboutShape,
    CurvesShape,
    KernelsShape,
    LayerShape,
    LayersShape,
    ModelShape,
    PreviewAsked,
    PreviewShape,
    TokenAsked,
)
from .store import WAITING, Model

# Of checkpoints that can be uploaded, and of inputs.
FILES = (*formats.SAFETENSORS, *formats.STATE_DICTS, *formats.ONNX)
ARRAYS, IMAGES = ".npz", (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_INPUTS = 4096

router = APIRouter(prefix="/api/v1", responses=PROBLEMS)


@router.post("/session", status_code=204, tags=["session"])
async def begin_session(asked: TokenAsked, request: Request, response: Response) -> None:
    """Keep the token in a cookie of the browser, which a page cannot read."""
    token = service_of(request).settings.token
    if token is not None:
        if not same(asked.token, token):
            raise HTTPException(401, "this is not the token of the service")
        response.set_cookie(COOKIE, session_of(token), httponly=True, samesite="strict")


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
    return [model_shape(service, model) for model in service.store.models()]


@router.post("/models", status_code=201, tags=["models"], openapi_extra=BINARY)
async def upload_model(name: FileName, request: Request, service: Served) -> ModelShape:
    """Upload a checkpoint: the body is the file.

    A `.safetensors` file, a `.pt`, `.pth` or `.bin` state dict, an `.onnx` graph, or a `.zip` of a
    Hugging Face directory. It is written to disk as it comes; nothing in it is run or unpickled.
    Then its curves are measured: follow `/models/{model}/events`, or ask for the model until it is
    `ready`.
    """
    shown = shown_name(name)
    kind = suffix_of(shown, (*FILES, tasks.ZIP))
    with service.models.incoming(length_of(request)) as upload:
        async for part in request.stream():
            upload.write(part)
        if not upload.size:
            raise HTTPException(422, "the body is empty; send the file as it is")
        upload.complete()
        return model_shape(service, service.models.add(upload.path, shown, kind))


@router.get("/models/{model}", tags=["models"])
async def show_model(model: Named, service: Served) -> ModelShape:
    """One model."""
    return model_shape(service, model)


@router.delete("/models/{model}", status_code=204, tags=["models"])
async def remove_model(model: Named, service: Served) -> None:
    """Forget a model, with its jobs and all their files."""
    await service.remove_model(model)


@router.post("/models/{model}/inputs", status_code=201, tags=["models"], openapi_extra=BINARY)
async def upload_inputs(
    name: FileName, model: Named, request: Request, service: Served
) -> ModelShape:
    """Add calibration inputs: an `.npz` file, or one image.

    The file has `images`, `(N, C, H, W)` or `(N, H, W)`, or `inputs`, `(N, C, ...)`.

    No labels are needed. The last `.npz` file is used, or all images.
    """
    suffix = suffix_of(shown_name(name), (ARRAYS, *IMAGES))
    if model.inputs >= MOST_INPUTS:
        raise HTTPException(507, f"the model has {MOST_INPUTS} files of inputs, which is the most")
    service.models.curves(model)
    with service.models.incoming(length_of(request)) as upload:
        async for part in request.stream():
            upload.write(part)
        upload.complete()
        try:
            found = service.store.model(model.id)
        except LookupError as error:
            raise HTTPException(404, str(error.args[0])) from error
        return model_shape(service, service.models.add_input(upload.path, found, suffix))


@router.get("/models/{model}/layers", tags=["preview"])
async def list_layers(
    model: Named, service: Served, sparsity: Annotated[float, Query(ge=0, lt=1)] = 0.5
) -> LayersShape:
    """The layers that can be pruned, each with its best basis at a sparsity."""
    found = service.models.curves(model)
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
    found = preview(service.models.curves(model), asked.basis, asked.sparsity, asked.scope)
    layers = [layer._asdict() for layer in found.layers]
    return PreviewShape.model_validate({**found._asdict(), "layers": layers})


@router.get("/models/{model}/curves", tags=["preview"])
async def show_curves(
    model: Named, service: Served, layer: Annotated[str | None, Query(max_length=1024)] = None
) -> CurvesShape:
    """Error against sparsity and bytes against error in every basis, of a layer or of all."""
    found = service.models.curves(model)
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
    responses=events_document(ModelShape),
)
async def follow_model(model: Named, service: Served) -> StreamingResponse:
    """The model at each change, as server-sent events, until it is ready or refused."""

    def state() -> tuple[ModelShape | None, bool]:
        try:
            found = service.store.model(model.id)
        except LookupError:
            return None, True
        service.models.touch(found)
        return model_shape(service, found), found.state != WAITING

    return events_of(service, state)


def _kernels(
    service: Service, model: Model, layer: str, basis: str, sparsity: float, scope: str
) -> pictures.Kernels:
    found = service.models.curves(model)
    return pictures.kernels(found, _layer(found, layer), basis, sparsity, scope)


def _layer(found: ModelCurves, name: str) -> int:
    for i, facts in enumerate(found.layers):
        if facts.name == name:
            return i
    raise HTTPException(404, f"there is no layer {name!r}")

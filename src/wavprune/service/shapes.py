"""What goes through the API, field by field; the OpenAPI document is made of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..config import AUTO

# Ids are made by the service; what looks otherwise is not looked up.
Identity = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Basis = Annotated[str, Field(min_length=1, max_length=64)]
MOST_CHANNELS = 16
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Shape(BaseModel):
    """A JSON object without other fields than these."""

    model_config = ConfigDict(extra="forbid")


class Problem(Shape):
    """Why a request was refused."""

    detail: str


class AboutShape(Shape):
    """What the service takes."""

    version: str
    kinds: list[str] = Field(description="suffixes of checkpoints that can be uploaded")
    inputs: list[str] = Field(description="suffixes of calibration inputs")
    upload_bytes: int
    disk_bytes: int
    queue: int = Field(description="jobs that may wait or run")
    idle_seconds: float = Field(description="how long a model is kept that nobody looks at")


class ModelShape(Shape):
    """A model that was uploaded."""

    id: str
    name: str
    kind: str = Field(description="the suffix of what was uploaded")
    bytes: int
    state: Literal["waiting", "ready", "refused"]
    error: str | None = Field(description="why it was refused")
    inputs: int = Field(description="files of calibration inputs that were uploaded for it")
    runs: bool = Field(
        description="once it is ready: whether the service can run it, to calibrate and to compare"
    )
    cannot_run: str | None = Field(None, description="once it is ready: why it cannot be run")
    stage: str | None = Field(description="what is being done to it")
    share: float | None = Field(description="how much of that is done, from 0 to 1")


class LayerShape(Shape):
    """A layer that can be pruned."""

    name: str
    shape: list[int]
    kernel: list[int]
    dtype: str
    weights: int
    best: str = Field(description="the basis with the least error at the sparsity asked for")


class LayersShape(Shape):
    """The layers of a model."""

    layers: list[LayerShape]
    bases: list[str] = Field(description="those that were measured")
    skipped: dict[str, str] = Field(description="layers that are left as they are, and why")
    weights: int
    bytes: int = Field(description="of all tensors of the model")


class PreviewAsked(Shape):
    """Settings to try."""

    basis: Basis = AUTO
    sparsity: Fraction = 0.5
    scope: Literal["layer", "global"] = "layer"


class LayerPreviewShape(Shape):
    """What would become of a layer."""

    name: str
    basis: str
    best: str
    sparsity: float
    kept: int
    error: float
    bytes: int


class PreviewShape(Shape):
    """What would become of a model."""

    basis: str
    sparsity: float
    kept: int
    error: float = Field(description="relative change of the weights")
    bytes: int = Field(description="of the compressed file, values of 8 bits; an estimate")
    errors: dict[str, float] = Field(description="the same error in every basis")
    layers: list[LayerPreviewShape]


class SeriesShape(Shape):
    """The curves of one basis."""

    errors: list[float] = Field(description="relative, at each sparsity")
    sizes: list[int] = Field(description="bytes at each step")
    size_errors: list[float] = Field(description="relative, at each step; at most")


class CurvesShape(Shape):
    """Error against sparsity, and bytes against error, in every basis."""

    sparsity: list[float]
    steps: list[float] = Field(description="distance of neighboring values over a weight's norm")
    bases: dict[str, SeriesShape]


class JobAsked(Shape):
    """What to do with a model."""

    kind: Literal["prune", "compress", "calibrate", "compare"]
    basis: Basis = AUTO
    sparsity: Fraction = 0.5
    scope: Literal["layer", "global"] = "layer"
    target_bytes: Annotated[int, Field(ge=1, le=1 << 50)] | None = Field(
        None, description="compress: how large the file becomes; in place of the sparsity"
    )
    matrices: bool = Field(True, description="compress to a size: matrices too, not only kernels")
    level: Literal["refit", "select", "sequential", "full"] = Field(
        "refit", description="calibrate: how much is solved for"
    )
    image_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="of images; without it the model's own preprocessing, or a graph's size"
    )
    mean: Annotated[list[Finite], Field(min_length=1, max_length=MOST_CHANNELS)] = Field(
        [0.0], description="of pixels from 0 to 1: (x - mean) / std"
    )
    std: Annotated[list[Positive], Field(min_length=1, max_length=MOST_CHANNELS)] = Field(
        [1.0], description="likewise; one value a channel, or for all"
    )
    job: Identity | None = Field(None, description="compare: the job whose result is compared")

    @model_validator(mode="after")
    def _fits(self) -> JobAsked:
        if self.kind == "compare" and self.job is None:
            raise ValueError("compare needs job: the id of a job that pruned the model")
        if self.kind == "compress" and self.scope == "global":
            raise ValueError("compress takes scope 'layer'; prune with 'global' instead")
        return self


class ResultShape(Shape):
    """What a job made."""

    file: str | None = Field(None, description="the name of the model, to download")
    bytes: int | None = None
    kept: int | None = None
    sparsity: float | None = None
    error: float | None = Field(None, description="relative change of the weights")
    agreement: float | None = Field(None, description="share of inputs with the same first class")
    kl: float | None = Field(None, description="mean divergence of the outputs, in nats")
    output_error: float | None = Field(None, description="relative change of the outputs")
    inputs: int | None = None
    seconds: float


class JobShape(Shape):
    """A job and how far it is."""

    id: str
    model: str
    kind: str
    settings: JobAsked
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    stage: str | None
    share: float | None
    error: str | None
    result: ResultShape | None
    created: float
    started: float | None
    finished: float | None


class KernelsShape(Shape):
    """Kernels of a layer before and after pruning, and their coefficients."""

    layer: str
    basis: str
    kernel: list[int] = Field(description="rows and columns of each picture")
    grid: list[int] = Field(description="rows and columns of the coefficients")
    before: list[list[float]]
    coefficients: list[list[float]]
    kept: list[list[bool]]
    after: list[list[float]]


class TokenAsked(Shape):
    """The token of the service, for a browser that keeps it in a cookie."""

    token: Annotated[str, Field(max_length=1024)]

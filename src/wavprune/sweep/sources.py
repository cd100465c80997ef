"""Where the models and data of a sweep come from, as its file says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from ..common.optional import require

try:
    from pydantic import (
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Discriminator,
        Field,
        Tag,
        ValidationInfo,
    )
except ImportError:
    require("pydantic", extra="sweep", purpose="a sweep")
    raise


def _resolved(path: object, info: ValidationInfo) -> object:
    """Paths are relative to the sweep file's folder."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError("Input should be a path")  # noqa: TRY004  # pydantic reports only ValueError
    root = (info.context or {}).get("root", ".")
    return Path(root, Path(path).expanduser()).absolute()


def as_tuple(value: object) -> tuple[object, ...]:
    """A single value is a list of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _kind(*kinds: str) -> Any:
    """Tells which of several kinds of source a mapping is: the one whose key it has."""

    def choose(value: object) -> str | None:
        if isinstance(value, str):
            return "builtin"
        if isinstance(value, Mapping):
            present = [kind for kind in kinds if kind in value]
            return present[0] if len(present) == 1 else None
        return next((kind for kind in kinds if hasattr(value, kind)), None)

    return Discriminator(
        choose,
        custom_error_type="source",
        custom_error_message=f"allowed: demo, or a mapping with one of {', '.join(kinds)}",
    )


FACTORY = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"
FilePath = Annotated[Path, BeforeValidator(_resolved)]


class Settings(BaseModel):
    """A mapping of a sweep file: no other keys than these, no values of other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Source(Settings):
    """Where a model or data comes from.

    Attributes:
        name: its name in the results; by default made from where it comes from.
    """

    name: str = ""

    @property
    def label(self) -> str:
        """The name in the results."""
        return self.name or self._default()

    def _default(self) -> str:
        raise NotImplementedError


class Factory(_Source):
    """What a function returns.

    Attributes:
        factory: ``package.module:function``; the sweep file's folder is searched first.
        arguments: its keyword arguments.
        root: the sweep file's folder.
    """

    factory: str = Field(pattern=FACTORY)
    arguments: dict[str, Any] = {}
    root: Annotated[Path, BeforeValidator(_resolved)] = Field(default=Path(), validate_default=True)

    def _default(self) -> str:
        return self.factory.partition(":")[2]


class BuiltinModel(_Source):
    """A network of ``wavprune.demo``.

    Attributes:
        builtin: ``"demo"``, the ResNet, or ``"demo-mlp"``.
        seed: which of its trainings.
    """

    builtin: Literal["demo", "demo-mlp"]
    seed: int = Field(default=0, ge=0)

    def _default(self) -> str:
        return f"{self.builtin}-{self.seed}" if self.seed else self.builtin


class DirectoryModel(_Source):
    """A Hugging Face directory that ``AutoModelForImageClassification`` reads.

    Attributes:
        directory: with ``config.json`` and safetensors weights, which have to be complete; with
            the config alone the network has random weights.
        seed: of the random weights.
    """

    directory: FilePath
    seed: int = Field(default=0, ge=0)

    def _default(self) -> str:
        return self.directory.name


class FactoryModel(Factory):
    """The module that a function returns.

    Attributes:
        weights: a safetensors file with its state dict; None keeps the weights it returns with.
        seed: torch's seed while the function runs.
    """

    weights: FilePath | None = None
    seed: int = Field(default=0, ge=0)

    def _default(self) -> str:
        return self.weights.stem if self.weights else super()._default()


class OnnxModel(_Source):
    """The network of an ONNX model, as ``wavprune.onnx.to_torch`` gives it.

    Attributes:
        onnx: the ``.onnx`` file.
    """

    onnx: FilePath

    def _default(self) -> str:
        return self.onnx.stem


class BuiltinData(_Source):
    """The digits of ``wavprune.demo``.

    Attributes:
        builtin: ``"demo"``.
        split: which part of the images.
    """

    builtin: Literal["demo"]
    split: Literal["train", "test"] = "test"

    def _default(self) -> str:
        return f"digits-{self.split}"


class _Images(_Source):
    """Images that are normalized to ``(x - mean) / std``, x from 0 to 1.

    Attributes:
        mean: one value per channel, or one for all.
        std: one value per channel, or one for all.
        limit: use at most this many images, spread evenly over all of them.
    """

    mean: Annotated[tuple[float, ...], BeforeValidator(as_tuple)] = Field(
        default=(0.0,), min_length=1
    )
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(as_tuple)] = Field(
        default=(1.0,), min_length=1
    )
    limit: int | None = Field(default=None, ge=1)


class FolderData(_Images):
    """A folder with a subfolder of images for each class, in alphabetical order.

    Attributes:
        images: the folder.
        size: ``(height, width)`` of the network's input, or one number for both.
        resize: scale the shorter side to this before the center of ``size`` is cropped; None
            scales to ``size``, whatever the proportions.
        channels: 3 for RGB, 1 for gray.
    """

    images: FilePath
    size: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(as_tuple)] = Field(
        default=(224,), min_length=1, max_length=2
    )
    resize: int | None = Field(default=None, ge=1)
    channels: Literal[1, 3] = 3

    def _default(self) -> str:
        return self.images.name


class NpzData(_Images):
    """Arrays of an ``.npz`` file.

    Attributes:
        npz: the file. Its ``images`` are ``(N, C, H, W)`` or ``(N, H, W)``, or its ``inputs`` of
            any shape ``(N, C, ...)`` that the network reads, such as ``(N, C, L)``; floating point,
            or uint8, which is divided by 255. Its ``labels`` are ``(N,)`` integers.
    """

    npz: FilePath

    def _default(self) -> str:
        return self.npz.stem


class FactoryData(Factory):
    """What a function returns: a loader of batches, or a map-style dataset of samples.

    A run's id depends on its name, arguments and source, not on the data: give it another
    argument, such as a version, when files that it reads have changed.
    """


class MetricSource(Factory):
    """What the networks are measured by, in place of the measures of classifiers.

    Attributes:
        factory: ``package.module:Class`` of a ``torchmetrics.Metric``, such as
            ``torchmetrics.image:PeakSignalNoiseRatio``, or ``package.module:function`` of outputs
            and targets; the sweep file's folder is searched first. ``arguments`` are those of the
            class, or further ones of the function.
        name: what the results call it; by default the name of the class or function.
        higher_is_better: needed where the metric does not say it itself.
        logits: whether agreement and KL are measured; see ``wavprune.Measure``.
        output: the key or index of the network's output in what it returns.
        result: the entry to take where the metric computes a mapping.
    """

    higher_is_better: bool | None = None
    logits: bool | None = None
    output: str | int | None = None
    result: str | None = None


Model = BuiltinModel | DirectoryModel | FactoryModel | OnnxModel
Data = BuiltinData | FolderData | NpzData | FactoryData


def _builtin(value: object) -> object:
    return {"builtin": value} if isinstance(value, str) else value


ModelSource = Annotated[
    Annotated[BuiltinModel, Tag("builtin")]
    | Annotated[DirectoryModel, Tag("directory")]
    | Annotated[FactoryModel, Tag("factory")]
    | Annotated[OnnxModel, Tag("onnx")],
    _kind("builtin", "directory", "factory", "onnx"),
    BeforeValidator(_builtin),
]
DataSource = Annotated[
    Annotated[BuiltinData, Tag("builtin")]
    | Annotated[FolderData, Tag("images")]
    | Annotated[NpzData, Tag("npz")]
    | Annotated[FactoryData, Tag("factory")],
    _kind("builtin", "images", "npz", "factory"),
    BeforeValidator(_builtin),
]


def _factory(value: object) -> object:
    return {"factory": value} if isinstance(value, str) else value


Metric = Annotated[MetricSource, BeforeValidator(_factory)]


class Training(Settings):
    """How networks are fine-tuned after pruning, while what was pruned stays pruned.

    Attributes:
        data: what they are trained on.
        batch_size: samples per batch.
        optimizer: ``"sgd"``, with Nesterov's momentum of 0.9, or ``"adamw"``.
        learning_rate: at the start; it falls to 0 along a cosine.
        weight_decay: of the optimizer.
        loss: ``package.module:function`` of outputs and targets; None is the cross entropy.
        seed: of the order of the batches, and of dropout.
        root: the sweep file's folder.
    """

    data: DataSource
    batch_size: int = Field(default=64, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=0.01, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    loss: str | None = Field(default=None, pattern=FACTORY)
    seed: int = Field(default=0, ge=0)
    root: Annotated[Path, BeforeValidator(_resolved)] = Field(default=Path(), validate_default=True)


_DATA: dict[Any, type[Settings]] = {
    "builtin": BuiltinData,
    "images": FolderData,
    "npz": NpzData,
    "factory": FactoryData,
}
_MODELS: dict[Any, type[Settings]] = {
    "builtin": BuiltinModel,
    "directory": DirectoryModel,
    "factory": FactoryModel,
    "onnx": OnnxModel,
}
KINDS: dict[Any, dict[Any, type[Settings]]] = {
    "models": _MODELS,
    "model": _MODELS,
    "data": _DATA,
    "calibration": _DATA,
}

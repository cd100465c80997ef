"""Inputs without labels, to prune from: a folder of images, an ``.npz`` file, or a function."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..checkpoint.formats import ONNX
from ..common.optional import require
from ..errors import WavpruneError
from ..graph import read_model
from .data import SUFFIXES, Folder, Loader, arrays_of, labelled_files, limited, load_data
from .sources import FACTORY, FactoryData, FolderData, NpzData

PROCESSOR = "preprocessor_config.json"


def load_inputs(
    source: str,
    *,
    model: Path | None = None,
    size: Sequence[int] | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    limit: int | None = None,
    batch_size: int = 64,
    labels: bool = False,
    class_folders: bool = False,
) -> Loader:
    """The batches of some inputs, always in the same order, without labels unless asked for.

    Args:
        source: a folder, whose images are taken with those of its subfolders; an ``.npz`` file with
            ``images``, ``(N, C, H, W)`` or ``(N, H, W)``, or ``inputs``, ``(N, C, ...)``, uint8 or
            floating point; or ``package.module:function``, which returns a loader of batches or a
            dataset.
        model: a Hugging Face directory: its own image processor prepares the images of a folder
            where ``size`` is not given. Or an ``.onnx`` file: its input says how many channels
            images have, and where it is of a fixed size, what ``size`` is if it is not given.
        size: ``(height, width)`` of the images of a folder, or ``(size,)`` for both.
        mean: of each channel, or one for all; images become ``(x - mean) / std``, x from 0 to 1.
        std: of each channel, or one for all.
        limit: at most so many, spread evenly; a function makes its own choice.
        batch_size: inputs per batch; a function that returns a loader makes its own batches.
        labels: with the ``labels`` of an ``.npz`` file, where it has some.
        class_folders: the subfolders of a folder are its classes, in alphabetical order.

    Raises:
        WavpruneError: they cannot be loaded; the message says why.
        TypeError: a function returns no data.
        ImportError: what it needs is not installed.
    """
    path = Path(source).expanduser()
    if class_folders and not path.is_dir():
        raise WavpruneError(f"{source} is no folder, so it has no subfolders of classes")
    prepared = {"mean": tuple(mean), "std": tuple(std), "limit": limit}
    if path.suffix.lower() == ".npz":
        npz = NpzData.model_validate({"npz": path, **prepared})
        arrays = arrays_of(npz, labels=None if labels else False)
        if model is not None and model.suffix.lower() in ONNX:
            _check_axes(path, arrays.tensors[0], model)
        return DataLoader(limited(arrays, limit), batch_size)
    if path.is_dir():
        files = labelled_files(path) if class_folders else _unlabelled_files(path)
        return DataLoader(limited(_folder(path, files, model, size, prepared), limit), batch_size)
    if re.fullmatch(FACTORY, source):
        return load_data(FactoryData(factory=source), batch_size)
    raise WavpruneError(
        f"{source} is neither a folder of images, nor an .npz file, nor package.module:function"
    )


def _check_axes(path: Path, inputs: torch.Tensor, model: Path) -> None:
    """Raise WavpruneError where a graph reads inputs of another number of axes."""
    shape = read_model(model).input_shape()
    if shape and len(shape) != inputs.ndim:
        raise WavpruneError(
            f"{path} gives inputs {tuple(inputs.shape)}, and {model} reads {_shown(shape)}; "
            "allowed: inputs, in place of images, of the shape that the network reads"
        )


def _shown(shape: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


def _unlabelled_files(path: Path) -> list[tuple[Path, None]]:
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES]
    files = [file for file in files if file.is_file()]
    if not files:
        raise WavpruneError(f"{path} holds no images; searched for {', '.join(SUFFIXES)}")
    return [(file, None) for file in files]


def _folder(
    path: Path,
    files: Sequence[tuple[Path, int | None]],
    model: Path | None,
    size: Sequence[int] | None,
    prepared: dict[str, Any],
) -> Dataset[Any]:
    if model is not None and model.suffix.lower() in ONNX:
        channels, own_size = _of_graph(model)
        prepared = {**prepared, "channels": channels}
        size = own_size if size is None else size
    if size is not None:
        settings = FolderData.model_validate({"images": path, "size": tuple(size), **prepared})
        return Folder(settings, files)
    if model is None or not (model / PROCESSOR).is_file():
        where = ""
        if model is not None:
            lacks = f"has no {PROCESSOR}" if model.is_dir() else "takes images of any size"
            where = f" ({model} {lacks})"
        raise WavpruneError(
            f"{path}: how large the network's images are is not known{where}; give their size"
        )
    return _Processed(files, _processor(model))


def _of_graph(model: Path) -> tuple[int, tuple[int, int] | None]:
    """How many channels the input of a graph has, and its height and width where they are fixed."""
    shape = read_model(model).input_shape()
    channels = shape[1] if len(shape) == 4 else None
    if channels not in (1, 3):
        raise WavpruneError(
            f"{model} reads {_shown(shape) or 'no tensor'}, no images (N, 1, H, W) or "
            "(N, 3, H, W); give an .npz file"
        )
    height, width = shape[2:]
    return channels, None if height is None or width is None else (height, width)


def _processor(model: Path) -> Callable[..., Any]:
    transformers = require("transformers", extra="huggingface", purpose="an image processor")
    try:
        processor: Callable[..., Any] = transformers.AutoImageProcessor.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise WavpruneError(f"{model / PROCESSOR} cannot be loaded: {error}") from error
    return processor


class _Processed(Dataset[Any]):
    """Images as a model's own processor prepares them."""

    def __init__(
        self, files: Sequence[tuple[Path, int | None]], processor: Callable[..., Any]
    ) -> None:
        self._files, self._processor = files, processor

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor | tuple[torch.Tensor, int]:
        image = require("PIL.Image", extra="sweep", purpose="a folder of images")
        path, label = self._files[index]
        try:
            with image.open(path) as file:
                values = self._processor(images=[file.convert("RGB")], return_tensors="pt")
        except (OSError, image.DecompressionBombError) as error:
            raise WavpruneError(f"{path} cannot be read as an image: {error}") from error
        pixels: torch.Tensor = values["pixel_values"][0]
        return pixels if label is None else (pixels, label)

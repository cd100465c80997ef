"""Loads the data of a sweep as batches of ``(images, labels)``."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ..common.optional import require
from ..errors import WavpruneError
from .factories import call_factory, factory_digest
from .sources import BuiltinData, Data, FactoryData, FolderData, NpzData

Loader = Iterable[Any]

# Bytes of an array of an .npz file, unpacked.
LARGEST_ARRAY = 1 << 34
# What an .npz file has one of, and its shape.
SHAPES = {"images": "(N, C, H, W) or (N, H, W)", "inputs": "(N, C, ...)"}
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_data(source: Data, batch_size: int) -> Loader:
    """The batches of a source, always in the same order.

    Args:
        source: where the data comes from.
        batch_size: samples per batch; a factory that returns a loader makes its own batches.

    Raises:
        WavpruneError: it cannot be loaded; the message says why.
        TypeError: a factory is not a function, or does not return data.
        ImportError: what it needs is not installed.
    """
    if isinstance(source, BuiltinData):
        from .. import demo

        loader: Loader = demo.digits(source.split, batch_size=batch_size)
        return loader
    if isinstance(source, FactoryData):
        data = call_factory(source)
        if isinstance(data, Dataset):
            return DataLoader(data, batch_size)
        if not isinstance(data, Iterable):
            raise TypeError(
                f"factory {source.factory!r} returned a {type(data).__name__}; allowed: a loader "
                "of batches, or a dataset"
            )
        return data
    if isinstance(source, NpzData):
        return DataLoader(limited(arrays_of(source, labels=True), source.limit), batch_size)
    folder = Folder(source, labelled_files(source.images))
    return DataLoader(limited(folder, source.limit), batch_size)


def data_identity(source: Data) -> str:
    """A hash of the data and how it is prepared; of a factory, its name, arguments and source."""
    settings = source.model_dump(mode="json", exclude={"name", "root", "images", "npz"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if isinstance(source, NpzData):
        _check_file(source.npz)
        files = [("", source.npz)]
    elif isinstance(source, FolderData):
        files = [
            (str(path.relative_to(source.images)), path)
            for path, _ in labelled_files(source.images)
        ]
    else:
        files = []
        if isinstance(source, FactoryData):
            digest.update(factory_digest(source).encode())
    for name, path in files:
        digest.update(name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class Folder(Dataset[Any]):
    """The images of a folder.

    Args:
        source: how an image becomes ``(channels, height, width)`` float32.
        samples: the images, with their labels; without any, samples are images alone.

    Raises:
        WavpruneError: ``mean`` or ``std`` do not fit.
        ImportError: Pillow is not installed.
    """

    def __init__(self, source: FolderData, samples: Sequence[tuple[Path, int | None]]) -> None:
        require("PIL.Image", extra="sweep", purpose="a folder of images")
        self._samples = samples
        self._source = source
        self._mean, self._std = _normalization(source, source.channels)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> torch.Tensor | tuple[torch.Tensor, int]:
        path, label = self._samples[index]
        values = torch.from_numpy(self._read(path)).to(torch.float32) / 255
        values = values.reshape(*values.shape[:2], self._source.channels).permute(2, 0, 1)
        values = (values - self._mean) / self._std
        return values if label is None else (values, label)

    def _read(self, path: Path) -> np.ndarray[Any, Any]:
        from PIL import Image, UnidentifiedImageError

        source = self._source
        height, width = source.size * 2 if len(source.size) == 1 else source.size
        try:
            with Image.open(path) as file:
                image = file.convert("RGB" if source.channels == 3 else "L")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise WavpruneError(f"{path} cannot be read as an image: {error}") from error
        if source.resize is None:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        else:
            scale = source.resize / min(image.size)
            scaled = tuple(max(round(side * scale), 1) for side in image.size)
            image = image.resize((scaled[0], scaled[1]), Image.Resampling.BILINEAR)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            # Where the crop is larger than the image, it is black.
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image).copy()


def labelled_files(folder: Path) -> list[tuple[Path, int]]:
    """The images of a folder with a subfolder for each class, in alphabetical order.

    Raises:
        WavpruneError: it holds none.
    """
    if not folder.is_dir():
        raise WavpruneError(
            f"{folder} is not a folder; allowed: one with a subfolder for each class"
        )
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    samples = [
        (path, label)
        for label, folder_of_class in enumerate(classes)
        for path in sorted(folder_of_class.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not samples:
        raise WavpruneError(
            f"{folder} has no images in subfolders, one for each class; the {len(classes)} "
            f"subfolders were searched for {', '.join(SUFFIXES)}"
        )
    return samples


def arrays_of(source: NpzData, *, labels: bool | None = None) -> TensorDataset:
    """The images or other inputs of an ``.npz`` file, perhaps with their labels.

    Args:
        source: the file, and how its values are normalized.
        labels: read them too; None where it has some, True says that it must.

    Raises:
        WavpruneError: it cannot be read, holds no inputs, or they are of a shape or dtype that is
            not allowed.
    """
    names = [*SHAPES] if labels is False else [*SHAPES, "labels"]
    arrays = _read_arrays(source.npz, names, bool(labels))
    (name,) = arrays.keys() - {"labels"}
    inputs = arrays[name]
    if "labels" not in arrays:
        if not _has_shape(name, inputs):
            raise WavpruneError(f"{source.npz}: {name} are {inputs.shape}; allowed: {SHAPES[name]}")
        return TensorDataset(_normalized(source, name, inputs))
    classes = arrays["labels"]
    if not _has_shape(name, inputs) or classes.shape != (len(inputs),):
        raise WavpruneError(
            f"{source.npz}: {name} are {inputs.shape} and labels {classes.shape}; allowed: "
            f"{SHAPES[name]}, and (N,)"
        )
    if classes.dtype.kind not in "iu":
        raise WavpruneError(f"{source.npz}: labels are {classes.dtype}; allowed: integers")
    values = _normalized(source, name, inputs)
    return TensorDataset(values, torch.from_numpy(classes.astype(np.int64)))


def _has_shape(name: str, inputs: np.ndarray[Any, Any]) -> bool:
    return inputs.ndim in (3, 4) if name == "images" else inputs.ndim >= 2


def _read_arrays(
    path: Path, names: Sequence[str], needs_labels: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """One of ``SHAPES``, and the labels where there are some."""
    _check_file(path)
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names if name in file}
            held = list(file)
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise WavpruneError(f"{path} cannot be read as an .npz file: {error}") from error
    if len(arrays.keys() - {"labels"}) != 1 or (needs_labels and "labels" not in arrays):
        needed = " or ".join(SHAPES) + (", and labels" if needs_labels else "")
        raise WavpruneError(f"{path} holds {', '.join(held) or 'nothing'}; needed: {needed}")
    return arrays


def _normalized(source: NpzData, name: str, inputs: np.ndarray[Any, Any]) -> torch.Tensor:
    """``(N, C, ...)``."""
    if inputs.dtype != np.uint8 and inputs.dtype.kind != "f":
        raise WavpruneError(
            f"{source.npz}: {name} are {inputs.dtype}; allowed: uint8 or floating point"
        )
    if name == "images" and inputs.ndim == 3:
        inputs = inputs[:, None]
    values = torch.from_numpy(inputs.astype(np.float32))
    if inputs.dtype == np.uint8:
        values /= 255
    mean, std = _normalization(source, inputs.shape[1], inputs.ndim - 2)
    return (values - mean) / std


def _check_sizes(path: Path) -> None:
    """Raise where an array is larger than its file says or than anything that is evaluated here."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename not in ("images.npy", "inputs.npy", "labels.npy"):
                continue
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0
                if version > (1, 0):
                    read = np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                size = math.prod(shape) * dtype.itemsize
                if size > entry.file_size - file.tell():
                    raise ValueError(f"{entry.filename} says {shape} of {dtype} and holds less")
                if size > LARGEST_ARRAY:
                    raise ValueError(
                        f"{entry.filename} takes {size} bytes; allowed: {LARGEST_ARRAY}"
                    )


def _normalization(
    source: FolderData | NpzData, channels: int, axes: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    for name, values in (("mean", source.mean), ("std", source.std)):
        if len(values) not in (1, channels):
            raise WavpruneError(
                f"{name} has {len(values)} values for images of {channels} channels; allowed: "
                f"1 or {channels}"
            )
    shape = (-1,) + (1,) * axes
    return torch.tensor(source.mean).view(shape), torch.tensor(source.std).view(shape)


def limited(dataset: Dataset[Any], limit: int | None) -> Dataset[Any]:
    """At most so many samples, spread evenly."""
    size = len(dataset)  # type: ignore[arg-type]  # both kinds have a length
    if limit is None or limit >= size:
        return dataset
    # Spread evenly, because a folder is sorted by class.
    chosen: Sequence[int] = [i * size // limit for i in range(limit)]
    return Subset(dataset, chosen)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise WavpruneError(f"{path} does not exist; allowed: an .npz file")

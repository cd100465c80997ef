"""The data of a sweep, from where its file says: a loader of ``(images, labels)`` batches."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from .models import imported
from .sources import BuiltinData, Data, FactoryData, FolderData, NpzData

Loader = Iterable[Any]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_data(source: Data, batch_size: int) -> Loader:
    """The batches of a source, always in the same order.

    Args:
        source: where from.
        batch_size: samples a batch; a factory that returns a loader has made its own batches.

    Raises:
        ValueError: it cannot be had from there; the message says why.
        TypeError: a factory is none, or returns no data.
        ImportError: what it needs is not installed.
    """
    if isinstance(source, BuiltinData):
        from .. import demo

        loader: Loader = demo.digits(source.split, batch_size=batch_size)
        return loader
    if isinstance(source, FactoryData):
        made = imported(source.factory, source.root)(**source.arguments)
        if isinstance(made, Dataset):
            return DataLoader(made, batch_size)
        if not isinstance(made, Iterable):
            raise TypeError(
                f"factory {source.factory!r} returned a {type(made).__name__}; allowed: a loader "
                "of batches, or a dataset"
            )
        return made
    if isinstance(source, NpzData):
        return DataLoader(_limited(_arrays(source), source.limit), batch_size)
    return DataLoader(_limited(Folder(source), source.limit), batch_size)


def data_identity(source: Data) -> str:
    """A hash of what a source holds and how it is prepared; a factory's name and arguments."""
    settings = source.model_dump(mode="json", exclude={"name", "root", "images", "npz"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if isinstance(source, NpzData):
        _check_file(source.npz)
        files = [("", source.npz)]
    elif isinstance(source, FolderData):
        files = [(str(path.relative_to(source.images)), path) for path, _ in _samples(source)]
    else:
        files = []
    for name, path in files:
        digest.update(name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class Folder(Dataset[tuple[torch.Tensor, int]]):
    """The images of a folder with a subfolder for each class.

    Args:
        source: the folder, and how an image becomes ``(channels, height, width)`` float32.

    Raises:
        ValueError: the folder has no images in subfolders, or ``mean`` or ``std`` do not fit.
        ImportError: Pillow is not installed.
    """

    def __init__(self, source: FolderData) -> None:
        try:
            import PIL.Image  # noqa: F401  # says at the start what the first image would
        except ImportError as error:
            raise ImportError(
                "a folder of images needs Pillow; pip install 'wavprune[sweep]'"
            ) from error
        self._samples = _samples(source)
        self._source = source
        self._mean, self._std = _normalisation(source, source.channels)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self._samples[index]
        values = torch.from_numpy(self._read(path)).to(torch.float32) / 255
        values = values.reshape(*values.shape[:2], self._source.channels).permute(2, 0, 1)
        return (values - self._mean) / self._std, label

    def _read(self, path: Path) -> np.ndarray[Any, Any]:
        from PIL import Image, UnidentifiedImageError

        source = self._source
        height, width = source.size * 2 if len(source.size) == 1 else source.size
        try:
            with Image.open(path) as file:
                image = file.convert("RGB" if source.channels == 3 else "L")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        if source.resize is None:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        else:
            scale = source.resize / min(image.size)
            scaled = tuple(max(round(side * scale), 1) for side in image.size)
            image = image.resize((scaled[0], scaled[1]), Image.Resampling.BILINEAR)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            # Outside of the image, a crop is black.
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image).copy()


def _samples(source: FolderData) -> list[tuple[Path, int]]:
    folder = source.images
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; allowed: one with a subfolder for each class")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    samples = [
        (path, label)
        for label, each in enumerate(classes)
        for path in sorted(each.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not samples:
        raise ValueError(
            f"{folder} has no images in subfolders, one for each class; the {len(classes)} "
            f"subfolders were searched for {', '.join(SUFFIXES)}"
        )
    return samples


def _arrays(source: NpzData) -> Dataset[Any]:
    path = source.npz
    _check_file(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels") if name in file}
            names = list(file)
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from error
    if len(arrays) < 2:
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}; needed: images and labels")
    images, labels = arrays["images"], arrays["labels"]
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or labels.shape != (len(images),):
        raise ValueError(
            f"{path}: images are {arrays['images'].shape} and labels {labels.shape}; allowed: "
            "(N, C, H, W) or (N, H, W), and (N,)"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels are {labels.dtype}; allowed: integers")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(f"{path}: images are {images.dtype}; allowed: uint8 or floating point")
    values = torch.from_numpy(images.astype(np.float32))
    if images.dtype == np.uint8:
        values /= 255
    mean, std = _normalisation(source, images.shape[1])
    return TensorDataset((values - mean) / std, torch.from_numpy(labels.astype(np.int64)))


def _normalisation(
    source: FolderData | NpzData, channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    for name, values in (("mean", source.mean), ("std", source.std)):
        if len(values) not in (1, channels):
            raise ValueError(
                f"{name} has {len(values)} values for images of {channels} channels; allowed: "
                f"1 or {channels}"
            )
    return torch.tensor(source.mean)[:, None, None], torch.tensor(source.std)[:, None, None]


def _limited(dataset: Dataset[Any], limit: int | None) -> Dataset[Any]:
    size = len(dataset)  # type: ignore[arg-type]  # both kinds have a length
    if limit is None or limit >= size:
        return dataset
    # Evenly spread, because folders come class by class.
    chosen: Sequence[int] = [i * size // limit for i in range(limit)]
    return Subset(dataset, chosen)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; allowed: an .npz file")

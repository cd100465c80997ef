"""Files of ``torch.save``: the one place that unpickles, guarded, and the one that writes them."""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...common.atomic import scratch_file
from ...common.files import check_regular, describe_content
from ...common.tensors import memory_key
from ...engine.layers import LayerRef
from ...errors import WavpruneError
from .names import Weight
from .nesting import Nested, flatten
from .safetensors import DTYPE_NAMES


class TorchFile:
    """Tensors in dicts and lists that ``torch.save`` wrote; see ``formats.WeightFile``.

    Args:
        path: the file.
        scratch: where a private copy may be made, which is mapped into memory; None reads the file
            into memory. The file itself is never mapped: others may cut it off.
    """

    def __init__(self, path: Path, scratch: Path | None = None) -> None:
        self.path = path
        self._content = load_tensors(path, scratch)
        try:
            self.nested: Nested = flatten(self._content)
        except WavpruneError as error:
            raise WavpruneError(f"{path} cannot be read as a checkpoint: {error}") from error
        self.weights: list[Weight] = self.nested.weights
        self.skipped = self.nested.skipped
        self.prefix = self.nested.prefix
        # A tensor that is there under several names becomes one object, to be pruned once.
        distinct: dict[Any, torch.Tensor] = {}
        self._tensors = {
            weight.layer: distinct.setdefault(
                memory_key(self.nested.tensors[weight.key]), self.nested.tensors[weight.key]
            )
            for weight in self.weights
        }

    def dtype(self, layer: str) -> str:
        """The dtype of a layer's weight, as safetensors calls it where it has it."""
        dtype = self._tensors[layer].dtype
        return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))

    def sizes(self) -> list[tuple[int, int]]:
        """Elements and bytes of every tensor, each memory once."""
        tensors = {memory_key(tensor): tensor for tensor in self.nested.tensors.values()}
        return [(t.numel(), t.numel() * t.element_size()) for t in tensors.values()]

    @contextmanager
    def open(self, layers: Sequence[str], copy: Path | None) -> Iterator[list[LayerRef]]:
        """The weights of some layers; see ``formats.WeightFile``."""
        yield [LayerRef(layer, self._tensors[layer]) for layer in layers]
        if copy is not None:
            save_tensors(self._content, copy)


def load_tensors(path: Path, scratch: Path | None = None) -> Any:
    """What ``torch.save`` wrote: tensors, numbers and strings in dicts and lists, and no code.

    Args:
        path: the file.
        scratch: a directory for a private copy to map; None reads the file into memory.

    Raises:
        WavpruneError: it is no such file, or reading it would run code.
    """
    check_regular(path)
    known = describe_content(path)
    if known is not None:
        raise WavpruneError(f"{path} cannot be read as a file of torch.save: it is {known}")
    if scratch is None or not _has_plain_tensors(path):
        return _unpickle(path, path, mmap=False)
    with scratch_file(scratch, path.name) as copy:
        shutil.copyfile(path, copy)
        # The mapping outlives the name.
        return _unpickle(copy, path, mmap=True)


def _unpickle(file: Path, path: Path, mmap: bool) -> Any:
    """The content of a file; errors name ``path``."""
    try:
        with warnings.catch_warnings():
            # What torch warns of here, it also fails on, or it does not matter to a state dict.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" of {named[1]}" if named else ""
        raise WavpruneError(
            f"{path} cannot be read without unpickling{what}, which would run whatever code is in "
            "the file, so it is refused; save a state dict of plain tensors, or safetensors"
        ) from error
    except RecursionError as error:
        raise WavpruneError(
            f"{path} cannot be read as a file of torch.save: its entries nest too deep"
        ) from error
    except Exception as error:  # bytes that are no checkpoint fail in every way there is
        reason = (str(error).splitlines() or [""])[0]
        raise WavpruneError(
            f"{path} cannot be read as a file of torch.save: {type(error).__name__}: {reason}"
        ) from error


def save_tensors(content: Any, path: Path) -> None:
    """Write a file as ``torch.save`` does.

    Raises:
        OSError: the disk is full, or the file cannot be written for another reason.
    """
    # Given a path, torch.save writes its name, here a random one, into the file.
    with path.open("wb") as file:
        output = _Output(file)
        try:
            torch.save(content, output)  # type: ignore[arg-type]  # all of a file that it needs
        except RuntimeError:
            # What torch raises says nothing of the reason.
            if output.error is not None:
                raise output.error from None
            raise


class _Output:
    """A file that remembers why writing to it failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _has_plain_tensors(path: Path) -> bool:
    """True for a zip archive whose members are not compressed, which can be mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False

"""ONNX files: their layers' weights, inline or in external data, pruned without the rest changing.

What is inline is at most 2 GB and read; external data is copied, tensor by tensor, into one file
beside the new model, and mapped there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ...engine.layers import LayerRef
from ...graph import GraphWeight, Model, find_weights, read_model
from ...graph.model import metadata_of, set_metadata
from ...graph.tensors import set_values
from ...graph.writing import DataFile, data_file, part, write_model
from .names import Weight
from .safetensors import DTYPE_NAMES


class OnnxFile:
    """An ONNX model; see ``formats.WeightFile``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model: Model = read_model(path)
        found, self.skipped = find_weights(self.model)
        self.graph_weights: dict[str, GraphWeight] = {weight.layer: weight for weight in found}
        self.weights = [Weight(weight.layer, weight.tensor, weight.shape) for weight in found]
        self._data: DataFile | None = None
        self._noted: dict[str, str] = {}

    @property
    def metadata(self) -> dict[str, str]:
        """What the model says of itself."""
        return metadata_of(self.model.proto)

    def make_room(self, entries: Mapping[str, str], size: int) -> None:
        """Nothing: a model is written when its entries are known."""

    def note(self, copy: Path, entries: Mapping[str, str]) -> None:
        """Let the copy that is open have these entries in its metadata."""
        del copy
        self._noted = dict(entries)

    @property
    def prefix(self) -> str:
        """What stands before every name: nothing."""
        return ""

    def dtype(self, layer: str) -> str:
        """The dtype of a layer's weight, as safetensors calls it."""
        tensor = self.model.tensors[self.graph_weights[layer].tensor]
        assert tensor.dtype is not None
        return DTYPE_NAMES[tensor.dtype]

    def sizes(self) -> list[tuple[int, int]]:
        """Elements, those of integers not counted, and bytes of every tensor."""
        return self.model.sizes()

    @contextmanager
    def beside(self, target: Path, *, force: bool) -> Iterator[None]:
        """Within the block, ``open`` writes a model that is to be at ``target``, with its data.

        Raises:
            WavpruneError: external data would replace a file, without ``force``.
        """
        with data_file(self.model, target, force=force) as self._data:
            try:
                yield
            finally:
                self._data = None

    @contextmanager
    def open(self, layers: Sequence[str], copy: Path | None) -> Iterator[list[LayerRef]]:
        """The weights of some layers: mapped in external data, else read; see ``WeightFile``."""
        chosen = [self.graph_weights[layer] for layer in layers]
        if copy is None:
            yield [_ref(weight, self.model.tensors[weight.tensor].read()) for weight in chosen]
            return
        model, data = self.model.copy(), self._data
        tensors = model.tensors
        mapped = None
        if data is not None:
            data.take(model, {weight.tensor for weight in chosen})
            mapped = data.mapped()
        opened = []
        for weight in chosen:
            tensor = tensors[weight.tensor]
            if tensor.path is None or data is None or mapped is None:
                values = tensor.read()
            else:
                values = part(tensor, mapped, data.place(tensor))
            opened.append((weight, tensor, values, _ref(weight, values)))
        yield [ref for *_, ref in opened]
        for weight, tensor, values, ref in opened:
            if ref.weight is not values:
                values.copy_(weight.back(ref.weight))
            if tensor.path is None:
                set_values(tensor.proto, values)
        set_metadata(model.proto, self._noted)
        write_model(model.proto, copy, data)


def _ref(weight: GraphWeight, values: torch.Tensor) -> LayerRef:
    """The values as torch has them: themselves, or a copy."""
    ordered = values if weight.in_order else weight.of(values).contiguous()
    return LayerRef(weight.layer, ordered, weight.transposed)

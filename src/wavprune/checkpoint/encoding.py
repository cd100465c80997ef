"""A layer's weight to the bytes of its tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..errors import WavpruneError
from .coders import CODERS, Coder, Symbols
from .compressor import ZSTD, Compressor, bytes_of, compressed
from .container import Writer
from .decoding import checksum, weights_of
from .formats.safetensors import DTYPES as TORCH_DTYPES
from .layer import Layer
from .quantisers import AUTO, Quantiser, exponent_for, quantise, quantise_weights
from .records import BITS, COMPRESSED, FLOATS, NONE, PARTS, Record
from .stored_basis import Floats, StoredBasis

# Below this share of values that are not 0, a bit a coefficient says where they are.
DENSE = 0.6
# Up to this many coefficients all automatic coders are tried: a Huffman table weighs little in a
# larger layer.
SMALL = 1 << 16
# float16 has its full precision for weights whose largest magnitude has such an exponent.
FLOAT16_EXPONENTS = (-10, 8)


class Encoded(NamedTuple):
    """What became of a layer.

    Attributes:
        record: for the file's metadata.
        error: Frobenius norm of the weight as it will be loaded less as it was.
        norm: Frobenius norm of the weight as it was.
        relative_error: of the two, also where these are too small or too large for a float.
        kept: coefficients that are not 0.
    """

    record: Record
    error: float
    norm: float
    relative_error: float
    kept: int


class BasisStore:
    """The bases that a file holds already, each in the tensor that came first."""

    def __init__(self) -> None:
        self._stored: dict[tuple[StoredBasis, bytes], StoredBasis] = {}

    def add(self, layer: Layer, tensor: str) -> tuple[StoredBasis | None, bytes]:
        """The basis of a layer as its record has it, and its bytes where they are due here."""
        if layer.basis is None:
            return None, b""
        key = (layer.basis, layer.basis_bytes)
        if key in self._stored:
            return self._stored[key], b""
        self._stored[key] = replace(layer.basis, tensor=tensor)
        return self._stored[key], layer.basis_bytes


def encode(
    layer: Layer, quantiser: Quantiser, writer: Writer, bases: BasisStore, tensor: str
) -> Encoded:
    """Write the bytes of a layer's tensor.

    Args:
        layer: the weight.
        quantiser: how its values are stored.
        writer: gets the bytes.
        bases: what the file holds already.
        tensor: the name of the tensor.

    Returns:
        Its record, and the error.

    Raises:
        WavpruneError: the values do not fit.
    """
    if quantiser.values == "float16":
        layer = layer.rescaled(layer.exponent or exponent_for(layer.peak, *FLOAT16_EXPONENTS))
    scales = quantiser.scales(layer)
    basis, basis_bytes = bases.add(layer, tensor)
    draft = Record(
        dtype=layer.dtype,
        shape=layer.shape,
        basis=basis,
        values=quantiser.values,
        coder=ZSTD,
        mask=NONE,
        kept=0,
        sizes=(),
        crc=0,
        exponent=layer.exponent,
    )
    tally = _Tally(layer, draft, scales)
    scale_bytes = b"" if scales is None else scales.astype("<f4").tobytes()
    writer.write(scale_bytes)
    writer.write(basis_bytes)
    if scales is None:
        body = _floats(layer, FLOATS[quantiser.values], tally, writer)
    else:
        body = _symbols(layer, quantiser, scales, tally, writer)
    writer.write(body.high)
    writer.write(body.mask_bytes)
    sizes = {
        "scales": len(scale_bytes),
        "matrix": len(basis_bytes),
        "values": body.size,
        "high": len(body.high),
        "mask": len(body.mask_bytes),
    }
    record = replace(
        draft,
        coder=body.coder,
        mask=body.mask,
        kept=body.kept,
        sizes=tuple(sizes[part] for part in PARTS),
        crc=tally.crc,
        parameter=body.parameter,
    )
    error, norm = math.sqrt(tally.squared_error), layer.norm
    return Encoded(
        record=record,
        error=scaled(error, layer.exponent),
        norm=scaled(norm, layer.exponent),
        relative_error=error / norm if norm else 0.0,
        kept=tally.kept,
    )


def scaled(value: float, exponent: int) -> float:
    """A value times ``2 ** exponent``."""
    return float(np.ldexp(value, exponent)) if exponent else value


class _Tally:
    """What decoding will give: its checksum, and how far it is from what was there."""

    def __init__(self, layer: Layer, draft: Record, scales: Floats | None) -> None:
        self._layer, self._draft, self._scales = layer, draft, scales
        self.crc, self.squared_error, self.kept = 0, 0.0, 0

    def add(self, start: int, values: npt.NDArray[Any]) -> None:
        layer = self._layer
        self.kept += int(np.count_nonzero(values))
        weights = weights_of(values, layer.synthesis, self._scales, start, self._draft)
        stored = torch.from_numpy(weights).to(TORCH_DTYPES[layer.dtype])
        self.crc = checksum(stored.view(-1).view(torch.uint8).numpy(), self.crc)
        before = layer.weights(start, len(weights))
        after = stored.to(torch.from_numpy(before).dtype).numpy()
        change = (np.ldexp(after, -layer.exponent) if layer.exponent else after) - before
        self.squared_error += float(np.vdot(change, change))


@dataclass(frozen=True)
class _Body:
    """Values, and where they belong.

    Attributes:
        size: bytes of the values, which are written already.
        high: high bytes of the values.
        mask: see ``Record``.
        mask_bytes: of the mask.
        kept: how many values there are.
        coder: what coded them.
        parameter: of the coder.
    """

    size: int
    high: bytes
    mask: str
    mask_bytes: bytes
    kept: int
    coder: str = ZSTD
    parameter: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.size + len(self.high) + len(self.mask_bytes)


def _symbols(
    layer: Layer, quantiser: Quantiser, scales: Floats, tally: _Tally, writer: Writer
) -> _Body:
    runs = _quantised(layer, scales, tally)
    chunk = next(runs)
    coefficients = len(layer.kernels) * layer.M
    coder = quantiser.coder
    if coder != AUTO and (most := CODERS[coder].most) is not None and coefficients > most:
        coder = AUTO
    limited = coder != AUTO and CODERS[coder].most is not None
    if chunk.size == coefficients and (coefficients <= SMALL or limited):
        names = [coder]
        if coder == AUTO:
            names = [name for name in CODERS if CODERS[name].automatic]
        body, values = _smallest(chunk, names)
        writer.write(values)
        return body
    is_dense = bool(np.count_nonzero(chunk) >= DENSE * chunk.size)
    name = ZSTD if coder == AUTO else coder
    return _streamed(itertools.chain([chunk], runs), is_dense, name, writer)


def _quantised(layer: Layer, scales: Floats, tally: _Tally) -> Iterator[Symbols]:
    """The symbols of each chunk, ``(M, kernels)``."""
    per_scale = len(layer.kernels) // len(scales)
    for start, coefficients in layer.chunks():
        count = coefficients.shape[1]
        scale = scales
        if len(scales) > 1:
            scale = scales[np.arange(start, start + count) // per_scale]
        if layer.analysis is None and layer.keep is None:
            symbols = quantise_weights(coefficients, scale, start, layer)
        else:
            symbols = quantise(coefficients, scale)
        tally.add(start, symbols)
        yield symbols


def _streamed(runs: Iterable[Symbols], is_dense: bool, name: str, writer: Writer) -> _Body:
    """Symbols by a coder that takes any number, as they come."""
    encoder = CODERS[name].encoder()
    size = kept = 0
    masks: list[bytes] = []
    for symbols in runs:
        rows = symbols
        if not is_dense:
            nonzero = symbols != 0
            masks.append(np.packbits(nonzero, bitorder="little").tobytes())
            rows = symbols[nonzero][None]
        size += writer.write(encoder.add(rows))
        kept += rows.size
    coded = encoder.finish()
    if coded is None:
        raise WavpruneError(f"the coder {name!r} cannot code its values; take another")
    size += writer.write(coded.values)
    mask, mask_bytes = (NONE, b"") if is_dense else _packed_mask(b"".join(masks))
    return _Body(size, coded.high, mask, mask_bytes, kept, name, coded.parameter)


def _smallest(symbols: Symbols, names: Iterable[str]) -> tuple[_Body, bytes]:
    """All symbols of a layer by whatever takes the fewest bytes, and the values' bytes."""
    nonzero = symbols != 0
    mask = _packed_mask(np.packbits(nonzero, bitorder="little").tobytes())
    kept = symbols[nonzero][None]
    options: list[tuple[_Body, bytes]] = []
    for name in names:
        for rows, (kind, bits) in ((symbols, (NONE, b"")), (kept, mask)):
            option = _coded(CODERS[name], name, rows, kind, bits)
            if option is not None:
                options.append(option)
    if not options:
        # No coder that was asked for can code them; Zstandard can.
        return _smallest(symbols, [ZSTD])
    return min(options, key=lambda option: option[0].total)


def _coded(
    coder: Coder, name: str, rows: Symbols, mask: str, mask_bytes: bytes
) -> tuple[_Body, bytes] | None:
    encoder = coder.encoder()
    values = encoder.add(rows)
    coded = encoder.finish()
    if coded is None:
        return None
    values += coded.values
    body = _Body(len(values), coded.high, mask, mask_bytes, rows.size, name, coded.parameter)
    return body, values


def _packed_mask(packed: bytes) -> tuple[str, bytes]:
    """The kind of a mask and its bytes: its bits, or Zstandard's bytes of them."""
    data = compressed([packed])
    return (COMPRESSED, data) if len(data) < len(packed) else (BITS, packed)


def _floats(layer: Layer, dtype: np.dtype[Any], tally: _Tally, writer: Writer) -> _Body:
    compressor = Compressor()
    size = kept = 0
    masks: list[bytes] = []
    for start, coefficients in layer.chunks():
        # Of a negative zero, which is not stored, decoding makes a positive one.
        nonnegative_zeros = coefficients + np.float32(0)
        nonzero = nonnegative_zeros != 0
        values = nonnegative_zeros.astype(dtype)
        if not np.isfinite(values).all():
            raise WavpruneError(
                f"a coefficient does not fit {dtype.name}; allowed there: up to "
                f"{np.finfo(dtype).max:g}"
            )
        tally.add(start, values)
        masks.append(np.packbits(nonzero, bitorder="little").tobytes())
        chosen = values[nonzero]
        kept += len(chosen)
        # Bytes of one significance are alike: exponents compress, mantissas do not.
        for plane in np.ascontiguousarray(chosen.view(np.uint8).reshape(-1, dtype.itemsize).T):
            size += writer.write(compressor.add(plane))
    size += writer.write(compressor.end())
    mask, mask_bytes = _packed_mask(b"".join(masks))
    return _Body(size, b"", mask, mask_bytes, kept)


__all__ = ["BasisStore", "Encoded", "bytes_of", "encode"]

"""A layer's weight to the bytes of its tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .coders import ANS, ZSTD, Squeezer, Symbols, ans_encode, checksum, span, squeezed
from .container import Writer
from .decode import weights_of
from .formats import DTYPES as TORCH_DTYPES
from .record import BITS, FLOATS, NONE, PARTS, SQUEEZED, SYMBOLS, BasisName, Record, chunks_of
from .synthesis import Floats

# Below this share of values that are not 0, a bit a coefficient says where they are.
DENSE = 0.6
# Where to look for the best coder: a Huffman table weighs little in a larger layer.
SMALL = 1 << 16
LARGEST_SYMBOL = 32700
BLAS_FROM = 64


@dataclass(frozen=True)
class Quantiser:
    """How values are stored.

    Attributes:
        values: ``"float32"``, ``"float16"`` or ``"symbols"``.
        bits: with symbols, of each: the scale of an output channel takes its largest coefficient to
            the largest symbol. None takes ``step``.
        step: with symbols, the distance of neighbours over the Frobenius norm of the weight, or
            the least at which every symbol has 16 bits.
        coder: ``"auto"``, ``"zstd"`` or ``"ans"``.
    """

    values: str
    bits: int | None = None
    step: float | None = None
    coder: str = "auto"


class Layer(NamedTuple):
    """A weight to store.

    Attributes:
        dtype: as safetensors calls it.
        shape: of the weight.
        kernels: ``(N, K)``, a view of its values.
        norm: the Frobenius norm of the weight.
        basis: of its kernels.
        analysis: ``(M, K)``, float32; None is the identity.
        synthesis: ``(K, M)``, float32; None is the identity.
        keep: gives the mask ``(M, count)`` of a chunk's kernels, by the first and their number;
            None keeps everything.
    """

    dtype: str
    shape: tuple[int, ...]
    kernels: torch.Tensor
    norm: float
    basis: BasisName
    analysis: Floats | None
    synthesis: Floats | None
    keep: Callable[[int, int], npt.NDArray[np.bool_]] | None = None

    @property
    def M(self) -> int:  # noqa: N802  # the design's letter
        """Coefficients of a kernel."""
        return 1 if self.analysis is None else len(self.analysis)

    def chunks(self) -> Iterator[tuple[int, Floats]]:
        """The first kernel of each chunk, and its coefficients ``(M, kernels)``, float32."""
        for first, count in chunks_of(len(self.kernels), self.M):
            yield first, self.coefficients(first, count)

    def weights(self, first: int, count: int) -> npt.NDArray[Any]:
        """Some kernels, ``(count, K)``, in float32 or, where the weight is that, float64."""
        kernels = self.kernels[first : first + count]
        wide = torch.float64 if self.dtype == "F64" else torch.float32
        return kernels.to(wide).numpy()

    def coefficients(self, first: int, count: int) -> Floats:
        """Coefficients of some kernels, ``(M, count)``, float32; 0 where they are pruned."""
        found = self.weights(first, count).astype(np.float32, copy=False).T
        if self.analysis is not None:
            found = transform(self.analysis, found)
        return (
            found if self.keep is None else np.where(self.keep(first, count), found, np.float32(0))
        )


def transform(analysis: Floats, kernels: Floats) -> Floats:
    """``analysis @ kernels``: ``(M, K)`` times ``(K, count)``."""
    if analysis.shape[1] > BLAS_FROM:
        return analysis @ kernels
    # Without BLAS, whose threads take longer to wake than small sums take.
    found: Floats = np.einsum("mk,kn->mn", analysis, np.ascontiguousarray(kernels))
    return found


class Encoded(NamedTuple):
    """What became of a layer.

    Attributes:
        record: for the file's metadata.
        squared_error: of the weights as they will be loaded.
        squared_norm: of the weights before.
        kept: coefficients that are not 0.
    """

    record: Record
    squared_error: float
    squared_norm: float
    kept: int


class _Tally:
    """What decoding will give: its checksum, and how far it is from what was there."""

    def __init__(self, layer: Layer, draft: Record, scales: Floats | None) -> None:
        self.layer, self.draft, self.scales = layer, draft, scales
        self.crc, self.error, self.kept = 0, 0.0, 0

    def add(self, first: int, values: npt.NDArray[Any]) -> None:
        layer = self.layer
        self.kept += int(np.count_nonzero(values))
        weights = weights_of(values, layer.synthesis, self.scales, first, self.draft)
        stored = torch.from_numpy(weights).to(TORCH_DTYPES[layer.dtype])
        self.crc = checksum(stored.view(-1).view(torch.uint8).numpy(), self.crc)
        before = layer.weights(first, len(weights))
        change = stored.to(torch.from_numpy(before).dtype).numpy() - before
        self.error += float(np.vdot(change, change))


def encode(layer: Layer, quantiser: Quantiser, writer: Writer) -> Encoded:
    """Write the bytes of a layer's tensor.

    Args:
        layer: the weight.
        quantiser: how its values are stored.
        writer: gets the bytes.

    Returns:
        Its record, and the error.

    Raises:
        ValueError: a weight is NaN or infinite, or the values do not fit.
    """
    scales = _scales(layer, quantiser)
    parts = dict.fromkeys(PARTS, b"")
    parts["scales"] = b"" if scales is None else scales.astype("<f4").tobytes()
    if layer.basis.name == "klt" and layer.synthesis is not None:
        parts["matrix"] = layer.synthesis.astype("<f4").tobytes()
    draft = Record(
        layer.dtype,
        layer.shape,
        layer.basis,
        quantiser.values,
        ZSTD,
        NONE,
        0,
        (),
        0 if layer.synthesis is None else checksum(layer.synthesis),
        0,
        0,
        layer.M,
    )
    tally = _Tally(layer, draft, scales)
    for part in ("scales", "matrix"):
        writer.write(parts[part])
    sizes = {part: len(parts[part]) for part in ("scales", "matrix")}
    if quantiser.values in FLOATS:
        coded = _floats(layer, FLOATS[quantiser.values], tally, writer)
    else:
        assert scales is not None
        coded = _symbols(layer, quantiser, scales, tally, writer)
    sizes.update(values=coded.values, high=len(coded.high), mask=len(coded.mask_bytes))
    writer.write(coded.high)
    writer.write(coded.mask_bytes)
    record = Record(
        layer.dtype,
        layer.shape,
        layer.basis,
        quantiser.values,
        coded.coder,
        coded.mask,
        coded.kept,
        tuple(sizes[part] for part in PARTS),
        draft.matrix_crc,
        tally.crc,
        coded.largest,
        layer.M,
    )
    return Encoded(record, tally.error, layer.norm**2, tally.kept)


class _Coded(NamedTuple):
    values: int
    high: bytes
    mask: str
    mask_bytes: bytes
    kept: int
    coder: str = ZSTD
    largest: int = 0


def _scales(layer: Layer, quantiser: Quantiser) -> Floats | None:
    if quantiser.values != SYMBOLS:
        return None
    outs = layer.shape[0]
    if quantiser.bits is None:
        assert quantiser.step is not None
        # No coefficient is larger than its row's norm times the weight's, so none overflows.
        rows = (
            1.0 if layer.analysis is None else float(np.linalg.norm(layer.analysis, axis=1).max())
        )
        scale = np.float32(layer.norm * max(quantiser.step, rows / LARGEST_SYMBOL))
        return np.array([scale if scale > 0 else 1], dtype=np.float32)
    channels = np.zeros(outs, dtype=np.float32)
    for first, chunk in layer.chunks():
        starts, channel = _channels(first, chunk.shape[1], len(layer.kernels) // outs)
        peaks = np.maximum.reduceat(np.abs(chunk).max(axis=0), starts)
        place = slice(channel, channel + len(starts))
        channels[place] = np.maximum(channels[place], peaks)
    channels /= np.float32((1 << (quantiser.bits - 1)) - 1)
    return np.where(channels > 0, channels, np.float32(1))


def _channels(first: int, count: int, per: int) -> tuple[npt.NDArray[np.intp], int]:
    """Where channels of ``per`` kernels begin among some kernels, and which is the first."""
    return np.arange(-(first % per), count, per).clip(0), first // per


def quantise(coefficients: Floats, scales: Floats) -> Symbols:
    """Symbols of coefficients ``(M, kernels)``; ``scales`` is ``(1,)`` or ``(kernels,)``."""
    symbols: Symbols = np.rint(coefficients / scales).astype(np.int16)
    return symbols


def _symbols(
    layer: Layer, quantiser: Quantiser, scales: Floats, tally: _Tally, writer: Writer
) -> _Coded:
    per = len(layer.kernels) // len(scales)

    def chunks() -> Iterator[Symbols]:
        for first, coefficients in layer.chunks():
            count = coefficients.shape[1]
            scale = scales
            if len(scales) > 1:
                scale = scales[np.arange(first, first + count) // per]
            symbols = quantise(coefficients, scale)
            if layer.analysis is None and layer.keep is None:
                steps = coefficients / scale
                shift = _mean_errors(steps[0] - symbols[0], first, layer)
                symbols = np.rint(steps + shift).astype(np.int16)
            tally.add(first, symbols)
            yield symbols

    runs = chunks()
    start = next(runs)
    whole = start.size == len(layer.kernels) * layer.M
    if whole and (start.size <= SMALL or quantiser.coder == ANS):
        coded, values = _smallest(start, quantiser.coder)
        writer.write(values)
        return coded
    dense = bool(np.count_nonzero(start) >= DENSE * start.size)
    return _streamed(itertools.chain([start], runs), dense, writer)


def _mean_errors(errors: Floats, first: int, layer: Layer) -> Floats:
    """The mean of the errors of each output channel, for each of a chunk's values.

    Rounding that is moved by it brings the errors' sum near 0, for few bits and little error: what
    the inputs have in common, their mean after a ReLU, then moves no output. It is the sum that
    SQuant (Guo et al. 2022, "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian
    Approximation") brings to 0 by choosing roundings one by one.
    """
    starts, _ = _channels(first, len(errors), len(layer.kernels) // layer.shape[0])
    lengths = np.diff(starts, append=len(errors))
    means = np.add.reduceat(errors, starts) / lengths
    return np.repeat(means.astype(np.float32), lengths)


def _streamed(runs: Iterable[Symbols], dense: bool, writer: Writer) -> _Coded:
    """Symbols by Zstandard, as they come."""
    low, high = Squeezer(), Squeezer()
    size = kept = 0
    masks: list[bytes] = []
    tall = False
    for symbols in runs:
        rows = symbols
        if not dense:
            there = symbols != 0
            masks.append(np.packbits(there, bitorder="little").tobytes())
            rows = symbols[there][None]
        bottom, top = _planes(rows)
        for row in bottom:
            size += writer.write(low.add(row))
        # The high bytes of weights are few, so they can wait until all low ones are written.
        high.keep(bytes(rows.size) if top is None else top)
        tall = tall or top is not None
        kept += rows.size
    size += writer.write(low.end())
    coded = _Coded(size, high.kept() if tall else b"", NONE, b"", kept)
    return coded if dense else coded._replace(mask=BITS)._replace(**_mask(b"".join(masks)))


def _smallest(symbols: Symbols, coder: str) -> tuple[_Coded, bytes]:
    """All symbols of a layer by whatever takes the fewest bytes, and those bytes."""
    there = symbols != 0
    mask = _mask(np.packbits(there, bitorder="little").tobytes())
    values = symbols[there]
    found: list[tuple[_Coded, bytes]] = []
    largest = span(symbols)
    if coder != ZSTD and largest is not None:
        for lines, place in (([*symbols], {}), ([values], mask)):
            data = ans_encode(lines, largest)
            kept = sum(map(len, lines))
            draft = _Coded(len(data), b"", NONE, b"", kept, ANS, largest)
            found.append((draft._replace(**place), data))
    if coder != ANS or not found:
        for rows, place in ((symbols, {}), (values[None], mask)):
            bottom, top = _planes(rows)
            data = squeezed(bottom)
            high = b"" if top is None else squeezed(top)
            found.append((_Coded(len(data), high, NONE, b"", rows.size)._replace(**place), data))
    return min(found, key=lambda each: sum(map(len, (each[1], each[0].high, each[0].mask_bytes))))


def _planes(symbols: Symbols) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8] | None]:
    """Low and high bytes; None where the high ones say nothing."""
    low = symbols.astype(np.int8)
    if np.array_equal(low, symbols):
        return low, None
    return low, ((symbols - low) >> 8).astype(np.int8)


def _mask(packed: bytes) -> dict[str, Any]:
    """The bits of a mask, or Zstandard's bytes of them."""
    data = squeezed([packed])
    if len(data) < len(packed):
        return {"mask": SQUEEZED, "mask_bytes": data}
    return {"mask": BITS, "mask_bytes": packed}


def _floats(layer: Layer, dtype: np.dtype[Any], tally: _Tally, writer: Writer) -> _Coded:
    coder = Squeezer()
    size = kept = 0
    masks: list[bytes] = []
    for first, coefficients in layer.chunks():
        # Of a negative zero, which is not stored, decoding makes a positive one.
        found = coefficients + np.float32(0)
        there = found != 0
        values = found.astype(dtype)
        if not np.isfinite(values).all():
            raise ValueError(f"a coefficient does not fit {dtype.name}; allowed there: up to 65504")
        tally.add(first, values)
        masks.append(np.packbits(there, bitorder="little").tobytes())
        chosen = values[there]
        kept += len(chosen)
        # Bytes of one significance are alike: exponents compress, mantissas do not.
        for plane in np.ascontiguousarray(chosen.view(np.uint8).reshape(-1, dtype.itemsize).T):
            size += writer.write(coder.add(plane))
    size += writer.write(coder.end())
    return _Coded(size, b"", BITS, b"", kept)._replace(**_mask(b"".join(masks)))

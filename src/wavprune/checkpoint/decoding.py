"""A layer's weight, from the bytes of its tensor."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import WavpruneError
from .coders import CODERS
from .compressor import Decompressor, bytes_of
from .formats.safetensors import DTYPES as TORCH_DTYPES
from .records import COMPRESSED, FLOATS, NONE, PARTS, SYMBOLS, Record
from .stored_basis import Floats
from .synthesis import synthesise

try:
    from .. import ops  # noqa: F401  # its operators
except ImportError:
    LARGE = math.inf
else:
    # Bytes whose checksum takes longer than the call of an operator.
    LARGE = 1 << 14


def parts_of(record: Record, data: memoryview) -> dict[str, memoryview]:
    """The parts of a layer's tensor.

    Raises:
        WavpruneError: it has not the bytes that the record says.
    """
    if sum(record.sizes) != len(data):
        raise WavpruneError(f"its parts have {sum(record.sizes)} bytes, its tensor {len(data)}")
    parts = {}
    start = 0
    for name, size in zip(PARTS, record.sizes, strict=True):
        parts[name] = data[start : start + size]
        start += size
    return parts


# A damaged file's values may be of any size; that they are not those that were saved is found then.
@np.errstate(over="ignore", invalid="ignore")
def decode(record: Record, parts: dict[str, memoryview], matrix: Floats | None) -> torch.Tensor:
    """The weight of a layer.

    Args:
        record: how it is stored.
        parts: the parts of its tensor.
        matrix: the synthesis matrix ``(K, M)``; None is the identity.

    Returns:
        ``record.shape``, of the layer's dtype.

    Raises:
        WavpruneError: the bytes are not what the record says.
    """
    scales = _scales(record, parts["scales"])
    result = torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype])
    flat = result.view(-1)
    # numpy copies by one thread, which for pieces of this size is faster than waking others.
    flat_values = flat.numpy() if record.dtype in ("F32", "F64") else None
    K = record.K
    for (start, count), values in zip(record.chunks, values_of(record, parts), strict=True):
        weights = weights_of(values, matrix, scales, start, record).reshape(-1)
        run = slice(start * K, (start + count) * K)
        if flat_values is None:
            flat[run] = torch.from_numpy(weights)
        else:
            flat_values[run] = weights
    if weight_checksum(result) != record.crc:
        raise WavpruneError("its weights are not those that were saved: their checksum differs")
    return result


def weight_checksum(weight: torch.Tensor) -> int:
    """CRC-32 of a contiguous weight's bytes."""
    return checksum(weight.view(-1).view(torch.uint8).numpy())


def checksum(data: npt.NDArray[Any], start: int = 0) -> int:
    """CRC-32 of an array's bytes, in the order of its values."""
    if data.nbytes >= LARGE and data.flags.c_contiguous and data.flags.writeable:
        flat = torch.from_numpy(data.reshape(-1).view(np.uint8))
        crc: int = torch.ops.wavprune.crc32(flat, start)
        if crc >= 0:
            return crc
    return zlib.crc32(bytes_of(data), start)


def weights_of(
    values: npt.NDArray[Any],
    matrix: Floats | None,
    scales: Floats | None,
    start: int,
    record: Record,
) -> npt.NDArray[Any]:
    """Weights of a chunk.

    Args:
        values: ``(M, kernels)``: symbols, or coefficients.
        matrix: ``(K, M)``, the synthesis matrix; None is the identity.
        scales: ``(1,)`` or ``(Cout,)``: what symbols are multiplied by.
        start: the chunk's first kernel.
        record: of the layer.

    Returns:
        ``(kernels, K)``, float32; float64 for extreme weights of that dtype.
    """
    coefficients = values.astype(np.float32)
    if scales is not None:
        if len(scales) > 1:
            scales = _scale_per_kernel(scales, start, values.shape[1], record)
        coefficients *= scales
    weights = coefficients.reshape(-1, 1) if matrix is None else synthesise(coefficients, matrix)
    if record.clamped and (record.exponent or record.dtype == "F16"):
        return in_range(weights, record.dtype, record.exponent)
    return weights


def in_range(weights: Floats, dtype: str, exponent: int) -> npt.NDArray[Any]:
    """Weights times ``2 ** exponent``, none beyond the largest of the dtype."""
    most = torch.finfo(TORCH_DTYPES[dtype]).max
    if not exponent:
        return np.clip(weights, -most, most)
    with np.errstate(over="ignore", under="ignore"):
        scaled = np.ldexp(weights.astype(np.float64), exponent).clip(-most, most)
        return scaled if dtype == "F64" else scaled.astype(np.float32)


def _scale_per_kernel(scales: Floats, start: int, count: int, record: Record) -> Floats:
    per_channel = record.kernels // len(scales)
    first, last = start // per_channel, -(-(start + count) // per_channel)
    return np.repeat(scales[first:last], per_channel)[start - first * per_channel :][:count]


def _scales(record: Record, part: memoryview) -> Floats | None:
    if record.values != SYMBOLS:
        if len(part):
            raise WavpruneError(f"it has scales, but its values are {record.values}")
        return None
    if len(part) not in (4, 4 * record.shape[0]):
        raise WavpruneError(f"it has {len(part)} bytes of scales for {record.shape[0]} channels")
    return np.frombuffer(part, dtype="<f4").astype(np.float32)


def values_of(record: Record, parts: dict[str, memoryview]) -> Iterator[npt.NDArray[Any]]:
    """``(M, kernels)`` of each chunk: symbols, or coefficients.

    Args:
        record: how a layer is stored.
        parts: the parts of its tensor.

    Raises:
        WavpruneError: the bytes are not what the record says.
    """
    packed = _packed_mask(record, parts["mask"])
    if packed is None:
        shapes = [(record.M, count) for _, count in record.chunks]
        for shape, values in zip(shapes, _coded(record, parts, shapes), strict=True):
            yield values.reshape(shape)
        return
    # A mask is unpacked twice, so that never more of it than a chunk's is.
    kept = [int(np.count_nonzero(mask)) for mask in _masks(record, packed)]
    if sum(kept) != record.kept:
        raise WavpruneError(f"its mask keeps {sum(kept)} coefficients, its record {record.kept}")
    coded = _coded(record, parts, [(1, count) for count in kept])
    for (_, count), values, mask in zip(record.chunks, coded, _masks(record, packed), strict=True):
        coefficients = np.zeros(record.M * count, dtype=values.dtype)
        coefficients[mask] = values
        yield coefficients.reshape(record.M, count)


def _packed_mask(record: Record, part: memoryview) -> npt.NDArray[np.uint8] | None:
    if record.mask == NONE:
        if len(part):
            raise WavpruneError("it has a mask, and its record says that there is none")
        return None
    size = record.mask_size
    if record.mask == COMPRESSED:
        reader = Decompressor(part)
        packed = np.frombuffer(reader.read(size), dtype=np.uint8)
        reader.end()
        return packed
    if len(part) != size:
        raise WavpruneError(f"its mask has {len(part)} bytes where {size} are due")
    return np.frombuffer(part, dtype=np.uint8)


def _masks(record: Record, packed: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.bool_]]:
    """The mask of each chunk."""
    start = 0
    for _, count in record.chunks:
        bits = count * record.M
        size = -(-bits // 8)
        part = packed[start : start + size]
        yield np.unpackbits(part, count=bits, bitorder="little").view(np.bool_)
        start += size


def _coded(
    record: Record, parts: dict[str, memoryview], shapes: list[tuple[int, int]]
) -> Iterator[npt.NDArray[Any]]:
    """The values of each chunk, flat."""
    if record.values in FLOATS:
        return _floats(FLOATS[record.values], Decompressor(parts["values"]), shapes)
    coder = CODERS[record.coder]
    return coder.decode(parts["values"], parts["high"], record.parameter, shapes)


def _floats(
    dtype: np.dtype[Any], reader: Decompressor, shapes: list[tuple[int, int]]
) -> Iterator[npt.NDArray[Any]]:
    for rows, length in shapes:
        count = rows * length
        planes = np.frombuffer(reader.read(count * dtype.itemsize), dtype=np.uint8)
        by_value = np.ascontiguousarray(planes.reshape(dtype.itemsize, count).T)
        yield by_value.view(dtype).reshape(count)
    reader.end()

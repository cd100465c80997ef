"""A layer's weight, from the bytes of its tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .coders import ANS, Reader, Symbols, ans_decode, checksum
from .formats import DTYPES as TORCH_DTYPES
from .record import FLOATS, NONE, PARTS, SQUEEZED, SYMBOLS, Record, mask_size, matrix_of
from .synthesis import Floats, synthesise


def decode(record: Record, data: memoryview) -> torch.Tensor:
    """The weight of a layer.

    Args:
        record: how it is stored.
        data: the bytes of its tensor.

    Returns:
        ``record.shape``, of the layer's dtype.

    Raises:
        ValueError: the bytes are not what the record says.
    """
    if sum(record.sizes) != len(data):
        raise ValueError(f"its parts have {sum(record.sizes)} bytes, its tensor {len(data)}")
    parts = {}
    start = 0
    for name, size in zip(PARTS, record.sizes, strict=True):
        parts[name] = data[start : start + size]
        start += size
    scales, matrix = _scales(record, parts["scales"]), _matrix(record, parts["matrix"])
    result = torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype])
    # Each chunk fills a run of whole kernels.
    flat = result.view(-1)
    # numpy copies by one thread, which for pieces of this size is faster than waking others.
    values_of = flat.numpy() if record.dtype in ("F32", "F64") else None
    K = math.prod(record.basis.kernel)
    for (first, count), values in zip(record.chunks, _values(record, parts), strict=True):
        weights = weights_of(values, matrix, scales, first, record)
        place = slice(first * K, (first + count) * K)
        if values_of is None:
            flat[place] = torch.from_numpy(weights.reshape(-1))
        else:
            values_of[place] = weights.reshape(-1)
    if weight_checksum(result) != record.crc:
        raise ValueError("its weights are not those that were saved: their checksum differs")
    return result


def weight_checksum(weight: torch.Tensor) -> int:
    """CRC-32 of a contiguous weight's bytes."""
    return checksum(weight.view(-1).view(torch.uint8).numpy())


def weights_of(
    values: npt.NDArray[Any],
    matrix: Floats | None,
    scales: Floats | None,
    first: int,
    record: Record,
) -> Floats:
    """Weights of a chunk.

    Args:
        values: ``(M, kernels)``: symbols, or coefficients.
        matrix: ``(K, M)``, the synthesis matrix; None is the identity.
        scales: ``(1,)`` or ``(Cout,)``: what symbols are multiplied by.
        first: the chunk's first kernel.
        record: of the layer.

    Returns:
        ``(kernels, K)``.
    """
    coefficients = values.astype(np.float32)
    if scales is not None:
        coefficients *= (
            scales if len(scales) == 1 else _each(scales, first, values.shape[1], record)
        )
    if matrix is None:
        return coefficients.reshape(-1, 1)
    return synthesise(coefficients, matrix)


def _each(scales: Floats, first: int, count: int, record: Record) -> Floats:
    """The scale of each kernel of a chunk."""
    per = record.kernels // len(scales)
    start, stop = first // per, -(-(first + count) // per)
    return np.repeat(scales[start:stop], per)[first - start * per :][:count]


def _scales(record: Record, part: memoryview) -> Floats | None:
    if record.values != SYMBOLS:
        if len(part):
            raise ValueError(f"it has scales, but its values are {record.values}")
        return None
    if len(part) not in (4, 4 * record.shape[0]):
        raise ValueError(f"it has {len(part)} bytes of scales for {record.shape[0]} channels")
    return np.frombuffer(part, dtype="<f4").astype(np.float32)


def _matrix(record: Record, part: memoryview) -> Floats | None:
    basis = record.basis
    K = math.prod(basis.kernel)
    if basis.name == "klt":
        if len(part) != 4 * K * record.M:
            raise ValueError(f"it has {len(part)} bytes of a {K}x{record.M} matrix")
        matrix = np.frombuffer(part, dtype="<f4").astype(np.float32).reshape(K, record.M)
    else:
        if len(part):
            raise ValueError(f"it has a matrix, but its basis is {basis.name!r}")
        operator = basis.operator
        if operator.identity:
            if record.M != K:
                raise ValueError(f"it has {record.M} coefficients a kernel, and needs {K}")
            if K > 1:
                raise ValueError("the identity has kernels of one value")
            return None
        matrix = matrix_of(operator)
        if matrix.shape[1] != record.M:
            raise ValueError(
                f"it has {record.M} coefficients a kernel, its basis {basis.name!r} "
                f"{matrix.shape[1]}"
            )
    if checksum(matrix) != record.matrix_crc:
        raise ValueError(
            f"its basis {basis.name!r} is not, to the last bit, the one it was saved with; that "
            "takes another version of PyWavelets or wavprune"
        )
    return matrix


def _values(record: Record, parts: dict[str, memoryview]) -> Iterator[npt.NDArray[Any]]:
    """``(M, kernels)`` of each chunk."""
    packed = _mask(record, parts["mask"])
    kept = [count * record.M for _, count in record.chunks]
    if packed is not None:
        # A mask is unpacked twice, so that never more of it than a chunk's is.
        kept = [int(np.count_nonzero(mask)) for mask in _masks(record, packed)]
        if sum(kept) != record.kept:
            raise ValueError(f"its mask keeps {sum(kept)} coefficients, its record {record.kept}")
    chunks = zip(record.chunks, _coded(record, parts, kept), strict=True)
    if packed is None:
        for (_, count), values in chunks:
            yield values.reshape(record.M, count)
        return
    for ((_, count), values), mask in zip(chunks, _masks(record, packed), strict=True):
        full = np.zeros(record.M * count, dtype=values.dtype)
        full[mask] = values
        yield full.reshape(record.M, count)


def _mask(record: Record, part: memoryview) -> npt.NDArray[np.uint8] | None:
    if record.mask == NONE:
        if len(part):
            raise ValueError("it has a mask, and its record says that there is none")
        return None
    size = mask_size(record)
    if record.mask == SQUEEZED:
        reader = Reader(part)
        packed = np.frombuffer(reader.read(size), dtype=np.uint8)
        reader.end()
        return packed
    if len(part) != size:
        raise ValueError(f"its mask has {len(part)} bytes where {size} are due")
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
    record: Record, parts: dict[str, memoryview], kept: list[int]
) -> Iterator[npt.NDArray[Any]]:
    if record.values in FLOATS:
        yield from _floats(FLOATS[record.values], Reader(parts["values"]), kept)
    elif record.coder == ANS:
        lengths = [record.kernels] * record.M if record.mask == NONE else [record.kept]
        if len(record.chunks) != 1:
            raise ValueError("it is too large for the coder 'ans'")
        rows = ans_decode(parts["values"], record.largest, lengths)
        yield np.concatenate(rows) if rows else np.zeros(0, dtype=np.int16)
    else:
        yield from _planes(parts, kept)


def _planes(
    parts: dict[str, memoryview], kept: list[int]
) -> Iterator[Symbols | npt.NDArray[np.int8]]:
    low = Reader(parts["values"])
    high = Reader(parts["high"]) if len(parts["high"]) else None
    for count in kept:
        values = np.frombuffer(low.read(count), dtype=np.int8)
        if high is None:
            yield values
        else:
            tall = np.frombuffer(high.read(count), dtype=np.int8).astype(np.int16)
            yield tall * np.int16(256) + values
    for reader in (low, high):
        if reader is not None:
            reader.end()


def _floats(dtype: np.dtype[Any], reader: Reader, kept: list[int]) -> Iterator[npt.NDArray[Any]]:
    for count in kept:
        planes = np.frombuffer(reader.read(count * dtype.itemsize), dtype=np.uint8)
        bytes_of = np.ascontiguousarray(planes.reshape(dtype.itemsize, count).T)
        yield bytes_of.view(dtype).reshape(count)
    reader.end()

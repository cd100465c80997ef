# Triton reads its functions as source, so their arguments have no types that mypy could check.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-errors
"""What the Triton kernels do to one tile: load, transform, rank, store.

A *tile* is ``ROWS`` by ``BLOCK`` coefficients of a basis, or as many weights in a row where the
basis is the identity. Coefficients are recomputed in every pass and never stored. Each is one chain
of fused multiply-adds in the order of k, so that every pass and every device finds the same bits.
"""

import triton
import triton.language as tl

from . import tables

# Where each word of a row is, as what Triton takes for a constant.
POINTER = tl.constexpr(tables.Row._fields.index("pointer"))
DTYPE = tl.constexpr(tables.Row._fields.index("dtype"))
KIND = tl.constexpr(tables.Row._fields.index("kind"))
VALUES = tl.constexpr(tables.Row._fields.index("values"))
KW = tl.constexpr(tables.Row._fields.index("kw"))
INS = tl.constexpr(tables.Row._fields.index("ins"))
OUT_STRIDE = tl.constexpr(tables.Row._fields.index("out_stride"))
IN_STRIDE = tl.constexpr(tables.Row._fields.index("in_stride"))
ROW_STRIDE = tl.constexpr(tables.Row._fields.index("row_stride"))
COLUMN_STRIDE = tl.constexpr(tables.Row._fields.index("column_stride"))
COEFFICIENTS = tl.constexpr(tables.Row._fields.index("coefficients"))
ANALYSIS = tl.constexpr(tables.Row._fields.index("analysis"))
DRAWN = tl.constexpr(tables.Row._fields.index("drawn"))
SEED = tl.constexpr(tables.Row._fields.index("seed"))
FLAT = tl.constexpr(tables.FLAT)
FLOAT32, FLOAT16, BFLOAT16, FLOAT64 = [tl.constexpr(i) for i in range(4)]


@triton.jit
def load(base, origin, offset, mask, dtype, WIDE: tl.constexpr):
    """Weights of any dtype in what computes."""
    number: tl.constexpr = tl.float64 if WIDE else tl.float32
    if dtype == FLOAT32:
        value = tl.load(base.to(tl.pointer_type(tl.float32)) + origin + offset, mask=mask, other=0)
        value = value.to(number)
    elif dtype == FLOAT16:
        half = tl.load(base.to(tl.pointer_type(tl.float16)) + origin + offset, mask=mask, other=0)
        value = half.to(number)
    elif dtype == BFLOAT16:
        half = tl.load(base.to(tl.pointer_type(tl.bfloat16)) + origin + offset, mask=mask, other=0)
        value = half.to(tl.float32).to(number)
    else:
        wide = tl.load(base.to(tl.pointer_type(tl.float64)) + origin + offset, mask=mask, other=0)
        value = wide.to(number)
    return value


@triton.jit
def clamped(value, most: tl.constexpr):
    """The value, within -most .. most."""
    return tl.where(value > most, most, tl.where(value < -most, -most, value))


@triton.jit
def store(base, origin, offset, value, mask, dtype, WIDE: tl.constexpr):
    """Store in the weights' dtype, halves by way of float32 as torch does; what was stored."""
    number: tl.constexpr = tl.float64 if WIDE else tl.float32
    if dtype == FLOAT32:
        if WIDE:
            value = clamped(value, 3.4028234663852886e38)
        stored = value.to(tl.float32)
        tl.store(base.to(tl.pointer_type(tl.float32)) + origin + offset, stored, mask=mask)
        value = stored.to(number)
    elif dtype == FLOAT16:
        # Float16 ends at 65504, which a sum of coefficients may pass.
        half = clamped(value, 65504.0).to(tl.float32).to(tl.float16)
        tl.store(base.to(tl.pointer_type(tl.float16)) + origin + offset, half, mask=mask)
        value = half.to(number)
    elif dtype == BFLOAT16:
        half = clamped(value, 3.3895313892515355e38).to(tl.float32).to(tl.bfloat16)
        tl.store(base.to(tl.pointer_type(tl.bfloat16)) + origin + offset, half, mask=mask)
        value = half.to(tl.float32).to(number)
    else:
        wide = value.to(tl.float64)
        tl.store(base.to(tl.pointer_type(tl.float64)) + origin + offset, wide, mask=mask)
        value = wide.to(number)
    return value


@triton.jit
def positions(row, start, SIZE: tl.constexpr):
    """Where SIZE weights in a row lie: the element that they count from, and how far each is."""
    lane = tl.arange(0, SIZE)
    if tl.load(row + KIND) == FLAT:
        origin = start
        offset = lane
    else:
        # The division of 64 bits once a tile, those of each weight in 32.
        values = tl.load(row + VALUES)
        at = (start % values).to(tl.int32) + lane
        k = at % values.to(tl.int32)
        origin, offset = kernels_from(row, start // values, at // values.to(tl.int32))
        offset += within(row, k)
    return origin, offset


@triton.jit
def within(row, k):
    """How far value k of a kernel is from its first."""
    kw = tl.load(row + KW).to(tl.int32)
    down = tl.load(row + ROW_STRIDE).to(tl.int32)
    across = tl.load(row + COLUMN_STRIDE).to(tl.int32)
    return (k // kw) * down + (k % kw) * across


@triton.jit
def kernels_from(row, first, lane):
    """Where the kernels first + lane begin: an element to count from, and how far each is."""
    ins = tl.load(row + INS)
    out_stride = tl.load(row + OUT_STRIDE)
    in_stride = tl.load(row + IN_STRIDE)
    origin = (first // ins) * out_stride
    at = (first % ins).to(tl.int32) + lane
    down = at // ins.to(tl.int32)
    across = at % ins.to(tl.int32)
    return origin, down * out_stride.to(tl.int32) + across * in_stride.to(tl.int32)


@triton.jit
def uniform(place, seed):
    """SplitMix64 read at any place: see backends/eager.py."""
    x = (place + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return ((x >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def ranks_of(row, start, value, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """What ranks weights in the identity basis: their magnitude, or a random draw."""
    rank = tl.abs(value)
    if WIDE:  # noqa: SIM102  # decided when it is compiled; the other one when it runs
        if tl.load(row + DRAWN) != 0:
            draw = uniform(start + tl.arange(0, SIZE), tl.load(row + SEED))
            # A draw says nothing of its weight; the difference is NaN where that is not finite.
            rank = tl.where(value == 0, 0.0, draw) + (value - value)
    return rank


@triton.jit
def matrix_at(table, row, WHICH: tl.constexpr, WIDE: tl.constexpr):
    """Where one of a layer's matrices begins."""
    number: tl.constexpr = tl.float64 if WIDE else tl.float32
    at = table + tl.load(row + WHICH)
    return at.to(tl.pointer_type(number), bitcast=True)


@triton.jit
def coefficients(
    table,
    row,
    origin,
    offset,
    inside,
    first,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Coefficients first .. first + ROWS - 1 of BLOCK kernels; 0 for those that do not exist."""
    number: tl.constexpr = tl.float64 if WIDE else tl.float32
    base = tl.load(row + POINTER)
    dtype = tl.load(row + DTYPE)
    M = tl.load(row + COEFFICIENTS).to(tl.int32)
    analysis = matrix_at(table, row, ANALYSIS, WIDE)
    m = first + tl.arange(0, ROWS)
    C = tl.zeros((ROWS, BLOCK), number)
    for k in range(tl.load(row + VALUES).to(tl.int32)):
        w = load(base, origin, offset + within(row, k), inside, dtype, WIDE)
        a = tl.load(analysis + k * M + m, mask=m < M, other=0)
        C = tl.fma(
            tl.broadcast_to(a[:, None], (ROWS, BLOCK)),
            tl.broadcast_to(w[None, :], (ROWS, BLOCK)),
            C,
        )
    return C


@triton.jit
def keys_of(rank, WIDE: tl.constexpr):
    """Bit patterns, which order as the non-negative floats do; every NaN is the largest."""
    if WIDE:
        keys = rank.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        keys = rank.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return keys

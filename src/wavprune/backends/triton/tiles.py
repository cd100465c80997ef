# Triton reads its functions as source, so their arguments have no types that mypy could check.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-errors
"""What a program of a Triton kernel works on: the tiles of a layer, and the memory behind them.

A tile is ``BLOCK`` kernels, or ``SIZE`` weights where the basis is the identity. Its items are
enumerated along the axes of the layer's entry, from the fastest, so that the lanes of a warp are
neighbors in memory. A *place* is where something is: an origin in 64 bits, and offsets in 32.
"""

import triton
import triton.language as tl

from . import tables


def indices(entry, fields):
    """Index of each of these fields in an entry, as Triton takes constants."""
    return [tl.constexpr(entry._fields.index(field)) for field in fields.split()]


POINTER, DTYPE, KIND = indices(tables.LayerEntry, "pointer dtype kind")
NUM_VALUES, KERNEL_WIDTH, NUM_COEFFICIENTS = indices(
    tables.LayerEntry, "num_values kernel_width num_coefficients"
)
ROW_STRIDE, COLUMN_STRIDE = indices(tables.LayerEntry, "row_stride column_stride")
SIZE0, STRIDE0, STEP0 = indices(tables.LayerEntry, "size0 stride0 step0")
BRICK, KERNELS_ADJACENT = indices(tables.LayerEntry, "brick kernels_adjacent")
NUM_ITEMS, NUM_TILES, TILES, FIRST_PROGRAM, NUM_PROGRAMS = indices(
    tables.LayerEntry, "num_items num_tiles tiles first_program num_programs"
)
ANALYSIS, SYNTHESIS, MASK = indices(tables.LayerEntry, "analysis synthesis mask")
JOB, IS_RANDOM, SEED, FIRST_INDEX, RESULT = indices(
    tables.LayerEntry, "job is_random seed first_index result"
)
LAYER_WORDS = tl.constexpr(len(tables.LayerEntry._fields))
CONTIGUOUS, SMALL = tl.constexpr(tables.CONTIGUOUS), tl.constexpr(tables.SMALL)
SMALL_VALUES, MAX_VALUES = tl.constexpr(tables.SMALL_VALUES), tl.constexpr(tables.MAX_VALUES)
MARKED_LARGE = tl.constexpr(tables.MARKED_LARGE)
TILE_SIZE, TILE_SIZE_FLOAT64 = [tl.constexpr(tables.TILE_SIZE[key]) for key in (False, True)]
FLOAT32, FLOAT16, BFLOAT16 = [tl.constexpr(i) for i in range(3)]


@triton.jit
def tiles_of_program(layer):
    """First tile of this program, and how many it takes."""
    program = tl.program_id(0) - tl.load(layer + FIRST_PROGRAM)
    tiles = tl.load(layer + TILES)
    first = program * tiles
    return first, tl.minimum(tiles, tl.load(layer + NUM_TILES) - first).to(tl.int32)


@triton.jit
def weight_places(layer, tile, SIZE: tl.constexpr):
    """Where the weights of a tile are, their flat indices, and which of them exist."""
    lane = tl.arange(0, SIZE)
    start = tile * SIZE
    if tl.load(layer + KIND) == CONTIGUOUS:
        origin, offset = start, lane
        first, index = start, lane
    else:
        # A division in 64 bits per tile and axis, those of each weight in 32.
        size0 = tl.load(layer + SIZE0)
        size1 = tl.load(layer + SIZE0 + 1)
        size2 = tl.load(layer + SIZE0 + 2)
        row = start // size0
        plane = row // size1
        block = plane // size2
        count = (start % size0).to(tl.int32) + lane
        at0 = count % size0.to(tl.int32)
        count = count // size0.to(tl.int32) + (row % size1).to(tl.int32)
        at1 = count % size1.to(tl.int32)
        count = count // size1.to(tl.int32) + (plane % size2).to(tl.int32)
        at2 = count % size2.to(tl.int32)
        at3 = count // size2.to(tl.int32)
        origin, offset = _along(layer + STRIDE0, block, at0, at1, at2, at3)
        first, index = _along(layer + STEP0, block, at0, at1, at2, at3)
    return (origin, offset), first + index, lane < tl.load(layer + NUM_ITEMS) - start


@triton.jit
def _along(distances, block, at0, at1, at2, at3):
    """An origin, and offsets from it, at these positions along four axes."""
    offset = at0 * tl.load(distances).to(tl.int32) + at1 * tl.load(distances + 1).to(tl.int32)
    offset += at2 * tl.load(distances + 2).to(tl.int32)
    last = tl.load(distances + 3)
    return block * last, offset + at3 * last.to(tl.int32)


@triton.jit
def kernel_places(layer, tile, BLOCK: tl.constexpr):
    """Where the kernels of a tile begin, their flat indices, and which of them exist."""
    lane = tl.arange(0, BLOCK)
    size0 = tl.load(layer + SIZE0)
    brick = tl.load(layer + BRICK)
    if brick > 0:
        across = tl.cdiv(size0, brick)
        first0 = tile % across * brick
        first1 = tile // across * (BLOCK // brick)
        count = lane
        period = brick.to(tl.int32)
    else:
        start = tile * BLOCK
        first0 = tl.zeros((), tl.int64)
        first1 = start // size0
        count = (start % size0).to(tl.int32) + lane
        period = size0.to(tl.int32)
    at0 = count % period
    at1 = count // period
    inside = (first0 + at0 < size0) & (first1 + at1 < tl.load(layer + SIZE0 + 1))
    stride0, stride1 = tl.load(layer + STRIDE0), tl.load(layer + STRIDE0 + 1)
    step0, step1 = tl.load(layer + STEP0), tl.load(layer + STEP0 + 1)
    offset = at0 * stride0.to(tl.int32) + at1 * stride1.to(tl.int32)
    index = (first0 + at0) * step0 + (first1 + at1) * step1
    return (first0 * stride0 + first1 * stride1, offset), index, inside


@triton.jit
def value_offsets(layer, k):
    """Offset of value k of a kernel from its first."""
    width = tl.load(layer + KERNEL_WIDTH).to(tl.int32)
    row_stride = tl.load(layer + ROW_STRIDE).to(tl.int32)
    column_stride = tl.load(layer + COLUMN_STRIDE).to(tl.int32)
    return (k // width) * row_stride + (k % width) * column_stride


@triton.jit
def weight_of(layer):
    """Address and dtype of the weight."""
    return tl.load(layer + POINTER), tl.load(layer + DTYPE)


@triton.jit
def load(weight, place, mask, IN_FLOAT64: tl.constexpr):
    """Weights of any dtype, in the dtype that computes."""
    number: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    base, dtype = weight
    origin, offset = place
    if dtype == FLOAT32:
        value = _load_as(base, tl.float32, origin, offset, mask).to(number)
    elif dtype == FLOAT16:
        value = _load_as(base, tl.float16, origin, offset, mask).to(number)
    elif dtype == BFLOAT16:
        value = _load_as(base, tl.bfloat16, origin, offset, mask).to(tl.float32).to(number)
    else:
        value = _load_as(base, tl.float64, origin, offset, mask).to(number)
    return value


@triton.jit
def _load_as(base, dtype: tl.constexpr, origin, offset, mask):
    return tl.load(base.to(tl.pointer_type(dtype)) + origin + offset, mask=mask, other=0)


@triton.jit
def store(weight, place, value, mask, IN_FLOAT64: tl.constexpr):
    """Store in the weights' dtype, halves by way of float32 as torch does; what was stored."""
    number: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    base, dtype = weight
    origin, offset = place
    if dtype == FLOAT32:
        if IN_FLOAT64:
            value = _clamped(value, 3.4028234663852886e38)
        stored = value.to(tl.float32)
        _store_as(base, tl.float32, origin, offset, stored, mask)
        value = stored.to(number)
    elif dtype == FLOAT16:
        # Float16 ends at 65504, which a sum of coefficients may pass.
        half = _clamped(value, 65504.0).to(tl.float32).to(tl.float16)
        _store_as(base, tl.float16, origin, offset, half, mask)
        value = half.to(number)
    elif dtype == BFLOAT16:
        half = _clamped(value, 3.3895313892515355e38).to(tl.float32).to(tl.bfloat16)
        _store_as(base, tl.bfloat16, origin, offset, half, mask)
        value = half.to(tl.float32).to(number)
    else:
        stored = value.to(tl.float64)
        _store_as(base, tl.float64, origin, offset, stored, mask)
        value = stored.to(number)
    return value


@triton.jit
def _store_as(base, dtype: tl.constexpr, origin, offset, value, mask):
    tl.store(base.to(tl.pointer_type(dtype)) + origin + offset, value, mask=mask)


@triton.jit
def _clamped(value, limit: tl.constexpr):
    return tl.where(value > limit, limit, tl.where(value < -limit, -limit, value))


@triton.jit
def outer_fma(column, row, total, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``total`` plus the outer product of a column and a row, fused."""
    columns = tl.broadcast_to(column[:, None], (ROWS, BLOCK))
    return tl.fma(columns, tl.broadcast_to(row[None, :], (ROWS, BLOCK)), total)


@triton.jit
def matrix(table, layer, WHICH: tl.constexpr, IN_FLOAT64: tl.constexpr):
    """Where one of a layer's matrices begins."""
    number: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    first = table + tl.load(layer + WHICH)
    return first.to(tl.pointer_type(number), bitcast=True)

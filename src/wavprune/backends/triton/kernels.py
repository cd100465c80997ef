# Triton reads its functions as source, so their arguments have no types that mypy could check.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-errors
"""The Triton kernels: count a digit, resolve the thresholds, prune, sum up.

One launch takes all layers; each program looks up its layer in a table, see tables.py.

A threshold is found by a radix select on *keys*, the bit patterns of scores, which order as
non-negative floats do. Each pass counts one digit of the keys, from the top, which fixes that digit
of the order statistic. Every program of a pass resolves the digit of the pass before by itself:
that saves a launch per digit.

Programs work on *tiles*: ``ROWS`` coefficients of ``BLOCK`` kernels, or ``SIZE`` weights where the
basis is the identity. Coefficients are computed anew in every pass and never stored. Each is one
chain of fused multiply-adds in the order of k, so every pass and every device gets the same bits.
"""

import triton
import triton.language as tl

from . import tables


def _indices(entry, fields):
    """Index of each of these fields in an entry, as Triton takes constants."""
    return [tl.constexpr(entry._fields.index(field)) for field in fields.split()]


POINTER, DTYPE, KIND = _indices(tables.LayerEntry, "pointer dtype kind")
NUM_VALUES, KERNEL_WIDTH, IN_CHANNELS, NUM_COEFFICIENTS = _indices(
    tables.LayerEntry, "num_values kernel_width in_channels num_coefficients"
)
OUT_STRIDE, IN_STRIDE, ROW_STRIDE, COLUMN_STRIDE = _indices(
    tables.LayerEntry, "out_stride in_stride row_stride column_stride"
)
NUM_ITEMS, TILES, FIRST_PROGRAM, NUM_PROGRAMS = _indices(
    tables.LayerEntry, "num_items tiles first_program num_programs"
)
ANALYSIS, SYNTHESIS = _indices(tables.LayerEntry, "analysis synthesis")
JOB, RESULT = _indices(tables.LayerEntry, "job result")
IS_RANDOM, SEED, FIRST_INDEX = _indices(tables.LayerEntry, "is_random seed first_index")
RANK, KEEPS_NOTHING, IS_ZERO, FRACTION, JOB_RESULT = _indices(
    tables.JobEntry, "rank keeps_nothing is_zero fraction result"
)
LAYER_WORDS = tl.constexpr(len(tables.LayerEntry._fields))
JOB_WORDS = tl.constexpr(len(tables.JobEntry._fields))
CONTIGUOUS, SMALL = tl.constexpr(tables.CONTIGUOUS), tl.constexpr(tables.SMALL)
SMALL_VALUES, MAX_VALUES = tl.constexpr(tables.SMALL_VALUES), tl.constexpr(tables.MAX_VALUES)
TILE_SIZE, TILE_SIZE_FLOAT64 = [tl.constexpr(tables.TILE_SIZE[key]) for key in (False, True)]
BINS, HEADER = tl.constexpr(tables.BINS), tl.constexpr(tables.HEADER)
LEAST_ABOVE = tl.constexpr(tables.HEADER - 1)
FLOAT32, FLOAT16, BFLOAT16 = [tl.constexpr(i) for i in range(3)]

# The digits that a program counts by itself end a little above the largest of its first tile. In
# the first pass over float32 they span two octaves.
WINDOW = tl.constexpr(128)
MARGIN = tl.constexpr(16)


@triton.jit(
    do_not_specialize=[
        "num_programs", "num_layers", "state_size", "digit", "shift", "bits", "bits_before",
    ],
    do_not_specialize_on_alignment=["table", "states"],
)  # fmt: skip
def count_digits(
    table, states, num_programs, num_layers, state_size, digit, shift, bits, bits_before,
    IN_FLOAT64: tl.constexpr,
):  # fmt: skip
    """Count one digit of all keys.

    Args:
        table: the layers and jobs.
        states: ``(jobs, state_size)`` 64-bit words, zero before the first pass.
        num_programs: programs of the table.
        num_layers: layers of the table.
        state_size: words of a job's state.
        digit: index of the digit.
        shift: its lowest bit.
        bits: how many bits it has.
        bits_before: how many bits the digit before it has.
        IN_FLOAT64: True where float64 computes, else float32 does.
    """
    SIZE: tl.constexpr = TILE_SIZE_FLOAT64 if IN_FLOAT64 else TILE_SIZE
    HALF: tl.constexpr = SIZE // 2
    program = tl.program_id(0)
    layer = table + num_programs + LAYER_WORDS * tl.load(table + program)
    job_index = tl.load(layer + JOB)
    job = table + num_programs + LAYER_WORDS * num_layers + JOB_WORDS * job_index
    state = states + job_index * state_size
    prefix, _ = _resolved_prefix(job, state, digit, bits_before)
    if not IN_FLOAT64:
        prefix = prefix.to(tl.int32)
    counts = state + HEADER + digit * BINS
    target = (prefix, shift, bits, counts)
    tally = (tl.zeros((WINDOW,), tl.int32), tl.full((), -1, tl.int32), tl.zeros((), tl.int64))

    kind = tl.load(layer + KIND)
    if kind < SMALL:
        tally = _count_weights(layer, target, tally, HALF, IN_FLOAT64)
    elif kind == SMALL:
        tally = _count_kernels(table, layer, target, tally, SMALL_VALUES, SIZE, IN_FLOAT64)
    else:
        tally = _count_kernels(table, layer, target, tally, MAX_VALUES, HALF, IN_FLOAT64)

    window, base, least_above = tally
    slot = tl.arange(0, WINDOW)
    bin = tl.where(slot == 0, 0, base + slot - 1)
    tl.atomic_add(counts + bin, window.to(tl.int64), mask=window > 0, sem="relaxed")
    if least_above > 0:
        tl.atomic_max(state + LEAST_ABOVE, least_above, sem="relaxed")


@triton.jit(
    do_not_specialize=["state_size", "last", "bits"],
    do_not_specialize_on_alignment=["jobs", "states", "thresholds"],
)
def resolve_thresholds(jobs, states, thresholds, state_size, last, bits, IN_FLOAT64: tl.constexpr):
    """The thresholds from the counts of all digits; one program per job.

    Args:
        jobs: a table that has jobs only.
        states: ``(jobs, state_size)`` 64-bit words.
        thresholds: float64, written where each job says; NaN where a score is not finite.
        state_size: words of a job's state.
        last: index of the last digit.
        bits: how many bits it has.
        IN_FLOAT64: True where float64 computes, else float32 does.
    """
    largest: tl.constexpr = 0x7FFFFFFFFFFFFFFF if IN_FLOAT64 else 0x7FFFFFFF
    job = jobs + JOB_WORDS * tl.program_id(0)
    state = states + tl.program_id(0).to(tl.int64) * state_size
    bin = tl.arange(0, BINS)
    top_counts = tl.load(state + HEADER + bin)
    counts = state + HEADER + last * BINS
    last_counts = tl.load(counts + bin)
    prefix = tl.load(state + 2 * last)
    key, rank = _resolve(counts, prefix, tl.load(state + 2 * last + 1), bits)

    digit = key & ((1 << bits) - 1)
    next_digit = tl.min(tl.where((bin > digit) & (last_counts > 0), bin, BINS))
    least_above = tl.load(state + LEAST_ABOVE)
    next_key = key
    if rank + 1 >= tl.sum(tl.where(bin == digit, last_counts, 0)):
        if next_digit < BINS:
            next_key = (prefix << bits) | next_digit
        elif least_above > 0:
            next_key = largest - least_above
    # Structural zeros are the smallest of all: after the last comes the least coefficient.
    if tl.load(job + IS_ZERO) != 0:
        next_key = key
        key = tl.zeros((), tl.int64)
    # The top digit holds the whole exponent; those of infinity and NaN are the largest.
    fraction = tl.load(job + FRACTION).to(tl.float64, bitcast=True)
    if IN_FLOAT64:
        finite = tl.sum(tl.where(bin >= 2047, top_counts, 0)) == 0
        low = key.to(tl.float64, bitcast=True)
        high = next_key.to(tl.float64, bitcast=True)
        value = _interpolated(low, high, fraction, 1 - fraction)
    else:
        finite = tl.sum(tl.where(bin >= 2040, top_counts, 0)) == 0
        low = key.to(tl.int32).to(tl.float32, bitcast=True)
        high = next_key.to(tl.int32).to(tl.float32, bitcast=True)
        value = _interpolated(low, high, fraction.to(tl.float32), (1 - fraction).to(tl.float32))
    threshold = value.to(tl.float64)
    if tl.load(job + KEEPS_NOTHING) != 0:
        threshold = tl.full((), float("inf"), tl.float64)
    threshold = tl.where(finite, threshold, float("nan"))
    tl.store(thresholds + tl.load(job + JOB_RESULT), threshold)


@triton.jit(
    do_not_specialize=["num_programs", "num_layers"],
    do_not_specialize_on_alignment=["table", "thresholds", "partials"],
)
def prune_layers(
    table, thresholds, partials, num_programs, num_layers, IN_FLOAT64: tl.constexpr
):  # fmt: skip
    """Prune all layers in place.

    Args:
        table: the layers.
        thresholds: ``(num_layers,)`` float64; one NaN leaves all weights as they are.
        partials: ``(num_programs, 4)`` float64: what each program kept, its zeros, error and norm.
        num_programs: programs of the table.
        num_layers: layers of the call, those of other tables too.
        IN_FLOAT64: True where float64 computes, else float32 does.
    """
    SIZE: tl.constexpr = TILE_SIZE_FLOAT64 if IN_FLOAT64 else TILE_SIZE
    HALF: tl.constexpr = SIZE // 2
    program = tl.program_id(0)
    layer = table + num_programs + LAYER_WORDS * tl.load(table + program)
    threshold = tl.load(thresholds + tl.load(layer + RESULT))
    stats = _no_stats()
    if _no_nan(thresholds, num_layers):
        kind = tl.load(layer + KIND)
        if kind < SMALL:
            stats = _prune_weights(layer, threshold, HALF, IN_FLOAT64)
        elif kind == SMALL:
            stats = _prune_kernels(table, layer, threshold, SMALL_VALUES, SIZE, IN_FLOAT64)
        else:
            stats = _prune_kernels(table, layer, threshold, MAX_VALUES, HALF, IN_FLOAT64)
    kept, zeros, error, norm = stats
    partial = partials + 4 * program.to(tl.int64)
    tl.store(partial, kept.to(tl.float64))
    tl.store(partial + 1, zeros.to(tl.float64))
    tl.store(partial + 2, error)
    tl.store(partial + 3, norm)


@triton.jit(
    do_not_specialize=["num_programs"],
    do_not_specialize_on_alignment=["table", "partials", "sums"],
)
def sum_partials(table, partials, sums, num_programs):
    """Sum up the partials of each layer, always in the same order; one program per layer.

    Args:
        table: the layers.
        partials: ``(num_programs, 4)`` float64.
        sums: ``(layers, 4)`` float64, written where each layer says.
        num_programs: programs of the table.
    """
    layer = table + num_programs + LAYER_WORDS * tl.program_id(0)
    first = tl.load(layer + FIRST_PROGRAM)
    count = tl.load(layer + NUM_PROGRAMS)
    lane = tl.arange(0, 128)[:, None]
    column = tl.arange(0, 4)[None, :]
    total = tl.zeros((128, 4), tl.float64)
    for start in range(0, count.to(tl.int32), 128):
        program = first + start + lane
        total += tl.load(partials + 4 * program + column, mask=start + lane < count, other=0)
    result = tl.load(layer + RESULT)
    tl.store(sums + 4 * result + tl.arange(0, 4), tl.sum(total, axis=0))


# --- selection ---


@triton.jit
def _resolved_prefix(job, state, digit, bits_before):
    """The prefix of the key at the job's rank, as far as the digits before say, and its rank."""
    prefix = tl.zeros((), tl.int64)
    rank = tl.load(job + RANK)
    if digit > 1:
        prefix = tl.load(state + 2 * digit - 2)
        rank = tl.load(state + 2 * digit - 1)
    if digit > 0:
        prefix, rank = _resolve(state + HEADER + (digit - 1) * BINS, prefix, rank, bits_before)
        # All programs of the job store the same.
        tl.store(state + 2 * digit, prefix)
        tl.store(state + 2 * digit + 1, rank)
    return prefix, rank


@triton.jit
def _resolve(counts, prefix, rank, bits):
    """One more digit of the key at a rank, and its rank among the keys with that prefix."""
    cumulative = tl.cumsum(tl.load(counts + tl.arange(0, BINS)), 0)
    below = cumulative <= rank
    digit = tl.sum(below.to(tl.int64))
    return (prefix << bits) | digit, rank - tl.max(tl.where(below, cumulative, 0))


@triton.jit
def _count_weights(layer, target, tally, SIZE: tl.constexpr, IN_FLOAT64: tl.constexpr):
    weight = _weight(layer)
    first, num_tiles, num_items = _tiles(layer, SIZE)
    for tile in range(num_tiles):
        start = first + tile * SIZE
        origin, offset = _weight_offsets(layer, start, SIZE)
        exists = tl.arange(0, SIZE) < num_items - start
        value = _load(weight, origin, offset, exists, IN_FLOAT64)
        keys = _keys(_scores(layer, start, value, SIZE, IN_FLOAT64), IN_FLOAT64)
        tally = _count(keys, exists, target, tally, IN_FLOAT64)
    return tally


@triton.jit
def _count_kernels(
    table, layer, target, tally,
    ROWS: tl.constexpr, SIZE: tl.constexpr, IN_FLOAT64: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = SIZE // ROWS
    M = tl.load(layer + NUM_COEFFICIENTS).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    first, num_tiles, num_items = _tiles(layer, BLOCK)
    for tile in range(num_tiles):
        start = first + tile * BLOCK
        origin, offset = _kernel_offsets(layer, start, lane)
        inside = lane < num_items - start
        for row in range(0, M, ROWS):
            C = _coefficients(table, layer, origin, offset, inside, row, ROWS, BLOCK, IN_FLOAT64)
            m = row + tl.arange(0, ROWS)
            exists = tl.ravel((m < M)[:, None] & inside[None, :], can_reorder=False)
            keys = tl.ravel(_keys(C, IN_FLOAT64), can_reorder=False)
            tally = _count(keys, exists, target, tally, IN_FLOAT64)
    return tally


@triton.jit
def _count(keys, exists, target, tally, IN_FLOAT64: tl.constexpr):
    """Count the digits of the keys that have the target's prefix.

    Digits near the largest are counted in shared memory, and so is digit 0, for layers that were
    pruned before; the few others one by one.
    """
    prefix, shift, bits, counts = target
    window, base, least_above = tally
    upper = keys >> (shift + bits)
    counted = exists & (upper == prefix)
    digit = ((keys >> shift) & ((1 << bits) - 1)).to(tl.int32)
    top = tl.max(tl.where(counted, digit, -1))
    if top >= 0:
        base = tl.where(base < 0, tl.maximum(top + MARGIN + 2 - WINDOW, 1), base)
        slot = tl.where(digit == 0, 0, digit + 1 - base)
        near = counted & ((digit == 0) | ((digit >= base) & (slot < WINDOW)))
        window += tl.histogram(tl.where(near, slot, 0), WINDOW, mask=near)
        one = tl.full(digit.shape, 1, tl.int64)
        tl.atomic_add(counts + digit, one, mask=counted & ~near, sem="relaxed")
    if shift == 0:
        # The next order statistic may have another prefix: the least key above, kept as its
        # distance from the largest, so that 0 means none.
        largest: tl.constexpr = 0x7FFFFFFFFFFFFFFF if IN_FLOAT64 else 0x7FFFFFFF
        distance = tl.max(tl.where(exists & (upper > prefix), largest - keys, 0))
        least_above = tl.maximum(least_above, distance.to(tl.int64))
    return window, base, least_above


@triton.jit
def _interpolated(low, high, fraction, rest):
    """``numpy.percentile``'s interpolation, rounding for rounding."""
    span = high - low
    value = tl.where(fraction < 0.5, low + span * fraction, high - span * rest)
    return tl.where(fraction == 0, low, value)


# --- pruning ---


@triton.jit
def _no_nan(values, count):
    found = tl.zeros((), tl.int32)
    for start in range(0, count, 64):
        index = start + tl.arange(0, 64)
        value = tl.load(values + index, index < count, 0.0)
        found += tl.sum((value != value).to(tl.int32))
    return found == 0


@triton.jit
def _no_stats():
    """Of no weights yet: coefficients kept, zeros, squared error, squared norm."""
    none, zero = tl.zeros((), tl.int32), tl.zeros((), tl.float64)
    return none, none, zero, zero


@triton.jit
def _updated(stats, kept, before, after, exists):
    total_kept, zeros, error, norm = stats
    old = before.to(tl.float64)
    change = old - after.to(tl.float64)
    error += tl.sum(change * change)
    norm += tl.sum(old * old)
    zeros += tl.sum((exists & (after == 0)).to(tl.int32))
    return total_kept + kept, zeros, error, norm


@triton.jit
def _prune_weights(layer, threshold, SIZE: tl.constexpr, IN_FLOAT64: tl.constexpr):
    stats = _no_stats()
    weight = _weight(layer)
    first, num_tiles, num_items = _tiles(layer, SIZE)
    for tile in range(num_tiles):
        start = first + tile * SIZE
        origin, offset = _weight_offsets(layer, start, SIZE)
        exists = tl.arange(0, SIZE) < num_items - start
        value = _load(weight, origin, offset, exists, IN_FLOAT64)
        score = _scores(layer, start, value, SIZE, IN_FLOAT64)
        keep = (score >= threshold.to(score.dtype)) & (value != 0)
        after = _store(weight, origin, offset, tl.where(keep, value, 0.0), exists, IN_FLOAT64)
        stats = _updated(stats, tl.sum(keep.to(tl.int32)), value, after, exists)
    return stats


@triton.jit
def _prune_kernels(
    table, layer, threshold,
    ROWS: tl.constexpr, SIZE: tl.constexpr, IN_FLOAT64: tl.constexpr,
):  # fmt: skip
    number: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    BLOCK: tl.constexpr = SIZE // ROWS
    K = tl.load(layer + NUM_VALUES).to(tl.int32)
    M = tl.load(layer + NUM_COEFFICIENTS).to(tl.int32)
    weight = _weight(layer)
    synthesis = _matrix(table, layer, SYNTHESIS, IN_FLOAT64)
    lane = tl.arange(0, BLOCK)
    step = tl.arange(0, ROWS)
    value_offset = _value_offsets(layer, step)
    stats = _no_stats()
    first, num_tiles, num_items = _tiles(layer, BLOCK)
    for tile in range(num_tiles):
        start = first + tile * BLOCK
        origin, offset = _kernel_offsets(layer, start, lane)
        inside = lane < num_items - start
        kept = tl.zeros((), tl.int32)
        pruned = tl.zeros((ROWS, BLOCK), number)
        for row in range(0, M, ROWS):
            C = _coefficients(table, layer, origin, offset, inside, row, ROWS, BLOCK, IN_FLOAT64)
            keep = (tl.abs(C) >= threshold.to(number)) & (C != 0)
            kept += tl.sum(keep.to(tl.int32))
            C = tl.where(keep, C, 0.0)
            for m in range(row, tl.minimum(row + ROWS, M)):
                # All terms but one are zeros: the sum is coefficient m exactly, in any order.
                c = tl.sum(tl.where((step == m - row)[:, None], C, 0.0), axis=0)
                s = tl.load(synthesis + m * K + step, mask=step < K, other=0)
                pruned = _outer_fma(s, c, pruned, ROWS, BLOCK)
        # Transposed, so that neighboring threads write neighboring weights.
        memory = offset[:, None] + value_offset[None, :]
        exists = inside[:, None] & (step < K)[None, :]
        before = _load(weight, origin, memory, exists, IN_FLOAT64)
        # No thread may write what another has yet to read.
        tl.debug_barrier()
        after = _store(weight, origin, memory, tl.trans(pruned), exists, IN_FLOAT64)
        stats = _updated(stats, kept, before, after, exists)
    return stats


# --- tiles ---


@triton.jit
def _tiles(layer, SIZE: tl.constexpr):
    """First item of this program, how many tiles it takes, and how many items the layer has."""
    program = tl.program_id(0) - tl.load(layer + FIRST_PROGRAM)
    num_items = tl.load(layer + NUM_ITEMS)
    tiles = tl.load(layer + TILES)
    first = program * tiles * SIZE
    return first, tl.minimum(tiles, tl.cdiv(num_items - first, SIZE)).to(tl.int32), num_items


@triton.jit
def _weight_offsets(layer, start, SIZE: tl.constexpr):
    """Where SIZE weights from ``start`` on are: an origin in 64 bits, and offsets in 32."""
    lane = tl.arange(0, SIZE)
    if tl.load(layer + KIND) == CONTIGUOUS:
        origin = start
        offset = lane
    else:
        # One division in 64 bits per tile, those of each weight in 32.
        num_values = tl.load(layer + NUM_VALUES)
        index = (start % num_values).to(tl.int32) + lane
        kernel = index // num_values.to(tl.int32)
        origin, offset = _kernel_offsets(layer, start // num_values, kernel)
        offset += _value_offsets(layer, index % num_values.to(tl.int32))
    return origin, offset


@triton.jit
def _kernel_offsets(layer, start, lane):
    """Where the kernels ``start + lane`` begin: an origin in 64 bits, and offsets in 32."""
    ins = tl.load(layer + IN_CHANNELS)
    out_stride = tl.load(layer + OUT_STRIDE)
    in_stride = tl.load(layer + IN_STRIDE)
    origin = (start // ins) * out_stride
    index = (start % ins).to(tl.int32) + lane
    out_channel = index // ins.to(tl.int32)
    in_channel = index % ins.to(tl.int32)
    return origin, out_channel * out_stride.to(tl.int32) + in_channel * in_stride.to(tl.int32)


@triton.jit
def _value_offsets(layer, k):
    """Offset of value k of a kernel from its first."""
    width = tl.load(layer + KERNEL_WIDTH).to(tl.int32)
    row_stride = tl.load(layer + ROW_STRIDE).to(tl.int32)
    column_stride = tl.load(layer + COLUMN_STRIDE).to(tl.int32)
    return (k // width) * row_stride + (k % width) * column_stride


@triton.jit
def _weight(layer):
    """Address and dtype of the weight."""
    return tl.load(layer + POINTER), tl.load(layer + DTYPE)


@triton.jit
def _load(weight, origin, offset, mask, IN_FLOAT64: tl.constexpr):
    """Weights of any dtype, in the dtype that computes."""
    number: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    base, dtype = weight
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
def _store(weight, origin, offset, value, mask, IN_FLOAT64: tl.constexpr):
    """Store in the weights' dtype, halves by way of float32 as torch does; what was stored."""
    number: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    base, dtype = weight
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
def _coefficients(
    table, layer, origin, offset, inside, first,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, IN_FLOAT64: tl.constexpr,
):  # fmt: skip
    """Coefficients first .. first + ROWS - 1 of BLOCK kernels; 0 for those that do not exist."""
    number: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    M = tl.load(layer + NUM_COEFFICIENTS).to(tl.int32)
    weight = _weight(layer)
    analysis = _matrix(table, layer, ANALYSIS, IN_FLOAT64)
    m = first + tl.arange(0, ROWS)
    C = tl.zeros((ROWS, BLOCK), number)
    for k in range(tl.load(layer + NUM_VALUES).to(tl.int32)):
        w = _load(weight, origin, offset + _value_offsets(layer, k), inside, IN_FLOAT64)
        a = tl.load(analysis + k * M + m, mask=m < M, other=0)
        C = _outer_fma(a, w, C, ROWS, BLOCK)
    return C


@triton.jit
def _outer_fma(column, row, total, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``total`` plus the outer product of a column and a row, fused."""
    columns = tl.broadcast_to(column[:, None], (ROWS, BLOCK))
    return tl.fma(columns, tl.broadcast_to(row[None, :], (ROWS, BLOCK)), total)


@triton.jit
def _matrix(table, layer, WHICH: tl.constexpr, IN_FLOAT64: tl.constexpr):
    """Where one of a layer's matrices begins."""
    number: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    first = table + tl.load(layer + WHICH)
    return first.to(tl.pointer_type(number), bitcast=True)


@triton.jit
def _scores(layer, start, value, SIZE: tl.constexpr, IN_FLOAT64: tl.constexpr):
    """What ranks weights where the basis is the identity: magnitudes, or random numbers."""
    score = tl.abs(value)
    if IN_FLOAT64:  # noqa: SIM102  # one is decided at compile time, the other at run time
        if tl.load(layer + IS_RANDOM) != 0:
            index = tl.load(layer + FIRST_INDEX) + start + tl.arange(0, SIZE)
            random = _uniform(index, tl.load(layer + SEED))
            # NaN where the weight is not finite, which a random number does not tell.
            score = tl.where(value == 0, 0.0, random) + (value - value)
    return score


@triton.jit
def _uniform(index, seed):
    """A random number for each index of a weight: see backends/random.py."""
    seed = seed.to(tl.uint64, bitcast=True)
    first = _splitmix64(seed + 0x9E3779B97F4A7C15)
    second = _splitmix64(seed + 0x3C6EF372FE94F82A)
    index_high = (index >> 32).to(tl.uint32)
    x = _plus(index.to(tl.uint32), first.to(tl.uint32))
    x = _plus(_times(x ^ (x >> 17), 0xED5AD4BB), (first >> 32).to(tl.uint32))
    x = _plus(x, _times(index_high, 0x9E3779B9))
    x = _times(x ^ (x >> 11), 0xAC4C1B51)
    x = _times(x ^ (x >> 15), 0x31848BAB)
    high = x ^ (x >> 14)
    low_key = _plus(second.to(tl.uint32), _times(index_high, (second >> 32).to(tl.uint32) | 1))
    x = _times(high ^ low_key, 0xED5AD4BB)
    low = _times(x ^ (x >> 15), 0x31848BAB) >> 12
    bits = (high.to(tl.uint64) << 20) | low.to(tl.uint64)
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16


# These wrap, which the interpreter would take for a mistake.


@triton.jit
def _plus(x, y):
    return tl.add(x, y, sanitize_overflow=False)


@triton.jit
def _times(x, y):
    return tl.mul(x, y, sanitize_overflow=False)


@triton.jit
def _splitmix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _keys(score, IN_FLOAT64: tl.constexpr):
    """Bit patterns without the sign; every NaN is the largest."""
    if IN_FLOAT64:
        keys = score.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        keys = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return keys

# Triton reads its functions as source, so their arguments have no types that mypy could check.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-errors
"""Triton kernels that select: count a digit of the scores, resolve the thresholds.

One launch takes all layers; each program looks up its layer in a table, see tables.py.

A threshold is found by a radix select on *keys*, the bit patterns of scores, which order as
non-negative floats do. Each pass counts one digit of the keys, from the top, which fixes that digit
of the order statistic. Every program of a pass resolves the digit of the pass before by itself:
that saves a launch per digit.

Coefficients are computed anew in every pass and never stored. Each is one chain of fused
multiply-adds in the order of k, so every pass and every device gets the same bits.
"""

import triton
import triton.language as tl

from . import tables
from .tiles import (
    ANALYSIS,
    FIRST_INDEX,
    IS_RANDOM,
    JOB,
    KIND,
    LAYER_WORDS,
    MAX_VALUES,
    NUM_COEFFICIENTS,
    NUM_VALUES,
    SEED,
    SMALL,
    SMALL_VALUES,
    TILE_SIZE,
    TILE_SIZE_FLOAT64,
    indices,
    kernel_places,
    load,
    matrix,
    outer_fma,
    tiles_of_program,
    value_offsets,
    weight_of,
    weight_places,
)

RANK, KEEPS_NOTHING, IS_ZERO, FRACTION, JOB_RESULT = indices(
    tables.JobEntry, "rank keeps_nothing is_zero fraction result"
)
JOB_WORDS = tl.constexpr(len(tables.JobEntry._fields))
BINS, HEADER = tl.constexpr(tables.BINS), tl.constexpr(tables.HEADER)
LEAST_ABOVE = tl.constexpr(tables.HEADER - 1)

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
    weight = weight_of(layer)
    first, num_tiles = tiles_of_program(layer)
    for tile in range(num_tiles):
        place, index, exists = weight_places(layer, first + tile, SIZE)
        value = load(weight, place, exists, IN_FLOAT64)
        keys = _keys(scores(layer, index, value, IN_FLOAT64), IN_FLOAT64)
        tally = _count(keys, exists, target, tally, IN_FLOAT64)
    return tally


@triton.jit
def _count_kernels(
    table, layer, target, tally,
    ROWS: tl.constexpr, SIZE: tl.constexpr, IN_FLOAT64: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = SIZE // ROWS
    M = tl.load(layer + NUM_COEFFICIENTS).to(tl.int32)
    first, num_tiles = tiles_of_program(layer)
    for tile in range(num_tiles):
        place, _, inside = kernel_places(layer, first + tile, BLOCK)
        for row in range(0, M, ROWS):
            C = coefficients(table, layer, place, inside, row, ROWS, BLOCK, IN_FLOAT64)
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


@triton.jit
def coefficients(
    table, layer, place, inside, first,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, IN_FLOAT64: tl.constexpr,
):  # fmt: skip
    """Coefficients first .. first + ROWS - 1 of BLOCK kernels; 0 for those that do not exist."""
    number: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    M = tl.load(layer + NUM_COEFFICIENTS).to(tl.int32)
    weight = weight_of(layer)
    origin, offset = place
    analysis = matrix(table, layer, ANALYSIS, IN_FLOAT64)
    m = first + tl.arange(0, ROWS)
    C = tl.zeros((ROWS, BLOCK), number)
    for k in range(tl.load(layer + NUM_VALUES).to(tl.int32)):
        w = load(weight, (origin, offset + value_offsets(layer, k)), inside, IN_FLOAT64)
        a = tl.load(analysis + k * M + m, mask=m < M, other=0)
        C = outer_fma(a, w, C, ROWS, BLOCK)
    return C


@triton.jit
def scores(layer, index, value, IN_FLOAT64: tl.constexpr):
    """What ranks weights where the basis is the identity: magnitudes, or random numbers."""
    score = tl.abs(value)
    if IN_FLOAT64:  # noqa: SIM102  # one is decided at compile time, the other at run time
        if tl.load(layer + IS_RANDOM) != 0:
            index += tl.load(layer + FIRST_INDEX)
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

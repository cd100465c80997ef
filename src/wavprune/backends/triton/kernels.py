# Triton reads its functions as source, so their arguments have no types that mypy could check.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-errors
"""The Triton kernels: count a digit, conclude the thresholds, prune, add up.

One launch takes all layers: a program finds its own in a table, see triton_tables.py.

A threshold is found by a radix select: non-negative floats order as their bits do, so passes that
count one digit each, from the top, fix the bits of an order statistic one digit a pass. Every
program of pass p draws the conclusion of pass p - 1 by itself, which saves a launch a digit.
"""

import triton
import triton.language as tl

from . import tables
from .tiles import (
    COEFFICIENTS,
    DTYPE,
    KIND,
    POINTER,
    VALUES,
    coefficients,
    kernels_from,
    keys_of,
    load,
    matrix_at,
    positions,
    ranks_of,
    store,
    within,
)

# Where each word is, as what Triton takes for a constant.
ROW = tl.constexpr(len(tables.Row._fields))
UNITS = tl.constexpr(tables.Row._fields.index("units"))
TILES = tl.constexpr(tables.Row._fields.index("tiles"))
SYNTHESIS = tl.constexpr(tables.Row._fields.index("synthesis"))
OWNER = tl.constexpr(tables.Row._fields.index("owner"))
FIRST = tl.constexpr(tables.Row._fields.index("first"))
PROGRAMS = tl.constexpr(tables.Row._fields.index("programs"))
LAYER = tl.constexpr(tables.Row._fields.index("layer"))
JOB = tl.constexpr(len(tables.Job._fields))
RANK, NOTHING, ZERO, FRACTION, PLACE = [tl.constexpr(i) for i in range(5)]
SMALL = tl.constexpr(tables.SMALL)
SMALL_ROWS, LARGE_ROWS = tl.constexpr(tables.SMALL_ROWS), tl.constexpr(tables.LARGE_ROWS)
NARROW_TILE, WIDE_TILE = tl.constexpr(tables.TILE[False]), tl.constexpr(tables.TILE[True])
BINS, HEAD = tl.constexpr(tables.BINS), tl.constexpr(tables.HEAD)
ABOVE = tl.constexpr(tables.HEAD - 1)

# The digits that a program counts by itself. They end a little above the largest of its first tile:
# two octaves, where the first pass counts float32.
WINDOW = tl.constexpr(128)
ROOM = tl.constexpr(16)


@triton.jit
def _count(keys, inside, prefix, shift, bits, counts, window, base, above, WIDE: tl.constexpr):
    """Count the digits of the keys that begin with the prefix.

    The digits about the largest are counted in shared memory, and so is digit 0, for layers that
    were pruned before; the few others one by one.
    """
    upper = keys >> (shift + bits)
    hit = inside & (upper == prefix)
    digit = ((keys >> shift) & ((1 << bits) - 1)).to(tl.int32)
    top = tl.max(tl.where(hit, digit, -1))
    if top >= 0:
        base = tl.where(base < 0, tl.maximum(top + ROOM + 2 - WINDOW, 1), base)
        slot = tl.where(digit == 0, 0, digit + 1 - base)
        near = hit & ((digit == 0) | ((digit >= base) & (slot < WINDOW)))
        window += tl.histogram(tl.where(near, slot, 0), WINDOW, mask=near)
        one = tl.full(digit.shape, 1, tl.int64)
        tl.atomic_add(counts + digit, one, mask=hit & ~near, sem="relaxed")
    if shift == 0:
        # The order statistic after the wanted one may begin with another prefix: the least key
        # above, as what is left to the largest word, so that 0 is none.
        most: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
        left = tl.max(tl.where(inside & (upper > prefix), most - keys, 0))
        above = tl.maximum(above, left.to(tl.int64))
    return window, base, above


@triton.jit
def _resolve(counts, prefix, rank, bits):
    """One digit more of the key at a rank, and its rank among the keys that begin so."""
    upto = tl.cumsum(tl.load(counts + tl.arange(0, BINS)), 0)
    below = upto <= rank
    digit = tl.sum(below.to(tl.int64))
    return (prefix << bits) | digit, rank - tl.max(tl.where(below, upto, 0))


@triton.jit
def _prefix(job, state, counts, digit, bits):
    """The prefix and the rank that pass ``digit`` begins with."""
    prefix = tl.zeros((), tl.int64)
    rank = tl.load(job + RANK)
    if digit > 1:
        prefix = tl.load(state + 2 * digit - 2)
        rank = tl.load(state + 2 * digit - 1)
    if digit > 0:
        prefix, rank = _resolve(counts + (digit - 1) * BINS, prefix, rank, bits)
        # All programs of the job store the same.
        tl.store(state + 2 * digit, prefix)
        tl.store(state + 2 * digit + 1, rank)
    return prefix, rank


@triton.jit(
    do_not_specialize=["programs", "rows", "size", "digit", "shift", "bits", "before"],
    do_not_specialize_on_alignment=["table", "states"],
)
def count(table, states, programs, rows, size, digit, shift, bits, before, WIDE: tl.constexpr):
    """Count one digit of all ranks.

    Args:
        table: where the layers are.
        states: ``(jobs, size)`` 64-bit words, zero before the first pass.
        programs: how many programs the table is for.
        rows: how many layers it has.
        size: words of a job's state.
        digit: which pass this is.
        shift: the lowest bit of the digit.
        bits: how many bits the digit has.
        before: how many the digit before it had.
        WIDE: True computes in float64.
    """
    SIZE: tl.constexpr = WIDE_TILE if WIDE else NARROW_TILE
    # Half as many where a tile takes more registers a coefficient.
    WIDTH: tl.constexpr = SIZE // 2
    program = tl.program_id(0)
    row = table + programs + ROW * tl.load(table + program)
    owner = tl.load(row + OWNER)
    state = states + owner * size
    counts = state + HEAD
    prefix, _ = _prefix(table + programs + ROW * rows + JOB * owner, state, counts, digit, before)
    if not WIDE:
        prefix = prefix.to(tl.int32)
    counts += digit * BINS
    window = tl.zeros((WINDOW,), tl.int32)
    base = tl.full((), -1, tl.int32)
    above = tl.zeros((), tl.int64)

    kind = tl.load(row + KIND)
    index = program - tl.load(row + FIRST)
    if kind < SMALL:
        window, base, above = _count_weights(
            row, index, prefix, shift, bits, counts, window, base, above, WIDTH, WIDE
        )
    elif kind == SMALL:
        window, base, above = _count_kernels(
            table, row, index, prefix, shift, bits, counts, window, base, above,
            SMALL_ROWS, SIZE, WIDE,
        )  # fmt: skip
    else:
        window, base, above = _count_kernels(
            table, row, index, prefix, shift, bits, counts, window, base, above,
            LARGE_ROWS, WIDTH, WIDE,
        )  # fmt: skip

    slot = tl.arange(0, WINDOW)
    place = tl.where(slot == 0, 0, base + slot - 1)
    tl.atomic_add(counts + place, window.to(tl.int64), mask=window > 0, sem="relaxed")
    if above > 0:
        tl.atomic_max(state + ABOVE, above, sem="relaxed")


@triton.jit
def _count_weights(
    row, index, prefix, shift, bits, counts, window, base, above,
    SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    units = tl.load(row + UNITS)
    tiles = tl.load(row + TILES)
    start = index * tiles * SIZE
    for tile in range(tl.minimum(tiles, tl.cdiv(units - start, SIZE)).to(tl.int32)):
        at = start + tile * SIZE
        origin, offset = positions(row, at, SIZE)
        inside = tl.arange(0, SIZE) < units - at
        value = load(tl.load(row + POINTER), origin, offset, inside, tl.load(row + DTYPE), WIDE)
        keys = keys_of(ranks_of(row, at, value, SIZE, WIDE), WIDE)
        window, base, above = _count(
            keys, inside, prefix, shift, bits, counts, window, base, above, WIDE
        )
    return window, base, above


@triton.jit
def _count_kernels(
    table, row, index, prefix, shift, bits, counts, window, base, above,
    ROWS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = SIZE // ROWS
    units = tl.load(row + UNITS)
    tiles = tl.load(row + TILES)
    M = tl.load(row + COEFFICIENTS).to(tl.int32)
    start = index * tiles * BLOCK
    lane = tl.arange(0, BLOCK)
    for tile in range(tl.minimum(tiles, tl.cdiv(units - start, BLOCK)).to(tl.int32)):
        at = start + tile * BLOCK
        origin, offset = kernels_from(row, at, lane)
        inside = lane < units - at
        for first in range(0, M, ROWS):
            C = coefficients(table, row, origin, offset, inside, first, ROWS, BLOCK, WIDE)
            m = first + tl.arange(0, ROWS)
            there = tl.ravel((m < M)[:, None] & inside[None, :], can_reorder=False)
            keys = tl.ravel(keys_of(C, WIDE), can_reorder=False)
            window, base, above = _count(
                keys, there, prefix, shift, bits, counts, window, base, above, WIDE
            )
    return window, base, above


@triton.jit(
    do_not_specialize=["size", "last", "bits"],
    do_not_specialize_on_alignment=["jobs", "states", "thresholds"],
)
def conclude(jobs, states, thresholds, size, last, bits, WIDE: tl.constexpr):
    """The thresholds from the counts of all digits; one program a job.

    Args:
        jobs: the table from its first job on.
        states: ``(jobs, size)`` 64-bit words.
        thresholds: float64, written at each job's place: NaN where a rank is not finite.
        size: words of a job's state.
        last: which digit is the last.
        bits: how many bits it has.
        WIDE: True computes in float64.
    """
    most: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    job = jobs + JOB * tl.program_id(0)
    state = states + tl.program_id(0).to(tl.int64) * size
    bin = tl.arange(0, BINS)
    first = tl.load(state + HEAD + bin)
    counts = state + HEAD + last * BINS
    found = tl.load(counts + bin)
    prefix = tl.load(state + 2 * last)
    key, rank = _resolve(counts, prefix, tl.load(state + 2 * last + 1), bits)

    digit = key & ((1 << bits) - 1)
    following = tl.min(tl.where((bin > digit) & (found > 0), bin, BINS))
    above = tl.load(state + ABOVE)
    higher = key
    if rank + 1 >= tl.sum(tl.where(bin == digit, found, 0)):
        if following < BINS:
            higher = (prefix << bits) | following
        elif above > 0:
            higher = most - above
    # Structural zeros are the smallest of all: what follows the last is the least coefficient.
    if tl.load(job + ZERO) != 0:
        higher = key
        key = tl.zeros((), tl.int64)
    # The top digit holds the whole exponent: from the infinite one on, nothing is finite.
    fraction = tl.load(job + FRACTION).to(tl.float64, bitcast=True)
    if WIDE:
        finite = tl.sum(tl.where(bin >= 2047, first, 0)) == 0
        low = key.to(tl.float64, bitcast=True)
        high = higher.to(tl.float64, bitcast=True)
        value = _between(low, high, fraction, 1 - fraction)
    else:
        finite = tl.sum(tl.where(bin >= 2040, first, 0)) == 0
        low = key.to(tl.int32).to(tl.float32, bitcast=True)
        high = higher.to(tl.int32).to(tl.float32, bitcast=True)
        value = _between(low, high, fraction.to(tl.float32), (1 - fraction).to(tl.float32))
    threshold = value.to(tl.float64)
    if tl.load(job + NOTHING) != 0:
        threshold = tl.full((), float("inf"), tl.float64)
    threshold = tl.where(finite, threshold, float("nan"))
    tl.store(thresholds + tl.load(job + PLACE), threshold)


@triton.jit
def _between(low, high, fraction, rest):
    """``numpy.percentile``'s interpolation, rounding for rounding."""
    span = high - low
    value = tl.where(fraction < 0.5, low + span * fraction, high - span * rest)
    return tl.where(fraction == 0, low, value)


@triton.jit
def _change(before, after, inside, error, norm, zeros):
    was = before.to(tl.float64)
    moved = was - after.to(tl.float64)
    error += tl.sum(moved * moved)
    norm += tl.sum(was * was)
    zeros += tl.sum((inside & (after == 0)).to(tl.int32))
    return error, norm, zeros


@triton.jit(
    do_not_specialize=["programs", "layers"],
    do_not_specialize_on_alignment=["table", "thresholds", "partials"],
)
def prune(table, thresholds, partials, programs, layers, WIDE: tl.constexpr):
    """Prune all layers in place.

    Args:
        table: where the layers are.
        thresholds: ``(layers,)`` float64, at each layer's place; one NaN leaves all as they are.
        partials: ``(programs, 4)`` float64, what each program kept, its zeros, error and norm.
        programs: how many programs the table is for.
        layers: how many layers the call has, on other devices too.
        WIDE: True computes in float64.
    """
    SIZE: tl.constexpr = WIDE_TILE if WIDE else NARROW_TILE
    # Half as many where a tile takes more registers a coefficient.
    WIDTH: tl.constexpr = SIZE // 2
    program = tl.program_id(0)
    row = table + programs + ROW * tl.load(table + program)
    threshold = tl.load(thresholds + tl.load(row + LAYER))
    index = program - tl.load(row + FIRST)
    kept = tl.zeros((), tl.int32)
    zeros = tl.zeros((), tl.int32)
    error = tl.zeros((), tl.float64)
    norm = tl.zeros((), tl.float64)
    # A weight somewhere is not finite: nothing changes.
    if _all_numbers(thresholds, layers):
        kind = tl.load(row + KIND)
        if kind < SMALL:
            kept, zeros, error, norm = _prune_weights(row, index, threshold, WIDTH, WIDE)
        elif kind == SMALL:
            kept, zeros, error, norm = _prune_kernels(
                table, row, index, threshold, SMALL_ROWS, SIZE, WIDE
            )
        else:
            kept, zeros, error, norm = _prune_kernels(
                table, row, index, threshold, LARGE_ROWS, WIDTH, WIDE
            )
    partial = partials + 4 * program.to(tl.int64)
    tl.store(partial, kept.to(tl.float64))
    tl.store(partial + 1, zeros.to(tl.float64))
    tl.store(partial + 2, error)
    tl.store(partial + 3, norm)


@triton.jit
def _all_numbers(values, count):
    bad = tl.zeros((), tl.int32)
    for at in range(0, count, 64):
        place = at + tl.arange(0, 64)
        value = tl.load(values + place, place < count, 0.0)
        bad += tl.sum((value != value).to(tl.int32))
    return bad == 0


@triton.jit
def _prune_weights(row, index, threshold, SIZE: tl.constexpr, WIDE: tl.constexpr):
    base = tl.load(row + POINTER)
    dtype = tl.load(row + DTYPE)
    units = tl.load(row + UNITS)
    tiles = tl.load(row + TILES)
    kept = tl.zeros((), tl.int32)
    zeros = tl.zeros((), tl.int32)
    error = tl.zeros((), tl.float64)
    norm = tl.zeros((), tl.float64)
    start = index * tiles * SIZE
    for tile in range(tl.minimum(tiles, tl.cdiv(units - start, SIZE)).to(tl.int32)):
        at = start + tile * SIZE
        origin, offset = positions(row, at, SIZE)
        inside = tl.arange(0, SIZE) < units - at
        value = load(base, origin, offset, inside, dtype, WIDE)
        rank = ranks_of(row, at, value, SIZE, WIDE)
        keep = (rank >= threshold.to(rank.dtype)) & (value != 0)
        kept += tl.sum(keep.to(tl.int32))
        after = store(base, origin, offset, tl.where(keep, value, 0.0), inside, dtype, WIDE)
        error, norm, zeros = _change(value, after, inside, error, norm, zeros)
    return kept, zeros, error, norm


@triton.jit
def _prune_kernels(
    table, row, index, threshold,
    ROWS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    number: tl.constexpr = tl.float64 if WIDE else tl.float32
    BLOCK: tl.constexpr = SIZE // ROWS
    base = tl.load(row + POINTER)
    dtype = tl.load(row + DTYPE)
    units = tl.load(row + UNITS)
    tiles = tl.load(row + TILES)
    K = tl.load(row + VALUES).to(tl.int32)
    M = tl.load(row + COEFFICIENTS).to(tl.int32)
    synthesis = matrix_at(table, row, SYNTHESIS, WIDE)
    lane = tl.arange(0, BLOCK)
    step = tl.arange(0, ROWS)
    places = within(row, step)
    kept = tl.zeros((), tl.int32)
    zeros = tl.zeros((), tl.int32)
    error = tl.zeros((), tl.float64)
    norm = tl.zeros((), tl.float64)
    start = index * tiles * BLOCK
    for tile in range(tl.minimum(tiles, tl.cdiv(units - start, BLOCK)).to(tl.int32)):
        at = start + tile * BLOCK
        origin, offset = kernels_from(row, at, lane)
        inside = lane < units - at
        pruned = tl.zeros((ROWS, BLOCK), number)
        for first in range(0, M, ROWS):
            C = coefficients(table, row, origin, offset, inside, first, ROWS, BLOCK, WIDE)
            keep = (tl.abs(C) >= threshold.to(number)) & (C != 0)
            kept += tl.sum(keep.to(tl.int32))
            C = tl.where(keep, C, 0.0)
            for m in range(first, tl.minimum(first + ROWS, M)):
                # Adding zeros is exact: the sum is coefficient m, whatever the order.
                c = tl.sum(tl.where((step == m - first)[:, None], C, 0.0), axis=0)
                s = tl.load(synthesis + m * K + step, mask=step < K, other=0)
                rows = tl.broadcast_to(s[:, None], (ROWS, BLOCK))
                pruned = tl.fma(rows, tl.broadcast_to(c[None, :], (ROWS, BLOCK)), pruned)
        # Turned round, so that neighbouring threads write neighbouring weights.
        memory = offset[:, None] + places[None, :]
        there = inside[:, None] & (step < K)[None, :]
        before = load(base, origin, memory, there, dtype, WIDE)
        # No thread may write what another has yet to read.
        tl.debug_barrier()
        after = store(base, origin, memory, tl.trans(pruned), there, dtype, WIDE)
        error, norm, zeros = _change(before, after, there, error, norm, zeros)
    return kept, zeros, error, norm


@triton.jit(
    do_not_specialize=["programs"],
    do_not_specialize_on_alignment=["table", "partials", "sums"],
)
def total(table, partials, sums, programs):
    """Add up the parts of each layer, in one order; one program a layer.

    Args:
        table: where the layers are.
        partials: ``(programs, 4)`` float64.
        sums: ``(layers, 4)`` float64, written at each layer's place.
        programs: how many programs the table is for.
    """
    row = table + programs + ROW * tl.program_id(0)
    first = tl.load(row + FIRST)
    parts = tl.load(row + PROGRAMS)
    lane = tl.arange(0, 128)[:, None]
    column = tl.arange(0, 4)[None, :]
    found = tl.zeros((128, 4), tl.float64)
    for at in range(0, parts.to(tl.int32), 128):
        part = first + at + lane
        found += tl.load(partials + 4 * part + column, mask=at + lane < parts, other=0)
    place = tl.load(row + LAYER)
    tl.store(sums + 4 * place + tl.arange(0, 4), tl.sum(found, axis=0))

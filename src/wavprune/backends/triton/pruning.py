# Triton reads its functions as source, so their arguments have no types that mypy could check.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-errors
"""Triton kernels that prune in place, by thresholds or masks, and that write masks.

One launch takes all layers, as in kernels.py. Every weight is read once and written once; a mask is
read or written in 16-bit words, see ``wavprune.backends.masks``.
"""

import triton
import triton.language as tl

from .kernels import coefficients, scores
from .tiles import (
    FIRST_PROGRAM,
    KERNELS_ADJACENT,
    KIND,
    LAYER_WORDS,
    MARKED_LARGE,
    MASK,
    MAX_VALUES,
    NUM_COEFFICIENTS,
    NUM_ITEMS,
    NUM_PROGRAMS,
    NUM_VALUES,
    RESULT,
    SMALL,
    SMALL_VALUES,
    SYNTHESIS,
    TILE_SIZE,
    TILE_SIZE_FLOAT64,
    kernel_places,
    load,
    matrix,
    outer_fma,
    store,
    tiles_of_program,
    value_offsets,
    weight_of,
    weight_places,
)


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
    layer = _layer(table, num_programs)
    threshold = tl.load(thresholds + tl.load(layer + RESULT))
    stats = _no_stats()
    if _no_nan(thresholds, num_layers):
        stats = _prune(table, layer, threshold, False, IN_FLOAT64)
    _store_stats(partials, stats)


@triton.jit(
    do_not_specialize=["num_programs"], do_not_specialize_on_alignment=["table", "partials"]
)
def prune_by_masks(table, partials, num_programs, IN_FLOAT64: tl.constexpr):
    """Prune all layers in place, by the masks that the table names.

    Args:
        table: the layers.
        partials: ``(num_programs, 4)`` float64: what each program kept, its zeros, error and norm.
        num_programs: programs of the table.
        IN_FLOAT64: True where float64 computes, else float32 does.
    """
    layer = _layer(table, num_programs)
    _store_stats(partials, _prune(table, layer, 0.0, True, IN_FLOAT64))


@triton.jit(
    do_not_specialize=["num_programs"], do_not_specialize_on_alignment=["table", "thresholds"]
)
def mark_layers(table, thresholds, num_programs, IN_FLOAT64: tl.constexpr):
    """Write the masks that the table names: what all layers keep at their thresholds.

    Args:
        table: the layers, their tiles in the order of the masks.
        thresholds: ``(layers,)`` float64; at NaN nothing is kept.
        num_programs: programs of the table.
        IN_FLOAT64: True where float64 computes, else float32 does.
    """
    SIZE: tl.constexpr = TILE_SIZE_FLOAT64 if IN_FLOAT64 else TILE_SIZE
    LARGE_SIZE: tl.constexpr = MARKED_LARGE * MAX_VALUES
    layer = _layer(table, num_programs)
    threshold = tl.load(thresholds + tl.load(layer + RESULT))
    kind = tl.load(layer + KIND)
    if kind < SMALL:
        _mark_weights(layer, threshold, SIZE // 2, IN_FLOAT64)
    elif kind == SMALL:
        _mark_kernels(table, layer, threshold, SMALL_VALUES, SIZE, IN_FLOAT64)
    else:
        _mark_kernels(table, layer, threshold, MAX_VALUES, LARGE_SIZE, IN_FLOAT64)


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
def _store_stats(partials, stats):
    kept, zeros, error, norm = stats
    partial = partials + 4 * tl.program_id(0).to(tl.int64)
    tl.store(partial, kept.to(tl.float64))
    tl.store(partial + 1, zeros.to(tl.float64))
    tl.store(partial + 2, error)
    tl.store(partial + 3, norm)


@triton.jit
def _layer(table, num_programs):
    """The entry of the layer that this program works on."""
    return table + num_programs + LAYER_WORDS * tl.load(table + tl.program_id(0))


@triton.jit
def _prune(table, layer, threshold, BY_MASK: tl.constexpr, IN_FLOAT64: tl.constexpr):
    SIZE: tl.constexpr = TILE_SIZE_FLOAT64 if IN_FLOAT64 else TILE_SIZE
    HALF: tl.constexpr = SIZE // 2
    kind = tl.load(layer + KIND)
    # Two loops for each size, not one with a choice: that would need the registers of both.
    across = tl.load(layer + KERNELS_ADJACENT) != 0
    if kind < SMALL:
        stats = _prune_weights(layer, threshold, HALF, BY_MASK, IN_FLOAT64)
    elif kind == SMALL:
        if across:
            stats = _prune_kernels(
                table, layer, threshold, SMALL_VALUES, SIZE, True, BY_MASK, IN_FLOAT64
            )
        else:
            stats = _prune_kernels(
                table, layer, threshold, SMALL_VALUES, SIZE, False, BY_MASK, IN_FLOAT64
            )
    elif across:
        stats = _prune_kernels(table, layer, threshold, MAX_VALUES, HALF, True, BY_MASK, IN_FLOAT64)
    else:
        stats = _prune_kernels(
            table, layer, threshold, MAX_VALUES, HALF, False, BY_MASK, IN_FLOAT64
        )
    return stats


@triton.jit
def _prune_weights(
    layer, threshold, SIZE: tl.constexpr, BY_MASK: tl.constexpr, IN_FLOAT64: tl.constexpr
):
    stats = _no_stats()
    weight = weight_of(layer)
    first, num_tiles = tiles_of_program(layer)
    for tile in range(num_tiles):
        place, index, exists = weight_places(layer, first + tile, SIZE)
        value = load(weight, place, exists, IN_FLOAT64)
        if BY_MASK:
            words = tl.load(layer + MASK).to(tl.pointer_type(tl.int16))
            keep = _bits(words + (index >> 4), (index & 15).to(tl.int32), exists)
        else:
            score = scores(layer, index, value, IN_FLOAT64)
            keep = (score >= threshold.to(score.dtype)) & (value != 0)
        after = store(weight, place, tl.where(keep, value, 0.0), exists, IN_FLOAT64)
        kept = tl.sum((keep & (value != 0)).to(tl.int32))
        stats = _updated(stats, kept, value, after, exists)
    return stats


@triton.jit
def _bits(words, bit, exists):
    """These bits of some words of a mask: whether coefficients are kept."""
    word = tl.load(words, mask=exists, other=0).to(tl.int32)
    return ((word >> bit) & 1) != 0


@triton.jit
def _prune_kernels(
    table, layer, threshold, ROWS: tl.constexpr, SIZE: tl.constexpr, KERNELS_LAST: tl.constexpr,
    BY_MASK: tl.constexpr, IN_FLOAT64: tl.constexpr,
):  # fmt: skip
    number: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    BLOCK: tl.constexpr = SIZE // ROWS
    K = tl.load(layer + NUM_VALUES).to(tl.int32)
    M = tl.load(layer + NUM_COEFFICIENTS).to(tl.int32)
    weight = weight_of(layer)
    synthesis = matrix(table, layer, SYNTHESIS, IN_FLOAT64)
    step = tl.arange(0, ROWS)
    stats = _no_stats()
    first, num_tiles = tiles_of_program(layer)
    for tile in range(num_tiles):
        place, index, inside = kernel_places(layer, first + tile, BLOCK)
        if BY_MASK:
            words = tl.load(layer + MASK).to(tl.pointer_type(tl.int16))
            block, bit = (index >> 4).to(tl.int32) * M, (index & 15).to(tl.int32)
        kept = tl.zeros((), tl.int32)
        pruned = tl.zeros((ROWS, BLOCK), number)
        for row in range(0, M, ROWS):
            C = coefficients(table, layer, place, inside, row, ROWS, BLOCK, IN_FLOAT64)
            for m in range(row, tl.minimum(row + ROWS, M)):
                # All terms but one are zeros: the sum is coefficient m exactly, in any order.
                c = tl.sum(tl.where((step == m - row)[:, None], C, 0.0), axis=0)
                # One by one: a tile of words would take too many registers.
                if BY_MASK:
                    keep = _bits(words + (block + m), bit, inside)
                else:
                    keep = (tl.abs(c) >= threshold.to(number)) & (c != 0)
                c = tl.where(keep, c, 0.0)
                kept += tl.sum((c != 0).to(tl.int32))
                s = tl.load(synthesis + m * K + step, mask=step < K, other=0)
                pruned = outer_fma(s, c, pruned, ROWS, BLOCK)
        # Neighboring threads write neighboring weights: those along the last axis.
        origin, offset = place
        within = value_offsets(layer, step)
        if KERNELS_LAST:
            memory = (origin, offset[None, :] + within[:, None])
            exists = inside[None, :] & (step < K)[:, None]
            values = pruned
        else:
            memory = (origin, offset[:, None] + within[None, :])
            exists = inside[:, None] & (step < K)[None, :]
            values = tl.trans(pruned)
        before = load(weight, memory, exists, IN_FLOAT64)
        # No thread may write what another has yet to read.
        tl.debug_barrier()
        after = store(weight, memory, values, exists, IN_FLOAT64)
        stats = _updated(stats, kept, before, after, exists)
    return stats


# --- marking ---


@triton.jit
def _mark_weights(layer, threshold, SIZE: tl.constexpr, IN_FLOAT64: tl.constexpr):
    weight = weight_of(layer)
    first, num_tiles = tiles_of_program(layer)
    for tile in range(num_tiles):
        place, index, exists = weight_places(layer, first + tile, SIZE)
        value = load(weight, place, exists, IN_FLOAT64)
        score = scores(layer, index, value, IN_FLOAT64)
        keep = (score >= threshold.to(score.dtype)) & (value != 0)
        bits = tl.reshape(keep.to(tl.int32), (1, SIZE))
        _store_words(layer, first + tile, bits, 0, 1, 1, SIZE)


@triton.jit
def _mark_kernels(
    table, layer, threshold,
    ROWS: tl.constexpr, SIZE: tl.constexpr, IN_FLOAT64: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = SIZE // ROWS
    M = tl.load(layer + NUM_COEFFICIENTS).to(tl.int32)
    first, num_tiles = tiles_of_program(layer)
    for tile in range(num_tiles):
        place, _, inside = kernel_places(layer, first + tile, BLOCK)
        for row in range(0, M, ROWS):
            C = coefficients(table, layer, place, inside, row, ROWS, BLOCK, IN_FLOAT64)
            keep = (tl.abs(C) >= threshold.to(C.dtype)) & (C != 0)
            _store_words(layer, first + tile, keep.to(tl.int32), row, M, ROWS, BLOCK)


@triton.jit
def _store_words(layer, tile, keep, row, M, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store the words of a tile's coefficients row .. row + ROWS - 1, whose bits are ``keep``."""
    WORDS: tl.constexpr = BLOCK // 16
    bit = tl.arange(0, 16)[None, None, :]
    words = tl.sum(tl.reshape(keep, (ROWS, WORDS, 16)) << bit, axis=2)
    m = (row + tl.arange(0, ROWS))[:, None]
    block = tile * WORDS + tl.arange(0, WORDS)[None, :]
    exists = (m < M) & (block < tl.cdiv(tl.load(layer + NUM_ITEMS), 16))
    mask = tl.load(layer + MASK).to(tl.pointer_type(tl.int16))
    tl.store(mask + block * M + m, words.to(tl.int16), mask=exists)

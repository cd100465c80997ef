// The masks of thresholds: which coefficients a row keeps, a bit each.
#pragma once

#include "prune.cuh"

namespace wavprune::cuda {

// Sets bits of a word that other threads may set bits of at the same time.
__device__ __forceinline__ void set_bits(MaskWord* word, unsigned bits) {
  if (bits == 0) return;
  MaskWord before = *word, expected;
  do {
    expected = before;
    before = atomicCAS(word, expected, MaskWord(expected | bits));
  } while (before != expected);
}

// Writes up to 16 bits of coefficient m, from that of the kernel with this flat index on.
template <class T>
__device__ __forceinline__ void put_bits(const Row<T>& row, int outputs, int64_t index, int m,
                                         unsigned bits) {
  const int first = int(index % kMaskBlock);
  MaskWord* word = row.mask + index / kMaskBlock * outputs + m;
  if (!row.shares_words) {
    *word = MaskWord(bits);
    return;
  }
  set_bits(word, bits << first & 0xFFFF);
  // Only where there are bits: past the last word there is none.
  if (bits << first >> kMaskBlock) set_bits(word + outputs, bits << first >> kMaskBlock);
}

// Writes the bits of a tile; `kept` has its coefficients, 0 where they are not kept. They are put
// together from lines of kernels with adjacent flat indices: the whole of a tile that is a run, and
// in a brick those of each fast channel.
template <class T>
__device__ __forceinline__ void write_bits(const Block<T>& block, const Tile& tile, const T* kept) {
  const Row<T>& row = block.row;
  const bool brick = row.brick_fast != 0;
  const int lines = brick ? int(tile.period) : 1, kernels = tile.count / lines;
  // A flat mask has the bits of all values of a line.
  const int values = block.plan.kind == Kind::identity ? row.values : 1;
  const int length = kernels * values, pieces = (length + kMaskBlock - 1) / kMaskBlock;
  const int outputs = block.plan.outputs;
  for (int e = threadIdx.x; e < lines * pieces * outputs; e += kThreads) {
    const int m = e % outputs, line = e / outputs / pieces;
    const int first = e / outputs % pieces * kMaskBlock;
    unsigned bits = 0;
    for (int l = 0; l < kMaskBlock && first + l < length; ++l) {
      const int kernel = line + (first + l) / values * lines;
      bits |= unsigned(kept[(kernel * values + (first + l) % values) * outputs + m] != 0) << l;
    }
    put_bits(row, outputs, index_of(row, tile, line) * values + first, m, bits);
  }
}

template <Order order, Way way, class T>
__device__ __forceinline__ void mark_tile(const Block<T>& block, const Tile& tile,
                                          const ByThreshold<T>& selection, T* shared) {
  const Row<T>& row = block.row;
  const Plan<T>& plan = block.plan;
  const T* kept = shared;
  __syncthreads();
  if constexpr (way == Way::identity) {
    with_element_type(row.element, [&](auto element) {
      const auto* data = data_of<const decltype(element)>(row);
      for_each_value<order>(
          row, tile, [&](int, int64_t offset) { return T(read(data + offset)); },
          [&](int i, int64_t, int64_t index, T value) {
            shared[i] = T(selection.keeps_value(row, index, value));
          });
    });
  } else if constexpr (way == Way::registers) {
    T x[9], c[9];
    const int own = int(threadIdx.x);
    if (load_own<order>(row, tile, shared, x)) {
      forward_in_registers(plan, x, c);
      WAVPRUNE_UNROLL
      for (int m = 0; m < 9; ++m)
        shared[own * 9 + m] = T(selection.keeps(row, tile, own, m, c[m]));
    }
  } else {
    load_tile<order>(row, tile, shared);
    __syncthreads();
    const TileParts<T> parts(plan, tile.count, shared);
    forward_tile(plan, tile.count, parts.x, parts.middle, [&](int e, T c) {
      parts.c[e] = T(selection.keeps(row, tile, 0, 0, c));
    });
    kept = parts.c;
  }
  __syncthreads();
  write_bits(block, tile, kept);
}

// Writes the mask of each row at its threshold; no weight changes. At NaN nothing is kept.
template <class T>
__global__ void __launch_bounds__(kThreads, kReading<T>)
    mark_rows(Row<T>* rows, int row_count, const double* thresholds) {
  WAVPRUNE_TILE(T, shared);
  WAVPRUNE_BLOCK(T, block, rows, row_count);
  const ByThreshold<T> selection{positive<T>(thresholds[block.row.index])};
  for_each_tile(block, [&](auto order, auto way, const Tile& tile) {
    mark_tile<decltype(order)::value, decltype(way)::value>(block, tile, selection, shared);
  });
}

// Clears the masks whose words several tiles set bits of.
template <class T>
__global__ void __launch_bounds__(kThreads) clear_masks(Row<T>* rows, int row_count) {
  const Row<T>& row = rows[row_of_block(rows, row_count)];
  if (!row.shares_words) return;
  const int64_t kernels = row.kernels * (row.plan->kind == Kind::identity ? row.values : 1);
  const int64_t words = (kernels + kMaskBlock - 1) / kMaskBlock * row.plan->outputs;
  const int64_t step = int64_t(row.blocks) * kThreads;
  for (int64_t w = int64_t(blockIdx.x - row.first_block) * kThreads + threadIdx.x; w < words;
       w += step)
    row.mask[w] = 0;
}

}  // namespace wavprune::cuda

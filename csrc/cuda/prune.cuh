// Pruning in place, by thresholds or by masks, and the masks of thresholds. Coefficients are computed
// anew and never stored: every weight is read once and written once.
#pragma once

#include "tiles.cuh"

namespace wavprune::cuda {

// What one thread changed.
struct Totals {
  int kept = 0, zeros = 0;
  double squared_error = 0, squared_norm = 0;
};

template <class T>
__device__ __forceinline__ void add(Totals& totals, T before, T after) {
  const double was = double(before), difference = was - double(after);
  totals.squared_error += difference * difference;
  totals.squared_norm += was * was;
  totals.zeros += after == 0;
}

// Sums four numbers over the threads of a block, in the fixed order of a tree.
__device__ __forceinline__ void block_sums(const double* own, double* scratch, double* result) {
  __syncthreads();
  WAVPRUNE_UNROLL
  for (int i = 0; i < 4; ++i) scratch[i * kThreads + threadIdx.x] = own[i];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      WAVPRUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        double* sum = scratch + i * kThreads + threadIdx.x;
        *sum += sum[half];
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < 4) result[threadIdx.x] = scratch[threadIdx.x * kThreads];
}

// A coefficient of 0 is below the smallest positive number.
template <class T>
__device__ __forceinline__ T positive(double threshold) {
  const T least = value_of<T>(1), cut = T(threshold);
  return cut < least ? least : cut;
}

// Two ways to select coefficients.

template <class T>
struct ByThreshold {
  T cut;

  // Of coefficient m of a kernel of a tile.
  __device__ __forceinline__ bool keeps(const Row<T>&, const Tile&, int, int, T c) const {
    return value_of<T>(key_of(c)) >= cut;
  }
  // Of a value, by its flat index, where the basis is the identity.
  __device__ __forceinline__ bool keeps_value(const Row<T>& row, int64_t index, T value) const {
    if (ranks_at_random(row))
      return value != 0 && T(random_rank(uint64_t(index), row.seed)) >= cut;
    return value_of<T>(key_of(value)) >= cut;
  }
};

template <class T>
struct ByMask {
  int outputs;
  __device__ __forceinline__ bool keeps(const Row<T>& row, const Tile& tile, int kernel, int m,
                                        T) const {
    const int64_t index = index_of(row, tile, kernel);
    return row.mask[index / kMaskBlock * outputs + m] >> index % kMaskBlock & 1;
  }
  __device__ __forceinline__ bool keeps_value(const Row<T>& row, int64_t index, T) const {
    return row.mask[index / kMaskBlock] >> index % kMaskBlock & 1;
  }
};

template <bool kCounted, Order order, Way way, class T, class Selection>
__device__ __forceinline__ void prune_tile(const Block<T>& block, const Tile& tile,
                                           const Selection& selection, T* shared, Totals& totals) {
  const Row<T>& row = block.row;
  const Plan<T>& plan = block.plan;
  const auto keep = [&](bool kept, T c) {
    if constexpr (kCounted) totals.kept += kept && c != 0;
    return kept ? c : T(0);
  };
  const auto count = [&](T before, T after) {
    if constexpr (kCounted) add(totals, before, after);
  };
  if constexpr (way == Way::identity) {
    with_element_type(row.element, [&](auto element) {
      typedef decltype(element) E;
      E* data = data_of<E>(row);
      for_each_value<order>(
          row, tile, [&](int, int64_t offset) { return T(read(data + offset)); },
          [&](int, int64_t offset, int64_t index, T before) {
            const E stored = rounded<E>(keep(selection.keeps_value(row, index, before), before));
            count(before, T(widened(stored)));
            write(data + offset, stored);
          });
    });
  } else if constexpr (way == Way::registers) {
    T x[9], c[9];
    const int own = int(threadIdx.x);
    if (load_own<order>(row, tile, shared, x)) {
      forward_in_registers(plan, x, c);
      WAVPRUNE_UNROLL
      for (int m = 0; m < 9; ++m) c[m] = keep(selection.keeps(row, tile, own, m, c[m]), c[m]);
      T y[9];
      inverse_in_registers(plan, c, y);
      round_all<9>(row.element, y);
      WAVPRUNE_UNROLL
      for (int i = 0; i < 9; ++i) {
        count(x[i], y[i]);
        x[i] = y[i];
      }
    }
    store_own<order>(row, tile, shared, x);
  } else {
    __syncthreads();
    load_tile<order>(row, tile, shared);
    __syncthreads();
    const TileParts<T> parts(plan, tile.count, shared);
    forward_tile(plan, tile.count, parts.x, parts.middle, [&](int e, T c) {
      parts.c[e] = keep(selection.keeps(row, tile, e / plan.outputs, e % plan.outputs, c), c);
    });
    __syncthreads();
    inverse_tile(plan, tile.count, parts.c, parts.middle, [&](int e, T y) {
      round_all<1>(row.element, &y);
      count(parts.x[e], y);
      parts.x[e] = y;
    });
    __syncthreads();
    store_tile<order>(row, tile, shared);
  }
}

template <bool kCounted, class T, class Selection>
__device__ __forceinline__ void prune_tiles(const Block<T>& block, const Selection& selection,
                                            T* shared, Totals& totals) {
  for_each_tile(block, [&](auto order, auto way, const Tile& tile) {
    prune_tile<kCounted, decltype(order)::value, decltype(way)::value>(block, tile, selection,
                                                                       shared, totals);
  });
}

// The totals of a row, from those of its threads. The last block adds up what its blocks changed, in
// their order.
template <class T>
__device__ __forceinline__ void report(const Block<T>& block, const Totals& totals, T* shared,
                                       double* partials, double* result) {
  const Row<T>& row = block.row;
  double* scratch = reinterpret_cast<double*>(shared);
  double sums[4] = {double(totals.kept), double(totals.zeros), totals.squared_error,
                    totals.squared_norm};
  block_sums(sums, scratch, partials + 4 * int64_t(blockIdx.x));
  if (!last_block(&block.origin->arrived, row.blocks)) return;
  WAVPRUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    sums[i] = 0;
    for (int b = threadIdx.x; b < row.blocks; b += kThreads)
      sums[i] += __ldcg(partials + 4 * (int64_t(row.first_block) + b) + i);
  }
  block_sums(sums, scratch, result + 4 * int64_t(row.index));
}

// Prunes in place, each row at its threshold; one threshold that is NaN leaves all weights as they
// are.
template <class T>
__global__ void __launch_bounds__(kThreads, kWriting<T>)
    prune_rows(Row<T>* rows, int row_count, const double* thresholds, double* partials,
               double* result) {
  WAVPRUNE_TILE(T, shared);
  WAVPRUNE_BLOCK(T, block, rows, row_count);
  __shared__ int bad;
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();
  for (int r = threadIdx.x; r < row_count; r += kThreads) {
    const double threshold = thresholds[rows[r].index];
    if (threshold != threshold) bad = 1;
  }
  __syncthreads();
  if (bad) {
    if (int(blockIdx.x) == block.row.first_block && threadIdx.x < 4)
      result[4 * int64_t(block.row.index) + threadIdx.x] =
          value_of<double>(0x7FF8000000000000u);
    return;
  }
  const ByThreshold<T> selection{positive<T>(thresholds[block.row.index])};
  Totals totals;
  prune_tiles<true>(block, selection, shared, totals);
  report(block, totals, shared, partials, result);
}

// Prunes in place what the masks do not keep.
template <class T>
__global__ void __launch_bounds__(kThreads, kWriting<T>)
    prune_rows_by_mask(Row<T>* rows, int row_count, double* partials, double* result) {
  WAVPRUNE_TILE(T, shared);
  WAVPRUNE_BLOCK(T, block, rows, row_count);
  Totals totals;
  prune_tiles<true>(block, ByMask<T>{block.plan.outputs}, shared, totals);
  report(block, totals, shared, partials, result);
}

// The same, and nothing is counted.
template <class T>
__global__ void __launch_bounds__(kThreads, kWriting<T>)
    project_rows(Row<T>* rows, int row_count) {
  WAVPRUNE_TILE(T, shared);
  WAVPRUNE_BLOCK(T, block, rows, row_count);
  Totals none;
  prune_tiles<false>(block, ByMask<T>{block.plan.outputs}, shared, none);
}

}  // namespace wavprune::cuda

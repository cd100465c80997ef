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
  __device__ __forceinline__ bool keeps(const Row<T>& row, const Tile& tile, int kernel, int m,
                                        T) const {
    const int64_t index = index_of(row, tile, kernel);
    return row.mask[index / kMaskBlock * row.plan->outputs + m] >> index % kMaskBlock & 1;
  }
  __device__ __forceinline__ bool keeps_value(const Row<T>& row, int64_t index, T) const {
    return row.mask[index / kMaskBlock] >> index % kMaskBlock & 1;
  }
};

template <bool kCounted, class T, class Selection>
__device__ __forceinline__ void prune_tile(const Row<T>& row, const Tile& tile,
                                           const Selection& selection, T* shared, Totals& totals) {
  const Plan<T>& plan = *row.plan;
  const auto keep = [&](bool kept, T c) {
    if constexpr (kCounted) totals.kept += kept && c != 0;
    return kept ? c : T(0);
  };
  const auto count = [&](T before, T after) {
    if constexpr (kCounted) add(totals, before, after);
  };
  if (plan.kind == Kind::identity) {
    with_element_type(row.element, [&](auto element) {
      typedef decltype(element) E;
      E* data = reinterpret_cast<E*>(row.data);
      for_each_value(row, tile, [&](int, int64_t offset, int64_t index) {
        const T before = T(read(data + offset));
        const E stored = rounded<E>(keep(selection.keeps_value(row, index, before), before));
        count(before, T(widened(stored)));
        write(data + offset, stored);
      });
    });
  } else if (runs_in_registers(plan)) {
    T x[9], c[9];
    const int own = int(threadIdx.x);
    if (load_own(row, tile, shared, x)) {
      forward_in_registers(plan, x, c);
      WAVPRUNE_UNROLL
      for (int m = 0; m < 9; ++m) c[m] = keep(selection.keeps(row, tile, own, m, c[m]), c[m]);
      T y[9];
      inverse_in_registers(plan, c, y);
      WAVPRUNE_UNROLL
      for (int i = 0; i < 9; ++i) {
        const T after = rounded(row.element, y[i]);
        count(x[i], after);
        x[i] = after;
      }
    }
    store_own(row, tile, shared, x);
  } else {
    __syncthreads();
    load_tile(row, tile, shared);
    __syncthreads();
    const TileParts<T> parts(plan, tile.count, shared);
    forward_tile(plan, tile.count, parts.x, parts.middle, [&](int e, T c) {
      parts.c[e] = keep(selection.keeps(row, tile, e / plan.outputs, e % plan.outputs, c), c);
    });
    __syncthreads();
    inverse_tile(plan, tile.count, parts.c, parts.middle, [&](int e, T y) {
      const T after = rounded(row.element, y);
      count(parts.x[e], after);
      parts.x[e] = after;
    });
    __syncthreads();
    store_tile(row, tile, shared);
  }
}

// The totals of a row, from those of its threads. The last block adds up what its blocks changed, in
// their order.
template <class T>
__device__ __forceinline__ void report(Row<T>& row, const Totals& totals, T* shared,
                                       double* partials, double* result) {
  double* scratch = reinterpret_cast<double*>(shared);
  double sums[4] = {double(totals.kept), double(totals.zeros), totals.squared_error,
                    totals.squared_norm};
  block_sums(sums, scratch, partials + 4 * int64_t(blockIdx.x));
  if (!last_block(&row.arrived, row.blocks)) return;
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
__global__ void __launch_bounds__(kThreads, kBlocks)
    prune_rows(Row<T>* rows, int row_count, const double* thresholds, double* partials,
               double* result) {
  WAVPRUNE_TILE(T, shared);
  Row<T>& row = row_of_block(rows, row_count);
  __shared__ int bad;
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();
  for (int r = threadIdx.x; r < row_count; r += kThreads) {
    const double threshold = thresholds[rows[r].index];
    if (threshold != threshold) bad = 1;
  }
  __syncthreads();
  if (bad) {
    if (int(blockIdx.x) == row.first_block && threadIdx.x < 4)
      result[4 * int64_t(row.index) + threadIdx.x] = value_of<double>(0x7FF8000000000000u);
    return;
  }
  const ByThreshold<T> selection{positive<T>(thresholds[row.index])};
  Totals totals;
  for_each_tile(row, [&](const Tile& tile) {
    prune_tile<true>(row, tile, selection, shared, totals);
  });
  report(row, totals, shared, partials, result);
}

// Prunes in place what the masks do not keep.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    prune_rows_by_mask(Row<T>* rows, int row_count, double* partials, double* result) {
  WAVPRUNE_TILE(T, shared);
  Row<T>& row = row_of_block(rows, row_count);
  Totals totals;
  for_each_tile(row, [&](const Tile& tile) {
    prune_tile<true>(row, tile, ByMask<T>{}, shared, totals);
  });
  report(row, totals, shared, partials, result);
}

// The same, and nothing is counted.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) project_rows(Row<T>* rows, int row_count) {
  WAVPRUNE_TILE(T, shared);
  const Row<T>& row = row_of_block(rows, row_count);
  Totals none;
  for_each_tile(row, [&](const Tile& tile) {
    prune_tile<false>(row, tile, ByMask<T>{}, shared, none);
  });
}

}  // namespace wavprune::cuda

// Pruning in place: coefficients are computed anew and never stored.
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

template <class T>
__device__ __forceinline__ void prune_tile(const Row<T>& row, int64_t first, int count, T cut,
                                           T* tile, Totals& totals) {
  const Plan<T>& plan = *row.plan;
  const auto keep = [&](T c) {
    const bool large = value_of<T>(key_of(c)) >= cut;
    totals.kept += large;
    return large ? c : T(0);
  };
  if (plan.kind == Kind::identity) {
    with_element_type(row.element, [&](auto element) {
      typedef decltype(element) E;
      E* data = reinterpret_cast<E*>(row.data);
      for_each_value(row, first, count, [&](int, int64_t offset, int64_t index) {
        const T before = T(widened(data[offset]));
        T after = T(0);
        if (ranks_at_random(row)) {
          const bool kept = before != 0 && T(random_rank(uint64_t(index), row.seed)) >= cut;
          totals.kept += kept;
          if (kept) after = before;
        } else {
          after = keep(before);
        }
        const E stored = rounded<E>(after);
        add(totals, before, T(widened(stored)));
        data[offset] = stored;
      });
    });
    return;
  }
  __syncthreads();
  load_tile(row, first, count, tile);
  __syncthreads();
  if (!runs_in_registers(plan)) {
    const TileParts<T> parts(plan, count, tile);
    forward_tile(plan, count, parts.x, parts.middle, [&](int e, T c) { parts.c[e] = keep(c); });
    __syncthreads();
    inverse_tile(plan, count, parts.c, parts.middle, [&](int e, T y) {
      const T after = rounded(row.element, y);
      add(totals, parts.x[e], after);
      parts.x[e] = after;
    });
  } else if (int(threadIdx.x) < count) {
    T x[9], c[9], y[9];
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) x[i] = tile[threadIdx.x * 9 + i];
    forward_in_registers(plan, x, c);
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) c[i] = keep(c[i]);
    inverse_in_registers(plan, c, y);
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) {
      const T after = rounded(row.element, y[i]);
      add(totals, x[i], after);
      tile[threadIdx.x * 9 + i] = after;
    }
  }
  __syncthreads();
  store_tile(row, first, count, tile);
}

// Prunes in place, each row at its threshold; one threshold that is NaN leaves all weights as they
// are. The last block of a row adds up what its blocks changed, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prune_rows(Row<T>* rows, int row_count, const double* thresholds, double* partials,
               double* result) {
  WAVPRUNE_TILE(T, tile);
  Row<T>& row = row_of_block(rows, row_count);
  double* line = result + 4 * int64_t(row.index);
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
      line[threadIdx.x] = value_of<double>(0x7FF8000000000000u);
    return;
  }
  const T threshold = T(thresholds[row.index]);
  // A coefficient of 0 is below the smallest positive number.
  const T least = value_of<T>(1), cut = threshold < least ? least : threshold;
  Totals totals;
  for_each_tile(row, [&](int64_t first, int count) {
    prune_tile(row, first, count, cut, tile, totals);
  });
  double* scratch = reinterpret_cast<double*>(tile);
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
  block_sums(sums, scratch, line);
}

}  // namespace wavprune::cuda

// Radix select: exact thresholds from the bit patterns of |c|, a digit a pass.
#pragma once

#include "tiles.cuh"

namespace wavprune::cuda {

// f(rank) for every coefficient of some kernels: the coefficient, whose sign is ignored, or a
// random rank, 0 for a weight of 0 and NaN for one that is not finite.
template <Order order, Way way, class T, class F>
__device__ __forceinline__ void for_each_rank(const Block<T>& block, const Tile& tile, T* shared,
                                              F f) {
  const Row<T>& row = block.row;
  const Plan<T>& plan = block.plan;
  if constexpr (way == Way::identity) {
    with_element_type(row.element, [&](auto element) {
      const auto* data = data_of<const decltype(element)>(row);
      for_each_value<order>(
          row, tile, [&](int, int64_t offset) { return T(read(data + offset)); },
          [&](int, int64_t, int64_t index, T value) {
            if (ranks_at_random(row))
              f((value == 0 ? T(0) : T(random_rank(uint64_t(index), row.seed))) + (value - value));
            else
              f(value);
          });
    });
  } else if constexpr (way == Way::registers) {
    T x[9], c[9];
    if (!load_own<order>(row, tile, shared, x)) return;
    forward_in_registers(plan, x, c);
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) f(c[i]);
  } else {
    __syncthreads();
    load_tile<order>(row, tile, shared);
    __syncthreads();
    const TileParts<T> parts(plan, tile.count, shared);
    forward_tile(plan, tile.count, parts.x, parts.middle, [&](int, T c) { f(c); });
  }
}

// The digits of a job's two values in this pass, from the counts of all its blocks. `prefix_sums`
// is shared memory for one number a thread.
template <class T>
__device__ __forceinline__ void resolve(Job& job, Count* counts, int pass, Count* prefix_sums,
                                        double* thresholds) {
  constexpr int kOwn = kBins / kThreads;
  const bool distinct = job.prefix[0] != job.prefix[1];
  uint64_t prefix[2];
  int64_t rank[2];
  bool nonfinite = job.nonfinite;
  __shared__ int64_t rank_in_bin[2];
  __shared__ int bin_of_rank[2];
  Count sum = 0;
  for (int which = 0; which < 2; ++which) {
    const Count* own = counts + (which && distinct ? kBins : 0) + threadIdx.x * kOwn;
    // Two ranks with the same digits so far have one histogram.
    if (which == 0 || distinct) {
      sum = 0;
      // Not through the L1 cache, which the atomics of other blocks bypass.
      for (int b = 0; b < kOwn; ++b) sum += __ldcg(own + b);
      prefix_sums[threadIdx.x] = sum;
      __syncthreads();
      for (int step = 1; step < kThreads; step *= 2) {
        const Count before = int(threadIdx.x) >= step ? prefix_sums[threadIdx.x - step] : 0;
        __syncthreads();
        prefix_sums[threadIdx.x] += before;
        __syncthreads();
      }
    }
    const Count wanted = Count(job.rank[which]);
    Count below = prefix_sums[threadIdx.x] - sum;
    if (below <= wanted && wanted < prefix_sums[threadIdx.x]) {
      int bin = 0;
      for (Count here; wanted >= below + (here = __ldcg(own + bin)); ++bin) below += here;
      bin_of_rank[which] = int(threadIdx.x) * kOwn + bin;
      rank_in_bin[which] = int64_t(wanted - below);
    }
    constexpr Count kFirst = Count(Radix<T>::kInfinity >> (sizeof(T) == 4 ? 20 : 52));
    if (pass == 0 && which == 0) {
      // The values in the bins from infinity's on are not finite.
      const Count total = prefix_sums[kThreads - 1];
      Count finite = prefix_sums[kFirst / kOwn];
      for (int b = kFirst % kOwn; b < kOwn; ++b)
        finite -= __ldcg(counts + kFirst / kOwn * kOwn + b);
      nonfinite = finite != total;
    }
    __syncthreads();
    prefix[which] = job.prefix[which] << Radix<T>::width(pass) | uint64_t(bin_of_rank[which]);
    rank[which] = rank_in_bin[which];
  }
  for (int b = threadIdx.x; b < kJobCounts; b += kThreads) counts[b] = 0;
  if (threadIdx.x != 0) return;
  job.arrived = 0;
  job.nonfinite = nonfinite;
  for (int which = 0; which < 2; ++which) {
    job.prefix[which] = prefix[which];
    job.rank[which] = rank[which];
  }
  if (pass < Radix<T>::kPasses - 1) return;
  const T low = job.structural_zero[0] ? T(0) : value_of<T>(Key<T>(prefix[0]));
  const T high = job.structural_zero[1] ? T(0) : value_of<T>(Key<T>(prefix[1]));
  thresholds[job.index] = nonfinite            ? double(value_of<T>(~Key<T>(0) >> 1))
                          : job.fraction > 0 ? double(interpolate(low, high, job.fraction))
                                             : double(low);
}

// One pass of the radix select: counts a digit, and the last block of each job finds that digit of
// the job's values. The last pass gives the thresholds.
template <class T>
__global__ void __launch_bounds__(kThreads, kReading<T>)
    count_digits(Row<T>* rows, int row_count, Job* jobs, Count* all_counts, int pass,
                 double* thresholds) {
  WAVPRUNE_TILE(T, shared);
  __shared__ Count bin_memory[kBins];
  unsigned* const bins = reinterpret_cast<unsigned*>(bin_memory);
  WAVPRUNE_BLOCK(T, block, rows, row_count);
  Job& job = jobs[block.row.job];
  Count* counts = all_counts + int64_t(block.row.job) * kJobCounts;
  for (int b = threadIdx.x; b < 2 * kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  const int shift = Radix<T>::shift(pass), width = Radix<T>::width(pass);
  const Key<T> bin_count = Key<T>(1) << width;
  const Key<T> low = Key<T>(job.prefix[0]) << width, high = Key<T>(job.prefix[1]) << width;
  const bool distinct = low != high;
  // All values count in the first pass, and adjacent ones often fall into one bin: even and odd
  // threads have bins of their own.
  unsigned* own = bins + (pass == 0 && threadIdx.x % 2 ? kBins : 0);
  for_each_tile(block, [&](auto order, auto way, const Tile& tile) {
    for_each_rank<decltype(order)::value, decltype(way)::value>(block, tile, shared, [&](T rank) {
      const Key<T> head = key_of(rank) >> shift;
      if (head - low < bin_count) atomicAdd(own + (head - low), 1u);
      else if (distinct && head - high < bin_count) atomicAdd(bins + kBins + (head - high), 1u);
    });
  });
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    const unsigned of_low = pass == 0 ? bins[b] + bins[kBins + b] : bins[b];
    const unsigned of_high = pass == 0 ? 0 : bins[kBins + b];
    if (of_low) atomicAdd(counts + b, Count(of_low));
    if (of_high) atomicAdd(counts + kBins + b, Count(of_high));
  }
  if (last_block(&job.arrived, job.blocks)) resolve<T>(job, counts, pass, bin_memory, thresholds);
}

}  // namespace wavprune::cuda

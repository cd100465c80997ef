// The kernels. A block does some tiles of one weight; all weights of a call share each launch.
//
// Nothing here depends on the order of blocks or threads: counts are added as whole numbers, and
// sums of floats have one written order. Coefficients are computed anew in each pass by
// kernel_math.h, in the order of the CPU's passes, so their bits are those of the CPU.
//
// The including file defines WAVPRUNE_TILE(T, name), which declares T* name, the block's dynamic
// shared memory.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "../kernel_math.h"
#include "table.h"

namespace wavprune::cuda {

// A digit of a bit pattern a pass, from the top. Magnitudes order as their bit patterns do.
template <class T>
struct Radix;

template <>
struct Radix<float> {
  typedef uint32_t Key;
  static constexpr int kPasses = 3;
  static constexpr Key kInfinity = 0x7F800000u;
  static WAVPRUNE_INLINE int shift(int pass) { return 20 - 10 * pass; }
  static WAVPRUNE_INLINE int width(int pass) { return pass == 0 ? 11 : 10; }
};

template <>
struct Radix<double> {
  typedef uint64_t Key;
  static constexpr int kPasses = 6;
  static constexpr Key kInfinity = 0x7FF0000000000000u;
  static WAVPRUNE_INLINE int shift(int pass) { return pass < 3 ? 52 - 11 * pass : 50 - 10 * pass; }
  static WAVPRUNE_INLINE int width(int pass) { return pass < 3 ? 11 : 10; }
};

template <class T>
using Key = typename Radix<T>::Key;

template <class T>
__device__ __forceinline__ Key<T> key_of(T magnitude) {
  Key<T> key;
  memcpy(&key, &magnitude, sizeof key);
  return key & (~Key<T>(0) >> 1);
}

template <class T>
__device__ __forceinline__ T value_of(Key<T> key) {
  T value;
  memcpy(&value, &key, sizeof value);
  return value;
}

template <class F>
__device__ __forceinline__ void with_element(Element element, F f) {
  switch (element) {
    case Element::f32:
      return f(float());
    case Element::f64:
      return f(double());
    case Element::f16:
      return f(torch::headeronly::Half());
    case Element::bf16:
      return f(torch::headeronly::BFloat16());
  }
}

__device__ __forceinline__ double wide(double value) { return value; }
__device__ __forceinline__ float wide(float value) { return value; }
__device__ __forceinline__ float wide(torch::headeronly::Half value) { return float(value); }
__device__ __forceinline__ float wide(torch::headeronly::BFloat16 value) { return float(value); }

template <class T>
__device__ __forceinline__ T clamped(T value, double limit) {
  const T most = T(limit);
  return value < -most ? -most : most < value ? most : value;
}

template <class E>
constexpr double kLargest = 0;
template <>
constexpr double kLargest<float> = 0x1.fffffep127;
template <>
constexpr double kLargest<torch::headeronly::Half> = 65504;
template <>
constexpr double kLargest<torch::headeronly::BFloat16> = 0x1.fep127;

// Rounds to an element of the weight; float16 ends at 65504, which a sum of coefficients may pass.
template <class E, class T>
__device__ __forceinline__ E rounded(T value) {
  if constexpr (sizeof(E) == sizeof(T) || sizeof(E) == 8) return static_cast<E>(value);
  else return static_cast<E>(static_cast<float>(clamped(value, kLargest<E>)));
}

// The same, as the weight will be read again.
template <class T>
__device__ __forceinline__ T rounded(Element element, T value) {
  T result = value;
  with_element(element, [&](auto one) { result = T(wide(rounded<decltype(one)>(value))); });
  return result;
}

// The row whose blocks include this one.
template <class T>
__device__ __forceinline__ Row<T>& row_of_block(Row<T>* rows, int count) {
  int low = 0;
  while (count > 1) {
    const int half = count / 2;
    if (rows[low + half].first_block <= int(blockIdx.x)) low += half, count -= half;
    else count = half;
  }
  return rows[low];
}

// f(place in the tile, place in the weight's memory, place in the weight) of every value of the
// kernels first .. first + count - 1, neighbouring threads in neighbouring memory.
template <class T, class F>
__device__ __forceinline__ void each_value(const Row<T>& row, int64_t first, int count, F f) {
  const int total = count * row.values;
  const int64_t start = first * row.values;
  if (row.contiguous) {
    for (int base = threadIdx.x; base < total; base += kTileValues) {
      WAVPRUNE_UNROLL
      for (int i = 0; i < kTileValues / kThreads; ++i) {
        const int at = base + i * kThreads;
        if (at < total) f(at, start + at, start + at);
      }
    }
    return;
  }
  const int64_t out = first / row.ins;
  const unsigned ins = unsigned(row.ins), in = unsigned(first % row.ins);
  for (int at = threadIdx.x; at < total; at += kThreads) {
    const int kernel = row.across ? at % count : at / row.values;
    const int value = row.across ? at / count : at % row.values;
    const unsigned column = in + unsigned(kernel);
    const int64_t place = (out + column / ins) * row.strides[0] + column % ins * row.strides[1] +
                          value / row.width * row.strides[2] + value % row.width * row.strides[3];
    const int slot = kernel * row.values + value;
    f(slot, place, start + slot);
  }
}

// Weights to a tile: kernel k's value r to tile[k * K + r].
template <class T>
__device__ __forceinline__ void load_tile(const Row<T>& row, int64_t first, int count, T* tile) {
  with_element(row.element, [&](auto element) {
    const auto* data = reinterpret_cast<const decltype(element)*>(row.data);
    each_value(row, first, count,
               [&](int slot, int64_t place, int64_t) { tile[slot] = T(wide(data[place])); });
  });
}

// A tile that is rounded already to weights.
template <class T>
__device__ __forceinline__ void store_tile(const Row<T>& row, int64_t first, int count,
                                           const T* tile) {
  with_element(row.element, [&](auto element) {
    typedef decltype(element) E;
    E* data = reinterpret_cast<E*>(row.data);
    each_value(row, first, count, [&](int slot, int64_t place, int64_t) {
      data[place] = static_cast<E>(static_cast<decltype(wide(element))>(tile[slot]));
    });
  });
}

// f(first, count) for each tile of this block.
template <class T, class F>
__device__ __forceinline__ void each_tile(const Row<T>& row, F f) {
  const int64_t begin = int64_t(blockIdx.x - row.first_block) * kTiles * row.tile_kernels;
  for (int t = 0; t < kTiles; ++t) {
    const int64_t first = begin + int64_t(t) * row.tile_kernels;
    if (first >= row.kernels) return;
    const int64_t left = row.kernels - first;
    f(first, left < row.tile_kernels ? int(left) : row.tile_kernels);
  }
}

// 3x3 kernels of float, which one thread transforms in registers. Larger ones, and wider values,
// are shared by the threads of a block.
template <class T>
WAVPRUNE_INLINE bool in_registers(const Plan<T>& plan) {
  if (sizeof(T) != 4) return false;
  if (plan.kind == Kind::pairs || plan.kind == Kind::merges) return true;
  const Axes<T>& axes = plan.forward_axes;
  return plan.kind == Kind::separable && axes.rows_in == 3 && axes.columns_in == 3 &&
         axes.rows_out == 3 && axes.columns_out == 3;
}

template <class T>
__device__ __forceinline__ void forward_nine(const Plan<T>& plan, const T* x, T* c) {
  T middle[9];
  if (plan.kind == Kind::pairs) three_forward<Pairs>(plan.forward_scale, x, middle, c);
  else if (plan.kind == Kind::merges) three_forward<Merges>(plan.forward_scale, x, middle, c);
  else separable<3, 3, 3, 3>(plan.forward_axes, x, middle, c);
}

template <class T>
__device__ __forceinline__ void inverse_nine(const Plan<T>& plan, const T* c, T* x) {
  T middle[9];
  if (plan.kind == Kind::pairs) three_inverse<Pairs>(plan.inverse_scale, c, middle, x);
  else if (plan.kind == Kind::merges) three_inverse<Merges>(plan.inverse_scale, c, middle, x);
  else separable<3, 3, 3, 3>(plan.inverse_axes, c, middle, x);
}

// The threads of a block share the kernels of a tile: f(place, value) of every output.
template <class T, class F>
__device__ __forceinline__ void separable_tile(const Axes<T>& axes, int count, const T* x,
                                               T* middle, F f) {
  const int ri = axes.rows_in, ro = axes.rows_out, ci = axes.columns_in, co = axes.columns_out;
  for (int e = threadIdx.x; e < count * ri * co; e += kThreads)
    middle[e] = weighted_sum<0>(x + e / co * ci, 1, axes.columns + e % co * ci, ci);
  __syncthreads();
  for (int e = threadIdx.x; e < count * ro * co; e += kThreads) {
    const int kernel = e / (ro * co), m = e / co % ro, n = e % co;
    f(e, weighted_sum<0>(middle + kernel * ri * co + n, co, axes.rows + m * ri, ri));
  }
}

template <class T, class F>
__device__ __forceinline__ void sparse_tile(const Entries<T>& entries, int inputs, int count,
                                            const T* x, F f) {
  for (int e = threadIdx.x; e < count * entries.outputs; e += kThreads)
    f(e, sparse_row(entries, x + e / entries.outputs * inputs, e % entries.outputs));
}

template <class T, class F>
__device__ __forceinline__ void forward_tile(const Plan<T>& plan, int count, const T* x, T* middle,
                                             F f) {
  if (plan.kind == Kind::sparse) sparse_tile(plan.forward_entries, plan.inputs, count, x, f);
  else separable_tile(plan.forward_axes, count, x, middle, f);
}

template <class T, class F>
__device__ __forceinline__ void inverse_tile(const Plan<T>& plan, int count, const T* c, T* middle,
                                             F f) {
  if (plan.kind == Kind::sparse) sparse_tile(plan.inverse_entries, plan.outputs, count, c, f);
  else separable_tile(plan.inverse_axes, count, c, middle, f);
}

// Where the parts of a tile lie that its threads share: K values of each kernel, then as many for
// the middle of a separable transform and for the coefficients as the larger side has.
template <class T>
struct Parts {
  T *x, *middle, *c;
  __device__ __forceinline__ Parts(const Plan<T>& plan, int count, T* tile) {
    const int side = plan.inputs > plan.outputs ? plan.inputs : plan.outputs;
    x = tile;
    middle = x + count * plan.inputs;
    c = middle + count * side;
  }
};

// Random draws are float64: rounded to float32 they would tie.
template <class T>
__device__ __forceinline__ bool drawn(const Row<T>& row) {
  return sizeof(T) == 8 && row.draw;
}

// f(rank) of every coefficient of some kernels: its magnitude up to the sign, or a random draw,
// 0 for a weight of 0 and NaN for one that is not finite.
template <class T, class F>
__device__ __forceinline__ void each_rank(const Row<T>& row, int64_t first, int count, T* tile,
                                          F f) {
  const Plan<T>& plan = *row.plan;
  if (plan.kind == Kind::identity) {
    with_element(row.element, [&](auto element) {
      const auto* data = reinterpret_cast<const decltype(element)*>(row.data);
      each_value(row, first, count, [&](int, int64_t place, int64_t index) {
        const T value = T(wide(data[place]));
        if (drawn(row))
          f((value == 0 ? T(0) : T(random_rank(uint64_t(index), row.seed))) + (value - value));
        else
          f(value);
      });
    });
    return;
  }
  __syncthreads();
  load_tile(row, first, count, tile);
  __syncthreads();
  if (!in_registers(plan)) {
    const Parts<T> parts(plan, count, tile);
    forward_tile(plan, count, parts.x, parts.middle, [&](int, T c) { f(c); });
  } else if (int(threadIdx.x) < count) {
    T x[9], c[9];
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) x[i] = tile[threadIdx.x * 9 + i];
    forward_nine(plan, x, c);
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) f(c[i]);
  }
}

// True in all threads of the block that comes through last; what all blocks wrote is there then.
__device__ __forceinline__ bool last_block(int* arrived, int blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// The digits of a job's two values in this pass, from the counts of all its blocks. `upto` is
// shared memory for a number a thread.
template <class T>
__device__ __forceinline__ void resolve(Job& job, Count* counts, int pass, Count* upto,
                                        double* thresholds) {
  constexpr int kOwn = kBins / kThreads;
  const bool apart = job.prefix[0] != job.prefix[1];
  uint64_t prefix[2];
  int64_t rank[2];
  bool nonfinite = job.nonfinite;
  __shared__ int64_t found[2];
  __shared__ int bin_found[2];
  for (int which = 0; which < 2; ++which) {
    const Count* own = counts + (which && apart ? kBins : 0) + threadIdx.x * kOwn;
    Count sum = 0;
    // Not through the first cache, which other blocks' atomics pass by.
    for (int b = 0; b < kOwn; ++b) sum += __ldcg(own + b);
    upto[threadIdx.x] = sum;
    __syncthreads();
    for (int step = 1; step < kThreads; step *= 2) {
      const Count before = int(threadIdx.x) >= step ? upto[threadIdx.x - step] : 0;
      __syncthreads();
      upto[threadIdx.x] += before;
      __syncthreads();
    }
    const Count wanted = Count(job.rank[which]);
    Count below = upto[threadIdx.x] - sum;
    if (below <= wanted && wanted < upto[threadIdx.x]) {
      int bin = 0;
      for (Count here; wanted >= below + (here = __ldcg(own + bin)); ++bin) below += here;
      bin_found[which] = int(threadIdx.x) * kOwn + bin;
      found[which] = int64_t(wanted - below);
    }
    constexpr Count kFirst = Count(Radix<T>::kInfinity >> (sizeof(T) == 4 ? 20 : 52));
    if (pass == 0 && which == 0) {
      // All values fall in the bins up to here; those from infinity's on are not finite.
      const Count total = upto[kThreads - 1];
      Count finite = upto[kFirst / kOwn];
      for (int b = kFirst % kOwn; b < kOwn; ++b)
        finite -= __ldcg(counts + kFirst / kOwn * kOwn + b);
      nonfinite = finite != total;
    }
    __syncthreads();
    prefix[which] = job.prefix[which] << Radix<T>::width(pass) | uint64_t(bin_found[which]);
    rank[which] = found[which];
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
  const T low = job.zero[0] ? T(0) : value_of<T>(Key<T>(prefix[0]));
  const T high = job.zero[1] ? T(0) : value_of<T>(Key<T>(prefix[1]));
  thresholds[job.index] = nonfinite            ? double(value_of<T>(~Key<T>(0) >> 1))
                          : job.fraction > 0 ? double(between(low, high, job.fraction))
                                             : double(low);
}

// One pass of the selection: counts of a digit, and of each job whose last block is through, that
// digit. The last pass gives the thresholds.
template <class T>
__global__ void __launch_bounds__(kThreads)
    count_digits(Row<T>* rows, int row_count, Job* jobs, Count* all_counts, int pass,
                 double* thresholds) {
  WAVPRUNE_TILE(T, tile);
  __shared__ Count bin_memory[kBins];
  unsigned* const bins = reinterpret_cast<unsigned*>(bin_memory);
  const Row<T>& row = row_of_block(rows, row_count);
  Job& job = jobs[row.job];
  Count* counts = all_counts + int64_t(row.job) * kJobCounts;
  for (int b = threadIdx.x; b < 2 * kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  const int shift = Radix<T>::shift(pass), above = shift + Radix<T>::width(pass);
  const Key<T> low = Key<T>(job.prefix[0]), high = Key<T>(job.prefix[1]);
  const Key<T> mask = (Key<T>(1) << (above - shift)) - 1;
  // All values count in the first pass, and neighbours often meet in a bin: even threads and odd
  // ones have their own.
  unsigned* own = bins + (pass == 0 && threadIdx.x % 2 ? kBins : 0);
  each_tile(row, [&](int64_t first, int count) {
    each_rank(row, first, count, tile, [&](T rank) {
      const Key<T> key = key_of(rank), head = key >> above;
      if (head == low) atomicAdd(own + (key >> shift & mask), 1u);
      else if (head == high) atomicAdd(bins + kBins + (key >> shift & mask), 1u);
    });
  });
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    const unsigned low = pass == 0 ? bins[b] + bins[kBins + b] : bins[b];
    const unsigned high = pass == 0 ? 0 : bins[kBins + b];
    if (low) atomicAdd(counts + b, Count(low));
    if (high) atomicAdd(counts + kBins + b, Count(high));
  }
  if (last_block(&job.arrived, job.blocks)) resolve<T>(job, counts, pass, bin_memory, thresholds);
}

// What a thread found in the weights that it pruned.
struct Totals {
  int kept = 0, zeros = 0;
  double squared_error = 0, squared_norm = 0;
};

template <class T>
__device__ __forceinline__ void add(Totals& totals, T before, T after) {
  const double was = double(before), moved = was - double(after);
  totals.squared_error += moved * moved;
  totals.squared_norm += was * was;
  totals.zeros += after == 0;
}

// The sums of all threads in four numbers, in the order of a tree, which never changes.
__device__ __forceinline__ void sum_up(const double* own, double* scratch, double* result) {
  __syncthreads();
  WAVPRUNE_UNROLL
  for (int i = 0; i < 4; ++i) scratch[i * kThreads + threadIdx.x] = own[i];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      WAVPRUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        double* at = scratch + i * kThreads + threadIdx.x;
        *at += at[half];
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
    with_element(row.element, [&](auto element) {
      typedef decltype(element) E;
      E* data = reinterpret_cast<E*>(row.data);
      each_value(row, first, count, [&](int, int64_t place, int64_t index) {
        const T before = T(wide(data[place]));
        T after = T(0);
        if (drawn(row)) {
          const bool kept = before != 0 && T(random_rank(uint64_t(index), row.seed)) >= cut;
          totals.kept += kept;
          if (kept) after = before;
        } else {
          after = keep(before);
        }
        const E stored = rounded<E>(after);
        add(totals, before, T(wide(stored)));
        data[place] = stored;
      });
    });
    return;
  }
  __syncthreads();
  load_tile(row, first, count, tile);
  __syncthreads();
  if (!in_registers(plan)) {
    const Parts<T> parts(plan, count, tile);
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
    forward_nine(plan, x, c);
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) c[i] = keep(c[i]);
    inverse_nine(plan, c, y);
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

// Mask and inverse in place, each row at its threshold; NaN leaves a weight as it is. The last
// block of a row adds up what its blocks found, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prune_rows(Row<T>* rows, int row_count, const double* thresholds, double* partials,
               double* result) {
  WAVPRUNE_TILE(T, tile);
  Row<T>& row = row_of_block(rows, row_count);
  double* line = result + 4 * int64_t(row.index);
  // One weight that is not finite, and all stay as they are.
  __shared__ int bad;
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();
  for (int r = threadIdx.x; r < row_count; r += kThreads) {
    const double each = thresholds[rows[r].index];
    if (each != each) bad = 1;
  }
  __syncthreads();
  if (bad) {
    if (int(blockIdx.x) == row.first_block && threadIdx.x < 4)
      line[threadIdx.x] = value_of<double>(0x7FF8000000000000u);
    return;
  }
  const T threshold = T(thresholds[row.index]);
  // At the smallest positive number or above, a coefficient of 0 is never kept.
  const T least = value_of<T>(1), cut = threshold < least ? least : threshold;
  Totals totals;
  each_tile(row, [&](int64_t first, int count) {
    prune_tile(row, first, count, cut, tile, totals);
  });
  double* scratch = reinterpret_cast<double*>(tile);
  double sums[4] = {double(totals.kept), double(totals.zeros), totals.squared_error,
                    totals.squared_norm};
  sum_up(sums, scratch, partials + 4 * int64_t(blockIdx.x));
  if (!last_block(&row.arrived, row.blocks)) return;
  WAVPRUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    sums[i] = 0;
    for (int b = threadIdx.x; b < row.blocks; b += kThreads)
      sums[i] += __ldcg(partials + 4 * (int64_t(row.first_block) + b) + i);
  }
  sum_up(sums, scratch, line);
}

// One value of each, or eight places in a byte, the first in its lowest bit.
template <class T>
__global__ void __launch_bounds__(kThreads)
    mask_values(const char* data, Element element, int64_t count, const double* threshold,
                bool packed, uint8_t* mask) {
  const T cut = T(*threshold);
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  with_element(element, [&](auto one) {
    const auto* values = reinterpret_cast<const decltype(one)*>(data);
    const auto large = [&](int64_t i) {
      return value_of<T>(key_of(T(wide(values[i])))) >= cut;
    };
    if (!packed) {
      if (at < count) mask[at] = large(at);
      return;
    }
    if (at * 8 >= count) return;
    unsigned byte = 0;
    for (int b = 0; b < 8 && at * 8 + b < count; ++b) byte |= unsigned(large(at * 8 + b)) << b;
    mask[at] = uint8_t(byte);
  });
}

// Rows of kernels to rows of coefficients, or back.
template <class T>
__global__ void __launch_bounds__(kThreads)
    transform_rows(const Plan<T>* plans, const T* from, int64_t kernels, int tile_kernels,
                   bool forward, T* to) {
  WAVPRUNE_TILE(T, tile);
  const Plan<T>& plan = *plans;
  const int64_t first = int64_t(blockIdx.x) * tile_kernels;
  const int count = kernels - first < tile_kernels ? int(kernels - first) : tile_kernels;
  const int taken = forward ? plan.inputs : plan.outputs;
  from += first * taken;
  to += first * (forward ? plan.outputs : plan.inputs);
  if (plan.kind == Kind::identity) {
    for (int e = threadIdx.x; e < count * taken; e += kThreads) to[e] = from[e];
    return;
  }
  const int side = plan.inputs > plan.outputs ? plan.inputs : plan.outputs;
  for (int e = threadIdx.x; e < count * taken; e += kThreads) tile[e] = from[e];
  __syncthreads();
  if (in_registers(plan)) {
    if (int(threadIdx.x) >= count) return;
    T x[9], y[9];
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) x[i] = tile[threadIdx.x * 9 + i];
    if (forward) forward_nine(plan, x, y);
    else inverse_nine(plan, x, y);
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) to[threadIdx.x * 9 + i] = y[i];
    return;
  }
  T* middle = tile + count * side;
  const auto write = [&](int e, T value) { to[e] = value; };
  if (forward) forward_tile(plan, count, tile, middle, write);
  else inverse_tile(plan, count, tile, middle, write);
}

// 16 bytes.
struct alignas(16) Word {
  uint64_t halves[2];
};

template <int words>
struct Payload {
  Word word[words];
};

// What the host knows comes as the parameter of a launch: no host memory must outlive the call, so
// nothing waits for it, and a CUDA graph that captured the launch holds it.
template <int words>
__global__ void __launch_bounds__(kThreads)
    upload(const __grid_constant__ Payload<words> payload, int count, Word* target, Word* clear,
           int64_t clear_count, double* fill, int64_t fill_count, double value) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = thread; i < count; i += threads) target[i] = payload.word[i];
  for (int64_t i = thread; i < clear_count; i += threads) clear[i] = Word{};
  for (int64_t i = thread; i < fill_count; i += threads) fill[i] = value;
}

}  // namespace wavprune::cuda

// The tiles of a weight in shared memory, and their transforms.
#pragma once

#include "elements.cuh"

namespace wavprune::cuda {

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

// Some kernels of a weight. Kernel k of them is at `fast + (shift + k) % period` of the fast
// channels and at `slow + (shift + k) / period` of the slow ones.
struct Tile {
  int64_t slow, fast;
  int64_t first;  // flat index of kernel 0
  unsigned shift, period;
  int count;
};

template <class T>
__device__ __forceinline__ Tile tile_at(const Row<T>& row, int64_t t) {
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  if (row.brick_fast == 0) {
    const int64_t first = t * row.tile_kernels;
    return {first / row.fast.size, 0, first, unsigned(first % row.fast.size),
            unsigned(row.fast.size), int(smaller(row.kernels - first, row.tile_kernels))};
  }
  const int64_t across = (row.fast.size + row.brick_fast - 1) / row.brick_fast;
  const int64_t fast = t % across * row.brick_fast, slow = t / across * row.brick_slow;
  const int64_t period = smaller(row.fast.size - fast, row.brick_fast);
  return {slow, fast, slow * row.slow.step + fast * row.fast.step, 0, unsigned(period),
          int(period * smaller(row.slow.size - slow, row.brick_slow))};
}

// Where a kernel of a tile begins in memory.
template <class T>
__device__ __forceinline__ int64_t offset_of(const Row<T>& row, const Tile& tile, int kernel) {
  const unsigned column = tile.shift + unsigned(kernel);
  return (tile.slow + column / tile.period) * row.slow.stride +
         (tile.fast + column % tile.period) * row.fast.stride;
}

// The flat index of a kernel of a tile.
template <class T>
__device__ __forceinline__ int64_t index_of(const Row<T>& row, const Tile& tile, int kernel) {
  if (row.brick_fast == 0) return tile.first + kernel;
  return tile.first + unsigned(kernel) / tile.period * row.slow.step +
         unsigned(kernel) % tile.period * row.fast.step;
}

// f(index in the tile, offset in memory, flat index in the weight) for every value of a tile.
// Adjacent threads access adjacent memory.
template <class T, class F>
__device__ __forceinline__ void for_each_value(const Row<T>& row, const Tile& tile, F f) {
  const int count = tile.count, total = count * row.values;
  if (row.contiguous) {
    const int64_t start = tile.first * row.values;
    for (int base = threadIdx.x; base < total; base += kTileValues) {
      WAVPRUNE_UNROLL
      for (int i = 0; i < kTileValues / kThreads; ++i) {
        const int index = base + i * kThreads;
        if (index < total) f(index, start + index, start + index);
      }
    }
    return;
  }
  if (row.kernels_adjacent) {
    // A thread stays with its kernels; several share a kernel where those are few.
    const int step = count < kThreads ? count : kThreads, parts = kThreads / step;
    const int part = int(threadIdx.x) / step;
    if (part >= parts) return;
    for (int kernel = int(threadIdx.x) % step; kernel < count; kernel += step) {
      const int64_t start = offset_of(row, tile, kernel);
      const int64_t index = index_of(row, tile, kernel) * row.values;
      int line = 0, column = part;
      WAVPRUNE_UNROLL
      for (int value = part; value < row.values; value += parts) {
        for (; column >= row.width; column -= row.width) ++line;
        f(kernel * row.values + value,
          start + line * row.value_strides[0] + column * row.value_strides[1], index + value);
        column += parts;
      }
    }
    return;
  }
  for (int i = threadIdx.x; i < total; i += kThreads) {
    const int kernel = i / row.values, value = i % row.values;
    f(i,
      offset_of(row, tile, kernel) + value / row.width * row.value_strides[0] +
          value % row.width * row.value_strides[1],
      index_of(row, tile, kernel) * row.values + value);
  }
}

// Copies kernels to shared memory: value r of kernel k to x[k * K + r].
template <class T>
__device__ __forceinline__ void load_tile(const Row<T>& row, const Tile& tile, T* x) {
  with_element_type(row.element, [&](auto element) {
    const auto* data = reinterpret_cast<const decltype(element)*>(row.data);
    for_each_value(row, tile,
                   [&](int i, int64_t offset, int64_t) { x[i] = T(read(data + offset)); });
  });
}

// Writes kernels to the weight.
template <class T>
__device__ __forceinline__ void store_tile(const Row<T>& row, const Tile& tile, const T* x) {
  with_element_type(row.element, [&](auto element) {
    typedef decltype(element) E;
    E* data = reinterpret_cast<E*>(row.data);
    for_each_value(row, tile, [&](int i, int64_t offset, int64_t) {
      write(data + offset, rounded<E>(x[i]));
    });
  });
}

// f(offset in memory, which value) for the values of the 3x3 kernel of this thread.
template <class T, class F>
__device__ __forceinline__ void for_each_of_9(const Row<T>& row, const Tile& tile, F f) {
  const int64_t start = offset_of(row, tile, int(threadIdx.x));
  WAVPRUNE_UNROLL
  for (int i = 0; i < 9; ++i)
    f(start + i / 3 * row.value_strides[0] + i % 3 * row.value_strides[1], i);
}

// The 3x3 kernel of this thread, where it has one. Where kernels are adjacent in memory it needs no
// shared memory: the threads of a warp read neighbors.
template <class T>
__device__ __forceinline__ bool load_own(const Row<T>& row, const Tile& tile, T* shared, T* x) {
  const bool exists = int(threadIdx.x) < tile.count;
  if (row.kernels_adjacent) {
    if (!exists) return false;
    with_element_type(row.element, [&](auto element) {
      const auto* data = reinterpret_cast<const decltype(element)*>(row.data);
      for_each_of_9(row, tile,
                    [&](int64_t offset, int i) { x[i] = T(read(data + offset)); });
    });
    return true;
  }
  __syncthreads();
  load_tile(row, tile, shared);
  __syncthreads();
  if (!exists) return false;
  WAVPRUNE_UNROLL
  for (int i = 0; i < 9; ++i) x[i] = shared[threadIdx.x * 9 + i];
  return true;
}

// Writes what load_own gave; all threads call it.
template <class T>
__device__ __forceinline__ void store_own(const Row<T>& row, const Tile& tile, T* shared,
                                          const T* x) {
  const bool exists = int(threadIdx.x) < tile.count;
  if (row.kernels_adjacent) {
    if (!exists) return;
    with_element_type(row.element, [&](auto element) {
      typedef decltype(element) E;
      E* data = reinterpret_cast<E*>(row.data);
      for_each_of_9(row, tile,
                    [&](int64_t offset, int i) { write(data + offset, rounded<E>(x[i])); });
    });
    return;
  }
  if (exists) {
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) shared[threadIdx.x * 9 + i] = x[i];
  }
  __syncthreads();
  store_tile(row, tile, shared);
}

// f(tile) for each tile of this block.
template <class T, class F>
__device__ __forceinline__ void for_each_tile(const Row<T>& row, F f) {
  const int64_t begin = int64_t(blockIdx.x - row.first_block) * kTiles;
  for (int64_t t = begin; t < begin + kTiles && t < row.tiles; ++t) f(tile_at(row, t));
}

// One 3x3 kernel by one thread; see runs_in_registers.
template <class T>
__device__ __forceinline__ void forward_in_registers(const Plan<T>& plan, const T* x, T* c) {
  T middle[9];
  if (plan.kind == Kind::pairs) forward_3x3<Pairs>(plan.forward_scale, x, middle, c);
  else if (plan.kind == Kind::merges) forward_3x3<Merges>(plan.forward_scale, x, middle, c);
  else separable<3, 3, 3, 3>(plan.forward_axes, x, middle, c);
}

template <class T>
__device__ __forceinline__ void inverse_in_registers(const Plan<T>& plan, const T* c, T* x) {
  T middle[9];
  if (plan.kind == Kind::pairs) inverse_3x3<Pairs>(plan.inverse_scale, c, middle, x);
  else if (plan.kind == Kind::merges) inverse_3x3<Merges>(plan.inverse_scale, c, middle, x);
  else separable<3, 3, 3, 3>(plan.inverse_axes, c, middle, x);
}

// The threads of a block share the kernels of a tile: f(index, value) for every output.
template <class T, class F>
__device__ __forceinline__ void separable_tile(const Axes<T>& axes, int count, const T* x,
                                               T* middle, F f) {
  const int ri = axes.rows_in, ro = axes.rows_out, ci = axes.columns_in, co = axes.columns_out;
  for (int e = threadIdx.x; e < count * ri * co; e += kThreads)
    middle[e] = strided_dot<0>(x + e / co * ci, 1, axes.columns + e % co * ci, ci);
  __syncthreads();
  for (int e = threadIdx.x; e < count * ro * co; e += kThreads) {
    const int kernel = e / (ro * co), m = e / co % ro, n = e % co;
    f(e, strided_dot<0>(middle + kernel * ri * co + n, co, axes.rows + m * ri, ri));
  }
}

template <class T, class F>
__device__ __forceinline__ void general_tile(const SparseMatrix<T>& matrix, int inputs, int count,
                                            const T* x, F f) {
  for (int e = threadIdx.x; e < count * matrix.rows; e += kThreads)
    f(e, sparse_row(matrix, x + e / matrix.rows * inputs, e % matrix.rows));
}

template <class T, class F>
__device__ __forceinline__ void forward_tile(const Plan<T>& plan, int count, const T* x, T* middle,
                                             F f) {
  if (plan.kind == Kind::general) general_tile(plan.forward_matrix, plan.inputs, count, x, f);
  else separable_tile(plan.forward_axes, count, x, middle, f);
}

template <class T, class F>
__device__ __forceinline__ void inverse_tile(const Plan<T>& plan, int count, const T* c, T* middle,
                                             F f) {
  if (plan.kind == Kind::general) general_tile(plan.inverse_matrix, plan.outputs, count, c, f);
  else separable_tile(plan.inverse_axes, count, c, middle, f);
}

// The parts of a tile whose kernels the threads share: K values of each kernel, then room for the
// middle of a separable transform and for the coefficients, each as large as the larger side.
template <class T>
struct TileParts {
  T *x, *middle, *c;
  __device__ __forceinline__ TileParts(const Plan<T>& plan, int count, T* tile) {
    const int side = plan.inputs > plan.outputs ? plan.inputs : plan.outputs;
    x = tile;
    middle = x + count * plan.inputs;
    c = middle + count * side;
  }
};

// Random ranks are float64: rounded to float32 they would tie.
template <class T>
__device__ __forceinline__ bool ranks_at_random(const Row<T>& row) {
  return sizeof(T) == 8 && row.random;
}

// True in all threads of the last block to arrive, which then sees what all blocks wrote.
__device__ __forceinline__ bool last_block(int* arrived, int blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace wavprune::cuda

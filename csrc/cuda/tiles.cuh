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

// f(index in the tile, offset in memory, flat index in the weight) for every value of the kernels
// first .. first + count - 1. Adjacent threads access adjacent memory.
template <class T, class F>
__device__ __forceinline__ void for_each_value(const Row<T>& row, int64_t first, int count, F f) {
  const int total = count * row.values;
  const int64_t start = first * row.values;
  if (row.contiguous) {
    for (int base = threadIdx.x; base < total; base += kTileValues) {
      WAVPRUNE_UNROLL
      for (int i = 0; i < kTileValues / kThreads; ++i) {
        const int index = base + i * kThreads;
        if (index < total) f(index, start + index, start + index);
      }
    }
    return;
  }
  const int64_t out = first / row.ins;
  const unsigned ins = unsigned(row.ins), in = unsigned(first % row.ins);
  for (int i = threadIdx.x; i < total; i += kThreads) {
    const int kernel = row.kernels_adjacent ? i % count : i / row.values;
    const int value = row.kernels_adjacent ? i / count : i % row.values;
    const unsigned column = in + unsigned(kernel);
    const int64_t offset = (out + column / ins) * row.strides[0] + column % ins * row.strides[1] +
                           value / row.width * row.strides[2] +
                           value % row.width * row.strides[3];
    const int index = kernel * row.values + value;
    f(index, offset, start + index);
  }
}

// Copies kernels to a tile: value r of kernel k to tile[k * K + r].
template <class T>
__device__ __forceinline__ void load_tile(const Row<T>& row, int64_t first, int count, T* tile) {
  with_element_type(row.element, [&](auto element) {
    const auto* data = reinterpret_cast<const decltype(element)*>(row.data);
    for_each_value(row, first, count,
               [&](int i, int64_t offset, int64_t) { tile[i] = T(widened(data[offset])); });
  });
}

// Writes a tile, rounded already, to the weight.
template <class T>
__device__ __forceinline__ void store_tile(const Row<T>& row, int64_t first, int count,
                                           const T* tile) {
  with_element_type(row.element, [&](auto element) {
    typedef decltype(element) E;
    E* data = reinterpret_cast<E*>(row.data);
    for_each_value(row, first, count, [&](int i, int64_t offset, int64_t) {
      data[offset] = static_cast<E>(static_cast<decltype(widened(element))>(tile[i]));
    });
  });
}

// f(first, count) for each tile of this block.
template <class T, class F>
__device__ __forceinline__ void for_each_tile(const Row<T>& row, F f) {
  const int64_t begin = int64_t(blockIdx.x - row.first_block) * kTiles * row.tile_kernels;
  for (int t = 0; t < kTiles; ++t) {
    const int64_t first = begin + int64_t(t) * row.tile_kernels;
    if (first >= row.kernels) return;
    const int64_t left = row.kernels - first;
    f(first, left < row.tile_kernels ? int(left) : row.tile_kernels);
  }
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

// The tiles of a weight in shared memory, and their transforms.
#pragma once

#include "elements.cuh"

namespace wavprune::cuda {

// The row whose blocks include this one, copied to shared memory with its plan: threads read them
// again and again, and keep what they can in registers for values.
template <class T>
struct Block {
  Row<T>* origin;
  Row<T> row;
  Plan<T> plan;
};

template <class T>
__device__ __forceinline__ int row_of_block(const Row<T>* rows, int count) {
  int low = 0;
  while (count > 1) {
    const int half = count / 2;
    if (rows[low + half].first_block <= int(blockIdx.x)) low += half, count -= half;
    else count = half;
  }
  return low;
}

template <class U>
__device__ __forceinline__ void copy_words(const U* from, U* to) {
  static_assert(sizeof(U) % 4 == 0 && alignof(U) % 4 == 0, "copied by words");
  for (int i = threadIdx.x; i < int(sizeof(U) / 4); i += kThreads)
    reinterpret_cast<unsigned*>(to)[i] = reinterpret_cast<const unsigned*>(from)[i];
}

// All threads call it; `memory` is shared.
template <class T>
__device__ __forceinline__ const Block<T>& block_of(Row<T>* rows, int count, void* memory) {
  Block<T>& block = *static_cast<Block<T>*>(memory);
  Row<T>* const origin = rows + row_of_block(rows, count);
  copy_words(origin, &block.row);
  copy_words(origin->plan, &block.plan);
  if (threadIdx.x == 0) block.origin = origin;
  __syncthreads();
  return block;
}

#define WAVPRUNE_BLOCK(T, name, rows, count)                                    \
  __shared__ Word wavprune_block[(sizeof(Block<T>) - 1) / sizeof(Word) + 1]; \
  const Block<T>& name = block_of(rows, count, wavprune_block)

// Some kernels of a weight. Kernel k of them is at `fast + (shift + k) % period` of the fast
// channels and at `slow + (shift + k) / period` of the slow ones.
struct Tile {
  int64_t slow, fast;
  int64_t first;  // flat index of kernel 0
  unsigned shift, period;
  int count;
};

template <Order order, class T>
__device__ __forceinline__ Tile tile_at(const Row<T>& row, int t) {
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  if (order == Order::contiguous || row.brick_fast == 0) {
    const int64_t first = int64_t(t) * row.tile_kernels;
    const int count = int(smaller(row.kernels - first, row.tile_kernels));
    // Nothing asks for the channels of contiguous kernels.
    if (order == Order::contiguous) return {0, 0, first, 0, 1, count};
    // A division of 64 bits takes some hundred instructions.
    const unsigned period = unsigned(row.fast.size);
    const int64_t slow = first >> 32 ? first / period : unsigned(first) / period;
    return {slow, 0, first, unsigned(first - slow * period), period, count};
  }
  // Channels are fewer than 2^31.
  const int across = (int(row.fast.size) + row.brick_fast - 1) / row.brick_fast;
  const int fast = t % across * row.brick_fast, slow = t / across * row.brick_slow;
  const int period = int(smaller(row.fast.size - fast, row.brick_fast));
  return {slow, fast, slow * row.slow.step + fast * row.fast.step, 0, unsigned(period),
          period * int(smaller(row.slow.size - slow, row.brick_slow))};
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

// Asks the L2 cache for a tile that comes next: its loads then wait a third of the time.
template <Order order, Way way, class T>
__device__ __forceinline__ void prefetch_tile(const Row<T>& row, const Tile& tile) {
  const int size = size_of(row.element), thread = int(threadIdx.x);
  if constexpr (order == Order::contiguous) {
    const int64_t bytes = int64_t(tile.count) * row.values * size;
    if (thread * kLine < bytes)
      WAVPRUNE_PREFETCH(row.data + tile.first * row.values * size + thread * kLine);
  } else if constexpr (order == Order::adjacent) {
    // A line for each value of the kernels of a warp.
    const int values = way == Way::registers ? 9 : row.values;
    const int width = way == Way::registers ? 3 : row.width;
    const int warp = thread / values, value = thread % values;
    if (warp * kWarp >= tile.count) return;
    WAVPRUNE_PREFETCH(row.data + size * (offset_of(row, tile, warp * kWarp) +
                                         value / width * row.value_strides[0] +
                                         value % width * row.value_strides[1]));
  }
}

// f(order, way, tile) for each tile of this block; `order` and `way` are constants, so that each
// has a loop of its own.
template <class T, class F>
__device__ __forceinline__ void for_each_tile(const Block<T>& block, F f) {
  const Row<T>& row = block.row;
  const auto with_order = [&](auto order) {
    const auto with_way = [&](auto way) {
      const int begin = (int(blockIdx.x) - row.first_block) * row.tiles_of_block;
      const int end = begin + row.tiles_of_block < row.tiles ? begin + row.tiles_of_block : row.tiles;
      constexpr Order kOrder = decltype(order)::value;
      for (int t = begin; t < end; ++t) {
        if (t + 1 < end) prefetch_tile<kOrder, decltype(way)::value>(row, tile_at<kOrder>(row, t + 1));
        f(order, way, tile_at<kOrder>(row, t));
      }
    };
    if (row.way == Way::identity) with_way(Constant<Way, Way::identity>());
    else if (row.way == Way::registers) with_way(Constant<Way, Way::registers>());
    else with_way(Constant<Way, Way::shared>());
  };
  if (row.order == Order::contiguous) with_order(Constant<Order, Order::contiguous>());
  else if (row.order == Order::adjacent) with_order(Constant<Order, Order::adjacent>());
  else with_order(Constant<Order, Order::strided>());
}

// Of every value of a tile: what get(index in the tile, offset in memory) gives, to
// f(index in the tile, offset in memory, flat index in the weight, what it gave). Adjacent threads
// access adjacent memory. A thread gets several values before it uses the first, so that as many
// loads are under way: the compiler moves no load over a store.
template <Order order, class T, class Get, class F>
__device__ __forceinline__ void for_each_value(const Row<T>& row, const Tile& tile, Get get, F f) {
  typedef decltype(get(0, int64_t())) Got;
  const int values = row.values, total = tile.count * values;
  if constexpr (order == Order::contiguous) {
    const int64_t start = tile.first * values;
    for (int base = threadIdx.x; base < total; base += kTileValues) {
      Got got[kOwnValues];
      WAVPRUNE_UNROLL
      for (int i = 0; i < kOwnValues; ++i) {
        const int index = base + i * kThreads;
        if (index < total) got[i] = get(index, start + index);
      }
      WAVPRUNE_UNROLL
      for (int i = 0; i < kOwnValues; ++i) {
        const int index = base + i * kThreads;
        if (index < total) f(index, start + index, start + index, got[i]);
      }
    }
  } else if constexpr (order == Order::adjacent) {
    // A thread stays with its kernels; several share a kernel where those are few.
    const int count = tile.count;
    const int step = count < kThreads ? count : kThreads, parts = kThreads / step;
    const int part = int(threadIdx.x) / step, width = row.width;
    if (part >= parts) return;
    for (int kernel = int(threadIdx.x) % step; kernel < count; kernel += step) {
      const int64_t start = offset_of(row, tile, kernel);
      const int64_t index = index_of(row, tile, kernel) * values;
      // Offsets within a kernel fit into 32 bits; see set_layout.
      const int down = int(row.value_strides[0]), right = int(row.value_strides[1]);
      int line = 0, column = part;
      for (int first = part; first < values; first += kAtOnce * parts) {
        int offsets[kAtOnce];
        Got got[kAtOnce];
        WAVPRUNE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int value = first + i * parts;
          if (value < values) {
            for (; column >= width; column -= width) ++line;
            offsets[i] = line * down + column * right;
            got[i] = get(kernel * values + value, start + offsets[i]);
            column += parts;
          }
        }
        WAVPRUNE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int value = first + i * parts;
          if (value < values)
            f(kernel * values + value, start + offsets[i], index + value, got[i]);
        }
      }
    }
  } else {
    for (int i = threadIdx.x; i < total; i += kThreads) {
      const int kernel = i / values, value = i % values;
      const int64_t offset = offset_of(row, tile, kernel) +
                             value / row.width * row.value_strides[0] +
                             value % row.width * row.value_strides[1];
      f(i, offset, index_of(row, tile, kernel) * values + value, get(i, offset));
    }
  }
}

// A weight's values. The compiler does not see that they are in global memory, since their address
// comes from shared memory.
template <class E, class T>
__device__ __forceinline__ E* data_of(const Row<T>& row) {
  WAVPRUNE_ASSUME_GLOBAL(row.data);
  return reinterpret_cast<E*>(row.data);
}

// Copies kernels to shared memory: value r of kernel k to x[k * K + r].
template <Order order, class T>
__device__ __forceinline__ void load_tile(const Row<T>& row, const Tile& tile, T* x) {
  with_element_type(row.element, [&](auto element) {
    const auto* data = data_of<const decltype(element)>(row);
    for_each_value<order>(
        row, tile, [&](int, int64_t offset) { return T(read(data + offset)); },
        [&](int i, int64_t, int64_t, T value) { x[i] = value; });
  });
}

// Writes kernels to the weight.
template <Order order, class T>
__device__ __forceinline__ void store_tile(const Row<T>& row, const Tile& tile, const T* x) {
  with_element_type(row.element, [&](auto element) {
    typedef decltype(element) E;
    E* data = data_of<E>(row);
    for_each_value<order>(
        row, tile, [&](int i, int64_t) { return x[i]; },
        [&](int, int64_t offset, int64_t, T value) { write(data + offset, rounded<E>(value)); });
  });
}

// f(which of the 9, index in the tile): values of the kernels of a warp's threads, which neighbors
// in the warp access at neighbors in memory.
template <class F>
__device__ __forceinline__ void for_each_of_warp(const Tile& tile, F f) {
  const int warp = int(threadIdx.x) / kWarp, first = warp * (9 * kWarp) + int(threadIdx.x) % kWarp;
  if ((warp + 1) * kWarp <= tile.count) {
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) f(i, first + i * kWarp);
    return;
  }
  const int total = tile.count * 9;
  WAVPRUNE_UNROLL
  for (int i = 0; i < 9; ++i)
    if (first + i * kWarp < total) f(i, first + i * kWarp);
}

// f(which of the 9, offset from the kernel) for the values of a 3x3 kernel.
template <class T, class F>
__device__ __forceinline__ void for_each_of_9(const Row<T>& row, F f) {
  const int down = int(row.value_strides[0]), right = int(row.value_strides[1]);
  WAVPRUNE_UNROLL
  for (int i = 0; i < 9; ++i) f(i, i / 3 * down + i % 3 * right);
}

// The 3x3 kernel of this thread, where it has one. Where kernels are adjacent in memory it needs no
// shared memory: the threads of a warp read neighbors. Those of contiguous kernels exchange them,
// and wait for no other warp.
template <Order order, class T>
__device__ __forceinline__ bool load_own(const Row<T>& row, const Tile& tile, T* shared, T* x) {
  const bool exists = int(threadIdx.x) < tile.count;
  if constexpr (order == Order::adjacent) {
    if (!exists) return false;
    with_element_type(row.element, [&](auto element) {
      const auto* own =
          data_of<const decltype(element)>(row) + offset_of(row, tile, int(threadIdx.x));
      for_each_of_9(row, [&](int i, int offset) { x[i] = T(read(own + offset)); });
    });
    return true;
  } else {
    if constexpr (order == Order::contiguous) {
      with_element_type(row.element, [&](auto element) {
        const auto* data = data_of<const decltype(element)>(row) + tile.first * 9;
        T values[9];
        for_each_of_warp(tile, [&](int i, int index) { values[i] = T(read(data + index)); });
        // Until all have read the tile before.
        __syncwarp();
        for_each_of_warp(tile, [&](int i, int index) { shared[index] = values[i]; });
      });
      __syncwarp();
    } else {
      __syncthreads();
      load_tile<order>(row, tile, shared);
      __syncthreads();
    }
    if (!exists) return false;
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) x[i] = shared[threadIdx.x * 9 + i];
    return true;
  }
}

// Writes what load_own gave; all threads call it.
template <Order order, class T>
__device__ __forceinline__ void store_own(const Row<T>& row, const Tile& tile, T* shared,
                                          const T* x) {
  const bool exists = int(threadIdx.x) < tile.count;
  if constexpr (order == Order::adjacent) {
    if (!exists) return;
    with_element_type(row.element, [&](auto element) {
      typedef decltype(element) E;
      E* own = data_of<E>(row) + offset_of(row, tile, int(threadIdx.x));
      for_each_of_9(row, [&](int i, int offset) { write(own + offset, rounded<E>(x[i])); });
    });
  } else {
    if (exists) {
      WAVPRUNE_UNROLL
      for (int i = 0; i < 9; ++i) shared[threadIdx.x * 9 + i] = x[i];
    }
    if constexpr (order == Order::contiguous) {
      __syncwarp();
      with_element_type(row.element, [&](auto element) {
        typedef decltype(element) E;
        E* data = data_of<E>(row) + tile.first * 9;
        T values[9];
        for_each_of_warp(tile, [&](int i, int index) { values[i] = shared[index]; });
        for_each_of_warp(
            tile, [&](int i, int index) { write(data + index, rounded<E>(values[i])); });
      });
    } else {
      __syncthreads();
      store_tile<order>(row, tile, shared);
    }
  }
}

// One 3x3 kernel by one thread; see way_of. In float64 the CPU multiplies by matrices.
template <class T>
__device__ __forceinline__ bool is_scaled(const Plan<T>& plan, Kind kind) {
  return sizeof(T) == 4 && plan.kind == kind;
}

template <class T>
__device__ __forceinline__ void forward_in_registers(const Plan<T>& plan, const T* x, T* c) {
  T middle[9];
  if (is_scaled(plan, Kind::pairs)) forward_3x3<Pairs>(plan.forward_scale, x, middle, c);
  else if (is_scaled(plan, Kind::merges)) forward_3x3<Merges>(plan.forward_scale, x, middle, c);
  else separable<3, 3, 3, 3>(plan.forward_axes, x, middle, c);
}

template <class T>
__device__ __forceinline__ void inverse_in_registers(const Plan<T>& plan, const T* c, T* x) {
  T middle[9];
  if (is_scaled(plan, Kind::pairs)) inverse_3x3<Pairs>(plan.inverse_scale, c, middle, x);
  else if (is_scaled(plan, Kind::merges)) inverse_3x3<Merges>(plan.inverse_scale, c, middle, x);
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

// The transform alone, and the mask of a tensor's own values.
#pragma once

#include "tiles.cuh"

namespace wavprune::cuda {

// One byte a value, or one bit, the first in a byte's lowest bit.
template <class T>
__global__ void __launch_bounds__(kThreads)
    mask_values(const char* data, Element element, int64_t count, const double* threshold,
                bool packed, uint8_t* mask) {
  const T cut = T(*threshold);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  with_element_type(element, [&](auto one) {
    const auto* values = reinterpret_cast<const decltype(one)*>(data);
    const auto large = [&](int64_t i) {
      return value_of<T>(key_of(T(widened(values[i])))) >= cut;
    };
    if (!packed) {
      if (thread < count) mask[thread] = large(thread);
      return;
    }
    const int64_t first = thread * 8;
    if (first >= count) return;
    unsigned byte = 0;
    for (int b = 0; b < 8 && first + b < count; ++b) byte |= unsigned(large(first + b)) << b;
    mask[thread] = uint8_t(byte);
  });
}

// Transforms rows of kernels to rows of coefficients, or back.
template <class T>
__global__ void __launch_bounds__(kThreads)
    transform_rows(const Plan<T>* plans, const T* from, int64_t kernels, int tile_kernels,
                   bool forward, T* to) {
  WAVPRUNE_TILE(T, tile);
  const Plan<T>& plan = *plans;
  const int64_t first = int64_t(blockIdx.x) * tile_kernels;
  const int count = kernels - first < tile_kernels ? int(kernels - first) : tile_kernels;
  const int width_in = forward ? plan.inputs : plan.outputs;
  from += first * width_in;
  to += first * (forward ? plan.outputs : plan.inputs);
  if (plan.kind == Kind::identity) {
    for (int e = threadIdx.x; e < count * width_in; e += kThreads) to[e] = from[e];
    return;
  }
  const int side = plan.inputs > plan.outputs ? plan.inputs : plan.outputs;
  for (int e = threadIdx.x; e < count * width_in; e += kThreads) tile[e] = from[e];
  __syncthreads();
  if (way_of(plan) == Way::registers) {
    if (int(threadIdx.x) >= count) return;
    T x[9], y[9];
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) x[i] = tile[threadIdx.x * 9 + i];
    if (forward) forward_in_registers(plan, x, y);
    else inverse_in_registers(plan, x, y);
    WAVPRUNE_UNROLL
    for (int i = 0; i < 9; ++i) to[threadIdx.x * 9 + i] = y[i];
    return;
  }
  T* middle = tile + count * side;
  const auto write = [&](int e, T value) { to[e] = value; };
  if (forward) forward_tile(plan, count, tile, middle, write);
  else inverse_tile(plan, count, tile, middle, write);
}

}  // namespace wavprune::cuda

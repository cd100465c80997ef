// CUDA's keywords and built-ins for a host compiler: every thread is a fiber, which gives way at
// __syncthreads(). Threads and blocks run in an order that a seed shuffles.
//
// It does not model speed, races between blocks, or the order of memory accesses.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

namespace shim {

struct Index {
  unsigned x;
};

// Suspends the running thread until all others of its block have waited too, or ended.
void wait();

// The shared memory of the running block, as many bytes as the launch asked for.
void* dynamic_shared();

// Runs a CUDA kernel on blocks of threads, to the end.
void launch(const std::function<void()>& kernel, int blocks, int threads, size_t shared_bytes);

// Notes an access of the running thread to a weight's memory, where accesses are counted.
void touch(const void* address, size_t bytes);

void reseed(int64_t seed);
int64_t launches();

}  // namespace shim

extern shim::Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() { shim::wait(); }
// Waits for more threads than it must: a barrier between warps that is missing is not seen.
inline void __syncwarp() { shim::wait(); }
inline void __threadfence() {}

template <class T>
T __ldcg(const T* place) {
  return *place;
}

template <class T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place += value;
  return before;
}

template <class T>
T atomicCAS(T* place, T expected, T value) {
  const T before = *place;
  if (before == expected) *place = value;
  return before;
}

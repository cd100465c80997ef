// CUDA's words for a host compiler: one fiber a thread, which others take over from wherever
// threads wait for each other. Threads and blocks run in an order that a seed shuffles.
//
// It does not model speed, races between blocks or the order in which memory is seen.
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
#define __launch_bounds__(threads)

namespace shim {

struct Index {
  unsigned x;
};

// Suspends the running thread until all others of its block have come as far or ended.
void wait();

// The shared memory of the running block, as many bytes as the launch asked for.
void* dynamic_shared();

// Runs a kernel on blocks of threads, to the end.
void launch(const std::function<void()>& kernel, int blocks, int threads, size_t shared_bytes);

void reseed(int64_t seed);
int64_t launches();

}  // namespace shim

extern shim::Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() { shim::wait(); }
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

// CUDA's keywords and built-ins for a host compiler: every thread is a fiber, which gives way at
// __syncthreads() and where the lanes of a warp exchange values. Threads and blocks run in an order
// that a seed shuffles.
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

// The values that the lanes of the running thread's warp give, all at the same call.
const uint64_t* exchanged(uint64_t value);

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
inline void __syncwarp() { shim::exchanged(0); }
inline void __threadfence() {}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}

inline unsigned __ballot_sync(unsigned, bool own) {
  const uint64_t* const all = shim::exchanged(own);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= unsigned(all[lane] != 0) << lane;
  return result;
}

template <class T>
T __shfl_sync(unsigned, T own, int lane) {
  return T(shim::exchanged(uint64_t(own))[lane & 31]);
}

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
T atomicXor(T* place, T value) {
  const T before = *place;
  *place ^= value;
  return before;
}

template <class T>
T atomicCAS(T* place, T expected, T value) {
  const T before = *place;
  if (before == expected) *place = value;
  return before;
}

// The CUDA kernels. A block does some tiles of one weight; all weights of a call share each launch.
//
// No result depends on the order of blocks or threads: counts are integers, and sums of floats have
// a fixed order. Coefficients are computed by kernel_math.h in the order of the CPU's passes, so
// their bits are those of the CPU.
//
// The including file defines WAVPRUNE_TILE(T, name), which declares T* name, the block's dynamic
// shared memory.
#pragma once

#include "decode.cuh"
#include "mark.cuh"
#include "prune.cuh"
#include "select.cuh"
#include "synthesis.cuh"
#include "transform.cuh"

namespace wavprune::cuda {

template <int words>
struct Payload {
  Word word[words];
};

// Copies host data that came as the parameter of a launch. No host memory has to outlive the call,
// so nothing waits for the device; and a CUDA graph that captured the launch holds the data.
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

// The CUDA kernels as nvcc compiles them.
#include <cuda_runtime.h>

#define WAVPRUNE_TILE(T, name)                                     \
  extern __shared__ __align__(16) unsigned char wavprune_shared[]; \
  T* const name = reinterpret_cast<T*>(wavprune_shared)

#define WAVPRUNE_LAUNCH(kernel, blocks, tile_bytes, stream, ...)                              \
  do {                                                                                        \
    (kernel)<<<blocks, kThreads, tile_bytes, stream>>>(__VA_ARGS__);                          \
    const cudaError_t error = cudaGetLastError();                                             \
    STD_TORCH_CHECK(error == cudaSuccess, "wavprune: launching " #kernel " on ", blocks,      \
                    " blocks failed: ", cudaGetErrorName(error), ", ",                        \
                    cudaGetErrorString(error));                                               \
  } while (0)

#include "launch.inc"

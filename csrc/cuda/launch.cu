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

#define WAVPRUNE_SHARED(kernel, bytes)                                                           \
  do {                                                                                           \
    const cudaError_t error =                                                                    \
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));   \
    STD_TORCH_CHECK(error == cudaSuccess, "wavprune: " #kernel " cannot have ", bytes,           \
                    " bytes of shared memory: ", cudaGetErrorName(error));                       \
  } while (0)

#include "launch.inc"

namespace wavprune::cuda {

Limits limits() {
  int device = 0;
  Limits found{1, 48 * 1024};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return found;
}

}  // namespace wavprune::cuda

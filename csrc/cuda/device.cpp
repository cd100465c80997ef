// The current device and stream of torch, through its stable ABI.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include "launch.h"

namespace wavprune::cuda {

namespace {

// Only builds of torch with CUDA have this function, so it is looked up when it is needed: the
// extension loads under every torch. The stable Stream has a handle only from torch 2.13 on.
typedef AOTITorchError (*CurrentStream)(int32_t, void**);

CurrentStream current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr
                            : reinterpret_cast<CurrentStream>(
                                  dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

bool reachable(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

Device::Device(const torch::stable::Tensor& tensor) {
  static const CurrentStream get = current_stream();
  STD_TORCH_CHECK(get != nullptr, "wavprune: this torch does not give its current CUDA stream");
  const int32_t index = tensor.get_device_index();
  guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(index);
  // The CUDA runtime that is linked in here has its own current device.
  const cudaError_t error = cudaSetDevice(index);
  STD_TORCH_CHECK(error == cudaSuccess, "wavprune: CUDA device ", index, " cannot be used: ",
                  cudaGetErrorName(error), ", ", cudaGetErrorString(error));
  void* stream = nullptr;
  STD_TORCH_CHECK(get(index, &stream) == 0, "wavprune: CUDA device ", index, " has no stream");
  stream_ = static_cast<Stream>(stream);
}

}  // namespace wavprune::cuda

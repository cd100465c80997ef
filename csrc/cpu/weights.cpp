#include "weights.h"

#include <torch/headeronly/util/Exception.h>

#include "../arguments.h"

namespace wavprune {

Weight weight_of(const torch::stable::Tensor& tensor) {
  check_weight(tensor);
  STD_TORCH_CHECK(tensor.is_cpu(), "wavprune: a weight must be on the CPU here");
  Weight weight{static_cast<char*>(tensor.data_ptr()), tensor.scalar_type(), {}, {},
                tensor.is_contiguous()};
  for (int i = 0; i < 4; ++i) {
    weight.sizes[i] = tensor.size(i);
    weight.strides[i] = tensor.stride(i);
  }
  return weight;
}

}  // namespace wavprune

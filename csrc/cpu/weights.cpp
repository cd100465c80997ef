#include "weights.h"

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <utility>

#include "../arguments.h"

namespace wavprune {

using torch::headeronly::ScalarType;

namespace {

Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::Double:
      return Element::float64;
    case ScalarType::Half:
      return Element::float16;
    default:
      return Element::bfloat16;
  }
}

// True where the values fill one run in memory; the order of the axes must then not matter, or be
// that of a contiguous weight.
bool without_gaps(const Weight& weight, Order order) {
  int axes[4] = {0, 1, 2, 3};
  if (order == Order::memory)
    std::stable_sort(axes, axes + 4,
                     [&](int a, int b) { return weight.strides[a] > weight.strides[b]; });
  int64_t run = 1;
  for (int i = 3; i >= 0; --i) {
    if (weight.sizes[axes[i]] == 1) continue;
    if (weight.strides[axes[i]] != run) return false;
    run *= weight.sizes[axes[i]];
  }
  return true;
}

}  // namespace

Weight weight_of(const torch::stable::Tensor& tensor) {
  check_weight(tensor);
  STD_TORCH_CHECK(tensor.is_cpu(), "wavprune: a weight must be on the CPU here");
  Weight weight{static_cast<char*>(tensor.data_ptr()), element_of(tensor.scalar_type()), {}, {}};
  for (int i = 0; i < 4; ++i) {
    weight.sizes[i] = tensor.size(i);
    weight.strides[i] = tensor.stride(i);
  }
  return weight;
}

Weight vector_of(const torch::stable::Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()), element_of(tensor.scalar_type()),
          {tensor.numel(), 1, 1, 1}, {1, 1, 1, 1}};
}

int64_t Walk::element_size() const {
  return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

char* Walk::at(int64_t kernel) const {
  const int64_t row = rows == 1 ? 0 : kernel / row_kernels;
  return data + (row * row_stride + (kernel - row * row_kernels) * kernel_stride) * element_size();
}

void Walk::prefetch(int64_t first, int64_t kernels) const {
  constexpr int kLine = 64;
  const char* const begin = at(first);
  if (is_flat())
    for (int64_t byte = 0; byte < kernels * values() * element_size(); byte += kLine)
      __builtin_prefetch(begin + byte);
  else
    for (const int64_t offset : offsets) __builtin_prefetch(begin + offset * element_size());
}

Walk walk_through(const Weight& weight, Order order, bool identity) {
  Walk walk{weight.data, weight.element, 1, 0, 0, 1, {0}, true, false};
  if (weight.numel() == 0) return walk;
  if (identity && without_gaps(weight, order)) {
    walk.row_kernels = weight.numel();
    return walk;
  }
  const int64_t *sizes = weight.sizes, *strides = weight.strides;
  for (int i = 0; i < 4; ++i)
    if (sizes[i] > 1 && strides[i] == 0) walk.overlapping = true;
  walk.offsets.clear();
  for (int64_t r = 0; r < sizes[2]; ++r)
    for (int64_t c = 0; c < sizes[3]; ++c) {
      walk.offsets.push_back(r * strides[2] + c * strides[3]);
      walk.together = walk.together && walk.offsets.back() == walk.values() - 1;
    }
  // The axes of rows and of a row's kernels; one of size 1 is neither.
  int outer = 0, inner = 1;
  if (sizes[inner] == 1 ||
      (sizes[outer] > 1 && order == Order::memory && strides[outer] < strides[inner]))
    std::swap(outer, inner);
  walk.rows = sizes[outer];
  walk.row_kernels = sizes[inner];
  walk.row_stride = strides[outer];
  walk.kernel_stride = sizes[inner] == 1 ? walk.values() : strides[inner];
  if (walk.rows == 1 || walk.row_stride == walk.row_kernels * walk.kernel_stride) {
    walk.row_kernels *= walk.rows;
    walk.rows = 1;
    walk.row_stride = 0;
  }
  return walk;
}

}  // namespace wavprune

// From a plan vector, as src/wavprune/ops.py lays it out, to a Plan.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "plan.h"

namespace wavprune {

// A plan with the memory that it points into; never moved.
template <class T>
struct OwnedPlan {
  Plan<T> plan = {};
  std::vector<T> matrices[4];
  std::vector<int> starts[2], columns[2], supports[4];
};

// Checks the vector, and that its kernels have this many values.
template <class T>
std::unique_ptr<OwnedPlan<T>> read_plan(const torch::stable::Tensor& tensor, int64_t kernel_values);

// The plans of one call. Equal tensors share one plan.
template <class T>
class Plans {
 public:
  const OwnedPlan<T>& add(const torch::stable::Tensor& tensor, int64_t kernel_values) {
    const void* data = tensor.data_ptr();
    for (const auto& [known, owned] : plans_)
      if (known == data &&
          (owned->plan.kind == Kind::identity || owned->plan.inputs == kernel_values))
        return *owned;
    return *plans_.emplace_back(data, read_plan<T>(tensor, kernel_values)).second;
  }

 private:
  std::vector<std::pair<const void*, std::unique_ptr<OwnedPlan<T>>>> plans_;
};

}  // namespace wavprune

// The transform alone, of a matrix of kernels or coefficients.

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../arguments.h"
#include "instruction_set.h"
#include "ops.h"
#include "scratch.h"
#include "threads.h"
#include "tiles.h"

namespace wavprune {

namespace {

// A new matrix of many megabytes. Page faults on 4 KiB pages took longer than the transform that
// fills it, so ask for huge pages.
Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor result = torch::stable::new_empty(like, {rows, columns});
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t begin = uintptr_t(result.data_ptr());
  const uintptr_t end = begin + uintptr_t(result.numel()) * result.element_size();
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = end & ~(kHugePage - 1);
  // Only advice: a system may ignore it.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return result;
}

template <class T>
Tensor transform(const Tensor& input, const Tensor& plan_tensor, int64_t kernel_values,
                 int64_t width_out, bool forward) {
  const auto owned = read_plan<T>(plan_tensor, kernel_values);
  const Plan<T>& plan = owned->plan;
  const bool identity = plan.kind == Kind::identity;
  const int64_t kernels = input.size(0), width_in = input.size(1);
  const int64_t values = identity ? kernel_values : plan.inputs;
  const int64_t coefficients = identity ? kernel_values : plan.outputs;
  check_widths(values, coefficients, width_in, width_out, forward);
  Tensor result = new_matrix(input, kernels, width_out);
  const T* from = static_cast<const T*>(input.data_ptr());
  T* to = static_cast<T*>(result.data_ptr());
  const auto pass = forward ? passes<T>().forward : passes<T>().inverse;
  const int64_t blocks = kTile / (std::max(values, coefficients) * kLanes);
  const int64_t tile = std::max<int64_t>(blocks, 1) * kLanes;
  const int64_t tiles = (kernels + tile - 1) / tile;
  parallel_tasks(tiles, [&](auto next) {
    Scratch<T> scratch(scratch_values(plan));
    for (int64_t t; (t = next()) < tiles;) {
      const int64_t first = t * tile, n = std::min(tile, kernels - first);
      pass(plan, from + first * width_in, identity ? n * kernel_values : n, scratch.get(),
           to + first * width_out);
    }
  });
  return result;
}

}  // namespace

Tensor dwt2(Tensor kernels, Tensor plan, int64_t outputs) {
  check_rows(kernels, kernels.is_cpu(), "the CPU");
  return with_compute_type(is_float64(kernels), [&](auto zero) {
    return transform<decltype(zero)>(kernels, plan, kernels.size(1), outputs, true);
  });
}

Tensor idwt2(Tensor coefficients, Tensor plan, int64_t values) {
  check_rows(coefficients, coefficients.is_cpu(), "the CPU");
  return with_compute_type(is_float64(coefficients), [&](auto zero) {
    return transform<decltype(zero)>(coefficients, plan, values, values, false);
  });
}

}  // namespace wavprune

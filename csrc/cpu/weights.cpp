#include "weights.h"

#include <atomic>
#include <cmath>

#include "../kernel_math.h"

namespace wavprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Weight weight_of(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "wavprune: a weight must be float64, float32, float16 or bfloat16");
  STD_TORCH_CHECK(tensor.is_cpu(), "wavprune: a weight must be on the CPU here");
  STD_TORCH_CHECK(tensor.dim() == 4, "wavprune: a weight must be (Cout, Cin/groups, kh, kw), not ",
                  tensor.dim(), "-D");
  Weight weight{static_cast<char*>(tensor.data_ptr()), dtype, {}, {}, tensor.is_contiguous()};
  for (int i = 0; i < 4; ++i) {
    weight.sizes[i] = tensor.size(i);
    weight.strides[i] = tensor.stride(i);
  }
  return weight;
}

namespace {

// True where A = diag(scale) U and S = U^T diag(back) for both axes of three.
template <class Axis>
bool matches(const double* axis, const double* inverse, double* scale, double* back) {
  double peak = 0;
  for (int i = 0; i < 9; ++i) peak = std::max(peak, std::abs(axis[i]));
  for (int m = 0; m < 3; ++m) {
    scale[m] = axis[3 * m + (Axis::kRows[3 * m] ? 0 : 2)];
    back[m] = inverse[(Axis::kRows[3 * m] ? 0 : 2) * 3 + m];
    for (int k = 0; k < 3; ++k) {
      if (std::abs(axis[3 * m + k] - scale[m] * Axis::kRows[3 * m + k]) > 1e-14 * peak) return false;
      if (std::abs(inverse[3 * k + m] - back[m] * Axis::kRows[3 * m + k]) > 1e-14 * peak)
        return false;
    }
  }
  return true;
}

template <class Axis, class T>
bool specialise(const double* matrices, Kind kind, Plan<T>* plan) {
  double scale[2][3], back[2][3];
  for (int axis = 0; axis < 2; ++axis)
    if (!matches<Axis>(matrices + 9 * axis, matrices + 18 + 9 * axis, scale[axis], back[axis]))
      return false;
  plan->kind = kind;
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) {
      plan->forward_scale[3 * i + j] = T(scale[0][i] * scale[1][j]);
      plan->inverse_scale[3 * i + j] = T(back[0][i] * back[1][j]);
    }
  return true;
}

template <class T>
Entries<T> entries_of(const double* matrix, int rows, int columns, std::vector<T>* values,
                      std::vector<int>* starts, std::vector<int>* places) {
  starts->push_back(0);
  for (int m = 0; m < rows; ++m) {
    for (int k = 0; k < columns; ++k) {
      const double value = matrix[int64_t(m) * columns + k];
      // A row without an entry would have no sum to start from.
      if (value != 0 || (k == columns - 1 && int(places->size()) == starts->back())) {
        places->push_back(k);
        values->push_back(T(value));
      }
    }
    starts->push_back(int(places->size()));
  }
  return {rows, starts->data(), places->data(), values->data()};
}

}  // namespace

template <class T>
std::unique_ptr<OwnedPlan<T>> plan_of(const Tensor& tensor, int64_t kernel_values) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Double &&
                      tensor.dim() == 1 && tensor.is_contiguous() && tensor.numel() >= 5,
                  "wavprune: a plan is a contiguous float64 vector on the CPU");
  const double* p = static_cast<const double*>(tensor.data_ptr());
  const double* matrices = p + 5;
  auto owned = std::make_unique<OwnedPlan<T>>();
  Plan<T>& plan = owned->plan;
  int64_t sizes[4];
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(p[i + 1] >= 0 && p[i + 1] <= 1 << 20, "wavprune: a plan of impossible size");
    sizes[i] = int64_t(p[i + 1]);
  }
  const auto [rows_in, columns_in, rows_out, columns_out] = sizes;
  const int64_t K = rows_in * columns_in, M = rows_out * columns_out;
  STD_TORCH_CHECK(K == kernel_values && K > 0 && M > 0 && K < 1 << 20 && M < 1 << 20,
                  "wavprune: a plan for kernels of ", K, " values met kernels of ", kernel_values);
  const bool separable = p[0] == double(Kind::separable);
  STD_TORCH_CHECK(!separable || std::max(rows_in * columns_out, rows_out * columns_in) <=
                                    std::max(K, M),
                  "wavprune: a plan whose axes shrink on one side and grow on the other");
  int64_t expected = 5;
  if (separable)
    expected += 2 * (rows_in * rows_out + columns_in * columns_out);
  else if (p[0] == double(Kind::sparse))
    expected += 2 * K * M;
  else
    STD_TORCH_CHECK(p[0] == double(Kind::identity), "wavprune: a plan of unknown kind ", p[0]);
  STD_TORCH_CHECK(tensor.numel() == expected, "wavprune: a plan of ", tensor.numel(),
                  " numbers where ", expected, " are due");
  plan.kind = Kind(int(p[0]));
  plan.inputs = plan.kind == Kind::identity ? 1 : int(K);
  plan.outputs = plan.kind == Kind::identity ? 1 : int(M);
  if (plan.kind == Kind::sparse) {
    plan.forward_entries = entries_of(matrices, int(M), int(K), &owned->matrices[0],
                                      &owned->starts[0], &owned->columns[0]);
    plan.inverse_entries = entries_of(matrices + M * K, int(K), int(M), &owned->matrices[1],
                                      &owned->starts[1], &owned->columns[1]);
  }
  if (separable) {
    const int64_t counts[4] = {rows_in * rows_out, columns_in * columns_out, rows_in * rows_out,
                               columns_in * columns_out};
    const double* next = matrices;
    for (int i = 0; i < 4; ++i) {
      owned->matrices[i].assign(next, next + counts[i]);
      next += counts[i];
    }
    plan.forward_axes = {int(rows_in),    int(rows_out),
                         int(columns_in), int(columns_out),
                         owned->matrices[0].data(), owned->matrices[1].data()};
    plan.inverse_axes = {int(rows_out),    int(rows_in),
                         int(columns_out), int(columns_in),
                         owned->matrices[2].data(), owned->matrices[3].data()};
    const bool three = std::all_of(sizes, sizes + 4, [](int64_t size) { return size == 3; });
    if (three && sizeof(T) == sizeof(float) && !specialise<Pairs>(matrices, Kind::pairs, &plan))
      specialise<Merges>(matrices, Kind::merges, &plan);
  }
  return owned;
}

template std::unique_ptr<OwnedPlan<float>> plan_of(const Tensor&, int64_t);
template std::unique_ptr<OwnedPlan<double>> plan_of(const Tensor&, int64_t);

namespace {

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet* instruction_set(int64_t index) {
  if (index == 2) return instructions_v4();
  if (index == 1) return instructions_v3();
  return instructions_baseline();
}

}  // namespace

const InstructionSet& instructions() {
  if (const InstructionSet* set = chosen.load(std::memory_order_acquire)) return *set;
  use_instruction_set(-1);
  return *chosen.load(std::memory_order_acquire);
}

int64_t use_instruction_set(int64_t index) {
  STD_TORCH_CHECK(index >= -1 && index <= 2, "wavprune: no instruction set ", index,
                  "; -1 is the best here, 0 the baseline, 1 AVX2, 2 AVX-512");
  if (index >= 0) {
    const InstructionSet* set = instruction_set(index);
    STD_TORCH_CHECK(set != nullptr, "wavprune: this processor or build lacks instruction set ",
                    index);
    chosen.store(set, std::memory_order_release);
    return index;
  }
  int64_t best = 2;
  while (instruction_set(best) == nullptr) --best;
  return use_instruction_set(best);
}

}  // namespace wavprune

#include "plan_tensor.h"

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "kernel_math.h"

namespace wavprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kHeader = 5;
constexpr int64_t kMaxSize = 1 << 20;

// The numbers of a plan vector.
struct PlanVector {
  Kind kind;
  int64_t rows_in, columns_in, rows_out, columns_out;
  const double* matrices;

  int64_t values() const { return rows_in * columns_in; }
  int64_t coefficients() const { return rows_out * columns_out; }
  bool has_axes() const {
    return kind == Kind::separable || kind == Kind::pairs || kind == Kind::merges;
  }
  int64_t matrix_values() const {
    if (kind == Kind::identity) return 0;
    if (kind == Kind::general) return 2 * values() * coefficients();
    return 2 * (rows_in * rows_out + columns_in * columns_out);
  }
};

PlanVector checked(const Tensor& tensor, int64_t kernel_values) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Double &&
                      tensor.dim() == 1 && tensor.is_contiguous() && tensor.numel() >= kHeader,
                  "wavprune: a plan must be a contiguous float64 vector on the CPU of at least ",
                  kHeader, " numbers");
  const double* p = static_cast<const double*>(tensor.data_ptr());
  for (int i = 1; i < kHeader; ++i)
    STD_TORCH_CHECK(p[i] >= 0 && p[i] <= kMaxSize, "wavprune: impossible size in a plan: ", p[i]);
  STD_TORCH_CHECK(p[0] == std::floor(p[0]) && p[0] >= 0 && p[0] <= double(Kind::merges),
                  "wavprune: unknown kind of plan: ", p[0], "; allowed: 0 to 4");
  const PlanVector plan{Kind(int(p[0])), int64_t(p[1]), int64_t(p[2]),
                        int64_t(p[3]),   int64_t(p[4]), p + kHeader};
  const int64_t K = plan.values(), M = plan.coefficients();
  STD_TORCH_CHECK(K > 0 && M > 0 && K < kMaxSize && M < kMaxSize,
                  "wavprune: impossible sizes in a plan: ", K, " values and ", M,
                  " coefficients per kernel");
  STD_TORCH_CHECK(K == kernel_values, "wavprune: plan expects ", K, " values per kernel, got ",
                  kernel_values);
  STD_TORCH_CHECK(tensor.numel() == kHeader + plan.matrix_values(), "wavprune: plan of kind ", p[0],
                  " expects ", kHeader + plan.matrix_values(), " numbers, got ", tensor.numel());
  // The intermediate result of a separable transform has room for the larger side only.
  STD_TORCH_CHECK(!plan.has_axes() || std::max(plan.rows_in * plan.columns_out,
                                               plan.rows_out * plan.columns_in) <= std::max(K, M),
                  "wavprune: a separable plan must not shrink on one axis and grow on the other");
  return plan;
}

template <class T>
SparseMatrix<T> sparse_matrix(const double* dense, int rows, int columns, std::vector<T>* values,
                              std::vector<int>* starts, std::vector<int>* column_indices) {
  starts->push_back(0);
  for (int m = 0; m < rows; ++m) {
    for (int k = 0; k < columns; ++k) {
      const double value = dense[int64_t(m) * columns + k];
      // No row may be empty, so a row of zeros keeps its last one.
      if (value != 0 || (k == columns - 1 && int(column_indices->size()) == starts->back())) {
        column_indices->push_back(k);
        values->push_back(T(value));
      }
    }
    starts->push_back(int(column_indices->size()));
  }
  return {rows, starts->data(), column_indices->data(), values->data()};
}

// Where each row of a matrix has its first entry that is not 0 and ends after its last; one at least.
template <class T>
std::vector<int> support_of(const std::vector<T>& matrix, int columns) {
  std::vector<int> support;
  for (auto row = matrix.begin(); row != matrix.end(); row += columns) {
    int first = 0, end = columns;
    while (end > 1 && row[end - 1] == 0) --end;
    while (first < end - 1 && row[first] == 0) ++first;
    support.push_back(first);
    support.push_back(end);
  }
  return support;
}

template <class T>
void read_axes(const PlanVector& vector, OwnedPlan<T>* owned) {
  const int rows_in = int(vector.rows_in), rows_out = int(vector.rows_out);
  const int columns_in = int(vector.columns_in), columns_out = int(vector.columns_out);
  const double* next = vector.matrices;
  for (int i = 0; i < 4; ++i) {
    const int64_t count = int64_t(i % 2 ? columns_in : rows_in) * (i % 2 ? columns_out : rows_out);
    owned->matrices[i].assign(next, next + count);
    next += count;
    const int inputs[4] = {rows_in, columns_in, rows_out, columns_out};
    owned->supports[i] = support_of(owned->matrices[i], inputs[i]);
  }
  const auto& matrices = owned->matrices;
  const auto& supports = owned->supports;
  owned->plan.forward_axes = {rows_in,            rows_out,
                              columns_in,         columns_out,
                              matrices[0].data(), matrices[1].data(),
                              supports[0].data(), supports[1].data()};
  owned->plan.inverse_axes = {rows_out,           rows_in,
                              columns_out,        columns_in,
                              matrices[2].data(), matrices[3].data(),
                              supports[2].data(), supports[3].data()};
}

// s and s' of an axis A = diag(s) U, S = U^T diag(s'), where Axis has U; false where A or S has
// another form.
template <class Axis>
bool axis_scales(const double* A, const double* S, double* forward, double* inverse) {
  double peak[2] = {0, 0};
  for (int i = 0; i < 9; ++i) {
    peak[0] = std::max(peak[0], std::abs(A[i]));
    peak[1] = std::max(peak[1], std::abs(S[i]));
  }
  for (int m = 0; m < 3; ++m) {
    const int* const row = Axis::kMatrix + 3 * m;
    const int pivot = row[0] != 0 ? 0 : 2;  // an entry of U that is 1
    forward[m] = A[3 * m + pivot];
    inverse[m] = S[3 * pivot + m];
    for (int k = 0; k < 3; ++k)
      // Written so that NaN is refused too.
      if (!(std::abs(A[3 * m + k] - forward[m] * row[k]) <= 1e-9 * peak[0]) ||
          !(std::abs(S[3 * k + m] - inverse[m] * row[k]) <= 1e-9 * peak[1]))
        return false;
  }
  return true;
}

template <class Axis, class T>
void read_scales(const PlanVector& vector, const char* name, Plan<T>* plan) {
  STD_TORCH_CHECK(vector.rows_in == 3 && vector.columns_in == 3 && vector.rows_out == 3 &&
                      vector.columns_out == 3,
                  "wavprune: a plan of kind \"", name, "\" must be 3x3 to 3x3, got ",
                  vector.rows_in, "x", vector.columns_in, " to ", vector.rows_out, "x",
                  vector.columns_out);
  double forward[2][3], inverse[2][3];
  for (int axis = 0; axis < 2; ++axis)
    STD_TORCH_CHECK(axis_scales<Axis>(vector.matrices + 9 * axis, vector.matrices + 18 + 9 * axis,
                                      forward[axis], inverse[axis]),
                    "wavprune: the matrices of the ", axis == 0 ? "rows" : "columns",
                    " do not have the form of a plan of kind \"", name, "\"");
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) {
      plan->forward_scale[3 * i + j] = T(forward[0][i] * forward[1][j]);
      plan->inverse_scale[3 * i + j] = T(inverse[0][i] * inverse[1][j]);
    }
}

}  // namespace

template <class T>
std::unique_ptr<OwnedPlan<T>> read_plan(const Tensor& tensor, int64_t kernel_values) {
  const PlanVector vector = checked(tensor, kernel_values);
  auto owned = std::make_unique<OwnedPlan<T>>();
  Plan<T>& plan = owned->plan;
  plan.kind = vector.kind;
  const int K = int(vector.values()), M = int(vector.coefficients());
  if (plan.kind == Kind::identity) {
    STD_TORCH_CHECK(K == M, "wavprune: an identity plan must have as many coefficients as values");
    plan.inputs = plan.outputs = 1;
    return owned;
  }
  plan.inputs = K;
  plan.outputs = M;
  if (plan.kind == Kind::general) {
    plan.forward_matrix = sparse_matrix(vector.matrices, M, K, &owned->matrices[0],
                                        &owned->starts[0], &owned->columns[0]);
    plan.inverse_matrix = sparse_matrix(vector.matrices + int64_t(M) * K, K, M, &owned->matrices[1],
                                        &owned->starts[1], &owned->columns[1]);
    return owned;
  }
  read_axes(vector, owned.get());
  if (plan.kind == Kind::pairs) read_scales<Pairs>(vector, "pairs", &plan);
  if (plan.kind == Kind::merges) read_scales<Merges>(vector, "merges", &plan);
  return owned;
}

template std::unique_ptr<OwnedPlan<float>> read_plan(const Tensor&, int64_t);
template std::unique_ptr<OwnedPlan<double>> read_plan(const Tensor&, int64_t);

}  // namespace wavprune

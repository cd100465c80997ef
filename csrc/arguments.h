// What the operators of the CPU and of CUDA share: their checks, the ranks of a percentile, and the
// choice of the compute type.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "plan.h"

namespace wavprune {

// f(float()) or f(double()).
template <class F>
auto with_compute_type(bool compute_float64, F f) {
  return compute_float64 ? f(double()) : f(float());
}

inline bool is_float64(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Double;
}

inline void check_dtype(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "wavprune: ", name, " must be float64, float32, float16 or bfloat16");
}

inline void check_weight(const torch::stable::Tensor& weight) {
  check_dtype(weight, "a weight");
  STD_TORCH_CHECK(weight.dim() == 4, "wavprune: a weight must be (Cout, Cin/groups, kh, kw), not ",
                  weight.dim(), "-D");
}

inline void check_lengths(size_t weights, size_t others, const char* name) {
  STD_TORCH_CHECK(weights == others, "wavprune: ", weights, " weights came with ", others, " ",
                  name);
}

inline void check_seeds(const std::vector<int64_t>& seeds, size_t weights) {
  STD_TORCH_CHECK(seeds.empty() || seeds.size() == weights, "wavprune: ", weights,
                  " weights came with ", seeds.size(), " seeds");
}

// Where whole ranks are compared: rounded to float32 they would tie.
inline void check_seeds(const std::vector<int64_t>& seeds, size_t weights, bool compute_float64) {
  check_seeds(seeds, weights);
  STD_TORCH_CHECK(seeds.empty() || compute_float64,
                  "wavprune: random pruning needs compute_float64");
}

template <class T>
void check_seeded(const std::vector<int64_t>& seeds, const Plan<T>& plan) {
  STD_TORCH_CHECK(seeds.empty() || plan.kind == Kind::identity,
                  "wavprune: random pruning needs the identity basis");
}

inline void check_job(size_t weight, int64_t job, size_t jobs) {
  STD_TORCH_CHECK(job >= 0 && job < int64_t(jobs), "wavprune: weight ", weight, " belongs to job ",
                  job, " of ", jobs);
}

inline void check_keep(const std::vector<int64_t>& keep) {
  for (const int64_t count : keep)
    STD_TORCH_CHECK(count >= 0, "wavprune: cannot keep ", count, " coefficients");
}

inline void check_percentile(double percentile) {
  STD_TORCH_CHECK(percentile >= 0 && percentile <= 100,
                  "wavprune: percentile must be in [0, 100], not ", percentile);
}

// The rows of dwt2 and idwt2, where `here` says that they are on the operator's device.
inline void check_rows(const torch::stable::Tensor& rows, bool here, const char* device) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(here && rows.dim() == 2 && rows.is_contiguous() &&
                      (rows.scalar_type() == ScalarType::Float ||
                       rows.scalar_type() == ScalarType::Double),
                  "wavprune: expected a contiguous (kernels, values) matrix of float32 or float64 "
                  "on ", device);
}

inline void check_widths(int64_t values, int64_t coefficients, int64_t width_in, int64_t width_out,
                         bool forward) {
  STD_TORCH_CHECK(width_in == (forward ? values : coefficients) &&
                      width_out == (forward ? coefficients : values),
                  "wavprune: plan has ", values, " values and ", coefficients,
                  " coefficients per kernel, got rows of ", width_in, " to become rows of ",
                  width_out);
}

// What numpy.percentile (linear interpolation) reads of some magnitudes and of `dropped` structural
// zeros, which take the first ranks: the values of one or two ranks among the magnitudes.
struct PercentileRanks {
  int64_t rank[2];
  bool structural_zero[2];  // the value is 0 instead
  double fraction;          // of the way from the first value to the second
};

inline PercentileRanks percentile_ranks(int64_t magnitudes, int64_t dropped, double percentile) {
  const int64_t count = magnitudes + dropped;
  const double position = double(count - 1) * (percentile / 100.0);
  const int64_t low = std::min<int64_t>(int64_t(std::floor(position)), count - 1);
  const double fraction = position - double(low);
  const int64_t high = fraction > 0 ? low + 1 : low;
  return {{std::max<int64_t>(low - dropped, 0), std::max<int64_t>(high - dropped, 0)},
          {low < dropped, high < dropped},
          fraction};
}

// float64 holds every count up to here, so that every rank is exact and no sum overflows.
constexpr int64_t kMaxDropped = int64_t(1) << 52;

inline void check_dropped(const std::vector<int64_t>& dropped, size_t weights) {
  check_lengths(weights, dropped.size(), "counts of dropped coefficients");
  for (size_t w = 0; w < dropped.size(); ++w)
    STD_TORCH_CHECK(dropped[w] >= 0 && dropped[w] <= kMaxDropped, "wavprune: weight ", w, " with ",
                    dropped[w], " dropped coefficients; allowed: 0 to 2**52");
}

// The threshold of a job without coefficients: nothing is kept.
constexpr double kNothingKept = std::numeric_limits<double>::infinity();

// The thresholds of jobs without a single weight, which would say on which device they are wanted.
inline torch::stable::Tensor thresholds_without_weights(size_t jobs) {
  torch::stable::Tensor result =
      torch::stable::empty({int64_t(jobs)}, torch::headeronly::ScalarType::Double);
  std::fill_n(static_cast<double*>(result.data_ptr()), jobs, kNothingKept);
  return result;
}

}  // namespace wavprune

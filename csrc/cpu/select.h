// Exact order statistics of the ranks of one or many weights.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "tiles.h"

namespace wavprune {

// Weights that share one threshold.
template <class T>
struct Job {
  std::vector<PlannedWeight<T>> weights;
  int64_t coefficients = 0;
  int64_t values = 0;

  void add(const PlannedWeight<T>& planned) {
    if (planned.weight.numel() == 0) return;
    weights.push_back(planned);
    coefficients += planned.coefficients();
    values += planned.weight.numel();
  }
};

// For each (job, rank), the value of that rank, 0 the smallest; NaN where a weight is not finite.
template <class T>
std::vector<T> order_statistics(const std::vector<Job<T>>& jobs,
                                const std::vector<std::pair<int64_t, int64_t>>& wanted);

}  // namespace wavprune

// Exact order statistics of the ranks of one or many weights.
#pragma once

#include <cstdint>
#include <limits>
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

// What a threshold leaves of one weight of a job: how many coefficients are not below it, and the
// sums of the squares of those below it and of all. NaN where the selection did not see it.
struct Left {
  static constexpr double kUnseen = std::numeric_limits<double>::quiet_NaN();
  int64_t kept = 0;
  double dropped = kUnseen, energy = kUnseen;
};

// For each (job, rank), the value of that rank, 0 the smallest; NaN where a weight is not finite.
// `left`, which may be null, gets one for each weight of each of them: what the value as a threshold
// would leave, read off the pass that found it.
template <class T>
std::vector<T> order_statistics(const std::vector<Job<T>>& jobs,
                                const std::vector<std::pair<int64_t, int64_t>>& wanted,
                                std::vector<std::vector<Left>>* left = nullptr);

}  // namespace wavprune

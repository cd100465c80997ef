// Exact thresholds for |c|, and the mask of one tensor by a percentile of its own values.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "../arguments.h"
#include "denormals.h"
#include "ops.h"
#include "random_rank.h"
#include "scratch.h"
#include "select.h"
#include "threads.h"

namespace wavprune {

using torch::headeronly::ScalarType;

namespace {

Tensor tensor_of(const std::vector<double>& values) {
  Tensor result = torch::stable::empty({int64_t(values.size())}, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(result.data_ptr()));
  return result;
}

template <class T>
std::vector<Job<T>> grouped(const std::vector<PlannedWeight<T>>& weights,
                            const std::vector<int64_t>& job_of_weight, size_t count) {
  std::vector<Job<T>> jobs(count);
  for (size_t w = 0; w < weights.size(); ++w) {
    check_job(w, job_of_weight[w], count);
    jobs[job_of_weight[w]].add(weights[w]);
  }
  return jobs;
}

// The thresholds of jobs; `left`, which may be null, gets what each leaves of the job's weights.
template <class T>
std::vector<double> topk(const std::vector<Job<T>>& jobs, const std::vector<int64_t>& keep,
                         std::vector<std::vector<Left>>* left = nullptr) {
  std::vector<std::pair<int64_t, int64_t>> wanted;
  for (size_t j = 0; j < jobs.size(); ++j)
    if (keep[j] > 0 && jobs[j].coefficients > 0)
      wanted.emplace_back(int64_t(j), std::max<int64_t>(jobs[j].coefficients - keep[j], 0));
  std::vector<std::vector<Left>> found;
  const std::vector<T> values = order_statistics(jobs, wanted, left ? &found : nullptr);
  std::vector<double> thresholds(jobs.size(), kNothingKept);
  if (left) {
    for (const Job<T>& job : jobs) left->emplace_back(job.weights.size());
    for (size_t i = 0; i < wanted.size(); ++i) (*left)[wanted[i].first] = std::move(found[i]);
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    const auto [j, rank] = wanted[i];
    const bool random = jobs[j].weights[0].random;
    thresholds[j] = random ? exact_random_rank(jobs[j], rank, values[i]) : double(values[i]);
  }
  return thresholds;
}

template <class T>
std::vector<double> percentiles(const std::vector<Job<T>>& jobs,
                                const std::vector<int64_t>& dropped, double percentile) {
  std::vector<std::pair<int64_t, int64_t>> wanted;
  std::vector<PercentileRanks> ranks;
  for (size_t j = 0; j < jobs.size(); ++j) {
    ranks.push_back(percentile_ranks(jobs[j].coefficients, dropped[j], percentile));
    if (jobs[j].coefficients == 0) continue;
    // Also where a structural zero is the answer: a weight that is not finite must show.
    wanted.emplace_back(int64_t(j), ranks[j].rank[0]);
    if (ranks[j].fraction > 0) wanted.emplace_back(int64_t(j), ranks[j].rank[1]);
  }
  const std::vector<T> values = order_statistics(jobs, wanted);
  std::vector<double> thresholds(jobs.size(), kNothingKept);
  size_t next = 0;
  for (size_t j = 0; j < jobs.size(); ++j) {
    if (jobs[j].coefficients == 0) continue;
    const auto next_value = [&](bool structural_zero) {
      const T value = values[next++];
      return structural_zero && !std::isnan(value) ? T(0) : value;
    };
    T threshold = next_value(ranks[j].structural_zero[0]);
    if (ranks[j].fraction > 0)
      threshold =
          interpolate(threshold, next_value(ranks[j].structural_zero[1]), ranks[j].fraction);
    thresholds[j] = double(threshold);
  }
  return thresholds;
}

template <class T>
Tensor mask_by_percentile(const Tensor& input, double percentile, bool packed) {
  const int64_t count = input.numel();
  const Weight weight = vector_of(input);
  Plan<T> identity{};
  identity.inputs = identity.outputs = 1;
  std::vector<Job<T>> jobs(1);
  const Route<T> route(weight, identity, Order::memory);
  jobs[0].add({weight, &identity, false, 0, route});
  const T threshold = count ? T(percentiles(jobs, {0}, percentile)[0]) : T(0);
  STD_TORCH_CHECK(!std::isnan(threshold), "wavprune: the input holds NaN or infinite values");
  Tensor result = packed ? torch::stable::empty({(count + 7) / 8}, ScalarType::Byte)
                         : torch::stable::new_empty(input, input.sizes(), ScalarType::Bool);
  uint8_t* bytes = static_cast<uint8_t*>(result.data_ptr());
  // A tile is a multiple of 8: no two threads share a byte.
  const int64_t tiles = (count + kTile - 1) / kTile;
  parallel_tasks(tiles, [&](auto next) {
    Scratch<T> buffer(buffer_values(kTile, 1));
    for (int64_t t; (t = next()) < tiles;) {
      const int64_t first = t * kTile, length = std::min(kTile, count - first);
      const T* x = reinterpret_cast<const T*>(weight.data) + first;
      if (weight.element != kOwnElement<T>) {
        passes<T>().load(route.walk.strided(), first, length, Form::flat, buffer.get());
        x = buffer.get();
      }
      if (!packed) {
        for (int64_t i = 0; i < length; ++i) bytes[first + i] = std::abs(x[i]) >= threshold;
        continue;
      }
      for (int64_t i = 0; i < length; i += 8) {
        uint8_t byte = 0;
        for (int64_t b = 0; b < std::min<int64_t>(8, length - i); ++b)
          byte |= uint8_t(std::abs(x[i + b]) >= threshold) << b;
        bytes[(first + i) / 8] = byte;
      }
    }
  });
  return result;
}

}  // namespace

Tensor topk_threshold(std::vector<Tensor> weights, std::vector<Tensor> plans,
                      std::vector<int64_t> seeds, std::vector<int64_t> jobs,
                      std::vector<int64_t> keep, bool compute_float64) {
  const KeepDenormals guard;
  check_lengths(weights.size(), jobs.size(), "jobs");
  check_seeds(seeds, weights.size());
  check_keep(keep);
  return with_compute_type(compute_float64, [&](auto zero) {
    Plans<decltype(zero)> owner;
    return tensor_of(topk(
        grouped(planned_weights(weights, plans, seeds, Order::memory, &owner), jobs, keep.size()),
        keep));
  });
}

Tensor topk_measure(std::vector<Tensor> weights, std::vector<Tensor> plans,
                    std::vector<int64_t> jobs, std::vector<int64_t> keep, bool compute_float64) {
  const KeepDenormals guard;
  check_lengths(weights.size(), jobs.size(), "jobs");
  check_keep(keep);
  return with_compute_type(compute_float64, [&](auto zero) {
    typedef decltype(zero) T;
    Plans<T> owner;
    const auto planned = planned_weights(weights, plans, {}, Order::memory, &owner);
    std::vector<std::vector<Left>> left;
    std::vector<double> result = topk(grouped(planned, jobs, keep.size()), keep, &left);
    std::vector<size_t> next(keep.size(), 0);
    for (size_t w = 0; w < planned.size(); ++w) {
      const size_t job = size_t(jobs[w]);
      // A job leaves out the weights that have no values.
      const Left row = planned[w].weight.numel() ? left[job][next[job]++] : Left{};
      // At a threshold of 0 the selection has counted zeros, which are never kept.
      const bool counted = result[job] > 0 && !std::isnan(row.energy);
      const bool trusted = squares_fit(result[job]) && std::isfinite(row.energy);
      result.insert(result.end(), {counted ? double(row.kept) : Left::kUnseen,
                                   trusted ? row.dropped : Left::kUnseen, row.energy});
    }
    return tensor_of(result);
  });
}

Tensor percentile_threshold(std::vector<Tensor> weights, std::vector<Tensor> plans,
                            std::vector<int64_t> dropped, double percentile, bool compute_float64) {
  const KeepDenormals guard;
  check_dropped(dropped, weights.size());
  check_percentile(percentile);
  return with_compute_type(compute_float64, [&](auto zero) {
    typedef decltype(zero) T;
    Plans<T> owner;
    std::vector<Job<T>> jobs;
    for (const PlannedWeight<T>& planned : planned_weights(weights, plans, {}, Order::memory, &owner))
      jobs.emplace_back().add(planned);
    return tensor_of(percentiles(jobs, dropped, percentile));
  });
}

Tensor percentile_mask(Tensor input, double percentile, bool packed) {
  const KeepDenormals guard;
  check_percentile(percentile);
  check_dtype(input, "the input");
  STD_TORCH_CHECK(input.is_cpu() && input.is_contiguous(),
                  "wavprune: expected a contiguous tensor on the CPU");
  return with_compute_type(is_float64(input), [&](auto zero) {
    return mask_by_percentile<decltype(zero)>(input, percentile, packed);
  });
}

}  // namespace wavprune

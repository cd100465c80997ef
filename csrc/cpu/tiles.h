// Weights with their plans, cut into tiles: what one thread transforms at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../arguments.h"
#include "../kernel_math.h"
#include "../plan_tensor.h"
#include "passes.h"
#include "weights.h"

namespace wavprune {

// A weight and its basis. Its coefficients are ranked by magnitude, or at random by a seed.
template <class T>
struct PlannedWeight {
  Weight weight;
  const Plan<T>* plan;
  bool random = false;
  uint64_t seed = 0;

  bool identity() const { return plan->kind == Kind::identity; }
  // Kernels as the passes count them: for the identity every value is one.
  int64_t pass_kernels(int64_t kernels) const {
    return identity() ? kernels * weight.values() : kernels;
  }
  // Values of one kernel, or its coefficients where those are more.
  int64_t side() const {
    return identity() ? weight.values() : std::max(plan->inputs, plan->outputs);
  }
  int64_t coefficients() const { return pass_kernels(weight.kernels()) * plan->outputs; }
  // The index in the weight of a kernel's first value.
  uint64_t index(int64_t kernel) const { return uint64_t(kernel) * uint64_t(weight.values()); }
  int64_t kernels_per_tile() const;
  int64_t values_per_tile() const { return kernels_per_tile() * side() + kLanes; }
};

// Values of a tile, before or after the transform, unless a block of kernels has more.
constexpr int64_t kTile = 16384;

// Kernels of a tile, in whole blocks.
inline int64_t kernels_per_tile(int64_t side) {
  return std::max<int64_t>(kTile / std::max<int64_t>(side, 1) / kLanes, 1) * kLanes;
}

template <class T>
int64_t PlannedWeight<T>::kernels_per_tile() const {
  return wavprune::kernels_per_tile(side());
}

// Pairs each weight with its plan, which `plans` owns; no seeds rank by magnitude.
template <class T>
std::vector<PlannedWeight<T>> planned_weights(
    const std::vector<torch::stable::Tensor>& weights,
    const std::vector<torch::stable::Tensor>& plan_tensors, const std::vector<int64_t>& seeds,
    Plans<T>* plans) {
  check_lengths(weights.size(), plan_tensors.size(), "plans");
  std::vector<PlannedWeight<T>> planned;
  for (size_t w = 0; w < weights.size(); ++w) {
    const Weight weight = weight_of(weights[w]);
    const Plan<T>& plan = plans->add(plan_tensors[w], weight.values()).plan;
    check_seeded(seeds, plan);
    planned.push_back({weight, &plan, !seeds.empty(), seeds.empty() ? 0 : uint64_t(seeds[w])});
  }
  return planned;
}

// f(first, kernels) for every tile.
template <class T, class F>
void for_each_tile(const PlannedWeight<T>& planned, F f) {
  const int64_t tile = planned.kernels_per_tile(), kernels = planned.weight.kernels();
  for (int64_t first = 0; first < kernels; first += tile) f(first, std::min(tile, kernels - first));
}

// One tile of one of several weights.
struct TileTask {
  int64_t weight, first, kernels;
};

template <class T>
std::vector<TileTask> tile_tasks(const std::vector<PlannedWeight<T>>& weights) {
  std::vector<TileTask> tasks;
  for (size_t w = 0; w < weights.size(); ++w)
    for_each_tile(weights[w], [&](int64_t first, int64_t kernels) {
      tasks.push_back({int64_t(w), first, kernels});
    });
  return tasks;
}

// The squares of values around this threshold are far from the ends of float32.
inline bool squares_fit(double threshold) { return threshold > 0x1p-40 && threshold < 0x1p40; }

// A threshold that a coefficient of 0 is always below.
template <class T>
T positive(double threshold) {
  return std::max(T(threshold), std::numeric_limits<T>::denorm_min());
}

}  // namespace wavprune

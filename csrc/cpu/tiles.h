// Weights with their plans, cut into tiles: what one thread transforms at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "../arguments.h"
#include "../kernel_math.h"
#include "../plan_tensor.h"
#include "instruction_set.h"
#include "passes.h"
#include "weights.h"

namespace wavprune {

// Values of a tile, before or after the transform, unless a block of kernels has more; and of the
// parts of a tile that are copied to a buffer, which should stay in the first cache.
constexpr int64_t kTile = 16384, kPart = 4096;

// A walk and how its tiles are worked on: in the weight's own memory, or in a buffer.
template <class T>
struct Route {
  Walk walk;
  bool in_place;
  Form form;
  int64_t kernels_per_tile, kernels_per_part;  // in whole blocks

  Route(const Weight& weight, const Plan<T>& plan, Order order, bool random = false)
      : walk(walk_through(weight, order, plan.kind == Kind::identity)),
        // Random passes take values of their own type only.
        in_place(works_in_place(plan, order) && (!random || walk.element == kOwnElement<T>)),
        form(!walk.together && (in_place || plan.kind != Kind::identity) ? Form::lanes
                                                                         : Form::flat) {
    const int64_t side = std::max<int64_t>(walk.values() * plan.outputs / plan.inputs, walk.values());
    const auto kernels_of = [&](int64_t values) {
      return std::max<int64_t>(values / (side * kLanes), 1) * kLanes;
    };
    kernels_per_part = kernels_of(in_place ? kTile : kPart);
    // Of neighbouring rows, whose values share cache lines, as many as a block has lanes.
    if (!in_place && walk.is_turned())
      kernels_per_part = std::max(kernels_per_part, kLanes * walk.row_kernels);
    kernels_per_tile = (kernels_of(kTile) + kernels_per_part - 1) / kernels_per_part * kernels_per_part;
  }

  // A tile in place is one run of the values that passes work on.
  bool is_one_run() const {
    return form == Form::flat && walk.rows == 1 && walk.element == kOwnElement<T>;
  }

  int64_t values_per_part() const { return buffer_values(kernels_per_part, walk.values()); }

  // f(first, kernels) for every tile. One in place is a part of a row, or whole rows.
  template <class F>
  void for_each_tile(F f) const {
    if (walk.kernels() == 0) return;
    int64_t run = walk.kernels(), tile = kernels_per_tile;
    if (in_place && walk.row_kernels >= tile)
      run = walk.row_kernels;
    else if (in_place)
      tile = tile / walk.row_kernels * walk.row_kernels;
    for (int64_t begin = 0; begin < walk.kernels(); begin += run)
      for (int64_t first = 0; first < run; first += tile)
        f(begin + first, std::min(tile, run - first));
  }

  // f(first, kernels) for every part of a tile.
  template <class F>
  void for_each_part(int64_t first, int64_t kernels, F f) const {
    for (int64_t done = 0; done < kernels; done += kernels_per_part)
      f(first + done, std::min(kernels_per_part, kernels - done));
  }

  // The kernels first .. first + kernels - 1 for a pass: in place, or loaded into the buffer.
  Tile load(int64_t first, int64_t kernels, T* buffer) const {
    if (!in_place) {
      passes<T>().load(walk.strided(), first, kernels, form, buffer);
      return {buffer, kOwnElement<T>, walk.element,    1,      kernels,
              0,      kLanes * walk.values(), form, nullptr};
    }
    const int64_t in_row = std::min(kernels, walk.row_kernels);
    return {walk.at(first),  walk.element, walk.element,
            kernels / in_row, in_row,      walk.row_stride,
            kLanes * walk.kernel_stride, form, walk.offsets.data()};
  }
  // What a pass made of a tile that was loaded into the buffer, rounded to the weight's dtype.
  void store(int64_t first, int64_t kernels, T* buffer) const {
    if (!in_place) passes<T>().store(walk.strided(), first, kernels, form, buffer);
  }

 private:
  bool works_in_place(const Plan<T>& plan, Order order) const {
    if (walk.overlapping) return false;
    // In lanes, 16 kernels lie side by side.
    const bool placed = walk.is_flat() || (plan.kind != Kind::identity && walk.kernel_stride == 1);
    if (!placed || walk.rows == 1) return placed;
    // A block does not go on in the next row; where the last one of a row is not full, the blocks
    // are not those of the masks.
    const bool identity = plan.kind == Kind::identity;
    if (identity && order == Order::canonical) return false;
    const int64_t unit = identity ? kIdentityGroup * kLanes : kLanes;
    const int64_t kernels = walk.row_kernels * (identity ? walk.values() : 1);
    const int64_t lanes = (kernels + unit - 1) / unit * unit;
    return kernels == lanes || (order == Order::memory && 4 * kernels >= 3 * lanes);
  }
};

// A weight and its basis. Its coefficients are ranked by magnitude, or at random by a seed.
template <class T>
struct PlannedWeight {
  Weight weight;
  const Plan<T>* plan;
  bool random = false;
  uint64_t seed = 0;
  Route<T> route;

  bool identity() const { return plan->kind == Kind::identity; }
  // Kernels as the passes count them: for the identity every value is one.
  int64_t pass_kernels(int64_t kernels) const {
    return identity() ? kernels * route.walk.values() : kernels;
  }
  int64_t coefficients() const { return pass_kernels(route.walk.kernels()) * plan->outputs; }
  int64_t coefficients_per_tile() const {
    return pass_kernels(route.kernels_per_tile) * plan->outputs;
  }
  // What a pass works on: a part of a tile, in place or loaded into the buffer.
  Tile load(int64_t first, int64_t kernels, T* buffer) const {
    Tile tile = route.load(first, kernels, buffer);
    tile.row_kernels = pass_kernels(tile.row_kernels);
    return tile;
  }
  // The index in the weight of a kernel's first value; only in the canonical order.
  uint64_t index(int64_t kernel) const {
    return uint64_t(kernel) * uint64_t(route.walk.values());
  }
};

// Pairs each weight with its plan, which `plans` owns; no seeds rank by magnitude. Random ranks are
// those of the canonical order.
template <class T>
std::vector<PlannedWeight<T>> planned_weights(
    const std::vector<torch::stable::Tensor>& weights,
    const std::vector<torch::stable::Tensor>& plan_tensors, const std::vector<int64_t>& seeds,
    Order order, Plans<T>* plans) {
  check_lengths(weights.size(), plan_tensors.size(), "plans");
  std::vector<PlannedWeight<T>> planned;
  for (size_t w = 0; w < weights.size(); ++w) {
    const Weight weight = weight_of(weights[w]);
    const Plan<T>& plan = plans->add(plan_tensors[w], weight.values()).plan;
    check_seeded(seeds, plan);
    const bool random = !seeds.empty();
    planned.push_back({weight, &plan, random, random ? uint64_t(seeds[w]) : 0,
                       {weight, plan, random ? Order::canonical : order, random}});
  }
  return planned;
}

// One tile of one of several weights.
struct TileTask {
  int64_t weight, first, kernels;
};

template <class T>
std::vector<TileTask> tile_tasks(const std::vector<PlannedWeight<T>>& weights) {
  std::vector<TileTask> tasks;
  for (size_t w = 0; w < weights.size(); ++w)
    weights[w].route.for_each_tile([&](int64_t first, int64_t kernels) {
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

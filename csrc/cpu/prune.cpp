// Pruning in place, by thresholds or by masks, and the masks of thresholds. Coefficients are
// recomputed and never stored.
//
// Bytes: every weight is read once and written once; a mask has one bit a coefficient. Operations:
// the transform, its inverse, and about ten instructions for each register of weights to measure
// the change.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "../arguments.h"
#include "denormals.h"
#include "instruction_set.h"
#include "ops.h"
#include "scratch.h"
#include "threads.h"
#include "tiles.h"

namespace wavprune {

using torch::headeronly::ScalarType;

namespace {

// What selects the coefficients of a weight: a mask, or a threshold for their ranks.
template <class T>
struct Selection {
  double threshold;
  const MaskWord* mask;  // null for a threshold
};

// What one thread needs for the tiles of a weight.
template <class T>
class TileBuffers {
 public:
  explicit TileBuffers(const PlannedWeight<T>& planned)
      : scratch(scratch_values(*planned.plan)), values_(planned.route.values_per_part()) {}
  const Scratch<T> scratch;
  T* tile() { return allocated(tile_); }
  T* before() { return allocated(before_); }

 private:
  T* allocated(std::unique_ptr<Scratch<T>>& buffer) {
    if (buffer == nullptr) buffer = std::make_unique<Scratch<T>>(values_);
    return buffer->get();
  }
  int64_t values_;
  std::unique_ptr<Scratch<T>> tile_, before_;
};

// visit(index of the task, buffers) for every tile, on all threads. Last first: what was scanned
// last for the threshold may still be in the cache.
template <class T, class F>
void visit_tiles(const std::vector<PlannedWeight<T>>& weights, const std::vector<TileTask>& tasks,
                 F visit) {
  parallel_tasks(int64_t(tasks.size()), [&](auto next) {
    int64_t current = -1;
    std::unique_ptr<TileBuffers<T>> buffers;
    for (int64_t i; (i = int64_t(tasks.size()) - 1 - next()) >= 0;) {
      if (tasks[i].weight != current) {
        current = tasks[i].weight;
        buffers = std::make_unique<TileBuffers<T>>(weights[current]);
      }
      visit(i, *buffers);
    }
  });
}

// Words of a mask for this many kernels; the first of several tiles are whole blocks.
template <class T>
int64_t mask_words(const PlannedWeight<T>& planned, int64_t kernels) {
  return (planned.pass_kernels(kernels) + kLanes - 1) / kLanes * planned.plan->outputs;
}

// Measures what changed with sums in float64, where squares may leave the range of T. Of the values
// there are, `missing` are 0 and of no kernel.
template <class T>
void measure(const T* before, const T* after, int64_t count, int64_t missing, Change<T>* change) {
  double error[kLanes] = {}, norm[kLanes] = {};
  int64_t zeros = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double was = double(before[i]), difference = was - double(after[i]);
    error[i % kLanes] += difference * difference;
    norm[i % kLanes] += was * was;
    zeros += after[i] == 0;
  }
  change->zeros = zeros - missing;
  change->squared_error = change->squared_norm = 0;
  for (int l = 0; l < kLanes; ++l) {
    change->squared_error += error[l];
    change->squared_norm += norm[l];
  }
}

// The sums of a pass are far from the ends of float32: no term overflowed, and those that
// underflowed are negligible. An error of 0 is right where nothing changed.
template <class T>
bool sums_fit(const Change<T>& change, const T* before, const T* after, int64_t count) {
  const auto fits = [](double sum) { return sum > 0x1p-80 && sum < 0x1p80; };
  return fits(change.squared_norm) &&
         (fits(change.squared_error) ||
          (change.squared_error == 0 && std::memcmp(before, after, count * sizeof(T)) == 0));
}

// Runs the pass that a selection wants. `change` may be null where it is a mask.
template <class T>
void prune_loaded(const PlannedWeight<T>& planned, const TileTask& task, const Tile& tile,
                  const Selection<T>& selection, T* scratch, Change<T>* change) {
  const Plan<T>& plan = *planned.plan;
  if (selection.mask != nullptr) {
    const MaskWord* const words = selection.mask + mask_words(planned, task.first);
    if (change != nullptr)
      passes<T>().prune_by_mask(plan, tile, scratch, words, change);
    else
      passes<T>().project(plan, tile, scratch, words);
  } else if (planned.random) {
    passes<T>().prune_at_random(static_cast<T*>(tile.data), tile.row_kernels,
                                planned.index(task.first), planned.seed, selection.threshold,
                                change);
  } else {
    passes<T>().prune(plan, tile, scratch, T(selection.threshold), change);
  }
}

// Prunes a part of a tile. `change` may be null: then nothing is counted.
template <class T>
void prune_part(const PlannedWeight<T>& planned, const TileTask& task,
                const Selection<T>& selection, TileBuffers<T>& buffers, Change<T>* change) {
  T* const scratch = buffers.scratch.get();
  T* const buffer = planned.route.in_place ? nullptr : buffers.tile();
  // A mask does not tell how large the weights are: whether the sums fit shows after the pass. At
  // random they are in float64, and a weight that is kept stays as it is.
  const bool trusted = selection.mask ? planned.weight.element == Element::float16
                                      : planned.random || squares_fit(selection.threshold);
  if (change == nullptr || trusted) {
    const Tile tile = planned.load(task.first, task.kernels, buffer);
    prune_loaded(planned, task, tile, selection, scratch, change);
    return planned.route.store(task.first, task.kernels, buffer);
  }
  PlannedWeight<T> apart = planned;
  // Values in rows, or in lanes, are compared side by side in buffers.
  if (!planned.route.is_one_run()) apart.route.in_place = false;
  T* const copy = apart.route.in_place ? nullptr : buffers.tile();
  const Tile tile = apart.load(task.first, task.kernels, copy);
  const int64_t values = task.kernels * planned.route.walk.values();
  const int64_t lanes =
      tile.form == Form::lanes && !apart.route.in_place
          ? (task.kernels + kLanes - 1) / kLanes * kLanes * planned.route.walk.values()
          : values;
  T *const before = buffers.before(), *const x = static_cast<T*>(tile.data);
  std::copy(x, x + lanes, before);
  prune_loaded(planned, task, tile, selection, scratch, change);
  if (!sums_fit(*change, before, x, lanes)) measure(before, x, lanes, lanes - values, change);
  apart.route.store(task.first, task.kernels, copy);
}

// Prunes one tile of a weight. `change` may be null.
template <class T>
void prune_tile(const PlannedWeight<T>& planned, const TileTask& tile,
                const Selection<T>& selection, TileBuffers<T>& buffers, Change<T>* change) {
  if (change != nullptr) *change = {0, 0, 0, 0};
  planned.route.for_each_part(tile.first, tile.kernels, [&](int64_t first, int64_t kernels) {
    const TileTask part{tile.weight, first, kernels};
    if (change == nullptr) return prune_part(planned, part, selection, buffers, change);
    Change<T> more;
    prune_part(planned, part, selection, buffers, &more);
    change->kept += more.kept;
    change->zeros += more.zeros;
    change->squared_error += more.squared_error;
    change->squared_norm += more.squared_norm;
  });
}

// A row for each weight: kept, zeros, squared error, squared norm.
template <class T>
Tensor rows_of(const std::vector<TileTask>& tasks, const std::vector<Change<T>>& changes,
               int64_t weights, double fill = 0) {
  Tensor result = torch::stable::empty({weights, 4}, ScalarType::Double);
  double* rows = static_cast<double*>(result.data_ptr());
  std::fill(rows, rows + 4 * weights, fill);
  for (size_t i = 0; i < tasks.size(); ++i) {
    double* row = rows + 4 * tasks[i].weight;
    row[0] += double(changes[i].kept);
    row[1] += double(changes[i].zeros);
    row[2] += changes[i].squared_error;
    row[3] += changes[i].squared_norm;
  }
  return result;
}

// Prunes all tiles; `selections` has one for each weight.
template <class T>
Tensor prune_weights(const std::vector<PlannedWeight<T>>& weights,
                     const std::vector<Selection<T>>& selections) {
  const std::vector<TileTask> tasks = tile_tasks(weights);
  std::vector<Change<T>> changes(tasks.size());
  visit_tiles(weights, tasks, [&](int64_t i, TileBuffers<T>& buffers) {
    const int64_t w = tasks[i].weight;
    prune_tile(weights[w], tasks[i], selections[w], buffers, &changes[i]);
  });
  return rows_of(tasks, changes, int64_t(weights.size()));
}

template <class T>
void mark_weights(const std::vector<PlannedWeight<T>>& weights, const double* thresholds,
                  const std::vector<MaskWord*>& masks) {
  const std::vector<TileTask> tasks = tile_tasks(weights);
  visit_tiles(weights, tasks, [&](int64_t i, TileBuffers<T>& buffers) {
    const TileTask& task = tasks[i];
    const PlannedWeight<T>& planned = weights[task.weight];
    T* const buffer = planned.route.in_place ? nullptr : buffers.tile();
    const double threshold = thresholds[task.weight];
    planned.route.for_each_part(task.first, task.kernels, [&](int64_t first, int64_t kernels) {
      const Tile tile = planned.load(first, kernels, buffer);
      MaskWord* const words = masks[task.weight] + mask_words(planned, first);
      if (planned.random)
        passes<T>().mark_at_random(static_cast<const T*>(tile.data), tile.row_kernels,
                                   planned.index(first), planned.seed, threshold, words);
      else
        passes<T>().mark(*planned.plan, tile, buffers.scratch.get(), positive<T>(threshold),
                         words);
    });
  });
}

const double* checked_thresholds(const Tensor& thresholds, size_t weights) {
  STD_TORCH_CHECK(thresholds.is_cpu() && thresholds.scalar_type() == ScalarType::Double &&
                      thresholds.is_contiguous() && thresholds.numel() == int64_t(weights),
                  "wavprune: thresholds must be ", weights,
                  " contiguous float64 numbers on the CPU");
  return static_cast<const double*>(thresholds.data_ptr());
}

template <class T>
std::vector<MaskWord*> checked_masks(const std::vector<Tensor>& masks,
                                     const std::vector<PlannedWeight<T>>& weights) {
  check_lengths(weights.size(), masks.size(), "masks");
  std::vector<MaskWord*> words;
  for (size_t w = 0; w < weights.size(); ++w) {
    const Tensor& mask = masks[w];
    const int64_t bytes =
        mask_words(weights[w], weights[w].route.walk.kernels()) * int64_t(sizeof(MaskWord));
    STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte &&
                        mask.is_contiguous() && mask.numel() == bytes,
                    "wavprune: the mask of weight ", w, " must be ", bytes,
                    " contiguous bytes on the CPU");
    STD_TORCH_CHECK(uintptr_t(mask.data_ptr()) % alignof(MaskWord) == 0,
                    "wavprune: the mask of weight ", w, " must begin at an even address");
    words.push_back(static_cast<MaskWord*>(mask.data_ptr()));
  }
  return words;
}

template <class T>
std::vector<Selection<T>> mask_selections(const std::vector<MaskWord*>& masks) {
  std::vector<Selection<T>> selections;
  for (const MaskWord* mask : masks) selections.push_back({0, mask});
  return selections;
}

}  // namespace

Tensor prune_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<int64_t> seeds,
              Tensor thresholds, bool compute_float64) {
  const KeepDenormals guard;
  check_seeds(seeds, weights.size());
  const double* const values = checked_thresholds(thresholds, weights.size());
  return with_compute_type(compute_float64, [&](auto zero) {
    typedef decltype(zero) T;
    Plans<T> owner;
    const auto planned = planned_weights(weights, plans, seeds, Order::memory, &owner);
    std::vector<Selection<T>> selections;
    for (size_t w = 0; w < planned.size(); ++w) {
      // A weight that is not finite has no threshold, and none of the weights is changed.
      if (std::isnan(values[w]))
        return rows_of<T>({}, {}, int64_t(planned.size()),
                          std::numeric_limits<double>::quiet_NaN());
      const double least = double(positive<T>(values[w]));
      selections.push_back({planned[w].random ? values[w] : least, nullptr});
    }
    return prune_weights(planned, selections);
  });
}

Tensor prune_by_mask_(std::vector<Tensor> weights, std::vector<Tensor> plans,
                      std::vector<Tensor> masks, bool compute_float64) {
  const KeepDenormals guard;
  return with_compute_type(compute_float64, [&](auto zero) {
    typedef decltype(zero) T;
    Plans<T> owner;
    const auto planned = planned_weights(weights, plans, {}, Order::canonical, &owner);
    return prune_weights(planned, mask_selections<T>(checked_masks(masks, planned)));
  });
}

void project_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<Tensor> masks,
              bool compute_float64) {
  const KeepDenormals guard;
  with_compute_type(compute_float64, [&](auto zero) {
    typedef decltype(zero) T;
    Plans<T> owner;
    const auto planned = planned_weights(weights, plans, {}, Order::canonical, &owner);
    const auto selections = mask_selections<T>(checked_masks(masks, planned));
    const std::vector<TileTask> tasks = tile_tasks(planned);
    visit_tiles(planned, tasks, [&](int64_t i, TileBuffers<T>& buffers) {
      const int64_t w = tasks[i].weight;
      prune_tile(planned[w], tasks[i], selections[w], buffers, static_cast<Change<T>*>(nullptr));
    });
  });
}

void mark_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<int64_t> seeds,
           Tensor thresholds, std::vector<Tensor> masks, bool compute_float64) {
  const KeepDenormals guard;
  check_seeds(seeds, weights.size());
  const double* const values = checked_thresholds(thresholds, weights.size());
  for (size_t w = 0; w < weights.size(); ++w)
    STD_TORCH_CHECK(!std::isnan(values[w]), "wavprune: threshold ", w, " is NaN");
  with_compute_type(compute_float64, [&](auto zero) {
    typedef decltype(zero) T;
    Plans<T> owner;
    const auto planned = planned_weights(weights, plans, seeds, Order::canonical, &owner);
    mark_weights(planned, values, checked_masks(masks, planned));
  });
}

}  // namespace wavprune

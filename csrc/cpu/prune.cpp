// Mask and inverse in place: one pass that recomputes the coefficients and never stores them.
//
// Bytes: every weight is read once and written once. Operations: the transform, its inverse, and
// about ten instructions for each register of weights for the counts and the error.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops.h"
#include "select.h"

namespace wavprune {

using torch::headeronly::ScalarType;

namespace {

// True where the squares of what lies about the threshold are far from the ends of float32.
bool ordinary(double threshold) { return threshold > 0x1p-40 && threshold < 0x1p40; }

// The sums of Change in float64, for weights that are rounded after the pass or whose squares may
// leave float32.
template <class T>
void compare(const T* before, const T* after, int64_t count, Change<T>* change) {
  double error[kLanes] = {}, norm[kLanes] = {};
  int64_t zeros = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double was = double(before[i]), moved = was - double(after[i]);
    error[i % kLanes] += moved * moved;
    norm[i % kLanes] += was * was;
    zeros += after[i] == 0;
  }
  change->zeros = zeros;
  change->squared_error = change->squared_norm = 0;
  for (int l = 0; l < kLanes; ++l) {
    change->squared_error += error[l];
    change->squared_norm += norm[l];
  }
}

template <class T>
int64_t keep_drawn(const Piece<T>& piece, int64_t first, int64_t kernels, T threshold, T* tile) {
  int64_t kept = 0;
  for (int64_t i = 0; i < kernels * piece.weight.values(); ++i) {
    const bool keep =
        tile[i] != 0 && random_rank(uint64_t(first * piece.weight.values() + i), piece.seed) >= threshold;
    if (!keep) tile[i] = 0;
    kept += keep;
  }
  return kept;
}

template <class T>
void prune_tile(const Piece<T>& piece, int64_t first, int64_t kernels, T* tile, T* before,
                T* scratch, Change<T>* change) {
  const Weight& weight = piece.weight;
  const int64_t values = kernels * weight.values();
  T* x = load_tile(weight, first, kernels, tile);
  const bool in_place = direct<T>(weight) && !piece.draw && ordinary(double(change->threshold));
  if (!in_place) std::copy(x, x + values, before);
  if (piece.draw) {
    if (x != tile) x = std::copy(x, x + values, tile) - values;
    change->kept = keep_drawn(piece, first, kernels, change->threshold, x);
  } else {
    passes<T>().prune(*piece.plan, x, pass_kernels(weight, *piece.plan, kernels), scratch, change);
  }
  if (in_place) return;
  store_tile(weight, first, kernels, x);
  compare(before, load_tile(weight, first, kernels, tile), values, change);
}

template <class T>
Tensor prune_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& plans,
                 const std::vector<int64_t>& draws, const double* thresholds) {
  std::vector<Piece<T>> pieces;
  const auto owned = pieces_of<T>(weights, plans, draws, &pieces);
  const int64_t count = int64_t(weights.size());
  // One weight that is not finite, and all stay as they are.
  const double* const end = thresholds + count;
  const bool bad = std::any_of(thresholds, end, [](double value) { return std::isnan(value); });
  const std::vector<TileTask> tasks = bad ? std::vector<TileTask>{} : tiles_of(pieces);
  std::vector<Change<T>> changes(tasks.size());
  share_out(int64_t(tasks.size()), [&](auto next) {
    int64_t current = -1;
    std::unique_ptr<Scratch<T>> tile, before, scratch;
    for (int64_t dealt; (dealt = next()) < int64_t(tasks.size());) {
      // Last first: what was scanned last for the threshold may still be in the cache.
      const int64_t i = int64_t(tasks.size()) - 1 - dealt;
      const Piece<T>& piece = pieces[tasks[i].weight];
      if (tasks[i].weight != current) {
        current = tasks[i].weight;
        tile = std::make_unique<Scratch<T>>(tile_values(piece.weight, *piece.plan));
        before = std::make_unique<Scratch<T>>(tile_values(piece.weight, *piece.plan));
        scratch = std::make_unique<Scratch<T>>(scratch_values(*piece.plan));
      }
      changes[i].threshold = positive<T>(thresholds[current]);
      prune_tile(piece, tasks[i].first, tasks[i].kernels, tile->get(), before->get(),
                 scratch->get(), &changes[i]);
    }
  });
  Tensor result = torch::stable::empty({count, 4}, ScalarType::Double);
  double* rows = static_cast<double*>(result.data_ptr());
  std::fill(rows, rows + 4 * count, bad ? std::numeric_limits<double>::quiet_NaN() : 0.0);
  for (size_t i = 0; i < tasks.size(); ++i) {
    double* row = rows + 4 * tasks[i].weight;
    row[0] += double(changes[i].kept);
    row[1] += double(changes[i].zeros);
    row[2] += changes[i].squared_error;
    row[3] += changes[i].squared_norm;
  }
  return result;
}

template <class T>
Tensor topk(const std::vector<Tensor>& weights, const std::vector<Tensor>& plans,
            const std::vector<int64_t>& draws, const std::vector<int64_t>& membership,
            const std::vector<int64_t>& keep) {
  std::vector<Piece<T>> pieces;
  const auto owned = pieces_of<T>(weights, plans, draws, &pieces);
  std::vector<Job<T>> jobs(keep.size());
  for (size_t w = 0; w < pieces.size(); ++w) {
    STD_TORCH_CHECK(membership[w] >= 0 && membership[w] < int64_t(keep.size()),
                    "wavprune: weight ", w, " belongs to job ", membership[w], " of ", keep.size());
    jobs[membership[w]].add(pieces[w]);
  }
  Tensor result = torch::stable::empty({int64_t(keep.size())}, ScalarType::Double);
  double* thresholds = static_cast<double*>(result.data_ptr());
  std::vector<std::pair<int64_t, int64_t>> wanted;
  for (size_t j = 0; j < jobs.size(); ++j) {
    STD_TORCH_CHECK(keep[j] >= 0, "wavprune: cannot keep ", keep[j], " coefficients");
    thresholds[j] = std::numeric_limits<double>::infinity();
    if (keep[j] > 0 && jobs[j].total > 0)
      wanted.emplace_back(int64_t(j), std::max<int64_t>(jobs[j].total - keep[j], 0));
  }
  const std::vector<T> values = order_statistics(jobs, wanted);
  for (size_t i = 0; i < wanted.size(); ++i) thresholds[wanted[i].first] = double(values[i]);
  return result;
}

// numpy.percentile's place in n sorted values.
struct Place {
  int64_t rank;
  double fraction;
};
Place place_of(int64_t count, double percentile) {
  const double place = double(count - 1) * (percentile / 100.0);
  const int64_t rank = std::min<int64_t>(int64_t(std::floor(place)), count - 1);
  return {rank, place - double(rank)};
}

template <class T>
std::vector<double> percentiles(const std::vector<Job<T>>& jobs,
                                const std::vector<int64_t>& dropped, double percentile) {
  std::vector<std::pair<int64_t, int64_t>> wanted;
  std::vector<Place> places;
  for (size_t j = 0; j < jobs.size(); ++j) {
    // The structural zeros are the smallest values: they take the first ranks.
    const Place place = place_of(jobs[j].total + dropped[j], percentile);
    places.push_back(place);
    if (jobs[j].total == 0) continue;
    // Asked for even where a structural zero answers: a weight that is not finite must show.
    wanted.emplace_back(int64_t(j), std::max<int64_t>(place.rank - dropped[j], 0));
    if (place.fraction > 0)
      wanted.emplace_back(int64_t(j), std::max<int64_t>(place.rank + 1 - dropped[j], 0));
  }
  const std::vector<T> values = order_statistics(jobs, wanted);
  std::vector<double> result(jobs.size(), std::numeric_limits<double>::infinity());
  size_t next = 0;
  for (size_t j = 0; j < jobs.size(); ++j) {
    if (jobs[j].total == 0) continue;
    const auto value = [&](int64_t rank) {
      const T found = values[next++];
      return rank < dropped[j] && !std::isnan(found) ? T(0) : found;
    };
    T threshold = value(places[j].rank);
    if (places[j].fraction > 0)
      threshold = between(threshold, value(places[j].rank + 1), places[j].fraction);
    result[j] = double(threshold);
  }
  return result;
}

template <class T>
Tensor percentile_each(const std::vector<Tensor>& weights, const std::vector<Tensor>& plans,
                       const std::vector<int64_t>& dropped, double percentile) {
  std::vector<Piece<T>> pieces;
  const auto owned = pieces_of<T>(weights, plans, {}, &pieces);
  std::vector<Job<T>> jobs(pieces.size());
  for (size_t w = 0; w < pieces.size(); ++w) jobs[w].add(pieces[w]);
  const std::vector<double> values = percentiles(jobs, dropped, percentile);
  Tensor result = torch::stable::empty({int64_t(values.size())}, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(result.data_ptr()));
  return result;
}

void check_percentile(double percentile) {
  STD_TORCH_CHECK(percentile >= 0 && percentile <= 100,
                  "wavprune: percentile must be in [0, 100], not ", percentile);
}

template <class T>
Tensor mask_of(const Tensor& input, double percentile, bool packed) {
  const int64_t count = input.numel();
  Weight weight{static_cast<char*>(input.data_ptr()), input.scalar_type(), {count, 1, 1, 1},
                {1, 1, 1, 1}, true};
  Plan<T> identity{};
  identity.inputs = identity.outputs = 1;
  const Piece<T> piece{weight, &identity, false, 0};
  std::vector<Job<T>> jobs(1);
  jobs[0].add(piece);
  const T threshold = count ? T(percentiles(jobs, {0}, percentile)[0]) : T(0);
  STD_TORCH_CHECK(!std::isnan(threshold), "wavprune: the input holds NaN or infinite values");
  Tensor result = packed ? torch::stable::empty({(count + 7) / 8}, ScalarType::Byte)
                         : torch::stable::new_empty(input, input.sizes(), ScalarType::Bool);
  uint8_t* bytes = static_cast<uint8_t*>(result.data_ptr());
  // A tile is a multiple of 8: no two threads share a byte.
  const int64_t tiles = (count + kTile - 1) / kTile;
  share_out(tiles, [&](auto next) {
    Scratch<T> buffer(kTile);
    for (int64_t t; (t = next()) < tiles;) {
      const int64_t first = t * kTile, length = std::min(kTile, count - first);
      const T* x = load_tile(weight, first, length, buffer.get());
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

// A new tensor for results of many megabytes. Of its time more went into the faults of its 4 KiB
// pages than into the transform that fills it, so large pages are asked for.
Tensor fresh(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor result = torch::stable::new_empty(like, {rows, columns});
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t begin = uintptr_t(result.data_ptr());
  const uintptr_t end = begin + uintptr_t(result.numel()) * result.element_size();
  const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1), last = end & ~(kHuge - 1);
  // Advice: where the system does not take it, small pages do.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return result;
}

template <class T>
Tensor transform(const Tensor& input, const Tensor& plan_tensor, int64_t kernel_values,
                 int64_t width, bool forward) {
  const auto owned = plan_of<T>(plan_tensor, kernel_values);
  const Plan<T>& plan = owned->plan;
  const bool identity = plan.kind == Kind::identity;
  const int64_t kernels = input.size(0), taken = input.size(1);
  const int64_t inputs = identity ? kernel_values : plan.inputs;
  const int64_t outputs = identity ? kernel_values : plan.outputs;
  STD_TORCH_CHECK(taken == (forward ? inputs : outputs) && width == (forward ? outputs : inputs),
                  "wavprune: a plan of ", inputs, " values and ", outputs,
                  " coefficients met rows of ", taken, " to become rows of ", width);
  Tensor result = fresh(input, kernels, width);
  const T* from = static_cast<const T*>(input.data_ptr());
  T* to = static_cast<T*>(result.data_ptr());
  const int64_t tile = std::max<int64_t>(kTile / std::max(inputs, outputs) / kLanes, 1) * kLanes;
  const int64_t tiles = (kernels + tile - 1) / tile;
  share_out(tiles, [&](auto next) {
    Scratch<T> scratch(scratch_values(plan));
    for (int64_t t; (t = next()) < tiles;) {
      const int64_t first = t * tile, n = std::min(tile, kernels - first);
      const int64_t counted = identity ? n * kernel_values : n;
      const auto pass = forward ? passes<T>().forward : passes<T>().inverse;
      pass(plan, from + first * taken, counted, scratch.get(), to + first * width);
    }
  });
  return result;
}

void check_rows(const Tensor& rows) {
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 2 && rows.is_contiguous() &&
                      (rows.scalar_type() == ScalarType::Float ||
                       rows.scalar_type() == ScalarType::Double),
                  "wavprune: expected a contiguous (kernels, values) matrix of float32 or float64 "
                  "on the CPU");
}

}  // namespace

Tensor topk_threshold(std::vector<Tensor> weights, std::vector<Tensor> plans,
                      std::vector<int64_t> draws, std::vector<int64_t> jobs,
                      std::vector<int64_t> keep, bool wide) {
  const KeepDenormals guard;
  check_lengths(weights.size(), jobs.size(), "jobs");
  check_draws(draws, wide);
  return wide ? topk<double>(weights, plans, draws, jobs, keep)
              : topk<float>(weights, plans, draws, jobs, keep);
}

Tensor percentile_threshold(std::vector<Tensor> weights, std::vector<Tensor> plans,
                            std::vector<int64_t> dropped, double percentile, bool wide) {
  const KeepDenormals guard;
  check_lengths(weights.size(), dropped.size(), "counts of dropped coefficients");
  check_percentile(percentile);
  for (const int64_t count : dropped)
    STD_TORCH_CHECK(count >= 0, "wavprune: ", count, " dropped coefficients");
  return wide ? percentile_each<double>(weights, plans, dropped, percentile)
              : percentile_each<float>(weights, plans, dropped, percentile);
}

Tensor prune_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<int64_t> draws,
              Tensor thresholds, bool wide) {
  const KeepDenormals guard;
  check_draws(draws, wide);
  const double* values = numbers(thresholds, int64_t(weights.size()), "thresholds");
  return wide ? prune_all<double>(weights, plans, draws, values)
              : prune_all<float>(weights, plans, draws, values);
}

Tensor dwt2(Tensor kernels, Tensor plan, int64_t outputs) {
  check_rows(kernels);
  const int64_t values = kernels.size(1);
  return kernels.scalar_type() == ScalarType::Float
             ? transform<float>(kernels, plan, values, outputs, true)
             : transform<double>(kernels, plan, values, outputs, true);
}

Tensor idwt2(Tensor coefficients, Tensor plan, int64_t values) {
  check_rows(coefficients);
  return coefficients.scalar_type() == ScalarType::Float
             ? transform<float>(coefficients, plan, values, values, false)
             : transform<double>(coefficients, plan, values, values, false);
}

Tensor percentile_mask(Tensor input, double percentile, bool packed) {
  const KeepDenormals guard;
  check_percentile(percentile);
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(input.is_cpu() && input.is_contiguous() &&
                      (dtype == ScalarType::Float || dtype == ScalarType::Double ||
                       dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
                  "wavprune: expected a contiguous tensor of float64, float32, float16 or bfloat16 "
                  "on the CPU");
  return dtype == ScalarType::Double ? mask_of<double>(input, percentile, packed)
                                     : mask_of<float>(input, percentile, packed);
}

}  // namespace wavprune

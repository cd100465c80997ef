#include "random_rank.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "bracket.h"
#include "threads.h"

namespace wavprune {
namespace {

template <class T>
bool is_zero(const PlannedWeight<T>& planned, uint64_t index) {
  const uint64_t K = uint64_t(planned.route.walk.values());
  const Scratch<T> kernel{int64_t(K)};
  passes<T>().pick(planned.route.walk.strided(), int64_t(index / K), 1, kernel.get());
  return kernel.get()[index % K] == 0;
}

// Appends the ranks of the weights of this coarse rank. There are few: a high word belongs to one
// index of those that share their own high word.
template <class T>
void append_ranks(const PlannedWeight<T>& planned, T coarse, std::vector<double>& ranks) {
  const uint64_t size = uint64_t(planned.weight.numel());
  const uint32_t least = first_high<T>(key_of(coarse));
  for (uint64_t start = 0; start < size; start += uint64_t(1) << 32) {
    const RandomKeys keys = random_keys(planned.seed, uint32_t(start >> 32));
    for (uint32_t i = 0; i < uint32_t(1) << CoarseRank<T>::kMissingBits; ++i) {
      const uint64_t index = start + index_of_high(least + i, keys);
      if (index < size && !is_zero(planned, index))
        ranks.push_back(rank_of_high(least + i, keys));
    }
  }
}

// How many coarse ranks of a job are smaller.
template <class T>
int64_t count_below(const Job<T>& job, T coarse) {
  const std::vector<TileTask> tasks = tile_tasks(job.weights);
  std::atomic<int64_t> below{0};
  parallel_tasks(int64_t(tasks.size()), [&](auto next) {
    const PlannedWeight<T>* current = nullptr;
    std::unique_ptr<Scratch<T>> buffer;
    for (int64_t i; (i = next()) < int64_t(tasks.size());) {
      const PlannedWeight<T>& planned = job.weights[tasks[i].weight];
      if (current != &planned)
        buffer = std::make_unique<Scratch<T>>(planned.route.values_per_part());
      current = &planned;
      planned.route.for_each_part(
          tasks[i].first, tasks[i].kernels, [&](int64_t first, int64_t kernels) {
            const Tile tile = planned.load(first, kernels, buffer->get());
            T nothing[kLanes];
            Scan<T> scan{coarse, T(-1), nothing, 0, 0, 0, 0, 0};
            passes<T>().scan_at_random(static_cast<const T*>(tile.data), tile.row_kernels,
                                       planned.index(first), planned.seed, &scan);
            below += scan.below;
          });
    }
  });
  return below;
}

}  // namespace

template <class T>
double exact_random_rank(const Job<T>& job, int64_t position, T coarse) {
  if (!(coarse > 0)) return double(coarse);
  std::vector<double> ranks;
  for (const PlannedWeight<T>& planned : job.weights) append_ranks(planned, coarse, ranks);
  if (ranks.size() == 1) return ranks[0];
  // Coarse ranks tie now and then.
  std::sort(ranks.begin(), ranks.end());
  return ranks[size_t(position - count_below(job, coarse))];
}

template double exact_random_rank(const Job<float>&, int64_t, float);
template double exact_random_rank(const Job<double>&, int64_t, double);

}  // namespace wavprune

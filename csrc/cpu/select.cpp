// Exact order statistics of |C| over one or many weights, without storing C.
//
// A sample brackets the wanted rank; one pass over the weights counts the values below the bracket
// and collects the few percent inside it, among which the rank is selected (bracket.h). Where the
// bracket missed, or holds too many values (ties, heavy tails), passes that only count narrow it by
// a factor of 4096 each. The result is exact, so it depends on no sample, thread or tile.
//
// Bytes: every weight is read once. Operations: the transform, and about ten instructions for each
// register of coefficients.

#include "select.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <span>

#include "bracket.h"
#include "threads.h"

namespace wavprune {
namespace {

constexpr int kBins = 4096;
// A job with at most so many coefficients is done by one thread, which collects all of them.
constexpr int64_t kSmall = kTile;
constexpr int64_t kMinCapacity = 8192;
// Standard deviations of the sample's rank that the bracket extends to either side.
constexpr double kSigmas = 3;
// How many runs of kernels ahead a sample prefetches.
constexpr size_t kAhead = 12;

// Bits to drop so that the keys from low to high fall into at most kBins bins.
template <class K>
int bin_shift(K low, K high) {
  int shift = 0;
  while (((high - low) >> shift) >= kBins) ++shift;
  return shift;
}

// What one pass saw of one tile.
struct TileSums {
  size_t weight;
  int64_t coefficients, below = 0, at = 0, inside = 0;
  double energy_below = 0, energy = 0;
};

template <class T>
struct Search {
  const Job<T>* job;
  int64_t rank, total, capacity;
  // The wanted rank has a key in [low, high]: `below` keys are smaller, `within` are inside.
  Key<T> low = 0, high = infinity_key<T>() - 1;
  int64_t below = 0, within;
  // The part of [low, high] that the current pass looks at.
  Key<T> pass_low, pass_high;
  bool counting = false, done = false;
  T answer = 0;
  std::unique_ptr<Scratch<T>> collected;
  std::vector<int64_t> bins;
  // By tile, where it is wanted what the answer leaves of each weight.
  bool measures;
  std::vector<TileSums> tiles;
  std::vector<Left> left;
  // Shared by the threads of a pass.
  std::atomic<int64_t> pass_below{0}, pass_inside{0};
  std::atomic<uint64_t> peak{0};
  std::mutex bins_lock;

  Search(const Job<T>& j, int64_t r, bool measure)
      : job(&j), rank(r), total(j.coefficients), within(j.coefficients), measures(measure) {
    if (measure) left.resize(j.weights.size());
    // Extra memory is at most 5% of the largest weight in float32. A job of one weight leaves room
    // for the sample of the next search, which is taken at the same time.
    const int64_t part = (j.weights.size() > 1 ? 20 : 25) * int64_t(sizeof(T));
    int64_t largest = 0;
    for (const PlannedWeight<T>& planned : j.weights)
      largest = std::max(largest, planned.weight.numel());
    capacity = std::max<int64_t>(kMinCapacity, largest * int64_t(sizeof(float)) / part);
    if (total <= kSmall) capacity = kTile;
  }

  void finish(T value) {
    answer = value;
    done = true;
    collected.reset();
    bins = {};
    tiles = {};
  }
  void prepare() {
    tiles.clear();
    pass_below = 0;
    pass_inside = 0;
    if (counting)
      bins.assign(kBins, 0);
    else
      collected = std::make_unique<Scratch<T>>(std::min(capacity, total) + kLanes);
  }
};

template <class T>
struct Task {
  Search<T>* search;
  const PlannedWeight<T>* planned;
  int64_t first, kernels;
  size_t tile;  // of the search
};

// f(task) for every tile of a search.
template <class T, class F>
void for_each_task(Search<T>& search, F f) {
  size_t tile = 0;
  for (size_t w = 0; w < search.job->weights.size(); ++w) {
    const PlannedWeight<T>& planned = search.job->weights[w];
    planned.route.for_each_tile([&](int64_t first, int64_t kernels) {
      if (search.measures)
        search.tiles.push_back({w, planned.pass_kernels(kernels) * planned.plan->outputs});
      f(Task<T>{&search, &planned, first, kernels, tile++});
    });
  }
}

// What one thread needs for the tiles of a job.
template <class T>
struct Buffers {
  Scratch<T> tile, scratch, ranks;
  explicit Buffers(const Job<T>& job)
      : tile(largest(job, [](const auto& planned) {
          return planned.route.in_place ? 0 : planned.route.values_per_part();
        })),
        scratch(largest(job, [](const auto& planned) { return scratch_values(*planned.plan); })),
        ranks(largest(job, [](const auto& planned) { return planned.coefficients_per_tile(); })) {}
  template <class F>
  static int64_t largest(const Job<T>& job, F size) {
    int64_t result = 0;
    for (const PlannedWeight<T>& planned : job.weights) result = std::max(result, size(planned));
    return result + kLanes;
  }
};

// Scans one tile for ranks in [low, high], which go to buffers.ranks.
template <class T>
Scan<T> scan_tile(const PlannedWeight<T>& planned, int64_t first, int64_t kernels, T low, T high,
                  bool with_energy, Buffers<T>& buffers) {
  Scan<T> all{low, high, buffers.ranks.get(), 0, 0, 0, 0, 0};
  planned.route.for_each_part(first, kernels, [&](int64_t begin, int64_t count) {
    const Tile tile = planned.load(begin, count, buffers.tile.get());
    Scan<T> scan{low, high, all.out + all.inside, 0, 0, 0, 0, 0};
    if (planned.random)
      passes<T>().scan_at_random(static_cast<const T*>(tile.data), tile.row_kernels,
                                 planned.index(begin), planned.seed, &scan);
    else
      (with_energy ? passes<T>().scan_energy : passes<T>().scan)(*planned.plan, tile,
                                                                 buffers.scratch.get(), &scan);
    all.below += scan.below;
    all.inside += scan.inside;
    all.peak = std::max(all.peak, scan.peak);
    all.energy_below += scan.energy_below;
    all.energy += scan.energy;
  });
  return all;
}

// Adds one tile to the current pass of its search.
template <class T>
void run(const Task<T>& task, Buffers<T>& buffers) {
  Search<T>& search = *task.search;
  const T* const ranks = buffers.ranks.get();
  const Scan<T> scan = scan_tile(*task.planned, task.first, task.kernels,
                                 value_of<T>(search.pass_low), value_of<T>(search.pass_high),
                                 search.measures, buffers);
  search.pass_below.fetch_add(scan.below, std::memory_order_relaxed);
  const int64_t at = search.pass_inside.fetch_add(scan.inside, std::memory_order_relaxed);
  if (search.measures) {
    TileSums& sums = search.tiles[task.tile];
    sums.below = scan.below;
    sums.at = at;
    sums.inside = scan.inside;
    sums.energy_below = scan.energy_below;
    sums.energy = scan.energy;
  }
  for (uint64_t seen = search.peak.load(); seen < scan.peak;)
    if (search.peak.compare_exchange_weak(seen, scan.peak)) break;
  if (search.counting) {
    const int shift = bin_shift(search.pass_low, search.pass_high);
    std::vector<int32_t> bins(kBins);
    for (int64_t i = 0; i < scan.inside; ++i)
      ++bins[(key_of(ranks[i]) - search.pass_low) >> shift];
    const std::lock_guard<std::mutex> hold(search.bins_lock);
    for (int b = 0; b < kBins; ++b) search.bins[b] += bins[b];
  } else if (at + scan.inside <= search.capacity) {
    std::memcpy(search.collected->get() + at, ranks, scan.inside * sizeof(T));
  }
}

template <class T>
void append_at_random(const PlannedWeight<T>& planned, int64_t first, int64_t kernels,
                      const T* values, std::vector<T>& sample) {
  const size_t before = sample.size();
  sample.resize(before + planned.pass_kernels(kernels) + kLanes);
  Scan<T> scan{T(0), value_of<T>(infinity_key<T>() - 1), sample.data() + before, 0, 0, 0, 0, 0};
  passes<T>().scan_at_random(values, planned.pass_kernels(kernels), planned.index(first),
                             planned.seed, &scan);
  sample.resize(before + scan.inside);
}

// Appends about `wanted` ranks to the sample, of runs of kernels at a random position in each of
// many equal strides: adjacent kernels would all be of one filter.
template <class T>
void sample_ranks(const PlannedWeight<T>& planned, double wanted, Buffers<T>& buffers,
                  std::vector<T>& sample) {
  const Walk& walk = planned.route.walk;
  const int64_t K = walk.values(), kernels = walk.kernels();
  const int64_t outputs = planned.pass_kernels(1) * planned.plan->outputs;
  // At least a cache line; where each value has its own, a quarter of them.
  const int64_t run =
      std::min<int64_t>(walk.together ? (kLanes + K - 1) / K : kLanes / 4, kernels);
  const int64_t runs = std::max<int64_t>(int64_t(wanted) / (run * outputs), 1);
  const int64_t stride = std::max<int64_t>(kernels / runs, run);
  Scratch<T> gathered((kernels / stride + 1) * run * K);
  std::vector<int64_t> starts;
  uint64_t state = 0x9E3779B97F4A7C15u;
  for (int64_t at = 0; at + stride <= kernels; at += stride) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    starts.push_back(at + int64_t(((state >> 33) * uint64_t(stride - run + 1)) >> 31));
  }
  const Strided strided = walk.strided();
  int64_t taken = 0;
  for (size_t i = 0; i < starts.size(); ++i) {
    // The runs are far apart, so that every one would wait for memory.
    if (i + kAhead < starts.size()) walk.prefetch(starts[i + kAhead], run);
    T* const values = gathered.get() + taken * K;
    passes<T>().pick(strided, starts[i], run, values);
    if (planned.random) {
      append_at_random(planned, starts[i], run, values, sample);
      continue;
    }
    taken += run;
  }
  if (planned.random) return;
  const size_t before = sample.size();
  sample.resize(before + taken * outputs + kLanes);
  Scan<T> scan{T(0), value_of<T>(infinity_key<T>() - 1), sample.data() + before, 0, 0, 0, 0, 0};
  const Tile tile = tile_of(gathered.get(), planned.pass_kernels(taken), K);
  passes<T>().scan(*planned.plan, tile, buffers.scratch.get(), &scan);
  sample.resize(before + scan.inside);
}

// Sets the range of the first pass from a sample.
template <class T>
void bracket(Search<T>& search, Buffers<T>& buffers) {
  const Job<T>& job = *search.job;
  // Sampling should cost as much as what the bracket lets through, which must fit in `capacity`. An
  // expansive basis may ask for a larger sample than fits; the passes that count do without.
  const double room = double(search.capacity) / double(search.total);
  const double cheap = 0.7 * std::pow(double(search.total), 2.0 / 3.0);
  const double fitting = std::pow(kSigmas / (0.8 * room), 2);
  const double wanted = std::max(cheap, std::min(fitting, double(search.capacity)));
  std::vector<T> sample;
  for (const PlannedWeight<T>& planned : job.weights) {
    const double share = double(planned.coefficients()) / double(search.total);
    sample_ranks(planned, share * wanted, buffers, sample);
  }
  const int64_t size = int64_t(sample.size());
  if (size == 0) return;
  const Bracket ends = bracket_of(size, double(search.rank) / double(search.total), kSigmas);
  sample.resize(size + kLanes);
  const auto [low, high] = select(sample.data(), size, std::max<int64_t>(ends.from, 0),
                                  std::min(ends.to, size - 1));
  // Zeros, of which a layer that was pruned before has many, are counted and not collected.
  if (ends.from > 0) search.pass_low = std::max<Key<T>>(key_of(low), 1);
  if (ends.to < size - 1) search.pass_high = key_of(high);
}

// What the answer leaves of each weight, from the ranks that a pass collected. The sums go through
// the tiles in their order, whatever order the threads had.
template <class T>
void tally(Search<T>& search, const T* collected, T threshold) {
  for (Left& left : search.left) left = {0, 0, 0};
  for (const TileSums& tile : search.tiles) {
    Left& left = search.left[tile.weight];
    int64_t below = tile.below;
    double dropped = tile.energy_below;
    for (const T* rank = collected + tile.at; rank < collected + tile.at + tile.inside; ++rank) {
      const bool smaller = *rank < threshold;
      below += smaller;
      dropped += smaller ? double(*rank) * double(*rank) : 0;
    }
    left.kept += tile.coefficients - below;
    left.dropped += dropped;
    left.energy += tile.energy;
  }
}

// Ends a pass: finishes the search, or narrows its range and sets up the next pass.
template <class T>
void conclude(Search<T>& search) {
  if (search.peak >= infinity_key<T>())
    return search.finish(std::numeric_limits<T>::quiet_NaN());
  const int64_t below = search.pass_below, inside = search.pass_inside;
  if (search.rank < below) {
    search.high = search.pass_low - 1;
    search.within = below - search.below;
  } else if (search.rank >= below + inside) {
    search.low = search.pass_high + 1;
    search.within -= below + inside - search.below;
    search.below = below + inside;
  } else if (search.pass_low == search.pass_high) {
    return search.finish(value_of<T>(search.pass_low));
  } else if (search.counting) {
    const int shift = bin_shift(search.pass_low, search.pass_high);
    int64_t before = below;
    int bin = 0;
    while (search.rank >= before + search.bins[bin]) before += search.bins[bin++];
    search.low = search.pass_low + (Key<T>(bin) << shift);
    search.high = std::min<Key<T>>(search.pass_high, search.low + ((Key<T>(1) << shift) - 1));
    search.below = before;
    search.within = search.bins[bin];
  } else if (inside <= search.capacity) {
    const int64_t rank = search.rank - below;
    // Selection reorders them.
    const std::vector<T> ranks(search.collected->get(),
                               search.collected->get() + (search.measures ? inside : 0));
    const T answer = select(search.collected->get(), inside, rank, rank).first;
    if (search.measures) tally(search, ranks.data(), answer);
    return search.finish(answer);
  } else {
    search.low = search.pass_low;
    search.high = search.pass_high;
    search.below = below;
    search.within = inside;
  }
  if (search.low == search.high) return search.finish(value_of<T>(search.low));
  search.pass_low = search.low;
  search.pass_high = search.high;
  search.counting = search.within > search.capacity;
}

// Searches whose passes run together have at most so many values, and collect at most so many, or
// there is only one.
constexpr int64_t kWaveValues = 1 << 22, kWaveCapacity = 1 << 16;

template <class T>
using Wave = std::span<const std::unique_ptr<Search<T>>>;

// Brackets the rank, or does a whole job where it is small: then many jobs keep the threads busy.
template <class T>
void start(Search<T>& search) {
  Buffers<T> buffers(*search.job);
  search.pass_low = search.low;
  search.pass_high = search.high;
  if (search.total > kSmall) return bracket(search, buffers);
  search.prepare();
  for_each_task(search, [&](const Task<T>& task) { run(task, buffers); });
  conclude(search);
}

// Starts all searches; each is one thread's task. Last first: the last layers are the largest.
template <class T>
void start_all(Wave<T> searches) {
  parallel_tasks(int64_t(searches.size()), [&](auto next) {
    for (int64_t i; (i = int64_t(searches.size()) - 1 - next()) >= 0;) start(*searches[i]);
  });
}

// Concludes the pass of the searches that `ended`, one a task, while other threads begin a pass
// over the weights of those of a wave that are not done; false where there is nothing to do.
template <class T>
bool run_pass(Wave<T> ended, Wave<T> wave) {
  std::vector<Search<T>*> open;
  for (const auto& search : ended)
    if (!search->done) open.push_back(search.get());
  std::vector<Task<T>> tasks;
  for (const auto& search : wave) {
    if (search->done) continue;
    search->prepare();
    for_each_task(*search, [&](const Task<T>& task) { tasks.push_back(task); });
  }
  const int64_t first = int64_t(open.size()), count = first + int64_t(tasks.size());
  parallel_tasks(count, [&](auto next) {
    const Search<T>* current = nullptr;
    std::unique_ptr<Buffers<T>> buffers;
    for (int64_t i; (i = next()) < count;) {
      if (i < first) {
        conclude(*open[i]);
        continue;
      }
      const Task<T>& task = tasks[i - first];
      if (task.search != current) {
        current = task.search;
        buffers = std::make_unique<Buffers<T>>(*current->job);
      }
      run(task, *buffers);
    }
  });
  return count > 0;
}

}  // namespace

template <class T>
std::vector<T> order_statistics(const std::vector<Job<T>>& jobs,
                                const std::vector<std::pair<int64_t, int64_t>>& wanted,
                                std::vector<std::vector<Left>>* left) {
  std::vector<std::unique_ptr<Search<T>>> searches;
  for (const auto& [job, rank] : wanted)
    searches.push_back(std::make_unique<Search<T>>(jobs[job], rank, left != nullptr));
  start_all<T>(searches);
  const auto capacity_of = [](Wave<T> wave) {
    int64_t sum = 0;
    for (const auto& search : wave) sum += search->done ? 0 : search->capacity;
    return sum;
  };
  int64_t most = kWaveCapacity;
  for (const auto& search : searches) most = std::max(most, search->capacity);
  Wave<T> ended;
  for (size_t begin = 0; begin < searches.size() || !ended.empty();) {
    size_t end = begin;
    for (int64_t values = 0, capacity = 0; end < searches.size(); ++end) {
      const Search<T>& search = *searches[end];
      values += search.done ? 0 : search.job->values;
      capacity += search.done ? 0 : search.capacity;
      if (end > begin && (values > kWaveValues || capacity > kWaveCapacity)) break;
    }
    const Wave<T> next(searches.data() + begin, end - begin);
    // Both hold what they collect at the same time only where that is no more than the largest does.
    const bool together = capacity_of(ended) + capacity_of(next) <= most;
    run_pass(ended, together ? next : Wave<T>{});
    // Where a bracket missed.
    while (run_pass<T>({}, ended)) run_pass<T>(ended, {});
    if (!together) run_pass<T>({}, next);
    ended = next;
    begin = end;
  }
  std::vector<T> answers;
  for (const auto& search : searches) {
    answers.push_back(search->answer);
    if (left != nullptr) left->push_back(std::move(search->left));
  }
  return answers;
}

template std::vector<float> order_statistics(const std::vector<Job<float>>&,
                                             const std::vector<std::pair<int64_t, int64_t>>&,
                                             std::vector<std::vector<Left>>*);
template std::vector<double> order_statistics(const std::vector<Job<double>>&,
                                              const std::vector<std::pair<int64_t, int64_t>>&,
                                              std::vector<std::vector<Left>>*);

}  // namespace wavprune

// Exact order statistics of |C| over one or many weights, without storing C.
//
// A sample brackets the wanted rank; one pass counts what lies below the bracket and collects the
// few percent inside it; among those the same is done again (Floyd and Rivest 1975, "Expected time
// bounds for selection"). Where the bracket missed, or holds too much (ties, heavy tails), passes
// that only count narrow it by 4096 a time. What is found is the order statistic itself, so it
// depends on no sample, thread or chunk.
//
// Bytes: every weight is read once. Operations: the transform, and about ten instructions for each
// register of coefficients.

#include "select.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <span>

namespace wavprune {
namespace {

constexpr int kBins = 4096;
// Layers that one thread does whole: what is collected of any layer may be as large.
constexpr int64_t kSmall = kTile;
// Values that are collected of a layer at least.
constexpr int64_t kLeast = 4096;
// How many standard deviations of the sample's rank fit in the bracket on either side.
constexpr double kSigmas = 3;
// Kernels of a sample that are on their way while one is read.
constexpr size_t kAhead = 12;

template <class T>
using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Magnitudes order as their bit patterns do.
template <class T>
Key<T> key_of(T value) {
  Key<T> key;
  std::memcpy(&key, &value, sizeof key);
  return key;
}
template <class T>
T value_of(Key<T> key) {
  T value;
  std::memcpy(&value, &key, sizeof value);
  return value;
}
template <class T>
Key<T> infinity_key() {
  return key_of(std::numeric_limits<T>::infinity());
}

// Bits to drop so that the keys from low to high fall into at most kBins bins.
template <class K>
int shift_for(K low, K high) {
  int shift = 0;
  while (((high - low) >> shift) >= kBins) ++shift;
  return shift;
}

// Where in a sorted sample the bracket of a quantile ends: `sigmas` standard deviations of the
// quantile's rank to either side.
struct Bracket {
  int64_t from, to;
};
Bracket bracket_of(int64_t sample, double quantile, double sigmas) {
  const double middle = quantile * double(sample);
  const double spread = sigmas * std::sqrt(double(sample) * quantile * (1 - quantile)) + 2;
  return {int64_t(std::floor(middle - spread)), int64_t(std::ceil(middle + spread))};
}

// The values of two ranks, first <= second. Reorders and overwrites the values, which have room for
// a vector more.
template <class T>
std::pair<T, T> select(T* values, int64_t count, int64_t first, int64_t second) {
  constexpr int kSample = 128;
  Plan<T> identity{};
  identity.inputs = identity.outputs = 1;
  const Scratch<T> scratch(scratch_values(identity));
  const auto scan = [&](T low, T high, T* out) {
    Scan<T> found{low, high, out, 0, 0, 0};
    passes<T>().scan(identity, values, count, scratch.get(), &found);
    return found;
  };
  while (count > 8 * kSample) {
    T sample[kSample];
    for (int64_t i = 0; i < kSample; ++i) sample[i] = values[i * count / kSample];
    std::sort(sample, sample + kSample);
    const int64_t from = bracket_of(kSample, double(first) / double(count), 3).from;
    const int64_t to = bracket_of(kSample, double(second) / double(count), 3).to;
    const T low = from < 0 ? T(0) : sample[from];
    const T high = to >= kSample ? std::numeric_limits<T>::max() : sample[to];
    // Counted first, with nothing inside: what is inside overwrites the rest.
    T none[kLanes];
    const int64_t below = scan(low, T(-1), none).below;
    const int64_t upto = scan(value_of<T>(key_of(high) + 1), T(-1), none).below;
    if (first < below || second >= upto) break;
    if (low == high) return {low, high};
    if (upto - below > count / 2) break;
    count = scan(low, high, values).inside;
    first -= below;
    second -= below;
  }
  std::nth_element(values, values + first, values + count);
  const T low = values[first];
  std::nth_element(values + first, values + second, values + count);
  return {low, values[second]};
}

template <class T>
struct Search {
  const Job<T>* job;
  int64_t rank, total, capacity;
  // All that is wanted has a key in [low, high]: `below` have smaller ones, `within` are inside.
  Key<T> low = 0, high = infinity_key<T>() - 1;
  int64_t below = 0, within;
  // The range of this pass, inside [low, high].
  Key<T> pass_low, pass_high;
  bool counting = false, done = false;
  T answer = 0;
  std::unique_ptr<Scratch<T>> collected;
  std::vector<int64_t> bins;
  // Shared by the threads of a pass.
  std::atomic<int64_t> pass_below{0}, pass_inside{0};
  std::atomic<uint64_t> peak{0};
  std::mutex bins_lock;

  Search(const Job<T>& j, int64_t r) : job(&j), rank(r), total(j.total), within(j.total) {
    // At most 5% of the largest weight in float32: less where the sample of the next search comes on
    // top, which has no room beside many weights. Of a layer that one thread does whole, all.
    const int64_t part = (j.pieces.size() > 1 ? 20 : 25) * int64_t(sizeof(T));
    int64_t largest = 0;
    for (const Piece<T>& piece : j.pieces)
      largest = std::max(largest, piece.weight.kernels() * piece.weight.values());
    capacity = std::max<int64_t>(kLeast, largest * int64_t(sizeof(float)) / part);
    if (total <= kSmall) capacity = kTile;
  }

  void finish(T value) {
    answer = value;
    done = true;
    collected.reset();
    bins = {};
  }
  void prepare() {
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
  const Piece<T>* piece;
  int64_t first, kernels;
};

// Ranks of one tile in [low, high], into `ranks`; see Scan.
template <class T>
Scan<T> scan_tile(const Piece<T>& piece, int64_t first, int64_t kernels, T low, T high, T* buffer,
                  T* scratch, T* ranks) {
  Scan<T> scan{low, high, ranks, 0, 0, 0};
  const T* tile = load_tile(piece.weight, first, kernels, buffer);
  if (piece.draw) tile = draw_ranks(piece, first, kernels, tile, buffer);
  passes<T>().scan(*piece.plan, tile, pass_kernels(piece.weight, *piece.plan, kernels), scratch,
                   &scan);
  return scan;
}

template <class T>
struct Buffers {
  Scratch<T> tile, scratch, ranks;
  explicit Buffers(const Job<T>& job)
      : tile(largest(job, [](const Piece<T>& p) { return tile_values(p.weight, *p.plan); })),
        scratch(largest(job, [](const Piece<T>& p) { return scratch_values(*p.plan); })),
        ranks(largest(job, [](const Piece<T>& p) { return tile_values(p.weight, *p.plan); })) {}
  template <class F>
  static int64_t largest(const Job<T>& job, F size) {
    int64_t result = 0;
    for (const Piece<T>& piece : job.pieces) result = std::max(result, size(piece));
    return result + kLanes;
  }
};

// Adds a tile's share to the pass of its search.
template <class T>
void run(const Task<T>& task, Buffers<T>& buffers) {
  Search<T>& search = *task.search;
  T* ranks = buffers.ranks.get();
  const Scan<T> scan =
      scan_tile(*task.piece, task.first, task.kernels, value_of<T>(search.pass_low),
                value_of<T>(search.pass_high), buffers.tile.get(), buffers.scratch.get(), ranks);
  search.pass_below.fetch_add(scan.below, std::memory_order_relaxed);
  const int64_t at = search.pass_inside.fetch_add(scan.inside, std::memory_order_relaxed);
  for (uint64_t seen = search.peak.load(); seen < scan.peak;)
    if (search.peak.compare_exchange_weak(seen, scan.peak)) break;
  if (search.counting) {
    const int shift = shift_for(search.pass_low, search.pass_high);
    std::vector<int32_t> bins(kBins);
    for (int64_t i = 0; i < scan.inside; ++i)
      ++bins[(key_of(ranks[i]) - search.pass_low) >> shift];
    const std::lock_guard<std::mutex> hold(search.bins_lock);
    for (int b = 0; b < kBins; ++b) search.bins[b] += bins[b];
  } else if (at + scan.inside <= search.capacity) {
    std::memcpy(search.collected->get() + at, ranks, scan.inside * sizeof(T));
  }
}

// Brackets the rank by a sample of kernels, one drawn at random from each of many even strides: a
// run of neighbours would tell of one filter only.
template <class T>
void bracket(Search<T>& search, Buffers<T>& buffers) {
  const Job<T>& job = *search.job;
  // As many as make the sample as dear as what the bracket lets through, and enough for that to fit.
  const double room = double(search.capacity) / double(search.total);
  const double cheap = 0.7 * std::pow(double(search.total), 2.0 / 3.0);
  const double fitting = std::pow(kSigmas / (0.8 * room), 2);
  // An expansive basis may ask for more than there is room for; passes that count do without.
  const double wanted = std::max(cheap, std::min(fitting, double(search.capacity)));
  std::vector<T> sample;
  for (const Piece<T>& piece : job.pieces) {
    const int64_t K = piece.weight.values(), kernels = piece.weight.kernels();
    const int64_t outputs = piece.plan->kind == Kind::identity ? K : piece.plan->outputs;
    // At least a cache line a time.
    const int64_t run = std::min<int64_t>((kLanes + K - 1) / K, kernels);
    const double share = double(coefficients(piece.weight, *piece.plan)) / double(search.total);
    const int64_t picks = std::max<int64_t>(int64_t(share * wanted) / (run * outputs), 1);
    const int64_t stride = std::max<int64_t>(kernels / picks, run);
    Scratch<T> gathered((kernels / stride + 1) * run * K);
    std::vector<int64_t> places;
    uint64_t state = 0x9E3779B97F4A7C15u;
    for (int64_t at = 0; at + stride <= kernels; at += stride) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      places.push_back(at + int64_t(((state >> 33) * uint64_t(stride - run + 1)) >> 31));
    }
    int64_t taken = 0;
    for (size_t i = 0; i < places.size(); ++i) {
      // Far apart, so that each would wait for memory.
      if (i + kAhead < places.size()) prefetch_tile<T>(piece.weight, places[i + kAhead], run);
      T* one = buffers.tile.get();
      const T* values = load_tile(piece.weight, places[i], run, one);
      if (piece.draw) values = draw_ranks(piece, places[i], run, values, one);
      std::copy(values, values + run * K, gathered.get() + taken * K);
      taken += run;
    }
    const size_t held = sample.size();
    sample.resize(held + taken * outputs + kLanes);
    Scan<T> scan{T(0), value_of<T>(infinity_key<T>() - 1), sample.data() + held, 0, 0, 0};
    passes<T>().scan(*piece.plan, gathered.get(), pass_kernels(piece.weight, *piece.plan, taken),
                     buffers.scratch.get(), &scan);
    sample.resize(held + scan.inside);
  }
  const int64_t size = int64_t(sample.size());
  if (size == 0) return;
  const Bracket ends = bracket_of(size, double(search.rank) / double(search.total), kSigmas);
  sample.resize(size + kLanes);
  const auto [low, high] = select(sample.data(), size, std::max<int64_t>(ends.from, 0),
                                  std::min(ends.to, size - 1));
  // Zeros are many in a layer that was pruned before: counted, not collected.
  if (ends.from > 0) search.pass_low = std::max<Key<T>>(key_of(low), 1);
  if (ends.to < size - 1) search.pass_high = key_of(high);
}

// Draws the conclusions of a pass; sets up the next one where the search goes on.
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
    const int shift = shift_for(search.pass_low, search.pass_high);
    int64_t before = below;
    int bin = 0;
    while (search.rank >= before + search.bins[bin]) before += search.bins[bin++];
    search.low = search.pass_low + (Key<T>(bin) << shift);
    search.high = std::min<Key<T>>(search.pass_high, search.low + ((Key<T>(1) << shift) - 1));
    search.below = before;
    search.within = search.bins[bin];
  } else if (inside <= search.capacity) {
    const int64_t rank = search.rank - below;
    return search.finish(select(search.collected->get(), inside, rank, rank).first);
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

// Searches that run together: enough to keep the threads busy, few enough to bound the memory.
constexpr int64_t kWave = 1 << 21, kRoom = 1 << 17;

template <class T>
using Wave = std::span<const std::unique_ptr<Search<T>>>;

// Brackets the rank; does a small layer whole, since many of them keep all threads busy.
template <class T>
void start(Search<T>& search) {
  Buffers<T> buffers(*search.job);
  search.pass_low = search.low;
  search.pass_high = search.high;
  if (search.total > kSmall) return bracket(search, buffers);
  search.prepare();
  for (const Piece<T>& piece : search.job->pieces)
    each_tile(piece, [&](int64_t first, int64_t kernels) {
      run(Task<T>{&search, &piece, first, kernels}, buffers);
    });
  conclude(search);
}

// Starts one wave and concludes the pass of another: both are one thread's work a layer.
template <class T>
void turn(Wave<T> starting, Wave<T> ending) {
  share_out(int64_t(starting.size() + ending.size()), [&](auto next) {
    for (size_t i; (i = size_t(next())) < starting.size() + ending.size();) {
      if (i < starting.size())
        start(*starting[i]);
      else if (Search<T>& search = *ending[i - starting.size()]; !search.done)
        conclude(search);
    }
  });
}

// One pass over the weights of the searches that go on; false where none does.
template <class T>
bool pass(Wave<T> wave) {
  std::vector<Task<T>> tasks;
  for (const auto& search : wave) {
    if (search->done) continue;
    search->prepare();
    for (const Piece<T>& piece : search->job->pieces)
      each_tile(piece, [&](int64_t first, int64_t kernels) {
        tasks.push_back({search.get(), &piece, first, kernels});
      });
  }
  share_out(int64_t(tasks.size()), [&](auto next) {
    const Search<T>* current = nullptr;
    std::unique_ptr<Buffers<T>> buffers;
    for (int64_t i; (i = next()) < int64_t(tasks.size());) {
      if (tasks[i].search != current) {
        current = tasks[i].search;
        buffers = std::make_unique<Buffers<T>>(*current->job);
      }
      run(tasks[i], *buffers);
    }
  });
  return !tasks.empty();
}

}  // namespace

template <class T>
std::vector<T> order_statistics(const std::vector<Job<T>>& jobs,
                                const std::vector<std::pair<int64_t, int64_t>>& wanted) {
  std::vector<std::unique_ptr<Search<T>>> searches;
  for (const auto& [job, rank] : wanted)
    searches.push_back(std::make_unique<Search<T>>(jobs[job], rank));
  Wave<T> wave;
  for (size_t begin = 0; begin < searches.size() || !wave.empty();) {
    size_t end = begin;
    for (int64_t weights = 0, room = 0; end < searches.size(); ++end) {
      const Search<T>& search = *searches[end];
      weights += search.job->weights_total;
      room += search.total > kSmall ? search.capacity : 0;
      if (end > begin && (weights > kWave || room > kRoom)) break;
    }
    const Wave<T> following(searches.data() + begin, end - begin);
    turn(following, wave);
    while (pass(wave)) turn<T>({}, wave);
    pass(following);
    wave = following;
    begin = end;
  }
  std::vector<T> answers;
  for (const auto& search : searches) answers.push_back(search->answer);
  return answers;
}

template std::vector<float> order_statistics(const std::vector<Job<float>>&,
                                             const std::vector<std::pair<int64_t, int64_t>>&);
template std::vector<double> order_statistics(const std::vector<Job<double>>&,
                                              const std::vector<std::pair<int64_t, int64_t>>&);

}  // namespace wavprune

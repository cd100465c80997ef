// The passes on heap buffers of exactly the sizes that they promise, checked against plain loops.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "../../csrc/cpu/passes.h"
#include "../../csrc/random.h"

using namespace wavprune;

namespace {

template <class T>
struct Aligned {
  explicit Aligned(int64_t count)
      : data(static_cast<T*>(operator new[](count * sizeof(T), std::align_val_t(64)))) {}
  ~Aligned() { operator delete[](data, std::align_val_t(64)); }
  T* data;
};

void require(bool fine, const char* what, const char* set, int kind, int64_t kernels) {
  if (fine) return;
  std::printf("sanitize: %s is wrong (%s, kind %d, %ld kernels)\n", what, set, kind, long(kernels));
  std::exit(1);
}

// An orthonormal axis of three: its transpose is its inverse.
template <class T>
struct Basis {
  std::vector<T> rows, back;
  std::vector<T> entries, back_entries;
  std::vector<int> starts, columns;
  Plan<T> plan{};

  explicit Basis(Kind kind) {
    const double half = std::sqrt(0.5), third = std::sqrt(1 / 3.0), sixth = std::sqrt(1 / 6.0);
    const double pairs[9] = {half, half, 0, 0, 0, 1, half, -half, 0};
    const double merges[9] = {third, third, third, sixth, sixth, -2 * sixth, half, -half, 0};
    const double* axis = kind == Kind::pairs ? pairs : merges;
    for (int i = 0; i < 9; ++i) rows.push_back(T(axis[i]));
    for (int i = 0; i < 9; ++i) back.push_back(T(axis[(i % 3) * 3 + i / 3]));
    for (int m = 0; m < 9; ++m) {
      starts.push_back(9 * m);
      for (int k = 0; k < 9; ++k) {
        columns.push_back(k);
        entries.push_back(T(axis[(m / 3) * 3 + k / 3] * axis[(m % 3) * 3 + k % 3]));
        back_entries.push_back(T(axis[(k / 3) * 3 + m / 3] * axis[(k % 3) * 3 + m % 3]));
      }
    }
    starts.push_back(81);
    plan.kind = kind;
    plan.inputs = plan.outputs = kind == Kind::identity ? 1 : 9;
    plan.forward_axes = {3, 3, 3, 3, rows.data(), rows.data()};
    plan.inverse_axes = {3, 3, 3, 3, back.data(), back.data()};
    plan.forward_matrix = {9, starts.data(), columns.data(), entries.data()};
    plan.inverse_matrix = {9, starts.data(), columns.data(), back_entries.data()};
    double scales[3];
    if (kind == Kind::pairs) {
      scales[0] = scales[2] = half;
      scales[1] = 1;
    } else {
      scales[0] = third;
      scales[1] = sixth;
      scales[2] = half;
    }
    for (int i = 0; i < 9; ++i)
      plan.forward_scale[i] = plan.inverse_scale[i] = T(scales[i / 3] * scales[i % 3]);
  }
};

template <class T>
void run(const char* name, const Passes<T>& passes, Kind kind, int64_t kernels) {
  const Basis<T> basis(kind);
  const Plan<T>& plan = basis.plan;
  const int64_t count = kernels * plan.inputs;
  std::vector<T> x(count), ranks(count + kLanes), c(count), y(count);
  for (int64_t i = 0; i < count; ++i) x[i] = T(std::sin(double(i * i + 1)));
  Aligned<T> scratch(scratch_values(plan));
  const int k = int(kind);
  passes.forward(plan, x.data(), kernels, scratch.data, c.data());
  passes.inverse(plan, c.data(), kernels, scratch.data, y.data());
  for (int64_t i = 0; i < count; ++i)
    require(std::abs(x[i] - y[i]) < 1e-5, "a round trip", name, k, kernels);
  Scan<T> scan{T(0.25), T(0.5), ranks.data(), 0, 0, 0, 0, 0};
  passes.scan(plan, x.data(), kernels, scratch.data, &scan);
  int64_t below = 0, inside = 0, kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    below += std::abs(c[i]) < T(0.25);
    inside += std::abs(c[i]) >= T(0.25) && std::abs(c[i]) <= T(0.5);
    kept += std::abs(c[i]) >= T(0.25);
  }
  require(scan.below == below && scan.inside == inside, "a scan", name, k, kernels);
  passes.scan_energy(plan, x.data(), kernels, scratch.data, &scan);
  double energy_below = 0, energy = 0;
  for (int64_t i = 0; i < count; ++i) {
    energy += double(c[i]) * double(c[i]);
    energy_below += std::abs(c[i]) < T(0.25) ? double(c[i]) * double(c[i]) : 0;
  }
  require(scan.below == below && scan.inside == inside, "a scan of squares", name, k, kernels);
  require(std::abs(scan.energy_below - energy_below) < 1e-5 * (energy + 1) &&
              std::abs(scan.energy - energy) < 1e-5 * (energy + 1),
          "a sum of squares", name, k, kernels);
  std::vector<T> pruned = x;
  Change<T> change{};
  passes.prune(plan, pruned.data(), kernels, scratch.data, T(0.25), &change);
  double error = 0;
  for (int64_t i = 0; i < count; ++i)
    error += double(x[i] - pruned[i]) * double(x[i] - pruned[i]);
  require(change.kept == kept, "a count", name, k, kernels);
  require(std::abs(change.squared_error - error) < 1e-4 * (error + 1), "an error", name, k,
          kernels);
  std::vector<MaskWord> mask((kernels + kLanes - 1) / kLanes * plan.outputs);
  passes.mark(plan, x.data(), kernels, scratch.data, T(0.25), mask.data());
  std::vector<T> projected = x, by_mask = x;
  passes.project(plan, projected.data(), kernels, scratch.data, mask.data());
  Change<T> mask_change{};
  passes.prune_by_mask(plan, by_mask.data(), kernels, scratch.data, mask.data(), &mask_change);
  require(projected == pruned && by_mask == pruned, "a projection", name, k, kernels);
  require(mask_change.kept == change.kept && mask_change.zeros == change.zeros &&
              mask_change.squared_error == change.squared_error &&
              mask_change.squared_norm == change.squared_norm,
          "what a mask changed", name, k, kernels);
}

// Values of which the first has the index `first`, some of them 0.
template <class T>
void run_at_random(const char* name, const Passes<T>& passes, uint64_t first, int64_t count) {
  constexpr uint64_t kSeed = 12345;
  constexpr double kThreshold = 0.4;
  std::vector<T> x(count), ranks(count + kLanes);
  int64_t zeros = 0, kept = 0, inside = 0;
  double error = 0, norm = 0;
  std::vector<bool> keep(count);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = i % 7 == 3 ? T(0) : T(std::sin(double(i + 1)));
    keep[i] = x[i] != 0 && random_rank(first + uint64_t(i), kSeed) >= kThreshold;
    kept += keep[i];
    zeros += !keep[i];
    inside += x[i] != 0;
    norm += double(x[i]) * double(x[i]);
    error += keep[i] ? 0 : double(x[i]) * double(x[i]);
  }
  // All ranks but those of 0.
  const T least = std::numeric_limits<T>::denorm_min(), most = std::numeric_limits<T>::max();
  Scan<T> scan{least, most, ranks.data(), 0, 0, 0, 0, 0};
  passes.scan_at_random(x.data(), count, first, kSeed, &scan);
  require(scan.below == count - inside && scan.inside == inside, "a random scan", name, 0, count);
  std::vector<MaskWord> mask((count + kLanes - 1) / kLanes);
  passes.mark_at_random(x.data(), count, first, kSeed, kThreshold, mask.data());
  for (int64_t i = 0; i < count; ++i)
    require((mask[i / kLanes] >> i % kLanes & 1) == unsigned(keep[i]), "a random mask", name, 0,
            count);
  std::vector<T> pruned = x;
  Change<T> change{};
  passes.prune_at_random(pruned.data(), count, first, kSeed, kThreshold, &change);
  for (int64_t i = 0; i < count; ++i)
    require(pruned[i] == (keep[i] ? x[i] : T(0)), "random pruning", name, 0, count);
  require(change.kept == kept && change.zeros == zeros, "a random count", name, 0, count);
  require(std::abs(change.squared_error - error) < 1e-9 * (error + 1) &&
              std::abs(change.squared_norm - norm) < 1e-9 * (norm + 1),
          "what random pruning changed", name, 0, count);
}

template <class T>
void run_gram(const char* name, const Passes<T>& passes, int K, int64_t kernels) {
  std::vector<T> x(kernels * K);
  for (int64_t i = 0; i < kernels * K; ++i) x[i] = T(std::sin(double(i * i + 1)));
  std::vector<double> gram(K * K, 0.5);
  Aligned<double> scratch(gram_values(K));
  passes.gram(x.data(), kernels, K, scratch.data, gram.data());
  for (int i = 0; i < K; ++i)
    for (int j = i; j < K; ++j) {
      double sum = 0.5;
      for (int64_t n = 0; n < kernels; ++n) sum += double(x[n * K + i]) * double(x[n * K + j]);
      require(std::abs(gram[i * K + j] - sum) < 1e-12 * double(kernels + 1), "a Gram matrix", name,
              K, kernels);
    }
}

void check_the_generator() {
  for (uint32_t above = 0; above < 3; ++above) {
    const RandomKeys keys = random_keys(77, above);
    for (uint32_t i = 0; i < 100000; ++i) {
      const uint32_t index = i * 42949u;
      const uint32_t high = random_high(index, keys);
      require(index_of_high(high, keys) == index, "the inverse of the generator", "-", 0, i);
      const double rank = rank_of_high(high, keys);
      require(high_at_threshold(rank, keys) == high &&
                  high_at_threshold(std::nextafter(rank, 1.0), keys) == uint64_t(high) + 1,
              "the high word of a threshold", "-", 0, i);
    }
    require(high_at_threshold(0, keys) == 0 && high_at_threshold(1, keys) == uint64_t(1) << 32 &&
                high_at_threshold(HUGE_VAL, keys) == uint64_t(1) << 32,
            "the high word of an end", "-", 0, 0);
  }
}

}  // namespace

int main() {
  check_the_generator();
  int sets = 0;
  for (const InstructionSet* set :
       {instructions_v4(), instructions_v3(), instructions_baseline()}) {
    if (set == nullptr) continue;
    ++sets;
    for (const Kind kind :
         {Kind::identity, Kind::separable, Kind::general, Kind::pairs, Kind::merges})
      for (int64_t kernels = 0; kernels <= 50; ++kernels) {
        run<float>(set->name, set->f32, kind, kernels);
        if (kind != Kind::pairs && kind != Kind::merges)
          run<double>(set->name, set->f64, kind, kernels);
      }
    for (int64_t count = 0; count <= 70; ++count)
      for (const uint64_t first : {uint64_t(0), uint64_t(1000), (uint64_t(3) << 32) - 32}) {
        run_at_random<float>(set->name, set->f32, first, count);
        run_at_random<double>(set->name, set->f64, first, count);
      }
    for (const int K : {1, 2, 4, 9, 25, 300})
      for (int64_t kernels = 0; kernels <= 600; kernels += 1 + kernels / 3) {
        run_gram<float>(set->name, set->f32, K, kernels);
        run_gram<double>(set->name, set->f64, K, kernels);
      }
  }
  std::printf("sanitize: passes of %d instruction sets are clean\n", sets);
}

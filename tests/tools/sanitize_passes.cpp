// The passes on heap buffers of exactly the sizes that they promise, checked against plain loops.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
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

int size_of(Element element) {
  return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

// Eighths up to 15: every type has them exactly.
double eighths(int64_t i) { return double((i * 7919) % 241 - 120) / 8; }

void put(Element element, char* p, double value) {
  const float single = float(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  // Of float16, normal numbers and 0.
  const uint16_t half = uint16_t((bits >> 16 & 0x8000) |
                                 (value == 0 ? 0 : ((bits & 0x7FFFFFFF) - 0x38000000) >> 13));
  const uint16_t brain = uint16_t(bits >> 16);
  switch (element) {
    case Element::float32:
      std::memcpy(p, &single, 4);
      return;
    case Element::float64:
      std::memcpy(p, &value, 8);
      return;
    case Element::float16:
      std::memcpy(p, &half, 2);
      return;
    case Element::bfloat16:
      std::memcpy(p, &brain, 2);
  }
}

// How kernels of K values lie in memory: [0] those of a contiguous weight, [1] with all values k
// side by side, in rows of so many kernels, [2] rows side by side, [3] with a gap after each.
struct Layout {
  int64_t rows, row_kernels, row_stride, kernel_stride, elements;
  std::vector<int64_t> offsets;

  Layout(int number, int64_t rows_, int64_t row_kernels_, int64_t K)
      : rows(rows_), row_kernels(row_kernels_) {
    const int64_t gap = number == 3 ? 2 : 1;
    row_stride = number == 2 ? 1 : row_kernels * K * gap;
    kernel_stride = number == 1 ? 1 : number == 2 ? rows * K : K * gap;
    const int64_t value_stride = number == 1 ? row_kernels : number == 2 ? rows : gap;
    for (int64_t k = 0; k < K; ++k) offsets.push_back(k * value_stride);
    elements = kernels() == 0 ? 0
                              : (rows - 1) * row_stride + (row_kernels - 1) * kernel_stride +
                                    offsets.back() + 1;
  }
  int64_t kernels() const { return rows * row_kernels; }
  int64_t at(int64_t n, int64_t k) const {
    return n / row_kernels * row_stride + n % row_kernels * kernel_stride + offsets[k];
  }
  Strided strided(std::vector<char>& memory, Element element) const {
    const int64_t K = int64_t(offsets.size());
    return {memory.data(), element, row_kernels, row_stride, kernel_stride, K, offsets.data(),
            offsets.back() == K - 1};
  }
};

// Loads and stores of any kernels of any layout.
template <class T>
void move(const char* name, const Passes<T>& passes, Element element, int number, int64_t rows,
          int64_t row_kernels, int64_t K) {
  const Layout layout(number, rows, row_kernels, K);
  std::vector<char> memory(layout.elements * size_of(element));
  for (int64_t n = 0; n < layout.kernels(); ++n)
    for (int64_t k = 0; k < K; ++k)
      put(element, memory.data() + layout.at(n, k) * size_of(element), eighths(n * K + k));
  const std::vector<char> before = memory;
  const Strided strided = layout.strided(memory, element);
  for (int64_t first = 0; first < layout.kernels(); first += 16)
    for (const int64_t count : {int64_t(1), int64_t(37), layout.kernels() - first}) {
      if (first + count > layout.kernels()) continue;
      for (const Form form : {Form::flat, Form::lanes}) {
        std::vector<T> buffer(buffer_values(count, K));
        passes.load(strided, first, count, form, buffer.data());
        for (int64_t i = 0; i < count * K; ++i) {
          const int64_t n = i / K, k = i % K;
          const T value = form == Form::flat
                              ? buffer[i]
                              : buffer[(n / kLanes * K + k) * kLanes + n % kLanes];
          require(value == T(eighths(first * K + i)), "a load", name, number, count);
        }
        // What comes back is what was there.
        std::memset(memory.data(), 0, memory.size());
        passes.store(strided, first, count, form, buffer.data());
        for (int64_t i = 0; i < count * K; ++i) {
          const int64_t at = layout.at(first + i / K, i % K) * size_of(element);
          require(std::memcmp(&memory[at], &before[at], size_of(element)) == 0, "a store", name,
                  number, count);
        }
        memory = before;
      }
      std::vector<T> picked(count * K);
      passes.pick(strided, first, count, picked.data());
      for (int64_t i = 0; i < count * K; ++i)
        require(picked[i] == T(eighths(first * K + i)), "a pick", name, number, count);
    }
}

template <class T>
void run(const char* name, const Passes<T>& passes, Kind kind, Element element, bool in_lanes,
         int64_t kernels) {
  const Basis<T> basis(kind);
  const Plan<T>& plan = basis.plan;
  const int64_t K = plan.inputs, count = kernels * K;
  std::vector<T> x(count), ranks(count + kLanes), c(count), y(count);
  for (int64_t i = 0; i < count; ++i) x[i] = T(eighths(i));
  Aligned<T> scratch(scratch_values(plan));
  const int k = int(kind);
  passes.forward(plan, x.data(), kernels, scratch.data, c.data());
  passes.inverse(plan, c.data(), kernels, scratch.data, y.data());
  for (int64_t i = 0; i < count; ++i)
    require(std::abs(x[i] - y[i]) < 1e-5, "a round trip", name, k, kernels);
  // In lanes, a row of all kernels for each value.
  std::vector<int64_t> offsets;
  for (int64_t j = 0; j < K; ++j) offsets.push_back(j * kernels);
  const auto stored = [&] {
    std::vector<char> memory(count * size_of(element));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = in_lanes ? offsets[i % K] + i / K : i;
      put(element, memory.data() + at * size_of(element), double(x[i]));
    }
    return memory;
  };
  const auto tile_of = [&](std::vector<char>& memory) {
    return Tile{memory.data(), element, element, 1, kernels, 0,
                kLanes * (in_lanes ? 1 : K), in_lanes ? Form::lanes : Form::flat, offsets.data()};
  };
  std::vector<char> pruned = stored(), projected = stored(), by_mask = stored();
  Scan<T> scan{T(2.3), T(4.7), ranks.data(), 0, 0, 0, 0, 0};
  passes.scan(plan, tile_of(pruned), scratch.data, &scan);
  int64_t below = 0, inside = 0, kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    below += std::abs(c[i]) < T(2.3);
    inside += std::abs(c[i]) >= T(2.3) && std::abs(c[i]) <= T(4.7);
    kept += std::abs(c[i]) >= T(2.3);
  }
  require(scan.below == below && scan.inside == inside, "a scan", name, k, kernels);
  passes.scan_energy(plan, tile_of(pruned), scratch.data, &scan);
  double energy_below = 0, energy = 0;
  for (int64_t i = 0; i < count; ++i) {
    energy += double(c[i]) * double(c[i]);
    energy_below += std::abs(c[i]) < T(2.3) ? double(c[i]) * double(c[i]) : 0;
  }
  require(scan.below == below && scan.inside == inside, "a scan of squares", name, k, kernels);
  require(std::abs(scan.energy_below - energy_below) < 1e-5 * (energy + 1) &&
              std::abs(scan.energy - energy) < 1e-5 * (energy + 1),
          "a sum of squares", name, k, kernels);
  Change<T> change{};
  passes.prune(plan, tile_of(pruned), scratch.data, T(2.3), &change);
  std::vector<T> after(count);
  Layout layout(0, 1, kernels, K);
  layout.kernel_stride = in_lanes ? 1 : K;
  if (in_lanes) layout.offsets = offsets;
  if (kernels > 0)
    passes.pick(layout.strided(pruned, element), 0, kernels, after.data());
  double error = 0;
  int64_t zeros = 0;
  for (int64_t i = 0; i < count; ++i) {
    error += double(x[i] - after[i]) * double(x[i] - after[i]);
    zeros += after[i] == 0;
  }
  require(change.kept == kept && change.zeros == zeros, "a count", name, k, kernels);
  require(std::abs(change.squared_error - error) < 1e-4 * (error + 1), "an error", name, k,
          kernels);
  std::vector<MaskWord> mask((kernels + kLanes - 1) / kLanes * plan.outputs);
  std::vector<char> original = stored();
  passes.mark(plan, tile_of(original), scratch.data, T(2.3), mask.data());
  passes.project(plan, tile_of(projected), scratch.data, mask.data());
  Change<T> mask_change{};
  passes.prune_by_mask(plan, tile_of(by_mask), scratch.data, mask.data(), &mask_change);
  require(original == stored(), "a mask", name, k, kernels);
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

constexpr Element kElements[] = {Element::float32, Element::float64, Element::float16,
                                 Element::bfloat16};

template <class T>
void run_all(const char* name, const Passes<T>& passes) {
  for (const Kind kind :
       {Kind::identity, Kind::separable, Kind::general, Kind::pairs, Kind::merges})
    for (int64_t kernels = 0; kernels <= 50; ++kernels)
      for (const Element element : kElements) {
        run<T>(name, passes, kind, element, false, kernels);
        if (kind != Kind::identity) run<T>(name, passes, kind, element, true, kernels);
      }
  // More than a group of blocks of the identity.
  for (const int64_t kernels : {255, 256, 257, 700})
    run<T>(name, passes, Kind::identity, Element::bfloat16, false, kernels);
  for (const Element element : kElements)
    for (int number = 0; number < 4; ++number)
      for (const auto& [rows, row_kernels] :
           {std::pair{1, 1}, {1, 50}, {3, 16}, {20, 3}, {33, 17}, {16, 32}})
        for (const int64_t K : {1, 3, 9, 25})
          move<T>(name, passes, element, number, rows, row_kernels, K);
}

}  // namespace

int main() {
  check_the_generator();
  int sets = 0;
  for (const InstructionSet* set :
       {instructions_v4(), instructions_v3(), instructions_baseline()}) {
    if (set == nullptr) continue;
    ++sets;
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
    run_all(set->name, set->f32);
    run_all(set->name, set->f64);
  }
  std::printf("sanitize: passes of %d instruction sets are clean\n", sets);
}

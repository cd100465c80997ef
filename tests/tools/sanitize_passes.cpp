// The passes on heap buffers of exactly the sizes that they promise, checked against plain loops.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "../../csrc/cpu/passes.h"

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
  Scan<T> scan{T(2.3), T(4.7), ranks.data(), 0, 0, 0};
  passes.scan(plan, tile_of(pruned), scratch.data, &scan);
  int64_t below = 0, inside = 0, kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    below += std::abs(c[i]) < T(2.3);
    inside += std::abs(c[i]) >= T(2.3) && std::abs(c[i]) <= T(4.7);
    kept += std::abs(c[i]) >= T(2.3);
  }
  require(scan.below == below && scan.inside == inside, "a scan", name, k, kernels);
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
  int sets = 0;
  for (const InstructionSet* set :
       {instructions_v4(), instructions_v3(), instructions_baseline()}) {
    if (set == nullptr) continue;
    ++sets;
    run_all(set->name, set->f32);
    run_all(set->name, set->f64);
  }
  std::printf("sanitize: passes of %d instruction sets are clean\n", sets);
}

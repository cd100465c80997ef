// The passes on heap buffers of exactly the sizes that they promise, checked against plain loops.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
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
  Scan<T> scan{T(0.25), T(0.5), ranks.data(), 0, 0, 0};
  passes.scan(plan, x.data(), kernels, scratch.data, &scan);
  int64_t below = 0, inside = 0, kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    below += std::abs(c[i]) < T(0.25);
    inside += std::abs(c[i]) >= T(0.25) && std::abs(c[i]) <= T(0.5);
    kept += std::abs(c[i]) >= T(0.25);
  }
  require(scan.below == below && scan.inside == inside, "a scan", name, k, kernels);
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

}  // namespace

int main() {
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
  }
  std::printf("sanitize: passes of %d instruction sets are clean\n", sets);
}

// Weights in memory: any dtype and strides in, tiles of contiguous float or double out.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "../plan.h"
#include "passes.h"

namespace wavprune {

// A weight (outs, ins, kh, kw), or (kernels, K) as (kernels, 1, 1, K).
struct Weight {
  char* data;
  torch::headeronly::ScalarType dtype;
  int64_t sizes[4], strides[4];
  bool contiguous;

  int64_t kernels() const { return sizes[0] * sizes[1]; }
  int64_t values() const { return sizes[2] * sizes[3]; }
};

Weight weight_of(const torch::stable::Tensor& tensor);

// The matrices of a basis in T, and the plan that points into them; never moved.
template <class T>
struct OwnedPlan {
  Plan<T> plan = {};
  std::vector<T> matrices[4];
  std::vector<int> starts[2], columns[2];
};

// From one float64 vector, as wavprune/ops.py lays it out; checked against the kernels' size.
template <class T>
std::unique_ptr<OwnedPlan<T>> plan_of(const torch::stable::Tensor& tensor, int64_t kernel_values);

// What one thread needs for tiles of a weight: 64-byte aligned, as the registers want it.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t values)
      : data_(static_cast<T*>(operator new[](values * sizeof(T), std::align_val_t(64)))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

// Values of one tile, before or after the transform.
constexpr int64_t kTile = 16384;

// Kernels of one tile: a whole number of blocks.
template <class T>
int64_t tile_kernels(const Weight& weight, const Plan<T>& plan) {
  const int64_t side = plan.kind == Kind::identity ? weight.values()
                                                   : std::max(plan.inputs, plan.outputs);
  return std::max<int64_t>(kTile / std::max<int64_t>(side, 1) / kLanes, 1) * kLanes;
}

template <class T>
int64_t tile_values(const Weight& weight, const Plan<T>& plan) {
  const int64_t side = plan.kind == Kind::identity ? weight.values()
                                                   : std::max(plan.inputs, plan.outputs);
  return tile_kernels(weight, plan) * side + kLanes;
}

// The kernels as the passes count them: of the identity, every value is one.
template <class T>
int64_t pass_kernels(const Weight& weight, const Plan<T>& plan, int64_t kernels) {
  return plan.kind == Kind::identity ? kernels * weight.values() : kernels;
}

template <class T>
int64_t coefficients(const Weight& weight, const Plan<T>& plan) {
  return pass_kernels(weight, plan, weight.kernels()) * plan.outputs;
}

template <class T, class F>
void each_value(const Weight& weight, int64_t first, int64_t kernels, F f) {
  const int64_t* s = weight.strides;
  int64_t out = first / std::max<int64_t>(weight.sizes[1], 1), in = first % weight.sizes[1], i = 0;
  for (int64_t k = 0; k < kernels; ++k) {
    for (int64_t r = 0; r < weight.sizes[2]; ++r)
      for (int64_t c = 0; c < weight.sizes[3]; ++c)
        f(i++, out * s[0] + in * s[1] + r * s[2] + c * s[3]);
    if (++in == weight.sizes[1]) {
      in = 0;
      ++out;
    }
  }
}

template <class F>
auto with_element(torch::headeronly::ScalarType dtype, F f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::Half:
      return f(torch::headeronly::Half());
    default:
      return f(torch::headeronly::BFloat16());
  }
}

// The half types convert through float.
template <class E>
using Wide = std::conditional_t<std::is_same_v<E, double>, double, float>;

// True where the passes can work on the weight's own memory.
template <class T>
bool direct(const Weight& weight) {
  using torch::headeronly::ScalarType;
  return weight.contiguous &&
         weight.dtype == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double);
}

// The kernels first .. first + kernels - 1, contiguous: the weight's memory, or a copy in buffer.
template <class T>
T* load_tile(const Weight& weight, int64_t first, int64_t kernels, T* buffer) {
  const int64_t K = weight.values();
  if (direct<T>(weight)) return reinterpret_cast<T*>(weight.data) + first * K;
  with_element(weight.dtype, [&](auto element) {
    using E = decltype(element);
    const E* source = reinterpret_cast<const E*>(weight.data);
    if (weight.contiguous)
      for (int64_t i = 0; i < kernels * K; ++i)
        buffer[i] = static_cast<T>(static_cast<Wide<E>>(source[first * K + i]));
    else
      each_value<T>(weight, first, kernels, [&](int64_t i, int64_t place) {
        buffer[i] = static_cast<T>(static_cast<Wide<E>>(source[place]));
      });
  });
  return buffer;
}

// Has the kernels first .. first + kernels - 1 fetched from memory, where they lie together.
template <class T>
void prefetch_tile(const Weight& weight, int64_t first, int64_t kernels) {
  if (!direct<T>(weight)) return;
  const char* from = weight.data + first * weight.values() * int64_t(sizeof(T));
  const char* const to = from + kernels * weight.values() * int64_t(sizeof(T));
  for (; from < to; from += 64) __builtin_prefetch(from);
}

// Rounds to the weight's dtype; float16 ends at 65504, which a sum of coefficients may pass.
template <class E, class T>
E rounded(T value) {
  if constexpr (sizeof(E) < sizeof(T) || sizeof(E) == 2) {
    const T limit = static_cast<T>(static_cast<Wide<E>>(std::numeric_limits<E>::max()));
    return static_cast<E>(static_cast<Wide<E>>(std::clamp(value, -limit, limit)));
  } else {
    return static_cast<E>(value);
  }
}

// Writes a tile back.
template <class T>
void store_tile(const Weight& weight, int64_t first, int64_t kernels, const T* tile) {
  const int64_t K = weight.values();
  with_element(weight.dtype, [&](auto element) {
    using E = decltype(element);
    E* target = reinterpret_cast<E*>(weight.data);
    if (weight.contiguous)
      for (int64_t i = 0; i < kernels * K; ++i)
        target[first * K + i] = rounded<E>(tile[i]);
    else
      each_value<T>(weight, first, kernels, [&](int64_t i, int64_t place) {
        target[place] = rounded<E>(tile[i]);
      });
  });
}

// The best the processor has, unless a test forced another.
const InstructionSet& instructions();

// Forces 0 (baseline), 1 (AVX2) or 2 (AVX-512); -1 goes back to the best. Returns what now runs.
int64_t use_instruction_set(int64_t index);

template <class T>
const Passes<T>& passes() {
  if constexpr (sizeof(T) == 4)
    return instructions().f32;
  else
    return instructions().f64;
}

}  // namespace wavprune

// Weights in memory, of any dtype and strides, as runs of contiguous float or double kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace wavprune {

// A weight (Cout, Cin/groups, kh, kw).
struct Weight {
  char* data;
  torch::headeronly::ScalarType dtype;
  int64_t sizes[4], strides[4];
  bool contiguous;

  int64_t numel() const { return kernels() * values(); }
  int64_t kernels() const { return sizes[0] * sizes[1]; }
  int64_t values() const { return sizes[2] * sizes[3]; }
};

Weight weight_of(const torch::stable::Tensor& tensor);

// f(index among these values, offset in memory) for every value of some kernels.
template <class F>
void for_each_value(const Weight& weight, int64_t first, int64_t kernels, F f) {
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
auto with_element_type(torch::headeronly::ScalarType dtype, F f) {
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

// The type through which an element converts: the half types know only float.
template <class E>
using ConvertibleTo = std::conditional_t<std::is_same_v<E, double>, double, float>;

// True where the passes can work in the weight's own memory.
template <class T>
bool works_in_place(const Weight& weight) {
  using torch::headeronly::ScalarType;
  return weight.contiguous &&
         weight.dtype == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double);
}

// The kernels first .. first + kernels - 1, contiguous: the weight's memory, or a copy in buffer.
template <class T>
T* load_tile(const Weight& weight, int64_t first, int64_t kernels, T* buffer) {
  const int64_t K = weight.values();
  if (works_in_place<T>(weight)) return reinterpret_cast<T*>(weight.data) + first * K;
  with_element_type(weight.dtype, [&](auto element) {
    using E = decltype(element);
    const E* source = reinterpret_cast<const E*>(weight.data);
    if (weight.contiguous)
      for (int64_t i = 0; i < kernels * K; ++i)
        buffer[i] = static_cast<T>(static_cast<ConvertibleTo<E>>(source[first * K + i]));
    else
      for_each_value(weight, first, kernels, [&](int64_t i, int64_t offset) {
        buffer[i] = static_cast<T>(static_cast<ConvertibleTo<E>>(source[offset]));
      });
  });
  return buffer;
}

// Prefetches the kernels first .. first + kernels - 1 where load_tile would not copy them.
template <class T>
void prefetch_tile(const Weight& weight, int64_t first, int64_t kernels) {
  if (!works_in_place<T>(weight)) return;
  const char* from = weight.data + first * weight.values() * int64_t(sizeof(T));
  const char* const to = from + kernels * weight.values() * int64_t(sizeof(T));
  for (; from < to; from += 64) __builtin_prefetch(from);
}

// Rounds to the weight's dtype, saturating: float16 ends at 65504, which a reconstructed weight may
// pass.
template <class E, class T>
E rounded(T value) {
  if constexpr (sizeof(E) < sizeof(T) || sizeof(E) == 2) {
    const T limit = static_cast<T>(static_cast<ConvertibleTo<E>>(std::numeric_limits<E>::max()));
    return static_cast<E>(static_cast<ConvertibleTo<E>>(std::clamp(value, -limit, limit)));
  } else {
    return static_cast<E>(value);
  }
}

// Rounds a tile to the weight's dtype and writes it there.
template <class T>
void store_tile(const Weight& weight, int64_t first, int64_t kernels, const T* tile) {
  const int64_t K = weight.values();
  with_element_type(weight.dtype, [&](auto element) {
    using E = decltype(element);
    E* target = reinterpret_cast<E*>(weight.data);
    if (weight.contiguous)
      for (int64_t i = 0; i < kernels * K; ++i)
        target[first * K + i] = rounded<E>(tile[i]);
    else
      for_each_value(weight, first, kernels, [&](int64_t i, int64_t offset) {
        target[offset] = rounded<E>(tile[i]);
      });
  });
}

}  // namespace wavprune

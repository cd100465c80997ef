// Elements of weights, and magnitudes as integers.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "../kernel_math.h"
#include "table.h"

namespace wavprune::cuda {

// The digits of a bit pattern, one a pass, from the top. Magnitudes order as their bit patterns do.
template <class T>
struct Radix;

template <>
struct Radix<float> {
  typedef uint32_t Key;
  static constexpr int kPasses = 3;
  static constexpr Key kInfinity = 0x7F800000u;
  static WAVPRUNE_INLINE int shift(int pass) { return 20 - 10 * pass; }
  static WAVPRUNE_INLINE int width(int pass) { return pass == 0 ? 11 : 10; }
};

template <>
struct Radix<double> {
  typedef uint64_t Key;
  static constexpr int kPasses = 6;
  static constexpr Key kInfinity = 0x7FF0000000000000u;
  static WAVPRUNE_INLINE int shift(int pass) { return pass < 3 ? 52 - 11 * pass : 50 - 10 * pass; }
  static WAVPRUNE_INLINE int width(int pass) { return pass < 3 ? 11 : 10; }
};

template <class T>
using Key = typename Radix<T>::Key;

template <class T>
__device__ __forceinline__ Key<T> key_of(T magnitude) {
  Key<T> key;
  memcpy(&key, &magnitude, sizeof key);
  return key & (~Key<T>(0) >> 1);
}

template <class T>
__device__ __forceinline__ T value_of(Key<T> key) {
  T value;
  memcpy(&value, &key, sizeof value);
  return value;
}

template <class F>
__device__ __forceinline__ void with_element_type(Element element, F f) {
  switch (element) {
    case Element::f32:
      return f(float());
    case Element::f64:
      return f(double());
    case Element::f16:
      return f(torch::headeronly::Half());
    case Element::bf16:
      return f(torch::headeronly::BFloat16());
  }
}

// The half types convert through float.
__device__ __forceinline__ double widened(double value) { return value; }
__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(torch::headeronly::Half value) { return float(value); }
__device__ __forceinline__ float widened(torch::headeronly::BFloat16 value) { return float(value); }

#if defined(__CUDA_ARCH__)
#define WAVPRUNE_ASSUME_GLOBAL(address) __builtin_assume(__isGlobal(address))
#define WAVPRUNE_PREFETCH(address) \
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)))
#else
#define WAVPRUNE_ASSUME_GLOBAL(address) ((void)0)
#define WAVPRUNE_PREFETCH(address) ((void)(address))
#endif

// Bytes of a line of the L2 cache.
constexpr int kLine = 128;

__device__ __forceinline__ int size_of(Element element) {
  return element == Element::f64 ? 8 : element == Element::f32 ? 4 : 2;
}

// Defined by a file that counts accesses to weights.
#if !defined(WAVPRUNE_ACCESS)
#define WAVPRUNE_ACCESS(address, bytes) ((void)0)
#endif

template <class E>
__device__ __forceinline__ auto read(const E* from) {
  WAVPRUNE_ACCESS(from, sizeof(E));
  return widened(*from);
}

template <class E>
__device__ __forceinline__ void write(E* to, E value) {
  WAVPRUNE_ACCESS(to, sizeof(E));
  *to = value;
}

template <class T>
__device__ __forceinline__ T clamped(T value, double limit) {
  const T most = T(limit);
  return value < -most ? -most : most < value ? most : value;
}

template <class E>
constexpr double kLargestValue = 0;
template <>
constexpr double kLargestValue<double> = 0x1.fffffffffffffp1023;
template <>
constexpr double kLargestValue<float> = 0x1.fffffep127;
template <>
constexpr double kLargestValue<torch::headeronly::Half> = 65504;
template <>
constexpr double kLargestValue<torch::headeronly::BFloat16> = 0x1.fep127;

// Rounds to the weight's dtype, saturating: float16 ends at 65504, which a reconstructed weight may
// pass.
template <class E, class T>
__device__ __forceinline__ E rounded(T value) {
  if constexpr (sizeof(E) == sizeof(T) || sizeof(E) == 8) return static_cast<E>(value);
  else return static_cast<E>(static_cast<float>(clamped(value, kLargestValue<E>)));
}

// The same of some values, as they will be read again.
template <int count, class T>
__device__ __forceinline__ void round_all(Element element, T* values) {
  with_element_type(element, [&](auto zero) {
    WAVPRUNE_UNROLL
    for (int i = 0; i < count; ++i) values[i] = T(widened(rounded<decltype(zero)>(values[i])));
  });
}

}  // namespace wavprune::cuda

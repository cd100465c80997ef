// Random ranks, read at any index: the same on every device and in any order.
//
// The high 32 bits of a rank are a permutation of the low 32 bits of the index: three multiplications
// and xorshifts with the constants of triple32 (C. Wellons and T. Ettrich, "Hash Prospector", 2018-21,
// nullprogram.com/blog/2018/07/31), with keys added before the first and the second. The keys are the
// first two outputs of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
// generators") for the seed. So no two of 2^32 values tie, and 20 low bits order those of different
// weights.
//
// W is uint32_t, or a vector of them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define WAVPRUNE_INLINE __host__ __device__ __forceinline__
// Inlined in an unrolled loop, its keys would take more registers than a thread has.
#define WAVPRUNE_CALLED static __host__ __device__ __noinline__
#else
#define WAVPRUNE_INLINE inline __attribute__((always_inline))
#define WAVPRUNE_CALLED WAVPRUNE_INLINE
#endif

namespace wavprune {

constexpr int kLowBits = 20;

// Of a seed and the high word of the index.
struct RandomKeys {
  uint32_t before, between, low;
};

WAVPRUNE_INLINE uint64_t splitmix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

WAVPRUNE_INLINE RandomKeys random_keys(uint64_t seed, uint32_t index_high) {
  const uint64_t first = splitmix64(seed + 0x9E3779B97F4A7C15u);
  const uint64_t second = splitmix64(seed + 2 * 0x9E3779B97F4A7C15u);
  return {uint32_t(first), uint32_t(first >> 32) + index_high * 0x9E3779B9u,
          uint32_t(second) + index_high * (uint32_t(second >> 32) | 1)};
}

template <class W>
WAVPRUNE_INLINE W random_high(W index, const RandomKeys& keys) {
  W x = index + keys.before;
  x = (x ^ (x >> 17)) * 0xED5AD4BBu + keys.between;
  x = (x ^ (x >> 11)) * 0xAC4C1B51u;
  x = (x ^ (x >> 15)) * 0x31848BABu;
  return x ^ (x >> 14);
}

// The low word of the index at which random_high gives this.
WAVPRUNE_INLINE uint32_t index_of_high(uint32_t high, const RandomKeys& keys) {
  uint32_t x = high ^ (high >> 14) ^ (high >> 28);
  x *= 0x32B21703u;
  x = (x ^ (x >> 15) ^ (x >> 30)) * 0x469E0DB1u;
  x = ((x ^ (x >> 11) ^ (x >> 22)) - keys.between) * 0x79A85073u;
  return (x ^ (x >> 17)) - keys.before;
}

WAVPRUNE_INLINE uint32_t random_low(uint32_t high, const RandomKeys& keys) {
  const uint32_t x = (high ^ keys.low) * 0xED5AD4BBu;
  return ((x ^ (x >> 15)) * 0x31848BABu) >> (32 - kLowBits);
}

// A rank, in (0, 1), of 52 bits.
WAVPRUNE_INLINE double rank_of_high(uint32_t high, const RandomKeys& keys) {
  const uint64_t bits = uint64_t(high) << kLowBits | random_low(high, keys);
  return (double(bits) + 0.5) * 0x1p-52;
}

// The random rank of the weight at a flat index.
WAVPRUNE_CALLED double random_rank(uint64_t index, uint64_t seed) {
  const RandomKeys keys = random_keys(seed, uint32_t(index >> 32));
  return rank_of_high(random_high(uint32_t(index), keys), keys);
}

// The smallest high word of a rank that is not below the threshold; 2^32 where every rank is.
WAVPRUNE_INLINE uint64_t high_at_threshold(double threshold, const RandomKeys& keys) {
  if (!(threshold < 1)) return uint64_t(1) << 32;
  const double least = threshold * 0x1p52 - 0.5;  // without rounding
  if (!(least > 0)) return 0;
  uint64_t bits = uint64_t(least);
  bits += double(bits) < least;
  const uint64_t high = bits >> kLowBits, low = bits & ((uint64_t(1) << kLowBits) - 1);
  return low == 0 ? high : high + (random_low(uint32_t(high), keys) < low);
}

// Selection compares the high words alone, as numbers of type T whose bit patterns,
// kLeast + (high >> kMissingBits << kShift), are those of normal numbers: a coarse rank.
template <class T>
struct CoarseRank;
template <>
struct CoarseRank<float> {
  static constexpr int kMissingBits = 2, kShift = 0;
  static constexpr uint64_t kLeast = uint64_t(1) << 23;
};
template <>
struct CoarseRank<double> {
  static constexpr int kMissingBits = 0, kShift = 20;
  static constexpr uint64_t kLeast = uint64_t(1) << 52;
};

// The first of the 1 << kMissingBits high words with this coarse rank.
template <class T>
uint32_t first_high(uint64_t bits) {
  return uint32_t((bits - CoarseRank<T>::kLeast) >> CoarseRank<T>::kShift
                  << CoarseRank<T>::kMissingBits);
}

}  // namespace wavprune

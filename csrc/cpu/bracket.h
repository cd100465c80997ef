// Selection within an array by bracketing the wanted ranks in a sample (Floyd and Rivest 1975,
// "Expected time bounds for selection").
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "instruction_set.h"
#include "passes.h"
#include "scratch.h"

namespace wavprune {

// A magnitude as an integer: magnitudes order as their bit patterns do.
template <class T>
using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

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

// The ranks in a sorted sample between which a quantile lies, give or take `sigmas` standard
// deviations of its rank.
struct Bracket {
  int64_t from, to;
};
inline Bracket bracket_of(int64_t sample, double quantile, double sigmas) {
  const double middle = quantile * double(sample);
  const double spread = sigmas * std::sqrt(double(sample) * quantile * (1 - quantile)) + 2;
  return {int64_t(std::floor(middle - spread)), int64_t(std::ceil(middle + spread))};
}

// Values one after the other as a pass takes them.
template <class T>
Tile tile_of(T* values, int64_t kernels, int64_t values_of_each) {
  return {values, kOwnElement<T>,          kOwnElement<T>, 1,      kernels,
          0,      kLanes * values_of_each, Form::flat,     nullptr};
}

// The values of two ranks, first <= second. Reorders and overwrites the values, which need room for
// a vector more.
template <class T>
std::pair<T, T> select(T* values, int64_t count, int64_t first, int64_t second) {
  constexpr int kSample = 128;
  constexpr double kSigmas = 3;
  Plan<T> identity{};
  identity.inputs = identity.outputs = 1;
  const Scratch<T> scratch(scratch_values(identity));
  const auto scan = [&](T low, T high, T* out) {
    Scan<T> result{low, high, out, 0, 0, 0, 0, 0};
    passes<T>().scan(identity, tile_of(values, count, 1), scratch.get(), &result);
    return result;
  };
  while (count > 8 * kSample) {
    T sample[kSample];
    for (int64_t i = 0; i < kSample; ++i) sample[i] = values[i * count / kSample];
    std::sort(sample, sample + kSample);
    const int64_t from = bracket_of(kSample, double(first) / double(count), kSigmas).from;
    const int64_t to = bracket_of(kSample, double(second) / double(count), kSigmas).to;
    const T low = from < 0 ? T(0) : sample[from];
    const T high = to >= kSample ? std::numeric_limits<T>::max() : sample[to];
    // Count first, with an empty bracket: collecting overwrites the values.
    T none[kLanes];
    const int64_t below = scan(low, T(-1), none).below;
    const int64_t up_to = scan(value_of<T>(key_of(high) + 1), T(-1), none).below;
    if (first < below || second >= up_to) break;
    if (low == high) return {low, high};
    if (up_to - below > count / 2) break;
    count = scan(low, high, values).inside;
    first -= below;
    second -= below;
  }
  std::nth_element(values, values + first, values + count);
  const T low = values[first];
  std::nth_element(values + first, values + second, values + count);
  return {low, values[second]};
}

}  // namespace wavprune

// The arithmetic of one kernel, for one value or a vector of them: what the CPU and the GPU share.
//
// V is float, double or a vector of lanes that each hold another kernel. Every sum runs in one
// written order and nothing may be contracted (-ffp-contract=off, -fmad=false), so that every
// instruction set and every device gives the same bits.
#pragma once

#include <cstdint>

#include "plan.h"

#if defined(__CUDACC__)
#define WAVPRUNE_INLINE __host__ __device__ __forceinline__
#define WAVPRUNE_UNROLL _Pragma("unroll 9")
#else
#define WAVPRUNE_INLINE inline __attribute__((always_inline))
#define WAVPRUNE_UNROLL _Pragma("GCC unroll 8")
#endif

namespace wavprune {

// The sum of x[i * step] * factors[i]; `fixed` of them where that is not 0, else `count`.
template <int fixed, class V, class T>
WAVPRUNE_INLINE V weighted_sum(const V* x, int step, const T* factors, int count) {
  const int n = fixed ? fixed : count;
  V sum = x[0] * factors[0];
  WAVPRUNE_UNROLL
  for (int i = 1; i < n; ++i) sum = sum + x[i * step] * factors[i];
  return sum;
}

// out (rows_out, columns_out) = R x C^T for x (rows_in, columns_in); sizes fixed where RI, RO, CI
// and CO are given, else read from axes. middle holds rows_in * columns_out values.
template <int RI, int RO, int CI, int CO, class V, class T>
WAVPRUNE_INLINE void separable(const Axes<T>& axes, const V* x, V* middle, V* out) {
  const int ri = RI ? RI : axes.rows_in, ro = RO ? RO : axes.rows_out;
  const int ci = CI ? CI : axes.columns_in, co = CO ? CO : axes.columns_out;
  WAVPRUNE_UNROLL
  for (int i = 0; i < ri; ++i) {
    WAVPRUNE_UNROLL
    for (int n = 0; n < co; ++n)
      middle[i * co + n] = weighted_sum<CI>(x + i * ci, 1, axes.columns + n * ci, ci);
  }
  WAVPRUNE_UNROLL
  for (int m = 0; m < ro; ++m) {
    WAVPRUNE_UNROLL
    for (int n = 0; n < co; ++n)
      out[m * co + n] = weighted_sum<RI>(middle + n, co, axes.rows + m * ri, ri);
  }
}

// The two families of axes of three that need no multiplications but for one scale a coefficient:
// A = diag(s) U and S = U^T diag(s') with small whole numbers in U.
//   pairs   a + b, c, a - b             Haar with a border, after its norms are moved into A
//   merges  a + b + c, a + b - 2c, a - b   unbalanced Haar
struct Pairs {
  static constexpr int kRows[9] = {1, 1, 0, 0, 0, 1, 1, -1, 0};
  template <class V>
  static WAVPRUNE_INLINE void forward(V a, V b, V c, V* out, int step) {
    out[0] = a + b;
    out[step] = c;
    out[2 * step] = a - b;
  }
  template <class V>
  static WAVPRUNE_INLINE void inverse(V s, V e, V d, V* out, int step) {
    out[0] = s + d;
    out[step] = s - d;
    out[2 * step] = e;
  }
};

struct Merges {
  static constexpr int kRows[9] = {1, 1, 1, 1, 1, -2, 1, -1, 0};
  template <class V>
  static WAVPRUNE_INLINE void forward(V a, V b, V c, V* out, int step) {
    const V s = a + b;
    out[0] = s + c;
    out[step] = s - (c + c);
    out[2 * step] = a - b;
  }
  template <class V>
  static WAVPRUNE_INLINE void inverse(V u, V v, V d, V* out, int step) {
    const V s = u + v;
    out[0] = s + d;
    out[step] = s - d;
    out[2 * step] = u - (v + v);
  }
};

template <class Axis, class V, class T>
WAVPRUNE_INLINE void three_forward(const T* scale, const V* x, V* middle, V* out) {
  for (int i = 0; i < 3; ++i) Axis::forward(x[3 * i], x[3 * i + 1], x[3 * i + 2], middle + 3 * i, 1);
  for (int j = 0; j < 3; ++j) Axis::forward(middle[j], middle[3 + j], middle[6 + j], out + j, 3);
  for (int m = 0; m < 9; ++m) out[m] = out[m] * scale[m];
}

template <class Axis, class V, class T>
WAVPRUNE_INLINE void three_inverse(const T* scale, const V* c, V* middle, V* out) {
  V scaled[9];
  for (int m = 0; m < 9; ++m) scaled[m] = c[m] * scale[m];
  for (int j = 0; j < 3; ++j)
    Axis::inverse(scaled[j], scaled[3 + j], scaled[6 + j], middle + j, 3);
  for (int i = 0; i < 3; ++i)
    Axis::inverse(middle[3 * i], middle[3 * i + 1], middle[3 * i + 2], out + 3 * i, 1);
}

// Output m of a matrix that is known by its entries.
template <class V, class T>
WAVPRUNE_INLINE V sparse_row(const Entries<T>& entries, const V* x, int m) {
  // Every row has an entry: a row of zeros is a structural zero, and left out.
  int e = entries.start[m];
  V sum = x[entries.column[e]] * entries.value[e];
  for (++e; e < entries.start[m + 1]; ++e) sum = sum + x[entries.column[e]] * entries.value[e];
  return sum;
}

template <class V, class T>
WAVPRUNE_INLINE void sparse(const Entries<T>& entries, const V* x, V* out) {
  for (int m = 0; m < entries.outputs; ++m) out[m] = sparse_row(entries, x, m);
}

// numpy.percentile's interpolation between two neighbours, rounding for rounding.
template <class T>
WAVPRUNE_INLINE T between(T low, T high, double fraction) {
  const T span = high - low;
  return fraction < 0.5 ? low + span * T(fraction) : high - span * T(1 - fraction);
}

// A random number in (0, 1) for a place: SplitMix64, as in backends/eager.py.
WAVPRUNE_INLINE double random_rank(uint64_t place, uint64_t seed) {
  uint64_t x = (place + 1) * 0x9E3779B97F4A7C15u + seed;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  return (double(x >> 12) + 0.5) * 0x1p-52;
}

}  // namespace wavprune

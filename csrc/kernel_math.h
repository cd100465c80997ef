// The arithmetic of one kernel, for one value or a vector of them: what the CPU and the GPU share.
//
// V is float, double or a vector of lanes that each hold another kernel. Every sum runs in one
// written order and nothing may be contracted (-ffp-contract=off, -fmad=false), so that every
// instruction set and every device gives the same bits.
#pragma once

#include "plan.h"

#if defined(__CUDACC__)
#define WAVPRUNE_INLINE __host__ __device__ __forceinline__
#else
#define WAVPRUNE_INLINE inline __attribute__((always_inline))
#endif

namespace wavprune {

// out (rows_out, columns_out) = R x C^T for x (rows_in, columns_in); sizes fixed where RI, RO, CI
// and CO are given, else read from axes. middle holds rows_in * columns_out values.
template <int RI, int RO, int CI, int CO, class V, class T>
WAVPRUNE_INLINE void separable(const Axes<T>& axes, const V* x, V* middle, V* out) {
  const int ri = RI ? RI : axes.rows_in, ro = RO ? RO : axes.rows_out;
  const int ci = CI ? CI : axes.columns_in, co = CO ? CO : axes.columns_out;
#pragma GCC unroll 8
  for (int i = 0; i < ri; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < co; ++n) {
      V sum = x[i * ci] * axes.columns[n * ci];
#pragma GCC unroll 8
      for (int j = 1; j < ci; ++j) sum = sum + x[i * ci + j] * axes.columns[n * ci + j];
      middle[i * co + n] = sum;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ro; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < co; ++n) {
      V sum = middle[n] * axes.rows[m * ri];
#pragma GCC unroll 8
      for (int i = 1; i < ri; ++i) sum = sum + middle[i * co + n] * axes.rows[m * ri + i];
      out[m * co + n] = sum;
    }
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

template <class V, class T>
WAVPRUNE_INLINE void sparse(const Entries<T>& entries, const V* x, V* out) {
  for (int m = 0; m < entries.outputs; ++m) {
    // Every row has an entry: a row of zeros is a structural zero, and left out.
    int e = entries.start[m];
    V sum = x[entries.column[e]] * entries.value[e];
    for (++e; e < entries.start[m + 1]; ++e)
      sum = sum + x[entries.column[e]] * entries.value[e];
    out[m] = sum;
  }
}

}  // namespace wavprune

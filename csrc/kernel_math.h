// The transforms of one kernel, shared by the CPU and the GPU.
//
// V is float, double, or a vector whose lanes belong to different kernels. Every sum has one fixed
// order and nothing is contracted (-ffp-contract=off, -fmad=false), so that every instruction set
// and every device gives the same bits.
#pragma once

#include <cstdint>

#include "plan.h"
#include "random.h"

#if defined(__CUDACC__)
#define WAVPRUNE_UNROLL _Pragma("unroll 9")
#else
#define WAVPRUNE_UNROLL _Pragma("GCC unroll 8")
#endif

namespace wavprune {

// The dot product of x[0], x[stride], .. and `count` factors. `Count` is their number where the
// compiler knows it, else 0.
template <int Count, class V, class T>
WAVPRUNE_INLINE V strided_dot(const V* x, int stride, const T* factors, int count) {
  const int n = Count ? Count : count;
  V sum = x[0] * factors[0];
  WAVPRUNE_UNROLL
  for (int i = 1; i < n; ++i) sum = sum + x[i * stride] * factors[i];
  return sum;
}

// out (rows_out, columns_out) = R x C^T for x (rows_in, columns_in). RI, RO, CI and CO are the
// sizes where the compiler knows them, else 0. middle has room for rows_in * columns_out values.
template <int RI, int RO, int CI, int CO, class V, class T>
WAVPRUNE_INLINE void separable(const Axes<T>& axes, const V* x, V* middle, V* out) {
  const int ri = RI ? RI : axes.rows_in, ro = RO ? RO : axes.rows_out;
  const int ci = CI ? CI : axes.columns_in, co = CO ? CO : axes.columns_out;
  WAVPRUNE_UNROLL
  for (int i = 0; i < ri; ++i) {
    WAVPRUNE_UNROLL
    for (int n = 0; n < co; ++n)
      middle[i * co + n] = strided_dot<CI>(x + i * ci, 1, axes.columns + n * ci, ci);
  }
  WAVPRUNE_UNROLL
  for (int m = 0; m < ro; ++m) {
    WAVPRUNE_UNROLL
    for (int n = 0; n < co; ++n)
      out[m * co + n] = strided_dot<RI>(middle + n, co, axes.rows + m * ri, ri);
  }
}

// Two 3x3 transforms that need one multiplication a coefficient: each axis is A = diag(s) U and
// S = U^T diag(s') with small integers in U.

// U of Haar with a border, once its norms are moved into A: a + b, c, a - b.
struct Pairs {
  static constexpr int kMatrix[9] = {1, 1, 0, 0, 0, 1, 1, -1, 0};
  template <class V>
  static WAVPRUNE_INLINE void forward(V a, V b, V c, V* out, int stride) {
    out[0] = a + b;
    out[stride] = c;
    out[2 * stride] = a - b;
  }
  template <class V>
  static WAVPRUNE_INLINE void inverse(V sum, V single, V difference, V* out, int stride) {
    out[0] = sum + difference;
    out[stride] = sum - difference;
    out[2 * stride] = single;
  }
};

// U of unbalanced Haar: a + b + c, a + b - 2c, a - b.
struct Merges {
  static constexpr int kMatrix[9] = {1, 1, 1, 1, 1, -2, 1, -1, 0};
  template <class V>
  static WAVPRUNE_INLINE void forward(V a, V b, V c, V* out, int stride) {
    const V pair = a + b;
    out[0] = pair + c;
    out[stride] = pair - (c + c);
    out[2 * stride] = a - b;
  }
  template <class V>
  static WAVPRUNE_INLINE void inverse(V sum, V rest, V difference, V* out, int stride) {
    const V pair = sum + rest;
    out[0] = pair + difference;
    out[stride] = pair - difference;
    out[2 * stride] = sum - (rest + rest);
  }
};

template <class Axis, class V, class T>
WAVPRUNE_INLINE void forward_3x3(const T* scale, const V* x, V* middle, V* out) {
  for (int i = 0; i < 3; ++i)
    Axis::forward(x[3 * i], x[3 * i + 1], x[3 * i + 2], middle + 3 * i, 1);
  for (int j = 0; j < 3; ++j) Axis::forward(middle[j], middle[3 + j], middle[6 + j], out + j, 3);
  for (int m = 0; m < 9; ++m) out[m] = out[m] * scale[m];
}

template <class Axis, class V, class T>
WAVPRUNE_INLINE void inverse_3x3(const T* scale, const V* c, V* middle, V* out) {
  V scaled[9];
  for (int m = 0; m < 9; ++m) scaled[m] = c[m] * scale[m];
  for (int j = 0; j < 3; ++j)
    Axis::inverse(scaled[j], scaled[3 + j], scaled[6 + j], middle + j, 3);
  for (int i = 0; i < 3; ++i)
    Axis::inverse(middle[3 * i], middle[3 * i + 1], middle[3 * i + 2], out + 3 * i, 1);
}

template <class V, class T>
WAVPRUNE_INLINE V sparse_row(const SparseMatrix<T>& matrix, const V* x, int m) {
  // No row is empty: the coefficient of a row of zeros is structurally zero and left out.
  int e = matrix.start[m];
  V sum = x[matrix.column[e]] * matrix.value[e];
  for (++e; e < matrix.start[m + 1]; ++e) sum = sum + x[matrix.column[e]] * matrix.value[e];
  return sum;
}

template <class V, class T>
WAVPRUNE_INLINE void sparse_product(const SparseMatrix<T>& matrix, const V* x, V* out) {
  for (int m = 0; m < matrix.rows; ++m) out[m] = sparse_row(matrix, x, m);
}

// Linear interpolation as numpy.percentile rounds it.
template <class T>
WAVPRUNE_INLINE T interpolate(T low, T high, double fraction) {
  const T span = high - low;
  return fraction < 0.5 ? low + span * T(fraction) : high - span * T(1 - fraction);
}

}  // namespace wavprune

// How the matrices of a basis are laid out for the kernels.
#pragma once

namespace wavprune {

// How a basis runs. The coefficients' order is that of the operator's rows for every kind.
enum class Kind : int { identity = 0, separable = 1, sparse = 2, pairs = 3, merges = 4 };

// Two small matrices, one an axis: (rows_out, rows_in) and (columns_out, columns_in), row-major.
template <class T>
struct Axes {
  int rows_in, rows_out, columns_in, columns_out;
  const T* rows;
  const T* columns;
};

// A matrix by its non-zero entries: row m holds entries start[m] .. start[m + 1].
template <class T>
struct Entries {
  int outputs;
  const int* start;
  const int* column;
  const T* value;
};

// A basis ready to run in T. Of the identity, inputs and outputs are 1: any value is a kernel.
template <class T>
struct Plan {
  Kind kind;
  int inputs, outputs;  // K and M'
  Axes<T> forward_axes, inverse_axes;
  Entries<T> forward_entries, inverse_entries;
  T forward_scale[9], inverse_scale[9];
};

}  // namespace wavprune

// The matrices of a basis as the passes and the CUDA kernels read them.
#pragma once

namespace wavprune {

// The form of a basis, and the first number of a plan vector; src/wavprune/ops.py has the layout.
enum class Kind : int {
  identity = 0,
  separable = 1,
  general = 2,
  pairs = 3,   // separable 3x3, each axis a scaled Haar step with one value left over
  merges = 4,  // separable 3x3, each axis a scaled unbalanced Haar transform
};

// One small matrix for each axis: (rows_out, rows_in) and (columns_out, columns_in), row-major. Row
// m of it is 0 but from entry support[2 m] to entry support[2 m + 1] - 1; only the CPU asks.
template <class T>
struct Axes {
  int rows_in, rows_out, columns_in, columns_out;
  const T* rows;
  const T* columns;
  const int* rows_support = nullptr;
  const int* columns_support = nullptr;
};

// Compressed sparse rows: row m has the entries start[m] .. start[m + 1] - 1.
template <class T>
struct SparseMatrix {
  int rows;
  const int* start;
  const int* column;
  const T* value;
};

// A basis in the compute type. For the identity every value is a kernel of its own: inputs and
// outputs are 1.
template <class T>
struct Plan {
  Kind kind;
  int inputs, outputs;  // values and coefficients of a kernel
  Axes<T> forward_axes, inverse_axes;             // separable, pairs, merges
  SparseMatrix<T> forward_matrix, inverse_matrix;  // general
  T forward_scale[9], inverse_scale[9];           // pairs, merges
};

}  // namespace wavprune

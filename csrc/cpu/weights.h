// Weights in memory, of any dtype and strides.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "passes.h"

namespace wavprune {

// A weight (Cout, Cin/groups, kh, kw).
struct Weight {
  char* data;
  Element element;
  int64_t sizes[4], strides[4];

  int64_t numel() const { return kernels() * values(); }
  int64_t kernels() const { return sizes[0] * sizes[1]; }
  int64_t values() const { return sizes[2] * sizes[3]; }
};

Weight weight_of(const torch::stable::Tensor& tensor);

// A contiguous vector as a weight of kernels of one value.
Weight vector_of(const torch::stable::Tensor& tensor);

// The order in which kernels are walked through: as a contiguous weight has them, which masks and
// random ranks need, or as they lie in memory.
enum class Order { canonical, memory };

// A way through a weight: its kernels in rows, each with some values. All axes of size 1, and axes
// that are one run in memory, are gone.
struct Walk {
  char* data;
  Element element;
  int64_t rows, row_kernels, row_stride, kernel_stride;
  std::vector<int64_t> offsets;  // of the values of a kernel
  bool together;                 // offsets[k] = k
  bool overlapping;              // some stride is 0

  int64_t kernels() const { return rows * row_kernels; }
  int64_t values() const { return int64_t(offsets.size()); }
  Strided strided() const {
    return {data,    element,          row_kernels,    row_stride, kernel_stride,
            values(), offsets.data(), together};
  }
  int64_t element_size() const;
  char* at(int64_t kernel) const;
  void prefetch(int64_t first, int64_t kernels) const;
  // Kernels that lie together, one after the other.
  bool is_flat() const { return together && kernel_stride == values(); }
  // Neighbouring rows are closer in memory than neighbouring kernels.
  bool is_turned() const { return rows > 1 && row_stride < kernel_stride; }
};

// With the identity, where every value is a kernel, a weight without gaps is walked through as one
// vector if any order will do.
Walk walk_through(const Weight& weight, Order order, bool identity);

}  // namespace wavprune

// The operators of the coder. csrc/ops.cpp has their schemas, src/wavprune/checkpoint/trellis.py
// what they take.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace wavprune {

using torch::stable::Tensor;

Tensor trellis_decode(Tensor words, Tensor state, Tensor tables, Tensor row_classes,
                      Tensor column_classes, int64_t classes, Tensor escapes, double step);
Tensor trellis_encode_(Tensor words, Tensor state, Tensor frequencies, Tensor row_classes,
                       Tensor column_classes, int64_t classes, Tensor symbols);
Tensor trellis_counts(Tensor symbols, Tensor row_classes, Tensor column_classes, int64_t classes);
Tensor trellis_sums(Tensor symbols, Tensor kinds, int64_t number);
Tensor trellis_values(Tensor symbols, double step);
void trellis_round_(Tensor values, Tensor zeros, double step, Tensor symbols, Tensor decoded);
void trellis_quantise_(Tensor targets, Tensor weights, Tensor lower, Tensor importance,
                       Tensor zeros, double step, Tensor symbols, Tensor errors);

}  // namespace wavprune

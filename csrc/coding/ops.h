// The operators of the coder. csrc/ops.cpp has their schemas, src/wavprune/checkpoint/trellis.py
// what they take.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace wavprune {

using torch::stable::Tensor;

void trellis_decode_(Tensor words, Tensor state, Tensor tables, Tensor row_classes,
                     Tensor column_classes, int64_t classes, Tensor escapes, double step,
                     Tensor decoded);
Tensor trellis_encode_(Tensor words, Tensor state, Tensor codes, Tensor row_classes,
                       Tensor column_classes, int64_t classes, Tensor indices);
Tensor trellis_counts(Tensor indices, Tensor row_classes, Tensor column_classes, int64_t classes);
Tensor trellis_sums(Tensor indices, Tensor kinds, int64_t number);
Tensor trellis_values(Tensor symbols, double step);
Tensor trellis_round_(Tensor values, Tensor zeros, double step, Tensor indices, Tensor decoded);
void trellis_quantise_(Tensor targets, Tensor weights, Tensor lower, Tensor importance,
                       Tensor zeros, double step, Tensor symbols, Tensor errors);

// CRC-32 of bytes, after those whose checksum is `start`; -1 where the processor has no carry-less
// product, or there are few.
int64_t crc32(Tensor bytes, int64_t start);

}  // namespace wavprune

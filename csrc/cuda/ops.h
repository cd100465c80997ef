// The operators on CUDA; csrc/ops.cpp has their schemas.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace wavprune::cuda {

using torch::stable::Tensor;

Tensor topk_threshold(std::vector<Tensor> weights, std::vector<Tensor> plans,
                      std::vector<int64_t> seeds, std::vector<int64_t> jobs,
                      std::vector<int64_t> keep, bool compute_float64);
Tensor percentile_threshold(std::vector<Tensor> weights, std::vector<Tensor> plans,
                            std::vector<int64_t> dropped, double percentile, bool compute_float64);
Tensor prune_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<int64_t> seeds,
              Tensor thresholds, bool compute_float64);
Tensor prune_by_mask_(std::vector<Tensor> weights, std::vector<Tensor> plans,
                      std::vector<Tensor> masks, bool compute_float64);
void project_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<Tensor> masks,
              bool compute_float64);
void mark_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<int64_t> seeds,
           Tensor thresholds, std::vector<Tensor> masks, bool compute_float64);
Tensor dwt2(Tensor kernels, Tensor plan, int64_t outputs);
Tensor idwt2(Tensor coefficients, Tensor plan, int64_t values);
Tensor percentile_mask(Tensor input, double percentile, bool packed);

// Decodes the streams of a packed checkpoint to tensors, and waits for nothing: a number a stream,
// 0 where it ended as it should, and then the CRC-32 of each tensor.
Tensor trellis_load_(Tensor coded, Tensor parts, Tensor frequencies, Tensor streams,
                     Tensor matrices, std::vector<Tensor> decoded);

}  // namespace wavprune::cuda

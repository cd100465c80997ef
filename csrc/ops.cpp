// Schemas and registration. src/wavprune/ops.py documents the operators.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "cpu/instruction_set.h"
#include "coding/ops.h"

#if defined(WAVPRUNE_CUDA)
#include "cuda/ops.h"
#endif

namespace {

// The compute capabilities that the CUDA kernels were compiled for, times ten; none without nvcc.
std::vector<int64_t> cuda_capabilities() {
#if defined(WAVPRUNE_CUDA)
  return {WAVPRUNE_CUDA};
#else
  return {};
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(wavprune, library) {
  library.def(
      "topk_threshold(Tensor[] weights, Tensor[] plans, int[] seeds, int[] jobs, int[] keep, "
      "bool compute_float64) -> Tensor");
  library.def(
      "topk_measure(Tensor[] weights, Tensor[] plans, int[] jobs, int[] keep, "
      "bool compute_float64) -> Tensor");
  library.def(
      "percentile_threshold(Tensor[] weights, Tensor[] plans, int[] dropped, float percentile, "
      "bool compute_float64) -> Tensor");
  library.def(
      "prune_(Tensor(a!)[] weights, Tensor[] plans, int[] seeds, Tensor thresholds, "
      "bool compute_float64) -> Tensor");
  library.def(
      "mark_(Tensor[] weights, Tensor[] plans, int[] seeds, Tensor thresholds, "
      "Tensor(a!)[] masks, bool compute_float64) -> ()");
  library.def(
      "project_(Tensor(a!)[] weights, Tensor[] plans, Tensor[] masks, bool compute_float64) -> ()");
  library.def(
      "prune_by_mask_(Tensor(a!)[] weights, Tensor[] plans, Tensor[] masks, "
      "bool compute_float64) -> Tensor");
  library.def("gram(Tensor[] weights) -> Tensor");
  library.def("dwt2(Tensor kernels, Tensor plan, int outputs) -> Tensor");
  library.def("idwt2(Tensor coefficients, Tensor plan, int values) -> Tensor");
  library.def("percentile_mask(Tensor input, float percentile, bool packed) -> Tensor");
  library.def(
      "trellis_decode_(Tensor words, Tensor(a!) state, Tensor tables, Tensor row_classes, "
      "Tensor column_classes, int classes, Tensor escapes, float step, Tensor(b!) decoded) -> ()");
  library.def(
      "trellis_encode_(Tensor(a!) words, Tensor(b!) state, Tensor codes, Tensor row_classes, "
      "Tensor column_classes, int classes, Tensor indices) -> Tensor");
  library.def(
      "trellis_counts(Tensor indices, Tensor row_classes, Tensor column_classes, int classes) "
      "-> Tensor");
  library.def("trellis_sums(Tensor indices, Tensor kinds, int number) -> Tensor");
  library.def("trellis_values(Tensor symbols, float step) -> Tensor");
  library.def(
      "trellis_round_(Tensor values, Tensor zeros, float step, Tensor(a!) indices, "
      "Tensor(b!) decoded) -> Tensor");
  library.def(
      "trellis_quantise_(Tensor targets, Tensor weights, Tensor lower, Tensor importance, "
      "Tensor zeros, float step, Tensor(a!) symbols, Tensor(b!) errors) -> ()");
  library.def(
      "trellis_load_(Tensor coded, Tensor parts, Tensor frequencies, Tensor streams, "
      "Tensor matrices, Tensor(a!)[] decoded) -> Tensor");
  library.def("crc32(Tensor bytes, int start) -> int");
  library.def("use_instruction_set(int index) -> int");
  library.def("cuda_capabilities() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(wavprune, CPU, library) {
  library.impl("topk_threshold", TORCH_BOX(&wavprune::topk_threshold));
  library.impl("topk_measure", TORCH_BOX(&wavprune::topk_measure));
  library.impl("percentile_threshold", TORCH_BOX(&wavprune::percentile_threshold));
  library.impl("prune_", TORCH_BOX(&wavprune::prune_));
  library.impl("mark_", TORCH_BOX(&wavprune::mark_));
  library.impl("project_", TORCH_BOX(&wavprune::project_));
  library.impl("prune_by_mask_", TORCH_BOX(&wavprune::prune_by_mask_));
  library.impl("gram", TORCH_BOX(&wavprune::gram));
  library.impl("dwt2", TORCH_BOX(&wavprune::dwt2));
  library.impl("idwt2", TORCH_BOX(&wavprune::idwt2));
  library.impl("percentile_mask", TORCH_BOX(&wavprune::percentile_mask));
  library.impl("trellis_decode_", TORCH_BOX(&wavprune::trellis_decode_));
  library.impl("trellis_encode_", TORCH_BOX(&wavprune::trellis_encode_));
  library.impl("trellis_counts", TORCH_BOX(&wavprune::trellis_counts));
  library.impl("trellis_sums", TORCH_BOX(&wavprune::trellis_sums));
  library.impl("trellis_values", TORCH_BOX(&wavprune::trellis_values));
  library.impl("trellis_round_", TORCH_BOX(&wavprune::trellis_round_));
  library.impl("crc32", TORCH_BOX(&wavprune::crc32));
  library.impl("trellis_quantise_", TORCH_BOX(&wavprune::trellis_quantise_));
}

#if defined(WAVPRUNE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(wavprune, CUDA, library) {
  library.impl("topk_threshold", TORCH_BOX(&wavprune::cuda::topk_threshold));
  library.impl("percentile_threshold", TORCH_BOX(&wavprune::cuda::percentile_threshold));
  library.impl("prune_", TORCH_BOX(&wavprune::cuda::prune_));
  library.impl("mark_", TORCH_BOX(&wavprune::cuda::mark_));
  library.impl("project_", TORCH_BOX(&wavprune::cuda::project_));
  library.impl("prune_by_mask_", TORCH_BOX(&wavprune::cuda::prune_by_mask_));
  library.impl("dwt2", TORCH_BOX(&wavprune::cuda::dwt2));
  library.impl("idwt2", TORCH_BOX(&wavprune::cuda::idwt2));
  library.impl("percentile_mask", TORCH_BOX(&wavprune::cuda::percentile_mask));
  library.impl("trellis_load_", TORCH_BOX(&wavprune::cuda::trellis_load_));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(wavprune, CompositeExplicitAutograd, library) {
  library.impl("cuda_capabilities", TORCH_BOX(&cuda_capabilities));
  library.impl("use_instruction_set", TORCH_BOX(&wavprune::use_instruction_set));
  // Called without a single weight, which would say where to compute.
  library.impl("topk_threshold", TORCH_BOX(&wavprune::topk_threshold));
  library.impl("percentile_threshold", TORCH_BOX(&wavprune::percentile_threshold));
  library.impl("prune_by_mask_", TORCH_BOX(&wavprune::prune_by_mask_));
  library.impl("project_", TORCH_BOX(&wavprune::project_));
  library.impl("gram", TORCH_BOX(&wavprune::gram));
}

// Importing the module registers the operators.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

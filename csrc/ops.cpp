// Schemas and registration, nothing else. src/wavprune/ops.py documents the operators.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "cpu/weights.h"

STABLE_TORCH_LIBRARY(wavprune, library) {
  library.def(
      "topk_threshold(Tensor[] weights, Tensor[] plans, int[] draws, int[] jobs, int[] keep, "
      "bool wide) -> Tensor");
  library.def(
      "percentile_threshold(Tensor[] weights, Tensor[] plans, int[] dropped, float percentile, "
      "bool wide) -> Tensor");
  library.def(
      "prune_(Tensor(a!)[] weights, Tensor[] plans, int[] draws, Tensor thresholds, bool wide) -> "
      "Tensor");
  library.def("dwt2(Tensor kernels, Tensor plan, int outputs) -> Tensor");
  library.def("idwt2(Tensor coefficients, Tensor plan, int values) -> Tensor");
  library.def("percentile_mask(Tensor input, float percentile, bool packed) -> Tensor");
  library.def("use_instruction_set(int index) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(wavprune, CPU, library) {
  library.impl("topk_threshold", TORCH_BOX(&wavprune::topk_threshold));
  library.impl("percentile_threshold", TORCH_BOX(&wavprune::percentile_threshold));
  library.impl("prune_", TORCH_BOX(&wavprune::prune_));
  library.impl("dwt2", TORCH_BOX(&wavprune::dwt2));
  library.impl("idwt2", TORCH_BOX(&wavprune::idwt2));
  library.impl("percentile_mask", TORCH_BOX(&wavprune::percentile_mask));
}

STABLE_TORCH_LIBRARY_IMPL(wavprune, CompositeExplicitAutograd, library) {
  library.impl("use_instruction_set", TORCH_BOX(&wavprune::use_instruction_set));
}

// Importing the module is what registers the operators.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

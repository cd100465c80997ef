// The passes over one tile of kernels, behind a table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "../plan.h"

namespace wavprune {

// Collects the ranks in [low, high] in `out`, which needs room for all of them and a vector more.
template <class T>
struct Scan {
  T low, high;
  T* out;
  int64_t below, inside;  // how many ranks are smaller than low, and in [low, high]
  uint64_t peak;          // the largest bit pattern; infinity's or above if a value is not finite
};

// What pruning changed. The sums are added up in T.
template <class T>
struct Change {
  int64_t kept, zeros;
  double squared_error, squared_norm;
};

// A mask has a word for each block of 16 kernels and coefficient, block by block; bit l is that of
// the block's kernel l.
typedef uint16_t MaskWord;

// x: (kernels, K), contiguous. scratch: scratch_values(plan) values, aligned to 64 bytes.
// Thresholds are positive.
template <class T>
struct Passes {
  void (*scan)(const Plan<T>&, const T* x, int64_t kernels, T* scratch, Scan<T>*);
  void (*prune)(const Plan<T>&, T* x, int64_t kernels, T* scratch, T threshold, Change<T>*);
  void (*prune_by_mask)(const Plan<T>&, T* x, int64_t kernels, T* scratch, const MaskWord*,
                        Change<T>*);
  void (*project)(const Plan<T>&, T* x, int64_t kernels, T* scratch, const MaskWord*);
  void (*mark)(const Plan<T>&, const T* x, int64_t kernels, T* scratch, T threshold, MaskWord*);
  void (*forward)(const Plan<T>&, const T* x, int64_t kernels, T* scratch, T* coefficients);
  void (*inverse)(const Plan<T>&, const T* coefficients, int64_t kernels, T* scratch, T* x);
};

struct InstructionSet {
  const char* name;
  Passes<float> f32;
  Passes<double> f64;
};

// Kernels of a block.
constexpr int kLanes = 16;

// Vectors for the kernels before and after, their coefficients, the middle of a separable transform
// and the padded last block.
template <class T>
int64_t scratch_values(const Plan<T>& plan) {
  const int64_t side = plan.inputs > plan.outputs ? plan.inputs : plan.outputs;
  return (2 * int64_t(plan.inputs) + plan.outputs + 2 * side) * kLanes;
}

// Null where the processor or the compiler lacks the instruction set.
const InstructionSet* instructions_v4();
const InstructionSet* instructions_v3();
const InstructionSet* instructions_baseline();

}  // namespace wavprune

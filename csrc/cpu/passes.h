// The passes over one tile of kernels, behind a table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "../plan.h"

namespace wavprune {

// Ranks in [low, high] go to `out`, which has room for all and a vector more; those below are
// counted. `peak` is the largest bit pattern seen: at or above infinity's where a value is not
// finite.
template <class T>
struct Scan {
  T low, high;
  T* out;
  int64_t below, inside;
  uint64_t peak;
};

// A positive threshold, and what came of it. The sums are added up in T.
template <class T>
struct Change {
  T threshold;
  int64_t kept, zeros;
  double squared_error, squared_norm;
};

// Masks hold a word for each block of 16 kernels and coefficient, block by block: bit l is that of
// the block's kernel l.
typedef uint16_t MaskWord;

// x: (kernels, K), contiguous. scratch: scratch_values(plan) values.
template <class T>
struct Passes {
  void (*scan)(const Plan<T>&, const T* x, int64_t kernels, T* scratch, Scan<T>*);
  void (*prune)(const Plan<T>&, T* x, int64_t kernels, T* scratch, Change<T>*);
  void (*mark)(const Plan<T>&, const T* x, int64_t kernels, T* scratch, T threshold, MaskWord*);
  void (*project)(const Plan<T>&, T* x, int64_t kernels, T* scratch, const MaskWord*);
  void (*forward)(const Plan<T>&, const T* x, int64_t kernels, T* scratch, T* coefficients);
  void (*inverse)(const Plan<T>&, const T* coefficients, int64_t kernels, T* scratch, T* x);
};

struct InstructionSet {
  const char* name;
  Passes<float> f32;
  Passes<double> f64;
};

constexpr int kLanes = 16;

// Vectors for the kernels before and after, the coefficients, the middle of a separable transform
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

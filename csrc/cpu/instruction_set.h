// Which passes run: those of the processor's best instruction set, unless a test forced others.
#pragma once

#include <cstdint>

#include "passes.h"

namespace wavprune {

const InstructionSet& instructions();

// Forces 0 (baseline), 1 (AVX2) or 2 (AVX-512); -1 restores the best. Returns what now runs.
int64_t use_instruction_set(int64_t index);

template <class T>
const Passes<T>& passes() {
  if constexpr (sizeof(T) == 4)
    return instructions().f32;
  else
    return instructions().f64;
}

}  // namespace wavprune

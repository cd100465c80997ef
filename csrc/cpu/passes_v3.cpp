// AVX2: chosen at run time, so only code after the pragma may use it.
#include "passes.h"

// GCC 12 is the first that knows these levels.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define WAVPRUNE_NAMESPACE v3
#define WAVPRUNE_NAME "x86-64-v3 (AVX2)"
#define WAVPRUNE_BYTES 32
#include "passes/passes.inc"
#pragma GCC pop_options

const wavprune::InstructionSet* wavprune::instructions_v3() {
  return __builtin_cpu_supports("x86-64-v3") ? &v3::kInstructions : nullptr;
}
#else
const wavprune::InstructionSet* wavprune::instructions_v3() { return nullptr; }
#endif

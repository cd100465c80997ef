// AVX2: chosen at run time, so only code after the pragma may use it.
#include "routines.h"

// GCC 12 is the first that knows these levels.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define WAVPRUNE_NAMESPACE coding_v3
#define WAVPRUNE_BYTES 32
#include "routines/routines.inc"
#pragma GCC pop_options

const wavprune::coding::Routines* wavprune::coding::routines_v3() {
  return __builtin_cpu_supports("x86-64-v3") ? &coding_v3::kRoutines : nullptr;
}
#else
const wavprune::coding::Routines* wavprune::coding::routines_v3() { return nullptr; }
#endif

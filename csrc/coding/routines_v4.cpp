// AVX-512: chosen at run time, so only code after the pragma may use it.
#include "routines.h"

// GCC 12 is the first that knows these levels.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define WAVPRUNE_NAMESPACE coding_v4
#define WAVPRUNE_BYTES 64
#include "routines/routines.inc"
#pragma GCC pop_options

const wavprune::coding::Routines* wavprune::coding::routines_v4() {
  return __builtin_cpu_supports("x86-64-v4") ? &coding_v4::kRoutines : nullptr;
}
#else
const wavprune::coding::Routines* wavprune::coding::routines_v4() { return nullptr; }
#endif

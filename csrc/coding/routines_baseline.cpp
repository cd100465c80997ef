// The compiler's default instruction set.
#include "routines.h"

#define WAVPRUNE_NAMESPACE coding_baseline
#define WAVPRUNE_BYTES 16
#include "routines/routines.inc"

const wavprune::coding::Routines* wavprune::coding::routines_baseline() {
  return &coding_baseline::kRoutines;
}

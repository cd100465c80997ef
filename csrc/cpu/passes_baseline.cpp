// The compiler's default: SSE2 on x86-64, NEON on 64-bit Arm.
#include "passes.h"

#define WAVPRUNE_NAMESPACE baseline
#define WAVPRUNE_NAME "baseline"
#define WAVPRUNE_BYTES 16
#include "passes/passes.inc"

const wavprune::InstructionSet* wavprune::instructions_baseline() {
  return &baseline::kInstructions;
}

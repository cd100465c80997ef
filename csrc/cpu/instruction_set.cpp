#include "instruction_set.h"

#include <torch/headeronly/util/Exception.h>

#include <atomic>

namespace wavprune {

namespace {

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet* instruction_set(int64_t index) {
  if (index == 2) return instructions_v4();
  if (index == 1) return instructions_v3();
  return instructions_baseline();
}

}  // namespace

const InstructionSet& instructions() {
  if (const InstructionSet* set = chosen.load(std::memory_order_acquire)) return *set;
  use_instruction_set(-1);
  return *chosen.load(std::memory_order_acquire);
}

int64_t use_instruction_set(int64_t index) {
  STD_TORCH_CHECK(index >= -1 && index <= 2, "wavprune: no instruction set ", index,
                  "; allowed: -1 (the best here), 0 (baseline), 1 (AVX2), 2 (AVX-512)");
  if (index >= 0) {
    const InstructionSet* set = instruction_set(index);
    STD_TORCH_CHECK(set != nullptr, "wavprune: this processor or build lacks instruction set ",
                    index);
    chosen.store(set, std::memory_order_release);
    return index;
  }
  int64_t best = 2;
  while (instruction_set(best) == nullptr) --best;
  return use_instruction_set(best);
}

}  // namespace wavprune

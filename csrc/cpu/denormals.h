#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace wavprune {

// While it lives, this thread does not flush denormals to zero: comparisons would contradict the
// bit patterns that rank coefficients.
class KeepDenormals {
#if defined(__x86_64__)
  static constexpr unsigned kFlush = 0x8000, kDenormalsAreZero = 0x0040;

 public:
  KeepDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~(kFlush | kDenormalsAreZero)); }
  ~KeepDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t(1) << 24;

 public:
  KeepDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ & ~kFlush));
  }
  ~KeepDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

}  // namespace wavprune

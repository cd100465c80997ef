// Arithmetic of CRC-32: polynomials over GF(2) modulo its own, as zlib has them (Adler 1995,
// `crc32_combine`). Bits are reversed: x^0 is the highest.
#pragma once

#include <cstdint>

#include "../random.h"

namespace wavprune::coding {

constexpr uint32_t kPolynomial = 0xedb88320;
constexpr uint32_t kOne = 1u << 31;

WAVPRUNE_INLINE constexpr uint32_t times_x(uint32_t a) {
  return a >> 1 ^ (kPolynomial & (0u - (a & 1)));
}

WAVPRUNE_INLINE constexpr uint32_t product(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) {
    result ^= b & (0u - (a >> 31));
    a <<= 1;
    b = times_x(b);
  }
  return result;
}

// x^(8 2^i), which moves a checksum on by 2^i bytes.
constexpr int kPowers = 40;

struct Powers {
  uint32_t of[kPowers];
};

constexpr Powers make_powers() {
  Powers result = {};
  uint32_t power = kOne >> 8;
  for (int i = 0; i < kPowers; ++i) {
    result.of[i] = power;
    power = product(power, power);
  }
  return result;
}

// The remainder that `a` leaves where `bytes` bytes follow.
WAVPRUNE_INLINE uint32_t moved(uint32_t a, uint64_t bytes, const uint32_t* powers) {
  for (int i = 0; bytes != 0 && i < kPowers; ++i, bytes >>= 1)
    if (bytes & 1) a = product(a, powers[i]);
  return a;
}

}  // namespace wavprune::coding

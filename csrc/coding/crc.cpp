// CRC-32 by carry-less products: bytes are folded onto those behind them (Gopal et al. 2009, "Fast
// CRC computation for generic polynomials using PCLMULQDQ instruction").
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../cpu/instruction_set.h"
#include "ops.h"
#include "polynomial.h"

// GCC 12 is the first that knows all of these instructions.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define WAVPRUNE_CARRYLESS
#include <immintrin.h>
#endif

namespace wavprune {

#ifdef WAVPRUNE_CARRYLESS

namespace {

using coding::kPolynomial;

// x^n modulo the polynomial, its bits reversed, as a product takes it.
constexpr int64_t power(int n) {
  uint32_t result = 1u << 31;
  for (int i = 0; i < n; ++i) result = result >> 1 ^ (result & 1 ? kPolynomial : 0);
  return int64_t(uint64_t(result) << 1);
}

// What moves 128 bits on by some bytes: their earlier half, and their later one.
constexpr int64_t earlier(int bytes) { return power(8 * bytes + 32); }
constexpr int64_t later(int bytes) { return power(8 * bytes - 32); }

static_assert(earlier(64) == 0x154442bd4 && later(64) == 0x1c6e41596);  // as in the paper

struct Table {
  uint32_t values[256];
};

constexpr Table make_table() {
  Table result = {};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? kPolynomial : 0);
    result.values[byte] = crc;
  }
  return result;
}

constexpr Table kTable = make_table();

uint32_t bytewise(uint32_t crc, const uint8_t* data, int64_t count) {
  for (int64_t i = 0; i < count; ++i) crc = crc >> 8 ^ kTable.values[(crc ^ data[i]) & 255];
  return crc;
}

#define WAVPRUNE_128 __attribute__((target("sse4.1,pclmul")))
#define WAVPRUNE_512 __attribute__((target("avx512f,avx512dq,avx512vl,vpclmulqdq,pclmul")))

WAVPRUNE_128 inline __m128i folded(__m128i bytes, __m128i onto, __m128i by) {
  const __m128i moved = _mm_xor_si128(_mm_clmulepi64_si128(bytes, by, 0x00),
                                      _mm_clmulepi64_si128(bytes, by, 0x11));
  return _mm_xor_si128(moved, onto);
}

WAVPRUNE_128 inline __m128i at(const uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// The checksum of 16 bytes that stand for all before `data`, and of what follows.
WAVPRUNE_128 uint32_t finish(__m128i bytes, const uint8_t* data, const uint8_t* end) {
  const __m128i by = _mm_set_epi64x(later(16), earlier(16));
  for (; end - data >= 16; data += 16) bytes = folded(bytes, at(data), by);
  alignas(16) uint8_t last[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(last), bytes);
  return bytewise(bytewise(0, last, 16), data, end - data);
}

// At least 64 bytes.
WAVPRUNE_128 uint32_t by_128_bits(uint32_t crc, const uint8_t* data, const uint8_t* end) {
  __m128i x[4];
  for (int i = 0; i < 4; ++i) x[i] = at(data + 16 * i);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128(int(crc)));
  const __m128i by = _mm_set_epi64x(later(64), earlier(64));
  for (data += 64; end - data >= 64; data += 64)
    for (int i = 0; i < 4; ++i) x[i] = folded(x[i], at(data + 16 * i), by);
  const __m128i next = _mm_set_epi64x(later(16), earlier(16));
  for (int i = 1; i < 4; ++i) x[i] = folded(x[i - 1], x[i], next);
  return finish(x[3], data, end);
}

WAVPRUNE_512 inline __m512i folded(__m512i bytes, __m512i onto, __m512i by) {
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(bytes, by, 0x00),
                                   _mm512_clmulepi64_epi128(bytes, by, 0x11), onto, 0x96);
}

// At least 256 bytes.
WAVPRUNE_512 uint32_t by_512_bits(uint32_t crc, const uint8_t* data, const uint8_t* end) {
  __m512i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(data + 64 * i);
  x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(int(crc))));
  const __m512i by = _mm512_broadcast_i64x2(_mm_set_epi64x(later(256), earlier(256)));
  for (data += 256; end - data >= 256; data += 256)
    for (int i = 0; i < 4; ++i) x[i] = folded(x[i], _mm512_loadu_si512(data + 64 * i), by);
  const __m512i next = _mm512_broadcast_i64x2(_mm_set_epi64x(later(64), earlier(64)));
  for (int i = 1; i < 4; ++i) x[i] = folded(x[i - 1], x[i], next);
  alignas(64) uint8_t last[64];
  _mm512_store_si512(last, x[3]);
  const __m128i one = _mm_set_epi64x(later(16), earlier(16));
  __m128i bytes = at(last);
  for (int i = 1; i < 4; ++i) bytes = folded(bytes, at(last + 16 * i), one);
  return finish(bytes, data, end);
}

}  // namespace

#endif

int64_t crc32(Tensor bytes, int64_t start) {
  STD_TORCH_CHECK(bytes.scalar_type() == torch::headeronly::ScalarType::Byte &&
                      bytes.is_contiguous(),
                  "wavprune: a checksum is of contiguous bytes");
#ifdef WAVPRUNE_CARRYLESS
  const InstructionSet* const chosen = &instructions();
  const uint8_t* const data = static_cast<const uint8_t*>(bytes.data_ptr());
  const uint8_t* const end = data + bytes.numel();
  const uint32_t crc = ~uint32_t(start);
  if (chosen == instructions_v4() && end - data >= 256 && __builtin_cpu_supports("vpclmulqdq"))
    return uint32_t(~by_512_bits(crc, data, end));
  if (chosen != instructions_baseline() && end - data >= 64 && __builtin_cpu_supports("pclmul"))
    return uint32_t(~by_128_bits(crc, data, end));
#endif
  return -1;
}

}  // namespace wavprune

// What the CUDA kernels that decode packed checkpoints read, as it lies in the device's memory.
#pragma once

#include <cstdint>

#include "../coding/polynomial.h"
#include "../coding/routines.h"
#include "table.h"

namespace wavprune::cuda {

static_assert(coding::kColumns == kWarp, "a lane for each column of a group");

// Packed files have two tables a class.
constexpr int kClasses = 40;
constexpr int kCodeTables = 2 * kClasses;
constexpr int kSlots = 1 << coding::kPrecision;
// Blocks of a multiprocessor at a time that decode, at least.
constexpr int kDecoding = 2;
// Streams of a block, at most: a warp each.
constexpr int kBlockStreams = kThreads / kWarp;

// A code has the frequency of a symbol, the symbol as a byte, and its first slot or how far a slot is
// behind that. The byte is (magnitude << 1 | negative) ^ 0xFE, so that its second bit is that of even
// indices and an escape, which is no number's, has all bits.
constexpr int kFrequencyShift = 20, kByteShift = 12;
constexpr uint32_t kByteBits = 0xFFu << kByteShift, kEven = 2u << kByteShift;
constexpr uint32_t kSlotBits = kSlots - 1;

constexpr uint32_t byte_of(int symbol) {
  if (symbol == coding::kEscape) return 0xFF;
  const int magnitude = (symbol + 1) / 2;
  return uint32_t(magnitude << 1 | (symbol & 1)) ^ 0xFE;
}

// A mark is a decoded index: the bits of the code's byte, or kEscaped and the index itself; below,
// four times the trellis state, whose lowest bit is the quantiser.
constexpr uint32_t kEscaped = 1u << 31, kIndexBits = (1u << 23) - 1;

// A table of frequencies, as `expand_tables` makes it: for each slot a byte, which of the codes has
// it; then these.
struct CodeTable {
  uint8_t* slots;
  const uint32_t* codes;
  int count;
  int bytes;  // a multiple of 16

  static constexpr int bytes_for(int count) { return (kSlots + 4 * count + 15) / 16 * 16; }
};

// Indices of some matrices, decoded by one warp.
struct CodedStream {
  const uint32_t* states;  // and behind them the words, two in each
  const int32_t* escapes;
  uint32_t words;
  int escape_count;
  int first, matrices;
  int index;        // which of the caller's streams
  bool whole;       // nothing is left behind the last matrix
  uint64_t classes;  // a bit for each class that its matrices may have
};

struct CodedMatrix {
  const uint8_t *row_classes, *column_classes;
  // (rows, columns); null where nobody asks for them. `dequantise` makes values of marks, in place.
  union {
    uint32_t* marks;
    float* values;
  };
  int rows, columns;
  float step;
  // From values to the tensor.
  Element element;
  const float* synthesis;  // (kernel_values, coefficients); null for the identity
  int kernel_values, coefficients;
  int groups;
  bool transposed;
  bool scaled;        // by both factors
  double factors[2];  // whose product may be no number of float64
  char* tensor;  // null where nobody asks for it
  uint32_t count;
  bool direct;  // the values are the tensor
  int first_block, blocks;  // of `synthesise`
  int first_run, runs;      // of `dequantise`
  int64_t bytes;
  int first_segment, segments;  // of `checksums`
};

// Elements of a block of `dequantise` and `synthesise`, and bytes of one of `checksums`.
constexpr int kElements = 8 * kThreads;
constexpr int kSegment = 64 * 4 * kThreads;

// A frequency is less than that of a whole table.
static_assert(kFrequencyShift + coding::kPrecision == 32);

// Shared memory of `decode_blocks` beside the tables.
constexpr int kDecodingBytes = 2048;

// What a stream's number among the results is, unless all was read to its end.
constexpr uint32_t kDamaged = 1;

}  // namespace wavprune::cuda

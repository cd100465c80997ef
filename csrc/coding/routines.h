// The coder of trellis-quantised matrices: a table of functions for each instruction set.
//
// A matrix is coded by groups of 32 columns. Lane l of a group is its column l, with a state of the
// trellis, 0 at the top of a column, and a state of an asymmetric numeral system, which goes on
// through all matrices of a stream. All lanes take a step, then the next row follows.
#pragma once

#include <cstdint>

namespace wavprune::coding {

constexpr int kColumns = 32;
constexpr int kStates = 8;
// Frequencies of a table add up to 1 << kPrecision. A state is at least 1 << 16 between steps, and
// takes the next word where it would fall below.
constexpr int kPrecision = 12;
constexpr uint32_t kLeastState = 1u << 16;
// Index k is the symbol 2 |k| - (k < 0). Larger and rare ones are escapes, with the index in a list.
constexpr int kSymbols = 256, kEscape = 255;
constexpr int32_t kLargestInline = 127, kLargestIndex = 1 << 21;
// Tables have numbers of a byte.
constexpr int kMostClasses = 128;
// Words that must follow the last one, as a step may read them in vain.
constexpr int64_t kPadding = 64;

// Eight states as of a trellis code of Ungerboeck (1982, "Channel coding with multilevel/phase
// signals"). State s quantises with the even multiples of the step for even s, else with 0 and the
// odd ones; index k leads to kNext[s][k & 1].
constexpr uint8_t kNext[kStates][2] = {{0, 2}, {5, 7}, {1, 3}, {6, 4},
                                       {2, 0}, {4, 6}, {3, 1}, {7, 5}};

// The value of index k in steps.
constexpr int32_t value_of(int32_t k, int quantiser) {
  return k > 0 ? 2 * k - quantiser : k < 0 ? 2 * k + quantiser : 0;
}

struct Stream {
  const uint16_t* words;  // `count` of them, and kPadding more
  int64_t count, position;
  uint32_t states[kColumns];
};

struct Matrix {
  int64_t rows, columns;
  // The class of an entry is min(row_classes[row] + column_classes[column], classes - 1).
  const uint8_t *row_classes, *column_classes;
  int classes;
};

// Rows of decoded values.
struct Rows {
  float* data;
  int64_t stride;
};

struct Escapes {
  const int32_t* indices;
  int64_t count, position;
};

// Trellises from the top to the bottom of columns, which lie one after the other.
struct Columns {
  int64_t rows, columns;
  const float *targets, *weights;
  // groups matrices of columns x columns, each for as many rows: what the error of column i adds
  // to the target of column j is at i * columns + j. Null without feedback.
  const float* lower;
  int64_t groups;
  const float* importance;  // of every entry's squared error; null for equal ones
  const uint8_t* zeros;     // entries that must be 0; null for none
  float step;
  int32_t* symbols;
  float* errors;  // weights less their values
};

// Indices of a matrix, row by row.
struct Indices {
  const void* data;
  bool narrow;  // int8, else int32

  int32_t operator[](int64_t at) const {
    return narrow ? static_cast<const int8_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
};

// A matrix whose columns have a trellis each, side by side.
struct Rounded {
  int64_t rows, columns;
  const float* values;
  int64_t stride;        // of a row of values
  const uint8_t* zeros;  // entries that must be 0, row by row; null for none
  float step;
  void* indices;  // row by row
  bool narrow;    // they are int8, else int32
  float* decoded;  // may be the values
  int64_t decoded_stride;
  double* errors;  // squared, of each column, summed from the last row to the first
};

// Columns that go down the rows together where they are independent.
constexpr int kWide = 64;

// Writes words from the last to the first.
struct Encoder {
  // start << 16 | frequency of each entry; a frequency of 0 makes an escape of the symbol.
  const int32_t* codes;
  // Doubles just above 1 / frequency.
  const double* inverses;
  uint16_t* words;
  int64_t position;
  uint32_t states[kColumns];
  // Called for each escape, from the last to the first, with the row and the lane.
  void (*escape)(void* to, int64_t row, int lane);
  void* to;
};

struct Routines {
  // tables[(2 class + quantiser) << 12 | slot]: symbol << 24 | frequency << 12 | slot less start.
  // False where words or escapes ran out.
  bool (*decode)(Stream&, Escapes&, const Matrix&, const uint32_t* tables, float step, Rows out);
  // scratch: 6 floats a row.
  void (*quantise)(const Columns&, float* scratch);
  // decisions: kWide bytes a row.
  void (*round)(const Rounded&, uint8_t* decisions);
  // What codes the indices of columns first .. first + lanes - 1, at most kColumns:
  // out[kColumns row + lane] = (2 class + quantiser) << 8 | symbol.
  void (*entries)(const Matrix&, Indices, int64_t first, int lanes, uint16_t* out);
  // Code what `entries` gave, from the last to the first.
  bool (*encode)(Encoder&, const uint16_t* entries, int64_t rows, int lanes);
  // The values of indices, as decoding gives them.
  void (*values)(int64_t rows, int64_t columns, const int32_t* indices, float step, float* out);
  // Sums of magnitudes: of each row, and, where there are kinds, added to what is there, of the
  // rows of each kind.
  void (*sums)(Indices, int64_t rows, int64_t columns, const uint8_t* kinds, int64_t* of_rows,
               int64_t* of_columns);
};

// Null where the processor or the compiler lacks the instruction set.
const Routines* routines_v4();
const Routines* routines_v3();
const Routines* routines_baseline();

}  // namespace wavprune::coding

// The operators of the coder: checks of what a file says, and the way through a matrix.
//
// Decoding reads two bytes a word and a table entry a weight, and writes four bytes; a table of
// frequencies has 16 KiB. Encoding divides once a weight.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../cpu/denormals.h"
#include "../cpu/instruction_set.h"
#include "../cpu/scratch.h"
#include "ops.h"
#include "routines.h"

namespace wavprune {

using torch::headeronly::ScalarType;
using namespace coding;

namespace {

const Routines& routines() {
  const InstructionSet* const chosen = &instructions();
  if (chosen == instructions_v4() && routines_v4()) return *routines_v4();
  if (chosen == instructions_v3() && routines_v3()) return *routines_v3();
  return *routines_baseline();
}

template <class T>
T* data_of(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous(), "wavprune: ", name,
                  " must be contiguous, of its dtype");
  return static_cast<T*>(tensor.data_ptr());
}

Matrix matrix_of(const Tensor& row_classes, const Tensor& column_classes, int64_t classes) {
  STD_TORCH_CHECK(classes >= 1 && classes <= kMostClasses, "wavprune: ", classes, " classes");
  Matrix m;
  m.row_classes = data_of<const uint8_t>(row_classes, ScalarType::Byte, "row_classes");
  m.column_classes = data_of<const uint8_t>(column_classes, ScalarType::Byte, "column_classes");
  m.rows = row_classes.numel();
  m.columns = column_classes.numel();
  m.classes = int(classes);
  return m;
}

const int32_t* symbols_of(const Tensor& symbols, const Matrix& m) {
  const int32_t* const data = data_of<const int32_t>(symbols, ScalarType::Int, "symbols");
  STD_TORCH_CHECK(symbols.numel() == m.rows * m.columns, "wavprune: ", symbols.numel(),
                  " symbols for ", m.rows, " rows of ", m.columns);
  return data;
}

// How a symbol changes a state.
struct Code {
  uint32_t count, start;
  double inverse;
};

// Doubles just above 1 / count: a state has at most 32 bits, so that the product is less than 2^-18
// above x / count, which is a multiple of 1 / count, and both have the same floor.
struct Inverses {
  double above[1 << kPrecision];
};

Inverses inverses() {
  Inverses result = {};
  for (int count = 1; count < 1 << kPrecision; ++count) {
    const double nearest = 1.0 / count;
    result.above[count] = std::nextafter(nearest, 1.0 + nearest);
  }
  return result;
}

const Inverses kInverses = inverses();

}  // namespace

Tensor trellis_decode(Tensor words, Tensor state, Tensor tables, Tensor row_classes,
                      Tensor column_classes, int64_t classes, Tensor escapes, double step) {
  const KeepDenormals guard;
  const Matrix m = matrix_of(row_classes, column_classes, classes);
  Stream stream;
  stream.words = data_of<const uint16_t>(words, ScalarType::Short, "words");
  stream.count = words.numel() - kPadding;
  int64_t* const at = data_of<int64_t>(state, ScalarType::Long, "state");
  STD_TORCH_CHECK(state.numel() == 2 + kColumns, "wavprune: a state has 34 numbers");
  STD_TORCH_CHECK(at[0] >= 0 && at[0] <= stream.count, "wavprune: word ", at[0], " of ",
                  stream.count);
  stream.position = at[0];
  for (int l = 0; l < kColumns; ++l) {
    STD_TORCH_CHECK(at[2 + l] >= 0 && at[2 + l] <= 0xffffffffll, "wavprune: state ", at[2 + l]);
    stream.states[l] = uint32_t(at[2 + l]);
  }
  const uint32_t* const table = data_of<const uint32_t>(tables, ScalarType::Int, "tables");
  STD_TORCH_CHECK(tables.numel() == (classes * 2) << kPrecision, "wavprune: tables of ",
                  tables.numel(), " entries for ", classes, " classes");
  Escapes escaped;
  escaped.indices = data_of<const int32_t>(escapes, ScalarType::Int, "escapes");
  escaped.count = escapes.numel();
  STD_TORCH_CHECK(at[1] >= 0 && at[1] <= escaped.count, "wavprune: escape ", at[1]);
  escaped.position = at[1];
  for (int64_t i = 0; i < escaped.count; ++i)
    STD_TORCH_CHECK(std::abs(int64_t(escaped.indices[i])) <= kLargestIndex, "wavprune: index ",
                    escaped.indices[i]);
  Tensor result = torch::stable::empty({m.rows, m.columns}, ScalarType::Float);
  const bool complete = routines().decode(stream, escaped, m, table, float(step),
                                          static_cast<float*>(result.data_ptr()));
  STD_TORCH_CHECK(complete, "wavprune: the coded values end early");
  at[0] = stream.position;
  at[1] = escaped.position;
  for (int l = 0; l < kColumns; ++l) at[2 + l] = stream.states[l];
  return result;
}

Tensor trellis_encode_(Tensor words, Tensor state, Tensor frequencies, Tensor row_classes,
                     Tensor column_classes, int64_t classes, Tensor symbols) {
  const Matrix m = matrix_of(row_classes, column_classes, classes);
  const int32_t* const k = symbols_of(symbols, m);
  uint16_t* const out = data_of<uint16_t>(words, ScalarType::Short, "words");
  int64_t* const at = data_of<int64_t>(state, ScalarType::Long, "state");
  STD_TORCH_CHECK(state.numel() == 2 + kColumns, "wavprune: a state has 34 numbers");
  int64_t position = at[0];
  STD_TORCH_CHECK(position >= m.rows * m.columns && position <= words.numel(),
                  "wavprune: no room for the words of ", m.rows * m.columns, " symbols");
  const int32_t* const counts = data_of<const int32_t>(frequencies, ScalarType::Int, "frequencies");
  STD_TORCH_CHECK(frequencies.numel() == classes * 2 * kSymbols, "wavprune: frequencies of ",
                  frequencies.numel() / kSymbols, " tables for ", classes, " classes");
  const Scratch<Code> codes(classes * 2 * kSymbols);
  for (int64_t table = 0; table < classes * 2; ++table) {
    uint32_t sum = 0;
    for (int symbol = 0; symbol < kSymbols; ++symbol) {
      const int32_t count = counts[table * kSymbols + symbol];
      STD_TORCH_CHECK(count >= 0 && count <= 4095, "wavprune: a frequency of ", count);
      codes.get()[table * kSymbols + symbol] = {uint32_t(count), sum, kInverses.above[count]};
      sum += uint32_t(count);
    }
    STD_TORCH_CHECK(sum == 0 || sum == 1u << kPrecision, "wavprune: frequencies add up to ", sum);
  }
  uint32_t x[kColumns];
  for (int l = 0; l < kColumns; ++l) {
    STD_TORCH_CHECK(at[2 + l] >= kLeastState && at[2 + l] <= 0xffffffffll, "wavprune: state ",
                    at[2 + l]);
    x[l] = uint32_t(at[2 + l]);
  }
  std::vector<int32_t> escapes;
  const Routines& chosen = routines();
  const Scratch<uint16_t> entries(std::max<int64_t>(m.rows, 1) * kColumns);
  for (int64_t group = (m.columns + kColumns - 1) / kColumns; group-- > 0;) {
    const int64_t first = group * kColumns;
    const int lanes = int(std::min<int64_t>(m.columns - first, kColumns));
    for (int l = 0; l < lanes; l += kSideBySide)
      chosen.entries(m, k, first + l, std::min(lanes - l, kSideBySide), entries.get() + l);
    for (int64_t row = m.rows; row-- > 0;)
      for (int l = lanes; l-- > 0;) {
        int entry = entries.get()[row * kColumns + l];
        // A symbol too rare for a frequency is an escape too.
        if (!codes.get()[entry].count) entry |= kEscape;
        if ((entry & kEscape) == kEscape) escapes.push_back(k[row * m.columns + first + l]);
        const Code& code = codes.get()[entry];
        STD_TORCH_CHECK(code.count > 0, "wavprune: a table without escapes");
        // Which states give a word cannot be predicted, so no branch asks.
        const int gives = x[l] >> (32 - kPrecision) >= code.count;
        out[position - 1] = uint16_t(x[l]);
        position -= gives;
        const uint32_t rest = x[l] >> 16 * gives;
        const uint32_t quotient = uint32_t(int64_t(double(rest) * code.inverse));
        x[l] = (quotient << kPrecision) + (rest - quotient * code.count) + code.start;
      }
  }
  at[0] = position;
  for (int l = 0; l < kColumns; ++l) at[2 + l] = x[l];
  Tensor result = torch::stable::empty({int64_t(escapes.size())}, ScalarType::Int);
  // They were met from the last to the first.
  std::reverse_copy(escapes.begin(), escapes.end(), static_cast<int32_t*>(result.data_ptr()));
  return result;
}

Tensor trellis_counts(Tensor symbols, Tensor row_classes, Tensor column_classes, int64_t classes) {
  const Matrix m = matrix_of(row_classes, column_classes, classes);
  const int32_t* const k = symbols_of(symbols, m);
  Tensor result = torch::stable::empty({classes * 2, kSymbols}, ScalarType::Long);
  int64_t* const counts = static_cast<int64_t*>(result.data_ptr());
  std::fill_n(counts, classes * 2 * kSymbols, 0);
  const Scratch<uint16_t> entries(std::max<int64_t>(m.rows, 1) * kColumns);
  for (int64_t first = 0; first < m.columns; first += kSideBySide) {
    const int lanes = int(std::min<int64_t>(m.columns - first, kSideBySide));
    routines().entries(m, k, first, lanes, entries.get());
    for (int64_t row = 0; row < m.rows; ++row)
      for (int l = 0; l < lanes; ++l) ++counts[entries.get()[row * kColumns + l]];
  }
  return result;
}

Tensor trellis_sums(Tensor symbols, Tensor kinds, int64_t number) {
  STD_TORCH_CHECK(symbols.dim() == 2, "wavprune: symbols are (rows, columns)");
  const int64_t rows = symbols.size(0), columns = symbols.size(1);
  const uint8_t* const kind = data_of<const uint8_t>(kinds, ScalarType::Byte, "kinds");
  STD_TORCH_CHECK(kinds.numel() == rows && number >= 1, "wavprune: kinds do not fit the rows");
  for (int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK(kind[row] < number, "wavprune: kind ", int(kind[row]), " of ", number);
  Tensor result = torch::stable::empty({rows + number * columns}, ScalarType::Long);
  int64_t* const out = static_cast<int64_t*>(result.data_ptr());
  std::fill_n(out, rows + number * columns, 0);
  routines().sums(data_of<const int32_t>(symbols, ScalarType::Int, "symbols"), rows, columns, kind,
                  out, out + rows);
  return result;
}

Tensor trellis_values(Tensor symbols, double step) {
  STD_TORCH_CHECK(symbols.dim() == 2, "wavprune: symbols are (rows, columns)");
  const int64_t rows = symbols.size(0), columns = symbols.size(1);
  const int32_t* const k = data_of<const int32_t>(symbols, ScalarType::Int, "symbols");
  Tensor result = torch::stable::empty({rows, columns}, ScalarType::Float);
  routines().values(rows, columns, k, float(step), static_cast<float*>(result.data_ptr()));
  return result;
}

void trellis_round_(Tensor values, Tensor zeros, double step, Tensor symbols, Tensor decoded) {
  const KeepDenormals guard;
  STD_TORCH_CHECK(values.dim() == 2, "wavprune: values are (rows, columns)");
  Rounded r;
  r.rows = values.size(0);
  r.columns = values.size(1);
  const int64_t n = r.rows * r.columns;
  STD_TORCH_CHECK(!zeros.numel() || zeros.numel() == n, "wavprune: zeros do not fit the values");
  STD_TORCH_CHECK(symbols.numel() == n && decoded.numel() == n,
                  "wavprune: results do not fit the values");
  r.values = data_of<const float>(values, ScalarType::Float, "values");
  r.zeros = zeros.numel() ? data_of<const uint8_t>(zeros, ScalarType::Byte, "zeros") : nullptr;
  r.step = float(step);
  STD_TORCH_CHECK(r.step > 0 && std::isfinite(r.step), "wavprune: a step of ", step);
  r.symbols = data_of<int32_t>(symbols, ScalarType::Int, "symbols");
  r.decoded = data_of<float>(decoded, ScalarType::Float, "decoded");
  if (!n) return;
  const Scratch<uint8_t> decisions(r.rows * kWide);
  routines().round(r, decisions.get());
}

void trellis_quantise_(Tensor targets, Tensor weights, Tensor lower, Tensor importance,
                       Tensor zeros, double step, Tensor symbols, Tensor errors) {
  const KeepDenormals guard;
  STD_TORCH_CHECK(targets.dim() == 2, "wavprune: targets are (columns, rows)");
  Columns c;
  c.columns = targets.size(0);
  c.rows = targets.size(1);
  const int64_t n = c.columns * c.rows;
  const auto check = [](bool fits, const char* name) {
    STD_TORCH_CHECK(fits, "wavprune: ", name, " do not fit the targets");
  };
  c.targets = data_of<const float>(targets, ScalarType::Float, "targets");
  c.weights = data_of<const float>(weights, ScalarType::Float, "weights");
  check(weights.numel() == n, "weights");
  c.lower = nullptr;
  c.groups = 1;
  if (lower.numel()) {
    check(lower.dim() == 3 && lower.size(1) == c.columns && lower.size(2) == c.columns &&
              c.rows % lower.size(0) == 0,
          "the matrices of the feedback");
    c.lower = data_of<const float>(lower, ScalarType::Float, "lower");
    c.groups = lower.size(0);
  }
  check(!importance.numel() || importance.numel() == n, "importances");
  c.importance = importance.numel()
                     ? data_of<const float>(importance, ScalarType::Float, "importance")
                     : nullptr;
  check(!zeros.numel() || zeros.numel() == n, "zeros");
  c.zeros = zeros.numel() ? data_of<const uint8_t>(zeros, ScalarType::Byte, "zeros") : nullptr;
  c.step = float(step);
  STD_TORCH_CHECK(c.step > 0 && std::isfinite(c.step), "wavprune: a step of ", step);
  check(symbols.numel() == n && errors.numel() == n, "results");
  c.symbols = data_of<int32_t>(symbols, ScalarType::Int, "symbols");
  c.errors = data_of<float>(errors, ScalarType::Float, "errors");
  if (!n) return;
  const Scratch<float> scratch(6 * c.rows);
  routines().quantise(c, scratch.get());
}

}  // namespace wavprune

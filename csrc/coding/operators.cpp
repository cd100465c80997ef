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

Indices indices_of(const Tensor& indices) {
  if (indices.scalar_type() == ScalarType::Char)
    return {data_of<const int8_t>(indices, ScalarType::Char, "indices"), true};
  return {data_of<const int32_t>(indices, ScalarType::Int, "indices"), false};
}

Indices indices_of(const Tensor& indices, const Matrix& m) {
  STD_TORCH_CHECK(indices.numel() == m.rows * m.columns, "wavprune: ", indices.numel(),
                  " indices for ", m.rows, " rows of ", m.columns);
  return indices_of(indices);
}

// Rows of values, which lie any distance apart.
template <class T>
T* rows_of(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
                      tensor.size(0) == rows && tensor.size(1) == columns &&
                      (columns < 2 || tensor.stride(1) == 1),
                  "wavprune: ", name, " must be rows of float32");
  return static_cast<T*>(tensor.data_ptr());
}

// Escapes of a group of columns, from the last to the first.
struct Escaped {
  std::vector<int32_t> indices;
  Indices matrix;
  int64_t columns, first;

  static void add(void* to, int64_t row, int lane) {
    Escaped& self = *static_cast<Escaped*>(to);
    self.indices.push_back(self.matrix[row * self.columns + self.first + lane]);
  }
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

void trellis_decode_(Tensor words, Tensor state, Tensor tables, Tensor row_classes,
                     Tensor column_classes, int64_t classes, Tensor escapes, double step,
                     Tensor decoded) {
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
  const Rows rows{rows_of<float>(decoded, m.rows, m.columns, "decoded values"), decoded.stride(0)};
  const bool complete = routines().decode(stream, escaped, m, table, float(step), rows);
  STD_TORCH_CHECK(complete, "wavprune: the coded values end early");
  at[0] = stream.position;
  at[1] = escaped.position;
  for (int l = 0; l < kColumns; ++l) at[2 + l] = stream.states[l];
}

Tensor trellis_encode_(Tensor words, Tensor state, Tensor codes, Tensor row_classes,
                     Tensor column_classes, int64_t classes, Tensor indices) {
  const Matrix m = matrix_of(row_classes, column_classes, classes);
  Escaped escaped{{}, indices_of(indices, m), m.columns, 0};
  Encoder encoder;
  encoder.words = data_of<uint16_t>(words, ScalarType::Short, "words");
  int64_t* const at = data_of<int64_t>(state, ScalarType::Long, "state");
  STD_TORCH_CHECK(state.numel() == 2 + kColumns, "wavprune: a state has 34 numbers");
  encoder.position = at[0];
  STD_TORCH_CHECK(at[0] >= m.rows * m.columns && at[0] <= words.numel(),
                  "wavprune: no room for the words of ", m.rows * m.columns, " indices");
  encoder.codes = data_of<const int32_t>(codes, ScalarType::Int, "codes");
  STD_TORCH_CHECK(codes.numel() == classes * 2 * kSymbols, "wavprune: codes of ",
                  codes.numel() / kSymbols, " tables for ", classes, " classes");
  encoder.inverses = kInverses.above;
  for (int l = 0; l < kColumns; ++l) {
    STD_TORCH_CHECK(at[2 + l] >= kLeastState && at[2 + l] <= 0xffffffffll, "wavprune: state ",
                    at[2 + l]);
    encoder.states[l] = uint32_t(at[2 + l]);
  }
  encoder.escape = Escaped::add;
  encoder.to = &escaped;
  const Routines& chosen = routines();
  const Scratch<uint16_t> entries(std::max<int64_t>(m.rows, 1) * kColumns);
  for (int64_t group = (m.columns + kColumns - 1) / kColumns; group-- > 0;) {
    escaped.first = group * kColumns;
    const int lanes = int(std::min<int64_t>(m.columns - escaped.first, kColumns));
    chosen.entries(m, escaped.matrix, escaped.first, lanes, entries.get());
    STD_TORCH_CHECK(chosen.encode(encoder, entries.get(), m.rows, lanes),
                    "wavprune: a table without escapes");
  }
  at[0] = encoder.position;
  for (int l = 0; l < kColumns; ++l) at[2 + l] = encoder.states[l];
  Tensor result = torch::stable::empty({int64_t(escaped.indices.size())}, ScalarType::Int);
  std::reverse_copy(escaped.indices.begin(), escaped.indices.end(),
                    static_cast<int32_t*>(result.data_ptr()));
  return result;
}

Tensor trellis_counts(Tensor indices, Tensor row_classes, Tensor column_classes, int64_t classes) {
  const Matrix m = matrix_of(row_classes, column_classes, classes);
  const Indices k = indices_of(indices, m);
  Tensor result = torch::stable::empty({classes * 2, kSymbols}, ScalarType::Long);
  int64_t* const counts = static_cast<int64_t*>(result.data_ptr());
  std::fill_n(counts, classes * 2 * kSymbols, 0);
  const Scratch<uint16_t> entries(std::max<int64_t>(m.rows, 1) * kColumns);
  for (int64_t first = 0; first < m.columns; first += kColumns) {
    const int lanes = int(std::min<int64_t>(m.columns - first, kColumns));
    routines().entries(m, k, first, lanes, entries.get());
    for (int64_t row = 0; row < m.rows; ++row)
      for (int l = 0; l < lanes; ++l) ++counts[entries.get()[row * kColumns + l]];
  }
  return result;
}

Tensor trellis_sums(Tensor indices, Tensor kinds, int64_t number) {
  STD_TORCH_CHECK(indices.dim() == 2, "wavprune: indices are (rows, columns)");
  const int64_t rows = indices.size(0), columns = indices.size(1);
  const uint8_t* const kind = data_of<const uint8_t>(kinds, ScalarType::Byte, "kinds");
  STD_TORCH_CHECK(number >= 0 && kinds.numel() == (number ? rows : 0),
                  "wavprune: kinds do not fit the rows");
  for (int64_t row = 0; number && row < rows; ++row)
    STD_TORCH_CHECK(kind[row] < number, "wavprune: kind ", int(kind[row]), " of ", number);
  Tensor result = torch::stable::empty({rows + number * columns}, ScalarType::Long);
  int64_t* const out = static_cast<int64_t*>(result.data_ptr());
  std::fill_n(out, rows + number * columns, 0);
  routines().sums(indices_of(indices), rows, columns, number ? kind : nullptr, out, out + rows);
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

Tensor trellis_round_(Tensor values, Tensor zeros, double step, Tensor indices, Tensor decoded) {
  const KeepDenormals guard;
  STD_TORCH_CHECK(values.dim() == 2, "wavprune: values are (rows, columns)");
  Rounded r;
  r.rows = values.size(0);
  r.columns = values.size(1);
  const int64_t n = r.rows * r.columns;
  STD_TORCH_CHECK(!zeros.numel() || zeros.numel() == n, "wavprune: zeros do not fit the values");
  STD_TORCH_CHECK(indices.numel() == n, "wavprune: indices do not fit the values");
  r.values = rows_of<const float>(values, r.rows, r.columns, "values");
  r.stride = values.stride(0);
  r.zeros = zeros.numel() ? data_of<const uint8_t>(zeros, ScalarType::Byte, "zeros") : nullptr;
  r.step = float(step);
  STD_TORCH_CHECK(r.step > 0 && std::isfinite(r.step), "wavprune: a step of ", step);
  const Indices to = indices_of(indices);
  r.indices = const_cast<void*>(to.data);
  r.narrow = to.narrow;
  r.decoded = rows_of<float>(decoded, r.rows, r.columns, "decoded values");
  r.decoded_stride = decoded.stride(0);
  Tensor errors = torch::stable::empty({r.columns}, ScalarType::Double);
  r.errors = static_cast<double*>(errors.data_ptr());
  if (!n) return errors;
  const Scratch<uint8_t> decisions(r.rows * kWide);
  routines().round(r, decisions.get());
  return errors;
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

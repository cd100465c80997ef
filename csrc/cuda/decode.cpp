// Decoding packed checkpoints on CUDA: what a call is checked for, and its tables. What a file may
// say is checked when it is read, and src/wavprune/checkpoint/on_device.py says which files a device
// decodes; checked here is what keeps every address within its memory, and every number exact.
//
// Bytes: two a word are read, four a weight are written, and read and written again where a tensor
// is not its values; a checksum reads it once more.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "coded.h"
#include "launch.h"
#include "ops.h"
#include "table_builder.h"

namespace wavprune::cuda {

namespace {

// The columns of the caller's two tables; src/wavprune/checkpoint/on_device.py fills them.
enum OfStream { kStart, kWords, kEscapes, kEscapeCount, kFirst, kMatrices, kWhole, kMask, kOfStream };
enum OfMatrix {
  kRows,
  kColumnCount,
  kRowClasses,
  kColumnClasses,
  kStep,
  kSynthesis,
  kKernelValues,
  kCoefficients,
  kGroups,
  kTransposed,
  kExponent,
  kOfMatrix
};

// What a CUDA kernel counts in 32 bits.
constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
// Powers of two up to which both halves are numbers of float64.
constexpr int64_t kLargestExponent = 1100;

template <class T>
const T* numbers_of(const Tensor& tensor, ScalarType dtype, int64_t width, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                      tensor.dim() == 2 && tensor.size(1) == width,
                  "wavprune: ", name, " must be rows of ", width, " numbers on the CPU");
  return static_cast<const T*>(tensor.data_ptr());
}

// Bytes on the device, of which parts are asked for by where they begin.
struct Bytes {
  const char* data;
  int64_t size;
  const char* name;

  Bytes(const Tensor& tensor, const Tensor& with, const char* called)
      : data(static_cast<const char*>(tensor.data_ptr())), size(tensor.numel()), name(called) {
    STD_TORCH_CHECK(reachable(tensor) && tensor.scalar_type() == ScalarType::Byte &&
                        tensor.is_contiguous() &&
                        tensor.get_device_index() == with.get_device_index(),
                    "wavprune: ", name, " must be contiguous bytes on one CUDA device");
    STD_TORCH_CHECK(uintptr_t(data) % 16 == 0, "wavprune: ", name,
                    " must begin at a multiple of 16 bytes");
  }

  template <class T>
  const T* at(int64_t start, int64_t count) const {
    STD_TORCH_CHECK(start >= 0 && count >= 0 && start % int64_t(sizeof(T)) == 0 && start <= size &&
                        count <= (size - start) / int64_t(sizeof(T)),
                    "wavprune: ", name, " have ", size, " bytes, and not ", count, " items at ",
                    start);
    return reinterpret_cast<const T*>(data + start);
  }
};

// The codes of a table, in the order of its symbols.
std::vector<uint32_t> codes_of(const int32_t* frequencies, int64_t table) {
  std::vector<uint32_t> codes;
  int64_t first = 0;
  for (int symbol = 0; symbol < coding::kSymbols; ++symbol) {
    const int64_t frequency = frequencies[symbol];
    STD_TORCH_CHECK(frequency >= 0 && frequency < kSlots, "wavprune: table ", table,
                    " has a frequency of ", frequency);
    if (frequency == 0) continue;
    codes.push_back(uint32_t(frequency) << kFrequencyShift | byte_of(symbol) << kByteShift |
                    (uint32_t(first) & kSlotBits));
    first += frequency;
  }
  STD_TORCH_CHECK(first == 0 || first == kSlots, "wavprune: the frequencies of table ", table,
                  " add up to ", first);
  if (codes.empty()) codes.push_back(0);
  return codes;
}

CodedStream stream_of(const int64_t* given, int64_t index, int64_t before, int64_t matrices,
                      const Bytes& coded, const Bytes& parts) {
  STD_TORCH_CHECK(given[kWords] >= 0 && given[kWords] <= kLargest / 2 && given[kEscapeCount] >= 0 &&
                      given[kEscapeCount] <= kLargest,
                  "wavprune: stream ", index, " of ", given[kWords], " words with ",
                  given[kEscapeCount], " escapes");
  STD_TORCH_CHECK(given[kFirst] == before && given[kMatrices] >= 0 &&
                      given[kMatrices] <= matrices - before,
                  "wavprune: stream ", index, " of ", given[kMatrices], " matrices from ",
                  given[kFirst], " on");
  CodedStream stream{};
  stream.states = coded.at<uint32_t>(given[kStart], kWarp + given[kWords] / 2 + 1);
  stream.escapes = parts.at<int32_t>(given[kEscapes], given[kEscapeCount]);
  stream.words = uint32_t(given[kWords]);
  stream.escape_count = int(given[kEscapeCount]);
  stream.first = int(given[kFirst]);
  stream.matrices = int(given[kMatrices]);
  stream.index = int(index);
  stream.whole = given[kWhole] != 0;
  stream.classes = uint64_t(given[kMask]) & ((uint64_t(1) << kClasses) - 1);
  STD_TORCH_CHECK(stream.classes != 0, "wavprune: stream ", index, " has no class of ",
                  int(kClasses), ": ", given[kMask]);
  return stream;
}

CodedMatrix matrix_of(const int64_t* given, int64_t index, const Tensor& decoded,
                      const Bytes& parts) {
  CodedMatrix m{};
  const int64_t rows = given[kRows], columns = given[kColumnCount];
  STD_TORCH_CHECK(rows >= 1 && columns >= 1 && rows <= kLargest && columns <= kLargest / rows,
                  "wavprune: matrix ", index, " of ", rows, " rows and ", columns, " columns");
  m.rows = int(rows);
  m.columns = int(columns);
  m.row_classes = parts.at<uint8_t>(given[kRowClasses], rows);
  m.column_classes = parts.at<uint8_t>(given[kColumnClasses], columns);
  const uint32_t step = uint32_t(given[kStep]);
  std::memcpy(&m.step, &step, sizeof step);
  const int64_t values = given[kKernelValues], coefficients = given[kCoefficients];
  const int64_t groups = given[kGroups];
  STD_TORCH_CHECK(values >= 1 && coefficients >= 1 && columns % coefficients == 0 &&
                      values <= kLargest / (rows * (columns / coefficients)) && groups >= 1 &&
                      rows % groups == 0 && given[kExponent] >= -kLargestExponent &&
                      given[kExponent] <= kLargestExponent,
                  "wavprune: kernels of matrix ", index, " have ", values, " values, ",
                  coefficients, " coefficients and ", groups, " groups, times 2 to the power of ",
                  given[kExponent]);
  STD_TORCH_CHECK(given[kSynthesis] >= 0 || values == coefficients,
                  "wavprune: matrix ", index, " has no synthesis");
  if (given[kSynthesis] >= 0) {
    STD_TORCH_CHECK(values <= kLargest / coefficients, "wavprune: the synthesis of matrix ", index,
                    " is too large");
    m.synthesis = parts.at<float>(given[kSynthesis], values * coefficients);
  }
  m.kernel_values = int(values);
  m.coefficients = int(coefficients);
  m.groups = int(groups);
  m.transposed = given[kTransposed] != 0;
  if (decoded.numel() == 0) return m;
  m.count = uint32_t(rows * (columns / coefficients) * values);
  check_dtype(decoded, "a decoded tensor");
  STD_TORCH_CHECK(reachable(decoded) && decoded.is_contiguous() && decoded.numel() == m.count &&
                      uintptr_t(decoded.data_ptr()) % 8 == 0,
                  "wavprune: tensor ", index, " must have ", m.count,
                  " elements, contiguous on the device of the coded bytes");
  m.tensor = static_cast<char*>(decoded.data_ptr());
  m.element = element_of(decoded.scalar_type());
  m.bytes = int64_t(m.count) * decoded.element_size();
  const int exponent = int(given[kExponent]), half = exponent / 2;
  m.factors[0] = std::ldexp(1.0, half);
  m.factors[1] = std::ldexp(1.0, exponent - half);
  m.scaled = exponent != 0;
  m.direct = m.element == Element::f32 && !m.scaled && !m.transposed && m.synthesis == nullptr;
  return m;
}

// Steps of the warp that decodes a stream.
int64_t steps_of(const CodedStream& stream, const std::vector<CodedMatrix>& matrices) {
  int64_t steps = 0;
  for (int i = 0; i < stream.matrices; ++i) {
    const CodedMatrix& m = matrices[stream.first + i];
    steps += int64_t(m.rows) * ((m.columns + kWarp - 1) / kWarp);
  }
  return steps;
}

}  // namespace

Tensor trellis_load_(Tensor coded, Tensor parts, Tensor frequencies, Tensor streams,
                     Tensor matrices, std::vector<Tensor> decoded) {
  const Bytes coded_bytes(coded, coded, "coded bytes"), part_bytes(parts, coded, "parts");
  const int32_t* const counts =
      numbers_of<int32_t>(frequencies, ScalarType::Int, coding::kSymbols, "frequencies");
  STD_TORCH_CHECK(frequencies.size(0) == kCodeTables, "wavprune: frequencies of ",
                  frequencies.size(0), " tables; allowed: ", int(kCodeTables));
  const int64_t* const of_streams =
      numbers_of<int64_t>(streams, ScalarType::Long, kOfStream, "streams");
  const int64_t* const of_matrices =
      numbers_of<int64_t>(matrices, ScalarType::Long, kOfMatrix, "matrices");
  const int64_t stream_count = streams.size(0), matrix_count = matrices.size(0);
  STD_TORCH_CHECK(int64_t(decoded.size()) == matrix_count, "wavprune: ", matrix_count,
                  " matrices came with ", decoded.size(), " tensors");

  std::vector<CodedMatrix> matrix_rows;
  int64_t blocks = 0, runs = 0, segments = 0, scratch_values = 0;
  for (int64_t i = 0; i < matrix_count; ++i) {
    const Tensor& tensor = decoded[size_t(i)];
    STD_TORCH_CHECK(tensor.numel() == 0 || tensor.get_device_index() == coded.get_device_index(),
                    "wavprune: tensor ", i, " must be on the device of the coded bytes");
    CodedMatrix m = matrix_of(of_matrices + i * kOfMatrix, i, tensor, part_bytes);
    m.first_block = int(blocks);
    m.first_segment = int(segments);
    m.first_run = int(runs);
    if (m.tensor != nullptr) {
      m.blocks = m.direct ? 0 : int((int64_t(m.count) + kElements - 1) / kElements);
      m.runs = int((int64_t(m.rows) * m.columns + kElements - 1) / kElements);
      m.segments = int((m.bytes + kSegment - 1) / kSegment);
      if (!m.direct) scratch_values += (int64_t(m.rows) * m.columns + 3) / 4 * 4;
    }
    blocks += m.blocks;
    segments += m.segments;
    runs += m.runs;
    STD_TORCH_CHECK(blocks <= kLargest && runs <= kLargest && segments <= kLargest,
                    "wavprune: the tensors are too large for one call");
    matrix_rows.push_back(m);
  }
  std::vector<CodedStream> stream_rows;
  int64_t before = 0;
  for (int64_t i = 0; i < stream_count; ++i) {
    stream_rows.push_back(stream_of(of_streams + i * kOfStream, i, before, matrix_count,
                                    coded_bytes, part_bytes));
    before += stream_rows.back().matrices;
  }
  STD_TORCH_CHECK(before == matrix_count, "wavprune: ", matrix_count, " matrices, of which ",
                  before, " are in streams");
  // The longest first, so that the others run beside it.
  std::stable_sort(stream_rows.begin(), stream_rows.end(),
                   [&](const CodedStream& a, const CodedStream& b) {
                     return steps_of(a, matrix_rows) > steps_of(b, matrix_rows);
                   });

  const Device device(coded);
  const int64_t results = stream_count + matrix_count;
  Tensor found =
      torch::stable::new_empty(coded, {(results + 3) / 4 * 4}, ScalarType::Int);
  if (stream_count == 0) return found;
  const Tensor scratch = torch::stable::new_empty(coded, {scratch_values}, ScalarType::Float);
  float* values = static_cast<float*>(scratch.data_ptr());
  for (CodedMatrix& m : matrix_rows) {
    if (m.tensor == nullptr) continue;
    m.values = m.direct ? reinterpret_cast<float*>(m.tensor) : values;
    if (!m.direct) values += (int64_t(m.rows) * m.columns + 3) / 4 * 4;
  }
  std::vector<std::vector<uint32_t>> codes;
  int64_t table_bytes = 0;
  for (int t = 0; t < kCodeTables; ++t) {
    codes.push_back(codes_of(counts + int64_t(t) * coding::kSymbols, t));
    table_bytes += CodeTable::bytes_for(int(codes.back().size()));
  }
  const Tensor expanded = torch::stable::new_empty(coded, {table_bytes}, ScalarType::Byte);
  uint8_t* slots = static_cast<uint8_t*>(expanded.data_ptr());
  constexpr coding::Powers kMoves = coding::make_powers();
  Packer packer;
  const CodedStream* on_device_streams = packer.put(stream_rows);
  const CodedMatrix* on_device_matrices = packer.put(matrix_rows);
  const uint32_t* powers = packer.put(kMoves.of, size_t(coding::kPowers));
  std::vector<CodeTable> table_rows;
  for (const std::vector<uint32_t>& own : codes) {
    const int bytes = CodeTable::bytes_for(int(own.size()));
    table_rows.push_back({slots, packer.put(own), int(own.size()), bytes});
    slots += bytes;
  }
  const CodeTable* tables = packer.put(table_rows);
  for (const CodeTable& row : table_rows) packer.link(tables, table_rows.data(), row.codes);
  const std::vector<char>& bytes = packer.bytes();
  const Tensor memory =
      torch::stable::new_empty(coded, {int64_t(bytes.size())}, ScalarType::Byte);
  packer.move(static_cast<char*>(memory.data_ptr()), on_device_streams, on_device_matrices, powers,
              tables);
  upload(bytes.data(), bytes.size(), memory.data_ptr(),
         {found.data_ptr(), size_t(found.numel()) * sizeof(uint32_t), nullptr, 0, 0.0},
         device.stream());
  uint32_t* const verdicts = static_cast<uint32_t*>(found.data_ptr());
  expand_tables(tables, device.stream());
  decode_streams(on_device_streams, int(stream_count), on_device_matrices, tables, stream_rows,
                 verdicts, device.stream());
  if (runs > 0) dequantise(on_device_matrices, int(matrix_count), int(runs), device.stream());
  if (blocks > 0) synthesise(on_device_matrices, int(matrix_count), int(blocks), device.stream());
  if (segments > 0)
    checksums(on_device_matrices, int(matrix_count), int(segments), powers,
              verdicts + stream_count, device.stream());
  return found;
}

}  // namespace wavprune::cuda

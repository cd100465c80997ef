// From decoded values to tensors, and the checksums of these.
#pragma once

#include <type_traits>

#include "coded.h"
#include "elements.cuh"

namespace wavprune::cuda {

// The matrix whose blocks, counted from `first` on, hold this one.
template <class First>
__device__ __forceinline__ const CodedMatrix& matrix_of_block(const CodedMatrix* matrices,
                                                              int count, First first) {
  int low = 0;
  while (count > 1) {
    const int half = count / 2;
    if (first(matrices[low + half]) <= int(blockIdx.x)) low += half, count -= half;
    else count = half;
  }
  return matrices[low];
}

// The index of a mark, times two, less what its quantiser takes: its value in steps.
__device__ __forceinline__ int32_t value_of_mark(uint32_t mark) {
  const int quantiser = int(mark >> 2 & 1);
  if (mark & kEscaped) {
    // Its sign is the highest of its bits.
    const int32_t k = int32_t(mark << 6) >> 9;
    return coding::value_of(k, quantiser);
  }
  const uint32_t byte = (mark & kByteBits) >> kByteShift ^ 0xFE;
  const int32_t magnitude = int32_t(byte >> 1);
  return coding::value_of(byte & 1 ? -magnitude : magnitude, quantiser);
}

__global__ void __launch_bounds__(kThreads)
    dequantise(const CodedMatrix* matrices, int count) {
  const CodedMatrix& m =
      matrix_of_block(matrices, count, [](const CodedMatrix& each) { return each.first_run; });
  const float step = m.step;
  const uint32_t size = uint32_t(m.rows) * uint32_t(m.columns);
  const uint32_t begin = uint32_t(int(blockIdx.x) - m.first_run) * kElements;
  for (int i = 0; i < kElements / kThreads; ++i) {
    const uint32_t at = begin + uint32_t(i) * kThreads + threadIdx.x;
    if (at >= size) return;
    m.values[at] = float(value_of_mark(m.marks[at])) * step;
  }
}

// Where the coefficients of a kernel begin, the kernels counted as the tensor has them.
__device__ __forceinline__ const float* coefficients_of(const CodedMatrix& m, uint32_t kernel) {
  if (!m.transposed) return m.values + uint64_t(kernel) * uint32_t(m.coefficients);
  const uint32_t outputs = uint32_t(m.rows / m.groups);
  const uint32_t inputs = uint32_t(m.columns / m.coefficients);
  const uint32_t input = kernel / outputs, output = kernel % outputs;
  const uint64_t row = input / inputs * outputs + output;
  return m.values + row * uint32_t(m.columns) + input % inputs * uint32_t(m.coefficients);
}

// csrc/kernel_math.h has the same sum for the CPU, `sparse_row`: over what is not 0, from the left.
__device__ __forceinline__ float synthesised(const CodedMatrix& m, const float* coefficients,
                                             uint32_t k) {
  if (m.synthesis == nullptr) return coefficients[k];
  const float* const row = m.synthesis + uint64_t(k) * uint32_t(m.coefficients);
  double sum = 0;
  bool begun = false;
  for (int i = 0; i < m.coefficients; ++i) {
    const double factor = row[i];
    if (factor == 0) continue;
    const double term = double(coefficients[i]) * factor;
    sum = begun ? sum + term : term;
    begun = true;
  }
  return float(sum);
}

// What is scaled is brought to within the range of the dtype; else only float16 is, as on the CPU.
template <class E>
__device__ __forceinline__ void put(const CodedMatrix& m, uint32_t at, float value) {
  E* const to = reinterpret_cast<E*>(m.tensor) + at;
  if (m.scaled) {
    const double scaled =
        clamped(double(value) * m.factors[0] * m.factors[1], kLargestValue<E>);
    if constexpr (sizeof(E) == 8) *to = scaled;
    else *to = static_cast<E>(float(scaled));
    return;
  }
  if constexpr (std::is_same_v<E, torch::headeronly::Half>)
    value = clamped(value, kLargestValue<E>);
  *to = static_cast<E>(value);
}

__global__ void __launch_bounds__(kThreads)
    synthesise(const CodedMatrix* matrices, int count) {
  const CodedMatrix& m =
      matrix_of_block(matrices, count, [](const CodedMatrix& each) { return each.first_block; });
  const uint32_t begin = uint32_t(int(blockIdx.x) - m.first_block) * kElements;
  with_element_type(m.element, [&](auto zero) {
    for (int i = 0; i < kElements / kThreads; ++i) {
      const uint32_t at = begin + uint32_t(i) * kThreads + threadIdx.x;
      if (at >= m.count) return;
      const uint32_t kernel = at / uint32_t(m.kernel_values);
      const uint32_t k = at % uint32_t(m.kernel_values);
      put<decltype(zero)>(m, at, synthesised(m, coefficients_of(m, kernel), k));
    }
  });
}

// CRC-32 of every tensor. A thread takes every 256th word of its block's bytes, and moves what it
// has on by as many words at each; the remainders of threads and blocks are moved on by what follows
// them and added, which for bits is the exclusive or, in any order.
__global__ void __launch_bounds__(kThreads)
    checksums(const CodedMatrix* matrices, int count, const uint32_t* powers, uint32_t* found) {
  __shared__ uint32_t onward[4][256];
  __shared__ uint32_t sum;
  const uint32_t row = powers[10];  // past 4 * kThreads bytes
  static_assert(4 * kThreads == 1 << 10);
  for (int i = 0; i < 4; ++i)
    onward[i][threadIdx.x] = coding::product(uint32_t(threadIdx.x) << 8 * i, row);
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  const CodedMatrix& m =
      matrix_of_block(matrices, count, [](const CodedMatrix& each) { return each.first_segment; });
  const int64_t begin = int64_t(int(blockIdx.x) - m.first_segment) * kSegment;
  const int64_t bytes = m.bytes - begin < kSegment ? m.bytes - begin : kSegment;
  const int words = int(bytes / 4);
  const uint32_t* const data = reinterpret_cast<const uint32_t*>(m.tensor + begin);
  uint32_t own = 0;
  int last = -1;
  for (int w = threadIdx.x; w < words; w += kThreads) {
    own = onward[0][own & 255] ^ onward[1][own >> 8 & 255] ^ onward[2][own >> 16 & 255] ^
          onward[3][own >> 24] ^ data[w];
    last = w;
  }
  if (last >= 0) own = coding::moved(own, uint64_t(bytes - 4 * int64_t(last)), powers);
  if (threadIdx.x == 0) {
    for (int64_t i = 4 * int64_t(words); i < bytes; ++i)
      own ^= coding::moved(reinterpret_cast<const uint8_t*>(data)[i], uint64_t(bytes - i), powers);
  }
  atomicXor(&sum, own);
  __syncthreads();
  if (threadIdx.x != 0) return;
  uint32_t total = coding::moved(sum, uint64_t(m.bytes - begin - bytes), powers);
  // A checksum begins and ends with all bits turned.
  if (begin == 0) total ^= ~coding::moved(0xffffffffu, uint64_t(m.bytes), powers);
  atomicXor(found + (&m - matrices), total);
}

}  // namespace wavprune::cuda

// What the host asks of the device: launches on a stream, none of which it waits for.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "coded.h"
#include "table.h"

// As in CUDA's headers, which the host's files do not include.
struct CUstream_st;

namespace wavprune::cuda {

typedef CUstream_st* Stream;

// True where the CUDA kernels can access the tensor's memory.
bool reachable(const torch::stable::Tensor& tensor);

// While it lives, the device of a tensor is the current one.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& tensor);
  Stream stream() const { return stream_; }

 private:
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
  Stream stream_ = nullptr;
};

// What the first launch of an upload does besides copying: clears memory, a multiple of 16 bytes,
// and fills numbers with a value.
struct Preset {
  void* clear;
  size_t clear_bytes;
  double* fill;
  int64_t fill_count;
  double value;
};

// Copies `bytes`, a multiple of 16, to the device: one launch for each 32 KB.
void upload(const void* table, size_t bytes, void* target, const Preset& preset, Stream stream);

template <class T>
void count_digits(Row<T>* rows, int row_count, int blocks, size_t tile_bytes, Job* jobs,
                  Count* counts, double* thresholds, Stream stream);

template <class T>
void prune_rows(Row<T>* rows, int row_count, int blocks, size_t tile_bytes,
                const double* thresholds, double* partials, double* result, Stream stream);

template <class T>
void prune_rows_by_mask(Row<T>* rows, int row_count, int blocks, size_t tile_bytes,
                        double* partials, double* result, Stream stream);

template <class T>
void project_rows(Row<T>* rows, int row_count, int blocks, size_t tile_bytes, Stream stream);

// `clear` says that several tiles write to one word of some mask.
template <class T>
void mark_rows(Row<T>* rows, int row_count, int blocks, size_t tile_bytes, bool clear,
               const double* thresholds, Stream stream);

template <class T>
void mask_values(const char* data, Element element, int64_t count, const double* threshold,
                 bool packed, uint8_t* mask, Stream stream);

template <class T>
void transform_rows(const Plan<T>* plan, const T* from, int64_t kernels, int tile_kernels,
                    size_t tile_bytes, bool forward, T* to, Stream stream);

// What the current device has.
struct Limits {
  int multiprocessors;
  int shared_bytes;  // the most that a block may ask for
};
Limits limits();

void expand_tables(const CodeTable* tables, Stream stream);

// `rows` are the streams as the host has them.
void decode_streams(const CodedStream* streams, int count, const CodedMatrix* matrices,
                    const CodeTable* tables, const std::vector<CodedStream>& rows,
                    uint32_t* found, Stream stream);

void dequantise(const CodedMatrix* matrices, int count, int blocks, Stream stream);

void synthesise(const CodedMatrix* matrices, int count, int blocks, Stream stream);

void checksums(const CodedMatrix* matrices, int count, int segments, const uint32_t* powers,
               uint32_t* found, Stream stream);

}  // namespace wavprune::cuda

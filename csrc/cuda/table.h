// What the CUDA kernels read, as it lies in the device's memory: one row a weight, one job a
// threshold.
#pragma once

#include <cstdint>

#include "../kernel_math.h"

namespace wavprune::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Blocks of a multiprocessor at a time, of CUDA kernels that read weights, and of those that write
// them too: a thread then has 64, 80 or 128 registers, and spills none.
template <class T>
constexpr int kReading = sizeof(T) == 4 ? 4 : 2;
template <class T>
constexpr int kWriting = sizeof(T) == 4 ? 3 : 2;
// Loads of a thread that are under way together where each needs an offset of its own.
constexpr int kAtOnce = 3;
// Values of a tile, which a block holds in shared memory: a 3x3 kernel for each thread.
constexpr int kOwnValues = 9;
constexpr int kTileValues = kOwnValues * kThreads;
constexpr int kBins = 2048;
// The most shared memory of a tile. With the selection's own it is less than 48 KiB, which every
// device has.
constexpr int kTileBytes = 31 * 1024;

// 16 bytes.
struct alignas(16) Word {
  uint64_t halves[2];
};

enum class Element : int { f32, f64, f16, bf16 };

// How the values of a weight follow each other in memory: as their flat indices do; or so that
// neighbors belong to different kernels; or in another way.
enum class Order : int { contiguous, adjacent, strided };

// How kernels are transformed: not at all; each by one thread in its registers; or by the threads of
// a block together, in shared memory.
enum class Way : int { identity, registers, shared };

template <class U, U constant>
struct Constant {
  static constexpr U value = constant;
};

// A mask has a word for each block of 16 kernels and coefficient, block by block; bit l is that of
// the block's kernel l. For the identity every value is a kernel of one coefficient.
typedef uint16_t MaskWord;
constexpr int kMaskBlock = 16;

// The output or the input channels of a weight.
struct Channels {
  int64_t size, stride;  // in memory
  int64_t step;          // between the flat indices of their kernels
};

// One weight, done by the blocks first_block .. first_block + blocks - 1 of a launch. Its layout
// says how tiles are cut and in which order their values are loaded and stored.
template <class T>
struct Row {
  char* data;
  const Plan<T>* plan;
  MaskWord* mask;  // null where no mask is read or written
  int64_t kernels;
  // Neighboring kernels of a tile are neighbors along the fast channels.
  Channels slow, fast;
  int64_t value_strides[2];
  uint64_t seed;
  int values, width;  // K and kw
  int tile_kernels;
  int tiles, tiles_of_block;
  // Tiles are rectangles of this many fast and slow channels; where these are 0, runs of kernels in
  // the order of their flat indices.
  int brick_fast, brick_slow;
  int first_block, blocks;
  int arrived;  // blocks that have finished
  int index;    // which of the caller's weights
  int job;
  Element element;
  Order order;
  Way way;
  bool shares_words;      // several tiles have bits in one word of the mask
  bool random;            // ranked by the seed
};

// Weights that share one threshold, between the values of two adjacent ranks.
struct Job {
  uint64_t prefix[2];  // the digits of the two values that are known
  int64_t rank[2];     // among the values that share these digits
  double fraction;
  bool structural_zero[2];  // the value is 0 instead
  bool nonfinite;
  int blocks, arrived;
  int index;  // which of the caller's thresholds
};

// Counts of a job: a histogram for each of its two ranks.
typedef unsigned long long Count;
constexpr int kJobCounts = 2 * kBins;

// 3x3 kernels fit into the registers of a thread.
template <class T>
WAVPRUNE_INLINE Way way_of(const Plan<T>& plan) {
  if (plan.kind == Kind::identity) return Way::identity;
  if (plan.kind == Kind::pairs || plan.kind == Kind::merges) return Way::registers;
  const Axes<T>& axes = plan.forward_axes;
  const bool fits = plan.kind == Kind::separable && axes.rows_in == 3 && axes.columns_in == 3 &&
                    axes.rows_out == 3 && axes.columns_out == 3;
  return fits ? Way::registers : Way::shared;
}

}  // namespace wavprune::cuda

// What the kernels work on, as it lies in the device's memory: one row a weight, one job a
// threshold.
#pragma once

#include <cstdint>

#include "../plan.h"

namespace wavprune::cuda {

constexpr int kThreads = 256;
// Values of a tile, which a block holds at a time: a 3x3 kernel for each thread.
constexpr int kTileValues = 9 * kThreads;
// Tiles of a block: enough to spread the cost of its histogram.
constexpr int kTiles = 8;
constexpr int kBins = 2048;
// With what selection needs itself it is less than 48 KiB, which every device has.
constexpr int kTileBytes = 31 * 1024;

enum class Element : int { f32, f64, f16, bf16 };

// One weight. The blocks first_block .. first_block + blocks - 1 of a launch do it.
template <class T>
struct Row {
  char* data;
  const Plan<T>* plan;
  int64_t kernels, ins;
  int64_t strides[4];
  uint64_t seed;
  int values, width;  // K and kw
  int tile_kernels;
  int first_block, blocks;
  int arrived;  // blocks that are through
  int index;    // which of the caller's weights
  int job;
  Element element;
  bool contiguous;
  bool across;  // neighbours in memory belong to different kernels
  bool draw;
};

// Weights that share one threshold: two neighbouring ranks, and the way from one to the other.
struct Job {
  uint64_t prefix[2];  // of the two values, the digits that are known
  int64_t rank[2];     // among the values that share these digits
  double fraction;
  bool zero[2];  // a structural zero answers
  bool nonfinite;
  int blocks, arrived;
  int index;  // which of the caller's thresholds
};

// Counts of a job: a histogram for each of its ranks.
typedef unsigned long long Count;
constexpr int kJobCounts = 2 * kBins;

}  // namespace wavprune::cuda

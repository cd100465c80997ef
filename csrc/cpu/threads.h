#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "denormals.h"

namespace wavprune {

// Runs worker(next) on every thread of torch's pool. next() hands out 0, 1, 2, .. to whoever asks
// first; a worker stops at `count`.
template <class F>
void parallel_tasks(int64_t count, F worker) {
  std::atomic<int64_t> handed_out{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const KeepDenormals guard;
    for (int64_t t = begin; t < end; ++t)
      worker([&] { return handed_out.fetch_add(1, std::memory_order_relaxed); });
  });
}

}  // namespace wavprune

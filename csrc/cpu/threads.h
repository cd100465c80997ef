#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

#include "denormals.h"

namespace wavprune {

// f(begin, end) for parts of [0, threads), each on a thread of its own.
template <class F>
void on_threads(int64_t threads, F f) {
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer does not see how the threads of torch's pool wait for each other.
  std::vector<std::thread> started;
  for (int64_t t = 0; t < threads; ++t) started.emplace_back(f, t, t + 1);
  for (std::thread& thread : started) thread.join();
#else
  torch::stable::parallel_for(0, threads, 1, f);
#endif
}

// Runs worker(next) on every thread of torch's pool. next() hands out 0, 1, 2, .. to whoever asks
// first; a worker stops at `count`.
template <class F>
void parallel_tasks(int64_t count, F worker) {
  std::atomic<int64_t> handed_out{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  on_threads(threads, [&](int64_t begin, int64_t end) {
    const KeepDenormals guard;
    for (int64_t t = begin; t < end; ++t)
      worker([&] { return handed_out.fetch_add(1, std::memory_order_relaxed); });
  });
}

}  // namespace wavprune

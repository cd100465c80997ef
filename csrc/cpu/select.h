// Exact order statistics of the ranks of one or many weights.
#pragma once

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "../kernel_math.h"
#include "weights.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace wavprune {

// One weight: what ranks its coefficients is |c|, or a random draw where `draw` is set.
template <class T>
struct Piece {
  Weight weight;
  const Plan<T>* plan;
  bool draw;
  uint64_t seed;
};

// Weights that share one threshold.
template <class T>
struct Job {
  std::vector<Piece<T>> pieces;
  int64_t total = 0;          // coefficients
  int64_t weights_total = 0;  // weights

  void add(const Piece<T>& piece) {
    if (piece.weight.kernels() * piece.weight.values() == 0) return;
    pieces.push_back(piece);
    total += coefficients(piece.weight, *piece.plan);
    weights_total += piece.weight.kernels() * piece.weight.values();
  }
};

// The weights with their plans, checked against each other. The plans live as long as what this
// returns; equal plan tensors share one.
template <class T>
std::vector<std::unique_ptr<OwnedPlan<T>>> pieces_of(const std::vector<torch::stable::Tensor>& weights,
                                                     const std::vector<torch::stable::Tensor>& plans,
                                                     const std::vector<int64_t>& draws,
                                                     std::vector<Piece<T>>* pieces) {
  STD_TORCH_CHECK(weights.size() == plans.size(), "wavprune: ", weights.size(),
                  " weights came with ", plans.size(), " plans");
  STD_TORCH_CHECK(draws.empty() || draws.size() == weights.size(), "wavprune: ", weights.size(),
                  " weights came with ", draws.size(), " draws");
  std::vector<std::unique_ptr<OwnedPlan<T>>> owned;
  std::vector<std::pair<const void*, const Plan<T>*>> known;
  for (size_t w = 0; w < weights.size(); ++w) {
    const Weight weight = weight_of(weights[w]);
    const void* source = plans[w].data_ptr();
    const Plan<T>* plan = nullptr;
    for (const auto& [other, made] : known)
      if (other == source && (made->kind == Kind::identity || made->inputs == weight.values()))
        plan = made;
    if (plan == nullptr) {
      owned.push_back(plan_of<T>(plans[w], weight.values()));
      plan = &owned.back()->plan;
      known.emplace_back(source, plan);
    }
    STD_TORCH_CHECK(draws.empty() || plan->kind == Kind::identity,
                    "wavprune: random draws go with the identity basis");
    pieces->push_back({weight, plan, !draws.empty(), draws.empty() ? 0 : uint64_t(draws[w])});
  }
  return owned;
}

// While it lives, this thread neither reads nor writes denormals as 0.
class KeepDenormals {
 public:
#if defined(__x86_64__)
  KeepDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~KeepDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  KeepDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ & ~(uint64_t(1) << 24)));
  }
  ~KeepDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// Runs worker(next) on every thread of torch's pool; next() deals out 0, 1, 2 .. to whoever asks
// first, so that no thread waits for another's larger share.
//
// Denormals count while a worker runs: flushed to zero, a comparison would contradict the bit
// patterns that rank.
template <class F>
void share_out(int64_t count, F worker) {
  std::atomic<int64_t> dealt{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const KeepDenormals guard;
    for (int64_t t = begin; t < end; ++t)
      worker([&] { return dealt.fetch_add(1, std::memory_order_relaxed); });
  });
}

// f(first, kernels) for every tile.
template <class T, class F>
void each_tile(const Piece<T>& piece, F f) {
  const int64_t tile = tile_kernels(piece.weight, *piece.plan), kernels = piece.weight.kernels();
  for (int64_t at = 0; at < kernels; at += tile) f(at, std::min(tile, kernels - at));
}

// One tile of one of several weights.
struct TileTask {
  int64_t weight, first, kernels;
};

template <class T>
std::vector<TileTask> tiles_of(const std::vector<Piece<T>>& pieces) {
  std::vector<TileTask> tasks;
  for (size_t w = 0; w < pieces.size(); ++w)
    each_tile(pieces[w], [&](int64_t first, int64_t kernels) {
      tasks.push_back({int64_t(w), first, kernels});
    });
  return tasks;
}

// The smallest positive number: at this threshold or above, a coefficient of 0 is never kept.
template <class T>
T positive(double threshold) {
  return std::max(T(threshold), std::numeric_limits<T>::denorm_min());
}

// Random ranks in (0, 1) in place of a tile's values: 0 for a zero, NaN for what is not finite.
template <class T>
T* draw_ranks(const Piece<T>& piece, int64_t first, int64_t kernels, const T* tile, T* buffer) {
  const int64_t K = piece.weight.values();
  for (int64_t i = 0; i < kernels * K; ++i) {
    const T value = tile[i];
    buffer[i] = (value == 0 ? T(0) : T(random_rank(uint64_t(first * K + i), piece.seed))) + (value - value);
  }
  return buffer;
}

inline const double* numbers(const torch::stable::Tensor& tensor, int64_t count, const char* what) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == torch::headeronly::ScalarType::Double &&
                      tensor.is_contiguous() && tensor.numel() == count,
                  "wavprune: ", what, " must be ", count, " contiguous float64 numbers on the CPU");
  return static_cast<const double*>(tensor.data_ptr());
}

// Random draws are float64: rounded to float32 they would tie.
inline void check_draws(const std::vector<int64_t>& draws, bool wide) {
  STD_TORCH_CHECK(draws.empty() || wide, "wavprune: random draws go with wide");
}

inline void check_lengths(size_t weights, size_t others, const char* what) {
  STD_TORCH_CHECK(weights == others, "wavprune: ", weights, " weights came with ", others, " ",
                  what);
}

// For each (job, rank), the value of that rank, 0 the smallest; NaN where a weight is not finite.
template <class T>
std::vector<T> order_statistics(const std::vector<Job<T>>& jobs,
                                const std::vector<std::pair<int64_t, int64_t>>& wanted);

}  // namespace wavprune

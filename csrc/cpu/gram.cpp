// The Gram matrices of weights: what their principal components follow from.
//
// Bytes: every weight is read once. Operations: half of K^2 multiplications and additions a kernel,
// in float64.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../arguments.h"
#include "denormals.h"
#include "instruction_set.h"
#include "ops.h"
#include "scratch.h"
#include "threads.h"
#include "weights.h"

namespace wavprune {

using torch::headeronly::ScalarType;

namespace {

// Kernels of one thread's task: many enough that the sums of all tasks take little.
constexpr int64_t kTaskValues = 1 << 17;

struct GramTask {
  size_t weight;
  int64_t first, kernels;
};

template <class T>
void add_gram(const Walk& walk, const GramTask& task, double* sums) {
  const int64_t K = walk.values(), chunk = gram_kernels(K);
  const bool in_place = walk.is_flat() && walk.rows == 1 && walk.element == kOwnElement<T>;
  const Scratch<T> tile(buffer_values(chunk, K));
  const Scratch<double> lanes(gram_values(K));
  for (int64_t first = task.first; first < task.first + task.kernels; first += chunk) {
    const int64_t kernels = std::min(chunk, task.first + task.kernels - first);
    if (!in_place) passes<T>().load(walk.strided(), first, kernels, Form::flat, tile.get());
    const T* const x = in_place ? reinterpret_cast<const T*>(walk.at(first)) : tile.get();
    passes<T>().gram(x, kernels, int(K), lanes.get(), sums);
  }
}

}  // namespace

Tensor gram(std::vector<Tensor> tensors) {
  const KeepDenormals guard;
  std::vector<Weight> weights;
  std::vector<GramTask> tasks;
  std::vector<int64_t> starts;
  int64_t total = 0, parts = 0;
  for (const Tensor& tensor : tensors) {
    weights.push_back(weight_of(tensor));
    const Weight& weight = weights.back();
    const int64_t K = weight.values(), kernels = K ? weight.kernels() : 0;
    const int64_t chunk = K ? gram_kernels(K) : 1;
    // Room for the sums of all tasks is an eighth of a float32 weight, or less.
    const int64_t least = std::max(kTaskValues / std::max<int64_t>(K, 1), 16 * K);
    const int64_t step = (least + chunk - 1) / chunk * chunk;
    for (int64_t first = 0; first < kernels; first += step) {
      tasks.push_back({weights.size() - 1, first, std::min(step, kernels - first)});
      starts.push_back(parts);
      parts += K * K;
    }
    total += K * K;
  }
  Tensor result = torch::stable::empty({total}, ScalarType::Double);
  double* const matrices = static_cast<double*>(result.data_ptr());
  std::fill_n(matrices, total, 0.0);
  const Scratch<double> sums(parts + 1);
  std::fill_n(sums.get(), parts, 0.0);
  parallel_tasks(int64_t(tasks.size()), [&](auto next) {
    for (int64_t i; (i = next()) < int64_t(tasks.size());) {
      const Walk walk = walk_through(weights[tasks[i].weight], Order::canonical, false);
      if (walk.element == Element::float64)
        add_gram<double>(walk, tasks[i], sums.get() + starts[i]);
      else
        add_gram<float>(walk, tasks[i], sums.get() + starts[i]);
    }
  });
  // In the order of the tasks, whoever ran them.
  size_t task = 0;
  double* matrix = matrices;
  for (size_t w = 0; w < weights.size(); ++w) {
    const int64_t K = weights[w].values();
    for (; task < tasks.size() && tasks[task].weight == w; ++task)
      for (int64_t e = 0; e < K * K; ++e) matrix[e] += sums.get()[starts[task] + e];
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < i; ++j) matrix[i * K + j] = matrix[j * K + i];
    matrix += K * K;
  }
  return result;
}

}  // namespace wavprune

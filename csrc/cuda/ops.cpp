// The operators on CUDA.
//
// Bytes: the selection reads every weight once a digit, three times for float32 and six for
// float64. Pruning reads it once more and writes it; so does a projection, which reads the masks
// too, one bit a coefficient. Marking reads the weights and writes the masks.

#include "ops.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../arguments.h"
#include "launch.h"
#include "table_builder.h"

namespace wavprune::cuda {

namespace {

// Writes the thresholds of the jobs to `result`, and kNothingKept for others.
template <class T>
void find_thresholds(const std::vector<Source<T>>& sources, const std::vector<Job>& jobs,
                     const Tensor& result, const Device& device) {
  const DeviceTable<T> on_device = device_table<T>(
      sources, jobs, kReading<T>,
      [](const Table<T>&, size_t count) { return count * kJobCounts * sizeof(Count); });
  const Table<T>& table = on_device.table;
  const std::vector<char>& bytes = table.packer.bytes();
  double* thresholds = static_cast<double*>(result.data_ptr());
  upload(bytes.data(), bytes.size(), on_device.memory.data_ptr(),
         {on_device.rest, jobs.size() * kJobCounts * sizeof(Count), thresholds, result.numel(),
          kNothingKept},
         device.stream());
  if (table.blocks > 0)
    count_digits(table.rows, table.row_count, table.blocks, table.tile_bytes, table.jobs,
                 reinterpret_cast<Count*>(on_device.rest), thresholds, device.stream());
}

Job job_of(int64_t index, int64_t rank) {
  Job job{};
  job.rank[0] = job.rank[1] = rank;
  job.index = int(index);
  return job;
}

Job percentile_job(int64_t index, int64_t magnitudes, int64_t dropped, double percentile) {
  const PercentileRanks ranks = percentile_ranks(magnitudes, dropped, percentile);
  Job job{};
  for (int i = 0; i < 2; ++i) {
    job.rank[i] = ranks.rank[i];
    job.structural_zero[i] = ranks.structural_zero[i];
  }
  job.fraction = ranks.fraction;
  job.index = int(index);
  return job;
}

template <class T>
Tensor topk(const std::vector<Tensor>& weights, const std::vector<Tensor>& plan_tensors,
            const std::vector<int64_t>& seeds, const std::vector<int64_t>& job_of_weight,
            const std::vector<int64_t>& keep) {
  Plans<T> plans;
  std::vector<Source<T>> sources = sources_of<T>(weights, plan_tensors, seeds, &plans);
  std::vector<int64_t> totals(keep.size());
  for (size_t w = 0; w < sources.size(); ++w) {
    check_job(w, job_of_weight[w], keep.size());
    totals[job_of_weight[w]] += sources[w].coefficients();
  }
  std::vector<Job> jobs;
  std::vector<int> table_index(keep.size(), -1);
  for (size_t j = 0; j < keep.size(); ++j) {
    if (keep[j] == 0 || totals[j] == 0) continue;
    table_index[j] = int(jobs.size());
    jobs.push_back(job_of(int64_t(j), std::max<int64_t>(totals[j] - keep[j], 0)));
  }
  for (size_t w = 0; w < sources.size(); ++w) sources[w].job = table_index[job_of_weight[w]];
  const Device device(weights[0]);
  Tensor result = torch::stable::new_empty(weights[0], {int64_t(keep.size())}, ScalarType::Double);
  find_thresholds(sources, jobs, result, device);
  return result;
}

template <class T>
Tensor percentiles(const std::vector<Tensor>& weights, const std::vector<Tensor>& plan_tensors,
                   const std::vector<int64_t>& dropped, double percentile) {
  Plans<T> plans;
  std::vector<Source<T>> sources = sources_of<T>(weights, plan_tensors, {}, &plans);
  std::vector<Job> jobs;
  for (size_t w = 0; w < sources.size(); ++w) {
    const int64_t magnitudes = sources[w].coefficients();
    sources[w].job = magnitudes ? int(jobs.size()) : -1;
    if (magnitudes) jobs.push_back(percentile_job(int64_t(w), magnitudes, dropped[w], percentile));
  }
  const Device device(weights[0]);
  Tensor result =
      torch::stable::new_empty(weights[0], {int64_t(weights.size())}, ScalarType::Double);
  find_thresholds(sources, jobs, result, device);
  return result;
}

void check_thresholds(const Tensor& thresholds, const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(reachable(thresholds) && thresholds.scalar_type() == ScalarType::Double &&
                      thresholds.is_contiguous() && thresholds.numel() == int64_t(weights.size()) &&
                      thresholds.get_device_index() == weights[0].get_device_index(),
                  "wavprune: thresholds must be ", weights.size(),
                  " contiguous float64 numbers on the weights' device");
}

template <class T>
void set_masks(const std::vector<Tensor>& masks, std::vector<Source<T>>* sources) {
  check_lengths(sources->size(), masks.size(), "masks");
  for (size_t w = 0; w < masks.size(); ++w) {
    Source<T>& source = (*sources)[w];
    const Tensor& mask = masks[w];
    const int64_t bytes = source.mask_words() * int64_t(sizeof(MaskWord));
    STD_TORCH_CHECK(reachable(mask) && mask.scalar_type() == ScalarType::Byte &&
                        mask.is_contiguous() && mask.numel() == bytes &&
                        mask.get_device_index() == source.tensor.get_device_index(),
                    "wavprune: the mask of weight ", w, " must be ", bytes,
                    " contiguous bytes on the weight's device");
    STD_TORCH_CHECK(uintptr_t(mask.data_ptr()) % alignof(MaskWord) == 0,
                    "wavprune: the mask of weight ", w, " must begin at an even address");
    source.mask = static_cast<MaskWord*>(mask.data_ptr());
  }
}

// Uploads the table of some weights and gives the numbers of `result`, one row of four a weight,
// their values where nothing is pruned. The partial sums of the blocks lie behind the table.
template <class T>
DeviceTable<T> uploaded(const std::vector<Source<T>>& sources, int blocks, double* result,
                        Stream stream) {
  DeviceTable<T> on_device = device_table<T>(sources, {}, blocks, [](const Table<T>& table, size_t) {
    return size_t(table.blocks) * 4 * sizeof(double);
  });
  const std::vector<char>& bytes = on_device.table.packer.bytes();
  const int64_t numbers = result == nullptr ? 0 : 4 * int64_t(sources.size());
  upload(bytes.data(), bytes.size(), on_device.memory.data_ptr(),
         {nullptr, 0, result, numbers, 0.0}, stream);
  return on_device;
}

// Prunes at thresholds, or by the masks of the sources where those are null.
template <class T>
Tensor prune_all(const std::vector<Source<T>>& sources, const double* thresholds) {
  const Tensor& weight = sources[0].tensor;
  const Device device(weight);
  Tensor result = torch::stable::new_empty(weight, {int64_t(sources.size()), 4}, ScalarType::Double);
  double* numbers = static_cast<double*>(result.data_ptr());
  const DeviceTable<T> on_device = uploaded(sources, kWriting<T>, numbers, device.stream());
  const Table<T>& table = on_device.table;
  double* partials = reinterpret_cast<double*>(on_device.rest);
  if (table.blocks == 0) return result;
  if (thresholds != nullptr)
    prune_rows(table.rows, table.row_count, table.blocks, table.tile_bytes, thresholds, partials,
               numbers, device.stream());
  else
    prune_rows_by_mask(table.rows, table.row_count, table.blocks, table.tile_bytes, partials,
                       numbers, device.stream());
  return result;
}

template <class T>
Tensor mask_by_percentile(const Tensor& input, double percentile, bool packed) {
  const int64_t count = input.numel();
  Tensor result = packed
                      ? torch::stable::new_empty(input, {(count + 7) / 8}, ScalarType::Byte)
                      : torch::stable::new_empty(input, input.sizes(), ScalarType::Bool);
  if (count == 0) return result;
  OwnedPlan<T> identity;
  identity.plan.inputs = identity.plan.outputs = 1;
  const std::vector<Source<T>> sources = {
      {torch::stable::view(input, {count, 1, 1, 1}), &identity, false, 0}};
  const Device device(input);
  const Tensor threshold = torch::stable::new_empty(input, {1}, ScalarType::Double);
  find_thresholds(sources, {percentile_job(0, count, 0, percentile)}, threshold, device);
  mask_values<T>(static_cast<const char*>(input.data_ptr()), element_of(input.scalar_type()), count,
                 static_cast<const double*>(threshold.data_ptr()), packed,
                 static_cast<uint8_t*>(result.data_ptr()), device.stream());
  return result;
}

template <class T>
Tensor transform(const Tensor& input, const Tensor& plan_tensor, int64_t kernel_values,
                 int64_t width_out, bool forward) {
  const auto owned = read_plan<T>(plan_tensor, kernel_values);
  Plan<T>& plan = owned->plan;
  if (plan.kind == Kind::identity) plan.inputs = plan.outputs = int(kernel_values);
  check_fits(plan);
  const int64_t kernels = input.size(0);
  check_widths(plan.inputs, plan.outputs, input.size(1), width_out, forward);
  const Device device(input);
  Tensor result = torch::stable::new_empty(input, {kernels, width_out});
  if (kernels == 0) return result;
  Packer packer;
  const Plan<T>* on_device = packer.put(*owned);
  const Tensor memory = torch::stable::new_empty(
      input, {int64_t(packer.bytes().size())}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.data_ptr());
  packer.move(base, on_device);
  upload(packer.bytes().data(), packer.bytes().size(), base, {}, device.stream());
  transform_rows(on_device, static_cast<const T*>(input.data_ptr()), kernels,
                 tile_kernels(plan, kernel_values), tile_bytes(plan, kernel_values), forward,
                 static_cast<T*>(result.data_ptr()), device.stream());
  return result;
}

}  // namespace

Tensor topk_threshold(std::vector<Tensor> weights, std::vector<Tensor> plans,
                      std::vector<int64_t> seeds, std::vector<int64_t> jobs,
                      std::vector<int64_t> keep, bool compute_float64) {
  check_lengths(weights.size(), jobs.size(), "jobs");
  check_seeds(seeds, weights.size(), compute_float64);
  check_keep(keep);
  if (weights.empty()) return thresholds_without_weights(keep.size());
  return with_compute_type(compute_float64, [&](auto zero) {
    return topk<decltype(zero)>(weights, plans, seeds, jobs, keep);
  });
}

Tensor percentile_threshold(std::vector<Tensor> weights, std::vector<Tensor> plans,
                            std::vector<int64_t> dropped, double percentile, bool compute_float64) {
  check_dropped(dropped, weights.size());
  check_percentile(percentile);
  if (weights.empty()) return thresholds_without_weights(0);
  return with_compute_type(compute_float64, [&](auto zero) {
    return percentiles<decltype(zero)>(weights, plans, dropped, percentile);
  });
}

Tensor prune_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<int64_t> seeds,
              Tensor thresholds, bool compute_float64) {
  check_seeds(seeds, weights.size(), compute_float64);
  if (weights.empty()) return torch::stable::new_empty(thresholds, {0, 4}, ScalarType::Double);
  return with_compute_type(compute_float64, [&](auto zero) {
    typedef decltype(zero) T;
    Plans<T> owner;
    const std::vector<Source<T>> sources = sources_of<T>(weights, plans, seeds, &owner);
    check_thresholds(thresholds, weights);
    return prune_all(sources, static_cast<const double*>(thresholds.data_ptr()));
  });
}

Tensor prune_by_mask_(std::vector<Tensor> weights, std::vector<Tensor> plans,
                      std::vector<Tensor> masks, bool compute_float64) {
  return with_compute_type(compute_float64, [&](auto zero) {
    typedef decltype(zero) T;
    Plans<T> owner;
    std::vector<Source<T>> sources = sources_of<T>(weights, plans, {}, &owner);
    set_masks(masks, &sources);
    return prune_all(sources, nullptr);
  });
}

void project_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<Tensor> masks,
              bool compute_float64) {
  with_compute_type(compute_float64, [&](auto zero) {
    typedef decltype(zero) T;
    Plans<T> owner;
    std::vector<Source<T>> sources = sources_of<T>(weights, plans, {}, &owner);
    set_masks(masks, &sources);
    const Device device(weights[0]);
    const DeviceTable<T> on_device = uploaded(sources, kWriting<T>, nullptr, device.stream());
    const Table<T>& table = on_device.table;
    if (table.blocks > 0)
      project_rows(table.rows, table.row_count, table.blocks, table.tile_bytes, device.stream());
  });
}

// Nothing waits to see whether a threshold is NaN: then the mask keeps nothing.
void mark_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<int64_t> seeds,
           Tensor thresholds, std::vector<Tensor> masks, bool compute_float64) {
  check_seeds(seeds, weights.size(), compute_float64);
  if (weights.empty()) return;
  with_compute_type(compute_float64, [&](auto zero) {
    typedef decltype(zero) T;
    Plans<T> owner;
    std::vector<Source<T>> sources = sources_of<T>(weights, plans, seeds, &owner);
    check_thresholds(thresholds, weights);
    set_masks(masks, &sources);
    const Device device(weights[0]);
    const DeviceTable<T> on_device = uploaded(sources, kReading<T>, nullptr, device.stream());
    const Table<T>& table = on_device.table;
    const size_t bytes = std::max(table.tile_bytes, table.marked_bytes);
    STD_TORCH_CHECK(bytes <= kTileBytes, "wavprune: a kernel takes ", bytes,
                    " bytes; for the mask of a threshold on CUDA at most ", kTileBytes);
    if (table.blocks > 0)
      mark_rows(table.rows, table.row_count, table.blocks, bytes, table.shares_words,
                static_cast<const double*>(thresholds.data_ptr()), device.stream());
  });
}

Tensor dwt2(Tensor kernels, Tensor plan, int64_t outputs) {
  check_rows(kernels, reachable(kernels), "CUDA");
  return with_compute_type(is_float64(kernels), [&](auto zero) {
    return transform<decltype(zero)>(kernels, plan, kernels.size(1), outputs, true);
  });
}

Tensor idwt2(Tensor coefficients, Tensor plan, int64_t values) {
  check_rows(coefficients, reachable(coefficients), "CUDA");
  return with_compute_type(is_float64(coefficients), [&](auto zero) {
    return transform<decltype(zero)>(coefficients, plan, values, values, false);
  });
}

// Nothing waits to see whether all values are finite: if one is not, the mask is false everywhere.
Tensor percentile_mask(Tensor input, double percentile, bool packed) {
  check_percentile(percentile);
  check_dtype(input, "the input");
  STD_TORCH_CHECK(reachable(input) && input.is_contiguous(),
                  "wavprune: expected a contiguous tensor on CUDA");
  return with_compute_type(is_float64(input), [&](auto zero) {
    return mask_by_percentile<decltype(zero)>(input, percentile, packed);
  });
}

}  // namespace wavprune::cuda

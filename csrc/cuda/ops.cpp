// The operators: what they check, and the tables that they send to the device.
//
// Bytes: the selection reads every weight once a digit, three times for float32 and six for
// float64; mask and inverse read it once more and write it.

#include "ops.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../cpu/weights.h"
#include "launch.h"

namespace wavprune::cuda {

using torch::headeronly::ScalarType;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Element element_of(ScalarType dtype, const char* what) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::BFloat16:
      return Element::bf16;
    default:
      STD_TORCH_CHECK(false, "wavprune: ", what, " must be float64, float32, float16 or bfloat16");
  }
}

// One weight and how its kernels are transformed.
template <class T>
struct Source {
  Tensor tensor;
  const OwnedPlan<T>* owned;
  bool draw;
  uint64_t seed;
  int job;  // which of the jobs; none where negative

  const Plan<T>& plan() const { return owned->plan; }
  int64_t kernels() const { return tensor.size(0) * tensor.size(1); }
  int64_t values() const { return tensor.size(2) * tensor.size(3); }
  int64_t coefficients() const {
    return kernels() * (plan().kind == Kind::identity ? values() : plan().outputs);
  }
};

// Values of a kernel in a tile: its own, and twice the larger of those and its coefficients.
template <class T>
int64_t shared_values(const Plan<T>& plan) {
  if (plan.kind == Kind::identity) return 1;
  return plan.inputs + 2 * int64_t(std::max(plan.inputs, plan.outputs));
}

template <class T>
void check_fits(const Plan<T>& plan) {
  STD_TORCH_CHECK(shared_values(plan) * int64_t(sizeof(T)) <= kTileBytes, "wavprune: kernels of ",
                  plan.inputs, " values with ", plan.outputs, " coefficients take ",
                  shared_values(plan) * sizeof(T), " bytes each; on CUDA at most ", kTileBytes);
}

// Bytes of shared memory: a tile of values, or one kernel where that is larger.
template <class T>
size_t tile_bytes(const Plan<T>& plan) {
  return std::max<int64_t>(kTileValues, shared_values(plan)) * sizeof(T);
}

template <class T>
int tile_kernels(const Plan<T>& plan, int64_t values) {
  const bool three = sizeof(T) == 4 && plan.inputs == 9 && plan.outputs == 9 &&
                     plan.kind != Kind::sparse && plan.forward_axes.rows_in == 3 &&
                     plan.forward_axes.rows_out == 3;
  if (three) return kThreads;
  const int64_t each = plan.kind == Kind::identity ? values : shared_values(plan);
  return int(std::max<int64_t>(kTileValues / each, 1));
}

template <class T>
std::vector<Source<T>> sources_of(const std::vector<Tensor>& weights,
                                  const std::vector<Tensor>& plans,
                                  const std::vector<int64_t>& draws,
                                  std::vector<std::unique_ptr<OwnedPlan<T>>>* owned) {
  STD_TORCH_CHECK(!weights.empty(), "wavprune: no weights");
  STD_TORCH_CHECK(weights.size() == plans.size(), "wavprune: ", weights.size(),
                  " weights came with ", plans.size(), " plans");
  STD_TORCH_CHECK(draws.empty() || draws.size() == weights.size(), "wavprune: ", weights.size(),
                  " weights came with ", draws.size(), " draws");
  std::vector<Source<T>> sources;
  std::vector<const void*> known;
  for (size_t w = 0; w < weights.size(); ++w) {
    const Tensor& weight = weights[w];
    element_of(weight.scalar_type(), "a weight");
    STD_TORCH_CHECK(weight.dim() == 4, "wavprune: a weight must be (Cout, Cin/groups, kh, kw), not ",
                    weight.dim(), "-D");
    STD_TORCH_CHECK(reachable(weight) &&
                        weight.get_device_index() == weights[0].get_device_index(),
                    "wavprune: the weights of a call must be on one CUDA device");
    STD_TORCH_CHECK(weight.size(1) < int64_t(1) << 31, "wavprune: a weight of ", weight.size(1),
                    " input channels");
    const int64_t values = weight.size(2) * weight.size(3);
    const OwnedPlan<T>* plan = nullptr;
    for (size_t p = 0; p < known.size(); ++p)
      if (known[p] == plans[w].data_ptr() &&
          ((*owned)[p]->plan.kind == Kind::identity || (*owned)[p]->plan.inputs == values))
        plan = (*owned)[p].get();
    if (plan == nullptr) {
      owned->push_back(plan_of<T>(plans[w], values));
      known.push_back(plans[w].data_ptr());
      plan = owned->back().get();
      check_fits(plan->plan);
    }
    STD_TORCH_CHECK(draws.empty() || plan->plan.kind == Kind::identity,
                    "wavprune: random draws go with the identity basis");
    sources.push_back({weight, plan, !draws.empty(), draws.empty() ? 0 : uint64_t(draws[w]), 0});
  }
  return sources;
}

// Bytes that will lie at `base` in the device's memory, and may point at each other there.
class Packer {
 public:
  explicit Packer(char* base) : base_(base) {}

  template <class U>
  U* put(const U* items, size_t count) {
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
    const size_t at = bytes_.size();
    bytes_.resize((at + count * sizeof(U) + 15) / 16 * 16);
    std::copy_n(reinterpret_cast<const char*>(items), count * sizeof(U), bytes_.begin() + at);
    return reinterpret_cast<U*>(uintptr_t(base_) + at);
  }
  template <class U>
  U* put(const std::vector<U>& items) {
    return put(items.data(), items.size());
  }
  template <class T>
  Plan<T>* put(const OwnedPlan<T>& owned) {
    Plan<T> plan = owned.plan;
    if (plan.kind == Kind::sparse) {
      Entries<T>* both[2] = {&plan.forward_entries, &plan.inverse_entries};
      for (int i = 0; i < 2; ++i) {
        both[i]->start = put(owned.starts[i]);
        both[i]->column = put(owned.columns[i]);
        both[i]->value = put(owned.matrices[i]);
      }
    } else if (plan.kind != Kind::identity) {
      plan.forward_axes.rows = put(owned.matrices[0]);
      plan.forward_axes.columns = put(owned.matrices[1]);
      plan.inverse_axes.rows = put(owned.matrices[2]);
      plan.inverse_axes.columns = put(owned.matrices[3]);
    }
    return put(&plan, 1);
  }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  char* base_;
  std::vector<char> bytes_;
};

template <class T>
struct Table {
  std::vector<char> bytes;
  Row<T>* rows;
  Job* jobs;
  int row_count = 0, blocks = 0;
  size_t tile_bytes = 0;
};

// The table as it will lie at `base`: a row for each weight that has values and a job.
template <class T>
Table<T> table_of(const std::vector<Source<T>>& sources, std::vector<Job> jobs, char* base) {
  Packer packer(base);
  Table<T> table;
  std::vector<Row<T>> rows;
  std::vector<std::pair<const void*, const Plan<T>*>> sent;
  int64_t blocks = 0;
  for (size_t w = 0; w < sources.size(); ++w) {
    const Source<T>& source = sources[w];
    if (source.job < 0 || source.coefficients() == 0) continue;
    const Tensor& weight = source.tensor;
    const Plan<T>* plan = nullptr;
    for (const auto& [owned, place] : sent)
      if (owned == source.owned) plan = place;
    if (plan == nullptr) {
      plan = packer.put(*source.owned);
      sent.emplace_back(source.owned, plan);
    }
    Row<T> row{};
    row.data = static_cast<char*>(weight.data_ptr());
    row.plan = plan;
    row.kernels = source.kernels();
    row.ins = weight.size(1);
    for (int i = 0; i < 4; ++i) row.strides[i] = weight.stride(i);
    row.seed = source.seed;
    row.values = int(source.values());
    row.width = int(weight.size(3));
    row.tile_kernels = tile_kernels(source.plan(), source.values());
    row.first_block = int(blocks);
    const int64_t each = int64_t(row.tile_kernels) * kTiles;
    row.blocks = int((row.kernels + each - 1) / each);
    row.index = int(w);
    row.job = source.job;
    row.element = element_of(weight.scalar_type(), "a weight");
    row.contiguous = weight.is_contiguous();
    row.across = row.strides[1] < row.strides[3];
    row.draw = source.draw;
    rows.push_back(row);
    blocks += row.blocks;
    STD_TORCH_CHECK(blocks < std::numeric_limits<int>::max(),
                    "wavprune: too many weights for one call");
    if (!jobs.empty()) jobs[source.job].blocks += row.blocks;
    table.tile_bytes = std::max(table.tile_bytes, tile_bytes(source.plan()));
  }
  table.rows = packer.put(rows);
  table.jobs = packer.put(jobs);
  table.row_count = int(rows.size());
  table.blocks = int(blocks);
  table.bytes = packer.bytes();
  return table;
}

// The table in the device's memory, with room behind it.
template <class T>
struct Placed {
  Table<T> table;
  Tensor memory;
  char* rest;
};

template <class T>
Placed<T> place(const std::vector<Source<T>>& sources, const std::vector<Job>& jobs,
                size_t (*room)(const Table<T>&, size_t jobs)) {
  const Table<T> measured = table_of(sources, jobs, nullptr);
  const size_t size = measured.bytes.size();
  Tensor memory = torch::stable::new_empty(
      sources[0].tensor, {int64_t(size + room(measured, jobs.size()))}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.data_ptr());
  return {table_of(sources, jobs, base), memory, base + size};
}

// Writes the thresholds of the jobs to `result`, infinity where there is no job.
template <class T>
void find_thresholds(const std::vector<Source<T>>& sources, const std::vector<Job>& jobs,
                     const Tensor& result, const Device& device) {
  const Placed<T> placed = place<T>(sources, jobs, [](const Table<T>&, size_t count) {
    return count * kJobCounts * sizeof(Count);
  });
  const Table<T>& table = placed.table;
  double* thresholds = static_cast<double*>(result.data_ptr());
  char* base = static_cast<char*>(placed.memory.data_ptr());
  upload(table.bytes.data(), table.bytes.size(), base,
         {placed.rest, jobs.size() * kJobCounts * sizeof(Count), thresholds, result.numel(),
          kInfinity},
         device.stream());
  if (table.blocks > 0)
    count_digits(table.rows, table.row_count, table.blocks, table.tile_bytes, table.jobs,
                 reinterpret_cast<Count*>(placed.rest), thresholds, device.stream());
}

Job job_of(int64_t index, int64_t low, int64_t high, double fraction) {
  Job job{};
  job.rank[0] = low;
  job.rank[1] = high;
  job.fraction = fraction;
  job.index = int(index);
  return job;
}

template <class T>
Tensor topk(const std::vector<Tensor>& weights, const std::vector<Tensor>& plans,
            const std::vector<int64_t>& draws, const std::vector<int64_t>& membership,
            const std::vector<int64_t>& keep) {
  std::vector<std::unique_ptr<OwnedPlan<T>>> owned;
  std::vector<Source<T>> sources = sources_of<T>(weights, plans, draws, &owned);
  std::vector<int64_t> totals(keep.size());
  for (size_t w = 0; w < sources.size(); ++w) {
    STD_TORCH_CHECK(membership[w] >= 0 && membership[w] < int64_t(keep.size()),
                    "wavprune: weight ", w, " belongs to job ", membership[w], " of ", keep.size());
    totals[membership[w]] += sources[w].coefficients();
  }
  std::vector<Job> jobs;
  std::vector<int> numbers(keep.size(), -1);
  for (size_t j = 0; j < keep.size(); ++j) {
    STD_TORCH_CHECK(keep[j] >= 0, "wavprune: cannot keep ", keep[j], " coefficients");
    if (keep[j] == 0 || totals[j] == 0) continue;
    const int64_t rank = std::max<int64_t>(totals[j] - keep[j], 0);
    numbers[j] = int(jobs.size());
    jobs.push_back(job_of(int64_t(j), rank, rank, 0));
  }
  for (size_t w = 0; w < sources.size(); ++w) sources[w].job = numbers[membership[w]];
  const Device device(weights[0]);
  Tensor result = torch::stable::new_empty(weights[0], {int64_t(keep.size())}, ScalarType::Double);
  find_thresholds(sources, jobs, result, device);
  return result;
}

// numpy.percentile's place in `total` values behind `dropped` zeros, which are the smallest.
Job percentile_job(int64_t index, int64_t total, int64_t dropped, double percentile) {
  const int64_t count = total + dropped;
  const double place = double(count - 1) * (percentile / 100.0);
  const int64_t rank = std::min<int64_t>(int64_t(std::floor(place)), count - 1);
  const double fraction = place - double(rank);
  const int64_t next = fraction > 0 ? rank + 1 : rank;
  Job job = job_of(index, std::max<int64_t>(rank - dropped, 0),
                   std::max<int64_t>(next - dropped, 0), fraction);
  job.zero[0] = rank < dropped;
  job.zero[1] = next < dropped;
  return job;
}

template <class T>
Tensor percentile_each(const std::vector<Tensor>& weights, const std::vector<Tensor>& plans,
                       const std::vector<int64_t>& dropped, double percentile) {
  std::vector<std::unique_ptr<OwnedPlan<T>>> owned;
  std::vector<Source<T>> sources = sources_of<T>(weights, plans, {}, &owned);
  std::vector<Job> jobs;
  for (size_t w = 0; w < sources.size(); ++w) {
    const int64_t total = sources[w].coefficients();
    sources[w].job = total ? int(jobs.size()) : -1;
    if (total) jobs.push_back(percentile_job(int64_t(w), total, dropped[w], percentile));
  }
  const Device device(weights[0]);
  Tensor result =
      torch::stable::new_empty(weights[0], {int64_t(weights.size())}, ScalarType::Double);
  find_thresholds(sources, jobs, result, device);
  return result;
}

template <class T>
Tensor prune_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& plans,
                 const std::vector<int64_t>& draws, const Tensor& thresholds) {
  std::vector<std::unique_ptr<OwnedPlan<T>>> owned;
  const std::vector<Source<T>> sources = sources_of<T>(weights, plans, draws, &owned);
  const int64_t count = int64_t(weights.size());
  STD_TORCH_CHECK(reachable(thresholds) && thresholds.scalar_type() == ScalarType::Double &&
                      thresholds.is_contiguous() && thresholds.numel() == count &&
                      thresholds.get_device_index() == weights[0].get_device_index(),
                  "wavprune: thresholds must be ", count,
                  " contiguous float64 numbers on the weights' device");
  const Device device(weights[0]);
  Tensor result = torch::stable::new_empty(weights[0], {count, 4}, ScalarType::Double);
  const Placed<T> placed = place<T>(sources, {}, [](const Table<T>& table, size_t) {
    return size_t(table.blocks) * 4 * sizeof(double);
  });
  const Table<T>& table = placed.table;
  double* rows = static_cast<double*>(result.data_ptr());
  upload(table.bytes.data(), table.bytes.size(), placed.memory.data_ptr(),
         {nullptr, 0, rows, 4 * count, 0.0}, device.stream());
  if (table.blocks > 0)
    prune_rows(table.rows, table.row_count, table.blocks, table.tile_bytes,
               static_cast<const double*>(thresholds.data_ptr()),
               reinterpret_cast<double*>(placed.rest), rows, device.stream());
  return result;
}

template <class T>
Tensor mask_of(const Tensor& input, double percentile, bool packed) {
  const int64_t count = input.numel();
  Tensor result = packed
                      ? torch::stable::new_empty(input, {(count + 7) / 8}, ScalarType::Byte)
                      : torch::stable::new_empty(input, input.sizes(), ScalarType::Bool);
  if (count == 0) return result;
  OwnedPlan<T> identity;
  identity.plan.inputs = identity.plan.outputs = 1;
  const std::vector<Source<T>> sources = {
      {torch::stable::view(input, {count, 1, 1, 1}), &identity, false, 0, 0}};
  const Device device(input);
  const Tensor threshold = torch::stable::new_empty(input, {1}, ScalarType::Double);
  find_thresholds(sources, {percentile_job(0, count, 0, percentile)}, threshold, device);
  mask_values<T>(static_cast<const char*>(input.data_ptr()),
                 element_of(input.scalar_type(), "the input"), count,
                 static_cast<const double*>(threshold.data_ptr()), packed,
                 static_cast<uint8_t*>(result.data_ptr()), device.stream());
  return result;
}

template <class T>
Tensor transform(const Tensor& input, const Tensor& plan_tensor, int64_t kernel_values,
                 int64_t width, bool forward) {
  const auto owned = plan_of<T>(plan_tensor, kernel_values);
  const bool identity = owned->plan.kind == Kind::identity;
  if (identity) owned->plan.inputs = owned->plan.outputs = int(kernel_values);
  const Plan<T>& plan = owned->plan;
  check_fits(plan);
  const int64_t kernels = input.size(0), taken = input.size(1);
  STD_TORCH_CHECK(taken == (forward ? plan.inputs : plan.outputs) &&
                      width == (forward ? plan.outputs : plan.inputs),
                  "wavprune: a plan of ", plan.inputs, " values and ", plan.outputs,
                  " coefficients met rows of ", taken, " to become rows of ", width);
  const Device device(input);
  Tensor result = torch::stable::new_empty(input, {kernels, width});
  if (kernels == 0) return result;
  const Packer measured = [&] {
    Packer packer(nullptr);
    packer.put(*owned);
    return packer;
  }();
  const Tensor memory = torch::stable::new_empty(
      input, {int64_t(measured.bytes().size())}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.data_ptr());
  Packer packer(base);
  const Plan<T>* sent = packer.put(*owned);
  upload(packer.bytes().data(), packer.bytes().size(), base, {}, device.stream());
  transform_rows(sent, static_cast<const T*>(input.data_ptr()), kernels,
                 tile_kernels(plan, kernel_values), tile_bytes(plan), forward,
                 static_cast<T*>(result.data_ptr()), device.stream());
  return result;
}

void check_rows(const Tensor& rows) {
  STD_TORCH_CHECK(reachable(rows) && rows.dim() == 2 && rows.is_contiguous() &&
                      (rows.scalar_type() == ScalarType::Float ||
                       rows.scalar_type() == ScalarType::Double),
                  "wavprune: expected a contiguous (kernels, values) matrix of float32 or float64 "
                  "on CUDA");
}

void check_draws(const std::vector<int64_t>& draws, bool wide) {
  STD_TORCH_CHECK(draws.empty() || wide, "wavprune: random draws go with wide");
}

void check_lengths(size_t weights, size_t others, const char* what) {
  STD_TORCH_CHECK(weights == others, "wavprune: ", weights, " weights came with ", others, " ",
                  what);
}

void check_percentile(double percentile) {
  STD_TORCH_CHECK(percentile >= 0 && percentile <= 100,
                  "wavprune: percentile must be in [0, 100], not ", percentile);
}

}  // namespace

Tensor topk_threshold(std::vector<Tensor> weights, std::vector<Tensor> plans,
                      std::vector<int64_t> draws, std::vector<int64_t> jobs,
                      std::vector<int64_t> keep, bool wide) {
  check_lengths(weights.size(), jobs.size(), "jobs");
  check_draws(draws, wide);
  return wide ? topk<double>(weights, plans, draws, jobs, keep)
              : topk<float>(weights, plans, draws, jobs, keep);
}

Tensor percentile_threshold(std::vector<Tensor> weights, std::vector<Tensor> plans,
                            std::vector<int64_t> dropped, double percentile, bool wide) {
  check_lengths(weights.size(), dropped.size(), "counts of dropped coefficients");
  check_percentile(percentile);
  for (const int64_t count : dropped)
    STD_TORCH_CHECK(count >= 0, "wavprune: ", count, " dropped coefficients");
  return wide ? percentile_each<double>(weights, plans, dropped, percentile)
              : percentile_each<float>(weights, plans, dropped, percentile);
}

Tensor prune_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<int64_t> draws,
              Tensor thresholds, bool wide) {
  check_draws(draws, wide);
  return wide ? prune_all<double>(weights, plans, draws, thresholds)
              : prune_all<float>(weights, plans, draws, thresholds);
}

Tensor dwt2(Tensor kernels, Tensor plan, int64_t outputs) {
  check_rows(kernels);
  const int64_t values = kernels.size(1);
  return kernels.scalar_type() == ScalarType::Float
             ? transform<float>(kernels, plan, values, outputs, true)
             : transform<double>(kernels, plan, values, outputs, true);
}

Tensor idwt2(Tensor coefficients, Tensor plan, int64_t values) {
  check_rows(coefficients);
  return coefficients.scalar_type() == ScalarType::Float
             ? transform<float>(coefficients, plan, values, values, false)
             : transform<double>(coefficients, plan, values, values, false);
}

// Nobody waits to learn of values that are not finite: the mask is false everywhere then.
Tensor percentile_mask(Tensor input, double percentile, bool packed) {
  check_percentile(percentile);
  const Element element = element_of(input.scalar_type(), "the input");
  STD_TORCH_CHECK(reachable(input) && input.is_contiguous(),
                  "wavprune: expected a contiguous tensor on CUDA");
  return element == Element::f64 ? mask_of<double>(input, percentile, packed)
                                 : mask_of<float>(input, percentile, packed);
}

}  // namespace wavprune::cuda

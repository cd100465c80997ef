// The tables of a call, built on the host: a row a weight, a job a threshold, and the plans.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "../plan_tensor.h"
#include "launch.h"

namespace wavprune::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::BFloat16:
      return Element::bf16;
    default:
      return Element::f64;
  }
}

// A weight and its basis. Its coefficients are ranked by magnitude, or at random by a seed.
template <class T>
struct Source {
  Tensor tensor;
  const OwnedPlan<T>* owned;
  bool random;
  uint64_t seed;
  int job = 0;  // an index among the jobs, or negative for none

  const Plan<T>& plan() const { return owned->plan; }
  int64_t kernels() const { return tensor.size(0) * tensor.size(1); }
  int64_t values() const { return tensor.size(2) * tensor.size(3); }
  int64_t coefficients() const {
    return kernels() * (plan().kind == Kind::identity ? values() : plan().outputs);
  }
};

// Values of shared memory for one kernel; see TileParts.
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
  if (runs_in_registers(plan)) return kThreads;
  const int64_t kernel = plan.kind == Kind::identity ? values : shared_values(plan);
  return int(std::max<int64_t>(kTileValues / kernel, 1));
}

// The weights of a call with their plans; there must be one at least.
template <class T>
std::vector<Source<T>> sources_of(const std::vector<Tensor>& weights,
                                  const std::vector<Tensor>& plan_tensors,
                                  const std::vector<int64_t>& seeds, Plans<T>* plans) {
  check_lengths(weights.size(), plan_tensors.size(), "plans");
  std::vector<Source<T>> sources;
  for (size_t w = 0; w < weights.size(); ++w) {
    const Tensor& weight = weights[w];
    check_weight(weight);
    STD_TORCH_CHECK(reachable(weight) &&
                        weight.get_device_index() == weights[0].get_device_index(),
                    "wavprune: the weights of a call must be on one CUDA device");
    STD_TORCH_CHECK(weight.size(1) < int64_t(1) << 31, "wavprune: weight ", w, " has ",
                    weight.size(1), " input channels; allowed: up to 2**31 - 1");
    const OwnedPlan<T>& owned = plans->add(plan_tensors[w], weight.size(2) * weight.size(3));
    check_fits(owned.plan);
    check_seeded(seeds, owned.plan);
    sources.push_back({weight, &owned, !seeds.empty(), seeds.empty() ? 0 : uint64_t(seeds[w])});
  }
  return sources;
}

// Collects bytes that will lie at `base` in the device's memory and may point at each other there.
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
    if (plan.kind == Kind::general) {
      SparseMatrix<T>* both[2] = {&plan.forward_matrix, &plan.inverse_matrix};
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

// The table as it will lie at `base`: a row for each weight that has values and belongs to a job.
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
    for (const auto& [owned, address] : sent)
      if (owned == source.owned) plan = address;
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
    const int64_t block_kernels = int64_t(row.tile_kernels) * kTiles;
    row.blocks = int((row.kernels + block_kernels - 1) / block_kernels);
    row.index = int(w);
    row.job = source.job;
    row.element = element_of(weight.scalar_type());
    row.contiguous = weight.is_contiguous();
    row.kernels_adjacent = row.strides[1] < row.strides[3];
    row.random = source.random;
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

// The table in the device's memory, with some room behind it.
template <class T>
struct DeviceTable {
  Table<T> table;
  Tensor memory;
  char* rest;
};

// Allocates the table; `room` says how many bytes follow it.
template <class T>
DeviceTable<T> device_table(const std::vector<Source<T>>& sources, const std::vector<Job>& jobs,
                            size_t (*room)(const Table<T>&, size_t jobs)) {
  const Table<T> measured = table_of(sources, jobs, nullptr);
  const size_t size = measured.bytes.size();
  Tensor memory = torch::stable::new_empty(
      sources[0].tensor, {int64_t(size + room(measured, jobs.size()))}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.data_ptr());
  return {table_of(sources, jobs, base), memory, base + size};
}

}  // namespace wavprune::cuda

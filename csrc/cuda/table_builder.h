// The tables of a call, built on the host: a row a weight, a job a threshold, and the plans.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "../plan_tensor.h"
#include "launch.h"

namespace wavprune::cuda {

// The most tiles of a block; how many take as long as its histogram and its start; and how many in
// registers take as long as one that its threads transform together.
constexpr int64_t kMostTiles = 64;
constexpr int64_t kTilesOfHistogram = 2;
constexpr int64_t kTilesTogether = 8;

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
  MaskWord* mask = nullptr;

  const Plan<T>& plan() const { return owned->plan; }
  int64_t kernels() const { return tensor.size(0) * tensor.size(1); }
  int64_t values() const { return tensor.size(2) * tensor.size(3); }
  int64_t coefficients() const {
    return kernels() * (plan().kind == Kind::identity ? values() : plan().outputs);
  }
  int64_t mask_words() const {
    const int64_t bits = kernels() * (plan().kind == Kind::identity ? values() : 1);
    return (bits + kMaskBlock - 1) / kMaskBlock * plan().outputs;
  }
};

// Values of shared memory for one kernel; see TileParts.
template <class T>
int64_t shared_values(const Plan<T>& plan) {
  if (plan.kind == Kind::identity) return 1;
  if (way_of(plan) == Way::registers) return plan.inputs;
  return plan.inputs + 2 * int64_t(std::max(plan.inputs, plan.outputs));
}

template <class T>
void check_fits(const Plan<T>& plan) {
  STD_TORCH_CHECK(shared_values(plan) * int64_t(sizeof(T)) <= kTileBytes, "wavprune: kernels of ",
                  plan.inputs, " values with ", plan.outputs, " coefficients take ",
                  shared_values(plan) * sizeof(T), " bytes each; on CUDA at most ", kTileBytes);
}

// Kernels of a tile: whole words of masks where they fit.
template <class T>
int tile_kernels(const Plan<T>& plan, int64_t values) {
  if (way_of(plan) == Way::registers) return kThreads;
  const bool identity = plan.kind == Kind::identity;
  const int64_t kernel = identity ? values : shared_values(plan);
  const int64_t fit = kTileValues / kernel;
  const int64_t whole = (fit + (identity ? 0 : kMaskBlock / 2)) / kMaskBlock * kMaskBlock;
  const bool fits = whole > 0 && whole * kernel * int64_t(sizeof(T)) <= kTileBytes;
  return int(fits ? whole : std::max<int64_t>(fit, 1));
}

// Bytes of shared memory: a tile of values, or its kernels where they are larger.
template <class T>
size_t tile_bytes(const Plan<T>& plan, int64_t values) {
  const int64_t kernels = plan.kind == Kind::identity ? 0 : tile_kernels(plan, values);
  return std::max<int64_t>(kTileValues, kernels * shared_values(plan)) * sizeof(T);
}

// True where the values lie in memory without gaps, in any order.
inline bool is_dense(const Tensor& weight) {
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t i = 0; i < weight.dim(); ++i)
    if (weight.size(i) > 1) axes.emplace_back(weight.stride(i), weight.size(i));
  std::sort(axes.begin(), axes.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != extent) return false;
    extent *= size;
  }
  return true;
}

// Describes the memory of a weight: which kernels are neighbors, and how tiles are cut so that the
// threads of a warp access neighboring values.
template <class T>
void set_layout(const Source<T>& source, Row<T>* row) {
  const Tensor& weight = source.tensor;
  const int64_t outs = weight.size(0), ins = weight.size(1);
  const bool identity = source.plan().kind == Kind::identity;
  row->kernels = source.kernels();
  row->values = int(source.values());
  row->width = int(weight.size(3));
  row->slow = {outs, weight.stride(0), ins};
  row->fast = {ins, weight.stride(1), 1};
  row->value_strides[0] = weight.stride(2);
  row->value_strides[1] = weight.stride(3);
  // Magnitudes may be ranked in any order.
  const bool any_order = identity && !source.random && source.mask == nullptr;
  const bool contiguous = weight.is_contiguous() || (any_order && is_dense(weight));
  if (contiguous && identity) {
    row->kernels *= row->values;
    row->values = row->width = 1;
  }
  row->tile_kernels = tile_kernels(source.plan(), row->values);
  const bool outputs_adjacent = !contiguous && outs > 1 && row->slow.stride < row->fast.stride;
  if (ins == 1 || outputs_adjacent) std::swap(row->slow, row->fast);
  int64_t tiles;
  if (ins > 1 && outputs_adjacent) {
    // 16 values are two sectors of float32; 16 input channels are whole words of a mask.
    const int64_t kernels = row->tile_kernels;
    const int64_t least = std::clamp<int64_t>(kernels / kMaskBlock, 1, kMaskBlock);
    row->brick_fast = int(std::min(outs, kernels / std::min(ins, least)));
    const int64_t slow = kernels / row->brick_fast;
    row->brick_slow = int(std::min(ins, slow < kMaskBlock ? slow : slow / kMaskBlock * kMaskBlock));
    tiles = (outs + row->brick_fast - 1) / row->brick_fast *
            ((ins + row->brick_slow - 1) / row->brick_slow);
    row->shares_words = ins % kMaskBlock != 0 || row->brick_slow % kMaskBlock != 0;
  } else {
    tiles = (row->kernels + row->tile_kernels - 1) / row->tile_kernels;
    const int64_t bits = row->tile_kernels * int64_t(identity ? row->values : 1);
    row->shares_words = tiles > 1 && bits % kMaskBlock != 0;
  }
  STD_TORCH_CHECK(tiles < std::numeric_limits<int>::max(), "wavprune: a weight of ",
                  weight.numel(), " values is too large for one call on CUDA");
  row->tiles = int(tiles);
  const int64_t apart = std::numeric_limits<int64_t>::max();
  const int64_t of_values = std::min(weight.size(2) > 1 ? weight.stride(2) : apart,
                                     weight.size(3) > 1 ? weight.stride(3) : apart);
  // CUDA kernels compute offsets within a kernel in 32 bits.
  const int64_t extent = (weight.size(2) - 1) * weight.stride(2) +
                         (weight.size(3) - 1) * weight.stride(3);
  row->way = way_of(source.plan());
  // In registers they are 3x3, whatever the weight's own two axes are.
  const bool adjacent = row->fast.stride < of_values && extent < int64_t(1) << 31 &&
                        (row->way != Way::registers || row->width == 3);
  row->order = contiguous ? Order::contiguous : adjacent ? Order::adjacent : Order::strided;
}

// Tiles of a block of a row, where a block has the work of so many tiles in registers. The threads of
// a block take several times as long for a tile that they transform together.
template <class T>
int64_t tiles_of_block(const Row<T>& row, int64_t tiles) {
  return row.way == Way::shared ? std::max<int64_t>(tiles / kTilesTogether, 1) : tiles;
}

// Divides the tiles of all rows among blocks, so that a device that runs so many at a time is busy to
// the end; the number of blocks.
template <class T>
int set_blocks(std::vector<Row<T>>* rows, int at_a_time) {
  const auto blocks_of = [](const Row<T>& row, int64_t tiles) {
    const int64_t own = tiles_of_block(row, tiles);
    return (row.tiles + own - 1) / own;
  };
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t tiles = 1; tiles <= kMostTiles; tiles += 1 + tiles / 8) {
    int64_t blocks = 0;
    for (const Row<T>& row : *rows) blocks += blocks_of(row, tiles);
    // Blocks that start together take as long as the tiles of one of them, and a histogram.
    const int64_t waves = (blocks + at_a_time - 1) / at_a_time;
    const int64_t spent = waves * (tiles + kTilesOfHistogram);
    if (spent < least) least = spent, best = tiles;
  }
  int64_t first = 0;
  for (Row<T>& row : *rows) {
    row.tiles_of_block = int(tiles_of_block(row, best));
    row.first_block = int(first);
    row.blocks = int(blocks_of(row, best));
    first += row.blocks;
    STD_TORCH_CHECK(first < std::numeric_limits<int>::max(),
                    "wavprune: too many weights for one call");
  }
  return int(first);
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
    for (int i = 0; i < 2; ++i)
      STD_TORCH_CHECK(weight.size(i) < int64_t(1) << 31, "wavprune: weight ", w, " has ",
                      weight.size(i), i == 0 ? " output" : " input",
                      " channels; allowed: up to 2**31 - 1");
    const OwnedPlan<T>& owned = plans->add(plan_tensors[w], weight.size(2) * weight.size(3));
    check_fits(owned.plan);
    check_seeded(seeds, owned.plan);
    sources.push_back({weight, &owned, !seeds.empty(), seeds.empty() ? 0 : uint64_t(seeds[w])});
  }
  return sources;
}

// Collects bytes for the device's memory. Where in it is known once there are all of them: until
// `move`, what points at an item has its distance from the first byte.
class Packer {
 public:
  template <class U>
  U* put(const U* items, size_t count) {
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
    const size_t at = bytes_.size();
    bytes_.resize((at + count * sizeof(U) + 15) / 16 * 16);
    std::copy_n(reinterpret_cast<const char*>(items), count * sizeof(U), bytes_.begin() + at);
    return reinterpret_cast<U*>(at);
  }
  template <class U>
  U* put(const std::vector<U>& items) {
    return put(items.data(), items.size());
  }
  template <class T>
  Plan<T>* put(const OwnedPlan<T>& owned) {
    Plan<T> plan = owned.plan;
    SparseMatrix<T>* const sparse[2] = {&plan.forward_matrix, &plan.inverse_matrix};
    Axes<T>* const axes[2] = {&plan.forward_axes, &plan.inverse_axes};
    const int general = plan.kind == Kind::general ? 2 : 0;
    const int separable = general || plan.kind == Kind::identity ? 0 : 2;
    for (int i = 0; i < general; ++i) {
      sparse[i]->start = put(owned.starts[i]);
      sparse[i]->column = put(owned.columns[i]);
      sparse[i]->value = put(owned.matrices[i]);
    }
    for (int i = 0; i < separable; ++i) {
      axes[i]->rows = put(owned.matrices[2 * i]);
      axes[i]->columns = put(owned.matrices[2 * i + 1]);
    }
    Plan<T>* const at = put(&plan, 1);
    for (int i = 0; i < general; ++i) {
      link(at, &plan, sparse[i]->start);
      link(at, &plan, sparse[i]->column);
      link(at, &plan, sparse[i]->value);
    }
    for (int i = 0; i < separable; ++i) {
      link(at, &plan, axes[i]->rows);
      link(at, &plan, axes[i]->columns);
    }
    return at;
  }

  // Says that `pointer`, in items that were put from `items` to `at`, points at an item too.
  template <class U, class P>
  void link(const U* at, const U* items, P* const& pointer) {
    links_.push_back(uintptr_t(at) + size_t(reinterpret_cast<const char*>(&pointer) -
                                            reinterpret_cast<const char*>(items)));
  }

  // The bytes will lie at `base`; `roots` are the pointers of the caller.
  template <class... Roots>
  void move(char* base, Roots&... roots) {
    for (const size_t at : links_) {
      uintptr_t address;
      std::memcpy(&address, bytes_.data() + at, sizeof address);
      address += uintptr_t(base);
      std::memcpy(bytes_.data() + at, &address, sizeof address);
    }
    ((roots = reinterpret_cast<Roots>(uintptr_t(base) + uintptr_t(roots))), ...);
  }

  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
  std::vector<size_t> links_;
};

template <class T>
struct Table {
  Packer packer;
  Row<T>* rows;
  Job* jobs;
  int row_count = 0, blocks = 0;
  size_t tile_bytes = 0;
  // Of masks: bytes of a tile of the identity, and whether tiles share words.
  size_t marked_bytes = 0;
  bool shares_words = false;
};

// A row for each weight that has values and belongs to a job; not yet moved.
template <class T>
Table<T> table_of(const std::vector<Source<T>>& sources, std::vector<Job> jobs, int at_a_time) {
  Table<T> table;
  Packer& packer = table.packer;
  std::vector<Row<T>> rows;
  std::vector<std::pair<const void*, const Plan<T>*>> sent;
  for (size_t w = 0; w < sources.size(); ++w) {
    const Source<T>& source = sources[w];
    if (source.job < 0 || source.coefficients() == 0) continue;
    const Tensor& weight = source.tensor;
    auto known = std::find_if(sent.begin(), sent.end(), [&](const auto& entry) {
      return entry.first == source.owned;
    });
    if (known == sent.end())
      known = sent.emplace(known, source.owned, packer.put(*source.owned));
    Row<T> row{};
    row.data = static_cast<char*>(weight.data_ptr());
    row.plan = known->second;
    row.mask = source.mask;
    set_layout(source, &row);
    row.seed = source.seed;
    row.index = int(w);
    row.job = source.job;
    row.element = element_of(weight.scalar_type());
    row.random = source.random;
    rows.push_back(row);
    table.tile_bytes = std::max(table.tile_bytes, tile_bytes(source.plan(), row.values));
    table.marked_bytes = std::max(table.marked_bytes, row.tile_kernels * row.values * sizeof(T));
    table.shares_words = table.shares_words || row.shares_words;
  }
  table.blocks = set_blocks(&rows, at_a_time);
  for (const Row<T>& row : rows)
    if (!jobs.empty()) jobs[row.job].blocks += row.blocks;
  table.rows = packer.put(rows);
  for (const Row<T>& row : rows) packer.link(table.rows, rows.data(), row.plan);
  table.jobs = packer.put(jobs);
  table.row_count = int(rows.size());
  return table;
}

// The table in the device's memory, with some room behind it.
template <class T>
struct DeviceTable {
  Table<T> table;
  Tensor memory;
  char* rest;
};

// Allocates the table for a CUDA kernel of which a multiprocessor runs `blocks` blocks at a time;
// `room` says how many bytes follow it.
template <class T>
DeviceTable<T> device_table(const std::vector<Source<T>>& sources, const std::vector<Job>& jobs,
                            int blocks, size_t (*room)(const Table<T>&, size_t jobs)) {
  Table<T> table = table_of(sources, jobs, blocks * limits().multiprocessors);
  const size_t size = table.packer.bytes().size();
  Tensor memory = torch::stable::new_empty(
      sources[0].tensor, {int64_t(size + room(table, jobs.size()))}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.data_ptr());
  table.packer.move(base, table.rows, table.jobs);
  return {std::move(table), memory, base + size};
}

}  // namespace wavprune::cuda

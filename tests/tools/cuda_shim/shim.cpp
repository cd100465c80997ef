// The CUDA operators on the host, for tests: the CUDA kernels run in fibers, and tensors on the CPU
// stand for tensors on a device.
#include "shim.h"

#include <torch/csrc/stable/library.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <utility>
#include <vector>

#define WAVPRUNE_ACCESS(address, bytes) shim::touch(address, bytes)
#define WAVPRUNE_TILE(T, name) T* const name = static_cast<T*>(shim::dynamic_shared())
#define WAVPRUNE_LAUNCH(kernel, blocks, tile_bytes, stream, ...) \
  ((void)(stream), shim::launch([&] { kernel(__VA_ARGS__); }, blocks, kThreads, tile_bytes))

#define WAVPRUNE_SHARED(kernel, bytes) ((void)0)

#include "../../../csrc/cuda/launch.inc"
#include "../../../csrc/cuda/ops.h"

shim::Index threadIdx, blockIdx, gridDim;

namespace shim {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kWarp = 32;

enum class Waits { no, for_block, for_warp };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  bool done;
  Waits waits;
};

// What the lanes of a warp give: a lane may be at the next exchange before all have read this one.
struct Exchange {
  uint64_t values[2][kWarp];
  int turn[kWarp];
};

std::vector<Fiber> fibers;
std::vector<Exchange> exchanges;
wavprune::cuda::Limits device_limits{3, 48 * 1024};
ucontext_t scheduler;
Fiber* running;
const std::function<void()>* body;
char* shared;
std::mt19937_64 random_order;
int64_t launch_count;

// What the warps of a device would move: the accesses that the threads of a warp make at the same
// instruction take every sector of 32 bytes that one of them touches, once.
constexpr size_t kSector = 32;
bool counting;
int64_t touched_bytes, touched_sectors;
std::vector<int> accesses_of_thread;
std::map<std::pair<int, int>, std::set<uintptr_t>> sectors_of_access;

void count_block() {
  for (const auto& [access, sectors] : sectors_of_access)
    touched_sectors += int64_t(sectors.size());
  sectors_of_access.clear();
  std::fill(accesses_of_thread.begin(), accesses_of_thread.end(), 0);
}

void enter() {
  (*body)();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

std::vector<int> shuffled(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_order);
  return order;
}

// Lets the threads from `first` to `last` go on if all that have not ended wait for the same.
bool released(int first, int last, Waits what) {
  bool any = false;
  for (int t = first; t < last; ++t) {
    if (fibers[t].done) continue;
    if (fibers[t].waits != what) return false;
    any = true;
  }
  for (int t = first; t < last; ++t) fibers[t].waits = Waits::no;
  return any;
}

void run_block(int threads) {
  exchanges.assign((threads + kWarp - 1) / kWarp, Exchange{});
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.done = false;
    fiber.waits = Waits::no;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool left = true, moved = true; left; ) {
    STD_TORCH_CHECK(moved, "shim: the threads of a block wait for each other");
    left = moved = false;
    for (const int t : shuffled(threads)) {
      if (fibers[t].done) continue;
      left = true;
      if (fibers[t].waits != Waits::no) continue;
      moved = true;
      running = &fibers[t];
      threadIdx.x = unsigned(t);
      swapcontext(&scheduler, &running->context);
    }
    for (int first = 0; first < threads; first += kWarp)
      moved = released(first, std::min(first + kWarp, threads), Waits::for_warp) || moved;
    moved = released(0, threads, Waits::for_block) || moved;
  }
}

void wait_for(Waits what) {
  running->waits = what;
  swapcontext(&running->context, &scheduler);
}

}  // namespace

void touch(const void* address, size_t bytes) {
  if (!counting) return;
  const int thread = int(threadIdx.x);
  touched_bytes += int64_t(bytes);
  const uintptr_t first = uintptr_t(address) / kSector;
  auto& sectors = sectors_of_access[{thread / kWarp, accesses_of_thread[thread]++}];
  for (uintptr_t s = first; s <= (uintptr_t(address) + bytes - 1) / kSector; ++s) sectors.insert(s);
}

void wait() { wait_for(Waits::for_block); }

const uint64_t* exchanged(uint64_t value) {
  const int lane = int(threadIdx.x) % kWarp;
  Exchange& own = exchanges[threadIdx.x / kWarp];
  const int turn = own.turn[lane] ^= 1;
  own.values[turn][lane] = value;
  wait_for(Waits::for_warp);
  return own.values[turn];
}

void* dynamic_shared() { return shared; }

void launch(const std::function<void()>& kernel, int blocks, int threads, size_t shared_bytes) {
  ++launch_count;
  while (int(fibers.size()) < threads) fibers.emplace_back();
  accesses_of_thread.resize(threads);
  body = &kernel;
  gridDim.x = unsigned(blocks);
  for (const int block : shuffled(blocks)) {
    // Exactly this size, so that a sanitizer sees its end, and never zeros by chance.
    const std::unique_ptr<char[]> memory(new char[shared_bytes]);
    std::memset(memory.get(), 0xFF, shared_bytes);
    shared = memory.get();
    blockIdx.x = unsigned(block);
    run_block(threads);
    count_block();
  }
}

// Bytes and sectors since counting began; from now on accesses are counted, or not.
std::vector<int64_t> count_accesses(bool on) {
  counting = on;
  return {std::exchange(touched_bytes, 0), std::exchange(touched_sectors, 0)};
}

void set_limits(int64_t multiprocessors, int64_t shared_bytes) {
  device_limits = {int(multiprocessors), int(shared_bytes)};
}

void reseed(int64_t seed) { random_order.seed(uint64_t(seed)); }
int64_t launches() { return launch_count; }

}  // namespace shim

namespace wavprune {

namespace cuda {

bool reachable(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
Device::Device(const torch::stable::Tensor&) {}
Limits limits() { return shim::device_limits; }

}  // namespace cuda
}  // namespace wavprune

STABLE_TORCH_LIBRARY(wavprune_shim, library) {
  library.def(
      "topk_threshold(Tensor[] weights, Tensor[] plans, int[] seeds, int[] jobs, int[] keep, "
      "bool compute_float64) -> Tensor");
  library.def(
      "percentile_threshold(Tensor[] weights, Tensor[] plans, int[] dropped, float percentile, "
      "bool compute_float64) -> Tensor");
  library.def(
      "prune_(Tensor(a!)[] weights, Tensor[] plans, int[] seeds, Tensor thresholds, bool compute_float64) -> "
      "Tensor");
  library.def(
      "mark_(Tensor[] weights, Tensor[] plans, int[] seeds, Tensor thresholds, "
      "Tensor(a!)[] masks, bool compute_float64) -> ()");
  library.def(
      "project_(Tensor(a!)[] weights, Tensor[] plans, Tensor[] masks, bool compute_float64) -> ()");
  library.def(
      "prune_by_mask_(Tensor(a!)[] weights, Tensor[] plans, Tensor[] masks, "
      "bool compute_float64) -> Tensor");
  library.def("dwt2(Tensor kernels, Tensor plan, int outputs) -> Tensor");
  library.def("idwt2(Tensor coefficients, Tensor plan, int values) -> Tensor");
  library.def("percentile_mask(Tensor input, float percentile, bool packed) -> Tensor");
  library.def(
      "trellis_load_(Tensor coded, Tensor parts, Tensor frequencies, Tensor streams, "
      "Tensor matrices, Tensor(a!)[] decoded) -> Tensor");
  library.def("set_limits(int multiprocessors, int shared_bytes) -> ()");
  library.def("reseed(int seed) -> ()");
  library.def("launches() -> int");
  library.def("count_accesses(bool on) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(wavprune_shim, CompositeExplicitAutograd, library) {
  library.impl("topk_threshold", TORCH_BOX(&wavprune::cuda::topk_threshold));
  library.impl("percentile_threshold", TORCH_BOX(&wavprune::cuda::percentile_threshold));
  library.impl("prune_", TORCH_BOX(&wavprune::cuda::prune_));
  library.impl("mark_", TORCH_BOX(&wavprune::cuda::mark_));
  library.impl("project_", TORCH_BOX(&wavprune::cuda::project_));
  library.impl("prune_by_mask_", TORCH_BOX(&wavprune::cuda::prune_by_mask_));
  library.impl("dwt2", TORCH_BOX(&wavprune::cuda::dwt2));
  library.impl("idwt2", TORCH_BOX(&wavprune::cuda::idwt2));
  library.impl("percentile_mask", TORCH_BOX(&wavprune::cuda::percentile_mask));
  library.impl("trellis_load_", TORCH_BOX(&wavprune::cuda::trellis_load_));
  library.impl("set_limits", TORCH_BOX(&shim::set_limits));
  library.impl("reseed", TORCH_BOX(&shim::reseed));
  library.impl("launches", TORCH_BOX(&shim::launches));
  library.impl("count_accesses", TORCH_BOX(&shim::count_accesses));
}

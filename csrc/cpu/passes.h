// The passes over one tile of kernels, and the loads and stores of tiles, behind a table of
// functions for each instruction set.
#pragma once

#include <cstdint>

#include "../plan.h"

namespace wavprune {

// Kernels of a block.
constexpr int kLanes = 16;

// How values are stored.
enum class Element : int { float32, float64, float16, bfloat16 };

// Kernels in memory, numbered row by row: value k of kernel n begins n / row_kernels row strides,
// n % row_kernels kernel strides and offsets[k] after data, all of them counted in elements.
struct Strided {
  char* data;
  Element element;
  int64_t row_kernels, row_stride, kernel_stride;
  int64_t values;  // of a kernel
  const int64_t* offsets;
  bool together;  // the values of a kernel are one after the other: offsets[k] = k
};

// How the values of a block of kernels lie: in lanes, value k of its 16 kernels side by side; or
// flat, the kernels one after the other.
enum class Form { lanes, flat };

template <class T>
constexpr Element kOwnElement = sizeof(T) == sizeof(float) ? Element::float32 : Element::float64;

// What a pass works on: rows of kernels, block by block. Rows hold whole blocks, or there is only
// one, or the order of the blocks does not matter. Strides and offsets are counted in elements.
struct Tile {
  void* data;
  Element stored;   // what the values are
  Element element;  // to which results are rounded: what the weight's values are
  int64_t rows, row_kernels, row_stride, block_stride;
  Form form;
  const int64_t* offsets;  // of the values in lanes; null where that of value k is 16 k
};

// Collects the ranks in [low, high] in `out`, which needs room for all of them and a vector more.
template <class T>
struct Scan {
  T low, high;
  T* out;
  int64_t below, inside;  // how many ranks are smaller than low, and in [low, high]
  uint64_t peak;          // the largest bit pattern; infinity's or above if a value is not finite
  double energy_below, energy;  // sums of squares, of the ranks below low and of all
};

// What pruning changed. The sums are added up in T.
template <class T>
struct Change {
  int64_t kept, zeros;
  double squared_error, squared_norm;
};

// A mask has a word for each block of 16 kernels and coefficient, block by block; bit l is that of
// the block's kernel l.
typedef uint16_t MaskWord;

// scratch: scratch_values(plan) values, aligned to 64 bytes. Thresholds are positive. For the
// identity, kernels are single values one after the other.
template <class T>
struct Passes {
  void (*scan)(const Plan<T>&, const Tile&, T* scratch, Scan<T>*);
  // A scan that sums the squares too, in T.
  void (*scan_energy)(const Plan<T>&, const Tile&, T* scratch, Scan<T>*);
  void (*prune)(const Plan<T>&, const Tile&, T* scratch, T threshold, Change<T>*);
  void (*prune_by_mask)(const Plan<T>&, const Tile&, T* scratch, const MaskWord*, Change<T>*);
  void (*project)(const Plan<T>&, const Tile&, T* scratch, const MaskWord*);
  void (*mark)(const Plan<T>&, const Tile&, T* scratch, T threshold, MaskWord*);
  // Matrices of kernels and coefficients.
  void (*forward)(const Plan<T>&, const T* x, int64_t kernels, T* scratch, T* coefficients);
  void (*inverse)(const Plan<T>&, const T* coefficients, int64_t kernels, T* scratch, T* x);
  // The kernels first .. first + kernels - 1 in a buffer of buffer_values(); and back, rounded to
  // the nearest and saturating, as float16 ends at 65504.
  void (*load)(const Strided&, int64_t first, int64_t kernels, Form, T* buffer);
  void (*store)(const Strided&, int64_t first, int64_t kernels, Form, T* buffer);
  // The same, for few kernels anywhere: always flat, and without a value more than they have.
  void (*pick)(const Strided&, int64_t first, int64_t kernels, T* out);
  // Adds the sums over the kernels of the products of their values i and j, i <= j, to
  // gram[i * K + j]; scratch has gram_values(K) values.
  void (*gram)(const T* x, int64_t kernels, int K, double* scratch, double* gram);
  // Of `count` values of which the first has the index `first` in its weight, ranked by a seed; a
  // scan is of coarse ranks (random.h).
  void (*scan_at_random)(const T* x, int64_t count, uint64_t first, uint64_t seed, Scan<T>*);
  void (*prune_at_random)(T* x, int64_t count, uint64_t first, uint64_t seed, double threshold,
                          Change<T>*);
  void (*mark_at_random)(const T* x, int64_t count, uint64_t first, uint64_t seed,
                         double threshold, MaskWord*);
};

struct InstructionSet {
  const char* name;
  Passes<float> f32;
  Passes<double> f64;
};

// Blocks that a pass with the identity takes at a time.
constexpr int kIdentityGroup = 16;

// Vectors for the kernels before and after, their coefficients and the middle of a separable
// transform; and copies of a block of kernels and of its coefficients.
template <class T>
int64_t scratch_values(const Plan<T>& plan) {
  const int64_t side = plan.inputs > plan.outputs ? plan.inputs : plan.outputs;
  return (3 * int64_t(plan.inputs) + 2 * int64_t(plan.outputs) + side) * kLanes +
         2 * kIdentityGroup * kLanes;
}

// A tile buffer: whole blocks, and one more to turn a block around.
inline int64_t buffer_values(int64_t kernels, int64_t values) {
  return ((kernels + kLanes - 1) / kLanes + 1) * kLanes * values;
}

// Kernels whose products are summed at a time, in whole blocks: their values stay in the cache.
inline int64_t gram_kernels(int64_t K) {
  const int64_t blocks = 4096 / (K * kLanes);
  return (blocks > 1 ? blocks : 1) * kLanes;
}
inline int64_t gram_values(int64_t K) { return gram_kernels(K) * K; }

// Null where the processor or the compiler lacks the instruction set.
const InstructionSet* instructions_v4();
const InstructionSet* instructions_v3();
const InstructionSet* instructions_baseline();

}  // namespace wavprune

// Which coefficients are kept, a bit each, and weights brought back onto those: what a weight needs
// that goes on being trained.
//
// Bytes of project_: every weight is read once and written once, and one bit a coefficient is read.
// Operations: the transform, its inverse, and one masked move for each register of coefficients.

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>

#include "ops.h"
#include "select.h"

namespace wavprune {

using torch::headeronly::ScalarType;

namespace {

int64_t blocks(int64_t kernels) { return (kernels + kLanes - 1) / kLanes; }

// Words of a weight's mask.
template <class T>
int64_t words_of(const Piece<T>& piece) {
  const int64_t kernels = pass_kernels(piece.weight, *piece.plan, piece.weight.kernels());
  return blocks(kernels) * piece.plan->outputs;
}

// Where the words of a tile begin. A tile is a whole number of blocks.
template <class T>
int64_t first_word(const Piece<T>& piece, int64_t first) {
  return pass_kernels(piece.weight, *piece.plan, first) / kLanes * piece.plan->outputs;
}

template <class T>
void mark_drawn(const Piece<T>& piece, int64_t first, int64_t values, const T* tile, T threshold,
                MaskWord* words) {
  const int64_t place = first * piece.weight.values();
  std::fill_n(words, blocks(values), MaskWord(0));
  for (int64_t i = 0; i < values; ++i)
    if (tile[i] != 0 && random_rank(uint64_t(place + i), piece.seed) >= threshold)
      words[i / kLanes] |= MaskWord(1u << i % kLanes);
}

// Where each mask's words are, after a check that they are as many as its weight has.
template <class T>
std::vector<MaskWord*> words_in(const std::vector<Tensor>& masks,
                                const std::vector<Piece<T>>& pieces) {
  check_lengths(pieces.size(), masks.size(), "masks");
  std::vector<MaskWord*> words;
  for (size_t w = 0; w < pieces.size(); ++w) {
    const Tensor& mask = masks[w];
    const int64_t bytes = words_of(pieces[w]) * int64_t(sizeof(MaskWord));
    STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte &&
                        mask.is_contiguous() && mask.numel() == bytes,
                    "wavprune: the mask of weight ", w, " must be ", bytes,
                    " contiguous bytes on the CPU");
    STD_TORCH_CHECK(uintptr_t(mask.data_ptr()) % alignof(MaskWord) == 0,
                    "wavprune: the mask of weight ", w, " must begin at an even address");
    words.push_back(static_cast<MaskWord*>(mask.data_ptr()));
  }
  return words;
}

template <class T>
void mark_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& plans,
              const std::vector<int64_t>& draws, const double* thresholds,
              const std::vector<Tensor>& masks) {
  std::vector<Piece<T>> pieces;
  const auto owned = pieces_of<T>(weights, plans, draws, &pieces);
  const std::vector<MaskWord*> words = words_in(masks, pieces);
  const std::vector<TileTask> tasks = tiles_of(pieces);
  share_out(int64_t(tasks.size()), [&](auto next) {
    for (int64_t i; (i = next()) < int64_t(tasks.size());) {
      const auto& [w, first, kernels] = tasks[i];
      const Piece<T>& piece = pieces[w];
      const Scratch<T> tile(tile_values(piece.weight, *piece.plan));
      const T* x = load_tile(piece.weight, first, kernels, tile.get());
      const int64_t counted = pass_kernels(piece.weight, *piece.plan, kernels);
      MaskWord* const to = words[w] + first_word(piece, first);
      const T threshold = positive<T>(thresholds[w]);
      if (piece.draw) {
        mark_drawn(piece, first, counted, x, threshold, to);
        continue;
      }
      const Scratch<T> scratch(scratch_values(*piece.plan));
      passes<T>().mark(*piece.plan, x, counted, scratch.get(), threshold, to);
    }
  });
}

template <class T>
void project_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& plans,
                 const std::vector<Tensor>& masks) {
  std::vector<Piece<T>> pieces;
  const auto owned = pieces_of<T>(weights, plans, {}, &pieces);
  const std::vector<MaskWord*> words = words_in(masks, pieces);
  const std::vector<TileTask> tasks = tiles_of(pieces);
  share_out(int64_t(tasks.size()), [&](auto next) {
    for (int64_t i; (i = next()) < int64_t(tasks.size());) {
      const auto& [w, first, kernels] = tasks[i];
      const Piece<T>& piece = pieces[w];
      const Scratch<T> tile(tile_values(piece.weight, *piece.plan));
      const Scratch<T> scratch(scratch_values(*piece.plan));
      T* x = load_tile(piece.weight, first, kernels, tile.get());
      passes<T>().project(*piece.plan, x, pass_kernels(piece.weight, *piece.plan, kernels),
                          scratch.get(), words[w] + first_word(piece, first));
      if (!direct<T>(piece.weight)) store_tile(piece.weight, first, kernels, x);
    }
  });
}

}  // namespace

void mark_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<int64_t> draws,
           Tensor thresholds, std::vector<Tensor> masks, bool wide) {
  const KeepDenormals guard;
  check_draws(draws, wide);
  const double* values = numbers(thresholds, int64_t(weights.size()), "thresholds");
  for (size_t w = 0; w < weights.size(); ++w)
    STD_TORCH_CHECK(!std::isnan(values[w]), "wavprune: threshold ", w, " is NaN");
  wide ? mark_all<double>(weights, plans, draws, values, masks)
       : mark_all<float>(weights, plans, draws, values, masks);
}

void project_(std::vector<Tensor> weights, std::vector<Tensor> plans, std::vector<Tensor> masks,
              bool wide) {
  const KeepDenormals guard;
  wide ? project_all<double>(weights, plans, masks) : project_all<float>(weights, plans, masks);
}

}  // namespace wavprune

// Decoding the indices of packed checkpoints: a warp a stream, a lane a column.
//
// All lanes take a step, then the next row follows. A step is a chain: the code of the lane's slot
// (a load), a product, which lanes take a word (a ballot), how many before this one do, that word
// (a shuffle), the next slot. Streams run side by side and no step can begin before the last one
// ends, so that the time is the latency of the longest stream's steps; a warp alone also waits for
// each of its instructions, so that a step has few. Therefore the tables that a block's streams use
// are in shared memory, at four bytes a slot where that fits; else at one byte a slot, with a second
// load for the code; and those for which that is too much stay where they are, behind the same
// pointers. What an index is worth is left to `dequantise`. docs/gpu.md has the cycles.
#pragma once

#include "coded.h"
#include "elements.cuh"

namespace wavprune::cuda {

constexpr uint32_t kAll = 0xffffffffu;

// The trellis goes on as four times its state, so that the next one is a rotation of a word with
// four bits for each state; the word for odd indices, or for even ones.
constexpr uint32_t after(int parity) {
  uint32_t states = 0;
  for (int s = 0; s < coding::kStates; ++s) states |= uint32_t(coding::kNext[s][parity]) << 4 * s;
  return states << 2 | states >> 30;
}

// A block for each table, a warp for each code.
__global__ void __launch_bounds__(kThreads) expand_tables(const CodeTable* tables) {
  const CodeTable table = tables[blockIdx.x];
  uint32_t* const codes = reinterpret_cast<uint32_t*>(table.slots + kSlots);
  for (int c = threadIdx.x; c < table.count; c += kThreads) codes[c] = table.codes[c];
  for (int c = int(threadIdx.x) / kWarp; c < table.count; c += kThreads / kWarp) {
    const uint32_t code = table.codes[c];
    const int first = int(code & kSlotBits), frequency = int(code >> kFrequencyShift);
    // An empty table has one code of no frequency, for every slot.
    const int stop = frequency == 0 ? kSlots : first + frequency;
    for (int i = first + int(threadIdx.x) % kWarp; i < stop && i < kSlots; i += kWarp)
      table.slots[i] = uint8_t(c);
  }
}

// The words of a stream in their order. Lane l has the words l, l + 32, ...: of the 32 words from the
// next one on, each lane has exactly one.
class Words {
 public:
  __device__ __forceinline__ Words(const uint16_t* words, uint32_t count, int lane)
      : words_(words), lane_(uint32_t(lane)), count_(count) {
    now_ = load();
    loaded_ += kWarp;
    next_ = load();
    loaded_ += kWarp;
    ahead_ = load();
    loaded_ += kWarp;
    mine_ = now_;
  }

  // The word `rank` behind the next one, rank < 32; behind the last one, any.
  __device__ __forceinline__ uint32_t at(uint32_t rank) const {
    return __shfl_sync(kAll, mine_, int(offset_ + rank));
  }

  // Goes on by at most 32 words, after which it is full or not.
  __device__ __forceinline__ void skip(uint32_t words) {
    offset_ += words;
    mine_ = lane_ >= offset_ ? now_ : next_;
  }
  __device__ __forceinline__ bool full() const { return offset_ >= kWarp; }

  // The words that `turn` takes when it is full: loaded long before, so that nobody waits.
  __device__ __forceinline__ uint32_t load() const {
    const uint32_t at = loaded_ + lane_;
    return words_[at < count_ ? at : count_];
  }
  __device__ __forceinline__ void turn(uint32_t loaded) {
    offset_ -= kWarp;
    now_ = next_;
    next_ = ahead_;
    ahead_ = loaded;
    mine_ = lane_ >= offset_ ? now_ : next_;
    // Far behind the end it stays there.
    if (loaded_ <= count_ + 8 * kWarp) loaded_ += kWarp;
  }

  __device__ __forceinline__ uint32_t position() const { return loaded_ - 3 * kWarp + offset_; }

 private:
  const uint16_t* words_;  // `count_` of them, and one that may be read in vain
  uint32_t lane_, count_, mine_, now_, next_, ahead_;
  uint32_t loaded_ = 0, offset_ = 0;
};

// Where the two tables of a class are: with four bytes a slot in shared memory ...
struct Direct {
  typedef const uint32_t* Place;
  const uint32_t* entries;
  const uint32_t* places;

  __device__ __forceinline__ Place place(uint32_t c) const { return entries + places[c]; }
  __device__ __forceinline__ uint32_t code(Place place, uint32_t trellis, uint32_t slot,
                                           uint32_t* beyond) const {
    // The quantiser is known before the slot is.
    const Place table = place + (trellis & 4) * (kSlots / 4);
    const uint32_t code = table[slot];
    *beyond = code & kSlotBits;
    return code;
  }
};

// ... or with a byte a slot, anywhere.
struct ByteSlots {
  struct alignas(16) Place {
    const uint8_t* of_quantiser[2];
  };
  const Place* places;

  __device__ __forceinline__ Place place(uint32_t c) const { return places[c]; }
  __device__ __forceinline__ uint32_t code(const Place& place, uint32_t trellis, uint32_t slot,
                                           uint32_t* beyond) const {
    const uint8_t* const slots = trellis & 4 ? place.of_quantiser[1] : place.of_quantiser[0];
    const uint32_t code = reinterpret_cast<const uint32_t*>(slots + kSlots)[slots[slot]];
    *beyond = slot - (code & kSlotBits);
    return code;
  }
};

// A warp decodes a stream to marks, which `dequantise` reads. Any bytes at all end in marks and a
// verdict: whether the stream ended as it should.
template <class Tables>
__device__ __forceinline__ uint32_t decode_stream(const CodedStream& stream,
                                                  const CodedMatrix* matrices,
                                                  const Tables& tables) {
  const int lane = int(threadIdx.x) % kWarp;
  const uint32_t before = (1u << lane) - 1;
  uint32_t x = stream.states[lane];
  Words words(reinterpret_cast<const uint16_t*>(stream.states + kWarp), stream.words, lane);
  const int32_t* const escapes = stream.escapes;
  const uint32_t escape_count = uint32_t(stream.escape_count);
  uint32_t escape = 0;
  bool sound = true;
  for (int i = 0; i < stream.matrices; ++i) {
    const CodedMatrix& m = matrices[stream.first + i];
    const uint32_t rows = uint32_t(m.rows), columns = uint32_t(m.columns);
    const uint8_t* const row_classes = m.row_classes;
    const uint8_t* const column_classes = m.column_classes;
    uint32_t* const marks = m.marks;
    for (uint32_t first = 0; first < columns; first += kWarp) {
      const bool active = first + lane < columns;
      const uint32_t column = active ? first + lane : columns - 1;
      const uint32_t column_class = column_classes[column];
      const bool writes = active && marks != nullptr;
      const uint32_t x_before = x;
      uint32_t at = column, trellis = 0, least = kAll;
      // A lane has the class of every 32nd row.
      uint32_t classes = row_classes[lane < rows ? lane : rows - 1];
      for (uint32_t start = 0; start < rows; start += kWarp) {
        const auto class_of = [&](uint32_t row) { return __shfl_sync(kAll, classes, int(row)); };
        const auto place_of = [&](uint32_t row_class) {
          const uint32_t c = column_class + row_class;
          return tables.place(c < kClasses ? c : kClasses - 1);
        };
        const uint32_t behind = start + kWarp + lane;
        const uint32_t classes_ahead = row_classes[behind < rows ? behind : rows - 1];
        const uint32_t here = rows - start < kWarp ? rows - start : kWarp;
        // Found steps before they are needed, so that none waits for them.
        auto place = place_of(class_of(0));
        uint32_t class_ahead = class_of(1);
        for (uint32_t row = 0; row < here;) {
          const uint32_t words_ahead = words.load();
          do {
            const auto place_ahead = place_of(class_ahead);
            class_ahead = class_of(row + 2);
            uint32_t beyond;
            const uint32_t code = tables.code(place, trellis, x & kSlotBits, &beyond);
            const uint32_t next = (code >> kFrequencyShift) * (x >> coding::kPrecision) + beyond;
            const bool takes = active && next < coding::kLeastState;
            const uint32_t takers = __ballot_sync(kAll, takes);
            const uint32_t word = words.at(uint32_t(__popc(takers & before)));
            x = takes ? next << 16 | word : next;
            uint32_t mark = (code & kByteBits) | (trellis & ~kByteBits);
            uint32_t states = code & kEven ? after(0) : after(1);
            const bool escaping = active && (code & kByteBits) == kByteBits;
            const uint32_t escaped = __ballot_sync(kAll, escaping);
            if (escaped != 0) {
              const uint32_t own = escape + uint32_t(__popc(escaped & before));
              if (escaping) {
                const uint32_t k = own < escape_count ? uint32_t(escapes[own]) : 0;
                sound = sound && own < escape_count;
                states = k & 1 ? after(1) : after(0);
                mark = kEscaped | (k & kIndexBits) << 3 | (trellis & 4);
              }
              // Behind the last one it stays there.
              escape += uint32_t(__popc(escaped));
              escape = escape < escape_count ? escape : escape_count;
            }
            least = code < least ? code : least;
            trellis = __funnelshift_r(states, states, trellis) & 28;
            if (writes) marks[at] = mark;
            at += columns;
            place = place_ahead;
            words.skip(uint32_t(__popc(takers)));
            ++row;
          } while (row < here && !words.full());
          if (words.full()) words.turn(words_ahead);
        }
        classes = classes_ahead;
      }
      // A table without symbols codes nothing.
      sound = sound && (!active || least >> kFrequencyShift != 0);
      if (!active) x = x_before;
      if (words.position() > stream.words) return kDamaged;
    }
  }
  if (stream.whole)
    sound = sound && x == coding::kLeastState && words.position() == stream.words &&
            escape == escape_count;
  return __ballot_sync(kAll, !sound) == 0 ? 0 : kDamaged;
}

// A block for `together` streams, which come with the longest first. `tables` are as
// `expand_tables` left them.
__global__ void __launch_bounds__(kThreads, kDecoding)
    decode_blocks(const CodedStream* streams, int count, int together,
                   const CodedMatrix* matrices, const CodeTable* tables, int shared_bytes,
                   uint32_t* found) {
  WAVPRUNE_TILE(uint4, tile);
  __shared__ uint32_t direct_places[kClasses];
  __shared__ ByteSlots::Place places[kClasses];
  __shared__ int offsets[kCodeTables], sizes[kCodeTables];
  for (int t = threadIdx.x; t < kCodeTables; t += kThreads) {
    sizes[t] = tables[t].bytes;
    places[t / 2].of_quantiser[t % 2] = tables[t].slots;
  }
  __syncthreads();
  const int first = int(blockIdx.x) * together;
  const int here = count - first < together ? count - first : together;
  uint64_t used = 0;
  for (int s = 0; s < here; ++s) used |= streams[first + s].classes;
  int classes = 0;
  for (int c = 0; c < kClasses; ++c) classes += int(used >> c & 1);
  constexpr int kPair = 2 * kSlots * int(sizeof(uint32_t));
  const bool direct = classes * kPair <= shared_bytes;
  if (threadIdx.x == 0) {
    int pairs = 0, bytes = 0;
    for (int c = 0; c < kClasses; ++c) {
      const bool needed = used >> c & 1;
      // A class that no stream here should have reads the first one's tables.
      direct_places[c] = needed ? uint32_t(pairs) * 2 * kSlots : 0;
      pairs += needed;
      for (int quantiser = 0; quantiser < 2; ++quantiser) {
        const int size = sizes[2 * c + quantiser];
        const bool fits = !direct && needed && bytes + size <= shared_bytes;
        offsets[2 * c + quantiser] = fits ? bytes : -1;
        // Else it stays where it is.
        if (fits)
          places[c].of_quantiser[quantiser] = reinterpret_cast<const uint8_t*>(tile) + bytes;
        bytes += fits ? size : 0;
      }
    }
  }
  __syncthreads();
  uint32_t* const entries = reinterpret_cast<uint32_t*>(tile);
  for (int t = 0; t < kCodeTables; ++t) {
    if (offsets[t] < 0 && !(direct && used >> t / 2 & 1)) continue;
    const CodeTable& table = tables[t];
    if (direct) {
      const uint32_t* const codes = reinterpret_cast<const uint32_t*>(table.slots + kSlots);
      uint32_t* const to = entries + direct_places[t / 2] + t % 2 * kSlots;
      for (int slot = threadIdx.x; slot < kSlots; slot += kThreads) {
        const uint32_t code = codes[table.slots[slot]];
        to[slot] = (code & ~kSlotBits) | ((uint32_t(slot) - code) & kSlotBits);
      }
    } else {
      const uint4* const from = reinterpret_cast<const uint4*>(table.slots);
      uint4* const to = tile + offsets[t] / int(sizeof(uint4));
      for (int i = threadIdx.x; i < table.bytes / int(sizeof(uint4)); i += kThreads)
        to[i] = from[i];
    }
  }
  __syncthreads();
  const int own = int(threadIdx.x) / kWarp;
  if (own >= here) return;
  const CodedStream& stream = streams[first + own];
  const uint32_t verdict = direct
                               ? decode_stream(stream, matrices, Direct{entries, direct_places})
                               : decode_stream(stream, matrices, ByteSlots{places});
  if (threadIdx.x % kWarp == 0) found[stream.index] = verdict;
}

}  // namespace wavprune::cuda

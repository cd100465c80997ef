/* Reads wavprune's packed checkpoints (version 3 of docs/format.md) without Python.
 *
 * One C99 header and one C99 file, which compile as C++ too. They need memcpy and memset, and no
 * other library: nothing is allocated, nothing is printed, no file is opened. Every byte is checked
 * before it is believed, so that a file may come from anywhere.
 *
 * Memory: the file's bytes, which are only read; a wavprune_decoder (4 KB); for each tensor that is
 * read, a buffer of `room` bytes, which is that of the result but for some whose coefficients take
 * more; and about 4 KB of stack. Records and classes that Zstandard has compressed are
 * decompressed by a function of the caller into a buffer of the caller, of wavprune_heads_size bytes;
 * a file that wavprune.checkpoint.portable has written needs neither. With a cache of
 * WAVPRUNE_CACHE bytes decoding is faster.
 *
 *     static wavprune_decoder decoder;
 *     int status = wavprune_open(&decoder, data, size, NULL, 0, NULL, NULL);
 *     for (uint64_t i = 0; !status && i < decoder.tensors; ++i) {
 *       wavprune_tensor tensor;
 *       if ((status = wavprune_tensor_at(&decoder, i, &tensor))) break;
 *       ... a buffer of tensor.room bytes ...
 *       status = wavprune_read(&decoder, i, buffer, room);
 *     }
 *
 * The bits are those of wavprune.checkpoint.load, on every machine that rounds as IEEE 754 says, to
 * the nearest, and keeps denormals. Compile with -ffp-contract=off, and without -ffast-math.
 * Elements are little-endian.
 *
 * A decoder belongs to one thread at a time; several can read the same bytes.
 */
#ifndef WAVPRUNE_DECODER_H
#define WAVPRUNE_DECODER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum wavprune_status {
  WAVPRUNE_OK = 0,
  /* It is no safetensors file with one tensor of bytes of version 3. Versions 1 and 2 are read by
   * Python alone. */
  WAVPRUNE_NOT_PACKED = 1,
  /* A checksum differs, a part ends early or late, or it says what cannot be. */
  WAVPRUNE_DAMAGED = 2,
  /* Its records are compressed by Zstandard: give a decompressor, or write it with `portable`. */
  WAVPRUNE_NEEDS_ZSTD = 3,
  /* A buffer is too small: see wavprune_heads_size, wavprune_tensor.room, wavprune_cache. */
  WAVPRUNE_NEEDS_ROOM = 4,
  /* There is no tensor of this number. */
  WAVPRUNE_NO_TENSOR = 5,
  /* Beyond the limits of this decoder: a tensor of 2^48 elements, 65,536 tensors, 1,024 batch norms,
   * matrices that together would look through 4 GB of bases, vectors of a batch norm that are no F64,
   * F32, F16 or BF16. */
  WAVPRUNE_UNSUPPORTED = 6
};

#define WAVPRUNE_MOST_AXES 8
/* A cache that holds every table: see wavprune_cache. */
#define WAVPRUNE_CACHE 65536

typedef struct wavprune_tensor {
  const char *dtype; /* as safetensors calls it, such as "F32" */
  int axes;
  uint64_t shape[WAVPRUNE_MOST_AXES];
  uint64_t size;        /* bytes of the tensor */
  uint64_t room;        /* bytes of the buffer that wavprune_read needs, at least `size` */
  uint64_t same_as;     /* the number of the tensor that it is tied to; its own for all others */
  uint64_t name_length; /* bytes of its name */
} wavprune_tensor;

/* Writes at most `room` bytes, what the Zstandard frame of `size` bytes decompresses to, and returns
 * how many; anything else where it cannot. ZSTD_decompress of libzstd is one, but for `context`. */
typedef size_t (*wavprune_decompress)(void *context, void *out, size_t room, const void *frame,
                                      size_t size);

/* What follows in this part is the decoder's own. */

typedef struct wavprune_cursor {
  const uint8_t *at;     /* the next byte */
  const uint8_t *blocks; /* the header of the next block of a Zstandard frame */
  uint64_t run;          /* bytes left in this block */
  uint64_t left;         /* bytes left in all */
  uint32_t step;         /* 0 where a block repeats one byte */
} wavprune_cursor;

/* Where a tensor's records begin. */
typedef struct wavprune_place {
  uint64_t index;
  wavprune_cursor names, entries, classes;
  uint64_t stream; /* of the next matrix */
  uint64_t filled; /* indices of that stream before it */
  uint64_t raw;    /* bytes of raw tensors before it */
} wavprune_place;

/* A stream that is being decoded. */
typedef struct wavprune_run {
  int active;
  uint64_t stream;
  wavprune_place place; /* not beyond the next matrix to decode */
  wavprune_cursor words, escapes;
  uint64_t escapes_left;
  uint32_t states[32];
} wavprune_run;

#define WAVPRUNE_TABLES 80
#define WAVPRUNE_OWN_CACHE 2600

typedef struct wavprune_decoder {
  uint64_t tensors; /* how many the file has; for the caller to read */
  const uint8_t *data;
  uint64_t size;
  uint64_t first_stream, first_raw; /* offsets in data */
  uint64_t bases, links, streams;   /* how many */
  wavprune_cursor basis_list, link_list, stream_list, table_list;
  wavprune_place begin, at, of_stream; /* `of_stream`: the first matrix of the stream at `at` */
  wavprune_run run;
  uint8_t *cache;
  uint64_t cache_units, cache_used;     /* of two bytes */
  uint16_t tables_at[WAVPRUNE_TABLES];  /* in the cache; 0: not there */
  uint16_t written_at[WAVPRUNE_TABLES]; /* among the tables that are written out */
  uint8_t table_codes[WAVPRUNE_TABLES];
  unsigned hint_shift;
  uint8_t own_cache[WAVPRUNE_OWN_CACHE];
} wavprune_decoder;

/* The decoder's own part ends here. */

/* Sets *needed to the bytes of the buffer that wavprune_open needs for this file: 0 for one that
 * needs no decompressor. */
int wavprune_heads_size(const void *data, size_t size, size_t *needed);

/* Reads and checks all that the file says of its tensors. `data` must stay where it is, and so must
 * `heads`, a buffer of as many bytes as wavprune_heads_size says; it may be null where these are 0.
 * `decompress` may be null, or gets `context`. */
int wavprune_open(wavprune_decoder *decoder, const void *data, size_t size, void *heads,
                  size_t heads_size, wavprune_decompress decompress, void *context);

/* Gives the decoder more memory than its own, which may lie anywhere and must stay there. With
 * WAVPRUNE_CACHE bytes no table is made twice: with its own alone, a file can be made that takes ten
 * microseconds a weight. With four bytes for each element of its matrix (81 for 3x3 kernels) and each
 * value of a kernel, a basis is made once a tensor; its own do for 5x5 kernels, and kernels of more
 * than 650 values need a cache. To be called after wavprune_open. */
void wavprune_cache(wavprune_decoder *decoder, void *memory, size_t size);

/* What the file says of a tensor; its number is its place in the model. In rising order each takes
 * a step, else those before it are passed again. */
int wavprune_tensor_at(wavprune_decoder *decoder, uint64_t index, wavprune_tensor *tensor);

/* Copies the name of a tensor, UTF-8 without an end, to a buffer of at least `name_length` bytes.
 * Whether names are UTF-8 and differ from each other is not checked. */
int wavprune_name(wavprune_decoder *decoder, uint64_t index, char *out, size_t room);

/* Decodes a tensor to the first `size` bytes of a buffer. Matrices of a stream are decoded one after
 * the other: one that is skipped, or read again, costs as much as one that is read. Where it fails
 * the buffer holds anything. */
int wavprune_read(wavprune_decoder *decoder, uint64_t index, void *out, size_t room);

/* A status in words. */
const char *wavprune_message(int status);

#ifdef __cplusplus
}
#endif

#endif

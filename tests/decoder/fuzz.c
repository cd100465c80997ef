/* Damaged packed files under the decoder: no byte outside of its buffers is read or written.
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -Icsrc/decoder tests/decoder/fuzz.c \
 *         csrc/decoder/wavprune_decoder.c -o fuzz && ./fuzz FOLDER_OF_FILES
 *
 * With WAVPRUNE_MUTATE it has a main function that changes files at random, for compilers without
 * libFuzzer. FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION takes any checksum for the right one, since
 * nothing else would get past them.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wavprune_decoder.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Larger tensors are left out, and larger heads. */
enum { MOST = 1 << 20 };

static uint64_t opened, decoded;

/* Bytes that follow from the frame, and sometimes too few. */
static size_t decompress(void *context, void *out, size_t room, const void *frame, size_t size) {
  size_t i;
  (void)context;
  for (i = 0; i < room; ++i)
    ((uint8_t *)out)[i] = size > 9 ? ((const uint8_t *)frame)[9 + i % (size - 9)] : 0;
  return size % 16 ? room : 0;
}

static void read_all(const uint8_t *file, size_t size, unsigned how) {
  static wavprune_decoder decoder;
  size_t needed = 0;
  void *heads, *cache = NULL;
  uint64_t i;
  int status = wavprune_heads_size(file, size, &needed);
  if (status || needed > MOST) return;
  heads = malloc(needed);
  status = wavprune_open(&decoder, file, size, heads, needed, how & 4 ? NULL : decompress, NULL);
  if (!status) {
    ++opened;
    if (how & 1) {
      cache = malloc(WAVPRUNE_CACHE);
      wavprune_cache(&decoder, cache, WAVPRUNE_CACHE);
    }
    for (i = 0; i < decoder.tensors && i < 64; ++i) {
      const uint64_t index = how & 2 ? decoder.tensors - 1 - i : i;
      wavprune_tensor tensor;
      char *name;
      void *out;
      if (wavprune_tensor_at(&decoder, index, &tensor) || tensor.room > MOST) continue;
      if (tensor.name_length > MOST) continue;
      /* Of exactly the size that is asked for. */
      name = (char *)malloc((size_t)tensor.name_length);
      out = malloc((size_t)tensor.room);
      wavprune_name(&decoder, index, name, (size_t)tensor.name_length);
      decoded += !wavprune_read(&decoder, index, out, (size_t)tensor.room);
      free(name);
      free(out);
    }
  }
  free(cache);
  free(heads);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  uint8_t *const copy = (uint8_t *)malloc(size + 256);
  const unsigned how = size ? data[size - 1] : 0;
  char header[200];
  uint8_t *file;
  size_t length;
  if (!copy) abort();
  /* Bytes that are no file are those of its tensor. */
  length = (size_t)snprintf(header, sizeof header,
                            "{\"__metadata__\":{\"wavprune\":\"{\\\"version\\\":3}\"},\"wavprune\":{"
                            "\"dtype\":\"U8\",\"shape\":[%zu],\"data_offsets\":[0,%zu]}}",
                            size, size);
  file = (uint8_t *)malloc(8 + length + size);
  memset(file, 0, 8);
  file[0] = (uint8_t)length;
  memcpy(file + 8, header, length);
  if (size) memcpy(file + 8 + length, data, size);
  read_all(file, 8 + length + size, how);
  free(file);
  file = (uint8_t *)malloc(size);
  if (size) memcpy(file, data, size);
  read_all(file, size, how);
  free(file);
  free(copy);
  return 0;
}

#ifdef WAVPRUNE_MUTATE

static uint64_t random_state = 1;

static uint64_t random_number(uint64_t below) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return below ? random_state % below : 0;
}

/* Other bytes in place of some of the first `size`; returns how many there are then. */
static size_t mutate(uint8_t *bytes, size_t size) {
  static const uint8_t special[] = {0, 1, 2, 4, 38, 39, 40, 127, 128, 192, 254, 255};
  uint64_t changes = 1 + random_number(4);
  /* Half of the changes are among the records, which come first. */
  while (size && changes--) {
    const uint64_t span = random_number(2) && size > 400 ? 400 : size;
    const size_t at = (size_t)random_number(span);
    switch (random_number(6)) {
      case 0: bytes[at] ^= (uint8_t)(1 << random_number(8)); break;
      case 1: bytes[at] = (uint8_t)random_number(256); break;
      case 2: bytes[at] = special[random_number(sizeof special)]; break;
      case 3: bytes[at] = (uint8_t)(bytes[at] + (random_number(2) ? 1 : 255)); break;
      case 4: bytes[at] = bytes[random_number(size)]; break;
      default:
        if (random_number(8) == 0) size = at;
    }
  }
  return size;
}

/* mutate COUNT SEED FILE ... */
int main(int argc, char **argv) {
  long runs, run;
  if (argc < 4) return 2;
  runs = atol(argv[1]);
  random_state = (uint64_t)atol(argv[2]) * 2654435761u + 1;
  for (run = 0; run < runs; ++run) {
    FILE *const file = fopen(argv[3 + run % (argc - 3)], "rb");
    uint8_t *const bytes = (uint8_t *)malloc(1 << 20);
    size_t size = file && bytes ? fread(bytes, 1, 1 << 20, file) : 0;
    size_t start = size > 8 ? 8 + (size_t)bytes[0] + 256 * (size_t)bytes[1] : 0;
    if (!size) return 2;
    fclose(file);
    /* One in eight with its header, else the bytes of its tensor alone. */
    if (start > size || random_number(8) == 0) start = 0;
    size = start + mutate(bytes + start, size - start);
    LLVMFuzzerTestOneInput(bytes + start, size - start);
    free(bytes);
  }
  printf("%ld files, %" PRIu64 " opened, %" PRIu64 " tensors decoded\n", runs, opened, decoded);
  return 0;
}

#endif

/* Prints the tensors of a packed file, with the CRC-32 of their bytes, and writes them to an ordinary
 * safetensors file where one is named:
 *
 *     cc -O2 -ffp-contract=off -Icsrc/decoder examples/decoder/decode.c \
 *         csrc/decoder/wavprune_decoder.c -o decode
 *     ./decode small.safetensors weights.safetensors
 *
 * Files whose records are compressed by Zstandard need `-DWITH_ZSTD -lzstd` too.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wavprune_decoder.h"

#ifdef WITH_ZSTD
#include <zstd.h>

static size_t decompress(void *context, void *out, size_t room, const void *frame, size_t size) {
  (void)context;
  return ZSTD_decompress(out, room, frame, size);
}
#else
#define decompress NULL
#endif

static int fail(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  return 1;
}

static unsigned char *read_file(const char *path, size_t *size) {
  FILE *const file = fopen(path, "rb");
  unsigned char *data = NULL;
  long length;
  if (file && !fseek(file, 0, SEEK_END) && (length = ftell(file)) >= 0) {
    rewind(file);
    *size = (size_t)length;
    data = (unsigned char *)malloc(*size + 1);
    if (data && fread(data, 1, *size, file) != *size) {
      free(data);
      data = NULL;
    }
  }
  if (file) fclose(file);
  return data;
}

static uint32_t crc_of(const unsigned char *data, size_t size) {
  uint32_t crc = 0xffffffffu;
  while (size--) {
    int bit;
    crc ^= *data++;
    for (bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
  }
  return ~crc;
}

static void print_shape(FILE *out, const wavprune_tensor *tensor) {
  int i;
  fputc('[', out);
  for (i = 0; i < tensor->axes; ++i) fprintf(out, "%s%" PRIu64, i ? "," : "", tensor->shape[i]);
  fputc(']', out);
}

/* A name as JSON has it; the bytes of UTF-8 stay as they are. */
static void print_name(FILE *out, const char *name, size_t length) {
  size_t i;
  fputc('"', out);
  for (i = 0; i < length; ++i) {
    const unsigned char byte = (unsigned char)name[i];
    if (byte < 32)
      fprintf(out, "\\u%04x", byte);
    else
      fprintf(out, byte == '"' || byte == '\\' ? "\\%c" : "%c", byte);
  }
  fputc('"', out);
}

/* Calls `each` for every tensor, with its name and, where asked for, its bytes. */
static int every(wavprune_decoder *decoder, int bytes,
                 void (*each)(FILE *, const wavprune_tensor *, const char *, const unsigned char *),
                 FILE *out) {
  uint64_t i;
  int status = 0;
  for (i = 0; !status && i < decoder->tensors; ++i) {
    wavprune_tensor tensor;
    char *name;
    unsigned char *buffer;
    if ((status = wavprune_tensor_at(decoder, i, &tensor)) != 0) break;
    name = (char *)malloc((size_t)tensor.name_length + 1);
    buffer = (unsigned char *)malloc(bytes ? (size_t)tensor.room + 1 : 1);
    status = name && buffer ? 0 : WAVPRUNE_NEEDS_ROOM;
    if (!status) status = wavprune_name(decoder, i, name, (size_t)tensor.name_length);
    if (!status && bytes) status = wavprune_read(decoder, i, buffer, (size_t)tensor.room);
    if (!status) each(out, &tensor, name, buffer);
    free(name);
    free(buffer);
  }
  return status;
}

static void list(FILE *out, const wavprune_tensor *tensor, const char *name,
                 const unsigned char *bytes) {
  print_name(out, name, (size_t)tensor->name_length);
  fprintf(out, " %s ", tensor->dtype);
  print_shape(out, tensor);
  fprintf(out, " %08" PRIx32 "\n", crc_of(bytes, (size_t)tensor->size));
}

static uint64_t written; /* bytes of tensors in the header so far */

static void head(FILE *out, const wavprune_tensor *tensor, const char *name,
                 const unsigned char *bytes) {
  (void)bytes;
  fputs(written || ftell(out) > 9 ? "," : "", out);
  print_name(out, name, (size_t)tensor->name_length);
  fprintf(out, ":{\"dtype\":\"%s\",\"shape\":", tensor->dtype);
  print_shape(out, tensor);
  fprintf(out, ",\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", written, written + tensor->size);
  written += tensor->size;
}

static void body(FILE *out, const wavprune_tensor *tensor, const char *name,
                 const unsigned char *bytes) {
  (void)name;
  fwrite(bytes, 1, (size_t)tensor->size, out);
}

static int write_file(wavprune_decoder *decoder, FILE *out) {
  unsigned char length[8];
  long size;
  int i, status;
  memset(length, 0, sizeof length);
  written = 0;
  fwrite(length, 1, 8, out);
  fputc('{', out);
  status = every(decoder, 0, head, out);
  fputc('}', out);
  size = ftell(out) - 8;
  rewind(out);
  for (i = 0; i < 8; ++i) length[i] = (unsigned char)((uint64_t)size >> 8 * i);
  fwrite(length, 1, 8, out);
  fseek(out, 0, SEEK_END);
  return status ? status : every(decoder, 1, body, out);
}

int main(int argc, char **argv) {
  static wavprune_decoder decoder;
  static uint32_t cache[WAVPRUNE_CACHE / 4];
  unsigned char *data = NULL, *heads = NULL;
  size_t size = 0, needed = 0;
  int status;
  if (argc < 2 || argc > 3) return fail(argv[0], "usage: decode FILE [OUT]");
  data = read_file(argv[1], &size);
  if (!data) return fail(argv[1], "cannot be read");
  status = wavprune_heads_size(data, size, &needed);
  heads = (unsigned char *)malloc(needed + 1);
  if (!status && !heads) status = WAVPRUNE_NEEDS_ROOM;
  if (!status) status = wavprune_open(&decoder, data, size, heads, needed, decompress, NULL);
  if (!status) {
    wavprune_cache(&decoder, cache, sizeof cache);
    status = every(&decoder, 1, list, stdout);
  }
  if (!status && argc == 3) {
    FILE *const out = fopen(argv[2], "wb");
    if (out) status = write_file(&decoder, out);
    if (!out || ferror(out) || fclose(out)) return fail(argv[2], "cannot be written");
  }
  free(heads);
  free(data);
  return status ? fail(argv[1], wavprune_message(status)) : 0;
}

/* See wavprune_decoder.h. The order of this file is that of docs/format.md: bytes and numbers, the
 * file's header, Zstandard frames that store, records, tables, streams, bases, tensors. */
#include "wavprune_decoder.h"

#include <float.h>
#include <string.h>

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "float and double must be rounded to their own precision (on x86: -msse2 -mfpmath=sse)"
#endif
#if defined(__FAST_MATH__)
#error "-ffast-math gives other bits"
#endif
/* For those who forget -ffp-contract=off. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

typedef wavprune_cursor cursor;
typedef wavprune_decoder decoder;
typedef wavprune_place place;
typedef wavprune_run run;

/* What the header promises. */
typedef char no_more_than_4_kb[sizeof(wavprune_decoder) <= 4096 ? 1 : -1];

enum { RAW, ALIAS, MATRIX, FILLED, LOGS };
enum { LANES = 32, PRECISION = 12, SLOTS = 4096, CLASSES = 40, ESCAPE = 255, WRITTEN = 255 };
enum { SCALES = 62, SHAPES = 4 };
/* A table in the cache, in units of two bytes: how many symbols it has but the escape; a byte for
 * every 256 or 16 slots, which symbol to look at first; where the range of each symbol begins, that
 * of the escape, and 4096. */
enum { FEW_HINTS = 8, MANY_HINTS = 4, MOST_STARTS = 257 };
enum { LEAST_STATE = 65536, LARGEST_INDEX = 1 << 21, STREAM = 1 << 18 };
enum { LARGEST_EXPONENT = 1100, GRID = 16, LARGEST_CODE = 160 * GRID, MOST_LOGS = 1 << 20 };
enum { MOST_LINKS = 1024, LARGEST_BLOCK = 1 << 17, LARGEST_HEADER = 100000000 };
enum { MOST_TENSORS = 65536 };


#define LARGEST_NUMBER ((UINT64_C(1) << 62) - 1)
#define MOST_ELEMENTS (UINT64_C(1) << 48)
#define TRY(status) \
  do { \
    const int failed_ = (status); \
    if (failed_) return failed_; \
  } while (0)
#define REQUIRE(condition) \
  do { \
    if (!(condition)) return WAVPRUNE_DAMAGED; \
  } while (0)

/* ---- Bytes and numbers ---- */

static uint32_t u16_at(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }
static uint32_t u32_at(const uint8_t *p) { return u16_at(p) | u16_at(p + 2) << 16; }
static uint64_t u64_at(const uint8_t *p) { return u32_at(p) | (uint64_t)u32_at(p + 4) << 32; }

static void put_bytes(uint8_t *p, uint64_t bits, unsigned count) {
  unsigned i;
  for (i = 0; i < count; ++i) p[i] = (uint8_t)(bits >> 8 * i);
}

static float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static double double_of(uint64_t bits) {
  double value;
  memcpy(&value, &bits, 8);
  return value;
}

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static uint64_t bits_of_double(double value) {
  uint64_t bits;
  memcpy(&bits, &value, 8);
  return bits;
}

/* Numbers in the cache, which is of bytes: element i. */
static uint32_t cached(const uint8_t *p, uint64_t i) {
  uint16_t value;
  memcpy(&value, p + 2 * (size_t)i, 2);
  return value;
}

static void keep(uint8_t *p, uint64_t i, uint32_t value) {
  const uint16_t kept = (uint16_t)value;
  memcpy(p + 2 * (size_t)i, &kept, 2);
}

static float float_at(const uint8_t *p) { return float_of(u32_at(p)); }

/* a * b, or 0 where that is 2^48 or more; of numbers that are not 0. */
static uint64_t product(uint64_t a, uint64_t b) {
  return a >= MOST_ELEMENTS || b > (MOST_ELEMENTS - 1) / a ? 0 : a * b;
}

static uint32_t crc_with(uint32_t crc, uint8_t byte) {
  /* CRC-32 of IEEE 802.3, of each byte. */
  static const uint32_t table[256] = {
      0x00000000u, 0x77073096u, 0xee0e612cu, 0x990951bau, 0x076dc419u, 0x706af48fu, 0xe963a535u,
      0x9e6495a3u, 0x0edb8832u, 0x79dcb8a4u, 0xe0d5e91eu, 0x97d2d988u, 0x09b64c2bu, 0x7eb17cbdu,
      0xe7b82d07u, 0x90bf1d91u, 0x1db71064u, 0x6ab020f2u, 0xf3b97148u, 0x84be41deu, 0x1adad47du,
      0x6ddde4ebu, 0xf4d4b551u, 0x83d385c7u, 0x136c9856u, 0x646ba8c0u, 0xfd62f97au, 0x8a65c9ecu,
      0x14015c4fu, 0x63066cd9u, 0xfa0f3d63u, 0x8d080df5u, 0x3b6e20c8u, 0x4c69105eu, 0xd56041e4u,
      0xa2677172u, 0x3c03e4d1u, 0x4b04d447u, 0xd20d85fdu, 0xa50ab56bu, 0x35b5a8fau, 0x42b2986cu,
      0xdbbbc9d6u, 0xacbcf940u, 0x32d86ce3u, 0x45df5c75u, 0xdcd60dcfu, 0xabd13d59u, 0x26d930acu,
      0x51de003au, 0xc8d75180u, 0xbfd06116u, 0x21b4f4b5u, 0x56b3c423u, 0xcfba9599u, 0xb8bda50fu,
      0x2802b89eu, 0x5f058808u, 0xc60cd9b2u, 0xb10be924u, 0x2f6f7c87u, 0x58684c11u, 0xc1611dabu,
      0xb6662d3du, 0x76dc4190u, 0x01db7106u, 0x98d220bcu, 0xefd5102au, 0x71b18589u, 0x06b6b51fu,
      0x9fbfe4a5u, 0xe8b8d433u, 0x7807c9a2u, 0x0f00f934u, 0x9609a88eu, 0xe10e9818u, 0x7f6a0dbbu,
      0x086d3d2du, 0x91646c97u, 0xe6635c01u, 0x6b6b51f4u, 0x1c6c6162u, 0x856530d8u, 0xf262004eu,
      0x6c0695edu, 0x1b01a57bu, 0x8208f4c1u, 0xf50fc457u, 0x65b0d9c6u, 0x12b7e950u, 0x8bbeb8eau,
      0xfcb9887cu, 0x62dd1ddfu, 0x15da2d49u, 0x8cd37cf3u, 0xfbd44c65u, 0x4db26158u, 0x3ab551ceu,
      0xa3bc0074u, 0xd4bb30e2u, 0x4adfa541u, 0x3dd895d7u, 0xa4d1c46du, 0xd3d6f4fbu, 0x4369e96au,
      0x346ed9fcu, 0xad678846u, 0xda60b8d0u, 0x44042d73u, 0x33031de5u, 0xaa0a4c5fu, 0xdd0d7cc9u,
      0x5005713cu, 0x270241aau, 0xbe0b1010u, 0xc90c2086u, 0x5768b525u, 0x206f85b3u, 0xb966d409u,
      0xce61e49fu, 0x5edef90eu, 0x29d9c998u, 0xb0d09822u, 0xc7d7a8b4u, 0x59b33d17u, 0x2eb40d81u,
      0xb7bd5c3bu, 0xc0ba6cadu, 0xedb88320u, 0x9abfb3b6u, 0x03b6e20cu, 0x74b1d29au, 0xead54739u,
      0x9dd277afu, 0x04db2615u, 0x73dc1683u, 0xe3630b12u, 0x94643b84u, 0x0d6d6a3eu, 0x7a6a5aa8u,
      0xe40ecf0bu, 0x9309ff9du, 0x0a00ae27u, 0x7d079eb1u, 0xf00f9344u, 0x8708a3d2u, 0x1e01f268u,
      0x6906c2feu, 0xf762575du, 0x806567cbu, 0x196c3671u, 0x6e6b06e7u, 0xfed41b76u, 0x89d32be0u,
      0x10da7a5au, 0x67dd4accu, 0xf9b9df6fu, 0x8ebeeff9u, 0x17b7be43u, 0x60b08ed5u, 0xd6d6a3e8u,
      0xa1d1937eu, 0x38d8c2c4u, 0x4fdff252u, 0xd1bb67f1u, 0xa6bc5767u, 0x3fb506ddu, 0x48b2364bu,
      0xd80d2bdau, 0xaf0a1b4cu, 0x36034af6u, 0x41047a60u, 0xdf60efc3u, 0xa867df55u, 0x316e8eefu,
      0x4669be79u, 0xcb61b38cu, 0xbc66831au, 0x256fd2a0u, 0x5268e236u, 0xcc0c7795u, 0xbb0b4703u,
      0x220216b9u, 0x5505262fu, 0xc5ba3bbeu, 0xb2bd0b28u, 0x2bb45a92u, 0x5cb36a04u, 0xc2d7ffa7u,
      0xb5d0cf31u, 0x2cd99e8bu, 0x5bdeae1du, 0x9b64c2b0u, 0xec63f226u, 0x756aa39cu, 0x026d930au,
      0x9c0906a9u, 0xeb0e363fu, 0x72076785u, 0x05005713u, 0x95bf4a82u, 0xe2b87a14u, 0x7bb12baeu,
      0x0cb61b38u, 0x92d28e9bu, 0xe5d5be0du, 0x7cdcefb7u, 0x0bdbdf21u, 0x86d3d2d4u, 0xf1d4e242u,
      0x68ddb3f8u, 0x1fda836eu, 0x81be16cdu, 0xf6b9265bu, 0x6fb077e1u, 0x18b74777u, 0x88085ae6u,
      0xff0f6a70u, 0x66063bcau, 0x11010b5cu, 0x8f659effu, 0xf862ae69u, 0x616bffd3u, 0x166ccf45u,
      0xa00ae278u, 0xd70dd2eeu, 0x4e048354u, 0x3903b3c2u, 0xa7672661u, 0xd06016f7u, 0x4969474du,
      0x3e6e77dbu, 0xaed16a4au, 0xd9d65adcu, 0x40df0b66u, 0x37d83bf0u, 0xa9bcae53u, 0xdebb9ec5u,
      0x47b2cf7fu, 0x30b5ffe9u, 0xbdbdf21cu, 0xcabac28au, 0x53b39330u, 0x24b4a3a6u, 0xbad03605u,
      0xcdd70693u, 0x54de5729u, 0x23d967bfu, 0xb3667a2eu, 0xc4614ab8u, 0x5d681b02u, 0x2a6f2b94u,
      0xb40bbe37u, 0xc30c8ea1u, 0x5a05df1bu, 0x2d02ef8du,
  };
  return table[(crc ^ byte) & 255] ^ crc >> 8;
}

/* a * b, polynomials over GF(2) modulo that of the checksum. */
static uint32_t crc_product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (; a; a <<= 1) {
    if (a >> 31) sum ^= b;
    b = b >> 1 ^ (b & 1 ? 0xedb88320u : 0);
  }
  return sum;
}

/* The checksum of bytes whose parts have these ones, the second of `size` bytes. */
static uint32_t crc_joined(uint32_t first, uint32_t second, uint64_t size) {
  uint32_t power = 1u << 23; /* x ** 8 */
  for (; size; size >>= 1) {
    if (size & 1) first = crc_product(power, first);
    power = crc_product(power, power);
  }
  return first ^ second;
}

static uint32_t crc_of(const uint8_t *data, uint64_t size) {
  /* Four parts beside each other: one byte after the other waits for the table. */
  const uint64_t part = size / 4;
  const uint8_t *const parts[4] = {data, data + part, data + 2 * part, data + 3 * part};
  uint32_t a = 0xffffffffu, b = a, c = a, d = a;
  uint64_t i;
  for (i = 0; i < part; ++i) {
    a = crc_with(a, parts[0][i]);
    b = crc_with(b, parts[1][i]);
    c = crc_with(c, parts[2][i]);
    d = crc_with(d, parts[3][i]);
  }
  for (i = 4 * part; i < size; ++i) d = crc_with(d, data[i]);
  a = crc_joined(crc_joined(~a, ~b, part), ~c, part);
  return crc_joined(a, ~d, size - 3 * part);
}

static int same_crc(uint32_t found, uint64_t due) {
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
  (void)found;
  (void)due;
  return 1;
#else
  return found == due;
#endif
}

/* ---- Cursors ---- */

static cursor cursor_of(const uint8_t *data, uint64_t size) {
  cursor c;
  c.at = data;
  c.blocks = NULL;
  c.run = c.left = size;
  c.step = 1;
  return c;
}

/* The block at `blocks`, whose header open_frame has checked. */
static void next_block(cursor *c) {
  const uint32_t header = u16_at(c->blocks) | (uint32_t)c->blocks[2] << 16;
  c->run = header >> 3;
  c->step = (header >> 1 & 3) == 0;
  c->at = c->blocks + 3;
  c->blocks = c->at + (c->step ? c->run : 1);
}

static int byte_of(cursor *c, uint8_t *byte) {
  REQUIRE(c->left);
  while (!c->run) next_block(c);
  *byte = *c->at;
  c->at += c->step;
  --c->run;
  --c->left;
  return 0;
}

static int skip(cursor *c, uint64_t count) {
  REQUIRE(count <= c->left);
  c->left -= count;
  while (count > c->run) {
    count -= c->run;
    next_block(c);
  }
  c->run -= count;
  if (c->step) c->at += count;
  return 0;
}

static int bytes_of(cursor *c, uint8_t *out, unsigned count) {
  unsigned i;
  for (i = 0; i < count; ++i) TRY(byte_of(c, out + i));
  return 0;
}

/* The next `count` bytes as a cursor of their own. */
static int part_of(cursor *c, uint64_t count, cursor *part) {
  *part = *c;
  TRY(skip(c, count));
  part->left = count;
  return 0;
}

static int number_of(cursor *c, uint64_t most, uint64_t *value) {
  unsigned shift;
  uint8_t byte;
  *value = 0;
  for (shift = 0;; shift += 7) {
    REQUIRE(shift <= 63);
    TRY(byte_of(c, &byte));
    REQUIRE(shift < 63 || (byte & 127) == 0);
    *value |= (uint64_t)(byte & 127) << shift;
    if (byte < 128) break;
  }
  REQUIRE(*value <= most);
  return 0;
}

static int64_t signed_of(uint64_t number) {
  return number & 1 ? -(int64_t)(number / 2) - 1 : (int64_t)(number / 2);
}

static int skip_numbers(cursor *c, uint64_t count, uint64_t most) {
  uint64_t ignored;
  while (count--) TRY(number_of(c, most, &ignored));
  return 0;
}

/* ---- JSON, as far as it occurs: nothing nests but what is asked for ---- */

/* The next byte that is no white space, which stays where it is; 0 at the end. */
static uint8_t json_peek(cursor *c) {
  uint8_t byte = 0;
  for (;;) {
    cursor after = *c;
    if (byte_of(&after, &byte)) return 0;
    if (byte != ' ' && byte != '\t' && byte != '\n' && byte != '\r') return byte;
    *c = after;
  }
}

static int json_is(cursor *c, char wanted) {
  uint8_t ignored;
  if (json_peek(c) != (uint8_t)wanted) return 0;
  return byte_of(c, &ignored) == 0;
}

static int json_end(cursor *c) { return json_peek(c) == 0 && c->left == 0 ? 0 : WAVPRUNE_DAMAGED; }

static int hex_digit(uint8_t byte) {
  if (byte >= '0' && byte <= '9') return byte - '0';
  if (byte >= 'a' && byte <= 'f') return byte - 'a' + 10;
  if (byte >= 'A' && byte <= 'F') return byte - 'A' + 10;
  return -1;
}

/* A string; *same is whether it is `text`, of ASCII alone. */
static int json_string(cursor *c, const char *text, int *same) {
  static const char escapes[] = "\"\"\\\\//b\bf\fn\nr\rt\t";
  uint8_t byte;
  int equal = 1, i;
  REQUIRE(json_is(c, '"'));
  for (;;) {
    uint32_t code;
    TRY(byte_of(c, &byte));
    if (byte == '"') break;
    REQUIRE(byte >= 32);
    code = byte;
    if (byte == '\\') {
      TRY(byte_of(c, &byte));
      if (byte == 'u') {
        code = 0;
        for (i = 0; i < 4; ++i) {
          TRY(byte_of(c, &byte));
          REQUIRE(hex_digit(byte) >= 0);
          code = code << 4 | (uint32_t)hex_digit(byte);
        }
      } else {
        for (i = 0; escapes[i] && (uint8_t)escapes[i] != byte; i += 2) continue;
        REQUIRE(escapes[i]);
        code = (uint8_t)escapes[i + 1];
      }
    }
    if (equal && *text && (uint8_t)*text == code)
      ++text;
    else
      equal = 0;
  }
  *same = equal && !*text;
  return 0;
}

static int json_number(cursor *c, uint64_t *value) {
  uint8_t byte = json_peek(c);
  REQUIRE(byte >= '0' && byte <= '9');
  *value = 0;
  for (;;) {
    cursor after = *c;
    if (byte_of(&after, &byte) || byte < '0' || byte > '9') break;
    REQUIRE(*value <= LARGEST_NUMBER / 10);
    *value = *value * 10 + (uint64_t)(byte - '0');
    *c = after;
    /* Nothing follows a leading 0. */
    if (*value == 0) break;
  }
  return 0;
}

/* A list of one to `most` numbers, each at least 1. */
static int json_counts(cursor *c, int most, uint64_t *values, int *count) {
  REQUIRE(json_is(c, '['));
  *count = 0;
  do {
    REQUIRE(*count < most);
    TRY(json_number(c, values + *count));
    REQUIRE(values[(*count)++]);
  } while (json_is(c, ','));
  REQUIRE(json_is(c, ']'));
  return 0;
}

static int json_bool(cursor *c, int *value) {
  const char *rest = "rue";
  uint8_t byte;
  *value = json_is(c, 't');
  if (!*value) {
    REQUIRE(json_is(c, 'f'));
    rest = "alse";
  }
  for (; *rest; ++rest) {
    TRY(byte_of(c, &byte));
    REQUIRE(byte == (uint8_t)*rest);
  }
  return 0;
}

/* ---- The safetensors file: where the bytes of its one tensor are ---- */

static int read_metadata(cursor *c, int *packed) {
  int same;
  REQUIRE(json_is(c, '{'));
  if (json_is(c, '}')) return 0;
  do {
    TRY(json_string(c, "wavprune", &same));
    REQUIRE(json_is(c, ':'));
    if (same) {
      REQUIRE(!*packed);
      TRY(json_string(c, "{\"version\":3}", &same));
      REQUIRE(same);
      *packed = 1;
    } else {
      TRY(json_string(c, "", &same));
    }
  } while (json_is(c, ','));
  REQUIRE(json_is(c, '}'));
  return 0;
}

static int read_entry_of_header(cursor *c, uint64_t size) {
  uint64_t start, stop;
  int seen = 0, same, field;
  REQUIRE(json_is(c, '{'));
  do {
    cursor before = *c;
    TRY(json_string(c, "dtype", &same));
    field = same ? 1 : 0;
    if (!field) {
      *c = before;
      TRY(json_string(c, "shape", &same));
      field = same ? 2 : 0;
    }
    if (!field) {
      *c = before;
      TRY(json_string(c, "data_offsets", &same));
      REQUIRE(same);
      field = 4;
    }
    REQUIRE(!(seen & field));
    seen |= field;
    REQUIRE(json_is(c, ':'));
    if (field == 1) {
      TRY(json_string(c, "U8", &same));
      REQUIRE(same);
    } else {
      REQUIRE(json_is(c, '['));
      if (field == 4) {
        TRY(json_number(c, &start));
        REQUIRE(start == 0 && json_is(c, ','));
      }
      TRY(json_number(c, &stop));
      REQUIRE(stop == size && json_is(c, ']'));
    }
  } while (json_is(c, ','));
  REQUIRE(json_is(c, '}') && seen == 7);
  return 0;
}

static int read_header(const uint8_t *data, uint64_t size, uint64_t *start) {
  uint64_t length;
  int packed = 0, tensor = 0, metadata = 0, same;
  cursor c;
  REQUIRE(size >= 8);
  length = u64_at(data);
  REQUIRE(length <= size - 8 && length <= LARGEST_HEADER);
  *start = 8 + length;
  c = cursor_of(data + 8, length);
  REQUIRE(length && data[8] == '{' && json_is(&c, '{'));
  do {
    cursor before = c;
    TRY(json_string(&c, "wavprune", &same));
    REQUIRE(json_is(&c, ':'));
    if (same) {
      REQUIRE(!tensor);
      tensor = 1;
      TRY(read_entry_of_header(&c, size - *start));
      continue;
    }
    c = before;
    TRY(json_string(&c, "__metadata__", &same));
    REQUIRE(same && !metadata && json_is(&c, ':'));
    metadata = 1;
    TRY(read_metadata(&c, &packed));
  } while (json_is(&c, ','));
  REQUIRE(json_is(&c, '}') && tensor && packed);
  return json_end(&c);
}

/* ---- Records and classes: Zstandard frames ---- */

/* A cursor over a frame of stored and repeated blocks (RFC 8878); WAVPRUNE_NEEDS_ZSTD for others. */
static int open_frame(const uint8_t *data, uint64_t size, uint64_t due, cursor *c) {
  static const uint8_t size_bytes[4] = {0, 2, 4, 8};
  uint64_t at = 6, total = 0;
  uint32_t header;
  REQUIRE(size >= 6 && u32_at(data) == 0xfd2fb528u);
  header = data[4];
  /* No dictionary; reserved bits. */
  REQUIRE((header & 0x0b) == 0);
  if (header & 0x20) at = 5 + (header >> 6 ? 0u : 1u);
  at += size_bytes[header >> 6];
  *c = cursor_of(data, 0);
  c->blocks = data + at;
  for (;;) {
    uint64_t block;
    uint32_t kind, last;
    REQUIRE(at <= size && size - at >= 3);
    kind = u16_at(data + at) | (uint32_t)data[at + 2] << 16;
    at += 3;
    block = kind >> 3;
    last = kind & 1;
    kind = kind >> 1 & 3;
    REQUIRE(kind != 3 && block <= LARGEST_BLOCK);
    if (kind == 2) return WAVPRUNE_NEEDS_ZSTD;
    total += block;
    if (kind == 1) block = 1;
    REQUIRE(block <= size - at);
    at += block;
    if (last) break;
  }
  if (header & 4) at += 4;
  REQUIRE(at == size && total == due);
  c->left = total;
  return 0;
}

typedef struct heads {
  uint64_t start; /* of the frames */
  uint64_t size[2], small[2];
} heads;

static int read_heads(const uint8_t *data, uint64_t size, heads *h) {
  cursor c = cursor_of(data, size < 40 ? size : 40);
  uint64_t most = 65536, stop;
  int i;
  most += size > LARGEST_NUMBER >> 9 ? LARGEST_NUMBER >> 1 : 256 * size;
  for (i = 0; i < 2; ++i) {
    TRY(number_of(&c, most, &h->size[i]));
    TRY(number_of(&c, size, &h->small[i]));
  }
  h->start = (size < 40 ? size : 40) - c.left;
  stop = size - h->start;
  REQUIRE(h->small[0] <= stop && h->small[1] <= stop - h->small[0]);
  stop = h->start + h->small[0] + h->small[1];
  REQUIRE(size - stop >= 4);
  REQUIRE(same_crc(crc_of(data, stop), u32_at(data + stop)));
  return 0;
}

/* ---- Records ---- */

static const struct {
  const char *name;
  uint8_t bits;
  /* Has a fill value. */
  uint8_t whole;
} dtypes[] = {
    {"BOOL", 8, 1},        {"F4", 4, 0},          {"F6_E2M3", 6, 0},     {"F6_E3M2", 6, 0},
    {"U8", 8, 1},          {"I8", 8, 1},          {"F8_E5M2", 8, 1},     {"F8_E4M3", 8, 1},
    {"F8_E8M0", 8, 1},     {"F8_E4M3FNUZ", 8, 1}, {"F8_E5M2FNUZ", 8, 1}, {"I16", 16, 1},
    {"U16", 16, 1},        {"F16", 16, 1},        {"BF16", 16, 1},       {"I32", 32, 1},
    {"U32", 32, 1},        {"F32", 32, 1},        {"I64", 64, 1},        {"U64", 64, 1},
    {"F64", 64, 1},        {"C64", 64, 1},
};
enum { F16 = 13, BF16 = 14, F32 = 17, F64 = 20, DTYPES = 22 };

static int is_float(int dtype) {
  return dtype == F16 || dtype == BF16 || dtype == F32 || dtype == F64;
}

static unsigned item_of(int dtype) { return (unsigned)dtypes[dtype].bits / 8; }

typedef struct basis {
  int axes;
  uint64_t kernel[3], functions[3];
  uint64_t values, coefficients, crc;
  int separable, shared, indexed;
  cursor hex; /* its bytes, two digits each */
} basis;

/* The next basis of the list. */
static int read_basis(cursor *c, basis *b) {
  uint64_t bytes = 0, count;
  int axes, i, same;
  uint8_t byte;
  memset(b, 0, sizeof *b);
  REQUIRE(json_is(c, '['));
  TRY(json_string(c, "", &same));
  REQUIRE(json_is(c, ','));
  TRY(json_counts(c, 3, b->kernel, &b->axes));
  REQUIRE(json_is(c, ','));
  TRY(json_number(c, &b->coefficients));
  REQUIRE(b->coefficients && json_is(c, ','));
  TRY(json_number(c, &b->crc));
  REQUIRE(json_is(c, ','));
  b->values = 1;
  for (i = 0; i < b->axes; ++i) REQUIRE((b->values = product(b->values, b->kernel[i])) != 0);
  if (json_peek(c) == '[') {
    uint64_t largest = 0, all = 1;
    b->separable = 1;
    TRY(json_counts(c, 3, b->functions, &axes));
    REQUIRE(axes == b->axes && json_is(c, ','));
    TRY(json_bool(c, &b->shared));
    REQUIRE(json_is(c, ','));
    TRY(json_bool(c, &b->indexed));
    REQUIRE(json_is(c, ','));
    for (i = 0; i < axes; ++i) {
      const uint64_t n = b->functions[i];
      REQUIRE(n <= 65536);
      REQUIRE(!b->shared || (n == b->functions[0] && b->kernel[i] == b->kernel[0]));
      REQUIRE((all = product(all, n)) != 0 || b->indexed);
      all = all ? all : 1;
      largest = n > largest ? n : largest;
      if (i == 0 || !b->shared) {
        REQUIRE((count = product(n, b->kernel[i])) != 0);
        bytes += 4 * count;
      }
    }
    REQUIRE(b->indexed || all == b->coefficients);
    if (b->indexed) {
      b->indexed = largest <= 256 ? 1 : 2;
      REQUIRE(b->coefficients < MOST_ELEMENTS);
      bytes += b->coefficients * (uint64_t)(b->axes * b->indexed);
    }
  } else {
    REQUIRE((bytes = product(b->values, b->coefficients)) != 0);
    bytes *= 4;
  }
  REQUIRE(json_is(c, '"'));
  TRY(part_of(c, 2 * bytes, &b->hex));
  TRY(byte_of(c, &byte));
  REQUIRE(byte == '"' && json_is(c, ']'));
  return 0;
}

static int basis_at(const decoder *d, uint64_t number, basis *b) {
  cursor c = d->basis_list;
  uint64_t i;
  REQUIRE(number < d->bases && json_is(&c, '['));
  for (i = 0; i < number; ++i) {
    TRY(read_basis(&c, b));
    REQUIRE(json_is(&c, ','));
  }
  return read_basis(&c, b);
}

static int hex_byte(cursor *c, uint8_t *byte) {
  uint8_t high, low;
  TRY(byte_of(c, &high));
  TRY(byte_of(c, &low));
  REQUIRE(hex_digit(high) >= 0 && hex_digit(low) >= 0);
  *byte = (uint8_t)(hex_digit(high) << 4 | hex_digit(low));
  return 0;
}

/* Bytes `at` .. of a basis as a number. */
static int basis_number(const basis *b, uint64_t at, unsigned count, uint32_t *value) {
  cursor c = b->hex;
  uint8_t byte;
  unsigned i;
  TRY(skip(&c, 2 * at));
  *value = 0;
  for (i = 0; i < count; ++i) {
    TRY(hex_byte(&c, &byte));
    *value |= (uint32_t)byte << 8 * i;
  }
  return 0;
}

static int check_basis(const basis *b) {
  cursor c = b->hex;
  uint32_t crc = 0xffffffffu;
  uint8_t byte;
  while (c.left) {
    TRY(hex_byte(&c, &byte));
    crc = crc_with(crc, byte);
  }
  REQUIRE(same_crc(~crc, b->crc));
  return 0;
}

/* Element (k, m) of the synthesis matrix. */
static int basis_element(const basis *b, uint64_t k, uint64_t m, float *element) {
  uint64_t starts[3], start = 0, choices[3], places[3], rest = m;
  uint32_t bits;
  double value = 0;
  int i;
  if (!b->separable) {
    TRY(basis_number(b, 4 * (k * b->coefficients + m), 4, &bits));
    *element = float_of(bits);
    return 0;
  }
  for (i = 0; i < b->axes; ++i) {
    starts[i] = b->shared ? 0 : start;
    if (i == 0 || !b->shared) start += 4 * b->kernel[i] * b->functions[i];
  }
  for (i = b->axes; i-- > 0;) {
    places[i] = k % b->kernel[i];
    k /= b->kernel[i];
    if (b->indexed) {
      const unsigned width = (unsigned)b->indexed;
      const uint64_t entry = m * (uint64_t)b->axes + (uint64_t)i;
      TRY(basis_number(b, start + width * entry, width, &bits));
      choices[i] = bits;
      REQUIRE(choices[i] < b->functions[i]);
    } else {
      choices[i] = rest % b->functions[i];
      rest /= b->functions[i];
    }
  }
  for (i = 0; i < b->axes; ++i) {
    const uint64_t entry = places[i] * b->functions[i] + choices[i];
    TRY(basis_number(b, starts[i] + 4 * entry, 4, &bits));
    value = i ? value * (double)float_of(bits) : (double)float_of(bits);
  }
  *element = (float)value;
  return 0;
}

typedef struct entry {
  int kind, dtype, axes;
  uint64_t shape[WAVPRUNE_MOST_AXES];
  uint64_t elements, size;
  uint64_t tied_to;
  uint32_t crc;
  /* Of a matrix. */
  int transposed, exponent;
  uint64_t groups, basis; /* its number and 1; 0 is the identity */
  uint64_t rows, columns, kernel, coefficients;
  float step;
  cursor values; /* a fill value, or logarithms */
} entry;

static int read_matrix(const decoder *d, cursor *c, entry *e) {
  uint64_t number, kernel = 1, all;
  uint8_t bytes[4];
  int i;
  TRY(number_of(c, LARGEST_NUMBER, &number));
  e->groups = number / 2;
  e->transposed = (int)(number & 1);
  TRY(number_of(c, d->bases, &e->basis));
  TRY(bytes_of(c, bytes, 4));
  e->step = float_at(bytes);
  TRY(number_of(c, UINT64_C(1) << 32, &number));
  REQUIRE(signed_of(number) >= -LARGEST_EXPONENT && signed_of(number) <= LARGEST_EXPONENT);
  e->exponent = (int)signed_of(number);
  TRY(bytes_of(c, bytes, 4));
  e->crc = u32_at(bytes);
  REQUIRE(is_float(e->dtype) && e->axes >= 1 && e->axes <= 5 && e->elements && e->groups);
  /* Finite and above 0. */
  REQUIRE(bits_of(e->step) - 1 < 0x7f7fffffu);
  for (i = 2; i < e->axes; ++i) kernel *= e->shape[i];
  e->kernel = e->coefficients = kernel;
  if (e->basis) {
    basis b;
    TRY(basis_at(d, e->basis - 1, &b));
    REQUIRE(b.values == kernel);
    e->coefficients = b.coefficients;
  }
  if (e->transposed || e->groups > 1) REQUIRE(e->axes > 1 && e->shape[0] % e->groups == 0);
  e->rows = e->transposed ? e->groups * e->shape[1] : e->shape[0];
  all = product(e->elements / kernel, e->coefficients);
  if (!all) return WAVPRUNE_UNSUPPORTED;
  e->columns = all / e->rows;
  return 0;
}

static int read_entry(const decoder *d, cursor *c, uint64_t index, entry *e) {
  uint64_t number, i;
  uint8_t bytes[8];
  int zero = 0;
  memset(e, 0, sizeof *e);
  TRY(number_of(c, LOGS, &number));
  e->kind = (int)number;
  if (e->kind == ALIAS) {
    TRY(number_of(c, d->tensors - 1, &e->tied_to));
    REQUIRE(e->tied_to < index);
    return 0;
  }
  TRY(number_of(c, DTYPES - 1, &number));
  e->dtype = (int)number;
  TRY(number_of(c, WAVPRUNE_MOST_AXES, &number));
  e->axes = (int)number;
  e->elements = 1;
  for (i = 0; i < number; ++i) {
    TRY(number_of(c, LARGEST_NUMBER, &e->shape[i]));
    if (e->shape[i])
      REQUIRE((e->elements = product(e->elements, e->shape[i])) != 0);
    else
      zero = 1;
  }
  if (zero) e->elements = 0;
  e->size = (e->elements * dtypes[e->dtype].bits + 7) / 8;
  if (e->kind == RAW) {
    TRY(bytes_of(c, bytes, 4));
    e->crc = u32_at(bytes);
  } else if (e->kind == FILLED) {
    REQUIRE(dtypes[e->dtype].whole);
    TRY(part_of(c, item_of(e->dtype), &e->values));
  } else if (e->kind == LOGS) {
    REQUIRE(is_float(e->dtype) && e->axes == 1 && e->shape[0] <= MOST_LOGS);
    e->values = *c;
    TRY(skip_numbers(c, e->elements, 4 * LARGEST_CODE + 2));
  } else {
    TRY(read_matrix(d, c, e));
  }
  return 0;
}

static uint64_t room_of(const entry *e) {
  const uint64_t coefficients = e->kind == MATRIX ? 4 * e->rows * e->columns : 0;
  return e->size > coefficients ? e->size : coefficients;
}

/* Classes of `length` rows or columns. */
typedef struct classes {
  cursor values;
  int constant;
  uint8_t value;
} classes;

static int open_classes(cursor *c, uint64_t length, classes *k) {
  uint64_t constant;
  TRY(number_of(c, 1, &constant));
  k->constant = (int)constant;
  k->value = 0;
  if (constant) {
    TRY(byte_of(c, &k->value));
    REQUIRE(k->value < CLASSES);
    return 0;
  }
  return part_of(c, length, &k->values);
}

static int next_class(classes *k, unsigned *value) {
  uint8_t byte = k->value;
  if (!k->constant) {
    TRY(byte_of(&k->values, &byte));
    REQUIRE(byte < CLASSES);
  }
  *value = byte;
  return 0;
}

/* Reads the entry at a place and moves it to the next. */
static int pass(const decoder *d, place *p, entry *e) {
  uint8_t byte;
  TRY(read_entry(d, &p->entries, p->index, e));
  /* Names have zeros between them. */
  while (p->names.left) {
    TRY(byte_of(&p->names, &byte));
    if (!byte) break;
  }
  ++p->index;
  if (e->kind == RAW) p->raw += e->size;
  if (e->kind == MATRIX) {
    classes ignored;
    TRY(open_classes(&p->classes, e->rows, &ignored));
    TRY(open_classes(&p->classes, e->columns, &ignored));
    p->filled += e->rows * e->columns;
    if (p->filled >= STREAM) {
      p->filled = 0;
      ++p->stream;
    }
  }
  return 0;
}

/* Moves the decoder's place to a tensor. */
static int move_to(decoder *d, uint64_t index) {
  entry e;
  if (index >= d->tensors) return WAVPRUNE_NO_TENSOR;
  if (index < d->at.index) d->at = d->of_stream = d->begin;
  while (d->at.index < index) {
    const uint64_t stream = d->at.stream;
    TRY(pass(d, &d->at, &e));
    if (d->at.stream != stream) d->of_stream = d->at;
  }
  return 0;
}

/* The entry of a tensor. */
static int entry_at(decoder *d, uint64_t index, entry *e) {
  cursor c;
  TRY(move_to(d, index));
  c = d->at.entries;
  return read_entry(d, &c, index, e);
}

typedef struct link {
  uint64_t weight, gamma, variance, mean, bias;
  double eps;
} link;

static int read_link(const decoder *d, cursor *c, link *l) {
  uint64_t *const members[5] = {&l->weight, &l->gamma, &l->variance, &l->mean, &l->bias};
  uint8_t bytes[8];
  int i;
  for (i = 0; i < 5; ++i) TRY(number_of(c, d->tensors - 1, members[i]));
  TRY(bytes_of(c, bytes, 8));
  l->eps = double_of(u64_at(bytes));
  /* Finite and not below 0; -0 is 0. */
  REQUIRE(l->eps >= 0 && l->eps <= DBL_MAX);
  return 0;
}

/* The batch norm whose weight or bias a tensor is; *role is 1 or 2, or 0 where there is none. */
static int link_of(const decoder *d, uint64_t index, link *l, int *role) {
  cursor c = d->link_list;
  uint64_t i;
  *role = 0;
  for (i = 0; i < d->links; ++i) {
    TRY(read_link(d, &c, l));
    *role = l->weight == index ? 1 : l->bias == index ? 2 : 0;
    if (*role) break;
  }
  return 0;
}

/* No tensor is in two batch norms, or twice in one. */
static int check_links(const decoder *d) {
  cursor c = d->link_list;
  uint64_t i, j, k, number;
  if (d->links > MOST_LINKS) return WAVPRUNE_UNSUPPORTED;
  for (i = 0; i < d->links; ++i)
    for (j = 0; j < 5; ++j) {
      cursor other = d->link_list;
      uint64_t member;
      TRY(number_of(&c, d->tensors - 1, &member));
      for (k = 0; k < 5 * i + j; ++k) {
        TRY(number_of(&other, LARGEST_NUMBER, &number));
        REQUIRE(number != member);
        if (k % 5 == 4) TRY(skip(&other, 8));
      }
      if (j == 4) TRY(skip(&c, 8));
    }
  return 0;
}

typedef struct stream_record {
  uint64_t words, escapes;
  cursor indices;
} stream_record;

static int read_stream(const decoder *d, cursor *c, stream_record *s) {
  TRY(number_of(c, d->size, &s->words));
  TRY(number_of(c, d->size, &s->escapes));
  s->indices = *c;
  return skip_numbers(c, s->escapes, 2 * LARGEST_INDEX);
}

static int read_tables(decoder *d, cursor *c) {
  uint64_t size, number, sum;
  unsigned table, i;
  cursor begin;
  TRY(bytes_of(c, d->table_codes, WAVPRUNE_TABLES));
  d->table_list = begin = *c;
  for (table = 0; table < WAVPRUNE_TABLES; ++table) {
    if (d->table_codes[table] != WRITTEN) {
      REQUIRE(d->table_codes[table] <= SCALES * SHAPES);
      continue;
    }
    REQUIRE(begin.left - c->left <= 65535);
    d->written_at[table] = (uint16_t)(begin.left - c->left);
    TRY(number_of(c, ESCAPE, &size));
    for (i = 0, sum = 0; i < size; ++i, sum += number)
      TRY(number_of(c, SLOTS - 1, &number));
    REQUIRE(sum >= 1 && sum < SLOTS);
  }
  return 0;
}

/* Reads all records once, checks them, and keeps where they begin. */
static int read_records(decoder *d, cursor c, cursor all_classes) {
  uint64_t number, i, matrices = 0, looked = 0, offset;
  cursor text, names;
  uint8_t byte;
  TRY(number_of(&c, LARGEST_NUMBER, &number));
  TRY(skip(&c, number)); /* metadata */
  TRY(number_of(&c, LARGEST_NUMBER, &number));
  TRY(part_of(&c, number, &names));
  d->begin.names = names;
  number = names.left != 0;
  while (names.left) {
    TRY(byte_of(&names, &byte));
    number += byte == 0;
  }
  TRY(number_of(&c, number ? number : 1, &d->tensors));
  /* A single tensor may have no name. */
  REQUIRE(d->tensors == number || number == 0);
  if (d->tensors > MOST_TENSORS) return WAVPRUNE_UNSUPPORTED;
  TRY(number_of(&c, LARGEST_NUMBER, &number));
  TRY(part_of(&c, number, &text));
  d->basis_list = text;
  REQUIRE(json_is(&text, '['));
  if (!json_is(&text, ']')) {
    do {
      basis b;
      cursor hex;
      TRY(read_basis(&text, &b));
      for (hex = b.hex; hex.left;) TRY(hex_byte(&hex, &byte));
      ++d->bases;
    } while (json_is(&text, ','));
    REQUIRE(json_is(&text, ']'));
  }
  TRY(json_end(&text));
  d->begin.entries = c;
  d->begin.classes = all_classes;
  d->at = d->begin;
  for (i = 0; i < d->tensors; ++i) {
    entry e;
    TRY(pass(d, &d->at, &e));
    matrices += e.kind == MATRIX;
    /* Each matrix looks for its basis from the first one on. */
    if (e.basis && (looked += d->basis_list.left) >> 32) return WAVPRUNE_UNSUPPORTED;
    REQUIRE(d->at.raw < MOST_ELEMENTS * 8);
  }
  REQUIRE(d->at.classes.left == 0);
  c = d->at.entries;
  TRY(number_of(&c, d->tensors, &d->links));
  d->link_list = c;
  for (i = 0; i < d->links; ++i) {
    link l;
    TRY(read_link(d, &c, &l));
  }
  TRY(check_links(d));
  d->streams = d->at.stream + (d->at.filled > 0);
  d->stream_list = c;
  offset = d->first_stream;
  for (i = 0; i < d->streams; ++i) {
    stream_record s;
    TRY(read_stream(d, &c, &s));
    offset += 4 * LANES + 2 * s.words + 4;
    REQUIRE(offset <= d->size);
  }
  if (matrices) TRY(read_tables(d, &c));
  REQUIRE(c.left == 0);
  d->first_raw = offset;
  REQUIRE(d->at.raw == d->size - offset);
  d->at = d->of_stream = d->begin;
  return 0;
}

/* ---- Tables of frequencies ---- */

typedef struct mixture {
  double laplace, normal; /* of the current value */
  double ratio, odd, base;
  unsigned value;
} mixture;

static mixture begin_mixture(double scale) {
  mixture x;
  int i;
  x.laplace = x.normal = x.odd = 1;
  x.ratio = scale / (1 + scale);
  /* exp by squaring, as trellis_tables.py has it. */
  x.base = 1 - 0.32 / (scale * scale + 0.02) / 1048576;
  for (i = 0; i < 20; ++i) x.base = x.base * x.base;
  x.value = 0;
  return x;
}

/* Moves on to the value of a symbol, and returns its width. */
static double move_mixture(mixture *x, unsigned symbol, unsigned quantiser) {
  const unsigned magnitude = (symbol + 1) / 2;
  const unsigned value = magnitude ? 2 * magnitude - quantiser : 0;
  for (; x->value < value; ++x->value) {
    x->laplace = x->laplace * x->ratio;
    x->normal = x->normal * (x->base * x->odd);
    x->odd = x->odd * (x->base * x->base);
  }
  if (!quantiser) return 2;
  return symbol == 0 ? 1 : symbol < 3 ? 1.5 : 2;
}

/* The frequencies of all 256 symbols in a table of the family: trellis_tables.family. */
static void family(unsigned code, unsigned quantiser, uint8_t *frequencies) {
  const double weight = (double)((code - 1) % SHAPES) / (SHAPES - 1);
  double scale = 0.05, laplace = 0, normal = 0, rare = 0;
  uint32_t i, sum = 0;
  mixture x;
  for (i = 0; i < (code - 1) / SHAPES; ++i) scale *= 1.15;
  x = begin_mixture(scale);
  for (i = 0; i < ESCAPE; ++i) {
    const double width = move_mixture(&x, i, quantiser);
    laplace += x.laplace * width;
    normal += x.normal * width;
  }
  x = begin_mixture(scale);
  for (i = 0; i < ESCAPE; ++i) {
    const double width = move_mixture(&x, i, quantiser);
    const double share = (1 - weight) * (x.laplace * width / laplace) +
                         weight * (x.normal * width / normal);
    const double scaled = share * SLOTS;
    uint32_t frequency = 0;
    if (scaled < 0.6) {
      rare += scaled;
    } else {
      frequency = (uint32_t)(scaled + 0.5);
      frequency += !frequency;
    }
    keep(frequencies, i, frequency);
    sum += frequency;
  }
  if (!sum) keep(frequencies, 0, sum = 1);
  i = (unsigned)(rare + 0.5);
  i += !i;
  keep(frequencies, ESCAPE, i);
  sum += i;
  while (sum != SLOTS) {
    uint32_t largest = 0, most = cached(frequencies, 0), part;
    for (i = 1; i <= ESCAPE; ++i)
      if (cached(frequencies, i) > most) most = cached(frequencies, largest = i);
    part = most / 8 + (most < 8);
    if (sum < SLOTS || part > sum - SLOTS) part = sum - SLOTS;
    keep(frequencies, largest, most - part);
    sum -= part;
  }
}

static void forget_tables(decoder *d) {
  memset(d->tables_at, 0, sizeof d->tables_at);
  /* 0 is no place. */
  d->cache_used = 1;
}

/* Puts a table into the cache. */
static int make_table(decoder *d, unsigned table) {
  const unsigned code = d->table_codes[table], hint_count = (unsigned)SLOTS >> d->hint_shift;
  const unsigned head = 1 + hint_count / 2;
  uint8_t *made, *starts;
  uint64_t size = ESCAPE, number;
  uint32_t i, sum = 0, hint = 0;
  REQUIRE(code);
  if (d->cache_units - d->cache_used < head + MOST_STARTS) forget_tables(d);
  made = d->cache + 2 * (size_t)d->cache_used;
  starts = made + 2 * head;
  if (code == WRITTEN) {
    cursor c = d->table_list;
    TRY(skip(&c, d->written_at[table]));
    TRY(number_of(&c, ESCAPE, &size));
    for (i = 1; i <= size; ++i) {
      TRY(number_of(&c, SLOTS - 1, &number));
      keep(starts, i, (uint32_t)number);
    }
  } else {
    family(code, table & 1, starts + 2);
  }
  while (size && !cached(starts, size)) --size;
  keep(starts, 0, 0);
  for (i = 1; i <= size; ++i) keep(starts, i, sum += cached(starts, i));
  REQUIRE(sum < SLOTS);
  keep(starts, size + 1, SLOTS);
  keep(made, 0, (uint32_t)size);
  for (i = 0; i < hint_count; ++i) {
    while (cached(starts, hint + 1) <= i << d->hint_shift) ++hint;
    made[2 + i] = (uint8_t)hint;
  }
  d->tables_at[table] = (uint16_t)d->cache_used;
  d->cache_used += head + size + 2;
  return 0;
}

/* ---- Streams ---- */

static int begin_run(decoder *d, run *r, uint64_t stream, const place *first) {
  uint64_t offset = d->first_stream, i, bytes;
  cursor c = d->stream_list;
  stream_record s;
  memset(&s, 0, sizeof s);
  r->active = 0;
  for (i = 0; i <= stream; ++i) {
    if (i) offset += 4 * LANES + 2 * s.words + 4;
    TRY(read_stream(d, &c, &s));
  }
  bytes = 4 * LANES + 2 * s.words;
  REQUIRE(same_crc(crc_of(d->data + offset, bytes), u32_at(d->data + offset + bytes)));
  for (i = 0; i < LANES; ++i) r->states[i] = u32_at(d->data + offset + 4 * i);
  r->words = cursor_of(d->data + offset + 4 * LANES, 2 * s.words);
  r->escapes = s.indices;
  r->escapes_left = s.escapes;
  r->stream = stream;
  r->place = *first;
  r->active = 1;
  return 0;
}

static int next_escape(run *r, int32_t *index) {
  uint64_t number;
  REQUIRE(r->escapes_left);
  --r->escapes_left;
  TRY(number_of(&r->escapes, 2 * LARGEST_INDEX, &number));
  *index = (int32_t)signed_of(number);
  return 0;
}

/* Decodes the columns `first` .. of a matrix; out may be null. */
static int decode_group(decoder *d, run *r, const entry *e, classes *columns, classes rows,
                        uint64_t first, unsigned lanes, uint8_t *out) {
  /* next[state] << 4 for an odd index, next[state] for an even one. */
  static const uint8_t next[8] = {0x20, 0x75, 0x31, 0x46, 0x02, 0x64, 0x13, 0x57};
  const uint8_t *words = r->words.at, *const end = words + r->words.left;
  const uint64_t per_row = e->columns;
  const unsigned hint_shift = d->hint_shift, head = 1 + ((unsigned)SLOTS >> hint_shift) / 2;
  uint64_t offsets[LANES], row;
  uint32_t x[LANES];
  unsigned column_class[LANES], l;
  uint8_t trellis[LANES];
  memset(trellis, 0, sizeof trellis);
  memcpy(x, r->states, 4 * lanes);
  for (l = 0; l < lanes; ++l) {
    const uint64_t column = first + l;
    TRY(next_class(columns, &column_class[l]));
    offsets[l] = column;
    if (e->transposed)
      offsets[l] = column / e->coefficients * e->shape[1] * e->coefficients +
                   column % e->coefficients;
  }
  for (row = 0; row < e->rows; ++row) {
    unsigned row_class;
    uint64_t begin = row * per_row;
    TRY(next_class(&rows, &row_class));
    if (e->transposed)
      begin = row / e->shape[1] * e->shape[1] * per_row + row % e->shape[1] * e->coefficients;
    for (l = 0; l < lanes; ++l) {
      const unsigned sum = row_class + column_class[l], quantiser = trellis[l] & 1u;
      const unsigned table = 2 * (sum < CLASSES - 1 ? sum : CLASSES - 1) + quantiser;
      const uint32_t slot = x[l] & (SLOTS - 1);
      const uint8_t *made, *starts;
      uint32_t symbol, state, takes, start;
      int32_t value;
      unsigned odd;
      if (!d->tables_at[table]) TRY(make_table(d, table));
      made = d->cache + 2 * (size_t)d->tables_at[table];
      starts = made + 2 * head;
      symbol = made[2 + (slot >> hint_shift)];
      while (slot >= cached(starts, symbol + 1)) ++symbol;
      start = cached(starts, symbol);
      state = (cached(starts, symbol + 1) - start) * (x[l] >> PRECISION) + slot - start;
      /* Four bytes of checksum follow the last word: no branch asks whether one is taken. */
      REQUIRE(words <= end);
      takes = state < LEAST_STATE;
      x[l] = takes ? state << 16 | u16_at(words) : state;
      words += 2 * takes;
      if (symbol == cached(made, 0)) {
        int32_t index;
        TRY(next_escape(r, &index));
        odd = (unsigned)index & 1;
        value = 2 * index;
        if (index > 0) value -= (int32_t)quantiser;
        if (index < 0) value += (int32_t)quantiser;
      } else {
        const uint32_t magnitude = (symbol + 1) / 2, sign = 0 - (symbol & 1);
        odd = magnitude & 1;
        value = (int32_t)(((2 * magnitude - (quantiser & (magnitude != 0))) ^ sign) - sign);
      }
      trellis[l] = (uint8_t)(next[trellis[l]] >> 4 * odd & 7);
      if (out) {
        const float coefficient = (float)value * e->step;
        memcpy(out + 4 * (size_t)(begin + offsets[l]), &coefficient, 4);
      }
    }
  }
  REQUIRE(words <= end);
  memcpy(r->states, x, 4 * lanes);
  r->words.left = r->words.run = (uint64_t)(end - words);
  r->words.at = words;
  return 0;
}

/* Decodes the next matrix of a stream, up to the one at `until`, and moves on. Only that one is
 * written, as float32 in the order of the tensor's kernels. */
static int decode_next(decoder *d, run *r, uint64_t until, uint8_t *out) {
  cursor entries = r->place.entries, all_classes;
  const uint64_t index = r->place.index;
  uint64_t first;
  entry e;
  TRY(read_entry(d, &entries, index, &e));
  all_classes = r->place.classes;
  if (e.kind == MATRIX) {
    classes rows, columns;
    TRY(open_classes(&all_classes, e.rows, &rows));
    TRY(open_classes(&all_classes, e.columns, &columns));
    for (first = 0; first < e.columns; first += LANES) {
      const uint64_t left = e.columns - first;
      TRY(decode_group(d, r, &e, &columns, rows, first, left < LANES ? (unsigned)left : 32u,
                           index == until ? out : NULL));
    }
  }
  return pass(d, &r->place, &e);
}

/* After the last matrix of a stream all has been read, to the states that encoding began with. */
static int check_end(const decoder *d, const run *r) {
  const int last = r->place.stream > r->stream || r->place.index == d->tensors;
  unsigned l;
  if (!last) return 0;
  REQUIRE(r->words.left == 0 && r->escapes_left == 0);
  for (l = 0; l < LANES; ++l) REQUIRE(r->states[l] == LEAST_STATE);
  return 0;
}

static int decode_matrix(decoder *d, uint64_t index, uint8_t *out) {
  run *const r = &d->run;
  entry e;
  int status = 0;
  TRY(move_to(d, index));
  if (!r->active || r->stream != d->at.stream || r->place.index > index)
    TRY(begin_run(d, r, d->at.stream, &d->of_stream));
  while (!status && r->place.index <= index) status = decode_next(d, r, index, out);
  /* Tensors of other kinds may follow the last matrix. */
  while (!status && r->place.index < d->tensors && r->place.stream == r->stream) {
    cursor c = r->place.entries;
    status = read_entry(d, &c, r->place.index, &e);
    if (status || e.kind == MATRIX) break;
    status = pass(d, &r->place, &e);
  }
  if (!status) status = check_end(d, r);
  if (status) r->active = 0;
  return status;
}

/* ---- Numbers of each dtype ---- */

static uint32_t half_of(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
  uint32_t x = bits & 0x7fffffff;
  if (x >= 0x47800000) return sign | (x > 0x7f800000 ? 0x7e00u : 0x7c00u);
  if (x < 0x33000000) return sign;
  if (x < 0x38800000) {
    const uint32_t shift = 126 - (x >> 23), mantissa = (x & 0x7fffff) | 0x800000;
    const uint32_t rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
    x = mantissa >> shift;
    return sign | (x + (rest > half || (rest == half && (x & 1))));
  }
  x -= 0x38000000;
  return sign | (x + 0xfff + (x >> 13 & 1)) >> 13;
}

static float from_half(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ff;
  float value;
  if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  value = (float)mantissa * float_of(0x33800000);
  return sign ? -value : value;
}

static uint32_t brain_of(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static void store(int dtype, double value, uint8_t *out) {
  float rounded;
  if (dtype == F64) {
    put_bytes(out, bits_of_double(value), 8);
    return;
  }
  rounded = (float)value;
  if (dtype == F32)
    put_bytes(out, bits_of(rounded), 4);
  else
    put_bytes(out, dtype == F16 ? half_of(rounded) : brain_of(rounded), 2);
}

static double load(int dtype, const uint8_t *in) {
  if (dtype == F64) return double_of(u64_at(in));
  if (dtype == F32) return (double)float_at(in);
  return (double)(dtype == F16 ? from_half(u16_at(in)) : float_of(u16_at(in) << 16));
}

static double largest_of(int dtype) {
  if (dtype == F64) return DBL_MAX;
  if (dtype == F32) return (double)FLT_MAX;
  return dtype == F16 ? 65504.0 : (double)float_of(0x7f7f0000);
}

static double power(int exponent) { return double_of((uint64_t)(exponent + 1023) << 52); }

/* A float32 times 2 ** exponent, rounded once. */
static double scaled(float value, int exponent) {
  const int first = exponent > 1000 ? 100 : exponent < -1000 ? -100 : 0;
  return (double)value * power(first) * power(exponent - first);
}

static double clipped(double value, double most) {
  return value > most ? most : value < -most ? -most : value;
}

/* The square root, rounded to the nearest, by integers. */
static double root_of(double value) {
  uint64_t bits = bits_of_double(value), mantissa = bits & ((UINT64_C(1) << 52) - 1);
  uint64_t root = 0, rest = 0;
  int exponent = (int)(bits >> 52 & 2047), i;
  if (value == 0 || value != value || bits == UINT64_C(0x7ff0000000000000)) return value;
  if (value < 0) return (value - value) / (value - value);
  if (exponent)
    mantissa |= UINT64_C(1) << 52;
  else
    for (exponent = 1; !(mantissa >> 52); --exponent) mantissa <<= 1;
  /* value = mantissa * 2 ** exponent, with an even exponent */
  exponent -= 1075;
  if (exponent % 2) {
    mantissa <<= 1;
    --exponent;
  }
  /* Two bits of mantissa << 54 for each of 54 bits of its root. */
  for (i = 53; i >= 0; --i) {
    uint64_t trial = root << 2 | 1;
    rest = rest << 2 | (i >= 27 ? mantissa >> (2 * (i - 27)) & 3 : 0);
    root <<= 1;
    if (rest >= trial) {
      rest -= trial;
      root |= 1;
    }
  }
  /* It is never half way between two. */
  root = (root + 1) >> 1;
  return double_of(((uint64_t)((exponent - 54) / 2 + 1 + 1023 + 52) << 52) +
                   (root - (UINT64_C(1) << 52)));
}

/* The value of the code of a logarithm, as `dtype` has it. */
static double log_value(uint64_t code, int dtype) {
  static const double roots[4] = {1.0442737824274138, 1.0905077326652577, 1.189207115002721,
                                  1.4142135623730951};
  const int64_t exponent = code ? signed_of((code - 1) / 2) : 0;
  const int64_t biased = exponent + LARGEST_CODE + GRID;
  double value = 1;
  uint8_t bytes[8];
  int bit;
  for (bit = 3; bit >= 0; --bit)
    if (biased % GRID >> bit & 1) value *= roots[bit];
  value *= power((int)(biased / GRID - (LARGEST_CODE + GRID) / GRID));
  if (!code) value = 0;
  if (code && code % 2 == 0) value = -value;
  store(dtype, (double)(float)clipped(value, (double)FLT_MAX), bytes);
  return load(dtype, bytes);
}

/* ---- Tensors ---- */

/* Coefficients in `out` become the tensor, in place. */
static int finish_matrix(decoder *d, const entry *e, uint8_t *out) {
  const unsigned item = item_of(e->dtype);
  const double most = largest_of(e->dtype);
  const int in_range = e->exponent || e->dtype == F16;
  uint64_t K = 1, M = 1, kernels, n, k, m;
  uint8_t *values = NULL, *matrix = NULL;
  float element;
  const uint16_t little = 1;
  basis b;
  memset(&b, 0, sizeof b);
  /* It is there already. */
  if (!e->basis && !in_range && e->dtype == F32 && *(const uint8_t *)&little) return 0;
  if (e->basis) {
    const uint64_t bytes = 2 * d->cache_units;
    uint64_t due;
    TRY(basis_at(d, e->basis - 1, &b));
    TRY(check_basis(&b));
    K = e->kernel;
    M = e->coefficients;
    if (K > bytes / 4) return WAVPRUNE_NEEDS_ROOM;
    /* The tables, from the other end of the cache, stay where there is room. */
    due = product(K, M);
    due = due && due <= (bytes / 4 - K) ? K + due : K;
    if (2 * d->cache_used > bytes - 4 * due) forget_tables(d);
    values = d->cache + (size_t)(bytes - 4 * due);
    if (due > K) matrix = values + 4 * K;
    for (k = 0; matrix && k < K; ++k)
      for (m = 0; m < M; ++m) {
        TRY(basis_element(&b, k, m, &element));
        memcpy(matrix + 4 * (k * M + m), &element, 4);
      }
  }
  kernels = e->rows * e->columns / M;
  for (n = 0; n < kernels; ++n) {
    /* Neither end may overtake the other. */
    const uint64_t kernel = item * K <= 4 * M ? n : kernels - 1 - n;
    const uint8_t *const from = out + 4 * (size_t)(M * kernel);
    uint8_t *const to = out + (size_t)(item * K * kernel);
    float coefficient;
    memcpy(&coefficient, from, 4);
    for (k = 0; e->basis && k < K; ++k) {
      double sum = 0;
      int any = 0;
      for (m = 0; m < M; ++m) {
        double part;
        if (matrix)
          memcpy(&element, matrix + 4 * (k * M + m), 4);
        else
          TRY(basis_element(&b, k, m, &element));
        if (element == 0) continue;
        memcpy(&coefficient, from + 4 * m, 4);
        part = (double)coefficient * (double)element;
        sum = any ? sum + part : part;
        any = 1;
      }
      element = (float)sum;
      memcpy(values + 4 * k, &element, 4);
    }
    for (k = 0; k < K; ++k) {
      double value;
      if (e->basis) memcpy(&coefficient, values + 4 * k, 4);
      value = (double)coefficient;
      if (in_range) {
        if (e->exponent) value = scaled((float)value, e->exponent);
        value = clipped(value, most);
      }
      store(e->dtype, value, to + item * k);
    }
  }
  return 0;
}

/* A tensor as the file holds it. */
static int read_stored(decoder *d, uint64_t index, const entry *e, uint8_t *out) {
  uint64_t i;
  if (e->kind == MATRIX) {
    TRY(decode_matrix(d, index, out));
    TRY(finish_matrix(d, e, out));
    REQUIRE(same_crc(crc_of(out, e->size), e->crc));
  } else if (e->kind == RAW) {
    const uint8_t *data;
    TRY(move_to(d, index));
    data = d->data + d->first_raw + d->at.raw;
    REQUIRE(same_crc(crc_of(data, e->size), e->crc));
    if (e->size) memcpy(out, data, (size_t)e->size);
  } else if (e->kind == FILLED) {
    const unsigned item = item_of(e->dtype);
    uint8_t bytes[8];
    cursor c = e->values;
    TRY(bytes_of(&c, bytes, item));
    for (i = 0; i < e->elements; ++i) memcpy(out + item * (size_t)i, bytes, item);
  } else {
    cursor c = e->values;
    for (i = 0; i < e->elements; ++i) {
      uint64_t code;
      TRY(number_of(&c, 4 * LARGEST_CODE + 2, &code));
      store(e->dtype, log_value(code, e->dtype), out + item_of(e->dtype) * (size_t)i);
    }
  }
  return 0;
}

/* The elements of a vector, one after the other. */
typedef struct vector {
  int kind, dtype;
  cursor values;
  const uint8_t *data; /* of a raw one or a decoded matrix */
} vector;

static int open_vector(decoder *d, uint64_t index, uint64_t length, uint8_t *decoded, vector *v) {
  entry e;
  TRY(entry_at(d, index, &e));
  REQUIRE(e.kind != ALIAS && e.axes == 1 && e.shape[0] == length);
  if (!is_float(e.dtype)) return WAVPRUNE_UNSUPPORTED;
  v->kind = e.kind;
  v->dtype = e.dtype;
  v->values = e.values;
  v->data = decoded;
  if (e.kind == MATRIX) {
    REQUIRE(decoded);
    return read_stored(d, index, &e, decoded);
  }
  if (e.kind == RAW) {
    v->data = d->data + d->first_raw + d->at.raw;
    REQUIRE(same_crc(crc_of(v->data, e.size), e.crc));
  }
  return 0;
}

static int next_element(vector *v, double *value) {
  const unsigned item = item_of(v->dtype);
  uint8_t bytes[8];
  if (v->kind == LOGS) {
    uint64_t code;
    TRY(number_of(&v->values, 4 * LARGEST_CODE + 2, &code));
    *value = log_value(code, v->dtype);
  } else if (v->kind == FILLED) {
    cursor c = v->values;
    TRY(bytes_of(&c, bytes, item));
    *value = load(v->dtype, bytes);
  } else {
    *value = load(v->dtype, v->data);
    v->data += item;
  }
  return 0;
}

/* Where the mean of a batch norm is decoded, behind its bias. */
static uint64_t behind(const entry *e) { return (room_of(e) + 7) / 8 * 8; }

/* A weight or bias that a batch norm was folded into, as the model has it. */
static int unfold(decoder *d, const link *l, int role, const entry *e, uint8_t *out) {
  const unsigned item = item_of(e->dtype);
  const uint64_t outputs = e->shape[0], each = outputs ? e->elements / outputs : 0;
  vector gamma, variance, mean;
  uint64_t i, j;
  REQUIRE(is_float(e->dtype) && (role == 1 ? e->axes > 1 : e->axes == 1));
  TRY(open_vector(d, l->gamma, outputs, NULL, &gamma));
  TRY(open_vector(d, l->variance, outputs, NULL, &variance));
  if (role == 2) {
    /* The stream goes on behind the bias afterwards. */
    const run before = d->run;
    const int status = open_vector(d, l->mean, outputs, out + behind(e), &mean);
    d->run = before;
    TRY(status);
  }
  for (i = 0; i < outputs; ++i) {
    double g, v, scale;
    TRY(next_element(&gamma, &g));
    TRY(next_element(&variance, &v));
    scale = g / root_of(v + l->eps);
    if (role == 2) {
      double shift;
      TRY(next_element(&mean, &shift));
      shift = scale * shift;
      store(e->dtype, load(e->dtype, out) + shift, out);
      out += item;
    } else {
      for (j = 0; j < each; ++j, out += item)
        store(e->dtype, load(e->dtype, out) / (scale == 0 ? 1 : scale), out);
    }
  }
  return 0;
}

/* The entry of a tensor that is stored, its number, and its batch norm. */
static int find(decoder *d, uint64_t *index, entry *e, link *l, int *role, uint64_t *room) {
  TRY(entry_at(d, *index, e));
  if (e->kind == ALIAS) {
    *index = e->tied_to;
    TRY(entry_at(d, *index, e));
    REQUIRE(e->kind != ALIAS);
  }
  TRY(link_of(d, *index, l, role));
  *room = room_of(e);
  if (*role == 2) {
    entry mean;
    TRY(entry_at(d, l->mean, &mean));
    REQUIRE(mean.kind != ALIAS);
    if (mean.kind == MATRIX) *room = behind(e) + room_of(&mean);
  }
  return 0;
}

/* ---- What the caller calls ---- */

int wavprune_heads_size(const void *data, size_t size, size_t *needed) {
  const uint8_t *bytes = (const uint8_t *)data;
  uint64_t start, total;
  heads h;
  cursor c;
  int status = 0, i;
  *needed = 0;
  if (read_header(bytes, size, &start)) return WAVPRUNE_NOT_PACKED;
  bytes += start;
  TRY(read_heads(bytes, size - start, &h));
  for (i = 0; i < 2 && !status; ++i)
    status = open_frame(bytes + h.start + (i ? h.small[0] : 0), h.small[i], h.size[i], &c);
  if (status != WAVPRUNE_NEEDS_ZSTD) return status;
  total = h.size[0] + h.size[1];
  if (total > (size_t)-1) return WAVPRUNE_UNSUPPORTED;
  *needed = (size_t)total;
  return 0;
}

int wavprune_open(wavprune_decoder *d, const void *data, size_t size, void *buffer,
                  size_t buffer_size, wavprune_decompress decompress, void *context) {
  const uint8_t *bytes = (const uint8_t *)data;
  uint8_t *to = (uint8_t *)buffer;
  uint64_t start, at;
  size_t needed;
  cursor parts[2];
  heads h;
  int i;
  memset(d, 0, sizeof *d);
  TRY(wavprune_heads_size(data, size, &needed));
  TRY(read_header(bytes, size, &start));
  d->data = bytes + start;
  d->size = size - start;
  TRY(read_heads(d->data, d->size, &h));
  if (needed && !decompress) return WAVPRUNE_NEEDS_ZSTD;
  if (needed > buffer_size) return WAVPRUNE_NEEDS_ROOM;
  for (i = 0, at = h.start; i < 2; at += h.small[i++]) {
    const uint8_t *const frame = d->data + at;
    if (!needed) {
      TRY(open_frame(frame, h.small[i], h.size[i], &parts[i]));
      continue;
    }
    REQUIRE(decompress(context, to, (size_t)h.size[i], frame, (size_t)h.small[i]) == h.size[i]);
    parts[i] = cursor_of(to, h.size[i]);
    to += h.size[i];
  }
  d->first_stream = at + 4;
  wavprune_cache(d, d->own_cache, sizeof d->own_cache);
  at = (uint64_t)read_records(d, parts[0], parts[1]);
  if (at) d->tensors = 0;
  return (int)at;
}

void wavprune_cache(wavprune_decoder *d, void *memory, size_t size) {
  /* Less than its own is no help. */
  if (size < sizeof d->own_cache) {
    memory = d->own_cache;
    size = sizeof d->own_cache;
  }
  d->cache = (uint8_t *)memory;
  d->cache_units = size / 2;
  d->hint_shift = size < WAVPRUNE_CACHE ? FEW_HINTS : MANY_HINTS;
  forget_tables(d);
}

int wavprune_tensor_at(wavprune_decoder *d, uint64_t index, wavprune_tensor *tensor) {
  uint64_t stored = index;
  cursor names;
  uint8_t byte;
  entry e;
  link l;
  int role, i;
  memset(tensor, 0, sizeof *tensor);
  TRY(find(d, &stored, &e, &l, &role, &tensor->room));
  TRY(move_to(d, index));
  for (names = d->at.names; names.left; ++tensor->name_length) {
    TRY(byte_of(&names, &byte));
    if (!byte) break;
  }
  tensor->dtype = dtypes[e.dtype].name;
  tensor->axes = e.axes;
  for (i = 0; i < e.axes; ++i) tensor->shape[i] = e.shape[i];
  tensor->size = e.size;
  tensor->same_as = stored;
  return 0;
}

int wavprune_name(wavprune_decoder *d, uint64_t index, char *out, size_t room) {
  cursor names;
  uint8_t byte;
  TRY(move_to(d, index));
  for (names = d->at.names; names.left; *out++ = (char)byte) {
    TRY(byte_of(&names, &byte));
    if (!byte) break;
    if (!room--) return WAVPRUNE_NEEDS_ROOM;
  }
  return 0;
}

int wavprune_read(wavprune_decoder *d, uint64_t index, void *out, size_t room) {
  uint64_t due;
  entry e;
  link l;
  int role;
  TRY(find(d, &index, &e, &l, &role, &due));
  if (due > room) return WAVPRUNE_NEEDS_ROOM;
  TRY(read_stored(d, index, &e, (uint8_t *)out));
  return role ? unfold(d, &l, role, &e, (uint8_t *)out) : 0;
}

const char *wavprune_message(int status) {
  static const char *const messages[] = {
      "no error",
      "no packed file of version 3",
      "the file is damaged",
      "its records are compressed by Zstandard, and there is no decompressor",
      "a buffer is too small",
      "there is no tensor of this number",
      "beyond the limits of this decoder",
  };
  return status >= 0 && status <= WAVPRUNE_UNSUPPORTED ? messages[status] : "no status";
}

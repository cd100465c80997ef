/* The decoder's numbers, one by one, for test_numbers.py. */
#include "wavprune_decoder.c"

void halves(const float *values, uint16_t *half, uint16_t *brain, uint64_t count);
void roots(const double *values, double *result, uint64_t count);
void scales(const float *values, const int32_t *exponents, double *result, uint64_t count);
void logs(int32_t dtype, double *result, uint64_t count);
void frequencies(uint32_t code, uint32_t quantiser, uint8_t *result);
uint32_t checksum(const uint8_t *data, uint64_t size);

void halves(const float *values, uint16_t *half, uint16_t *brain, uint64_t count) {
  uint64_t i;
  for (i = 0; i < count; ++i) {
    half[i] = (uint16_t)half_of(values[i]);
    brain[i] = (uint16_t)brain_of(values[i]);
  }
}

void roots(const double *values, double *result, uint64_t count) {
  uint64_t i;
  for (i = 0; i < count; ++i) result[i] = root_of(values[i]);
}

void scales(const float *values, const int32_t *exponents, double *result, uint64_t count) {
  uint64_t i;
  for (i = 0; i < count; ++i) result[i] = scaled(values[i], exponents[i]);
}

void logs(int32_t dtype, double *result, uint64_t count) {
  uint64_t i;
  for (i = 0; i < count; ++i) result[i] = log_value(i, dtype);
}

void frequencies(uint32_t code, uint32_t quantiser, uint8_t *result) {
  family(code, quantiser, result);
}

uint32_t checksum(const uint8_t *data, uint64_t size) { return crc_of(data, size); }

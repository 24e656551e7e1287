// Rows of blocks as floats and as codes, by blocks.h compiled as plain C++.
#include <cstddef>

#include "blocks.h"

struct Type {
  int id, block, bytes, group, low, high, zero, minimum;
};

#define DESCRIBE(T, ...) {__VA_ARGS__},
static const Type types[] = {BLOCKS_TYPES(DESCRIBE)};

extern "C" int list(Type* out) {
  int count = 0;
  for (const Type& type : types) out[count++] = type;
  return count;
}

// Weights of `count` sixteens and, where they have codes, q (count, 16) and sm (count, 2).
extern "C" int decode(int id, const unsigned char* row, int count, float* w, signed char* q,
                      float* sm) {
  switch (id) {
#define CODES(T, ID, BLOCK, BYTES, GROUP, LOW, HIGH, ZERO, MINIMUM)                  \
  case ID:                                                                           \
    for (int i = 0; i < count; i++) {                                                \
      blocks_##T(row, i, q + 16 * i, sm + 2 * i);                                    \
      for (int j = 0; j < 16; j++) {                                                 \
        const float product = sm[2 * i] * float(q[16 * i + j] - ZERO);               \
        w[16 * i + j] = MINIMUM ? product + sm[2 * i + 1] : product;                 \
      }                                                                              \
    }                                                                                \
    return 1;
    BLOCKS_TYPES(CODES)
#define FLOATS(T, ID, BYTES) \
  case ID:                   \
    for (int i = 0; i < count; i++) blocks_##T(row, i, w + 16 * i); \
    return 1;
    BLOCKS_FLOAT_TYPES(FLOATS)
  }
  return 0;
}

// How GGML's blocks are read: one small function for each type, once for C++, Metal and CUDA.
//
//   blocks_T(row, i, q, sm)   weights 16 i ... 16 i + 15 of a row of blocks as small integers:
//                             w[j] = sm[0] * (q[j] - ZERO) + sm[1], bit-equal to GGML's own
//   blocks_T(row, i, w)       the same for the types of floats, as floats
//
// Products sm[0] * (q - ZERO) are exact in float32 for every type, so that a fused multiply-add and
// the two operations agree. Without a minimum sm[1] is 0; adding it only turns -0 into +0.
//
// The language is what C++, Metal and CUDA share. A file that includes this one may define, all or
// none (by default it is plain C++):
//   BLOCKS_FN        how a small function is declared     BLOCKS_BYTES     a pointer to packed bytes
//   BLOCKS_TABLE     how a constant table is declared     BLOCKS_LOCAL(T)  a pointer to a thread's T
//   blocks_code        the type of q's elements: signed char, or any that holds -128 ... 127
//   blocks_half_of(u)  the float16 with these 16 bits, as a float
//   blocks_float(u)    the float32 with these bits
// and BLOCKS_WITHOUT_GRIDS to leave out the types that need the tables of grids.h.
//
// Layouts: ggml-common.h and ggml-quants.c of llama.cpp (facts), checked against the gguf package.
#ifndef MLXRUN_BLOCKS_H
#define MLXRUN_BLOCKS_H

// X(T, ID, BLOCK, BYTES, GROUP, LOW, HIGH, ZERO, MINIMUM)
//   ID           GGML's number of the type
//   BLOCK BYTES  weights and bytes of a block
//   GROUP        neighbors, from a multiple of this on, that share sm: 16 or (at least) 32
//   LOW HIGH     the least and the greatest q: from 0 to at most 63, or signed bytes
//   ZERO         the q that stands for 0
//   MINIMUM      1 where sm[1] is not always 0
#define BLOCKS_PLAIN_TYPES(X)                       \
  X(q4_0, 2, 32, 18, 32, 0, 15, 8, 0)               \
  X(q4_1, 3, 32, 20, 32, 0, 15, 0, 1)               \
  X(q5_0, 6, 32, 22, 32, 0, 31, 16, 0)              \
  X(q5_1, 7, 32, 24, 32, 0, 31, 0, 1)               \
  X(q8_0, 8, 32, 34, 32, -128, 127, 0, 0)           \
  X(q2_k, 10, 256, 84, 16, 0, 3, 0, 1)              \
  X(q3_k, 11, 256, 110, 16, 0, 7, 4, 0)             \
  X(q4_k, 12, 256, 144, 32, 0, 15, 0, 1)            \
  X(q5_k, 13, 256, 176, 32, 0, 31, 0, 1)            \
  X(q6_k, 14, 256, 210, 16, 0, 63, 32, 0)           \
  X(iq4_nl, 20, 32, 18, 32, -127, 113, 0, 0)        \
  X(iq4_xs, 23, 256, 136, 32, -127, 113, 0, 0)      \
  X(tq1_0, 34, 256, 54, 32, 0, 2, 1, 0)             \
  X(tq2_0, 35, 256, 66, 32, 0, 3, 1, 0)             \
  X(mxfp4, 39, 32, 17, 32, -12, 12, 0, 0)           \
  X(nvfp4, 40, 64, 36, 16, -12, 12, 0, 0)           \
  X(q1_0, 41, 128, 18, 32, -1, 1, 0, 0)             \
  X(q2_0, 42, 64, 18, 32, 0, 3, 1, 0)

#define BLOCKS_GRID_TYPES(X)                        \
  X(iq2_xxs, 16, 256, 66, 32, -43, 43, 0, 0)        \
  X(iq2_xs, 17, 256, 74, 16, -43, 43, 0, 0)         \
  X(iq3_xxs, 18, 256, 98, 32, -62, 62, 0, 0)        \
  X(iq1_s, 19, 256, 50, 32, -9, 9, 0, 0)            \
  X(iq3_s, 21, 256, 110, 32, -15, 15, 0, 0)         \
  X(iq2_s, 22, 256, 82, 16, -43, 43, 0, 0)          \
  X(iq1_m, 29, 256, 56, 16, -9, 9, 0, 0)

#ifdef BLOCKS_WITHOUT_GRIDS
#define BLOCKS_TYPES(X) BLOCKS_PLAIN_TYPES(X)
#else
#define BLOCKS_TYPES(X) BLOCKS_PLAIN_TYPES(X) BLOCKS_GRID_TYPES(X)
#endif

// X(T, ID, BYTES): bytes of one weight.
#define BLOCKS_FLOAT_TYPES(X) X(f32, 0, 4) X(f16, 1, 2) X(bf16, 30, 2)

#ifndef BLOCKS_FN
#include <cstdint>
#include <cstring>
#define BLOCKS_FN static inline __attribute__((always_inline, unused))
#define BLOCKS_BYTES const unsigned char*
#define BLOCKS_TABLE static constexpr
#define BLOCKS_LOCAL(T) T*
typedef signed char blocks_code;
BLOCKS_FN float blocks_float(unsigned u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
// Exact: a subnormal half is a whole number of 2^-24.
BLOCKS_FN float blocks_half_of(unsigned h) {
  const unsigned magnitude = h & 0x7fffu, sign = (h & 0x8000u) << 16;
  if (magnitude < 0x400u) return (sign ? -1.0f : 1.0f) * (float(magnitude) * 0x1p-24f);
  if (magnitude >= 0x7c00u) return blocks_float(sign | magnitude << 13 | 0x7f800000u);
  return blocks_float(sign | ((magnitude << 13) + 0x38000000u));
}
#endif

BLOCKS_FN float blocks_half(BLOCKS_BYTES p) { return blocks_half_of(p[0] | p[1] << 8); }

BLOCKS_FN void blocks_f32(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(float) w) {
  BLOCKS_BYTES b = row + i * 64;
  for (int j = 0; j < 16; j++)
    w[j] = blocks_float((unsigned)b[4 * j] | (unsigned)b[4 * j + 1] << 8 |
                        (unsigned)b[4 * j + 2] << 16 | (unsigned)b[4 * j + 3] << 24);
}

BLOCKS_FN void blocks_f16(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(float) w) {
  for (int j = 0; j < 16; j++) w[j] = blocks_half(row + i * 32 + 2 * j);
}

BLOCKS_FN void blocks_bf16(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(float) w) {
  BLOCKS_BYTES b = row + i * 32;
  for (int j = 0; j < 16; j++)
    w[j] = blocks_float((unsigned)b[2 * j] << 16 | (unsigned)b[2 * j + 1] << 24);
}

// Blocks of 32: 16 bytes whose low halves are weights 0 ... 15 and whose high halves the others.

BLOCKS_FN void blocks_q4_0(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 1) * 18;
  const int shift = (i & 1) * 4;
  sm[0] = blocks_half(b);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) q[j] = blocks_code((b[2 + j] >> shift) & 15);
}

BLOCKS_FN void blocks_q4_1(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 1) * 20;
  const int shift = (i & 1) * 4;
  sm[0] = blocks_half(b);
  sm[1] = blocks_half(b + 2);
  for (int j = 0; j < 16; j++) q[j] = blocks_code((b[4 + j] >> shift) & 15);
}

BLOCKS_FN void blocks_q5_0(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 1) * 22;
  const int second = i & 1, shift = second * 4;
  const int fifth = b[2 + 2 * second] | b[3 + 2 * second] << 8;
  sm[0] = blocks_half(b);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++)
    q[j] = blocks_code(((b[6 + j] >> shift) & 15) | ((fifth >> j) & 1) << 4);
}

BLOCKS_FN void blocks_q5_1(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 1) * 24;
  const int second = i & 1, shift = second * 4;
  const int fifth = b[4 + 2 * second] | b[5 + 2 * second] << 8;
  sm[0] = blocks_half(b);
  sm[1] = blocks_half(b + 2);
  for (int j = 0; j < 16; j++)
    q[j] = blocks_code(((b[8 + j] >> shift) & 15) | ((fifth >> j) & 1) << 4);
}

BLOCKS_FN void blocks_q8_0(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 1) * 34;
  BLOCKS_BYTES p = b + 2 + (i & 1) * 16;
  sm[0] = blocks_half(b);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) q[j] = blocks_code((p[j] ^ 128) - 128);
}

// K-quants: blocks of 256, two levels of scales.

BLOCKS_FN void blocks_q2_k(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 84;
  const int g = i & 15, shift = g & 6;
  BLOCKS_BYTES p = b + 16 + (g >> 3) * 32 + (g & 1) * 16;
  sm[0] = blocks_half(b + 80) * float(b[g] & 15);
  sm[1] = -(blocks_half(b + 82) * float(b[g] >> 4));
  for (int j = 0; j < 16; j++) q[j] = blocks_code((p[j] >> shift) & 3);
}

BLOCKS_FN void blocks_q3_k(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 110;
  const int g = i & 15, shift = g & 6, bit = g >> 1;
  BLOCKS_BYTES h = b + (g & 1) * 16;
  BLOCKS_BYTES p = b + 32 + (g >> 3) * 32 + (g & 1) * 16;
  BLOCKS_BYTES s = b + 96;
  const int low = (s[g & 7] >> (g >> 3) * 4) & 15, high = (s[8 + (g & 3)] >> (g >> 2) * 2) & 3;
  sm[0] = blocks_half(b + 108) * float((low | high << 4) - 32);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++)
    q[j] = blocks_code(((p[j] >> shift) & 3) | ((h[j] >> bit) & 1) << 2);
}

// Scale and minimum g of Q4_K and Q5_K: six bits each; the last four have their upper two bits above
// the first four.
BLOCKS_FN void blocks_k4_scales(BLOCKS_BYTES b, int g, BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES s = b + 4;
  int scale = s[g & 3], minimum = s[4 + (g & 3)];
  if (g < 4) {
    scale &= 63;
    minimum &= 63;
  } else {
    scale = (s[4 + g] & 15) | scale >> 6 << 4;
    minimum = s[4 + g] >> 4 | minimum >> 6 << 4;
  }
  sm[0] = blocks_half(b) * float(scale);
  sm[1] = -(blocks_half(b + 2) * float(minimum));
}

BLOCKS_FN void blocks_q4_k(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 144;
  const int g = (i & 15) >> 1, shift = (g & 1) * 4;
  BLOCKS_BYTES p = b + 16 + (g >> 1) * 32 + (i & 1) * 16;
  blocks_k4_scales(b, g, sm);
  for (int j = 0; j < 16; j++) q[j] = blocks_code((p[j] >> shift) & 15);
}

BLOCKS_FN void blocks_q5_k(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 176;
  const int g = (i & 15) >> 1, shift = (g & 1) * 4;
  BLOCKS_BYTES h = b + 16 + (i & 1) * 16;
  BLOCKS_BYTES p = b + 48 + (g >> 1) * 32 + (i & 1) * 16;
  blocks_k4_scales(b, g, sm);
  for (int j = 0; j < 16; j++)
    q[j] = blocks_code(((p[j] >> shift) & 15) | ((h[j] >> g) & 1) << 4);
}

BLOCKS_FN void blocks_q6_k(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 210;
  const int g = i & 15, upper = g >> 3, shift = (g & 4), high = g & 6;
  BLOCKS_BYTES p = b + 64 * upper + 16 * (g & 3);
  BLOCKS_BYTES h = b + 128 + 32 * upper + 16 * (g & 1);
  sm[0] = blocks_half(b + 208) * float((b[192 + g] ^ 128) - 128);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++)
    q[j] = blocks_code(((p[j] >> shift) & 15) | ((h[j] >> high) & 3) << 4);
}

// Sixteen uneven levels.

BLOCKS_TABLE signed char blocks_iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                  1,    13,   25,  38,  53,  69,  89,  113};

BLOCKS_FN void blocks_iq4_nl(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                             BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 1) * 18;
  const int shift = (i & 1) * 4;
  sm[0] = blocks_half(b);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) q[j] = blocks_code(blocks_iq4_levels[(b[2 + j] >> shift) & 15]);
}

BLOCKS_FN void blocks_iq4_xs(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                             BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 136;
  const int g = (i & 15) >> 1, shift = (i & 1) * 4;
  BLOCKS_BYTES p = b + 8 + g * 16;
  const int low = (b[4 + (g >> 1)] >> (g & 1) * 4) & 15, high = (b[2 + (g >> 2)] >> (g & 3) * 2) & 3;
  sm[0] = blocks_half(b) * float((low | high << 4) - 32);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) q[j] = blocks_code(blocks_iq4_levels[(p[j] >> shift) & 15]);
}

// Twice the values of the four-bit float E2M1, without its -0.
BLOCKS_TABLE signed char blocks_e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The scale is half of 2^(e - 127), hence subnormal for e = 0 and 1.
BLOCKS_FN void blocks_mxfp4(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                            BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 1) * 17;
  const int shift = (i & 1) * 4;
  const unsigned e = b[0];
  sm[0] = blocks_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) q[j] = blocks_code(blocks_e2m1[(b[1 + j] >> shift) & 15]);
}

// Half of an unsigned E4M3 scale for 16 weights; both of its zeros and its NaN are 0.
BLOCKS_FN void blocks_nvfp4(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                            BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 2) * 36;
  BLOCKS_BYTES p = b + 4 + (i & 3) * 8;
  const int e = (b[i & 3] >> 3) & 15, mantissa = b[i & 3] & 7;
  sm[0] = e == 0 ? float(mantissa) * 0.0009765625f
                 : float(8 + mantissa) * blocks_float((unsigned)(e + 116) << 23);
  if (b[i & 3] == 127) sm[0] = 0.0f;
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) q[j] = blocks_code(blocks_e2m1[(p[j & 7] >> (j >> 3) * 4) & 15]);
}

// One and two bits.

// Five ternary digits in a byte: a base-3 fraction of 256.
BLOCKS_FN void blocks_tq1_0(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                            BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 54;
  const int g = i & 15;
  BLOCKS_BYTES p = b + (g < 10 ? (g & 1) * 16 : g < 15 ? 32 : 48);
  const int first = g < 10 ? g >> 1 : g < 15 ? g - 10 : 0;
  const int mask = g < 15 ? 15 : 3;  // the last 16 digits are four each of four bytes
  sm[0] = blocks_half(b + 52);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) {
    const int digit = first + (g < 15 ? 0 : j >> 2);
    const int power = digit == 0 ? 1 : digit == 1 ? 3 : digit == 2 ? 9 : digit == 3 ? 27 : 81;
    q[j] = blocks_code((((p[j & mask] * power) & 255) * 3) >> 8);
  }
}

BLOCKS_FN void blocks_tq2_0(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                            BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 66;
  const int g = i & 15, shift = g & 6;
  BLOCKS_BYTES p = b + (g >> 3) * 32 + (g & 1) * 16;
  sm[0] = blocks_half(b + 64);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) q[j] = blocks_code((p[j] >> shift) & 3);
}

BLOCKS_FN void blocks_q1_0(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 3) * 18;
  BLOCKS_BYTES p = b + 2 + (i & 7) * 2;
  sm[0] = blocks_half(b);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) q[j] = blocks_code(((p[j >> 3] >> (j & 7)) & 1) * 2 - 1);
}

BLOCKS_FN void blocks_q2_0(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                           BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 2) * 18;
  BLOCKS_BYTES p = b + 2 + (i & 3) * 4;
  sm[0] = blocks_half(b);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) q[j] = blocks_code((p[j >> 2] >> (j & 3) * 2) & 3);
}

#ifndef BLOCKS_WITHOUT_GRIDS
#include "grids.h"

// Codebook types: eight (IQ3: four) weights are a row of a table, which lies in two (four) bits each.

// The mask of eight signs for seven bits: the eighth makes their number even.
BLOCKS_FN int blocks_signs(int seven) {
  int parity = seven ^ seven >> 4;
  parity ^= parity >> 2;
  return seven | ((parity ^ parity >> 1) & 1) << 7;
}

// Eight weights of IQ2: levels 8, 25 and 43.
BLOCKS_FN void blocks_iq2_row(int grid, int signs, BLOCKS_LOCAL(blocks_code) q) {
  for (int j = 0; j < 8; j++) {
    const int code = (grid >> 2 * j) & 3, level = 8 + 17 * code + (code >> 1);
    q[j] = blocks_code((signs >> j) & 1 ? -level : level);
  }
}

BLOCKS_FN void blocks_iq2_xxs(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                              BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 66;
  BLOCKS_BYTES p = b + 2 + ((i & 15) >> 1) * 8;
  const unsigned word =
      (unsigned)p[4] | (unsigned)p[5] << 8 | (unsigned)p[6] << 16 | (unsigned)p[7] << 24;
  const int signs = int(word >> (i & 1) * 14);
  sm[0] = blocks_half(b) * (float(2 * (word >> 28) + 1) * 0.125f);
  sm[1] = 0.0f;
  blocks_iq2_row(blocks_iq2_xxs_grid[p[(i & 1) * 2]], blocks_signs(signs & 127), q);
  blocks_iq2_row(blocks_iq2_xxs_grid[p[(i & 1) * 2 + 1]], blocks_signs((signs >> 7) & 127), q + 8);
}

BLOCKS_FN void blocks_iq2_xs(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                             BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 74;
  const int g = i & 15;
  BLOCKS_BYTES p = b + 2 + g * 4;
  const int scale = (b[66 + (g >> 1)] >> (g & 1) * 4) & 15;
  sm[0] = blocks_half(b) * (float(2 * scale + 1) * 0.125f);
  sm[1] = 0.0f;
  for (int k = 0; k < 2; k++) {
    const int word = p[2 * k] | p[2 * k + 1] << 8;
    blocks_iq2_row(blocks_iq2_xs_grid[word & 511], blocks_signs(word >> 9), q + 8 * k);
  }
}

BLOCKS_FN void blocks_iq2_s(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                            BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 82;
  const int g = i & 15, high = b[66 + (g >> 1)] >> (g & 1) * 4;
  const int scale = (b[74 + (g >> 1)] >> (g & 1) * 4) & 15;
  sm[0] = blocks_half(b) * (float(2 * scale + 1) * 0.125f);
  sm[1] = 0.0f;
  for (int k = 0; k < 2; k++) {
    const int index = b[2 + 2 * g + k] | ((high >> 2 * k) & 3) << 8;
    blocks_iq2_row(blocks_iq2_s_grid[index], b[34 + 2 * g + k], q + 8 * k);
  }
}

// Levels 4, 12, ... 52 and 62.
BLOCKS_FN void blocks_iq3_xxs(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                              BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 98;
  const int g = i & 15;
  BLOCKS_BYTES p = b + 66 + (g >> 1) * 4;
  const unsigned word =
      (unsigned)p[0] | (unsigned)p[1] << 8 | (unsigned)p[2] << 16 | (unsigned)p[3] << 24;
  const int fields = int(word >> (g & 1) * 14);
  const int signs = blocks_signs(fields & 127) | blocks_signs((fields >> 7) & 127) << 8;
  sm[0] = blocks_half(b) * (float(2 * (word >> 28) + 1) * 0.25f);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) {
    const int code = (blocks_iq3_xxs_grid[b[2 + 4 * g + (j >> 2)]] >> (j & 3) * 4) & 7;
    const int level = 4 + 8 * code + (code == 7 ? 2 : 0);
    q[j] = blocks_code((signs >> j) & 1 ? -level : level);
  }
}

// Levels 1, 3, ... 15.
BLOCKS_FN void blocks_iq3_s(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                            BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 110;
  const int g = i & 15, high = b[66 + (g >> 1)] >> (g & 1) * 4;
  const int signs = b[74 + 2 * g] | b[75 + 2 * g] << 8;
  const int scale = (b[106 + (g >> 2)] >> ((g >> 1) & 1) * 4) & 15;
  sm[0] = blocks_half(b) * float(2 * scale + 1);
  sm[1] = 0.0f;
  for (int j = 0; j < 16; j++) {
    const int index = b[2 + 4 * g + (j >> 2)] | ((high >> (j >> 2)) & 1) << 8;
    const int level = 2 * ((blocks_iq3_s_grid[index] >> (j & 3) * 4) & 7) + 1;
    q[j] = blocks_code((signs >> j) & 1 ? -level : level);
  }
}

// Eight weights of IQ1 in eighths: -1, 0 or 1, and an eighth up or down.
BLOCKS_FN void blocks_iq1_row(int grid, int shift, BLOCKS_LOCAL(blocks_code) q) {
  for (int j = 0; j < 8; j++) q[j] = blocks_code(8 * ((grid >> 2 * j) & 3) - 8 + shift);
}

BLOCKS_FN void blocks_iq1_s(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                            BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 50;
  const int g = i & 15;
  BLOCKS_BYTES p = b + 34 + (g >> 1) * 2;
  const int word = p[0] | p[1] << 8, high = word >> (g & 1) * 6, shift = word & 0x8000 ? -1 : 1;
  sm[0] = blocks_half(b) * (float(2 * ((word >> 12) & 7) + 1) * 0.125f);
  sm[1] = 0.0f;
  blocks_iq1_row(blocks_iq1_grid[b[2 + 2 * g] | (high & 7) << 8], shift, q);
  blocks_iq1_row(blocks_iq1_grid[b[3 + 2 * g] | ((high >> 3) & 7) << 8], shift, q + 8);
}

// The float16 scale lies in the upper four bits of four words.
BLOCKS_FN void blocks_iq1_m(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(blocks_code) q,
                            BLOCKS_LOCAL(float) sm) {
  BLOCKS_BYTES b = row + (i >> 4) * 56;
  const int g = i & 15, high = b[32 + g];
  BLOCKS_BYTES s = b + 48;
  const int scale = ((s[2 * (g >> 2)] | s[2 * (g >> 2) + 1] << 8) >> (g & 3) * 3) & 7;
  sm[0] = blocks_half_of((s[1] >> 4) | (s[3] & 0xf0) | (s[5] >> 4) << 8 | (s[7] & 0xf0) << 8) *
          (float(2 * scale + 1) * 0.125f);
  sm[1] = 0.0f;
  blocks_iq1_row(blocks_iq1_grid[b[2 * g] | (high & 7) << 8], high & 8 ? -1 : 1, q);
  blocks_iq1_row(blocks_iq1_grid[b[2 * g + 1] | (high & 0x70) << 4], high & 0x80 ? -1 : 1, q + 8);
}
#endif

#endif

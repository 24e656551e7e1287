// The IQ1, IQ2 and IQ3 types, as formats.h has the others: eight weights (IQ3: four) are a row of a
// codebook, and have signs or a shift of their own.
#pragma once
#include "formats.h"

namespace kernels {
namespace {

// Rows as bytes: a word of 8 or of 4.
template <class Word, size_t N> struct Codebook {
  Word rows[N];
};

// A grid of blocks.h with a level for each of its codes.
template <class Word, size_t N, size_t LEVELS>
constexpr Codebook<Word, N> codebook(const unsigned short (&grid)[N], const int (&levels)[LEVELS]) {
  constexpr int COUNT = sizeof(Word), BITS = 16 / COUNT;
  Codebook<Word, N> book = {};
  for (size_t n = 0; n < N; n++)
    for (int j = 0; j < COUNT; j++)
      book.rows[n] |= (Word)levels[(grid[n] >> BITS * j) % LEVELS] << 8 * j;
  return book;
}

constexpr uint64_t EACH = 0x0101010101010101ull;

template <int TYPE_, int BYTES_, int GROUP_, int ZERO> struct Coded {
  static constexpr int TYPE = TYPE_, BLOCK = 256, BYTES = BYTES_, GROUP = GROUP_;
  static constexpr int TOP = 2 * ZERO, OFFSET = ZERO;
  static constexpr bool MINIMUM = false, SWAPPED = false;

  // d (2 s + 1), for s of the lower lanes and the upper ones.
  KERNELS_INLINE f32x16 odd_scales(uint64_t low, uint64_t high, float d) {
    return bytes_to_floats(low << 1 | EACH, high << 1 | EACH) * all(d);
  }

  // v, or the code of the opposite number where the bit of `signs` is set.
  KERNELS_INLINE u8x64 with_signs(const u8x64& v, uint64_t signs) {
#if defined(KERNELS_AVX512)
    return (u8x64)_mm512_mask_sub_epi8((__m512i)v, signs, _mm512_set1_epi8(2 * ZERO), (__m512i)v);
#else
    const u8x64 negative = spread_bits(signs);
    return (v ^ negative) + mask(negative, 2 * ZERO + 1);
#endif
  }

  // 64 signs of eight fields of seven: the eighth of each makes their number even.
  KERNELS_INLINE uint64_t even_signs(uint64_t fields) {
    const uint64_t seven = spread<7>(fields);
    uint64_t parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return seven | (parity & EACH) << 7;
  }
  // Of two words with four fields each.
  KERNELS_INLINE uint64_t even_signs(uint32_t a, uint32_t b) {
    return even_signs((a & 0xfffffff) | (uint64_t)(b & 0xfffffff) << 28);
  }

  // The upper halves of eight bytes, STRIDE apart.
  template <int STRIDE> KERNELS_INLINE uint64_t upper_nibbles(const uint8_t* p) {
    uint64_t s = 0;
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) s |= (uint64_t)(p[STRIDE * g] >> 4) << 8 * g;
    return s;
  }
};

// ---- IQ2 -----------------------------------------------------------------------------------------

constexpr int LEVELS2[] = {43 + 8, 43 + 25, 43 + 43, 0};

struct IQ2_XXS : Coded<16, 66, 32, 43> {
  static constexpr auto book = codebook<uint64_t>(blocks_iq2_xxs_grid, LEVELS2);
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    const uint64_t s = upper_nibbles<8>(b + 9);
    return odd_scales(s, s, half(b) * 0.125f);
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    const uint64_t p[2] = {load<uint64_t>(b + 2 + 16 * I), load<uint64_t>(b + 10 + 16 * I)};
    const u8x64 v = words([&](int k) { return book.rows[p[k / 4] >> 8 * (k % 4) & 255]; });
    return with_signs(v, even_signs(p[0] >> 32, p[1] >> 32));
  }
};

// Scales of 16 groups in nibbles.
template <int TYPE, int BYTES, int AT> struct Nibbles2 : Coded<TYPE, BYTES, 16, 43> {
  KERNELS_INLINE void scales(const uint8_t* b, f32x16& s, f32x16&) {
    s = Nibbles2::odd_scales(spread<4>(load<uint32_t>(b + AT)),
                             spread<4>(load<uint32_t>(b + AT + 4)), half(b) * 0.125f);
  }
};

struct IQ2_XS : Nibbles2<17, 74, 66> {
  static constexpr auto book = codebook<uint64_t>(blocks_iq2_xs_grid, LEVELS2);
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    const uint64_t p[2] = {load<uint64_t>(b + 2 + 16 * I), load<uint64_t>(b + 10 + 16 * I)};
    uint64_t fields = 0;
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) fields |= (p[k / 4] >> (16 * (k % 4) + 9) & 127) << 7 * k;
    const u8x64 v = words([&](int k) { return book.rows[p[k / 4] >> 16 * (k % 4) & 511]; });
    return with_signs(v, even_signs(fields));
  }
};

struct IQ2_S : Nibbles2<22, 82, 74> {
  static constexpr auto book = codebook<uint64_t>(blocks_iq2_s_grid, LEVELS2);
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    const uint64_t low = load<uint64_t>(b + 2 + 8 * I);
    const uint32_t high = load<uint16_t>(b + 66 + 2 * I);
    const u8x64 v = words(
        [&](int k) { return book.rows[(low >> 8 * k & 255) | (high >> 2 * k & 3) << 8]; });
    return with_signs(v, load<uint64_t>(b + 34 + 8 * I));
  }
};

// ---- IQ3 -----------------------------------------------------------------------------------------

struct IQ3_XXS : Coded<18, 98, 32, 62> {
  static constexpr int LEVELS[] = {66, 74, 82, 90, 98, 106, 114, 124};
  static constexpr auto book = codebook<uint32_t>(blocks_iq3_xxs_grid, LEVELS);
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    const uint64_t s = upper_nibbles<4>(b + 69);
    return odd_scales(s, s, half(b) * 0.25f);
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    const uint8_t* p = b + 2 + 16 * I;
    const u8x64 v = words([&](int k) {
      return book.rows[p[2 * k]] | (uint64_t)book.rows[p[2 * k + 1]] << 32;
    });
    const uint8_t* signs = b + 66 + 8 * I;
    return with_signs(v, even_signs(load<uint32_t>(signs), load<uint32_t>(signs + 4)));
  }
};

struct IQ3_S : Coded<21, 110, 32, 15> {
  static constexpr int LEVELS[] = {16, 18, 20, 22, 24, 26, 28, 30};
  static constexpr auto book = codebook<uint32_t>(blocks_iq3_s_grid, LEVELS);
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    const uint64_t s = spread<4>(load<uint32_t>(b + 106));
    return odd_scales(s, s, half(b));
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    const uint8_t* p = b + 2 + 16 * I;
    const uint32_t high = load<uint16_t>(b + 66 + 2 * I);
    auto row = [&](int j) { return book.rows[p[j] | (high >> j & 1) << 8]; };
    const u8x64 v = words([&](int k) { return row(2 * k) | (uint64_t)row(2 * k + 1) << 32; });
    return with_signs(v, load<uint64_t>(b + 74 + 8 * I));
  }
};

// ---- IQ1: in eighths -----------------------------------------------------------------------------

template <int TYPE, int BYTES, int GROUP> struct Eighths : Coded<TYPE, BYTES, GROUP, 9> {
  static constexpr int LEVELS[] = {2, 10, 18, 0};
  static constexpr auto book = codebook<uint64_t>(blocks_iq1_grid, LEVELS);
  // A row is an eighth above -1, 0 or 1; or below, where it is `lowered` (0 or 1).
  KERNELS_INLINE uint64_t row(uint32_t index, uint64_t lowered) {
    return book.rows[index] - 2 * EACH * lowered;
  }
};

struct IQ1_S : Eighths<19, 50, 32> {
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    const uint64_t s = upper_nibbles<2>(b + 35) & 7 * EACH;
    return odd_scales(s, s, half(b) * 0.125f);
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    const uint64_t low = load<uint64_t>(b + 2 + 8 * I);
    const uint32_t two = load<uint32_t>(b + 34 + 4 * I);
    return words([&](int k) {
      const uint32_t high = two >> 16 * (k / 4);
      return row((low >> 8 * k & 255) | (high >> 3 * (k % 4) & 7) << 8, high >> 15 & 1);
    });
  }
};

struct IQ1_M : Eighths<29, 56, 16> {
  // Four words have four scales of three bits each, and above them a quarter of d.
  KERNELS_INLINE void scales(const uint8_t* b, f32x16& s, f32x16&) {
    const uint64_t v = load<uint64_t>(b + 48);
    auto eight = [&](int at) {
      return spread<3>((v >> at & 0xfff) | (v >> (at + 16) & 0xfff) << 12);
    };
    const uint64_t d = (v >> 12 & 15) | (v >> 24 & 0xf0) | (v >> 36 & 0xf00) | (v >> 48 & 0xf000);
    s = Eighths::odd_scales(eight(0), eight(32), half_to_float((uint16_t)d) * 0.125f);
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    const uint64_t low = load<uint64_t>(b + 8 * I);
    const uint32_t nibbles = load<uint32_t>(b + 32 + 4 * I);
    return words([&](int k) {
      const uint32_t high = nibbles >> 4 * k;
      return row((low >> 8 * k & 255) | (high & 7) << 8, high >> 3 & 1);
    });
  }
};

}  // namespace
}  // namespace kernels

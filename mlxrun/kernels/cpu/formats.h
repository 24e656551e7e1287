// How each GGML type's blocks become vectors: 64 unsigned codes at a time, and the scales of their
// groups. A weight is S * (code - OFFSET), or S * code + M where the type has minima.
//
//   TYPE          GGML's number          BLOCK, BYTES   weights and bytes of a block
//   GROUP         weights that share a scale: 16 or 32
//   TOP           the greatest code      OFFSET         the code that stands for 0
//   MINIMUM       whether M is a number of its own
//   SWAPPED       whether the two inner groups of each four of 32 come in each other's place
//
//   scales(b)         GROUP 32: S of 8 groups, then M of 8 groups (without minima, S again)
//   scales(b, S, M)   GROUP 16: 16 of each; M is set only where there are minima
//   codes<I>(b)       the 64 codes number I of 256
//
// b is the first block of 256 weights, a super-block.
#pragma once
#include "../blocks.h"
#include "simd.h"

namespace kernels {
namespace {  // blocks.h's functions belong to the file that includes it, and so do these types

// Types whose codes need all 8 bits: unsigned or signed, as the processor's dot product has it.
constexpr int BIAS = SIGNED_DOT ? 0 : 128;

// 8 bytes for the lower lanes and 8 for the upper ones.
KERNELS_INLINE f32x16 bytes_to_floats(uint64_t low, uint64_t high) {
  return to_float(widen((u8x16)u64x2{low, high}));
}

// Nibbles of 32 bytes: the low ones first.
template <int I> KERNELS_INLINE u8x64 nibbles64(const uint8_t* q) {
  return mask(shift<4 * (I % 2)>(load<u8x64>(q + 64 * (I / 2))), 15);
}
// Nibbles of two blocks of 16 bytes: low, high, low, high.
KERNELS_INLINE u8x64 nibbles32(const uint8_t* a, const uint8_t* b) {
  return mask(shift_quarters<0, 4, 0, 4>(two_pairs(a, b)), 15);
}

// Four codes of two bits a byte, 32 bytes apart.
template <int I> KERNELS_INLINE u8x64 two_bits(const uint8_t* q) {
  constexpr int O = 4 * (I % 2);
  return mask(shift_halves<O, O + 2>(twice(q + 32 * (I / 2))), 3);
}

// The lowest 8 fields of BITS bits, one to each byte.
template <int BITS> KERNELS_INLINE uint64_t spread(uint64_t v) {
#if defined(__BMI2__)
  return _pdep_u64(v, 0x0101010101010101ull * ((1 << BITS) - 1));
#else
  uint64_t r = 0;
  for (int i = 0; i < 8; i++) r |= (v >> BITS * i & ((1 << BITS) - 1)) << 8 * i;
  return r;
#endif
}

// 64 bytes from word(0) ... word(7).
template <class Word> KERNELS_INLINE u8x64 words(Word word) {
  auto pair = [&](int k) { return (u8x16)u64x2{word(k), word(k + 1)}; };
  return quarters<uint8_t>(pair(0), pair(2), pair(4), pair(6));
}

// ---- super-blocks of 256 -------------------------------------------------------------------------

struct SixBitPairs {
  static constexpr int BLOCK = 256, GROUP = 32, OFFSET = 0;
  static constexpr bool MINIMUM = true, SWAPPED = true;
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    // In general registers, which are idle here: the compiler would use the vector pipes.
    const uint64_t ac = load<uint64_t>(b + 4), e = load<uint32_t>(b + 12);
    const uint64_t low = ac & 0x3f3f3f3f3f3f3f3full, high = (ac >> 2) & 0x3030303030303030ull;
    uint64_t s = (uint32_t)low | ((e & 0x0f0f0f0f) | (uint32_t)high) << 32;
    uint64_t m = low >> 32 | ((e >> 4 & 0x0f0f0f0f) | high >> 32) << 32;
    asm("" : "+r"(s), "+r"(m));
#if defined(KERNELS_AVX512)
    // d and -dmin, converted together and spread over the halves.
    const __m128i h = _mm_cvtsi32_si128((int)(load<uint32_t>(b) ^ 0x80000000u));
    const f32x16 d = (f32x16)_mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
        _mm512_castps128_ps512(_mm_cvtph_ps(h)));
#else
    const f32x16 d = lower_upper(half(b), -half(b + 2));
#endif
    return bytes_to_floats(s, m) * d;
  }
};

struct Q4_K : SixBitPairs {
  static constexpr int TYPE = 12, BYTES = 144, TOP = 15;
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return nibbles64<I>(b + 16);
  }
};

struct Q5_K : SixBitPairs {
  static constexpr int TYPE = 13, BYTES = 176, TOP = 31;
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    constexpr int G = 4 * (I / 2) + I % 2;  // the groups of these codes: G and G + 2
    return nibbles64<I>(b + 48) | mask(shift_halves<G - 4, G - 2>(twice(b + 16)), 16);
  }
};

struct Q6_K {
  static constexpr int TYPE = 14, BLOCK = 256, BYTES = 210, GROUP = 16, TOP = 63, OFFSET = 32;
  static constexpr bool MINIMUM = false, SWAPPED = false;
  KERNELS_INLINE void scales(const uint8_t* b, f32x16& s, f32x16&) {
    s = to_float(widen(load<i8x16>(b + 192))) * all(half(b + 208));
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    constexpr int H = I / 2, O = 4 * (I % 2);
    const u8x64 low = mask(shift<O>(load<u8x64>(b + 64 * H)), 15);
    return low | mask(shift_halves<O - 4, O - 2>(twice(b + 128 + 32 * H)), 0x30);
  }
};

struct Q2_K {
  static constexpr int TYPE = 10, BLOCK = 256, BYTES = 84, GROUP = 16, TOP = 3, OFFSET = 0;
  static constexpr bool MINIMUM = true, SWAPPED = false;
  KERNELS_INLINE void scales(const uint8_t* b, f32x16& s, f32x16& m) {
    const u8x16 v = load<u8x16>(b);
    s = to_float(widen(v & 15)) * all(half(b + 80));
    m = to_float(widen(v >> 4)) * all(-half(b + 82));
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return two_bits<I>(b + 16);
  }
};

struct Q3_K {
  static constexpr int TYPE = 11, BLOCK = 256, BYTES = 110, GROUP = 16, TOP = 7, OFFSET = 4;
  static constexpr bool MINIMUM = false, SWAPPED = false;
  KERNELS_INLINE void scales(const uint8_t* b, f32x16& s, f32x16&) {
    const uint64_t low = load<uint64_t>(b + 96), t = load<uint32_t>(b + 104);
    const uint64_t nibbles = 0x0f0f0f0f0f0f0f0full, pairs = 0x3030303030303030ull;
    const uint64_t first = (low & nibbles) | (((t << 4) | (t << 2 & ~3ull) << 32) & pairs);
    const uint64_t second = (low >> 4 & nibbles) | ((t | (t >> 2) << 32) & pairs);
    s = (bytes_to_floats(first, second) - all(32.f)) * all(half(b + 108));
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return two_bits<I>(b + 32) | mask(shift_halves<2 * I - 2, 2 * I - 1>(twice(b)), 4);
  }
};

// The 16 values that four bits stand for, plus the bias of signed codes.
KERNELS_INLINE u8x16 iq4_values() {
  const i8x16 v = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  return (u8x16)v ^ (uint8_t)BIAS;
}

struct IQ4_XS {
  static constexpr int TYPE = 23, BLOCK = 256, BYTES = 136, GROUP = 32, TOP = 255, OFFSET = BIAS;
  static constexpr bool MINIMUM = false, SWAPPED = false;
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    const uint64_t s = spread<4>(load<uint32_t>(b + 4)) | spread<2>(load<uint16_t>(b + 2)) << 4;
    return (bytes_to_floats(s, s) - all(32.f)) * all(half(b));
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return lookup(iq4_values(), nibbles32(b + 8 + 32 * I, b + 24 + 32 * I));
  }
};

// ---- blocks of 32, eight of them together --------------------------------------------------------

template <int TYPE_, int BYTES_, int TOP_, int OFFSET_, bool MINIMUM_> struct Small {
  static constexpr int TYPE = TYPE_, BLOCK = 32, BYTES = BYTES_, GROUP = 32, TOP = TOP_;
  static constexpr int OFFSET = OFFSET_;
  static constexpr bool MINIMUM = MINIMUM_, SWAPPED = false;
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    // Put together in general registers: a store of halves and a load of all would stall.
    uint64_t s[2] = {0, 0}, m[2] = {0, 0};
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
      s[g / 4] |= (uint64_t)load<uint16_t>(b + g * BYTES) << 16 * (g % 4);
      if (MINIMUM) m[g / 4] |= (uint64_t)load<uint16_t>(b + g * BYTES + 2) << 16 * (g % 4);
    }
    const uint64_t h[4] = {s[0], s[1], MINIMUM ? m[0] : s[0], MINIMUM ? m[1] : s[1]};
    return halves(h);
  }
  // The two blocks of codes I.
  template <int I> KERNELS_INLINE const uint8_t* first(const uint8_t* b) { return b + 2 * I * BYTES; }
  template <int I> KERNELS_INLINE const uint8_t* second(const uint8_t* b) {
    return b + (2 * I + 1) * BYTES;
  }
};

struct Q4_0 : Small<2, 18, 15, 8, false> {
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return nibbles32(first<I>(b) + 2, second<I>(b) + 2);
  }
};

struct Q4_1 : Small<3, 20, 15, 0, true> {
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return nibbles32(first<I>(b) + 4, second<I>(b) + 4);
  }
};

struct IQ4_NL : Small<20, 18, 255, BIAS, false> {
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return lookup(iq4_values(), nibbles32(first<I>(b) + 2, second<I>(b) + 2));
  }
};

// Nibbles, and a fifth bit of each of the 32 in four bytes before them.
template <int AT> KERNELS_INLINE u8x64 five_bits(const uint8_t* a, const uint8_t* b) {
  const uint64_t high = load<uint32_t>(a + AT) | (uint64_t)load<uint32_t>(b + AT) << 32;
  return nibbles32(a + AT + 4, b + AT + 4) | mask(spread_bits(high), 16);
}

struct Q5_0 : Small<6, 22, 31, 16, false> {
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return five_bits<2>(first<I>(b), second<I>(b));
  }
};

struct Q5_1 : Small<7, 24, 31, 0, true> {
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return five_bits<4>(first<I>(b), second<I>(b));
  }
};

struct Q8_0 : Small<8, 34, 255, BIAS, false> {
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return two_halves(first<I>(b) + 2, second<I>(b) + 2) ^ splat<uint8_t>(BIAS);
  }
};

// ---- four-bit floats -----------------------------------------------------------------------------

// Twice the values of the four-bit float E2M1, plus 12.
KERNELS_INLINE u8x16 e2m1_values() {
  return u8x16{12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
}

struct MXFP4 : Small<39, 17, 24, 12, false> {
  // Half of 2^(e - 127): the exponent of a float, but for the two that are subnormal.
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    uint64_t e = 0;
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) e |= (uint64_t)b[g * BYTES] << 8 * g;
    const i32x16 v = widen((u8x16)u64x2{e, e});
    const i32x16 subnormal = as<i32x16>(v < splat<int32_t>(2));
    const i32x16 small = (v + 1) << 21;  // 0x00200000 << e for 0 and 1
    return as<f32x16>((small & subnormal) | (((v - 1) << 23) & ~subnormal));
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return lookup(e2m1_values(), nibbles32(first<I>(b) + 1, second<I>(b) + 1));
  }
};

struct NVFP4 {
  static constexpr int TYPE = 40, BLOCK = 64, BYTES = 36, GROUP = 16, TOP = 24, OFFSET = 12;
  static constexpr bool MINIMUM = false, SWAPPED = false;
  // Half of an unsigned E4M3: its bits are those of a float, but for the place of the exponent.
  // Multiplication moves it, and gets subnormals right. The NaN is 0, and the
  // bit of the sign means nothing.
  KERNELS_INLINE void scales(const uint8_t* b, f32x16& s, f32x16&) {
    const uint64_t low = load<uint32_t>(b) | (uint64_t)load<uint32_t>(b + BYTES) << 32;
    const uint64_t high =
        load<uint32_t>(b + 2 * BYTES) | (uint64_t)load<uint32_t>(b + 3 * BYTES) << 32;
    const i32x16 v = widen((u8x16)u64x2{low, high});
    const i32x16 number = as<i32x16>(v != splat<int32_t>(127));
    s = as<f32x16>(((v & 127) << 20) & number) * all(0x1p119f);
  }
  // Each quarter of a block: 8 bytes, whose low halves come before their high ones.
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    const uint8_t* p = b + I * BYTES + 4;
    auto twice8 = [&](int i) { return (u8x16)(u64x2{} + load<uint64_t>(p + 8 * i)); };
    const u8x64 v = quarters<uint8_t>(twice8(0), twice8(1), twice8(2), twice8(3));
    const uint64_t all15 = 0x0f0f0f0f0f0f0f0full;
    const u8x64 nibbles = (v & four_times((u8x16)u64x2{all15, 0})) |
                          (shift<4>(v) & four_times((u8x16)u64x2{0, all15}));
    return lookup(e2m1_values(), nibbles);
  }
};

// ---- one and two bits ----------------------------------------------------------------------------

struct TQ1_0 {
  static constexpr int TYPE = 34, BLOCK = 256, BYTES = 54, GROUP = 32, TOP = 2, OFFSET = 1;
  static constexpr bool MINIMUM = false, SWAPPED = false;
  KERNELS_INLINE f32x16 scales(const uint8_t* b) { return all(half(b + 52)); }
  // A byte is a fraction of 256 with five ternary digits: 32 bytes have digits of 160 weights, 16
  // those of 80, and 4 bytes have four digits each.
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    static constexpr uint16_t powers[4][32] = {
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
         3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3},
        {9,  9,  9,  9,  9,  9,  9,  9,  9,  9,  9,  9,  9,  9,  9,  9,
         27, 27, 27, 27, 27, 27, 27, 27, 27, 27, 27, 27, 27, 27, 27, 27},
        {81, 81, 81, 81, 81, 81, 81, 81, 81, 81, 81, 81, 81, 81, 81, 81,
         1,  1,  1,  1,  1,  1,  1,  1,  3,  3,  3,  3,  3,  3,  3,  3},
        {9,  9,  9,  9,  9,  9,  9,  9,  27, 27, 27, 27, 27, 27, 27, 27,
         81, 81, 81, 81, 81, 81, 81, 81, 1,  1,  3,  3,  9,  9,  27, 27}};
    const u16x32 v = as<u16x32>(bytes<I>(b)), power = load<u16x32>(powers[I]);
    const u8x64 even = as<u8x64>((v * power) & (uint16_t)255);
    const u8x64 odd = as<u8x64>(((v >> (uint16_t)8) * power) << (uint16_t)8);
    // The first digit of the rest of the fraction.
    const u8x64 rest = even | odd;
    return splat<uint8_t>(0) - as<u8x64>(rest > splat<uint8_t>(85)) -
           as<u8x64>(rest > splat<uint8_t>(170));
  }
  template <int I> KERNELS_INLINE u8x64 bytes(const uint8_t* b) {
    if constexpr (I < 2) return twice(b);
    const u8x16 other = load<u8x16>(b + 32);
    if constexpr (I == 2)
      return quarters<uint8_t>(load<u8x16>(b), load<u8x16>(b + 16), other, other);
    const uint64_t four = load<uint32_t>(b + 48) * 0x100000001ull;
    return quarters<uint8_t>(other, other, other, (u8x16)u64x2{four, four});
  }
};

struct TQ2_0 {
  static constexpr int TYPE = 35, BLOCK = 256, BYTES = 66, GROUP = 32, TOP = 3, OFFSET = 1;
  static constexpr bool MINIMUM = false, SWAPPED = false;
  KERNELS_INLINE f32x16 scales(const uint8_t* b) { return all(half(b + 64)); }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) { return two_bits<I>(b); }
};

struct Q1_0 {
  static constexpr int TYPE = 41, BLOCK = 128, BYTES = 18, GROUP = 32, TOP = 2, OFFSET = 1;
  static constexpr bool MINIMUM = false, SWAPPED = false;
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    auto four = [&](int i) { return load<uint16_t>(b + i * BYTES) * 0x0001000100010001ull; };
    const uint64_t h[4] = {four(0), four(1), four(0), four(1)};
    return halves(h);
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    return mask(spread_bits(load<uint64_t>(b + I / 2 * BYTES + 2 + 8 * (I % 2))), 2);
  }
};

struct Q2_0 {
  static constexpr int TYPE = 42, BLOCK = 64, BYTES = 18, GROUP = 32, TOP = 3, OFFSET = 1;
  static constexpr bool MINIMUM = false, SWAPPED = false;
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    auto two = [&](int i) { return load<uint16_t>(b + i * BYTES) * 0x00010001ull; };
    const uint64_t low = two(0) | two(1) << 32, high = two(2) | two(3) << 32;
    const uint64_t h[4] = {low, high, low, high};
    return halves(h);
  }
  // Neighbors share a byte: it becomes the lowest of four, and then moves by its codes.
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    i32x16 v = widen(load<u8x16>(b + I * BYTES + 2));
    v = v | (v << 12);
    v = v | (v << 6);
    return mask(as<u8x64>(v), 3);
  }
};

// ---- a type without a decoder of its own here: by that of blocks.h -------------------------------

using Decoder = void (*)(const uint8_t* row, int i, blocks_code* codes, float* scales);

template <int TYPE_, int BLOCK_, int BYTES_, int GROUP_, int LOW, int HIGH, int ZERO, bool MINIMUM_,
          Decoder DECODER>
struct Plain {
  static constexpr int TYPE = TYPE_, BLOCK = BLOCK_, BYTES = BYTES_, GROUP = GROUP_;
  static constexpr int TOP = HIGH - (LOW < 0 ? LOW : 0), OFFSET = ZERO - (LOW < 0 ? LOW : 0);
  static constexpr bool MINIMUM = MINIMUM_, SWAPPED = false;
  static_assert(TOP < 128 && (!MINIMUM || OFFSET == 0));

  // Once in the object: copies would take the compiler seconds, and gain little.
  __attribute__((noinline)) static void read(const uint8_t* b, int i, blocks_code* codes,
                                             float* pair) {
    DECODER(b, i, codes, pair);
  }
  KERNELS_INLINE f32x16 scales(const uint8_t* b) {
    float s[16] = {};
    for (int g = 0; g < 8; g++) {
      blocks_code codes[16];
      float pair[2];
      read(b, 2 * g, codes, pair);
      s[g] = pair[0];
      s[8 + g] = MINIMUM ? pair[1] : pair[0];
    }
    return load<f32x16>(s);
  }
  KERNELS_INLINE void scales(const uint8_t* b, f32x16& s, f32x16& m) {
    float scale[16] = {}, minimum[16] = {};
    for (int g = 0; g < 16; g++) {
      blocks_code codes[16];
      float pair[2];
      read(b, g, codes, pair);
      scale[g] = pair[0];
      minimum[g] = pair[1];
    }
    s = load<f32x16>(scale);
    m = load<f32x16>(minimum);
  }
  template <int I> KERNELS_INLINE u8x64 codes(const uint8_t* b) {
    blocks_code c[64] = {};
    float pair[2];
    for (int i = 0; i < 4; i++) read(b, 4 * I + i, c + 16 * i, pair);
    return load<u8x64>(c) + splat<uint8_t>(OFFSET - ZERO);
  }
};

// ---- floats --------------------------------------------------------------------------------------

struct F32 {
  static constexpr int TYPE = 0, BYTES = 4;
  KERNELS_INLINE f32x16 sixteen(const uint8_t* p) { return load<f32x16>(p); }
};

struct F16 {
  static constexpr int TYPE = 1, BYTES = 2;
  KERNELS_INLINE f32x16 sixteen(const uint8_t* p) { return halves(p); }
};

struct BF16 {
  static constexpr int TYPE = 30, BYTES = 2;
  KERNELS_INLINE f32x16 sixteen(const uint8_t* p) { return upper_halves(p); }
};

}  // namespace
}  // namespace kernels

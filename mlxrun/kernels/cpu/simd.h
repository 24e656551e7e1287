// Vectors of 64 bytes: one register with AVX-512, two with AVX2, four with NEON and elsewhere.
//
// Where a register has 64 bytes they are the compiler's own vectors (GCC 9+ and Clang); elsewhere
// `Wide`, a few such vectors with the same operators (compilers keep vectors that are wider than a
// register in memory). Only what the compiler's vectors cannot say is spelled per processor.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
// GCC 12's own headers leave unused lanes undefined, and then warn of it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define KERNELS_AVX512 1
#elif defined(__AVX2__)
#define KERNELS_AVX2 1
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define KERNELS_NEON 1
#endif

#define KERNELS_INLINE static inline __attribute__((always_inline))

namespace kernels {

#if defined(KERNELS_AVX512)
constexpr int WIDTH = 64;  // bytes of a register
#elif defined(KERNELS_AVX2)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
constexpr int PARTS = 64 / WIDTH;
#if defined(KERNELS_AVX512) || defined(KERNELS_AVX2) || defined(KERNELS_NEON)
constexpr bool PORTABLE = false;
#else
constexpr bool PORTABLE = true;  // has no instructions for what it does: small rather than fast
#endif

// The compiler's vector of WIDTH bytes.
template <class T> struct Register {
  typedef T type __attribute__((vector_size(WIDTH)));
};
template <class T> using Part = typename Register<T>::type;

#if defined(KERNELS_AVX512)

template <class T> using Vector = Part<T>;
template <class T> KERNELS_INLINE Part<T>& part(Part<T>& v, int) { return v; }

#else

template <class T> struct Wide {
  Part<T> parts[PARTS];
  T operator[](int i) const { return parts[i / (WIDTH / sizeof(T))][i % (WIDTH / sizeof(T))]; }
};
template <class T> using Vector = Wide<T>;

#define KERNELS_BINARY(op)                                                                      \
  template <class T> KERNELS_INLINE Wide<T> operator op(const Wide<T>& a, const Wide<T>& b) {   \
    Wide<T> c;                                                                                  \
    for (int i = 0; i < PARTS; i++) c.parts[i] = a.parts[i] op b.parts[i];                      \
    return c;                                                                                   \
  }                                                                                             \
  template <class T> KERNELS_INLINE Wide<T> operator op(const Wide<T>& a, T b) {                \
    Wide<T> c;                                                                                  \
    for (int i = 0; i < PARTS; i++) c.parts[i] = a.parts[i] op b;                               \
    return c;                                                                                   \
  }
KERNELS_BINARY(+)
KERNELS_BINARY(-)
KERNELS_BINARY(*)
KERNELS_BINARY(/)
KERNELS_BINARY(&)
KERNELS_BINARY(|)
KERNELS_BINARY(^)
KERNELS_BINARY(<<)
KERNELS_BINARY(>>)
#undef KERNELS_BINARY

template <class T> KERNELS_INLINE Wide<T> operator~(const Wide<T>& a) { return a ^ (T)~T{}; }

// Comparisons give -1 or 0 in integers of the same width.
#define KERNELS_COMPARE(op)                                                                      \
  template <class T> KERNELS_INLINE auto operator op(const Wide<T>& a, const Wide<T>& b) {      \
    Wide<typename Integer<T>::type> c;                                                           \
    for (int i = 0; i < PARTS; i++)                                                              \
      c.parts[i] = (Part<typename Integer<T>::type>)(a.parts[i] op b.parts[i]);                  \
    return c;                                                                                    \
  }
template <class T> struct Integer { typedef T type; };
template <> struct Integer<float> { typedef int32_t type; };
template <> struct Integer<uint32_t> { typedef int32_t type; };
template <> struct Integer<uint16_t> { typedef int16_t type; };
template <> struct Integer<uint8_t> { typedef int8_t type; };
KERNELS_COMPARE(<)
KERNELS_COMPARE(>)
KERNELS_COMPARE(<=)
KERNELS_COMPARE(>=)
KERNELS_COMPARE(==)
KERNELS_COMPARE(!=)
#undef KERNELS_COMPARE

#endif

typedef Vector<float> f32x16;
typedef Vector<int32_t> i32x16;
typedef Vector<uint32_t> u32x16;
typedef Vector<int16_t> i16x32;
typedef Vector<uint16_t> u16x32;
typedef Vector<uint8_t> u8x64;
typedef Vector<int8_t> i8x64;

// Small vectors of 16 bytes, everywhere one register.
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint64_t u64x2 __attribute__((vector_size(16)));

// ---- memory, casts, constants --------------------------------------------------------------------

template <class V> KERNELS_INLINE V load(const void* p) {
  V v;
#if defined(KERNELS_AVX512)
  std::memcpy(&v, p, sizeof v);
#else
  if constexpr (sizeof v == 64) {  // by registers: a copy of 64 bytes would go through memory
    for (int i = 0; i < PARTS; i++)
      std::memcpy(&v.parts[i], static_cast<const char*>(p) + WIDTH * i, WIDTH);
  } else {
    std::memcpy(&v, p, sizeof v);
  }
#endif
  return v;
}

template <class V> KERNELS_INLINE void store(void* p, const V& v) {
#if defined(KERNELS_AVX512)
  std::memcpy(p, &v, sizeof v);
#else
  if constexpr (sizeof v == 64) {
    for (int i = 0; i < PARTS; i++)
      std::memcpy(static_cast<char*>(p) + WIDTH * i, &v.parts[i], WIDTH);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
#endif
}

// The same bits as another type.
template <class V, class W> KERNELS_INLINE V as(const W& w) {
#if defined(KERNELS_AVX512)
  return (V)w;
#else
  if constexpr (sizeof(V) == 64) {
    V v;
    for (int i = 0; i < PARTS; i++) v.parts[i] = (decltype(v.parts[0] + v.parts[0]))w.parts[i];
    return v;
  } else {
    return (V)w;
  }
#endif
}

template <class T> KERNELS_INLINE Vector<T> splat(T x) {
#if defined(KERNELS_AVX512)
  return Vector<T>{} + x;
#else
  Vector<T> v;
  for (int i = 0; i < PARTS; i++) v.parts[i] = Part<T>{} + x;
  return v;
#endif
}

KERNELS_INLINE f32x16 all(float x) { return splat(x); }

// One vector from four of 16 bytes.
template <class T> KERNELS_INLINE Vector<T> quarters(u8x16 a, u8x16 b, u8x16 c, u8x16 d) {
#if defined(KERNELS_AVX512)
  __m512i v = _mm512_castsi128_si512((__m128i)a);
  v = _mm512_inserti32x4(v, (__m128i)b, 1);
  v = _mm512_inserti32x4(v, (__m128i)c, 2);
  return (Vector<T>)_mm512_inserti32x4(v, (__m128i)d, 3);
#elif defined(KERNELS_AVX2)
  return {{(Part<T>)_mm256_set_m128i((__m128i)b, (__m128i)a),
           (Part<T>)_mm256_set_m128i((__m128i)d, (__m128i)c)}};
#else
  return {{(Part<T>)a, (Part<T>)b, (Part<T>)c, (Part<T>)d}};
#endif
}

// 16 bytes in each quarter.
KERNELS_INLINE u8x64 four_times(u8x16 a) {
#if defined(KERNELS_AVX512)
  return (u8x64)_mm512_broadcast_i32x4((__m128i)a);
#else
  return quarters<uint8_t>(a, a, a, a);
#endif
}

// 32 bytes in each half.
KERNELS_INLINE u8x64 twice(const uint8_t* p) {
#if defined(KERNELS_AVX512)
  return (u8x64)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
#elif defined(KERNELS_AVX2)
  const Part<uint8_t> v = (Part<uint8_t>)_mm256_loadu_si256((const __m256i*)p);
  return {{v, v}};
#else
  const u8x16 a = load<u8x16>(p), b = load<u8x16>(p + 16);
  return {{a, b, a, b}};
#endif
}

// 32 bytes of each of two places.
KERNELS_INLINE u8x64 two_halves(const uint8_t* p, const uint8_t* q) {
#if defined(KERNELS_AVX512)
  return (u8x64)_mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)),
      _mm256_loadu_si256((const __m256i*)q), 1);
#else
  u8x64 v;
  for (int i = 0; i < PARTS / 2; i++) {
    std::memcpy(&v.parts[i], p + WIDTH * i, WIDTH);
    std::memcpy(&v.parts[PARTS / 2 + i], q + WIDTH * i, WIDTH);
  }
  return v;
#endif
}

// 16 bytes of each of two places, both twice: p p q q.
KERNELS_INLINE u8x64 two_pairs(const uint8_t* p, const uint8_t* q) {
#if defined(KERNELS_AVX512)
  const __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  return (u8x64)_mm512_mask_broadcast_i32x4(v, 0xff00, _mm_loadu_si128((const __m128i*)q));
#else
  const u8x16 a = load<u8x16>(p), b = load<u8x16>(q);
  return quarters<uint8_t>(a, a, b, b);
#endif
}

#if !defined(KERNELS_AVX512) && !defined(KERNELS_AVX2)
// Four lanes of the eight of a and b.
template <int A, int B, int C, int D, class V> KERNELS_INLINE V pick4(const V& a, const V& b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, A, B, C, D);
#else
  return __builtin_shuffle(a, b, Part<int32_t>{A, B, C, D});
#endif
}
#endif

// ---- bits ----------------------------------------------------------------------------------------

// Shifts 16-bit lanes right by A, B, C, D in the four quarters; negative: left. Bits that cross
// from byte to byte are the caller's to mask.
template <int A, int B, int C, int D> KERNELS_INLINE u8x64 shift_quarters(const u8x64& v) {
  static_assert((A >= 0 && B >= 0 && C >= 0 && D >= 0) || (A <= 0 && B <= 0 && C <= 0 && D <= 0));
  constexpr bool left = A < 0 || B < 0 || C < 0 || D < 0;
  constexpr int s[4] = {left ? -A : A, left ? -B : B, left ? -C : C, left ? -D : D};
#if defined(KERNELS_AVX512)
  constexpr auto lanes = [](int n) { return 0x0001000100010001ll * n; };
  const __m512i by = _mm512_setr_epi64(lanes(s[0]), lanes(s[0]), lanes(s[1]), lanes(s[1]),
                                       lanes(s[2]), lanes(s[2]), lanes(s[3]), lanes(s[3]));
  return left ? (u8x64)_mm512_sllv_epi16((__m512i)v, by)
              : (u8x64)_mm512_srlv_epi16((__m512i)v, by);
#else
  u8x64 r;
  for (int i = 0; i < PARTS; i++) {
    const Part<uint16_t> w = (Part<uint16_t>)v.parts[i];
    if constexpr (PARTS == 2) {  // AVX2 has no variable shift of 16 bits
      const Part<uint16_t> a = left ? w << s[2 * i] : w >> s[2 * i];
      const Part<uint16_t> b = left ? w << s[2 * i + 1] : w >> s[2 * i + 1];
#if defined(KERNELS_AVX2)
      r.parts[i] = s[2 * i] == s[2 * i + 1]
                       ? (Part<uint8_t>)a
                       : (Part<uint8_t>)_mm256_blend_epi32((__m256i)a, (__m256i)b, 0xf0);
#endif
      (void)b;
    } else {
      r.parts[i] = (Part<uint8_t>)(left ? w << s[i] : w >> s[i]);
    }
  }
  return r;
#endif
}
template <int A, int B> KERNELS_INLINE u8x64 shift_halves(const u8x64& v) {
  return shift_quarters<A, A, B, B>(v);
}
template <int A> KERNELS_INLINE u8x64 shift(const u8x64& v) {
  if constexpr (A == 0) return v;
#if defined(KERNELS_AVX512)
  return A < 0 ? (u8x64)_mm512_slli_epi16((__m512i)v, A < 0 ? -A : 0)
               : (u8x64)_mm512_srli_epi16((__m512i)v, A < 0 ? 0 : A);
#else
  return shift_quarters<A, A, A, A>(v);
#endif
}

KERNELS_INLINE u8x64 mask(const u8x64& v, int bits) { return v & splat<uint8_t>((uint8_t)bits); }

#if !defined(KERNELS_AVX512) && !defined(KERNELS_AVX2) && !defined(KERNELS_NEON)
// Not inline: compilers would take seconds over the copies.
__attribute__((noinline, unused)) static u8x16 lookup_each(u8x16 table, u8x16 index) {
  uint8_t t[16], v[16];
  store(t, table);
  store(v, index);
  for (int i = 0; i < 16; i++) v[i] = t[v[i] & 15];
  return load<u8x16>(v);
}
#endif

// table[index], for indices below 16.
KERNELS_INLINE u8x64 lookup(u8x16 table, const u8x64& index) {
#if defined(KERNELS_AVX512)
  return (u8x64)_mm512_shuffle_epi8(_mm512_broadcast_i32x4((__m128i)table), (__m512i)index);
#else
  u8x64 r;
  for (int i = 0; i < PARTS; i++) {
#if defined(KERNELS_AVX2)
    r.parts[i] = (Part<uint8_t>)_mm256_shuffle_epi8(
        _mm256_broadcastsi128_si256((__m128i)table), (__m256i)index.parts[i]);
#elif defined(KERNELS_NEON)
    r.parts[i] = (u8x16)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index.parts[i]);
#else
    r.parts[i] = lookup_each(table, index.parts[i]);
#endif
  }
  return r;
#endif
}

// Bytes of 255 where a bit is set, 0 elsewhere.
KERNELS_INLINE u8x64 spread_bits(uint64_t bits) {
#if defined(KERNELS_AVX512)
  return (u8x64)_mm512_movm_epi8(bits);
#else
  // Each byte of the bits eight times, then one bit of each.
  auto eight = [](uint64_t byte) { return (byte & 255) * 0x0101010101010101ull; };
  u8x16 q[4];
  for (int i = 0; i < 4; i++) q[i] = (u8x16)u64x2{eight(bits >> 16 * i), eight(bits >> (16 * i + 8))};
  const u8x64 one = four_times((u8x16)(u64x2{} + 0x8040201008040201ull));
  return as<u8x64>((quarters<uint8_t>(q[0], q[1], q[2], q[3]) & one) == one);
#endif
}

// ---- numbers -------------------------------------------------------------------------------------

// a * b + c; one rounding where the processor has it.
KERNELS_INLINE f32x16 fma(const f32x16& a, const f32x16& b, const f32x16& c) {
#if defined(KERNELS_AVX512)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  f32x16 r;
  for (int i = 0; i < PARTS; i++) {
#if defined(__FMA__)
    r.parts[i] = (Part<float>)_mm256_fmadd_ps((__m256)a.parts[i], (__m256)b.parts[i],
                                              (__m256)c.parts[i]);
#elif defined(__ARM_NEON)
    r.parts[i] = (Part<float>)vfmaq_f32((float32x4_t)c.parts[i], (float32x4_t)a.parts[i],
                                        (float32x4_t)b.parts[i]);
#else
    r.parts[i] = a.parts[i] * b.parts[i] + c.parts[i];
#endif
  }
  return r;
#endif
}

// The sum of the lanes, always in the same order.
KERNELS_INLINE float sum(const f32x16& v) {
#if defined(KERNELS_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  Part<float> s = v.parts[0] + v.parts[1];
  if constexpr (PARTS == 4) s += v.parts[2 % PARTS] + v.parts[3 % PARTS];
  float total = 0;
  for (int i = 0; i < WIDTH / 4; i++) total += s[i];
  return total;
#endif
}

KERNELS_INLINE int32_t sum(const i32x16& v) {
#if defined(KERNELS_AVX512)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  Part<int32_t> s = v.parts[0] + v.parts[1];
  if constexpr (PARTS == 4) s += v.parts[2 % PARTS] + v.parts[3 % PARTS];
  int32_t total = 0;
  for (int i = 0; i < WIDTH / 4; i++) total += s[i];
  return total;
#endif
}

// The greatest of all lanes of both.
KERNELS_INLINE int32_t greatest(const i32x16& a, const i32x16& b) {
#if defined(KERNELS_AVX512)
  return _mm512_reduce_max_epi32(_mm512_max_epi32((__m512i)a, (__m512i)b));
#else
  Part<int32_t> s = a.parts[0];
  auto more = [&](const Part<int32_t>& v) { s = v > s ? v : s; };
  for (int i = 0; i < PARTS; i++) more(a.parts[i]), more(b.parts[i]);
  int32_t top = s[0];
  for (int i = 1; i < WIDTH / 4; i++) top = s[i] > top ? s[i] : top;
  return top;
#endif
}

KERNELS_INLINE float as_float(int32_t bits) { return load<float>(&bits); }

KERNELS_INLINE f32x16 to_float(const i32x16& v) {
#if defined(KERNELS_AVX512)
  return (f32x16)_mm512_cvtepi32_ps((__m512i)v);
#else
  f32x16 r;
  for (int i = 0; i < PARTS; i++) r.parts[i] = __builtin_convertvector(v.parts[i], Part<float>);
  return r;
#endif
}

// The nearest integer, ties to even.
KERNELS_INLINE i32x16 to_int(const f32x16& v) {
#if defined(KERNELS_AVX512)
  return (i32x16)_mm512_cvtps_epi32((__m512)v);
#else
  i32x16 r;
  for (int i = 0; i < PARTS; i++) {
#if defined(KERNELS_AVX2)
    r.parts[i] = (Part<int32_t>)_mm256_cvtps_epi32((__m256)v.parts[i]);
#elif defined(__SSE2__)
    r.parts[i] = (Part<int32_t>)_mm_cvtps_epi32((__m128)v.parts[i]);
#elif defined(__ARM_NEON)
    r.parts[i] = (Part<int32_t>)vcvtnq_s32_f32((float32x4_t)v.parts[i]);
#else
    for (int j = 0; j < 4; j++) r.parts[i][j] = (int32_t)std::lrintf(v.parts[i][j]);
#endif
  }
  return r;
#endif
}

// 16 bytes as 16 integers.
KERNELS_INLINE i32x16 widen(u8x16 v) {
#if defined(KERNELS_AVX512)
  return (i32x16)_mm512_cvtepu8_epi32((__m128i)v);
#elif defined(KERNELS_AVX2)
  return {{(Part<int32_t>)_mm256_cvtepu8_epi32((__m128i)v),
           (Part<int32_t>)_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)v, 8))}};
#elif defined(__SSE2__)
  const __m128i z = _mm_setzero_si128();
  const __m128i a = _mm_unpacklo_epi8((__m128i)v, z), b = _mm_unpackhi_epi8((__m128i)v, z);
  return {{(Part<int32_t>)_mm_unpacklo_epi16(a, z), (Part<int32_t>)_mm_unpackhi_epi16(a, z),
           (Part<int32_t>)_mm_unpacklo_epi16(b, z), (Part<int32_t>)_mm_unpackhi_epi16(b, z)}};
#elif defined(__ARM_NEON)
  const uint16x8_t a = vmovl_u8(vget_low_u8((uint8x16_t)v));
  const uint16x8_t b = vmovl_u8(vget_high_u8((uint8x16_t)v));
  return {{(Part<int32_t>)vmovl_u16(vget_low_u16(a)), (Part<int32_t>)vmovl_u16(vget_high_u16(a)),
           (Part<int32_t>)vmovl_u16(vget_low_u16(b)), (Part<int32_t>)vmovl_u16(vget_high_u16(b))}};
#else
  i32x16 r;
  for (int i = 0; i < 4; i++)
    r.parts[i] = Part<int32_t>{v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]};
  return r;
#endif
}
KERNELS_INLINE i32x16 widen(i8x16 v) {
#if defined(KERNELS_AVX512)
  return (i32x16)_mm512_cvtepi8_epi32((__m128i)v);
#elif defined(KERNELS_AVX2)
  return {{(Part<int32_t>)_mm256_cvtepi8_epi32((__m128i)v),
           (Part<int32_t>)_mm256_cvtepi8_epi32(_mm_srli_si128((__m128i)v, 8))}};
#else
  return (widen((u8x16)v) ^ 128) - 128;
#endif
}
// Quarter Q of 64 bytes.
template <int Q> KERNELS_INLINE u8x16 quarter(const u8x64& v) {
#if defined(KERNELS_AVX512)
  return (u8x16)_mm512_extracti32x4_epi32((__m512i)v, Q);
#elif defined(KERNELS_AVX2)
  return (u8x16)_mm256_extracti128_si256((__m256i)v.parts[Q / 2], Q % 2);
#else
  return (u8x16)v.parts[Q];
#endif
}

// The low bytes of 16 integers.
KERNELS_INLINE void store_bytes(int8_t* p, const i32x16& v) {
#if defined(KERNELS_AVX512)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
  const i32x16 bytes = v << 24 >> 24;
#if defined(KERNELS_AVX2)
  const __m256i w = _mm256_packs_epi32((__m256i)bytes.parts[0], (__m256i)bytes.parts[1]);
  const __m256i in_order = _mm256_permute4x64_epi64(w, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(in_order),
                                                _mm256_extracti128_si256(in_order, 1)));
#elif defined(__SSE2__)
  _mm_storeu_si128(
      (__m128i*)p,
      _mm_packs_epi16(_mm_packs_epi32((__m128i)bytes.parts[0], (__m128i)bytes.parts[1]),
                      _mm_packs_epi32((__m128i)bytes.parts[2], (__m128i)bytes.parts[3])));
#else
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) p[4 * i + j] = (int8_t)bytes.parts[i][j];
#endif
#endif
}

KERNELS_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#elif defined(__ARM_FP16_FORMAT_IEEE)
  __fp16 f;
  std::memcpy(&f, &h, 2);
  return (float)f;
#else
  // The exponent moves by 112; what that gets wrong (subnormals, infinity, NaN) is mended by one
  // multiplication: a half's smallest numbers are normal floats.
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
  uint32_t bits;
  float f;
  if (rest >= 0x0f800000) {
    bits = rest | 0x70000000;
    std::memcpy(&f, &bits, 4);
  } else {
    std::memcpy(&f, &rest, 4);
    f *= 0x1p112f;
  }
  std::memcpy(&bits, &f, 4);
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}
KERNELS_INLINE float half(const uint8_t* p) { return half_to_float(load<uint16_t>(p)); }

// 16 halves as floats.
KERNELS_INLINE f32x16 halves(const void* p) {
#if defined(KERNELS_AVX512)
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(KERNELS_AVX2)
  return {{(Part<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
           (Part<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))}};
#else
  f32x16 r;
#if defined(__ARM_NEON)
  for (int i = 0; i < 4; i++)
    r.parts[i] = (Part<float>)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p + 4 * i)));
#else
  // half_to_float for all at once: the exponent moves by multiplication, which gets subnormals
  // right; infinity and NaN are set apart.
  uint16_t h[16];
  uint32_t w[16];
  std::memcpy(h, p, sizeof h);
  for (int i = 0; i < 16; i++) w[i] = h[i];
  for (int i = 0; i < 4; i++) {
    const Part<uint32_t> v = load<Part<uint32_t>>(w + 4 * i), rest = (v & 0x7fff) << 13;
    const Part<uint32_t> number = (Part<uint32_t>)((Part<float>)rest * 0x1p112f);
    const Part<uint32_t> other = rest | 0x70000000;
    const Part<uint32_t> large = (Part<uint32_t>)(rest >= 0x0f800000);
    r.parts[i] = (Part<float>)((number & ~large) | (other & large) | (v & 0x8000) << 16);
  }
#endif
  return r;
#endif
}

// 16 bfloat16 as floats.
KERNELS_INLINE f32x16 upper_halves(const void* p) {
#if defined(KERNELS_AVX512)
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)),
                                   16);
#else
  uint16_t h[16];
  uint32_t w[16];
  std::memcpy(h, p, sizeof h);
  for (int i = 0; i < 16; i++) w[i] = (uint32_t)h[i] << 16;
  return load<f32x16>(w);
#endif
}

// Each quarter filled with one lane of v: A, B, C, D.
template <int A, int B, int C, int D> KERNELS_INLINE f32x16 fill(const f32x16& v) {
#if defined(KERNELS_AVX512)
  return (f32x16)_mm512_permutexvar_ps(
      _mm512_setr_epi32(A, A, A, A, B, B, B, B, C, C, C, C, D, D, D, D), (__m512)v);
#elif defined(KERNELS_AVX2)
  static_assert(A / 8 == B / 8 && C / 8 == D / 8);
  constexpr int a = A % 8, b = B % 8, c = C % 8, d = D % 8;
  return {{(Part<float>)_mm256_permutevar8x32_ps((__m256)v.parts[A / 8],
                                                 _mm256_setr_epi32(a, a, a, a, b, b, b, b)),
           (Part<float>)_mm256_permutevar8x32_ps((__m256)v.parts[C / 8],
                                                 _mm256_setr_epi32(c, c, c, c, d, d, d, d))}};
#else
  const Part<float> z = {};
  return {{z + v.parts[A / 4][A % 4], z + v.parts[B / 4][B % 4], z + v.parts[C / 4][C % 4],
           z + v.parts[D / 4][D % 4]}};
#endif
}

// a in the lower 8 lanes and b in the upper ones.
KERNELS_INLINE f32x16 lower_upper(float a, float b) {
  f32x16 r = all(a);
#if defined(KERNELS_AVX512)
  r = (f32x16)_mm512_mask_broadcastss_ps((__m512)r, 0xff00, _mm_set_ss(b));
#else
  for (int i = PARTS / 2; i < PARTS; i++) r.parts[i] = Part<float>{} + b;
#endif
  return r;
}

// acc + v in the upper 8 lanes, acc in the others.
KERNELS_INLINE f32x16 add_upper(f32x16 acc, const f32x16& v) {
#if defined(KERNELS_AVX512)
  return (f32x16)_mm512_mask_add_ps((__m512)acc, 0xff00, (__m512)acc, (__m512)v);
#else
  for (int i = PARTS / 2; i < PARTS; i++) acc.parts[i] += v.parts[i];
  return acc;
#endif
}

#if !defined(KERNELS_AVX512)
// Four by four dwords, in each 16 bytes by themselves.
KERNELS_INLINE void transpose4(Part<uint32_t>& a, Part<uint32_t>& b, Part<uint32_t>& c,
                               Part<uint32_t>& d) {
#if defined(KERNELS_AVX2)
  const __m256i ab = _mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
  const __m256i AB = _mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
  const __m256i cd = _mm256_unpacklo_epi32((__m256i)c, (__m256i)d);
  const __m256i CD = _mm256_unpackhi_epi32((__m256i)c, (__m256i)d);
  a = (Part<uint32_t>)_mm256_unpacklo_epi64(ab, cd);
  b = (Part<uint32_t>)_mm256_unpackhi_epi64(ab, cd);
  c = (Part<uint32_t>)_mm256_unpacklo_epi64(AB, CD);
  d = (Part<uint32_t>)_mm256_unpackhi_epi64(AB, CD);
#else
  const auto ab = pick4<0, 4, 1, 5>(a, b), AB = pick4<2, 6, 3, 7>(a, b);
  const auto cd = pick4<0, 4, 1, 5>(c, d), CD = pick4<2, 6, 3, 7>(c, d);
  a = pick4<0, 1, 4, 5>(ab, cd);
  b = pick4<2, 3, 6, 7>(ab, cd);
  c = pick4<0, 1, 4, 5>(AB, CD);
  d = pick4<2, 3, 6, 7>(AB, CD);
#endif
}
#endif

// The dwords of 16 rows: vector i has number i of each.
KERNELS_INLINE void transpose(u32x16 (&r)[16]) {
#if defined(KERNELS_AVX512)
  __m512i t[16], v[16];
  for (int i = 0; i < 16; i++) v[i] = (__m512i)r[i];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = (u32x16)_mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = (u32x16)_mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = (u32x16)_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = (u32x16)_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
#elif defined(KERNELS_AVX2)
  u32x16 t[16];
  for (int half = 0; half < 2; half++)  // of the dwords
    for (int b = 0; b < 2; b++) {       // of the rows
      Part<uint32_t> v[8];
      for (int i = 0; i < 8; i++) v[i] = r[8 * b + i].parts[half];
      transpose4(v[0], v[1], v[2], v[3]);
      transpose4(v[4], v[5], v[6], v[7]);
      for (int i = 0; i < 4; i++) {
        t[8 * half + i].parts[b] =
            (Part<uint32_t>)_mm256_permute2x128_si256((__m256i)v[i], (__m256i)v[4 + i], 0x20);
        t[8 * half + 4 + i].parts[b] =
            (Part<uint32_t>)_mm256_permute2x128_si256((__m256i)v[i], (__m256i)v[4 + i], 0x31);
      }
    }
  for (int i = 0; i < 16; i++) r[i] = t[i];
#else
  u32x16 t[16];
  for (int a = 0; a < 4; a++)
    for (int b = 0; b < 4; b++) {
      Part<uint32_t> v[4];
      for (int i = 0; i < 4; i++) v[i] = r[4 * b + i].parts[a];
      transpose4(v[0], v[1], v[2], v[3]);
      for (int i = 0; i < 4; i++) t[4 * a + i].parts[b] = v[i];
    }
  for (int i = 0; i < 16; i++) r[i] = t[i];
#endif
}

KERNELS_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// ---- products of bytes ---------------------------------------------------------------------------

#if defined(KERNELS_NEON)
constexpr bool SIGNED_DOT = true;  // codes above 127 have to be given as signed ones
#else
constexpr bool SIGNED_DOT = false;
#endif

// acc + sums of four products of neighbors. Codes go up to TOP: where that is below 128, two
// products fit 16 bits, and processors without a dot product need half the work.
template <int TOP>
KERNELS_INLINE i32x16 dot(const i32x16& acc, const u8x64& codes, const i8x64& x) {
#if defined(KERNELS_AVX512)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
#else
  i32x16 r;
  for (int i = 0; i < PARTS; i++) {
#if defined(KERNELS_NEON)
    r.parts[i] = (Part<int32_t>)vdotq_s32((int32x4_t)acc.parts[i], (int8x16_t)codes.parts[i],
                                          (int8x16_t)x.parts[i]);
#elif defined(KERNELS_AVX2)
    const __m256i c = (__m256i)codes.parts[i], y = (__m256i)x.parts[i];
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i d;
    if (TOP < 128) {
      d = _mm256_madd_epi16(_mm256_maddubs_epi16(c, y), ones);
    } else {
      // Two products may saturate 16 bits, one cannot: even and odd bytes apart.
      const __m256i even = _mm256_and_si256(c, _mm256_set1_epi16(255));
      const __m256i odd = _mm256_andnot_si256(_mm256_set1_epi16(255), c);
      d = _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(even, y), ones),
                           _mm256_madd_epi16(_mm256_maddubs_epi16(odd, y), ones));
    }
    r.parts[i] = (Part<int32_t>)_mm256_add_epi32((__m256i)acc.parts[i], d);
#else
    // 255 * 128 fits 16 bits: even and odd bytes apart, then both halves of 32 bits.
    typedef Part<int16_t> Short;
    typedef Part<int32_t> Int;
    const Short c = (Short)codes.parts[i], y = (Short)x.parts[i];
    const Short even = (c & 255) * (Short)((Short)(y << 8) >> 8);
    const Short odd = (Short)((Part<uint16_t>)c >> 8) * (y >> 8);
    auto pairs = [](Short s) { return ((Int)s << 16 >> 16) + ((Int)s >> 16); };
    if (TOP < 128) r.parts[i] = acc.parts[i] + pairs(even + odd);
    else r.parts[i] = acc.parts[i] + pairs(even) + pairs(odd);
#endif
  }
  return r;
#endif
}

}  // namespace kernels

// Exponentials, and the gates of feed-forward layers made of them, for registers of floats.
#pragma once
#include <cmath>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace kernels {

// One register of floats. Loops over floats have this width, for compilers may take wider vectors
// apart, or keep them in memory.
typedef Part<float> f32xn;
typedef Part<int32_t> i32xn;
constexpr int LANES = WIDTH / sizeof(float);

// The integers of a vector's comparisons, as wide as its floats.
template <class V> using Ints = decltype(V{} < V{});

// e^x within 2 ulp; infinite from 88.73 on, denormal below -87.3, and zero from -104 on.
// Method: Cephes' expf (Moshier), 2^n times a polynomial of the rest.
template <class V> KERNELS_INLINE V exp(V x) {
  x = x < -104.f ? V{} - 104.f : x;  // NaN compares false, and so passes
  x = x > 89.f ? V{} + 89.f : x;
  // Adding 1.5 * 2^23 rounds to a whole number, and leaves it in the lowest bits.
  const V shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
#if defined(KERNELS_AVX512)
  if constexpr (sizeof(V) == 64) return (V)_mm512_maskz_scalef_ps(-1, (__m512)p, (__m512)n);
#endif
  // In two steps: 2^n itself may be too small for a float, or too large.
  const Ints<V> whole = (Ints<V>)shifted - 0x4b400000, half = whole >> 1;
  return p * (V)((half + 127) << 23) * (V)((whole - half + 127) << 23);
}

// Within 2 ulp. Method: Cephes' tanhf (Moshier), a polynomial where 1 - 2 / (e^2x + 1) cancels.
template <class V> KERNELS_INLINE V tanh(V x) {
  const V size = x < 0.f ? -x : x, z = x * x;
  V p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const V small = p * z * x + x, large = 1.f - 2.f / (exp(size + size) + 1.f);
  return size < 0.625f ? small : x < 0.f ? -large : large;
}

template <class V> KERNELS_INLINE V silu(V x) { return x / (exp(-x) + 1.f); }

// gpt-oss's SwiGLU: both sides bounded by 7, the linear one moved by one.
template <class V> KERNELS_INLINE V clamped_swiglu(V gate, V up) {
  gate = gate > 7.f ? V{} + 7.f : gate;
  up = up > 7.f ? V{} + 7.f : up < -7.f ? V{} - 7.f : up;
  return gate / (exp(gate * -1.702f) + 1.f) * (up + 1.f);
}

// The tanh form of GELU (Hendrycks and Gimpel, 2016, arXiv:1606.08415), as ggml computes it: from
// a table of half-precision numbers between -10 and 10. It must be a table here as well: a last bit
// of float32 that differs is a last bit of half precision wherever rounding is a close call.
constexpr int TEN = 0x4900;  // 10 in half precision; positive numbers are ordered as their bits
constexpr int NEGATIVE = TEN + 1;

inline float from_half(int bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? std::ldexp(1024.f + fraction, exponent - 25)
                              : std::ldexp(float(fraction), -24);
  return bits & 0x8000 ? -size : size;
}

// The bits of numbers between 0 and 10 in half precision, rounded to even.
template <class V> KERNELS_INLINE Ints<V> half_bits(V x) {
  const Ints<V> bits = (Ints<V>)x;
  const Ints<V> normal = ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
  // The numbers from 0.5 to 1 are as far apart as half precision's denormal ones.
  const Ints<V> denormal = (Ints<V>)(x + 0.5f) - 0x3f000000;
  return x < 6.103515625e-5f ? denormal : normal;
}

inline const float* gelu_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(2 * NEGATIVE);
    typedef float V __attribute__((vector_size(16)));
    for (int i = 0; i < 2 * NEGATIVE; i++) {
      const float h = i < NEGATIVE ? from_half(i) : -from_half(i - NEGATIVE);
      // Volatile keeps compilers from contracting products and sums into one rounding.
      volatile float squared = 0.044715f * h, inner = 0.7978845608028654f * h;
      squared = squared * h;
      inner = inner * (1.f + squared);
      volatile float y = 1.f + std::tanh(inner);
      y = 0.5f * h * y;
      const float rounded = from_half(half_bits(V{} + std::fabs(y))[0]);
      values[i] = std::signbit(y) ? -rounded : rounded;
    }
    return values;
  }();
  return table.data();
}

template <class V> KERNELS_INLINE V gelu_tanh(V x) {
  constexpr int lanes = sizeof(V) / 4;
  const float* table = gelu_table();
  const V size = x < 0.f ? -x : x;
  const Ints<V> inside = size < 10.f;  // which NaN is not
  int32_t at[lanes];
  float y[lanes];
  store(at, (half_bits(size) + ((x < 0.f) & NEGATIVE)) & inside);
  for (int i = 0; i < lanes; i++) y[i] = table[at[i]];
  return inside ? load<V>(y) : x < 0.f ? V{} : x;
}

// gate(a) * b, or what takes its place.
template <int32_t GATE, class V> KERNELS_INLINE V gated(V a, V b) {
  if constexpr (GATE == SILU) return silu(a) * b;
  if constexpr (GATE == GELU_TANH) return gelu_tanh(a) * b;
  if constexpr (GATE == CLAMPED_SWIGLU) return clamped_swiglu(a, b);
  return a * b;
}

template <int32_t GATE>
static inline void gated_floats(const float* a, const float* b, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    store(out + i, gated<GATE>(load<f32xn>(a + i), load<f32xn>(b + i)));
  if (i == count) return;
  float rest[2][LANES] = {};
  std::memcpy(rest[0], a + i, (count - i) * sizeof(float));
  std::memcpy(rest[1], b + i, (count - i) * sizeof(float));
  store(rest[0], gated<GATE>(load<f32xn>(rest[0]), load<f32xn>(rest[1])));
  std::memcpy(out + i, rest[0], (count - i) * sizeof(float));
}

// out = gate(a) * b for `count` numbers; out may be a or b.
static inline void gated(int32_t gate, const float* a, const float* b, float* out, int64_t count) {
  switch (gate) {
    case SILU: return gated_floats<SILU>(a, b, out, count);
    case GELU_TANH: return gated_floats<GELU_TANH>(a, b, out, count);
    case CLAMPED_SWIGLU: return gated_floats<CLAMPED_SWIGLU>(a, b, out, count);
    default: return gated_floats<NO_GATE>(a, b, out, count);
  }
}

}  // namespace kernels

// Vectors of 64 bytes in the compiler's own vector extensions (GCC 9+ and Clang): one register with
// AVX-512, two with AVX2, four with NEON, and plain code elsewhere. Only what the extensions cannot
// say is spelled per processor.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace kernels {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef int8_t i8x64 __attribute__((vector_size(64)));

#define KERNELS_INLINE static inline __attribute__((always_inline))

template <class V> KERNELS_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V> KERNELS_INLINE void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

KERNELS_INLINE f32x16 all(float x) { return f32x16{} + x; }

// a * b + c; one rounding where the processor has it.
KERNELS_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;  // contracted by the compiler (-ffp-contract=fast)
#endif
}

// The sum of the lanes, always in the same order.
KERNELS_INLINE float sum(f32x16 v) {
  float s[16];
  store(s, v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) s[i] += s[i + width];
  return s[0];
}

}  // namespace kernels

// Metal's language, as far as the kernels use it, as C++ over the emulator. Address spaces are
// nothing here, except that what a threadgroup shares is static.
#pragma once
#include <cstring>

#include "emulator.h"

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef half float16_t;
struct uint3 {
  uint x, y, z;
};
struct ulong2 {
  ulong x, y;
  ulong2(ulong x, ulong y) : x(x), y(y) {}
};

template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct bfloat16_t {
  ushort bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float v) {
    const uint u = as_type<uint>(v);
    bits = ushort((u & 0x7fffffffu) > 0x7f800000u ? u >> 16 | 64 : (u + 0x7fffu + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return as_type<float>(uint(bits) << 16); }
};

inline float simd_sum(float v) {
  const float* all = emulator::exchange(&v, 1);
  float sum = 0.0f;
  for (uint lane = 0; lane < emulator::LANES; lane++) sum += all[lane];
  return sum;
}

enum class mem_flags { mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { emulator::barrier(); }

// Lane l has the elements (l / 4, 2 (l % 4)) and its right neighbor.
template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8);
  T own[2];
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T v) : own{v, v} {}
};
inline uint matrix_row() { return emulator::index() % emulator::LANES / 4; }
inline uint matrix_column() { return emulator::index() % 4 * 2; }

template <class T, class Pointer>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, Pointer p, ulong width,
                           ulong2 origin = ulong2(0, 0), bool transposed = false) {
  p += origin.y * width + origin.x;
  for (uint i = 0; i < 2; i++) {
    const uint row = matrix_row(), column = matrix_column() + i;
    m.own[i] = transposed ? p[column * width + row] : p[row * width + column];
  }
}
template <class T, class Pointer>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, Pointer p, ulong width) {
  for (uint i = 0; i < 2; i++) p[matrix_row() * width + matrix_column() + i] = m.own[i];
}
template <class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<C, 8, 8>& d,
                                          const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b,
                                          const simdgroup_matrix<C, 8, 8>& c) {
  const float mine[4] = {float(a.own[0]), float(a.own[1]), float(b.own[0]), float(b.own[1])};
  const float* all = emulator::exchange(mine, 4);
  const uint row = matrix_row();
  for (uint i = 0; i < 2; i++) {
    const uint column = matrix_column() + i;
    float sum = float(c.own[i]);
    for (uint k = 0; k < 8; k++)
      sum += all[(row * 4 + k / 2) * 4 + k % 2] * all[(k * 4 + column / 2) * 4 + 2 + column % 2];
    d.own[i] = C(sum);
  }
}

#define device
#define constant
#define thread
#define threadgroup static
#define kernel

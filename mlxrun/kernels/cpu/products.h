// Products of rows of GGML blocks with rows of activations, for one type: y = x W^T.
//
// Activations are integers of 8 PLANES bits in groups of 32, one plane of int8 for each 8 bits, so
// that all arithmetic on codes is exact; floats only join the groups. Types of floats are
// multiplied as floats.
#pragma once
#include <cstdlib>

#include "codebooks.h"
#include "kernels.h"

namespace kernels {

// Quantized activations of 256 columns. Where a format is SWAPPED, `q` has its order of groups.
template <int PLANES> struct alignas(64) Quantized {
  float x32[16];           // scales of 8 groups of 32; then their sums, as numbers
  float scale[16];         // of each 16 columns
  float sum[16];           // of each 16 columns, as numbers
  int8_t q[PLANES][256];   // plane p counts 256^p
};

constexpr int SUPER = 256;
KERNELS_INLINE int supers(int columns) { return (columns + SUPER - 1) / SUPER; }
// Groups of 32 in super-block s.
KERNELS_INLINE int groups_of(int columns, int s) {
  const int left = columns - SUPER * s;
  return left >= SUPER ? 8 : left / 32;
}
// Where group g lies if the inner two of each four change places.
constexpr int place(bool swapped, int g) {
  return swapped && (g % 4 == 1 || g % 4 == 2) ? g ^ 3 : g;
}

// A piece of a product: rows begin ... end - 1 of a matrix times all rows of x.
struct Piece {
  const uint8_t* blocks;
  const int32_t* order;  // or null
  int32_t columns;
  int32_t planes;
  int32_t begin, end;
  int32_t rows;
  const void* const* x;  // each row: Quantized<planes>[supers(columns)], or floats for float types,
                         // zeros up to a multiple of 16
  float* const* out;     // each row of the result: [begin, end) of it are written
  float* scratch;        // 16 floats for each row of x
};

enum Input : int32_t { IN_ORDER = 0, SWAPPED_GROUPS = 1, FLOATS = 2 };

struct Format {
  int32_t abi;
  int32_t type;
  int32_t block, bytes;
  int32_t input;  // what Piece::x has
  void (*product)(const Piece*);
  void (*decode)(const uint8_t* row, int32_t columns, float* out);
};

template <class F> constexpr int SUPER_BYTES = SUPER / F::BLOCK * F::BYTES;
// How far ahead of their use blocks are fetched, in bytes: the processor's own prefetching stops at
// the end of a page, and there are two streams.
constexpr int AHEAD = 1536;

template <class F> KERNELS_INLINE const uint8_t* row_of(const Piece& t, int n) {
  return t.blocks + (size_t)(t.order ? t.order[n] : n) * ((size_t)t.columns / F::BLOCK * F::BYTES);
}

// Super-block s of a row. Where the row ends in it, a copy with zeros after it.
template <class F>
KERNELS_INLINE const uint8_t* super(const uint8_t* row, int s, int groups, uint8_t* copy) {
  const uint8_t* b = row + (size_t)s * SUPER_BYTES<F>;
  if (F::BLOCK == SUPER || groups == 8) return b;
  std::memset(copy, 0, SUPER_BYTES<F>);
  std::memcpy(copy, b, (size_t)groups * 32 / F::BLOCK * F::BYTES);
  return copy;
}

// ---- one to four rows of x: rows of W one after the other ----------------------------------------

// Codes times the activations of 64 columns, as floats of four columns each.
template <int PLANES, int TOP>
KERNELS_INLINE f32x16 dot64(const u8x64& c, const Quantized<PLANES>& x, int i) {
  auto plane = [&](int p) { return dot<TOP>(i32x16{}, c, load<i8x64>(x.q[p] + 64 * i)); };
  i32x16 low = plane(0);
  if constexpr (PLANES > 1) low = low + (plane(1) << 8);
  if constexpr (PLANES > 2) return fma(to_float(plane(2)), all(65536.f), to_float(low));
  return to_float(low);
}

// Sums of a row of W with R rows of x. Four chains hide the latency of one.
constexpr int CHAINS = PARTS == 1 ? 4 : 4 / PARTS;
template <int R> struct Sums {
  f32x16 products[R][CHAINS];
  f32x16 minima[R];
};

template <class F, int PLANES, int R, int I>
KERNELS_INLINE void step64(const uint8_t* b, const Quantized<PLANES>* const (&x)[R], int s,
                           int groups, const f32x16 (&scales)[R], Sums<R>& sums) {
  if (F::BLOCK != SUPER && 2 * I >= groups) return;
  const u8x64 c = F::template codes<I>(b);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    f32x16 scale;
    if constexpr (F::GROUP == 16) {
      scale = fill<4 * I, 4 * I + 1, 4 * I + 2, 4 * I + 3>(scales[r]);
    } else {
      constexpr int a = place(F::SWAPPED, 2 * I), b = place(F::SWAPPED, 2 * I + 1);
      scale = fill<a, a, b, b>(scales[r]);
    }
    f32x16& sum = sums.products[r][I % CHAINS];
    sum = fma(dot64<PLANES, F::TOP>(c, x[r][s], I), scale, sum);
  }
}

template <class F, int PLANES, int R>
KERNELS_INLINE void step256(const uint8_t* b, const Quantized<PLANES>* const (&x)[R], int s,
                            int groups, Sums<R>& sums) {
#pragma GCC unroll 8
  for (int o = 0; o < SUPER_BYTES<F>; o += 64) prefetch(b + AHEAD + o);
  f32x16 scales[R];
  if constexpr (F::GROUP == 32) {
    const f32x16 v = F::scales(b);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      scales[r] = v * load<f32x16>(x[r][s].x32);
      if (F::MINIMUM || F::OFFSET) sums.minima[r] = add_upper(sums.minima[r], scales[r]);
    }
  } else {
    f32x16 v, m;
    F::scales(b, v, m);
    if (!F::MINIMUM) m = v;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      scales[r] = v * load<f32x16>(x[r][s].scale);
      if (F::MINIMUM || F::OFFSET)
        sums.minima[r] = fma(m, load<f32x16>(x[r][s].sum), sums.minima[r]);
    }
  }
  step64<F, PLANES, R, 0>(b, x, s, groups, scales, sums);
  step64<F, PLANES, R, 1>(b, x, s, groups, scales, sums);
  step64<F, PLANES, R, 2>(b, x, s, groups, scales, sums);
  step64<F, PLANES, R, 3>(b, x, s, groups, scales, sums);
}

template <class F, int R>
KERNELS_INLINE void finish(const Sums<R>& sums, float* const* out, int n) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    f32x16 v = sums.products[r][0];
    for (int i = 1; i < CHAINS; i++) v = v + sums.products[r][i];
    if (F::MINIMUM) v = v + sums.minima[r];
    else if (F::OFFSET) v = fma(sums.minima[r], all(-(float)F::OFFSET), v);
    out[r][n] = sum(v);
  }
}

// W's rows n and m with R rows of x. Two rows far apart are two streams for the processor's
// prefetching (two neighbors confuse it); with more rows of x one is enough.
template <class F, int PLANES, int R>
KERNELS_INLINE void rows_by_rows(const Piece& t, int n, int m,
                                 const Quantized<PLANES>* const (&x)[R], float* const* out) {
  constexpr int STREAMS = R == 1 && !PORTABLE ? 2 : 1;
  const uint8_t* rows[2] = {row_of<F>(t, n), row_of<F>(t, m)};
  uint8_t last[2][F::BLOCK == SUPER ? 1 : SUPER_BYTES<F>];
  Sums<R> sums[2] = {};
  for (int s = 0; s < supers(t.columns); s++) {
    const int groups = groups_of(t.columns, s);
#pragma GCC unroll 2
    for (int i = 0; i < STREAMS; i++)
      step256<F, PLANES, R>(super<F>(rows[i], s, groups, last[i]), x, s, groups, sums[i]);
  }
  finish<F, R>(sums[0], out, n);
  if (STREAMS == 2) finish<F, R>(sums[1], out, m);
}

// As many rows of x as registers hold the sums of.
constexpr int FEW = PORTABLE ? 1 : PARTS == 1 ? 4 : 2;

template <class F, int PLANES, int R> static void few(const Piece& t, int first) {
  const Quantized<PLANES>* x[R];
  for (int r = 0; r < R; r++) x[r] = static_cast<const Quantized<PLANES>*>(t.x[first + r]);
  const int half = R == 1 && !PORTABLE ? (t.end - t.begin + 1) / 2 : t.end - t.begin;
  for (int n = t.begin; n < t.begin + half; n++)
    rows_by_rows<F, PLANES, R>(t, n, n + half < t.end ? n + half : n, x, t.out + first);
}

// ---- more rows of x: 16 rows of W are decoded once, and become a panel ---------------------------

struct alignas(64) Panel {
  u8x64 q[64];           // number i: codes 4 i ... 4 i + 3 of each of the 16 rows
  f32x16 s[16], m[16];   // by group
};

template <class F, int I>
KERNELS_INLINE void panel_codes(const uint8_t* const (&b)[16], int groups, Panel& out) {
  if (2 * I >= groups) return;
  u32x16 t[16];
  for (int r = 0; r < 16; r++) t[r] = as<u32x16>(F::template codes<I>(b[r]));
  transpose(t);
  for (int r = 0; r < 16; r++) out.q[16 * I + r] = as<u8x64>(t[r]);
}

template <class F>
__attribute__((noinline)) static void decode_panel(const uint8_t* const (&rows)[16], int s,
                                                   int groups, Panel& out) {
  const uint8_t* b[16];
  uint8_t last[16][F::BLOCK == SUPER ? 1 : SUPER_BYTES<F>];
  for (int r = 0; r < 16; r++) {
    b[r] = super<F>(rows[r], s, groups, last[r]);
    for (int o = 0; o < SUPER_BYTES<F>; o += 64) prefetch(b[r] + 2 * SUPER_BYTES<F> + o);
  }
  u32x16 t[16], u[16];
  for (int r = 0; r < 16; r++) {
    if constexpr (F::GROUP == 32) {
      t[r] = as<u32x16>(F::scales(b[r]));
    } else {
      f32x16 v, m = {};
      F::scales(b[r], v, m);
      t[r] = as<u32x16>(v);
      u[r] = as<u32x16>(m);
    }
  }
  transpose(t);
  if (F::GROUP == 16 && F::MINIMUM) transpose(u);
  for (int g = 0; g < SUPER / F::GROUP; g++) {
    out.s[g] = as<f32x16>(t[g]);
    if (F::MINIMUM) out.m[g] = as<f32x16>(F::GROUP == 32 ? t[(8 + g) % 16] : u[g]);
    else out.m[g] = out.s[g] * all(-(float)F::OFFSET);
  }
  panel_codes<F, 0>(b, groups, out);
  panel_codes<F, 1>(b, groups, out);
  panel_codes<F, 2>(b, groups, out);
  panel_codes<F, 3>(b, groups, out);
}

// A panel times M rows of x; sums has 16 numbers for each.
template <class F, int PLANES, int M>
KERNELS_INLINE void panel_product(const Panel& p, const void* const* rows, int s, int groups32,
                                  float* sums) {
  const Quantized<PLANES>* x[M];
  f32x16 acc[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    x[m] = static_cast<const Quantized<PLANES>*>(rows[m]) + s;
    acc[m] = load<f32x16>(sums + 16 * m);
  }
  constexpr int STEPS = F::GROUP / 4;
  const int count = F::GROUP == 32 ? groups32 : 2 * groups32;
  for (int g = 0; g < count; g++) {
    i32x16 d[PLANES][M] = {};
#pragma GCC unroll 8
    for (int k = 0; k < STEPS; k++) {
      const u8x64 w = p.q[g * STEPS + k];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 3
        for (int q = 0; q < PLANES; q++) {
          const int32_t four = load<int32_t>(x[m]->q[q] + g * F::GROUP + 4 * k);
          d[q][m] = dot<F::TOP>(d[q][m], w, as<i8x64>(splat<int32_t>(four)));
        }
    }
    const int h = F::GROUP == 32 ? place(F::SWAPPED, g) : g;  // this place has group h
    const f32x16 scale = p.s[h], minimum = p.m[h];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const float* scales = F::GROUP == 32 ? x[m]->x32 : x[m]->scale;
      const float* total = F::GROUP == 32 ? x[m]->x32 + 8 : x[m]->sum;
      i32x16 low = d[0][m];
      if constexpr (PLANES > 1) low = low + (d[1][m] << 8);
      f32x16 f = to_float(low);
      if constexpr (PLANES > 2) f = fma(to_float(d[2][m]), all(65536.f), f);
      acc[m] = fma(f, scale * all(scales[h]), acc[m]);
      if (F::MINIMUM || F::OFFSET) acc[m] = fma(minimum, all(total[h]), acc[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) store(sums + 16 * m, acc[m]);
}

// As many rows of x at a time as registers hold.
template <int PLANES>
constexpr int AT_ONCE = PORTABLE     ? 1
                        : PARTS == 1 ? (PLANES == 1 ? 8 : 4)
                                     : (PLANES == 1 ? 4 : PLANES == 2 ? 2 : 1);

KERNELS_INLINE void write_panel(const Piece& t, int n, int count) {
  for (int m = 0; m < t.rows; m++)
    std::memcpy(t.out[m] + n, t.scratch + 16 * m, sizeof(float) * count);
}

template <class F> KERNELS_INLINE int panel_rows(const Piece& t, int n, const uint8_t* (&rows)[16]) {
  const int count = t.end - n < 16 ? t.end - n : 16;
  for (int i = 0; i < 16; i++) rows[i] = row_of<F>(t, n + (i < count ? i : count - 1));
  return count;
}

template <class F, int PLANES> static void many(const Piece& t) {
  constexpr int M = AT_ONCE<PLANES>;
  Panel p;
  for (int n = t.begin; n < t.end; n += 16) {
    const uint8_t* rows[16];
    const int count = panel_rows<F>(t, n, rows);
    std::memset(t.scratch, 0, sizeof(float) * 16 * t.rows);
    for (int s = 0; s < supers(t.columns); s++) {
      const int groups = groups_of(t.columns, s);
      decode_panel<F>(rows, s, groups, p);
      int m = 0;
      for (; m + M <= t.rows; m += M)
        panel_product<F, PLANES, M>(p, t.x + m, s, groups, t.scratch + 16 * m);
      if constexpr (M > 2)
        for (; m + 2 <= t.rows; m += 2)
          panel_product<F, PLANES, 2>(p, t.x + m, s, groups, t.scratch + 16 * m);
      for (; m < t.rows; m++)
        panel_product<F, PLANES, 1>(p, t.x + m, s, groups, t.scratch + 16 * m);
    }
    write_panel(t, n, count);
  }
}

template <class F, int PLANES> static void product_of(const Piece& t) {
  if (t.rows > 4) return many<F, PLANES>(t);
  int m = 0;
  if constexpr (FEW == 4)
    for (; m + 4 <= t.rows; m += 4) few<F, PLANES, 4>(t, m);
  if constexpr (FEW >= 2)
    for (; m + 2 <= t.rows; m += 2) few<F, PLANES, 2>(t, m);
  for (; m < t.rows; m++) few<F, PLANES, 1>(t, m);
}

template <class F> static void product(const Piece* t) {
  if (t->planes == 1) product_of<F, 1>(*t);
  else if (t->planes == 2) product_of<F, 2>(*t);
  else product_of<F, 3>(*t);
}

// ---- rows as floats ------------------------------------------------------------------------------

template <class F, int I>
KERNELS_INLINE void decode64(const uint8_t* b, int groups, const float* s, const float* m,
                             float* out) {
  if (2 * I >= groups) return;
  const u8x64 v = F::template codes<I>(b);
  const u8x16 parts[4] = {quarter<0>(v), quarter<1>(v), quarter<2>(v), quarter<3>(v)};
  for (int j = 0; j < 4; j++) {
    const int group = place(F::SWAPPED, 2 * I + j / 2);
    if (group >= groups) return;
    const int at = F::GROUP == 32 ? group : 4 * I + j;
    i32x16 c = F::TOP > 127 && SIGNED_DOT ? widen((i8x16)parts[j]) : widen(parts[j]);
    if (F::OFFSET) c = c - splat<int32_t>(F::OFFSET);
    // Two roundings, as GGML has them.
    f32x16 w = to_float(c) * all(s[at]);
    if (F::MINIMUM) w = w + all(m[at]);
    store(out + 32 * group + 16 * (j % 2), w);
  }
}

template <class F> static void decode(const uint8_t* row, int32_t columns, float* out) {
  uint8_t last[F::BLOCK == SUPER ? 1 : SUPER_BYTES<F>];
  for (int i = 0; i < supers(columns); i++, out += SUPER) {
    const int groups = groups_of(columns, i);
    const uint8_t* b = super<F>(row, i, groups, last);
    float s[16], m[16];
    f32x16 v, w = {};
    if constexpr (F::GROUP == 32) v = F::scales(b);
    else F::scales(b, v, w);
    store(s, v);
    store(m, w);
    const float* minima = F::GROUP == 32 ? s + 8 : m;
    decode64<F, 0>(b, groups, s, minima, out);
    decode64<F, 1>(b, groups, s, minima, out);
    decode64<F, 2>(b, groups, s, minima, out);
    decode64<F, 3>(b, groups, s, minima, out);
  }
}

// ---- types of floats -----------------------------------------------------------------------------

// Columns i ... i + 15, zeros where the row ends.
template <class F> KERNELS_INLINE f32x16 floats16(const uint8_t* row, int i, int columns) {
  if (i + 16 <= columns) return F::sixteen(row + (size_t)i * F::BYTES);
  uint8_t last[16 * F::BYTES] = {};
  std::memcpy(last, row + (size_t)i * F::BYTES, (size_t)(columns - i) * F::BYTES);
  return F::sixteen(last);
}

template <class F> KERNELS_INLINE const uint8_t* float_row(const Piece& t, int n) {
  return t.blocks + (size_t)(t.order ? t.order[n] : n) * t.columns * F::BYTES;
}

// Row n of the matrix times R rows of x.
template <class F, int R>
KERNELS_INLINE void few_floats(const Piece& t, int n, int first) {
  const float* x[R];
  for (int r = 0; r < R; r++) x[r] = static_cast<const float*>(t.x[first + r]);
  const uint8_t* w = float_row<F>(t, n);
  f32x16 acc[R][4] = {};
  int i = 0;
  for (; i + 64 <= t.columns; i += 64) {
    prefetch(w + (size_t)i * F::BYTES + AHEAD);
    prefetch(w + (size_t)i * F::BYTES + AHEAD + 64);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const f32x16 v = F::sixteen(w + (size_t)(i + 16 * j) * F::BYTES);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        acc[r][j] = fma(v, load<f32x16>(x[r] + i + 16 * j), acc[r][j]);
    }
  }
  for (; i < t.columns; i += 16) {
    const f32x16 v = floats16<F>(w, i, t.columns);
    for (int r = 0; r < R; r++) acc[r][0] = fma(v, load<f32x16>(x[r] + i), acc[r][0]);
  }
  for (int r = 0; r < R; r++)
    t.out[first + r][n] = sum((acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]));
}

template <int M>
KERNELS_INLINE void float_panel(const f32x16* w, const void* const* rows, int at, int count,
                                float* sums) {
  const float* x[M];
  f32x16 acc[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) {
    x[m] = static_cast<const float*>(rows[m]) + at;
    acc[m] = f32x16{};
  }
  for (int i = 0; i < count; i++) {
    const f32x16 v = w[i];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) acc[m] = fma(v, all(x[m][i]), acc[m]);
  }
  // Sums of 256 columns first, then theirs: long sums would lose what float32 has.
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) store(sums + 16 * m, load<f32x16>(sums + 16 * m) + acc[m]);
}

// The last rows together: one alone would wait for each of its sums before the next.
template <int M>
KERNELS_INLINE void float_rest(const f32x16* w, const void* const* rows, int left, int at,
                               int count, float* sums) {
  if (left == M) return float_panel<M>(w, rows, at, count, sums);
  if constexpr (M > 1) float_rest<M - 1>(w, rows, left, at, count, sums);
}

template <class F> static void many_floats(const Piece& t) {
  constexpr int M = PARTS == 1 ? 12 : PARTS == 2 ? 4 : 2;
  alignas(64) f32x16 w[SUPER];
  for (int n = t.begin; n < t.end; n += 16) {
    const int count = t.end - n < 16 ? t.end - n : 16;
    std::memset(t.scratch, 0, sizeof(float) * 16 * t.rows);
    for (int at = 0; at < t.columns; at += SUPER) {
      const int here = t.columns - at < SUPER ? (t.columns - at + 15) / 16 * 16 : SUPER;
      for (int i = 0; i < here; i += 16) {
        u32x16 v[16];
        for (int r = 0; r < 16; r++)
          v[r] = as<u32x16>(floats16<F>(float_row<F>(t, n + (r < count ? r : count - 1)), at + i,
                                        t.columns));
        transpose(v);
        for (int r = 0; r < 16; r++) w[i + r] = as<f32x16>(v[r]);
      }
      int m = 0;
      for (; m + M <= t.rows; m += M)
        float_panel<M>(w, t.x + m, at, here, t.scratch + 16 * m);
      if (m < t.rows)
        float_rest<M - 1>(w, t.x + m, t.rows - m, at, here, t.scratch + 16 * m);
    }
    write_panel(t, n, count);
  }
}

template <class F> static void product_floats(const Piece* t) {
  if (t->rows > 8) return many_floats<F>(*t);
  for (int n = t->begin; n < t->end; n++) {  // a row of the matrix stays in the cache meanwhile
    int m = 0;
    for (; m + 4 <= t->rows; m += 4) few_floats<F, 4>(*t, n, m);
    for (; m + 2 <= t->rows; m += 2) few_floats<F, 2>(*t, n, m);
    for (; m < t->rows; m++) few_floats<F, 1>(*t, n, m);
  }
}

template <class F> static void decode_floats(const uint8_t* row, int32_t columns, float* out) {
  int i = 0;
  for (; i + 16 <= columns; i += 16) store(out + i, F::sixteen(row + (size_t)i * F::BYTES));
  if (i == columns) return;
  float last[16];
  store(last, floats16<F>(row, i, columns));
  std::memcpy(out + i, last, sizeof(float) * (columns - i));
}

}  // namespace kernels

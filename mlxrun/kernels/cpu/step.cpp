#include "step.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "activations.h"
#include "pool.h"

namespace kernels {
namespace {

// Numbers that one thread goes through before another is worth waking.
constexpr int64_t SHARE = 1 << 14;

// Calls do(first, last) for parts of `count` things that have `size` numbers each.
template <class Do> void share(int64_t count, int64_t size, Do work) {
  const int64_t each = std::max<int64_t>(1, SHARE / std::max<int64_t>(1, size));
  Pools::get().run(int((count + each - 1) / each),
      [&](int chunk) { work(chunk * each, std::min(count, (chunk + 1) * each)); });
}

// Memory of this thread, of at least so many floats, not initialized.
float* scratch(size_t floats) {
  static thread_local std::vector<float> memory;
  constexpr size_t ALIGNED = 64 / sizeof(float);
  if (memory.size() < floats + ALIGNED) memory.resize(floats + ALIGNED);
  const size_t past = reinterpret_cast<uintptr_t>(memory.data()) % 64 / sizeof(float);
  return memory.data() + (ALIGNED - past) % ALIGNED;
}

// The number in all lanes. Adding it to zero would be an instruction: it turns -0 into 0.
KERNELS_INLINE f32xn all_lanes(float x) { return x - f32xn{}; }

// The larger of two, and the second where one is NaN.
KERNELS_INLINE f32xn larger(f32xn a, f32xn b) { return a > b ? a : b; }

template <int FROM, int... I>
KERNELS_INLINE f32xn zip(f32xn a, f32xn b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (FROM + I / 2 + I % 2 * LANES)...);
#else
  return __builtin_shuffle(a, b, i32xn{(FROM + I / 2 + I % 2 * LANES)...});
#endif
}
// a0 b0 a1 b1 ... of the first halves, and of the second.
KERNELS_INLINE f32xn zip_low(f32xn a, f32xn b) {
  return zip<0>(a, b, std::make_integer_sequence<int, LANES>{});
}
KERNELS_INLINE f32xn zip_high(f32xn a, f32xn b) {
  return zip<LANES / 2>(a, b, std::make_integer_sequence<int, LANES>{});
}

// The sum of the lanes, and the largest, in a fixed order: halves meet until all lanes are alike.
KERNELS_INLINE float total(f32xn v) {
#pragma GCC unroll 4
  for (int width = 1; width < LANES; width *= 2) v = zip_low(v, v) + zip_high(v, v);
  return v[0];
}
KERNELS_INLINE float largest(f32xn v) {
#pragma GCC unroll 4
  for (int width = 1; width < LANES; width *= 2) v = larger(zip_low(v, v), zip_high(v, v));
  return v[0];
}

// ---- norms ---------------------------------------------------------------------------------------

// 1 / sqrt(mean(x^2) + eps)
float inverse_rms(const float* x, int count, float eps) {
  f32xn sums[4] = {};
  int i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    for (int j = 0; j < 4; j++) {
      const f32xn v = load<f32xn>(x + i + j * LANES);
      sums[j] += v * v;
    }
  float sum = 0;
  for (; i < count; i++) sum += x[i] * x[i];
  sum += total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return 1.f / std::sqrt(sum / count + eps);
}

// x / rms(x) * weight; out may be x.
void normalize(const float* x, const float* weight, int count, float eps, float* out) {
  const float factor = inverse_rms(x, count, eps);
  if (weight)
    for (int i = 0; i < count; i++) out[i] = x[i] * factor * weight[i];
  else
    for (int i = 0; i < count; i++) out[i] = x[i] * factor;
}

}  // namespace

void rms_norm(const RmsNorm* norm) {
  const RmsNorm& n = *norm;
  share(n.rows, n.columns, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float* x = n.x + row * n.columns;
      float* out = n.out + row * n.columns;
      if (!n.residual) {
        normalize(x, n.weight, n.columns, n.eps, out);
        continue;
      }
      const float factor = inverse_rms(x, n.columns, n.eps);
      const float* residual = n.residual + row * n.columns;
      for (int i = 0; i < n.columns; i++)
        out[i] = x[i] * factor * (n.weight ? n.weight[i] : 1.f) + residual[i];
    }
  });
}

// ---- heads ---------------------------------------------------------------------------------------

namespace {

// Sines and cosines of a position's angles, which are float32 products as in mx.fast.rope.
void turn(const Heads& h, float position, float* cosines, float* sines) {
  const float scaled = position * h.scale;
  for (int i = 0; i < h.dims / 2; i++) {
    const float angle = scaled * h.frequencies[i];
    // In double, a multiple of pi / 2 can be taken off in one step: angles up to 2^23 keep 30 bits
    // behind the point. Adding 1.5 * 2^52 rounds to a whole number and leaves it in the last bits.
    const double shifted = angle * 0.63661977236758134 + 6755399441055744.;
    int64_t quadrant;
    std::memcpy(&quadrant, &shifted, sizeof quadrant);
    const float x = float(angle - (shifted - 6755399441055744.) * 1.5707963267948966), z = x * x;
    // Cephes' sinf and cosf (Moshier) between -pi / 4 and pi / 4.
    const float s =
        ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
    const float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z +
                     4.166664568298827e-2f) * z * z - 0.5f * z + 1.f;
    const float sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
    sines[i] = quadrant & 2 ? -sine : sine;
    cosines[i] = (quadrant + 1) & 2 ? -cosine : cosine;
  }
}

// Rotates the pairs of x by their angles; out is not x.
void rotate(const Heads& h, const float* __restrict x, const float* __restrict cosines,
            const float* __restrict sines, float* __restrict out) {
  const int half = h.dims / 2;
  if (h.traditional) {
    for (int i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = a * cosines[i] - b * sines[i];
      out[2 * i + 1] = a * sines[i] + b * cosines[i];
    }
  } else {
    for (int i = 0; i < half; i++) {
      const float a = x[i], b = x[half + i];
      out[i] = a * cosines[i] - b * sines[i];
      out[half + i] = a * sines[i] + b * cosines[i];
    }
  }
  std::copy(x + h.dims, x + h.dim, out + h.dims);
}

bool turn_alike(const Heads& a, const Heads& b) {
  return a.dims == b.dims && a.scale == b.scale && a.frequencies == b.frequencies &&
         a.positions == b.positions && a.shared == b.shared;
}

}  // namespace

void heads(const Heads* parts, int32_t count) {
  const int tokens = parts[0].tokens;
  int64_t size = 0;
  int widest = 0, most = 0;
  for (int p = 0; p < count; p++) {
    size += int64_t(parts[p].heads) * parts[p].dim;
    widest = std::max(widest, parts[p].dim);
    most = std::max(most, parts[p].dims / 2);
  }
  share(int64_t(parts[0].batch) * tokens, size, [&](int64_t first, int64_t last) {
    float* cosines = scratch(2 * size_t(most) + widest);
    float *sines = cosines + most, *normed = sines + most;
    for (int64_t i = first; i < last; i++) {
      const int64_t row = i / tokens, token = i % tokens;
      for (int p = 0; p < count; p++) {
        const Heads& h = parts[p];
        if (h.dims && !(p && turn_alike(h, parts[p - 1])))
          turn(h, float(h.positions[h.shared ? 0 : row] + token), cosines, sines);
        const float* x = h.x + row * h.batch_stride + token * h.token_stride;
        float* out = h.out + (row * h.heads * tokens + token) * h.dim;
        for (int head = 0; head < h.heads; head++, x += h.dim, out += int64_t(tokens) * h.dim) {
          const float* from = x;
          if (h.norm_at == 1) {
            normalize(x, h.norm, h.dim, h.eps, normed);
            from = normed;
          }
          rotate(h, from, cosines, sines, out);
          if (h.norm_at == 2) normalize(out, h.norm, h.dim, h.eps, out);
        }
      }
    }
  });
}

// ---- attention -----------------------------------------------------------------------------------
//
// One pass over the keys, with a running maximum and sum per query (Milakov and Gimelshein, 2018,
// arXiv:1805.02867; Dao et al., 2022, arXiv:2205.14135). A unit of work is a block of queries that
// share a head of keys: all heads of the group, of a few tokens. Its rows are (token, head) pairs,
// tokens first, so that a causal limit grows from row to row. Where a single block of queries sees
// many keys, the keys are split among units as well, and what these found is put together.

namespace {

constexpr int KEYS = 128;   // go through the softmax at once
constexpr int SPLIT = 512;  // keys of a unit, where keys are split
constexpr int QUERIES = 96; // rows of a block, unless one token has more heads
constexpr int FEW = 5;      // rows for which packing keys does not pay
constexpr int DEPTH = 128;  // products that are added one after the other
// A tile of sums that fits into the registers beside its factors: rows, and columns.
#if defined(KERNELS_AVX512)
constexpr int ROWS = 6, PANEL = 4 * LANES;
#elif defined(__aarch64__)
constexpr int ROWS = 5, PANEL = 4 * LANES;  // the factors of all rows are in registers as well
#else
constexpr int ROWS = 6, PANEL = 2 * LANES;
#endif

// Rows become columns: each round shuffles the vectors as cards are, and log2 of them transpose.
KERNELS_INLINE void transpose(f32xn (&v)[LANES]) {
#pragma GCC unroll 8
  for (int round = 1; round < LANES; round *= 2) {
    f32xn next[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = zip_low(v[i], v[i + LANES / 2]);
      next[2 * i + 1] = zip_high(v[i], v[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) v[i] = next[i];
  }
}

// The totals of the vectors, in order: two become one whose lanes are partial sums of both.
template <int COUNT = LANES> KERNELS_INLINE f32xn totals(f32xn (&v)[LANES]) {
#pragma GCC unroll 8
  for (int i = 0; i < COUNT / 2; i++)
    v[i] = zip_low(v[i], v[i + COUNT / 2]) + zip_high(v[i], v[i + COUNT / 2]);
  if constexpr (COUNT > 2) return totals<COUNT / 2>(v);
  return v[0];
}

// c (+)= a b, of R rows and N vectors of columns.
template <int R, int N>
void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int depth, float* c,
          int64_t c_row, bool add) {
  f32xn sums[R][N] = {};
  for (int k = 0; k < depth; k++) {
    f32xn right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) right[n] = load<f32xn>(b + k * b_row + n * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const f32xn left = all_lanes(a[r * a_row + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sums[r][n] += left * right[n];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      float* to = c + r * c_row + n * LANES;
      store(to, add ? sums[r][n] + load<f32xn>(to) : sums[r][n]);
    }
}

// A matrix whose columns lie in panels: PANEL columns of all rows, then the next.
struct Panels {
  const float* data;
  int64_t row, panel;  // strides
};

template <int R>
void rows_by_panels(const float* a, int64_t a_row, const Panels& b, int depth, int columns,
                    float* c, int64_t c_row, bool add) {
  for (int first = 0; first < columns; first += PANEL) {
    const float* panel = b.data + first / PANEL * b.panel;
    int left = std::min(PANEL, columns - first) / LANES, at = 0;
    const auto step = [&](auto vectors) {
      constexpr int N = decltype(vectors)::value;
      for (; left >= N; left -= N, at += N * LANES)
        // Sums of a few products each lose less than one long sum.
        for (int k = 0; k < depth; k += DEPTH)
          tile<R, N>(a + k, a_row, panel + at + k * b.row, b.row, std::min(DEPTH, depth - k),
                     c + first + at, c_row, add || k);
    };
    if constexpr (PANEL / LANES >= 4) step(std::integral_constant<int, 4>{});
    step(std::integral_constant<int, 2>{});
    step(std::integral_constant<int, 1>{});
  }
}

// c (+)= a b; a has 1 to ROWS rows, and b whole vectors of columns.
void multiply(int rows, const float* a, int64_t a_row, const Panels& b, int depth, int columns,
              float* c, int64_t c_row, bool add) {
  switch (rows) {
    case 1: return rows_by_panels<1>(a, a_row, b, depth, columns, c, c_row, add);
    case 2: return rows_by_panels<2>(a, a_row, b, depth, columns, c, c_row, add);
    case 3: return rows_by_panels<3>(a, a_row, b, depth, columns, c, c_row, add);
    case 4: return rows_by_panels<4>(a, a_row, b, depth, columns, c, c_row, add);
    case 5: return rows_by_panels<5>(a, a_row, b, depth, columns, c, c_row, add);
    default: return rows_by_panels<ROWS>(a, a_row, b, depth, columns, c, c_row, add);
  }
}

int whole(int numbers) { return (numbers + LANES - 1) / LANES * LANES; }

// Keys (count, dim), as they lie, to panels (dim, keys): what columns of scores are made of. Keys
// beyond `count`, up to a whole vector, are copies of the last.
void pack_keys(const float* keys, int64_t stride, int count, int dim, float* out) {
  for (int first = 0; first < count; first += LANES) {
    const float* rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = keys + std::min(first + i, count - 1) * stride;
    float* panel = out + int64_t(first / PANEL) * dim * PANEL + first % PANEL;
    int d = 0;
    for (; d + LANES <= dim; d += LANES) {
      f32xn v[LANES];
      for (int i = 0; i < LANES; i++) v[i] = load<f32xn>(rows[i] + d);
      transpose(v);
      for (int i = 0; i < LANES; i++) store(panel + int64_t(d + i) * PANEL, v[i]);
    }
    for (; d < dim; d++)
      for (int i = 0; i < LANES; i++) panel[int64_t(d) * PANEL + i] = rows[i][d];
  }
}

// Values (count, dim) with zeros behind each, so that columns are whole vectors.
void pack_values(const float* values, int64_t stride, int count, int dim, float* out) {
  for (int i = 0; i < count; i++, values += stride, out += whole(dim)) {
    std::copy(values, values + dim, out);
    std::fill(out + dim, out + whole(dim), 0.f);
  }
}

// Products of one query with keys as they lie; dim is whole vectors. Scores beyond `count`, up to a
// whole vector, are written and mean nothing.
void dot_keys(const float* query, const float* keys, int64_t stride, int count, int dim,
              float* scores) {
  constexpr int SETS = LANES < 8 ? 2 : 1;  // enough sums to hide an addition's latency
  constexpr int TOGETHER = SETS * LANES;
  const auto together = [&](int first) {
    f32xn sums[SETS][LANES] = {};
    const float* key = keys + first * stride;
    for (int d = 0; d < dim; d += LANES) {
      const f32xn q = load<f32xn>(query + d);
#pragma GCC unroll 2
      for (int s = 0; s < SETS; s++)
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
          sums[s][i] += q * load<f32xn>(key + (s * LANES + i) * stride + d);
    }
#pragma GCC unroll 2
    for (int s = 0; s < SETS; s++) store(scores + first + s * LANES, totals(sums[s]));
  };
  if (count >= TOGETHER) {
    // The last ones overlap with those before: the same scores again, instead of a remainder.
    for (int first = 0; first < count; first += TOGETHER)
      together(std::min(first, count - TOGETHER));
    return;
  }
  for (int i = 0; i < count; i++) {
    f32xn sum = {};
    for (int d = 0; d < dim; d += LANES)
      sum += load<f32xn>(query + d) * load<f32xn>(keys + i * stride + d);
    scores[i] = total(sum);
  }
}

// What rows of queries found in some keys: not yet divided sums of values, the largest score, and
// the sum of exponentials of scores less that.
struct Found {
  float *values, *top, *sum;
  Found(float* memory, int rows, int width)
      : values(memory), top(memory + int64_t(rows) * width), sum(top + rows) {}
  static size_t floats(int rows, int width) { return size_t(rows) * (width + 2); }
};

// The attention of one call, cut into blocks and units.
struct Attending {
  const Attention& a;
  const int group = a.heads / a.kv_heads;
  const int block_tokens = std::clamp(QUERIES / group, 1, a.tokens);
  const int blocks = (a.tokens + block_tokens - 1) / block_tokens;
  const int splits = blocks > 1 ? 1 : std::max(1, (a.keys + SPLIT - 1) / SPLIT);
  const int rows = block_tokens * group;  // of a block, at most
  const int width = whole(a.value_dim);
  const int past = a.keys - a.tokens;

  struct Block {
    int row, head, token, tokens;  // of the batch, of the keys, the first token and how many
  };

  // Those with the most keys come first: what is left for the end is small.
  Block block(int index) const {
    const int heads = a.batch * a.kv_heads, first = (blocks - 1 - index / heads) * block_tokens;
    return {index % heads / a.kv_heads, index % a.kv_heads, first,
            std::min(block_tokens, a.tokens - first)};
  }
  int block_count() const { return a.batch * a.kv_heads * blocks; }

  // The keys before which a token sees some; as many as there are unless causal.
  int limit(int token) const {
    return a.causal ? std::clamp(past + token + 1, 0, a.keys) : a.keys;
  }

  const uint8_t* mask(int row, int token, int key) const {
    return a.mask + row * a.mask_batch + token * a.mask_token + key * a.mask_key;
  }

  // How many of some keys the mask shows to a token.
  int shown(int row, int token, int first, int count) const {
    const uint8_t* m = mask(row, token, first);
    int shown = 0;
    if (a.mask_key == 1)
      for (int i = 0; i < count; i++) shown += m[i] != 0;
    else
      for (int i = 0; i < count; i++) shown += m[i * a.mask_key] != 0;
    return shown;
  }

  bool any_shown(const Block& b, int first, int count) const {
    const int tokens = a.mask_token ? b.tokens : 1;
    for (int t = 0; t < tokens; t++)
      if (shown(b.row, b.token + t, first, count)) return true;
    return false;
  }

  // Scores of `count` keys from `first` on, of one query: bounded, falling, masked.
  void finish_scores(const Block& b, int head, int token, int first, int count, float* x) const {
    const int columns = whole(count);
    if (a.softcap != 0) {
      const float inverse = 1.f / a.softcap;
      for (int i = 0; i < columns; i += LANES)
        store(x + i, tanh(load<f32xn>(x + i) * inverse) * a.softcap);
    }
    if (a.slopes) {
      // Softmax does not care from where distances are counted; from the query on, they are small
      // where they matter.
      const float slope = a.slopes[head];
      const int distance = first - past - token;
      for (int i = 0; i < count; i++) x[i] += slope * float(distance + i);
    }
    const int seen = std::clamp(limit(token) - first, 0, count);
    if (a.mask && shown(b.row, token, first, seen) < seen) {
      const uint8_t* m = mask(b.row, token, first);
      for (int i = 0; i < seen; i++) x[i] = m[i * a.mask_key] ? x[i] : -INFINITY;
    }
    std::fill(x + seen, x + columns, -INFINITY);
  }

  // Takes scores of a query into what it found so far: they become weights.
  static void weigh(int columns, float* x, int width, float* values, float& top, float& sum) {
    f32xn most = all_lanes(top);
    for (int i = 0; i < columns; i += LANES) most = larger(load<f32xn>(x + i), most);
    const float now = largest(most);
    // Nothing seen so far: all weights are zero, whatever they are compared with.
    const f32xn shift = all_lanes(now == -INFINITY ? 0.f : now);
    f32xn added = {};
    for (int i = 0; i < columns; i += LANES) {
      const f32xn weight = exp(load<f32xn>(x + i) - shift);
      store(x + i, weight);
      added += weight;
    }
    if (now > top) {
      const float factor = std::exp(top - now);
      sum *= factor;
      for (int i = 0; i < width; i += LANES)
        store(values + i, load<f32xn>(values + i) * factor);
      top = now;
    }
    sum += total(added);
  }

  // The queries of a block over keys from `start` to `stop`.
  void attend(const Block& b, int start, int stop, const Found& found, float* memory) const {
    const int count = b.tokens * group, dim = a.dim;
    const bool ragged = a.value_dim % LANES != 0;
    const bool packed = count > FEW || dim % LANES != 0;
    float* queries = memory;
    float* scores = queries + int64_t(rows) * dim;
    float* keys = scores + ROWS * KEYS;
    float* own_values = keys + int64_t(dim) * (KEYS + PANEL);
    for (int r = 0; r < count; r++) {
      const int head = b.head * group + r % group, token = b.token + r / group;
      const float* q = a.q + b.row * a.q_batch + head * a.q_head + token * a.q_token;
      for (int d = 0; d < dim; d++) queries[int64_t(r) * dim + d] = q[d] * a.scale;
      found.top[r] = -INFINITY;
      found.sum[r] = 0;
    }
    std::fill(found.values, found.values + int64_t(count) * width, 0.f);
    stop = std::min(stop, limit(b.token + b.tokens - 1));
    for (int first = start; first < stop; first += KEYS) {
      const int here = std::min(KEYS, stop - first);
      if (a.mask && !any_shown(b, first, here)) continue;
      const float* k = a.k + b.row * a.k_batch + b.head * a.k_head + first * a.k_key;
      const float* v = a.v + b.row * a.v_batch + b.head * a.v_head + first * a.v_key;
      if (packed) pack_keys(k, a.k_key, here, dim, keys);
      if (ragged) pack_values(v, a.v_key, here, a.value_dim, own_values);
      const Panels columns{keys, PANEL, int64_t(dim) * PANEL};
      const Panels values = ragged ? Panels{own_values, width, PANEL} : Panels{v, a.v_key, PANEL};
      for (int r = 0; r < count; r += ROWS) {
        const int some = std::min(ROWS, count - r);
        const int seen = std::min(here, limit(b.token + (r + some - 1) / group) - first);
        if (seen <= 0) continue;
        const float* q = queries + int64_t(r) * dim;
        if (packed)
          multiply(some, q, dim, columns, dim, whole(seen), scores, KEYS, false);
        else
          for (int i = 0; i < some; i++)
            dot_keys(q + i * dim, k, a.k_key, seen, dim, scores + i * KEYS);
        for (int i = 0; i < some; i++) {
          float *x = scores + i * KEYS, *sums = found.values + int64_t(r + i) * width;
          const int head = b.head * group + (r + i) % group, token = b.token + (r + i) / group;
          finish_scores(b, head, token, first, seen, x);
          weigh(whole(seen), x, width, sums, found.top[r + i], found.sum[r + i]);
        }
        multiply(some, scores, KEYS, values, seen, width, found.values + int64_t(r) * width, width,
                 true);
      }
    }
  }
  size_t attend_floats() const {
    return size_t(rows) * a.dim + ROWS * KEYS + size_t(a.dim) * (KEYS + PANEL) +
           size_t(KEYS) * width;
  }

  // What a query of a block gives, from what it found in each of the splits.
  void put_together(const Block& b, int r, const Found* found) const {
    const int head = b.head * group + r % group, token = b.token + r / group;
    float* out = a.out + b.row * a.out_batch + head * a.out_head + token * a.out_token;
    float top = a.sinks ? a.sinks[head] : -INFINITY, sum = a.sinks ? 1.f : 0.f;
    for (int s = 0; s < splits; s++) top = std::max(top, found[s].top[r]);
    if (a.sinks) sum = std::exp(a.sinks[head] - top);
    for (int s = 0; s < splits; s++)
      sum += found[s].sum[r] * (found[s].top[r] == top ? 1.f : std::exp(found[s].top[r] - top));
    // Scores of minus infinity are an overflow, as long as there are keys to have them.
    const bool blind = sum == 0 && !sees(b.row, token);
    for (int s = 0; s < splits; s++) {
      const float own = found[s].top[r];
      const float factor = blind ? 0.f : (own == top ? 1.f : std::exp(own - top)) / sum;
      const float* values = found[s].values + int64_t(r) * width;
      for (int i = 0; i < a.value_dim; i++)
        out[i] = s ? out[i] + values[i] * factor : values[i] * factor;
    }
  }
  bool sees(int row, int token) const {
    const int keys = limit(token);
    return a.mask ? shown(row, token, 0, keys) > 0 : keys > 0;
  }

  void run_all() const {
    if (splits == 1) {
      share_out(block_count(), [&](int index) {
        float* memory = scratch(Found::floats(rows, width) + attend_floats());
        const Found found(memory, rows, width);
        const Block b = block(index);
        attend(b, 0, a.keys, found, memory + Found::floats(rows, width));
        for (int r = 0; r < b.tokens * group; r++) put_together(b, r, &found);
      });
      return;
    }
    static thread_local std::vector<float> parts;
    const size_t floats = Found::floats(rows, width);
    parts.resize(std::max(parts.size(), floats * block_count() * splits));
    float* memory = parts.data();
    share_out(block_count() * splits, [&](int index) {
      const int start = index % splits * SPLIT;
      attend(block(index / splits), start, std::min(a.keys, start + SPLIT),
             Found(memory + index * floats, rows, width), scratch(attend_floats()));
    });
    share(block_count(), int64_t(rows) * width * splits, [&](int64_t from, int64_t to) {
      std::vector<Found> found;
      for (int64_t index = from; index < to; index++) {
        found.clear();
        for (int s = 0; s < splits; s++)
          found.emplace_back(memory + (index * splits + s) * floats, rows, width);
        const Block b = block(int(index));
        for (int r = 0; r < b.tokens * group; r++) put_together(b, r, found.data());
      }
    });
  }

  // Little work is done at once, by the thread that asks for it.
  template <class Do> void share_out(int units, Do work) const {
    const int64_t products = int64_t(a.batch) * a.heads * a.tokens * a.keys;
    if (products * (a.dim + a.value_dim) < 1 << 18)
      for (int i = 0; i < units; i++) work(i);
    else
      Pools::get().run(units, work);
  }
};

}  // namespace

void attention(const Attention* attention) { Attending{*attention}.run_all(); }

// ---- gates and softmax ---------------------------------------------------------------------------

void gated(const Gated* gate) {
  const Gated& g = *gate;
  share((g.count + LANES - 1) / LANES, LANES, [&](int64_t first, int64_t last) {
    first *= LANES;
    last = std::min(g.count, last * LANES);
    gated(g.gate, g.a + first, g.b + first, g.out + first, last - first);
  });
}

void softmax(const Softmax* softmax) {
  const Softmax& s = *softmax;
  share(s.rows, s.columns, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float* x = s.x + row * s.columns;
      float* out = s.out + row * s.columns;
      const int columns = s.columns, bulk = columns / LANES * LANES;
      f32xn most = all_lanes(-INFINITY);
      for (int i = 0; i < bulk; i += LANES) most = larger(load<f32xn>(x + i), most);
      float top = largest(most);
      for (int i = bulk; i < columns; i++) top = std::max(top, x[i]);
      // Of a vocabulary, a float32 sum would lose what is added late: each thousand has its own.
      double sum = 0;
      for (int i = 0; i < bulk;) {
        f32xn added = {};
        for (const int end = std::min(bulk, i + 1024); i < end; i += LANES) {
          const f32xn e = exp(load<f32xn>(x + i) - top);
          store(out + i, e);
          added += e;
        }
        sum += total(added);
      }
      float rest[LANES] = {};
      std::copy(x + bulk, x + columns, rest);
      store(rest, exp(load<f32xn>(rest) - top));
      for (int i = bulk; i < columns; i++) sum += out[i] = rest[i - bulk];
      const float inverse = float(1 / sum);
      for (int i = 0; i < columns; i++) out[i] *= inverse;
    }
  });
}

}  // namespace kernels

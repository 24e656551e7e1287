// The core of the CPU kernels: quantizes activations, cuts products into pieces for the pool, calls
// the types' kernels (format.cpp) for each, and finishes the outputs while they are in the cache.
#include <algorithm>
#include <cmath>
#include <vector>

#include "activations.h"
#include "pool.h"
#include "products.h"

namespace kernels {

// Defined by step.cpp. Weak: the core is of use without it.
#define KERNELS_STEP __attribute__((weak, visibility("hidden")))
KERNELS_STEP void rms_norm(const RmsNorm*);
KERNELS_STEP void heads(const Heads*, int32_t);
KERNELS_STEP void attention(const Attention*);
KERNELS_STEP void gated(const Gated*);
KERNELS_STEP void softmax(const Softmax*);

namespace {

constexpr int TYPES = 256;
std::atomic<const Format*> formats[TYPES];

const Format* format_of(int32_t type) {
  return type >= 0 && type < TYPES ? formats[type].load(std::memory_order_acquire) : nullptr;
}

// Memory of the calling thread that grows and stays. Each use has its own.
enum Use { NORMED, QUANTIZED, QUANTIZED_SWAPPED, PANEL, SECOND, USES };
template <class T> T* scratch(Use use, size_t count) {
  struct Block {
    void* p = nullptr;
    size_t size = 0;
    ~Block() { std::free(p); }
  };
  static thread_local Block blocks[USES];
  Block& b = blocks[use];
  const size_t wanted = (count * sizeof(T) + 63) / 64 * 64;
  if (wanted > b.size) {
    std::free(b.p);
    b.p = std::aligned_alloc(64, wanted);
    b.size = wanted;
  }
  return static_cast<T*>(b.p);
}

// ---- activations ---------------------------------------------------------------------------------

// Groups of 32 columns to integers of 8 PLANES bits.
template <int PLANES>
void quantize(const float* x, int count, bool swapped, Quantized<PLANES>& out) {
  // The greatest integer whose digits of 8 bits all fit, lowest first.
  constexpr float TOP = PLANES == 1 ? 127.f : PLANES == 2 ? 32638.f : 8355000.f;
  const i32x16 magnitude = splat<int32_t>(0x7fffffff);
  for (int g = 0; g < 8; g++) {
    f32x16 a = {}, b = {};
    if (32 * g < count) {
      a = load<f32x16>(x + 32 * g);
      b = load<f32x16>(x + 32 * g + 16);
    }
    // Without signs, floats are ordered as their bits are, and NaN and infinity come last.
    const int32_t bits = greatest(as<i32x16>(a) & magnitude, as<i32x16>(b) & magnitude);
    const bool finite = bits < 0x7f800000;
    // Below this the quotient would overflow, and nothing is lost.
    const float top = finite ? std::max(as_float(bits), 1e-30f) : 1.f;
    const f32x16 inverse = all(finite ? TOP / top : 0.f);
    // What is not finite makes the whole group NaN: the product says so, whatever W has there.
    const float step = finite ? top / TOP : NAN;
    i32x16 p = to_int(a * inverse), q = to_int(b * inverse);
    if (!finite) p = q = i32x16{};
    const float first = step * sum(p), second = step * sum(q);
    out.scale[2 * g] = out.scale[2 * g + 1] = out.x32[g] = step;
    out.sum[2 * g] = first;
    out.sum[2 * g + 1] = second;
    out.x32[8 + g] = first + second;
    const int at = 32 * place(swapped, g);
    for (int plane = 0; plane < PLANES; plane++) {
      store_bytes(out.q[plane] + at, p);
      store_bytes(out.q[plane] + at + 16, q);
      p = (p - (p << 24 >> 24)) >> 8;
      q = (q - (q << 24 >> 24)) >> 8;
    }
  }
}

template <int PLANES>
void quantize_row(const float* x, int columns, bool swapped, void* out) {
  auto* q = static_cast<Quantized<PLANES>*>(out);
  for (int s = 0; s < supers(columns); s++)
    quantize<PLANES>(x + SUPER * s, std::min(SUPER, columns - SUPER * s), swapped, q[s]);
}

size_t quantized_bytes(int planes, int columns) {
  const size_t block = planes == 1   ? sizeof(Quantized<1>)
                       : planes == 2 ? sizeof(Quantized<2>)
                                     : sizeof(Quantized<3>);
  return block * supers(columns);
}

void normalize(const float* x, const float* weight, float eps, int columns, float* out) {
  f32x16 squares = {};
  int i = 0;
  for (; i + 16 <= columns; i += 16) {
    const f32x16 v = load<f32x16>(x + i);
    squares = fma(v, v, squares);
  }
  float total = sum(squares);
  for (; i < columns; i++) total += x[i] * x[i];
  const float factor = 1.f / std::sqrt(total / columns + eps);
  for (i = 0; i < columns; i++) out[i] = x[i] * factor * (weight ? weight[i] : 1.f);
}

// Rows of activations in each form that somebody needs.
struct Rows {
  std::vector<const void*> forms[3];  // by Input: a pointer for each row

  void prepare(const float* x, int rows, int columns, int planes, const bool (&needed)[3],
               bool normed, const float* norm, float eps) {
    const int padded = (columns + 15) / 16 * 16;
    const bool copied = normed || (needed[FLOATS] && padded != columns);
    float* copy = copied ? scratch<float>(NORMED, (size_t)rows * padded) : nullptr;
    const size_t bytes = quantized_bytes(planes, columns);
    char* quantized[2] = {};
    for (int swapped = 0; swapped < 2; swapped++)
      if (needed[swapped])
        quantized[swapped] =
            scratch<char>(swapped ? QUANTIZED_SWAPPED : QUANTIZED, (size_t)rows * bytes);
    auto row = [&](int r) {
      const float* from = x + (size_t)r * columns;
      if (copied) {
        float* to = copy + (size_t)r * padded;
        if (normed) normalize(from, norm, eps, columns, to);
        else std::memcpy(to, from, sizeof(float) * columns);
        std::fill(to + columns, to + padded, 0.f);
        from = to;
      }
      for (int swapped = 0; swapped < 2; swapped++) {
        if (!needed[swapped]) continue;
        char* to = quantized[swapped] + r * bytes;
        if (planes == 1) quantize_row<1>(from, columns, swapped, to);
        else if (planes == 2) quantize_row<2>(from, columns, swapped, to);
        else quantize_row<3>(from, columns, swapped, to);
      }
    };
    constexpr int AT_ONCE = 8;
    if (rows < 2 * AT_ONCE) {
      for (int r = 0; r < rows; r++) row(r);
    } else {
      Pools::get().run((rows + AT_ONCE - 1) / AT_ONCE, [&](int i) {
        for (int r = AT_ONCE * i; r < std::min(rows, AT_ONCE * (i + 1)); r++) row(r);
      });
    }
    for (int r = 0; r < rows; r++) {
      if (needed[FLOATS])
        forms[FLOATS].push_back(copied ? copy + (size_t)r * padded : x + (size_t)r * columns);
      for (int swapped = 0; swapped < 2; swapped++)
        if (needed[swapped]) forms[swapped].push_back(quantized[swapped] + r * bytes);
    }
  }
};

// ---- pieces --------------------------------------------------------------------------------------

// One output: a matrix, or two that a gate joins, times some rows of x.
struct Part {
  const Format* format[2];
  const uint8_t* blocks[2];
  const int32_t* order[2];
  const float* bias[2];
  const void* const* x[2];
  int32_t matrices;  // 1 or 2
  int32_t rows;      // of each matrix
  int32_t count;     // rows of x
  float* const* out;
  const float* residual;  // (count, rows), or null
  int32_t first;          // number of the first of its chunks
};

// Chunks of rows of all parts.
class Job {
 public:
  Job(std::vector<Part>& parts, int columns, int planes, int gate)
      : parts_(parts), columns_(columns), planes_(planes), gate_(gate) {}

  void run() {
    size_t rows = 0;
    for (const Part& p : parts_) rows += p.rows;
    Pool& pool = Pools::get();
    // Some 64 KB of blocks at once, but four chunks for each thread. Multiples of 16: panels.
    const size_t few = 65536 / (columns_ / 2 + 1), fair = rows / (4 * pool.threads());
    step_ = std::max<int>(16, (int)std::min(few, fair) / 16 * 16);
    int chunks = 0;
    for (Part& p : parts_) {
      p.first = chunks;
      chunks += (p.rows + step_ - 1) / step_;
    }
    pool.run(chunks, [this](int i) { chunk(i); });
  }

 private:
  void chunk(int i) const {
    const auto after = std::upper_bound(parts_.begin(), parts_.end(), i,
                                        [](int i, const Part& p) { return i < p.first; });
    const Part& p = *(after - 1);
    const int begin = (i - p.first) * step_, end = std::min(p.rows, begin + step_);
    multiply(p, 0, begin, end, p.out);
    if (p.matrices == 1) return finish(p, begin, end, nullptr);
    // The second matrix's rows go to memory of this thread, which has no room for those before.
    const int width = end - begin;
    float* second = scratch<float>(SECOND, (size_t)width * p.count);
    std::vector<float*> rows(p.count);
    for (int r = 0; r < p.count; r++) rows[r] = second + (ptrdiff_t)r * width - begin;
    multiply(p, 1, begin, end, rows.data());
    finish(p, begin, end, rows.data());
  }

  void multiply(const Part& p, int which, int begin, int end, float* const* out) const {
    const Piece piece = {p.blocks[which], p.order[which], columns_, planes_,
                         begin,           end,            p.count,  p.x[which],
                         out,             scratch<float>(PANEL, (size_t)16 * p.count)};
    p.format[which]->product(&piece);
  }

  void finish(const Part& p, int begin, int end, float* const* second) const {
    const int width = end - begin;
    for (int r = 0; r < p.count; r++) {
      float* out = p.out[r] + begin;
      if (p.bias[0]) add(p.bias[0] + begin, width, out);
      if (second) {
        float* other = second[r] + begin;
        if (p.bias[1]) add(p.bias[1] + begin, width, other);
        gated(gate_, out, other, out, width);
      }
      if (p.residual) add(p.residual + (size_t)r * p.rows + begin, width, out);
    }
  }

  static void add(const float* more, int width, float* out) {
    for (int n = 0; n < width; n++) out[n] += more[n];
  }

  std::vector<Part>& parts_;
  const int columns_, planes_, gate_;
  int step_ = 16;
};

// ---- what the interface offers -------------------------------------------------------------------

void threads(int32_t count, double spin, int32_t pinned) {
  Pools::configure(count, spin, pinned);
}

int32_t add(const Format* format) {
  if (format->abi != ABI || format->type < 0 || format->type >= TYPES) return -1;
  formats[format->type].store(format, std::memory_order_release);
  return 0;
}

int32_t known(int32_t type) { return format_of(type) != nullptr; }

void product(const Product* p) {
  bool needed[3] = {};
  for (int i = 0; i < p->count; i++) needed[format_of(p->matrices[i].type)->input] = true;
  Rows rows;
  rows.prepare(p->x, p->rows, p->columns, p->planes, needed, p->normed, p->norm, p->eps);
  const int together = p->gate ? 2 : 1, outputs = p->count / together;
  std::vector<float*> outs((size_t)outputs * p->rows);
  std::vector<Part> parts(outputs);
  for (int i = 0; i < outputs; i++) {
    Part& part = parts[i];
    part = {};
    part.matrices = together;
    for (int j = 0; j < together; j++) {
      const Matrix& m = p->matrices[i * together + j];
      part.format[j] = format_of(m.type);
      part.blocks[j] = m.blocks;
      part.order[j] = m.order;
      part.bias[j] = p->biases ? p->biases[i * together + j] : nullptr;
      part.x[j] = rows.forms[part.format[j]->input].data();
      part.rows = m.rows;
    }
    part.count = p->rows;
    for (int r = 0; r < p->rows; r++)
      outs[(size_t)i * p->rows + r] = p->outs[i] + (size_t)r * part.rows;
    part.out = outs.data() + (size_t)i * p->rows;
    part.residual = p->residual;
  }
  Job(parts, p->columns, p->planes, p->gate).run();
}

// Bytes of a matrix of this type.
size_t matrix_bytes(const Format& f, int rows, int columns) {
  return (size_t)rows * (columns / f.block) * f.bytes;
}

void experts(const Experts* e) {
  bool needed[3] = {};
  for (int i = 0; i < e->count; i++) needed[format_of(e->matrices[i].type)->input] = true;
  Rows rows;
  rows.prepare(e->x, e->tokens * e->rows_per_token, e->columns, e->planes, needed, false, nullptr,
               0.f);
  // Pairs of token and choice by expert, so that each expert's blocks are decoded once.
  const int pairs = e->tokens * e->used;
  std::vector<int> first(e->experts + 1), by_expert(pairs);
  for (int i = 0; i < pairs; i++) first[e->chosen[i] + 1]++;
  for (int i = 0; i < e->experts; i++) first[i + 1] += first[i];
  std::vector<int> next(first.begin(), first.end() - 1);
  for (int i = 0; i < pairs; i++) by_expert[next[e->chosen[i]]++] = i;
  std::vector<const void*> x[3];
  for (int form = 0; form < 3; form++)
    if (needed[form])
      for (int pair : by_expert)
        x[form].push_back(
            rows.forms[form][e->rows_per_token == 1 ? pair / e->used : pair]);
  const int together = e->gate ? 2 : 1, outputs = e->count / together;
  std::vector<float*> outs((size_t)outputs * pairs);
  std::vector<Part> parts;
  for (int i = 0; i < outputs; i++) {
    float** out = outs.data() + (size_t)i * pairs;
    const int width = e->matrices[i * together].rows;
    for (int k = 0; k < pairs; k++) out[k] = e->outs[i] + (size_t)by_expert[k] * width;
    for (int expert = 0; expert < e->experts; expert++) {
      const int at = first[expert], count = first[expert + 1] - at;
      if (!count) continue;
      Part part = {};
      part.matrices = together;
      for (int j = 0; j < together; j++) {
        const Matrix& m = e->matrices[i * together + j];
        part.format[j] = format_of(m.type);
        part.blocks[j] = m.blocks + expert * matrix_bytes(*part.format[j], m.rows, e->columns);
        part.order[j] = m.order;
        const float* bias = e->biases ? e->biases[i * together + j] : nullptr;
        part.bias[j] = bias ? bias + (size_t)expert * m.rows : nullptr;
        part.x[j] = x[part.format[j]->input].data() + at;
      }
      part.rows = width;
      part.count = count;
      part.out = out + at;
      parts.push_back(part);
    }
  }
  Job(parts, e->columns, e->planes, e->gate).run();
}

void take(const Take* t) {
  const Format& f = *format_of(t->matrix.type);
  const size_t bytes = matrix_bytes(f, 1, t->columns);
  constexpr int NUMBERS = 16384;  // of a chunk
  const int at_once = std::max(1, NUMBERS / std::max(t->columns, 1));
  Pools::get().run((t->count + at_once - 1) / at_once, [&](int chunk) {
    for (int i = chunk * at_once; i < std::min(t->count, (chunk + 1) * at_once); i++) {
      const int row = t->matrix.order ? t->matrix.order[t->ids[i]] : t->ids[i];
      f.decode(t->matrix.blocks + (size_t)row * bytes, t->columns, t->out + (size_t)i * t->columns);
    }
  });
}

constexpr Core core = {ABI,     threads, add,  known,     product, experts,
                       take, rms_norm, heads, attention, gated,   softmax};

}  // namespace
}  // namespace kernels

extern "C" __attribute__((visibility("default"))) const kernels::Core* mlxrun_core() {
  return &kernels::core;
}

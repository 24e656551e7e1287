// The interface of the CPU kernels: what core.cpp and step.cpp offer and glue.cpp calls. Plain
// structs and pointers: neither MLX nor Python. Arrays are float32 and row-major unless a stride
// (in numbers, not bytes) says otherwise.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kernels {

// Changed whenever a struct below changes: objects of different versions do not meet.
constexpr int32_t ABI = 1;

// A matrix of weights in GGUF blocks, as it lies in the file.
struct Matrix {
  const uint8_t* blocks;
  const int32_t* order;  // row i of the result is row order[i] of the blocks; null: in order
  int32_t type;          // GGML's number of the type
  int32_t rows;          // of one expert, where it is a stack of them
};

enum Gate : int32_t { NO_GATE = 0, SILU = 1, GELU_TANH = 2, CLAMPED_SWIGLU = 3 };

// Products of one input with several matrices: outs[i] = x W_i^T + biases[i].
// Before: x is normalized (RMS) where `normed`. After: where `gate`, two matrices make one output,
// gate(first) * second; where `residual`, it is added to the one output there is.
struct Product {
  const Matrix* matrices;
  int32_t count;
  int32_t columns;
  int32_t planes;  // activations have 8 bits times this: 1, 2 or 3
  int32_t rows;    // of x
  const float* x;  // (rows, columns)
  int32_t normed;
  float eps;
  const float* norm;           // (columns); null: ones
  const float* const* biases;  // one pointer per matrix, each (rows of the matrix) or null; or null
  int32_t gate;
  const float* residual;  // (rows, rows of the matrix), or null
  float* const* outs;     // each (rows, rows of the matrix)
};

// Products with experts chosen by index: each matrix is a stack of `experts` matrices, one after
// the other. Input is one row per token, or one per token and choice (`rows_per_token` = used).
struct Experts {
  const Matrix* matrices;
  int32_t count;
  int32_t columns;
  int32_t planes;
  int32_t experts;
  int32_t tokens;
  int32_t used;
  int32_t rows_per_token;      // 1 or used
  const float* x;              // (tokens, rows_per_token, columns)
  const uint32_t* chosen;      // (tokens, used)
  const float* const* biases;  // one pointer per matrix, each (experts, rows) or null; or null
  int32_t gate;
  float* const* outs;  // each (tokens, used, rows of the matrix)
};

// Rows by index, as floats: out (count, columns).
struct Take {
  Matrix matrix;
  int32_t columns;
  int32_t count;
  const int32_t* ids;
  float* out;
};

// RMS norm over the last axis, and an optional sum: out = x / rms(x) * weight + residual.
struct RmsNorm {
  const float* x;  // (rows, columns)
  int32_t rows, columns;
  float eps;
  const float* weight;    // (columns), or null
  const float* residual;  // (rows, columns), or null
  float* out;
};

// Heads of a projection: (B, T, H D) becomes (B, H, T, D), normalized and rotated.
struct Heads {
  const float* x;
  int64_t batch_stride, token_stride;  // of x; a token's heads lie together
  int32_t batch, tokens, heads, dim;
  int32_t norm_at;    // 0: no norm; 1: before the rotation; 2: after it
  float eps;
  const float* norm;  // (dim), or null
  int32_t dims;       // the leading dimensions that rotate; 0: none
  float scale;        // of positions
  int32_t traditional;
  const float* frequencies;  // radians per position, (dims / 2)
  const int32_t* positions;  // of the first token of each row, (batch) or, if `shared`, (1)
  int32_t shared;
  float* out;  // (batch, heads, tokens, dim)
};

// Softmax attention with grouped heads: q (B, H, T, D), k (B, K, S, D), v (B, K, S, E).
struct Attention {
  const float *q, *k, *v;
  int32_t batch, heads, kv_heads, tokens, keys, dim, value_dim;
  int64_t q_batch, q_head, q_token;
  int64_t k_batch, k_head, k_key;
  int64_t v_batch, v_head, v_key;
  float scale;
  float softcap;         // cap * tanh(score / cap); 0: none
  const float* sinks;    // a score per head for attending to nothing, (H), or null
  const float* slopes;   // of ALiBi, (H), or null
  int32_t causal;        // token t sees the keys up to S - T + t
  const uint8_t* mask;   // booleans, or null
  int64_t mask_batch, mask_token, mask_key;  // strides; 0 where one serves all
  float* out;            // (B, H, T, E)
  int64_t out_batch, out_head, out_token;
};

// gate(a) * b, elementwise.
struct Gated {
  int32_t gate;
  int64_t count;
  const float *a, *b;
  float* out;
};

// Along the last axis.
struct Softmax {
  const float* x;  // (rows, columns)
  int32_t rows, columns;
  float* out;
};

// One type's kernels, from an object of its own (format.cpp, compiled for each type). The core
// calls them from several threads at once, for disjoint parts of the output.
struct Format;

// What the core's object exports as `mlxrun_core`.
struct Core {
  int32_t abi;
  // Size of the pool, seconds that workers wait busily before they sleep, whether each is pinned to
  // a core. Not to be called while something runs.
  void (*threads)(int32_t count, double spin, int32_t pinned);
  // Makes a type known; returns 0, or -1 where the object is of another version.
  int32_t (*add)(const Format* format);
  int32_t (*known)(int32_t type);
  void (*product)(const Product*);
  void (*experts)(const Experts*);
  void (*take)(const Take*);
  void (*rms_norm)(const RmsNorm*);
  void (*heads)(const Heads*, int32_t count);  // several in one go
  void (*attention)(const Attention*);
  void (*gated)(const Gated*);
  void (*softmax)(const Softmax*);
};

}  // namespace kernels

extern "C" const kernels::Core* mlxrun_core();
extern "C" const kernels::Format* mlxrun_format();

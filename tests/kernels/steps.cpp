// Calls the operations of a step with many shapes, and writes what comes out:
//   steps output
// Arrays have exactly the size that they need, each in memory of its own, for sanitizers. The same
// calls are made whatever it is compiled for, so that outputs can be compared.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../mlxrun/kernels/cpu/pool.h"
#include "../../mlxrun/kernels/cpu/step.h"

namespace {

using Floats = std::vector<float>;

uint64_t state = 1;

uint32_t number() {  // Knuth's MMIX generator
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t(state >> 33);
}
int between(int low, int high) { return low + int(number() % uint32_t(high - low + 1)); }
bool one_in(int n) { return between(1, n) == 1; }

Floats floats(int64_t count) {
  Floats x(count);
  for (float& f : x) f = float(between(-2000, 2000)) / 1000;
  return x;
}

std::FILE* output;

void write(const Floats& x) { std::fwrite(x.data(), sizeof(float), x.size(), output); }

int size() { return one_in(2) ? 16 * between(1, 8) : between(1, 70); }

void attend() {
  kernels::Attention a = {};
  a.batch = between(1, 2), a.kv_heads = between(1, 3), a.heads = a.kv_heads * between(1, 9);
  a.tokens = one_in(2) ? between(1, 4) : between(5, 60), a.keys = a.tokens + between(0, 200);
  if (one_in(8)) a.keys += 1100;
  a.dim = size(), a.value_dim = size();
  const int spare = between(0, 3);  // slots of the cache that are not used yet
  const int64_t slots = a.keys + spare, queries = int64_t(a.batch) * a.heads * a.tokens;
  const Floats q = floats(queries * a.dim), k = floats(a.batch * a.kv_heads * slots * a.dim),
               v = floats(a.batch * a.kv_heads * slots * a.value_dim);
  const Floats sinks = floats(a.heads);
  Floats slopes = floats(a.heads);
  for (float& slope : slopes) slope = std::fabs(slope) / 4;
  std::vector<uint8_t> mask(int64_t(a.batch) * a.tokens * a.keys);
  const int window = between(1, 80);
  for (size_t i = 0; i < mask.size(); i++) {
    const int key = int(i % a.keys), token = int(i / a.keys % a.tokens);
    mask[i] = key > a.keys - a.tokens + token - window && !one_in(5);
  }
  a.q = q.data(), a.k = k.data(), a.v = v.data();
  a.q_token = a.dim, a.q_head = a.q_token * a.tokens, a.q_batch = a.q_head * a.heads;
  a.k_key = a.dim, a.k_head = a.k_key * slots, a.k_batch = a.k_head * a.kv_heads;
  a.v_key = a.value_dim, a.v_head = a.v_key * slots, a.v_batch = a.v_head * a.kv_heads;
  a.scale = 1 / std::sqrt(float(a.dim));
  a.softcap = one_in(3) ? 20 : 0, a.causal = one_in(2);
  a.sinks = one_in(3) ? sinks.data() : nullptr;
  if (one_in(3)) {
    a.slopes = slopes.data(), a.causal = 1;  // keys that are near count, with small falls
  } else if (one_in(2)) {
    a.mask = mask.data(), a.mask_key = 1;
    a.mask_token = one_in(2) ? a.keys : 0, a.mask_batch = int64_t(a.keys) * a.tokens;
  }
  Floats out(queries * a.value_dim);
  a.out = out.data();
  a.out_head = a.value_dim, a.out_token = a.out_head * a.heads;
  a.out_batch = a.out_token * a.tokens;
  kernels::attention(&a);
  write(out);
}

void turn() {
  const int batch = between(1, 3), tokens = between(1, 9), dim = between(1, 100);
  const int dims = between(0, dim) / 2 * 2;
  std::vector<int32_t> positions(batch);
  for (int32_t& position : positions) position = between(0, 100000);
  Floats frequencies(dims / 2);
  for (size_t i = 0; i < frequencies.size(); i++) frequencies[i] = 1 / float(1 + i * i);
  const Floats weight = floats(dim);
  const bool shared = batch == 1, traditional = one_in(2);
  std::vector<Floats> inputs, outputs;
  std::vector<kernels::Heads> parts;
  for (int i = 0; i < 2; i++) {
    const int heads = between(1, 7);
    inputs.push_back(floats(int64_t(batch) * tokens * heads * dim));
    outputs.emplace_back(inputs[i].size());
    parts.push_back({inputs[i].data(), int64_t(tokens) * heads * dim, int64_t(heads) * dim, batch,
                     tokens, heads, dim, between(0, 2), 1e-6f, one_in(2) ? weight.data() : nullptr,
                     dims, 0.5f, traditional, frequencies.data(), positions.data(), shared,
                     outputs[i].data()});
  }
  kernels::heads(parts.data(), 2);
  for (const Floats& out : outputs) write(out);
}

void rows() {
  const int count = between(1, 40), columns = between(1, 700);
  const Floats x = floats(int64_t(count) * columns), y = floats(x.size()), w = floats(columns);
  Floats out(x.size());
  const kernels::RmsNorm norm = {x.data(), count, columns, 1e-5f, one_in(2) ? w.data() : nullptr,
                                 one_in(2) ? y.data() : nullptr, out.data()};
  kernels::rms_norm(&norm);
  write(out);
  const kernels::Softmax softmax = {x.data(), count, columns, out.data()};
  kernels::softmax(&softmax);
  write(out);
  for (int gate = 0; gate < 4; gate++) {
    const kernels::Gated gated = {gate, int64_t(x.size()), x.data(), y.data(), out.data()};
    kernels::gated(&gated);
    // GELU's table rounds the C library's tanh to half precision: no two libraries' are equal.
    if (gate != kernels::GELU_TANH) write(out);
  }
}

}  // namespace

int main(int, char** argv) {
  output = std::fopen(argv[1], "wb");
  if (!output) return 1;
  kernels::Pools::configure(2, 0, false);
  for (int i = 0; i < 40; i++) attend(), turn(), rows();
  return std::fclose(output) != 0;
}

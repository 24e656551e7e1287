// Products of many rows of x: out[m, n] = x[m] . W[n], or with experts.
//
// Inputs: w (experts, rows, bytes), x (count, columns), order (rows) if ORDERED; if GATHER, pairs
// are the rows of out sorted by expert, those of expert e from starts[e] to starts[e + 1], of which
// so many share a row of x.
//
// A threadgroup of four simdgroups makes 32 m by 64 n. For every 32 columns its threads decode each
// weight once into shared memory; a simdgroup multiplies 16 m by 32 n.
SHARED TILE xs[32 * 40];
SHARED TILE ws[64 * 40];
SHARED float ys[32 * 64];
const int count = x_shape[0], columns = x_shape[1], rows = w_shape[1], row_bytes = w_shape[2];
const int n0 = group_x * 64;
int expert = 0, m0 = group_y * 32, end = count, sharing = 1;
if (GATHER) {  // which expert's rows, and which 32 of them
  const int experts = starts_shape[0] - 1;
  int tile = group_y;
  while (expert < experts) {
    const int tiles = (starts[expert + 1] - starts[expert] + 31) / 32;
    if (tile < tiles) break;
    tile -= tiles;
    expert++;
  }
  m0 = expert < experts ? starts[expert] + tile * 32 : 0;
  end = expert < experts ? starts[expert + 1] : 0;
  sharing = pairs_shape[0] / count;
}
if (m0 < end) {
  Sums<TILE> sums[2];
  clear(sums[0]);
  clear(sums[1]);
  const int mine = n0 + (index >> 1) < rows ? n0 + (index >> 1) : rows - 1;
  const SIZE at = ((SIZE)expert * rows + (ORDERED ? order[mine] : mine)) * row_bytes;
  const int m16 = (simd >> 1) * 16, n32 = (simd & 1) * 32;
  for (int k0 = 0; k0 < columns; k0 += 32) {
    for (int i = index; i < 32 * 32; i += 128) {
      const int m = m0 + (i >> 5);
      const int row = m < end ? (GATHER ? pairs[m] / sharing : m) : 0;
      xs[(i >> 5) * 40 + (i & 31)] = TILE(m < end ? float(x[(SIZE)row * columns + k0 + (i & 31)]) : 0.0f);
    }
    float v[16];
    weights(w + at, k0 / 16 + (index & 1), v);
    for (int j = 0; j < 16; j++) ws[(index >> 1) * 40 + (index & 1) * 16 + j] = TILE(v[j]);
    BARRIER;
    for (int k = 0; k < 32; k += 16) {
      Left<TILE> a;
      load(a, xs + m16 * 40 + k, 40);
      for (int i = 0; i < 2; i++) {
        Right<TILE> b;
        load_transposed(b, ws + (n32 + 16 * i) * 40 + k, 40);
        multiply(sums[i], a, b);
      }
    }
    BARRIER;
  }
  for (int i = 0; i < 2; i++) store(sums[i], ys + m16 * 64 + n32 + 16 * i, 64);
  BARRIER;
  for (int i = index; i < 32 * 64; i += 128) {
    const int m = m0 + (i >> 6), n = n0 + (i & 63);
    if (m < end && n < rows) out[(SIZE)(GATHER ? pairs[m] : m) * rows + n] = T(ys[i]);
  }
}

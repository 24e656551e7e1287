// Products of few rows of x: out[m, n] = x[m] . W[n], or with the experts that `chosen` names for
// each row of out, of which so many share a row of x.
//
// Inputs: w (experts, rows, bytes), x (count, columns), order (rows) if ORDERED, chosen (rows of
// out) if GATHER. A simdgroup makes ROWS neighboring n for up to XROWS rows of x; its lanes take
// sixteen weights each, neighbors of one another, and decode every weight once.
const int count = x_shape[0], columns = x_shape[1], rows = w_shape[1], row_bytes = w_shape[2];
const int first = (group_x * SIMDGROUPS + simd) * ROWS;
if (first < rows) {
  const int m0 = GATHER ? group_y / (chosen_shape[0] / count) : group_y * XROWS;
  const int out0 = GATHER ? group_y : m0;
  const int taken = count - m0 < XROWS ? count - m0 : XROWS;
  const int expert = GATHER ? int(chosen[group_y]) : 0;
  SIZE at[ROWS];
  for (int r = 0; r < ROWS; r++) {
    const int n = first + r < rows ? first + r : rows - 1;
    at[r] = ((SIZE)expert * rows + (ORDERED ? order[n] : n)) * row_bytes;
  }
  float sums[ROWS * XROWS];
  for (int i = 0; i < ROWS * XROWS; i++) sums[i] = 0.0f;
  for (int c = lane; c < columns / 16; c += 32) {
    float q[ROWS * 16], sm[ROWS * 2];
    for (int r = 0; r < ROWS; r++) {
      DECODE(w + at[r], c, q + 16 * r, sm + 2 * r);
      for (int j = 0; j < 16; j++) q[16 * r + j] -= ZERO;
    }
    for (int m = 0; m < XROWS; m++) {
      const SIZE from = (SIZE)(m0 + (m < taken ? m : 0)) * columns + 16 * c;
      float v[16], sum = 0.0f;
      for (int j = 0; j < 16; j++) {
        v[j] = float(x[from + j]);
        sum += v[j];
      }
      for (int r = 0; r < ROWS; r++) {
        float t = 0.0f;
        for (int j = 0; j < 16; j++) t += v[j] * q[16 * r + j];
        sums[r * XROWS + m] += sm[2 * r] * t;
        if (MINIMUM) sums[r * XROWS + m] += sm[2 * r + 1] * sum;
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int m = 0; m < XROWS; m++) {
      const float t = simd_sum(sums[r * XROWS + m]);
      if (lane == 0 && m < taken && first + r < rows)
        out[(SIZE)(out0 + m) * rows + first + r] = T(t);
    }
}

// Sixteen weights of a row, for the kernels that need them as numbers.
BLOCKS_FN void weights(BLOCKS_BYTES row, int i, BLOCKS_LOCAL(float) w) {
  float q[16], sm[2];
  DECODE(row, i, q, sm);
  for (int j = 0; j < 16; j++) {
    w[j] = sm[0] * (q[j] - ZERO);
    if (MINIMUM) w[j] += sm[1];
  }
}

// Rows of a matrix by index as floats: out[i] = W[ids[i]]. Each thread makes sixteen numbers.
// Inputs: w (experts, rows, bytes), of which ids count all rows, and ids.
const int row_bytes = w_shape[2], sixteens = row_bytes / BYTES * BLOCK / 16;
const int each = group_x * 64 + index, i = each / sixteens, c = each % sixteens;
if (i < ids_shape[0]) {
  float v[16];
  weights(w + (SIZE)ids[i] * row_bytes, c, v);
  for (int j = 0; j < 16; j++) out[(SIZE)i * sixteens * 16 + 16 * c + j] = T(v[j]);
}

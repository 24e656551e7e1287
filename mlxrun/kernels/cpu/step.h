// What happens between the products of a step: norms, rotation, attention, gates. Structs, shapes
// and strides are those of kernels.h; everything is float32 and runs on the pool. The results do not
// depend on the number of threads: work is cut, and sums are made, by shape alone.
#pragma once
#include "kernels.h"

namespace kernels {

void rms_norm(const RmsNorm* norm);
// All of them have the same batch and tokens.
void heads(const Heads* parts, int32_t count);
// A query that sees no key gives zeros.
void attention(const Attention* attention);
void gated(const Gated* gate);
void softmax(const Softmax* softmax);

}  // namespace kernels

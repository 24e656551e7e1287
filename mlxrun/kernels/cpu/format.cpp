// One GGML type's kernels: compiled once for each type, with KERNELS_TYPE its name in formats.h.
#include <type_traits>

#include "products.h"

namespace kernels {

// Types of floats have no blocks.
template <class F, class = void> struct Entry {
  static constexpr Format format = {ABI, F::TYPE, 1, F::BYTES, FLOATS, product_floats<F>,
                                    decode_floats<F>};
};
template <class F> struct Entry<F, std::void_t<decltype(F::BLOCK)>> {
  static constexpr Format format = {ABI,
                                    F::TYPE,
                                    F::BLOCK,
                                    F::BYTES,
                                    F::SWAPPED ? SWAPPED_GROUPS : IN_ORDER,
                                    product<F>,
                                    decode<F>};
};

}  // namespace kernels

extern "C" __attribute__((visibility("default"))) const kernels::Format* mlxrun_format() {
  return &kernels::Entry<kernels::KERNELS_TYPE>::format;
}

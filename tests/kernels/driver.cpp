// Runs products and decodes rows with objects of another processor, under an emulator:
//   driver core.so format.so input output
// Input: for each call seven int32 (0: product, 1: take; planes; rows of x, or ids; columns; rows of
// the matrix; type; bytes of its blocks), the blocks, then x as floats, or the ids. Output: floats.
#include <dlfcn.h>

#include <cstdio>
#include <vector>

#include "../../mlxrun/kernels/cpu/kernels.h"

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  void* core_object = dlopen(argv[1], RTLD_NOW);
  void* format_object = dlopen(argv[2], RTLD_NOW);
  if (!core_object || !format_object) return std::fprintf(stderr, "%s\n", dlerror()), 3;
  const auto* core = ((const kernels::Core* (*)())dlsym(core_object, "mlxrun_core"))();
  core->threads(2, 0, 0);
  if (core->add(((const kernels::Format* (*)())dlsym(format_object, "mlxrun_format"))())) return 4;
  std::FILE *in = std::fopen(argv[3], "rb"), *out = std::fopen(argv[4], "wb");
  if (!in || !out) return 5;
  for (int32_t h[7]; std::fread(h, sizeof h, 1, in) == 1;) {
    const int32_t planes = h[1], count = h[2], columns = h[3], rows = h[4];
    std::vector<uint8_t> blocks(h[6]);
    if (std::fread(blocks.data(), 1, blocks.size(), in) != blocks.size()) return 6;
    const kernels::Matrix matrix = {blocks.data(), nullptr, h[5], rows};
    std::vector<float> y;
    if (h[0] == 0) {
      std::vector<float> x((size_t)count * columns);
      if (std::fread(x.data(), 4, x.size(), in) != x.size()) return 6;
      y.resize((size_t)count * rows);
      float* outs[] = {y.data()};
      kernels::Product p = {};
      p.matrices = &matrix;
      p.count = 1;
      p.columns = columns;
      p.planes = planes;
      p.rows = count;
      p.x = x.data();
      p.outs = outs;
      core->product(&p);
    } else {
      std::vector<int32_t> ids(count);
      if (std::fread(ids.data(), 4, ids.size(), in) != ids.size()) return 6;
      y.resize((size_t)count * columns);
      const kernels::Take t = {matrix, columns, count, ids.data(), y.data()};
      core->take(&t);
    }
    std::fwrite(y.data(), 4, y.size(), out);
  }
  std::fclose(out);
  return 0;
}

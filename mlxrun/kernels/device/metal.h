// What blocks.h and the kernels of this folder need of Metal.
#define BLOCKS_FN inline
#define BLOCKS_BYTES const device uchar*
#define BLOCKS_TABLE constant
#define BLOCKS_LOCAL(T) thread T*
typedef float blocks_code;
BLOCKS_FN float blocks_half_of(uint u) { return float(as_type<half>(ushort(u))); }
BLOCKS_FN float blocks_float(uint u) { return as_type<float>(u); }

#define SHARED threadgroup
#define SIZE ulong
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)

// 16 x 16 numbers as four matrices of 8 x 8, of which each lane of a simdgroup has two elements.
template <typename T>
struct Tile {
  simdgroup_matrix<T, 8, 8> part[4];
};
template <typename T>
using Left = Tile<T>;
template <typename T>
using Right = Tile<T>;
template <typename T>
using Sums = Tile<float>;

BLOCKS_FN void clear(thread Tile<float>& c) {
  for (int i = 0; i < 4; i++) c.part[i] = simdgroup_matrix<float, 8, 8>(0.0f);
}

// Pointers are to memory that the threadgroup shares, rows of `width` numbers.
template <typename T, typename Pointer>
BLOCKS_FN void load(thread Tile<T>& a, Pointer p, int width) {
  for (int i = 0; i < 4; i++)
    simdgroup_load(a.part[i], p + (i >> 1) * 8 * width + (i & 1) * 8, ulong(width));
}
template <typename T, typename Pointer>
BLOCKS_FN void load_transposed(thread Tile<T>& b, Pointer p, int width) {
  for (int i = 0; i < 4; i++)
    simdgroup_load(b.part[i], p + (i & 1) * 8 * width + (i >> 1) * 8, ulong(width), ulong2(0, 0),
                   true);
}
template <typename T, typename Pointer>
BLOCKS_FN void store(thread Tile<T>& c, Pointer p, int width) {
  for (int i = 0; i < 4; i++)
    simdgroup_store(c.part[i], p + (i >> 1) * 8 * width + (i & 1) * 8, ulong(width));
}

// c += a b
template <typename T>
BLOCKS_FN void multiply(thread Tile<float>& c, thread Tile<T>& a, thread Tile<T>& b) {
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 2; k++)
      simdgroup_multiply_accumulate(c.part[i], a.part[(i & 2) + k], b.part[2 * k + (i & 1)],
                                    c.part[i]);
}

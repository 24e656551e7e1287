// What blocks.h and the kernels of this folder need of CUDA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
#define BLOCKS_FN static __device__ __forceinline__
#define BLOCKS_BYTES const unsigned char*
#define BLOCKS_TABLE static __device__ const
#define BLOCKS_LOCAL(T) T*
typedef float blocks_code;
BLOCKS_FN float blocks_half_of(unsigned u) { return __half2float(__ushort_as_half((unsigned short)u)); }
BLOCKS_FN float blocks_float(unsigned u) { return __uint_as_float(u); }

#define SHARED __shared__ __align__(32)
#define SIZE unsigned long long
#define BARRIER __syncthreads()

BLOCKS_FN float simd_sum(float v) {
  for (int step = 16; step > 0; step >>= 1) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// 16 x 16 numbers, of which each lane of a warp has eight. Halves are multiplied by tensor cores;
// for floats, whose product they would round, a tile to multiply is where it lies and how wide, and
// a lane sums half a row.
template <typename T>
struct Left {
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, T, nvcuda::wmma::row_major> part;
};
template <typename T>
struct Right {
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, T, nvcuda::wmma::col_major> part;
};
template <typename T>
struct Sums {
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> part;
};
template <>
struct Left<float> {
  const float* p;
  int width;
};
template <>
struct Right<float> {
  const float* p;
  int width;
};
template <>
struct Sums<float> {
  float part[8];
};

template <typename T>
BLOCKS_FN void clear(Sums<T>& c) { nvcuda::wmma::fill_fragment(c.part, 0.0f); }
template <typename T>
BLOCKS_FN void load(Left<T>& a, const T* p, int width) {
  nvcuda::wmma::load_matrix_sync(a.part, p, width);
}
template <typename T>
BLOCKS_FN void load_transposed(Right<T>& b, const T* p, int width) {
  nvcuda::wmma::load_matrix_sync(b.part, p, width);
}
template <typename T>
BLOCKS_FN void store(Sums<T>& c, float* p, int width) {
  nvcuda::wmma::store_matrix_sync(p, c.part, width, nvcuda::wmma::mem_row_major);
}
template <typename T>
BLOCKS_FN void multiply(Sums<T>& c, Left<T>& a, Right<T>& b) {
  nvcuda::wmma::mma_sync(c.part, a.part, b.part, c.part);
}

BLOCKS_FN void clear(Sums<float>& c) {
  for (int i = 0; i < 8; i++) c.part[i] = 0.0f;
}
BLOCKS_FN void load(Left<float>& a, const float* p, int width) {
  a.p = p;
  a.width = width;
}
BLOCKS_FN void load_transposed(Right<float>& b, const float* p, int width) {
  b.p = p;
  b.width = width;
}
BLOCKS_FN void multiply(Sums<float>& c, Left<float>& a, Right<float>& b) {
  const int lane = threadIdx.x & 31, row = lane >> 1, first = (lane & 1) * 8;
  for (int k = 0; k < 16; k++)
    for (int i = 0; i < 8; i++)
      c.part[i] += a.p[row * a.width + k] * b.p[(first + i) * b.width + k];
}
BLOCKS_FN void store(Sums<float>& c, float* p, int width) {
  const int lane = threadIdx.x & 31, row = lane >> 1, first = (lane & 1) * 8;
  for (int i = 0; i < 8; i++) p[row * width + first + i] = c.part[i];
}

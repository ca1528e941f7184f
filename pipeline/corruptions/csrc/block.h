// How a stage runs: a block of threads that share memory, either one CPU thread looping or one
// CUDA thread block. A stage is written once, as phases over index ranges; each phase ends with a
// barrier. The iterations of one phase must not depend on each other.
#pragma once
#include "platform.h"
#include "sample.h"

namespace vqsa {
namespace VQSA_ISA {

// Tile sizes: a CPU thread takes whole rows, a CUDA block a small rectangle.
struct TileShape {
  int width;   // pixels
  int height;  // pixels
  int items;   // for one-dimensional stages
};

// A rectangle of the image.
struct Tile {
  int x, y, width, height;
};
VQSA_HD int tile_count(const Sample& s, const TileShape& shape) {
  return ceil_div(s.width, shape.width) * ceil_div(s.height, shape.height);
}
VQSA_HD Tile tile_at(const Sample& s, const TileShape& shape, int tile) {
  const int across = ceil_div(s.width, shape.width);
  Tile t;
  t.x = tile % across * shape.width;
  t.y = tile / across * shape.height;
  t.width = least(shape.width, s.width - t.x);
  t.height = least(shape.height, s.height - t.y);
  return t;
}

#if defined(__GNUC__) && !defined(__CUDACC__)
// Transposes a 4 x 4 matrix, rows `stride` apart, with vector shuffles, which the compiler does not
// find by itself.
VQSA_HD void transpose_4x4(const int32_t* VQSA_RESTRICT from, int32_t* VQSA_RESTRICT to, int stride) {
  typedef int32_t Row __attribute__((vector_size(16), aligned(4), may_alias));
  typedef int32_t Four __attribute__((vector_size(16)));
  const Four low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  // Interleaving rows i and i + 2 twice moves every element to its place.
  Four a[4], b[4];
  for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const Row*>(from + i * stride);
  for (int i = 0; i < 2; ++i) {
    b[2 * i] = __builtin_shuffle(a[i], a[i + 2], low);
    b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 2], high);
  }
  for (int i = 0; i < 2; ++i) {
    *reinterpret_cast<Row*>(to + 2 * i * stride) = __builtin_shuffle(b[i], b[i + 2], low);
    *reinterpret_cast<Row*>(to + (2 * i + 1) * stride) = __builtin_shuffle(b[i], b[i + 2], high);
  }
}
#endif

struct HostBlock {
  TileShape shape;
  unsigned char* shared;
  const Tables* tables;

  // One thread runs the block from start to end, so a stage may use sequential forms.
  static constexpr bool kSequential = true;

  template <class F>
  VQSA_HD void each(int n, F f) const {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) f(i);
  }
  template <class F>
  VQSA_HD void rows(int height, int width, F f) const {
    for (int y = 0; y < height; ++y) {
#pragma GCC ivdep
      for (int x = 0; x < width; ++x) f(y, x);
    }
  }
  // rows() of `eights` times eight columns: f(y, x / 8, x % 8).
  template <class F>
  VQSA_HD void eights(int height, int eights, F f) const {
    for (int y = 0; y < height; ++y) {
      for (int e = 0; e < eights; ++e) {
#pragma GCC ivdep
#pragma GCC unroll 1
        for (int i = 0; i < 8; ++i) f(y, e, i);
      }
    }
  }
  // Transposes the 8 x 8 matrices that tile `bands` times 8 rows, `stride` apart, of `blocks` times 8
  // values, each in its place.
  VQSA_HD void transpose(int bands, int blocks, int stride, const int32_t* from, int32_t* to) const {
#if defined(__GNUC__) && !defined(__CUDACC__)
    for (int band = 0; band < bands; ++band) {
      for (int i = 0; i < blocks; ++i) {
        const int at = 8 * band * stride + 8 * i, below = at + 4 * stride;
        transpose_4x4(from + at, to + at, stride);
        transpose_4x4(from + at + 4, to + below, stride);
        transpose_4x4(from + below, to + at + 4, stride);
        transpose_4x4(from + below + 4, to + below + 4, stride);
      }
    }
#else
    eights(8 * bands, blocks, [=](int y, int block, int i) {
      to[y * stride + 8 * block + i] = from[(y - y % 8 + i) * stride + 8 * block + y % 8];
    });
#endif
  }
  // Adds f over the range to *total: exact for integers, in any order.
  template <class F>
  VQSA_HD void sum(int height, int width, uint32_t* total, F f) const {
    uint32_t s = 0;
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) s += f(y, x);
    }
    *total += s;
  }
  template <class F>
  VQSA_HD void sum(int n, uint32_t* total, F f) const {
    sum(1, n, total, [=](int, int i) { return f(i); });
  }
  // *result becomes the largest of itself and f over the range.
  template <class F>
  VQSA_HD void largest(int height, int width, uint32_t* result, F f) const {
    uint32_t m = *result;
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) m = greatest(m, f(y, x));
    }
    *result = m;
  }
  template <class F>
  VQSA_HD void largest(int n, uint32_t* result, F f) const {
    largest(1, n, result, [=](int, int i) { return f(i); });
  }
  // done(y, x, sum over k < taps of tap(y, x, k)), summed in the order of k. The CPU sums many x at
  // a time, tap by tap, so that the loop over x is the vector loop.
  template <class T, class Tap, class Done>
  VQSA_HD void accumulate(int height, int width, int taps, Tap tap, Done done) const {
    for (int y = 0; y < height; ++y) {
      int x = 0;
      for (; x + 64 <= width; x += 64) accumulate_run<64, T>(y, x, taps, tap, done);
      for (; x + 16 <= width; x += 16) accumulate_run<16, T>(y, x, taps, tap, done);
      for (; x < width; ++x) {
        T total = T(0);
        for (int k = 0; k < taps; ++k) total += tap(y, x, k);
        done(y, x, total);
      }
    }
  }
  template <int kRun, class T, class Tap, class Done>
  VQSA_HD static void accumulate_run(int y, int x0, int taps, Tap tap, Done done) {
    T total[kRun];
    for (int x = 0; x < kRun; ++x) total[x] = T(0);
    for (int k = 0; k < taps; ++k) {
#pragma GCC ivdep
      for (int x = 0; x < kRun; ++x) total[x] += tap(y, x0 + x, k);
    }
#pragma GCC ivdep
    for (int x = 0; x < kRun; ++x) done(y, x0 + x, total[x]);
  }
};

// The same stages with CUDA's tile sizes and parallel forms, run by one CPU thread: what the tests
// use where there is no GPU.
struct EmulatedBlock : HostBlock {
  static constexpr bool kSequential = false;
};

#if defined(__CUDACC__)
struct DeviceBlock {
  TileShape shape;
  unsigned char* shared;
  const Tables* tables;

  static constexpr bool kSequential = false;

  __device__ __forceinline__ int thread() const { return threadIdx.y * 32 + threadIdx.x; }
  __device__ __forceinline__ int threads() const { return blockDim.y * 32; }
  // From every thread's share to one word of global memory, once per warp.
  __device__ __forceinline__ static void add(uint32_t share, uint32_t* total) {
    share = __reduce_add_sync(0xffffffffu, share);
    if (threadIdx.x == 0) atomicAdd(total, share);
    __syncthreads();
  }
  __device__ __forceinline__ static void raise(uint32_t share, uint32_t* result) {
    share = __reduce_max_sync(0xffffffffu, share);
    if (threadIdx.x == 0) atomicMax(result, share);
    __syncthreads();
  }

  template <class F>
  __device__ __forceinline__ void each(int n, F f) const {
    for (int i = thread(); i < n; i += threads()) f(i);
    __syncthreads();
  }
  template <class F>
  __device__ __forceinline__ void rows(int height, int width, F f) const {
    for (int y = threadIdx.y; y < height; y += blockDim.y) {
      for (int x = threadIdx.x; x < width; x += 32) f(y, x);
    }
    __syncthreads();
  }
  template <class F>
  __device__ __forceinline__ void eights(int height, int eights, F f) const {
    rows(height, 8 * eights, [=](int y, int x) { f(y, x >> 3, x & 7); });
  }
  __device__ __forceinline__ void transpose(int bands, int blocks, int stride, const int32_t* from, int32_t* to) const {
    rows(8 * bands, 8 * blocks, [=](int y, int x) {
      to[y * stride + x] = from[((y & ~7) + (x & 7)) * stride + (x & ~7) + (y & 7)];
    });
  }
  template <class F>
  __device__ __forceinline__ void sum(int height, int width, uint32_t* total, F f) const {
    uint32_t s = 0;
    for (int y = threadIdx.y; y < height; y += blockDim.y) {
      for (int x = threadIdx.x; x < width; x += 32) s += f(y, x);
    }
    add(s, total);
  }
  template <class F>
  __device__ __forceinline__ void sum(int n, uint32_t* total, F f) const {
    uint32_t s = 0;
    for (int i = thread(); i < n; i += threads()) s += f(i);
    add(s, total);
  }
  template <class F>
  __device__ __forceinline__ void largest(int height, int width, uint32_t* result, F f) const {
    uint32_t m = 0;
    for (int y = threadIdx.y; y < height; y += blockDim.y) {
      for (int x = threadIdx.x; x < width; x += 32) m = greatest(m, f(y, x));
    }
    raise(m, result);
  }
  template <class F>
  __device__ __forceinline__ void largest(int n, uint32_t* result, F f) const {
    uint32_t m = 0;
    for (int i = thread(); i < n; i += threads()) m = greatest(m, f(i));
    raise(m, result);
  }
  template <class T, class Tap, class Done>
  __device__ __forceinline__ void accumulate(int height, int width, int taps, Tap tap, Done done) const {
    for (int y = threadIdx.y; y < height; y += blockDim.y) {
      for (int x = threadIdx.x; x < width; x += 32) {
        T total = T(0);
        for (int k = 0; k < taps; ++k) total += tap(y, x, k);
        done(y, x, total);
      }
    }
    __syncthreads();
  }
};
#endif

}  // namespace VQSA_ISA
}  // namespace vqsa

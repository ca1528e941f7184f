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
  // Sums f over the range into *total: exact for integers, in any order.
  template <class F>
  VQSA_HD void sum(int n, uint32_t* total, F f) const {
    uint32_t s = 0;
    for (int i = 0; i < n; ++i) s += f(i);
    *total += s;
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
  template <class F>
  VQSA_HD void largest(int n, uint32_t* result, F f) const {
    uint32_t m = *result;
    for (int i = 0; i < n; ++i) {
      const uint32_t v = f(i);
      m = m < v ? v : m;
    }
    *result = m;
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
  __device__ __forceinline__ void sum(int n, uint32_t* total, F f) const {
    uint32_t s = 0;
    for (int i = thread(); i < n; i += threads()) s += f(i);
    s = __reduce_add_sync(0xffffffffu, s);
    if (threadIdx.x == 0) atomicAdd(total, s);
    __syncthreads();
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
  template <class F>
  __device__ __forceinline__ void largest(int n, uint32_t* result, F f) const {
    uint32_t m = 0;
    for (int i = thread(); i < n; i += threads()) {
      const uint32_t v = f(i);
      m = m < v ? v : m;
    }
    m = __reduce_max_sync(0xffffffffu, m);
    if (threadIdx.x == 0) atomicMax(result, m);
    __syncthreads();
  }
};
#endif

}  // namespace VQSA_ISA
}  // namespace vqsa

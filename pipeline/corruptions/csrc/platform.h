// What the same source needs to compile for a CPU and for CUDA.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define VQSA_HD __host__ __device__ __forceinline__
#define VQSA_RESTRICT __restrict__
#else
#define VQSA_HD inline __attribute__((always_inline))
#define VQSA_RESTRICT __restrict
#endif

// The CPU code is compiled once per instruction set, each time in a namespace of its own, so that
// the linker can never take an inline function of one set for another's.
#ifndef VQSA_ISA
#define VQSA_ISA generic
#endif

namespace vqsa {
namespace VQSA_ISA {

template <class T>
VQSA_HD T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
VQSA_HD T greatest(T a, T b) {
  return a < b ? b : a;
}
template <class T>
VQSA_HD T clamp(T v, T low, T high) {
  return least(greatest(v, low), high);
}
VQSA_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Both references clip, scale to 255 and cast, which truncates. `v` is in 0..255 units.
VQSA_HD uint8_t quantise(float v) { return static_cast<uint8_t>(static_cast<int>(clamp(v, 0.0f, 255.0f))); }

}  // namespace VQSA_ISA
}  // namespace vqsa

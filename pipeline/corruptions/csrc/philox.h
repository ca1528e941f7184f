// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3" (SC 2011). A draw is a pure function of (key, stream, index): no state anywhere.
#pragma once
#include "platform.h"

namespace vqsa {
namespace VQSA_ISA {

struct Words4 {
  uint32_t w0, w1, w2, w3;
};

VQSA_HD Words4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#else
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// Streams keep the different draws of one key apart.
enum Stream : uint32_t {
  kStreamPixel = 0,   // one word per pixel value
  kStreamScalar = 1,  // a few words per image: angle, texture, crop, affine points
  kStreamField = 2,   // one word per field element; `sub` tells fields, levels or iterations apart
};

VQSA_HD Words4 draw_words(uint64_t key, uint32_t stream, uint32_t sub, uint32_t index) {
  return philox4x32(index, sub, stream, 0u, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

VQSA_HD uint32_t word_of(const Words4& q, int j) { return j == 0 ? q.w0 : j == 1 ? q.w1 : j == 2 ? q.w2 : q.w3; }

}  // namespace VQSA_ISA
}  // namespace vqsa

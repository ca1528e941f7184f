// ldmatrix, mma and wgmma, fragment for fragment; sums are rounded towards zero after every eight products.
#pragma once

#include "halves.h"
#include "threads.h"

namespace vqsa::codebook {

NO_TSAN inline void load_matrix_x4(uint32_t (&out)[4], const void* shared) {
  struct Slot {
    uint16_t row[8];
    uint32_t out[4];
  } slot;
#if defined(__SANITIZE_THREAD__)
  __tsan_read16(const_cast<void*>(shared));
#endif
  std::memcpy(slot.row, shared, 16);
  shim::warp_collective(&slot, [](void** slots) NO_TSAN {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const Slot* from = static_cast<Slot*>(slots[matrix * 8 + lane / 4]);
        std::memcpy(&static_cast<Slot*>(slots[lane])->out[matrix], &from->row[lane % 4 * 2], 4);
      }
    }
  });
  std::memcpy(out, slot.out, 16);
}

/// acc += A·Bᵀ of the warp's tile, fragment for fragment as mma.m16n8k16 has them.
template <int MT, int NT>
NO_TSAN inline void warp_mma(float (&acc)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2]) {
  struct Slot {
    float (*acc)[NT][4];
    const uint32_t (*a)[4];
    const uint32_t (*b)[2];
  } slot = {acc, a, b};
  shim::warp_collective(&slot, [](void** slots) NO_TSAN {
    const float* table = shim::half_table();
    static thread_local double left[MT * 16][16], right[16][NT * 8];
    for (int lane = 0; lane < 32; ++lane) {
      const Slot* own = static_cast<Slot*>(slots[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        const int shift = 16 * half;
        for (int i = 0; i < MT; ++i) {
          left[i * 16 + group][pair + half] = table[own->a[i][0] >> shift & 0xFFFF];
          left[i * 16 + group + 8][pair + half] = table[own->a[i][1] >> shift & 0xFFFF];
          left[i * 16 + group][pair + 8 + half] = table[own->a[i][2] >> shift & 0xFFFF];
          left[i * 16 + group + 8][pair + 8 + half] = table[own->a[i][3] >> shift & 0xFFFF];
        }
        for (int j = 0; j < NT; ++j) {
          right[pair + half][j * 8 + group] = table[own->b[j][0] >> shift & 0xFFFF];
          right[pair + 8 + half][j * 8 + group] = table[own->b[j][1] >> shift & 0xFFFF];
        }
      }
    }
    double sum[NT * 8];
    for (int row = 0; row < MT * 16; ++row) {
      auto element = [&](int column) -> float& {
        const Slot* owner = static_cast<Slot*>(slots[row % 8 * 4 + column % 8 / 2]);
        return owner->acc[row / 16][column / 8][(row % 16 / 8) * 2 + column % 2];
      };
      for (int column = 0; column < NT * 8; ++column) sum[column] = element(column);
      for (int first = 0; first < 16; first += 8) {
        for (int k = first; k < first + 8; ++k)
          for (int column = 0; column < NT * 8; ++column) sum[column] += left[row][k] * right[k][column];
        for (int column = 0; column < NT * 8; ++column) sum[column] = shim::towards_zero(sum[column]);
      }
      for (int column = 0; column < NT * 8; ++column) element(column) = float(sum[column]);
    }
  });
}

inline void wgmma_begin() {}
inline void wgmma_64x256x16(float (&acc)[32][4], const unsigned char* a, const unsigned char* b, int k, bool add) {
  this_fiber().products.back().push_back({&acc[0][0], a, b, k, add});
}
inline void wgmma_commit() { this_fiber().products.emplace_back(); }
/// Carries the products out, as late as they may be; each thread its own part.
template <int kPending>
inline void wgmma_wait(float (&)[32][4]) {
  auto& products = this_fiber().products;
  const float* table = shim::half_table();
  const int lane = thread_index() % 32, warp = thread_index() / 32 % 4;
  while (static_cast<int>(products.size()) - 1 > kPending) {
    for (const shim::Product& p : products.front()) {
      auto values = [&](const unsigned char* tile, int row, double (&out)[16]) {
        for (int half = 0; half < 2; ++half) {
          uint16_t bits[8];
          std::memcpy(bits, tile + row * 128 + (((p.k * 2 + half) ^ (row & 7)) << 4), 16);
          for (int i = 0; i < 8; ++i) out[half * 8 + i] = table[bits[i]];
        }
      };
      double left[2][16], right[16];
      for (int h = 0; h < 2; ++h) values(p.a, warp * 16 + lane / 4 + h * 8, left[h]);
      for (int column = 0; column < 64; ++column) {
        values(p.b, column / 2 * 8 + lane % 4 * 2 + column % 2, right);
        for (int h = 0; h < 2; ++h) {
          float& element = p.acc[column / 2 * 4 + h * 2 + column % 2];
          double sum = p.add ? element : 0.0;
          for (int first = 0; first < 16; first += 8) {
            for (int i = first; i < first + 8; ++i) sum += left[h][i] * right[i];
            sum = shim::towards_zero(sum);
          }
          element = float(sum);
        }
      }
    }
    products.erase(products.begin());
  }
}

}  // namespace vqsa::codebook

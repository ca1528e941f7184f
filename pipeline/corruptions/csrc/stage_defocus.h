// defocus_blur: correlation with a soft disk, borders mirrored without repeating the edge. Most of
// the disk has one weight: that part is a sum of row runs, taken from exact integer prefix sums; only
// the rim is weighted tap by tap, four mirrored taps at a time.
#pragma once
#include "stage_noise.h"

namespace vqsa {
namespace VQSA_ISA {

VQSA_HD int mirror_101(int i, int n) {
  if (i < 0) i = -i;
  return i >= n ? 2 * (n - 1) - i : i;
}

struct Defocus {
  static constexpr int kLargestRadius = 10;

  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) { return tile_count(s, shape); }
  static VQSA_HD int padded_rows(const TileShape& shape) { return shape.height + 2 * kLargestRadius; }
  static VQSA_HD int padded_values(const TileShape& shape) { return 3 * (shape.width + 2 * kLargestRadius + 1); }
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape& shape) {
    const size_t padded = static_cast<size_t>(padded_rows(shape)) * padded_values(shape);
    return 4 * padded + 4 * static_cast<size_t>(shape.height) * 3 * shape.width + padded;
  }

  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const Tile t = tile_at(s, b.shape, tile);
    const DiskKernel& kernel = b.tables->disk[s.set][s.severity - 1];
    const int radius = kernel.radius, height = s.height, width = s.width;
    const int rows = t.height + 2 * radius, span = 3 * (t.width + 2 * radius + 1);
    // Row sums up to and including a value; the first three columns are zero.
    int32_t* VQSA_RESTRICT prefix = reinterpret_cast<int32_t*>(b.shared);
    int32_t* VQSA_RESTRICT plateau = prefix + rows * span;
    uint8_t* VQSA_RESTRICT padded = reinterpret_cast<uint8_t*>(plateau + t.height * 3 * t.width);
    const uint8_t* VQSA_RESTRICT in = s.in;
    const size_t stride = 3 * static_cast<size_t>(width);

    b.rows(rows, 3 * (radius + 1), [=](int y, int v) {  // left of the tile; the first column is unused
      const int x = mirror_101(t.x - radius - 1 + v / 3, width);
      padded[y * span + v] = v < 3 ? 0 : in[mirror_101(t.y - radius + y, height) * stride + 3 * x + v % 3];
    });
    b.rows(rows, 3 * t.width, [=](int y, int v) {
      padded[y * span + 3 * (radius + 1) + v] = in[mirror_101(t.y - radius + y, height) * stride + 3 * t.x + v];
    });
    b.rows(rows, 3 * radius, [=](int y, int v) {
      const int x = mirror_101(t.x + t.width + v / 3, width);
      padded[y * span + 3 * (radius + 1 + t.width) + v] = in[mirror_101(t.y - radius + y, height) * stride + 3 * x + v % 3];
    });
    b.each(rows * 3, [=](int i) {
      const int y = i / 3, channel = i % 3;
      int32_t sum = 0;
      for (int v = channel; v < span; v += 3) {
        sum += padded[y * span + v];
        prefix[y * span + v] = sum;
      }
    });

    const int32_t* inner = kernel.inner;
    b.template accumulate<int32_t>(
        t.height, 3 * t.width, 2 * radius + 1,
        [=](int y, int v, int k) {
          const int run = inner[k < radius ? radius - k : k - radius];
          const int32_t* row = prefix + (y + k) * span + 3 * (radius + 1) + v;
          return run < 0 ? 0 : row[3 * run] - row[-3 * (run + 1)];
        },
        [=](int y, int v, int32_t sum) { plateau[y * 3 * t.width + v] = sum; });

    const RimTap* rim = kernel.rim;
    const float weight = kernel.plateau;
    uint8_t* VQSA_RESTRICT out = s.out;
    b.template accumulate<float>(
        t.height, 3 * t.width, kernel.rim_taps,
        [=](int y, int v, int k) {
          const int dx = 3 * rim[k].dx;
          const uint8_t* above = padded + (y + radius - rim[k].dy) * span + 3 * (radius + 1) + v;
          const uint8_t* below = padded + (y + radius + rim[k].dy) * span + 3 * (radius + 1) + v;
          return rim[k].weight * static_cast<float>(above[-dx] + above[dx] + below[-dx] + below[dx]);
        },
        [=](int y, int v, float sum) {
          const float total = sum + weight * static_cast<float>(plateau[y * 3 * t.width + v]);
          out[(t.y + y) * stride + 3 * t.x + v] = quantise(total);
        });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

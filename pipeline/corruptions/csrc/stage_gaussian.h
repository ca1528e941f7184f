// gaussian_blur and glass_blur: a separable Gaussian with clamped borders, truncated to 8 bits.
// Rows are treated as 3 * width values: a neighbour in x is 3 values away, whatever the channel.
#pragma once
#include "stage_noise.h"

namespace vqsa {
namespace VQSA_ISA {

// Vertical pass into shared memory, for the tile and `radius` columns on each side; then horizontal.
template <class B>
VQSA_HD void blur_tile(const B& b, const Sample& s, int tile, const GaussianTaps& taps, const uint8_t* source,
                       uint8_t* target) {
  const Tile t = tile_at(s, b.shape, tile);
  const int radius = taps.radius, height = s.height, width = s.width;
  const int span = 3 * (t.width + 2 * radius);
  float* VQSA_RESTRICT columns = reinterpret_cast<float*>(b.shared);
  const float* VQSA_RESTRICT w = taps.w;
  const size_t stride = 3 * static_cast<size_t>(width);
  const uint8_t* VQSA_RESTRICT in = source;
  uint8_t* VQSA_RESTRICT out = target;

  // Values inside the image first, then the clamped columns beside it.
  const int left = greatest(0, radius - t.x), right = greatest(0, t.x + t.width + radius - width);
  const int inner = span - 3 * (left + right);
  const size_t origin = 3 * static_cast<size_t>(t.x - radius + left);
  b.template accumulate<float>(
      t.height, inner, radius + 1,
      [=](int y, int v, int k) {
        const int above = greatest(t.y + y - k, 0), below = least(t.y + y + k, height - 1);
        const int pair = in[above * stride + origin + v] + in[below * stride + origin + v];
        return (k == 0 ? 0.5f * w[0] : w[k]) * static_cast<float>(pair);
      },
      [=](int y, int v, float sum) { columns[y * span + 3 * left + v] = sum; });
  b.rows(t.height, 3 * left, [=](int y, int v) { columns[y * span + v] = columns[y * span + 3 * left + v % 3]; });
  b.rows(t.height, 3 * right, [=](int y, int v) {
    columns[y * span + span - 3 * right + v] = columns[y * span + span - 3 * right - 3 + v % 3];
  });
  b.template accumulate<float>(
      t.height, 3 * t.width, radius + 1,
      [=](int y, int v, int k) {
        const float* row = columns + y * span + 3 * radius + v;
        return (k == 0 ? 0.5f * w[0] : w[k]) * (row[-3 * k] + row[3 * k]);
      },
      [=](int y, int v, float sum) { out[(t.y + y) * stride + 3 * t.x + v] = quantise(sum); });
}

template <int kLargestRadius>
struct GaussianGrid : TileGrid {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape& shape) {
    return sizeof(float) * shape.height * 3 * (shape.width + 2 * kLargestRadius);
  }
};

struct GaussianBlur : GaussianGrid<24> {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    blur_tile(b, s, tile, b.tables->gaussian[s.set][s.severity - 1], s.in, s.out);
  }
};

// Glass blur keeps two 8-bit images in its scratch: the parallel form goes back and forth.
VQSA_HD uint8_t* glass_image(const Sample& s, int which) {
  return s.work + kAccWords * 4 + static_cast<size_t>(which) * 3 * s.height * s.width;
}
VQSA_HD int glass_iterations(const Sample& s, const Tables* t) { return static_cast<int>(constants_of(s, t).v[2]); }
VQSA_HD int glass_reach(const Sample& s, const Tables* t) { return static_cast<int>(constants_of(s, t).v[1]); }

// Fields: per iteration and pixel two int16, the column and row offset, uniform in [-reach, reach - 1].
struct GlassDraw : QuadGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int iteration) {
    if (iteration >= glass_iterations(s, b.tables)) return;
    const int n = s.height * s.width;
    const int first = tile * b.shape.items;
    const int count = least(b.shape.items, ceil_div(n, 4) - first);
    const uint32_t span = 2u * static_cast<uint32_t>(glass_reach(s, b.tables));
    const int reach = static_cast<int>(span / 2);
    uint32_t* VQSA_RESTRICT fields = s.fields + static_cast<size_t>(iteration) * n;
    const uint64_t key = s.key;
    const auto offsets = [=](uint32_t word) {
      const int dx = static_cast<int>(((word & 0xFFFFu) * span) >> 16) - reach;
      const int dy = static_cast<int>(((word >> 16) * span) >> 16) - reach;
      return (static_cast<uint32_t>(dx) & 0xFFFFu) | (static_cast<uint32_t>(dy) << 16);
    };
    const int whole = least(count, n / 4 - first);
    b.each(greatest(whole, 0), [=](int i) {
      const Words4 q = draw_words(key, kStreamField, static_cast<uint32_t>(iteration), static_cast<uint32_t>(first + i));
      uint32_t* f = fields + 4 * (first + i);
      f[0] = offsets(q.w0);
      f[1] = offsets(q.w1);
      f[2] = offsets(q.w2);
      f[3] = offsets(q.w3);
    });
    if (whole < count) {
      b.each(n % 4, [=](int j) {
        const Words4 q = draw_words(key, kStreamField, static_cast<uint32_t>(iteration), static_cast<uint32_t>(n / 4));
        fields[n / 4 * 4 + j] = offsets(word_of(q, j));
      });
    }
  }
};

struct GlassBlurIn : GaussianGrid<6> {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    blur_tile(b, s, tile, b.tables->glass[s.set][s.severity - 1], s.in, glass_image(s, 0));
  }
};

// The references visit rows and columns in descending order and copy, because their tuple "swap" of
// array views is none: a[p] = a[p + offset(p)]. In parallel: a target that comes later in memory and
// is itself visited has been overwritten before, so its own pointer is followed, until the target is
// not visited, or comes later in the visit.
struct GlassShuffle : PixelGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int iteration) {
    if (iteration >= glass_iterations(s, b.tables)) return;
    const int height = s.height, width = s.width, reach = glass_reach(s, b.tables);
    const uint32_t* offsets = s.fields + static_cast<size_t>(iteration) * height * width;
    if (B::kSequential) {
      if (tile > 0) return;
      uint8_t* image = glass_image(s, 0);
      for (int y = height - reach; y > reach; --y) {
        for (int x = width - reach; x > reach; --x) {
          const int p = y * width + x;
          const uint32_t o = offsets[p];
          const int q = p + static_cast<int16_t>(o >> 16) * width + static_cast<int16_t>(o & 0xFFFFu);
          image[3 * p] = image[3 * q];
          image[3 * p + 1] = image[3 * q + 1];
          image[3 * p + 2] = image[3 * q + 2];
        }
      }
      return;
    }
    const uint8_t* from = glass_image(s, iteration & 1);
    uint8_t* to = glass_image(s, (iteration + 1) & 1);
    const int first = tile * b.shape.items;
    const int count = least(b.shape.items, height * width - first);
    b.each(count, [=](int i) {
      const int p = first + i;
      int at = p, y = p / width, x = p % width;
      while (y > reach && y <= height - reach && x > reach && x <= width - reach) {
        const uint32_t o = offsets[at];
        y += static_cast<int16_t>(o >> 16);
        x += static_cast<int16_t>(o & 0xFFFFu);
        const int next = y * width + x;
        const bool overwritten = next > at;
        at = next;
        if (!overwritten) break;
      }
      to[3 * p] = from[3 * at];
      to[3 * p + 1] = from[3 * at + 1];
      to[3 * p + 2] = from[3 * at + 2];
    });
  }
};

struct GlassBlurOut : GaussianGrid<6> {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const int which = B::kSequential ? 0 : glass_iterations(s, b.tables) & 1;
    blur_tile(b, s, tile, b.tables->glass[s.set][s.severity - 1], glass_image(s, which), s.out);
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

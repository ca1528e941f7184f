// pixelate: Pillow's BOX filter down, nearest neighbour up. BOX averages whole source pixels whose
// centres fall in the window; horizontally first, rounded to 8 bits, then vertically.
#pragma once
#include "stage_noise.h"

namespace vqsa {
namespace VQSA_ISA {

struct Window {
  int32_t first, count;
};

// Pillow's 8-bit fixed point: the weight 1/count with 22 fractional bits, rounded.
struct WeightedWindow {
  int32_t first, count, weight;
};

struct PixelateSize {
  int height, width;
  VQSA_HD PixelateSize(const Sample& s, const Tables* t)
      : height(static_cast<int>(s.height * constants_of(s, t).v[0])),
        width(static_cast<int>(s.width * constants_of(s, t).v[0])) {}
};

// The pixels that Pillow's BOX filter weighs: those of the window whose distance from the centre, in
// output pixels, is in (-1/2, 1/2]. Always a run; at ties the first pixel of the window drops out.
VQSA_HD Window box_window(int i, int from, int to) {
  const double scale = static_cast<double>(from) / to;
  const double widening = greatest(scale, 1.0), inverse = 1.0 / widening;
  const double centre = (i + 0.5) * scale, support = 0.5 * widening;
  int low = greatest(static_cast<int>(centre - support + 0.5), 0);
  int high = least(static_cast<int>(centre + support + 0.5), from);
  const int start = low;
  while (low < high && !(((low - start) + start - centre + 0.5) * inverse > -0.5)) ++low;
  while (high > low && !(((high - 1 - start) + start - centre + 0.5) * inverse <= 0.5)) --high;
  return {low, high - low};
}

VQSA_HD WeightedWindow weighted(const Window& w) {
  return {w.first, w.count, static_cast<int>(0.5 + 4194304.0 / w.count)};
}
VQSA_HD uint8_t weighted_mean(int sum, int weight) {
  return static_cast<uint8_t>(clamp((sum * weight + (1 << 21)) >> 22, 0, 255));
}

VQSA_HD uint8_t* pixelate_rows(const Sample& s) { return s.work + kAccWords * 4; }            // height x small width
VQSA_HD uint8_t* pixelate_small(const Sample& s) { return pixelate_rows(s) + 3 * static_cast<size_t>(s.height) * s.width; }

// Source row or column of every output row, then column. BOX upwards takes the pixel under the
// centre; NEAREST (bethge) adds up its coordinate step by step in double, which can fall on the other
// side of a pixel's edge.
VQSA_HD int32_t* pixelate_map(const Sample& s) {
  const size_t at = kAccWords * 4 + 6 * static_cast<size_t>(s.height) * s.width;
  return reinterpret_cast<int32_t*>(s.work + (at + 3) / 4 * 4);
}

// After the maps: the windows of every small row, then of every small column.
VQSA_HD WeightedWindow* pixelate_windows(const Sample& s) {
  return reinterpret_cast<WeightedWindow*>(pixelate_map(s) + s.height + s.width);
}

struct PixelateMap : OneBlock {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int, int) {
    const PixelateSize small(s, b.tables);
    const int height = s.height, width = s.width;
    int32_t* map = pixelate_map(s);
    WeightedWindow* windows = pixelate_windows(s);
    b.each(small.height, [=](int i) { windows[i] = weighted(box_window(i, height, small.height)); });
    b.each(small.width, [=](int i) { windows[small.height + i] = weighted(box_window(i, width, small.width)); });
    if (s.flavour == kHendrycks) {
      b.each(height, [=](int y) { map[y] = box_window(y, small.height, height).first; });
      b.each(width, [=](int x) { map[height + x] = box_window(x, small.width, width).first; });
      return;
    }
    b.each(2, [=](int axis) {
      const int from = axis == 0 ? small.height : small.width, to = axis == 0 ? height : width;
      const double step = static_cast<double>(from) / to;
      double at = step * 0.5;
      for (int i = 0; i < to; ++i) {
        map[axis * height + i] = static_cast<int>(at);
        at += step;
      }
    });
  }
};

struct PixelateAcross : RowGrid {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape& shape) { return 4 * (7 * static_cast<size_t>(shape.width) + 1); }

  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const PixelateSize small(s, b.tables);
    const int y0 = tile * b.shape.height;
    const int rows = least(b.shape.height, s.height - y0);
    const int width = s.width, target = small.width;
    const uint8_t* in = s.in;
    uint8_t* out = pixelate_rows(s);
    const WeightedWindow* windows = pixelate_windows(s) + small.height;
    if (B::kSequential) {
      gather_rows(b, in + 3 * static_cast<size_t>(y0) * width, out + 3 * static_cast<size_t>(y0) * target, rows, width, target, windows);
      return;
    }
    b.rows(rows, target, [=](int y, int i) {
      const WeightedWindow w = windows[i];
      const uint8_t* p = in + 3 * (static_cast<size_t>(y0 + y) * width + w.first);
      int r = 0, g = 0, bl = 0;
      for (int k = 0; k < w.count; ++k) {
        r += p[3 * k];
        g += p[3 * k + 1];
        bl += p[3 * k + 2];
      }
      uint8_t* q = out + 3 * (static_cast<size_t>(y0 + y) * target + i);
      q[0] = weighted_mean(r, w.weight);
      q[1] = weighted_mean(g, w.weight);
      q[2] = weighted_mean(bl, w.weight);
    });
  }

  // The same with a word to a pixel and a loop over pixels per tap, which become vectors.
  template <class B>
  static VQSA_HD void gather_rows(const B& b, const uint8_t* in, uint8_t* out, int rows, int width, int target,
                                  const WeightedWindow* windows) {
    int taps = 0;
    for (int i = 0; i < target; ++i) taps = greatest(taps, windows[i].count);
    uint32_t* VQSA_RESTRICT pixels = reinterpret_cast<uint32_t*>(b.shared);  // and a black one
    uint32_t* VQSA_RESTRICT red_blue = pixels + width + 1;
    uint32_t* VQSA_RESTRICT green = red_blue + target;
    int32_t* VQSA_RESTRICT weight = reinterpret_cast<int32_t*>(green + target);
    int32_t* VQSA_RESTRICT source = weight + target;  // taps x target; at most 3 * width
    pixels[width] = 0;
    b.each(target, [=](int i) { weight[i] = windows[i].weight; });
    b.rows(taps, target, [=](int k, int i) {
      source[k * target + i] = k < windows[i].count ? windows[i].first + k : width;
    });
    for (int y = 0; y < rows; ++y) {
      const uint8_t* VQSA_RESTRICT p = in + 3 * static_cast<size_t>(y) * width;
      uint8_t* VQSA_RESTRICT q = out + 3 * static_cast<size_t>(y) * target;
      b.each(width, [=](int x) { pixels[x] = p[3 * x] | p[3 * x + 1] << 8 | p[3 * x + 2] << 16; });
      b.each(target, [=](int i) { red_blue[i] = green[i] = 0; });
      for (int k = 0; k < taps; ++k) {
        const int32_t* VQSA_RESTRICT at = source + k * target;
        b.each(target, [=](int i) {
          const uint32_t pixel = pixels[at[i]];
          red_blue[i] += pixel & 0xFF00FF;
          green[i] += pixel >> 8 & 0xFF;
        });
      }
      b.each(target, [=](int i) {
        const int w = weight[i], r = red_blue[i] & 0xFFFF, g = green[i], bl = red_blue[i] >> 16;
        q[3 * i] = weighted_mean(r, w);
        q[3 * i + 1] = weighted_mean(g, w);
        q[3 * i + 2] = weighted_mean(bl, w);
      });
    }
  }
};

struct PixelateDown : RowGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const PixelateSize small(s, b.tables);
    const int y0 = tile * b.shape.height;
    const int rows = least(b.shape.height, small.height - y0);
    if (rows <= 0) return;
    const int values = 3 * small.width;
    const WeightedWindow* windows = pixelate_windows(s) + y0;
    const uint8_t* VQSA_RESTRICT in = pixelate_rows(s);
    uint8_t* VQSA_RESTRICT out = pixelate_small(s);
    if (B::kSequential) {
      for (int y = 0; y < rows; ++y) {
        const WeightedWindow w = windows[y];
        const uint8_t* VQSA_RESTRICT p = in + static_cast<size_t>(w.first) * values;
        uint8_t* VQSA_RESTRICT q = out + static_cast<size_t>(y0 + y) * values;
        b.template accumulate<int32_t>(
            1, values, w.count, [=](int, int v, int k) { return static_cast<int32_t>(p[k * values + v]); },
            [=](int, int v, int32_t sum) { q[v] = weighted_mean(sum, w.weight); });
      }
      return;
    }
    b.rows(rows, values, [=](int y, int v) {
      const WeightedWindow w = windows[y];
      int sum = 0;
      for (int k = 0; k < w.count; ++k) sum += in[static_cast<size_t>(w.first + k) * values + v];
      out[static_cast<size_t>(y0 + y) * values + v] = weighted_mean(sum, w.weight);
    });
  }
};

struct PixelateUp : RowGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const PixelateSize small(s, b.tables);
    const int y0 = tile * b.shape.height;
    const int rows = least(b.shape.height, s.height - y0);
    const int width = s.width, from = small.width;
    const int32_t* map_y = pixelate_map(s);
    const int32_t* map_x = map_y + s.height;
    const uint8_t* in = pixelate_small(s);
    uint8_t* out = s.out;
    if (B::kSequential) {
      // Most rows repeat the one above.
      for (int y = y0; y < y0 + rows; ++y) {
        uint8_t* VQSA_RESTRICT q = out + 3 * static_cast<size_t>(y) * width;
        if (y > y0 && map_y[y] == map_y[y - 1]) {
          const uint8_t* VQSA_RESTRICT above = q - 3 * static_cast<size_t>(width);
          b.each(3 * width, [=](int v) { q[v] = above[v]; });
          continue;
        }
        const uint8_t* VQSA_RESTRICT p = in + 3 * static_cast<size_t>(map_y[y]) * from;
        b.each(width, [=](int x) {
          q[3 * x] = p[3 * map_x[x]];
          q[3 * x + 1] = p[3 * map_x[x] + 1];
          q[3 * x + 2] = p[3 * map_x[x] + 2];
        });
      }
      return;
    }
    b.rows(rows, width, [=](int y, int x) {
      const uint8_t* p = in + 3 * (static_cast<size_t>(map_y[y0 + y]) * from + map_x[x]);
      uint8_t* q = out + 3 * (static_cast<size_t>(y0 + y) * width + x);
      q[0] = p[0];
      q[1] = p[1];
      q[2] = p[2];
    });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

// snow: a layer of zoomed, thresholded and motion-blurred noise over a whitened image.
#pragma once
#include "stage_colour.h"
#include "stage_motion.h"
#include "stage_zoom.h"

namespace vqsa {
namespace VQSA_ISA {

VQSA_HD float* snow_normals(const Sample& s) { return reinterpret_cast<float*>(s.work + kAccWords * 4); }
VQSA_HD float* snow_zoomed(const Sample& s) { return snow_normals(s) + static_cast<size_t>(s.height) * s.width; }

// Size of the layer that is blurred: the whole enlargement (bethge) or the image's (hendrycks).
struct SnowSize {
  int height, width;
  VQSA_HD SnowSize(const Sample& s, const Tables* t) {
    const double zoom = constants_of(s, t).v[2];
    height = s.flavour == kBethge ? ZoomAxis(s.height, zoom, false).size : s.height;
    width = s.flavour == kBethge ? ZoomAxis(s.width, zoom, false).size : s.width;
  }
};

struct SnowNormals : QuadGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const int n = s.height * s.width, first = tile * b.shape.items;
    const int count = least(b.shape.items, ceil_div(n, 4) - first);
    float* VQSA_RESTRICT normals = snow_normals(s);
    const uint32_t* noise = s.noise;
    if (noise != nullptr) {
      b.each(least(4 * count, n - 4 * first), [=](int i) { field_from_bits(noise[4 * first + i], normals[4 * first + i]); });
      return;
    }
    const uint64_t key = s.key;
    const int whole = greatest(least(count, n / 4 - first), 0);
    b.each(whole, [=](int i) {
      float* f = normals + 4 * (first + i);
      NormalField::four(draw_words(key, kStreamField, 0, static_cast<uint32_t>(first + i)), f[0], f[1], f[2], f[3]);
    });
    if (whole < count) {
      b.each(n % 4, [=](int j) {
        float f[4];
        NormalField::four(draw_words(key, kStreamField, 0, static_cast<uint32_t>(n / 4)), f[0], f[1], f[2], f[3]);
        normals[n / 4 * 4 + j] = f[j];
      });
    }
  }
};

struct SnowZoom {
  // Up to 5 rows more than the image: the enlargement overshoots by less than the factor.
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) { return ceil_div(s.height + 5, shape.height); }
  static VQSA_HD size_t shared_bytes(const Sample& s, const TileShape&) { return sizeof(ZoomPoint) * (s.width + 5); }
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const Constants& c = constants_of(s, b.tables);
    const SnowSize size(s, b.tables);
    const bool trim = s.flavour == kHendrycks;
    const ZoomAxis across(s.width, c.v[2], trim), down(s.height, c.v[2], trim);
    const int y0 = tile * b.shape.height, rows = least(b.shape.height, size.height - y0), width = s.width, height = s.height;
    if (rows <= 0) return;
    ZoomPoint* points = reinterpret_cast<ZoomPoint*>(b.shared);
    b.each(size.width, [=](int x) { across.locate(x + across.trim, &points[x].index, &points[x].fraction); });
    const float* normals = snow_normals(s);
    float* zoomed = snow_zoomed(s);
    const float mean = static_cast<float>(c.v[0]), sd = static_cast<float>(c.v[1]), threshold = static_cast<float>(c.v[3]);
    b.rows(rows, size.width, [=](int y, int x) {
      int row;
      float f;
      down.locate(y0 + y + down.trim, &row, &f);
      const float fx = points[x].fraction, g = 1.0f - f, gx = 1.0f - fx;
      const int column = greatest(points[x].index, 0);
      const bool outside = row < 0 || points[x].index < 0;
      const float* a = normals + static_cast<size_t>(greatest(row, 0)) * width + column;
      const float* d = normals + static_cast<size_t>(least(greatest(row, 0) + 1, height - 1)) * width + column;
      const int right = column + 1 < width ? 1 : 0;
      const float n = gx * (g * a[0] + f * d[0]) + fx * (g * a[right] + f * d[right]);
      float v = outside ? 0.0f : mean + sd * n;
      v = v < threshold ? 0.0f : clamp(v, 0.0f, 1.0f);
      // hendrycks quantises before the blur.
      zoomed[static_cast<size_t>(y0 + y) * size.width + x] = 255.0f * v;
      if (trim) zoomed[static_cast<size_t>(y0 + y) * size.width + x] = static_cast<float>(static_cast<int>(255.0f * v));
    });
  }
};

// Field: the finished layer, 8 bits.
struct SnowLayer : TileGrid {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape& shape) { return motion_shared_bytes(shape, 1, 4); }
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const Tile t = tile_at(s, b.shape, tile);
    const SnowSize size(s, b.tables);
    float angle = 90.0f * unit_float(draw_words(s.key, kStreamScalar, 0, 0).w0) - 135.0f;
    if (s.noise != nullptr) field_from_bits(s.noise[static_cast<size_t>(s.height) * s.width], angle);
    const int width = s.width;
    uint8_t* VQSA_RESTRICT layer = reinterpret_cast<uint8_t*>(s.fields);
    const float round = s.flavour == kBethge ? 0.5f : 0.0f;
    motion_tile<1>(b, t, size.height, size.width, snow_zoomed(s), b.tables->snow[s.set][s.severity - 1], angle,
                   s.flavour == kBethge, [=](int y, int x, float sum) {
                     layer[static_cast<size_t>(t.y + y) * width + t.x + x] = quantise(sum + round);
                   });
  }
};

struct SnowApply : PixelGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const float mix = static_cast<float>(constants_of(s, b.tables).v[6]), rest = 1.0f - mix;
    const int n = pixels(s), first = tile * b.shape.items, count = least(b.shape.items, n - first);
    const uint8_t* VQSA_RESTRICT in = s.in + 3 * static_cast<size_t>(first);
    uint8_t* VQSA_RESTRICT out = s.out + 3 * static_cast<size_t>(first);
    const uint8_t* VQSA_RESTRICT layer = reinterpret_cast<const uint8_t*>(s.fields);
    b.each(count, [=](int i) {
      const float r = in[3 * i], g = in[3 * i + 1], bl = in[3 * i + 2];
      const float grey = (0.299f * r + 0.587f * g + 0.114f * bl) * 1.5f + 127.5f;
      const float flakes = static_cast<float>(layer[first + i] + layer[n - 1 - first - i]);
      out[3 * i] = quantise(mix * r + rest * greatest(r, grey) + flakes);
      out[3 * i + 1] = quantise(mix * g + rest * greatest(g, grey) + flakes);
      out[3 * i + 2] = quantise(mix * bl + rest * greatest(bl, grey) + flakes);
    });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

// zoom_blur: the mean of the image and its enlargements by a run of factors, each an align-corners
// bilinear resize of a centre crop.
#pragma once
#include "stage_noise.h"

namespace vqsa {
namespace VQSA_ISA {

// One axis of one enlargement: the crop's start and length, the enlarged length, and the first kept
// enlarged position (hendrycks trims both sides, bethge keeps the start).
struct ZoomAxis {
  int start, crop, size, trim;
  VQSA_HD ZoomAxis(int length, double zoom, bool trim_both) {
    const double exact = length / zoom;
    crop = static_cast<int>(exact);
    crop += crop < exact ? 1 : 0;
    start = (length - crop) / 2;
    const double enlarged = crop * zoom;
    size = static_cast<int>(enlarged + 0.5);
    if (size - enlarged == 0.5 && (size & 1) != 0) --size;  // round half to even
    trim = trim_both ? (size - length) / 2 : 0;
  }
  // Source position of an enlarged one: a whole index in the image and a fraction. scipy's zoom calls
  // a last position that rounding puts past the crop outside: it becomes 0, marked by index -1.
  VQSA_HD void locate(int position, int* index, float* fraction) const {
    const double step = size > 1 ? static_cast<double>(crop - 1) / (size - 1) : 1.0;
    const double at = position * step;
    const int whole = static_cast<int>(at);
    *index = start + whole;
    *fraction = static_cast<float>(at - whole);
    if (at > crop - 1) *index = -1;
  }
};

struct ZoomPoint {
  int32_t index;
  float fraction;
};

struct ZoomBlur : TileGrid {
  static VQSA_HD size_t shared_bytes(const Sample& s, const TileShape& shape) {
    return sizeof(ZoomPoint) * kZoomLayers * (shape.width + shape.height) +
           (shape.width == s.width ? 4 * (3 * static_cast<size_t>(s.width) + 4 + 4 * static_cast<size_t>(s.width)) : 0);
  }

  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const Tile t = tile_at(s, b.shape, tile);
    const ZoomFactors& zoom = b.tables->zoom[s.set][s.severity - 1];
    const int layers = zoom.count, height = s.height, width = s.width;
    const bool trim = s.flavour == kHendrycks;
    ZoomPoint* across = reinterpret_cast<ZoomPoint*>(b.shared);       // layer x tile column
    ZoomPoint* down = across + layers * t.width;                      // layer x tile row
    const double* factors = zoom.factor;
    b.rows(layers, t.width, [=](int layer, int x) {
      const ZoomAxis axis(width, factors[layer], trim);
      axis.locate(t.x + x + axis.trim, &across[layer * t.width + x].index, &across[layer * t.width + x].fraction);
    });
    b.rows(layers, t.height, [=](int layer, int y) {
      const ZoomAxis axis(height, factors[layer], trim);
      axis.locate(t.y + y + axis.trim, &down[layer * t.height + y].index, &down[layer * t.height + y].fraction);
    });
    const uint8_t* VQSA_RESTRICT in = s.in;
    uint8_t* VQSA_RESTRICT out = s.out;
    const size_t stride = 3 * static_cast<size_t>(width);
    const float share = 1.0f / static_cast<float>(layers + 1);
    if (B::kSequential && t.width == width) {
      // Rows first, as whole vectors; then each pixel reads its two neighbours as four floats.
      float* VQSA_RESTRICT row = reinterpret_cast<float*>(down + layers * t.height);
      float* VQSA_RESTRICT sum = row + 3 * width + 4;
      for (int i = 0; i < 4; ++i) row[3 * width + i] = 0.0f;
      for (int y = 0; y < t.height; ++y) {
        for (int i = 0; i < 4 * width; ++i) sum[i] = 0.0f;
        for (int layer = 0; layer < layers; ++layer) {
          const ZoomPoint p = down[layer * t.height + y];
          if (p.index < 0) continue;
          const float f = p.fraction, g = 1.0f - f;
          const uint8_t* VQSA_RESTRICT top = in + p.index * stride;
          const uint8_t* VQSA_RESTRICT bottom = in + least(p.index + 1, height - 1) * stride;
          const int values = 3 * width;
          b.each(values, [=](int v) { row[v] = g * top[v] + f * bottom[v]; });
          const ZoomPoint* points = across + layer * width;
          for (int x = 0; x < width; ++x) {
            if (points[x].index < 0) continue;
            const float fx = points[x].fraction, gx = 1.0f - fx;
            const float* VQSA_RESTRICT q = row + 3 * points[x].index;
            // The last pixel's right neighbour has weight 0 but must be the pixel itself.
            const float* VQSA_RESTRICT r = points[x].index + 1 < width ? q + 3 : q;
            for (int c = 0; c < 4; ++c) sum[4 * x + c] += gx * q[c] + fx * r[c];
          }
        }
        const uint8_t* VQSA_RESTRICT p = in + (t.y + y) * stride;
        uint8_t* VQSA_RESTRICT o = out + (t.y + y) * stride;
        b.each(width, [=](int x) {
          o[3 * x] = quantise((p[3 * x] + sum[4 * x]) * share);
          o[3 * x + 1] = quantise((p[3 * x + 1] + sum[4 * x + 1]) * share);
          o[3 * x + 2] = quantise((p[3 * x + 2] + sum[4 * x + 2]) * share);
        });
      }
      return;
    }
    b.rows(t.height, t.width, [=](int y, int x) {
      float sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f;
      for (int layer = 0; layer < layers; ++layer) {
        const ZoomPoint py = down[layer * t.height + y], px = across[layer * t.width + x];
        if (py.index < 0 || px.index < 0) continue;
        const float f = py.fraction, g = 1.0f - f, fx = px.fraction, gx = 1.0f - fx;
        const uint8_t* a = in + py.index * stride + 3 * px.index;
        const uint8_t* c = in + least(py.index + 1, height - 1) * stride + 3 * px.index;
        const int right = px.index + 1 < width ? 3 : 0;
        sum0 += gx * (g * a[0] + f * c[0]) + fx * (g * a[right] + f * c[right]);
        sum1 += gx * (g * a[1] + f * c[1]) + fx * (g * a[right + 1] + f * c[right + 1]);
        sum2 += gx * (g * a[2] + f * c[2]) + fx * (g * a[right + 2] + f * c[right + 2]);
      }
      const size_t at = (t.y + y) * stride + 3 * (t.x + x);
      out[at] = quantise((in[at] + sum0) * share);
      out[at + 1] = quantise((in[at + 1] + sum1) * share);
      out[at + 2] = quantise((in[at + 2] + sum2) * share);
    });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

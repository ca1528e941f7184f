// spatter: drops of water (stage_spatter_water.h) or splashes of mud. Both turn on single grey levels
// of a smoothed noise layer, so it is smoothed in double precision.
#pragma once
#include "stage_defocus.h"
#include "stage_snow.h"

namespace vqsa {
namespace VQSA_ISA {

struct SpatterPlanes {
  float* normals;
  uint8_t *layer, *edges, *across, *distance, *relief;  // water; `layer` is mud's indicator too
  int16_t *dx, *dy;
  VQSA_HD explicit SpatterPlanes(const Sample& s) {
    const size_t n = static_cast<size_t>(s.height) * s.width;
    normals = snow_normals(s);
    dx = reinterpret_cast<int16_t*>(normals + n);
    dy = dx + n;
    layer = reinterpret_cast<uint8_t*>(dy + n);
    edges = layer + n;
    across = edges + n;
    distance = across + n;
    relief = distance + n;
  }
};

VQSA_HD bool spatter_is_mud(const Sample& s, const Tables* t) { return constants_of(s, t).v[5] != 0.0; }

// Gaussian of one plane with clamped borders; done(y, x, value) for the tile. `Between` is how the
// vertical sums are stored.
template <class Between, class T, class B, class Done>
VQSA_HD void blur_plane(const B& b, const Sample& s, const Tile& t, const SmoothTaps& taps, const T* source, Done done) {
  const int radius = taps.radius, height = s.height, width = s.width, span = t.width + 2 * radius;
  Between* VQSA_RESTRICT columns = reinterpret_cast<Between*>(b.shared);
  const double* VQSA_RESTRICT w = taps.w;
  const T* VQSA_RESTRICT in = source;
  // Values inside the image first, then the clamped columns beside it.
  const int left = greatest(0, radius - t.x), right = greatest(0, t.x + t.width + radius - width);
  const int inner = span - left - right, origin = t.x - radius + left;
  b.template accumulate<double>(
      t.height, inner, radius + 1,
      [=](int y, int x, int k) {
        const size_t above = static_cast<size_t>(greatest(t.y + y - k, 0)) * width + origin;
        const size_t below = static_cast<size_t>(least(t.y + y + k, height - 1)) * width + origin;
        return (k == 0 ? 0.5 * w[0] : w[k]) * (static_cast<double>(in[above + x]) + static_cast<double>(in[below + x]));
      },
      [=](int y, int x, double sum) { columns[y * span + left + x] = static_cast<Between>(sum); });
  b.rows(t.height, left, [=](int y, int x) { columns[y * span + x] = columns[y * span + left]; });
  b.rows(t.height, right, [=](int y, int x) {
    columns[y * span + span - right + x] = columns[y * span + span - right - 1];
  });
  b.template accumulate<double>(
      t.height, t.width, radius + 1,
      [=](int y, int x, int k) {
        const Between* p = columns + y * span + radius + x;
        return (k == 0 ? 0.5 * w[0] : w[k]) * (static_cast<double>(p[-k]) + static_cast<double>(p[k]));
      },
      done);
}

struct SpatterBlurGrid : TileGrid {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape& shape) {
    return sizeof(double) * shape.height * (shape.width + 2 * kSmoothRadius);
  }
};

struct SpatterLayer : SpatterBlurGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const Constants& c = constants_of(s, b.tables);
    const SpatterPlanes p(s);
    const Tile t = tile_at(s, b.shape, tile);
    const double mean = c.v[0], sd = c.v[1], threshold = c.v[3];
    const bool mud = spatter_is_mud(s, b.tables);
    const int width = s.width;
    uint8_t* VQSA_RESTRICT layer = p.layer;
    blur_plane<double>(b, s, t, b.tables->spatter_layer[s.set][s.severity - 1], static_cast<const float*>(p.normals),
               [=](int y, int x, double sum) {
                 const double level = mean + sd * sum;
                 // A layer above 1 wraps round, as the reference's cast does.
                 const uint8_t water = level < threshold ? 0 : static_cast<uint8_t>(static_cast<int>(level * 255.0) & 255);
                 layer[static_cast<size_t>(t.y + y) * width + t.x + x] = mud ? (level > threshold ? 1 : 0) : water;
               });
  }
};

// Mud's field: the smoothed indicator, nothing below 0.8.
struct SpatterMud : SpatterBlurGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    if (!spatter_is_mud(s, b.tables)) return;
    const Tile t = tile_at(s, b.shape, tile);
    const int width = s.width;
    uint32_t* VQSA_RESTRICT fields = s.fields;
    // In float between the passes and at the end, as SciPy keeps a float image.
    blur_plane<float>(b, s, t, b.tables->spatter_mud[s.set][s.severity - 1],
               static_cast<const uint8_t*>(SpatterPlanes(s).layer), [=](int y, int x, double total) {
                 const float sum = static_cast<float>(total);
                 fields[static_cast<size_t>(t.y + y) * width + t.x + x] = field_bits(sum < 0.8f ? 0.0f : sum);
               });
  }
};

struct SpatterApply : PixelGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const bool mud = spatter_is_mud(s, b.tables);
    const float red = mud ? 63.0f : 175.0f, green = mud ? 42.0f : 238.0f, blue = mud ? 20.0f : 238.0f;
    const float hide = mud ? 1.0f : 0.0f;
    const int first = tile * b.shape.items, count = least(b.shape.items, pixels(s) - first);
    const uint8_t* VQSA_RESTRICT in = s.in + 3 * static_cast<size_t>(first);
    uint8_t* VQSA_RESTRICT out = s.out + 3 * static_cast<size_t>(first);
    const uint32_t* VQSA_RESTRICT fields = s.fields + first;
    b.each(count, [=](int i) {
      float m;
      field_from_bits(fields[i], m);
      const float keep = 1.0f - hide * m;
      out[3 * i] = quantise(in[3 * i] * keep + m * red);
      out[3 * i + 1] = quantise(in[3 * i + 1] * keep + m * green);
      out[3 * i + 2] = quantise(in[3 * i + 2] * keep + m * blue);
    });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

// motion_blur: a one-sided half Gaussian along a line, each tap at a whole pixel, borders clamped.
// The same walk blurs snow's layer.
#pragma once
#include "stage_noise.h"

namespace vqsa {
namespace VQSA_ISA {

constexpr int kMotionHeader = 512;  // bytes of shared memory for the tap offsets

VQSA_HD size_t motion_shared_bytes(const TileShape& shape, int channels, size_t element) {
  return kMotionHeader + static_cast<size_t>(shape.height + kMotionTaps) * (shape.width + kMotionTaps) * channels * element;
}

// done(y, v, sum) gets the weighted sum for value v of row y of the tile. Source and target are
// height x width x kChannels. `stop` ends the walk when a tap leaves the image (bethge).
template <int kChannels, class T, class B, class Done>
VQSA_HD void motion_tile(const B& b, const Tile& t, int height, int width, const T* source, const MotionTaps& taps,
                         float angle_deg, bool stop, Done done) {
  int32_t* offsets = reinterpret_cast<int32_t*>(b.shared);
  b.each(taps.count, [=, &taps](int i) {
    double sine, cosine;
    sincos_det(static_cast<double>(angle_deg) * 0.017453292519943295, sine, cosine);
    // ceil(v - 1/2): to nearest, ties down.
    const double down = i * sine - 0.5, across = i * cosine - 0.5;
    int dy = static_cast<int>(down), dx = static_cast<int>(across);
    dy += dy < down ? 1 : 0;
    dx += dx < across ? 1 : 0;
    offsets[2 * i] = dy;
    offsets[2 * i + 1] = dx;
  });
  int count = 0;
  while (count < taps.count) {
    const int dy = offsets[2 * count], dx = offsets[2 * count + 1];
    if (stop && (dy >= height || -dy >= height || dx >= width || -dx >= width)) break;
    ++count;
  }
  const int last_y = offsets[2 * count - 2], last_x = offsets[2 * count - 1];
  const int top = least(last_y, 0), left = least(last_x, 0);
  const int rows = t.height + greatest(last_y, 0) - top;
  const int columns = t.width + greatest(last_x, 0) - left, span = columns * kChannels;
  T* VQSA_RESTRICT padded = reinterpret_cast<T*>(b.shared + kMotionHeader);
  const T* VQSA_RESTRICT in = source;
  const size_t stride = static_cast<size_t>(width) * kChannels;
  const int x0 = t.x + left, y0 = t.y + top;
  // Columns inside the image, then the clamped ones on either side.
  const int first = clamp(-x0, 0, columns), past = clamp(x0 + columns - width, 0, columns);
  const int inside = greatest(columns - first - past, 0);
  b.rows(rows, first * kChannels, [=](int y, int v) {
    padded[y * span + v] = in[clamp(y0 + y, 0, height - 1) * stride + v % kChannels];
  });
  b.rows(rows, inside * kChannels, [=](int y, int v) {
    padded[y * span + first * kChannels + v] =
        in[clamp(y0 + y, 0, height - 1) * stride + static_cast<size_t>(x0 + first) * kChannels + v];
  });
  b.rows(rows, (columns - first - inside) * kChannels, [=](int y, int v) {
    padded[y * span + (first + inside) * kChannels + v] =
        in[clamp(y0 + y, 0, height - 1) * stride + stride - kChannels + v % kChannels];
  });
  const float* w = taps.w;
  b.template accumulate<float>(
      t.height, t.width * kChannels, count,
      [=](int y, int v, int k) {
        const int at = (y + offsets[2 * k] - top) * span + (offsets[2 * k + 1] - left) * kChannels + v;
        return w[k] * static_cast<float>(padded[at]);
      },
      done);
}

// Field: the angle in degrees, uniform in [-45, 45).
struct MotionDraw : OneBlock {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int, int) {
    uint32_t* fields = s.fields;
    const uint64_t key = s.key;
    b.each(1, [=](int) {
      fields[0] = field_bits(90.0f * unit_float(draw_words(key, kStreamScalar, 0, 0).w0) - 45.0f);
    });
  }
};

struct MotionApply : TileGrid {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape& shape) { return motion_shared_bytes(shape, 3, 1); }
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const Tile t = tile_at(s, b.shape, tile);
    float angle;
    field_from_bits(s.fields[0], angle);
    const size_t stride = 3 * static_cast<size_t>(s.width);
    uint8_t* VQSA_RESTRICT out = s.out;
    motion_tile<3>(b, t, s.height, s.width, s.in, b.tables->motion[s.set][s.severity - 1], angle, s.flavour == kBethge,
                   [=](int y, int v, float sum) { out[(t.y + y) * stride + 3 * t.x + v] = quantise(sum); });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

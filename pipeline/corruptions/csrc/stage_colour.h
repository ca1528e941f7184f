// identity, brightness, contrast, saturate: each pixel by itself (contrast after a mean).
#pragma once
#include "stage_noise.h"

namespace vqsa {
namespace VQSA_ISA {

struct Copy : ValueGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const int first = tile * b.shape.items * 4;
    const int count = least(b.shape.items * 4, values(s) - first);
    const uint8_t* VQSA_RESTRICT in = s.in + first;
    uint8_t* VQSA_RESTRICT out = s.out + first;
    b.each(count, [=](int i) { out[i] = in[i]; });
  }
};

// Zeroes the sums and extrema that later stages gather.
struct Clear : OneBlock {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int, int) {
    uint32_t* acc = reinterpret_cast<uint32_t*>(s.work);
    b.each(kAccWords, [=](int i) { acc[i] = 0; });
  }
};

struct Rgb {
  float r, g, b;
};

// HSV value V = max(R, G, B) becomes min(V + c, 1) with hue and saturation kept: all channels scale
// by the same factor. Black has no hue and becomes grey.
VQSA_HD Rgb brighten(float r, float g, float b, float add_255) {
  const float value = greatest(r, greatest(g, b));
  const float target = least(value + add_255, 255.0f);
  const bool black = value == 0.0f;
  const float divisor = black ? 1.0f : value;
  return {black ? target : r * target / divisor, black ? target : g * target / divisor,
          black ? target : b * target / divisor};
}

// HSV saturation S = (max - min) / max becomes clip(a * S + b, 0, 1). Grey has hue 0, which is red:
// it turns pinkish where b > 0, as in the references.
VQSA_HD Rgb saturate_pixel(float r, float g, float b, float scale, float offset) {
  const float value = greatest(r, greatest(g, b));
  const float chroma = value - least(r, least(g, b));
  const bool grey = chroma == 0.0f;
  const float divisor = value == 0.0f ? 1.0f : value;
  const float target = clamp(scale * (chroma / divisor) + offset, 0.0f, 1.0f);
  const float ratio = target * value / (grey ? 1.0f : chroma);  // S' / S, times nothing else
  const float tinted = value * (1.0f - target);
  return {grey ? value : value - (value - r) * ratio, grey ? tinted : value - (value - g) * ratio,
          grey ? tinted : value - (value - b) * ratio};
}

struct Brightness : PixelGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const float add_255 = static_cast<float>(constants_of(s, b.tables).v[0] * 255.0);
    const int first = tile * b.shape.items;
    const int count = least(b.shape.items, pixels(s) - first);
    const uint8_t* VQSA_RESTRICT in = s.in + 3 * static_cast<size_t>(first);
    uint8_t* VQSA_RESTRICT out = s.out + 3 * static_cast<size_t>(first);
    b.each(count, [=](int i) {
      const Rgb p = brighten(in[3 * i], in[3 * i + 1], in[3 * i + 2], add_255);
      out[3 * i] = quantise(p.r);
      out[3 * i + 1] = quantise(p.g);
      out[3 * i + 2] = quantise(p.b);
    });
  }
};

struct Saturate : PixelGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const Constants& c = constants_of(s, b.tables);
    const float scale = static_cast<float>(c.v[0]), offset = static_cast<float>(c.v[1]);
    const int first = tile * b.shape.items;
    const int count = least(b.shape.items, pixels(s) - first);
    const uint8_t* VQSA_RESTRICT in = s.in + 3 * static_cast<size_t>(first);
    uint8_t* VQSA_RESTRICT out = s.out + 3 * static_cast<size_t>(first);
    b.each(count, [=](int i) {
      const Rgb p = saturate_pixel(in[3 * i], in[3 * i + 1], in[3 * i + 2], scale, offset);
      out[3 * i] = quantise(p.r);
      out[3 * i + 1] = quantise(p.g);
      out[3 * i + 2] = quantise(p.b);
    });
  }
};

// Scratch words 0 to 2: per channel the sum of the levels. An image has at most 2^24 pixels
// (kMaxPixels), so 255 * 2^24 fits in 32 bits.
struct ContrastSum : PixelGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const int first = tile * b.shape.items;
    const int count = least(b.shape.items, pixels(s) - first);
    const uint8_t* VQSA_RESTRICT in = s.in + 3 * static_cast<size_t>(first);
    uint32_t* acc = reinterpret_cast<uint32_t*>(s.work);
    for (int channel = 0; channel < 3; ++channel) {
      b.sum(count, acc + channel, [=](int i) { return static_cast<uint32_t>(in[3 * i + channel]); });
    }
  }
};

struct ContrastApply : PixelGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const uint32_t* acc = reinterpret_cast<const uint32_t*>(s.work);
    const float factor = static_cast<float>(constants_of(s, b.tables).v[0]);
    const double n = static_cast<double>(pixels(s));
    const float m0 = static_cast<float>(acc[0] / n), m1 = static_cast<float>(acc[1] / n),
                m2 = static_cast<float>(acc[2] / n);
    const int first = tile * b.shape.items;
    const int count = least(b.shape.items, pixels(s) - first);
    const uint8_t* VQSA_RESTRICT in = s.in + 3 * static_cast<size_t>(first);
    uint8_t* VQSA_RESTRICT out = s.out + 3 * static_cast<size_t>(first);
    b.each(count, [=](int i) {
      out[3 * i] = quantise((in[3 * i] - m0) * factor + m0);
      out[3 * i + 1] = quantise((in[3 * i + 1] - m1) * factor + m1);
      out[3 * i + 2] = quantise((in[3 * i + 2] - m2) * factor + m2);
    });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

// frost: the image mixed with a random crop of a photograph of frost.
#pragma once
#include "stage_noise.h"

namespace vqsa {
namespace VQSA_ISA {

// The variant of the textures that a sample uses as stored, and the further factor by which they must
// be enlarged to cover an image larger than they are (1 where they are large enough).
VQSA_HD int frost_variant(const Sample& s) {
  return s.flavour == kBethge ? kFrostEnlarged : s.set == kTinyImageNet ? kFrostTiny : s.set == kCifar10 ? kFrostCifar : kFrostRaw;
}

struct FrostView {
  const Texture* texture;
  int height, width;  // after enlarging
  double scale;       // 1: read as stored
  VQSA_HD FrostView(const Sample& s, const Tables* t, int index) {
    const Texture* raw = &t->frost[kFrostRaw][index];
    const double cover_y = static_cast<double>(s.height) / raw->height, cover_x = static_cast<double>(s.width) / raw->width;
    const double cover = greatest(greatest(cover_y, cover_x), 1.0);
    texture = &t->frost[frost_variant(s)][index];
    scale = 1.0;
    height = texture->height;
    width = texture->width;
    if (cover > 1.0 || height < s.height || width < s.width) {
      texture = raw;
      scale = greatest(greatest(cover_y, cover_x), 1.0) * (s.flavour == kBethge ? 1.1 : 1.0);
      const double exact_y = raw->height * scale, exact_x = raw->width * scale;
      height = static_cast<int>(exact_y);
      width = static_cast<int>(exact_x);
      height += height < exact_y ? 1 : 0;
      width += width < exact_x ? 1 : 0;
    }
  }
};

// Of five names the second and third are the same picture.
VQSA_HD int frost_texture(uint32_t index) { return index == 0 ? 0 : static_cast<int>(index) - (index == 1 ? 0 : 1); }

// Fields: index in 0..4, row and column of the crop. The last position is never drawn, as in the
// references.
struct FrostDraw : OneBlock {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int, int) {
    uint32_t* fields = s.fields;
    const Tables* tables = b.tables;
    b.each(1, [=, &s](int) {
      const Words4 q = draw_words(s.key, kStreamScalar, 0, 0);
      const uint32_t index = static_cast<uint32_t>((static_cast<uint64_t>(q.w0) * 5) >> 32);
      const FrostView view(s, tables, frost_texture(index));
      const uint64_t rows = static_cast<uint64_t>(greatest(view.height - s.height, 1));
      const uint64_t columns = static_cast<uint64_t>(greatest(view.width - s.width, 1));
      fields[0] = index;
      fields[1] = static_cast<uint32_t>((q.w1 * rows) >> 32);
      fields[2] = static_cast<uint32_t>((q.w2 * columns) >> 32);
    });
  }
};

VQSA_HD void cubic_weights(float f, float* w) {  // Keys' kernel with a = -3/4, as OpenCV
  const float a = -0.75f;
  w[0] = ((a * (f + 1.0f) - 5.0f * a) * (f + 1.0f) + 8.0f * a) * (f + 1.0f) - 4.0f * a;
  w[1] = ((a + 2.0f) * f - (a + 3.0f)) * f * f + 1.0f;
  w[2] = ((a + 2.0f) * (1.0f - f) - (a + 3.0f)) * (1.0f - f) * (1.0f - f) + 1.0f;
  w[3] = 1.0f - w[0] - w[1] - w[2];
}

struct FrostApply : TileGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const Tile t = tile_at(s, b.shape, tile);
    const Constants& c = constants_of(s, b.tables);
    const float image_share = static_cast<float>(c.v[0]), frost_share = static_cast<float>(c.v[1]);
    const FrostView view(s, b.tables, frost_texture(least(s.fields[0], 4u)));
    const int row = clamp(static_cast<int>(s.fields[1]), 0, view.height - s.height);
    const int column = clamp(static_cast<int>(s.fields[2]), 0, view.width - s.width);
    const size_t stride = 3 * static_cast<size_t>(s.width);
    const uint8_t* VQSA_RESTRICT in = s.in + t.y * stride + 3 * t.x;
    uint8_t* VQSA_RESTRICT out = s.out + t.y * stride + 3 * t.x;
    const uint8_t* VQSA_RESTRICT rgb = view.texture->rgb;
    if (view.scale == 1.0) {
      const size_t texture_stride = 3 * static_cast<size_t>(view.width);
      const uint8_t* VQSA_RESTRICT crop = rgb + (row + t.y) * texture_stride + 3 * (column + t.x);
      b.rows(t.height, 3 * t.width, [=](int y, int v) {
        out[y * stride + v] = quantise(image_share * in[y * stride + v] + frost_share * crop[y * texture_stride + v]);
      });
      return;
    }
    // Larger than the texture: resized here, pixel by pixel.
    const int height = view.texture->height, width = view.texture->width;
    const double step_y = static_cast<double>(height) / view.height, step_x = static_cast<double>(width) / view.width;
    b.rows(t.height, t.width, [=](int y, int x) {
      const double sy = (row + t.y + y + 0.5) * step_y - 0.5, sx = (column + t.x + x + 0.5) * step_x - 0.5;
      int iy = static_cast<int>(sy), ix = static_cast<int>(sx);
      iy -= iy > sy ? 1 : 0;
      ix -= ix > sx ? 1 : 0;
      float wy[4], wx[4];
      cubic_weights(static_cast<float>(sy - iy), wy);
      cubic_weights(static_cast<float>(sx - ix), wx);
      for (int channel = 0; channel < 3; ++channel) {
        float sum = 0.0f;
        for (int j = 0; j < 4; ++j) {
          const uint8_t* p = rgb + 3 * static_cast<size_t>(clamp(iy - 1 + j, 0, height - 1)) * width + channel;
          float across = 0.0f;
          for (int i = 0; i < 4; ++i) across += wx[i] * p[3 * clamp(ix - 1 + i, 0, width - 1)];
          sum += wy[j] * across;
        }
        const float level = static_cast<float>(static_cast<int>(clamp(sum + 0.5f, 0.0f, 255.0f)));
        out[y * stride + 3 * x + channel] = quantise(image_share * in[y * stride + 3 * x + channel] + frost_share * level);
      }
    });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

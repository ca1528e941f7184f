// jpeg_compression: what libjpeg-turbo's encoder and decoder do to the pixels, as Pillow uses them:
// 4:2:0, the slow integer DCT, quantisation, "fancy" (triangle) chroma upsampling. Entropy coding is
// lossless, so it is left out. Integers only: every device and Pillow agree bit for bit.
#pragma once
#include "stage_noise.h"

namespace vqsa {
namespace VQSA_ISA {

// Fixed point of the colour conversions (16 bits) and of the DCT (13 bits).
#define VQSA_FIX16(x) (static_cast<int>((x) * 65536 + 0.5))
#define VQSA_FIX13(x) (static_cast<int>((x) * 8192 + 0.5))

constexpr int kDctBits = 13, kPassBits = 2;

VQSA_HD int descale(int v, int bits) { return (v + (1 << (bits - 1))) >> bits; }

VQSA_HD int luma_of(int r, int g, int b) {
  return (VQSA_FIX16(0.29900) * r + VQSA_FIX16(0.58700) * g + VQSA_FIX16(0.11400) * b + 32768) >> 16;
}
VQSA_HD int blue_of(int r, int g, int b) {
  return (-VQSA_FIX16(0.16874) * r - VQSA_FIX16(0.33126) * g + VQSA_FIX16(0.50000) * b + (128 << 16) + 32767) >> 16;
}
VQSA_HD int red_of(int r, int g, int b) {
  return (VQSA_FIX16(0.50000) * r - VQSA_FIX16(0.41869) * g - VQSA_FIX16(0.08131) * b + (128 << 16) + 32767) >> 16;
}

// The products shared by the odd halves of both transforms (Loeffler, Ligtenberg and Moschytz).
VQSA_HD void odd_part(int& t0, int& t1, int& t2, int& t3) {
  const int z1 = (t0 + t3) * -VQSA_FIX13(0.899976223), z2 = (t1 + t2) * -VQSA_FIX13(2.562915447);
  const int z5 = (t0 + t2 + t1 + t3) * VQSA_FIX13(1.175875602);
  const int z3 = (t0 + t2) * -VQSA_FIX13(1.961570560) + z5, z4 = (t1 + t3) * -VQSA_FIX13(0.390180644) + z5;
  t0 = t0 * VQSA_FIX13(0.298631336) + z1 + z3;
  t1 = t1 * VQSA_FIX13(2.053119869) + z2 + z4;
  t2 = t2 * VQSA_FIX13(3.072711026) + z2 + z3;
  t3 = t3 * VQSA_FIX13(1.501321110) + z1 + z4;
}

// Forward transform of eight values `step` apart. The first pass scales up, the second down again.
template <bool kFirst>
VQSA_HD void forward_dct(int32_t* d, int step) {
  const int d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step],
            d6 = d[6 * step], d7 = d[7 * step];
  const int s0 = d0 + d7, s1 = d1 + d6, s2 = d2 + d5, s3 = d3 + d4;
  int t4 = d3 - d4, t5 = d2 - d5, t6 = d1 - d6, t7 = d0 - d7;
  const int a = s0 + s3, b = s1 + s2, c = s1 - s2, e = s0 - s3;
  const int bits = kFirst ? kDctBits - kPassBits : kDctBits + kPassBits;
  d[0] = kFirst ? (a + b) * (1 << kPassBits) : descale(a + b, kPassBits);
  d[4 * step] = kFirst ? (a - b) * (1 << kPassBits) : descale(a - b, kPassBits);
  const int z = (c + e) * VQSA_FIX13(0.541196100);
  d[2 * step] = descale(z + e * VQSA_FIX13(0.765366865), bits);
  d[6 * step] = descale(z - c * VQSA_FIX13(1.847759065), bits);
  odd_part(t4, t5, t6, t7);
  d[7 * step] = descale(t4, bits);
  d[5 * step] = descale(t5, bits);
  d[3 * step] = descale(t6, bits);
  d[step] = descale(t7, bits);
}

template <bool kFirst>
VQSA_HD void inverse_dct(int32_t* d, int step) {
  const int bits = kFirst ? kDctBits - kPassBits : kDctBits + kPassBits + 3;
  const int z2 = d[2 * step], z3 = d[6 * step];
  const int z = (z2 + z3) * VQSA_FIX13(0.541196100);
  const int t2 = z - z3 * VQSA_FIX13(1.847759065), t3 = z + z2 * VQSA_FIX13(0.765366865);
  const int t0 = (d[0] + d[4 * step]) * (1 << kDctBits), t1 = (d[0] - d[4 * step]) * (1 << kDctBits);
  const int a = t0 + t3, b = t0 - t3, c = t1 + t2, e = t1 - t2;
  int o0 = d[7 * step], o1 = d[5 * step], o2 = d[3 * step], o3 = d[step];
  odd_part(o0, o1, o2, o3);
  d[0] = descale(a + o3, bits);
  d[7 * step] = descale(a - o3, bits);
  d[step] = descale(c + o2, bits);
  d[6 * step] = descale(c - o2, bits);
  d[2 * step] = descale(e + o1, bits);
  d[5 * step] = descale(e - o1, bits);
  d[3 * step] = descale(b + o0, bits);
  d[4 * step] = descale(b - o0, bits);
}

// Rounds coefficient / divisor to nearest, ties away from zero, and multiplies back. The forward
// transform's output is 8 times too large. The float quotient cannot round across an integer:
// (|c| + divisor / 2 + 0.5) / divisor is at least 0.5 / divisor from one, and |c| < 2^22.
VQSA_HD int quantise_dequantise(int c, int step) {
  const int divisor = 8 * step;
  const int magnitude = c < 0 ? -c : c;
  const int q = static_cast<int>((static_cast<float>(magnitude + divisor / 2) + 0.5f) / static_cast<float>(divisor));
  return (c < 0 ? -q : q) * step;
}

struct JpegPlanes {
  int luma_stride, chroma_stride;
  uint8_t *luma, *blue, *red;
  VQSA_HD explicit JpegPlanes(const Sample& s)
      : luma_stride(16 * ceil_div(s.width, 16)),
        chroma_stride(luma_stride / 2 + 2),
        luma(s.work + kAccWords * 4),
        blue(luma + static_cast<size_t>(luma_stride) * 16 * ceil_div(s.height, 16) + 1),
        red(blue + static_cast<size_t>(chroma_stride) * 8 * ceil_div(s.height, 16)) {}
};

VQSA_HD int jpeg_quality(const Sample& s, const Tables* t) {
  return s.kind == kJpegQuality ? s.severity : static_cast<int>(constants_of(s, t).v[0]);
}

// Encodes and decodes the blocks of a row of 16 x 16 pixel units. Three bands of 8 rows stand above
// each other: the two halves of luma, then blue on the left and red on the right. So every column
// of a band is a column of a block, and neighbours are neighbours in memory.
struct JpegBlocks {
  // At most what a CPU's first-level cache holds.
  static VQSA_HD int units_per_tile(const TileShape& shape) { return clamp(ceil_div(shape.width, 16), 4, 8); }
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) {
    return ceil_div(ceil_div(s.width, 16), units_per_tile(shape)) * ceil_div(s.height, 16);
  }
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape& shape) {
    // The bands twice (for transposing), one word more per row; chroma at full size as bytes.
    const size_t span = 16 * static_cast<size_t>(units_per_tile(shape));
    return 2 * 24 * 4 * (span + 1) + 2 * 16 * span;
  }

  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const int height = s.height, width = s.width;
    const int across = ceil_div(width, 16), per_tile = units_per_tile(b.shape), tiles_across = ceil_div(across, per_tile);
    const int x0 = tile % tiles_across * per_tile * 16, y0 = tile / tiles_across * 16;
    const int units = least(per_tile, across - x0 / 16);
    const int span = 16 * units, half = span / 2, blocks = 2 * units;
    const int stride = B::kSequential ? span : span + 1;  // a GPU finds a column in different banks
    int32_t* VQSA_RESTRICT one = reinterpret_cast<int32_t*>(b.shared);
    int32_t* VQSA_RESTRICT two = one + 24 * stride;
    uint8_t* VQSA_RESTRICT blue = reinterpret_cast<uint8_t*>(two + 24 * stride);
    uint8_t* VQSA_RESTRICT red = blue + 16 * span;
    const uint8_t* VQSA_RESTRICT in = s.in;
    const QuantTable* quant = &b.tables->quant[jpeg_quality(s, b.tables)];
    const JpegPlanes planes(s);

    // Colour conversion; the last row and column are repeated to fill the unit.
    const int inside = least(span, width - x0);
    b.rows(16, inside, [=](int y, int x) {
      const uint8_t* p = in + 3 * (static_cast<size_t>(least(y0 + y, height - 1)) * width + x0 + x);
      // Read before the stores, which for all the compiler knows might change them.
      const int r = p[0], g = p[1], bl = p[2];
      two[y * stride + x] = luma_of(r, g, bl) - 128;
      blue[y * span + x] = static_cast<uint8_t>(blue_of(r, g, bl));
      red[y * span + x] = static_cast<uint8_t>(red_of(r, g, bl));
    });
    b.rows(16, span - inside, [=](int y, int x) {
      two[y * stride + inside + x] = two[y * stride + inside - 1];
      blue[y * span + inside + x] = blue[y * span + inside - 1];
      red[y * span + inside + x] = red[y * span + inside - 1];
    });
    // Chroma is averaged over 2 x 2; the rounding bias alternates 1, 2 along a row. Below the image
    // the last chroma row is repeated, not the last pixel row.
    const int last = (height + 1) / 2 - 1 - y0 / 2;
    b.rows(8, half, [=](int y, int x) {
      const int at = 2 * least(y, last) * span + 2 * x;
      const uint8_t *p = blue + at, *q = red + at;
      int32_t* to = two + (16 + y) * stride + x;
      to[0] = ((p[0] + p[1] + p[span] + p[span + 1] + 1 + (x & 1)) >> 2) - 128;
      to[half] = ((q[0] + q[1] + q[span] + q[span + 1] + 1 + (x & 1)) >> 2) - 128;
    });

    b.transpose(3, blocks, stride, two, one);
    b.rows(3, span, [=](int band, int x) { forward_dct<true>(one + 8 * band * stride + x, stride); });
    b.transpose(3, blocks, stride, one, two);
    b.rows(3, span, [=](int band, int x) { forward_dct<false>(two + 8 * band * stride + x, stride); });
    b.eights(24, blocks, [=](int y, int block, int i) {
      int32_t* p = two + y * stride + 8 * block + i;
      *p = quantise_dequantise(*p, quant->step[y >> 4][8 * (y & 7) + i]);
    });
    b.rows(3, span, [=](int band, int x) { inverse_dct<true>(two + 8 * band * stride + x, stride); });
    b.transpose(3, blocks, stride, two, one);
    b.rows(3, span, [=](int band, int x) { inverse_dct<false>(one + 8 * band * stride + x, stride); });
    b.transpose(3, blocks, stride, one, two);

    b.rows(16, span, [=](int y, int x) {
      planes.luma[static_cast<size_t>(y0 + y) * planes.luma_stride + x0 + x] =
          static_cast<uint8_t>(clamp(two[y * stride + x] + 128, 0, 255));
    });
    // The chroma planes have a column more on each side, which repeats the image's first or last.
    b.rows(8, half, [=](int y, int x) {
      const size_t at = static_cast<size_t>(y0 / 2 + y) * planes.chroma_stride + x0 / 2 + x;
      const int32_t* from = two + (16 + y) * stride + x;
      planes.blue[at] = static_cast<uint8_t>(clamp(from[0] + 128, 0, 255));
      planes.red[at] = static_cast<uint8_t>(clamp(from[half] + 128, 0, 255));
    });
    b.rows(8, 2, [=](int y, int plane) {
      uint8_t* row = (plane == 0 ? planes.blue : planes.red) + static_cast<size_t>(y0 / 2 + y) * planes.chroma_stride;
      const int end = (width + 1) / 2;
      if (x0 == 0) row[-1] = row[0];
      if (x0 + span >= width) row[end] = row[end - 1];
    });
  }
};

// Chroma back to full size, 3/4 from the nearer and 1/4 from the farther sample in each direction,
// and colours back to RGB.
struct JpegColours : TileGrid {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape& shape) {
    // Vertical sums (16 bits) of half the columns and one on each side; upsampled bytes; twice.
    return static_cast<size_t>(shape.height) * 2 * (2 * (shape.width / 2 + 4) + shape.width + 4);
  }

  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const Tile t = tile_at(s, b.shape, tile);  // tile columns start at even pixels
    const int chroma_height = (s.height + 1) / 2;
    const int half = (t.width + 1) / 2, span = half + 2, full = 2 * half;
    const JpegPlanes planes(s);
    uint16_t* VQSA_RESTRICT sums[2] = {reinterpret_cast<uint16_t*>(b.shared),
                                       reinterpret_cast<uint16_t*>(b.shared) + t.height * span};
    uint8_t* VQSA_RESTRICT up[2] = {reinterpret_cast<uint8_t*>(sums[1] + t.height * span),
                                    reinterpret_cast<uint8_t*>(sums[1] + t.height * span) + t.height * full};
    for (int c = 0; c < 2; ++c) {
      const uint8_t* VQSA_RESTRICT plane = c == 0 ? planes.blue : planes.red;
      uint16_t* VQSA_RESTRICT sum = sums[c];
      uint8_t* VQSA_RESTRICT wide = up[c];
      const int stride = planes.chroma_stride, x0 = t.x / 2 - 1;
      b.rows(t.height, span, [=](int y, int j) {
        const int row = t.y + y, near = row >> 1;
        const int far = clamp((row & 1) != 0 ? near + 1 : near - 1, 0, chroma_height - 1);
        const uint8_t* p = plane + x0 + j;
        sum[y * span + j] = static_cast<uint16_t>(3 * p[static_cast<ptrdiff_t>(near) * stride] +
                                                  p[static_cast<ptrdiff_t>(far) * stride]);
      });
      b.rows(t.height, half, [=](int y, int j) {
        const uint16_t* p = sum + y * span + j + 1;
        wide[y * full + 2 * j] = static_cast<uint8_t>((3 * p[0] + p[-1] + 8) >> 4);
        wide[y * full + 2 * j + 1] = static_cast<uint8_t>((3 * p[0] + p[1] + 7) >> 4);
      });
    }
    const uint8_t* VQSA_RESTRICT blue = up[0];
    const uint8_t* VQSA_RESTRICT red = up[1];
    uint8_t* VQSA_RESTRICT out = s.out;
    const int width = s.width;
    b.rows(t.height, t.width, [=](int y, int x) {
      const int luma = planes.luma[static_cast<size_t>(t.y + y) * planes.luma_stride + t.x + x];
      const int cb = blue[y * full + x] - 128, cr = red[y * full + x] - 128;
      uint8_t* p = out + 3 * (static_cast<size_t>(t.y + y) * width + t.x + x);
      const int r = luma + ((VQSA_FIX16(1.40200) * cr + 32768) >> 16);
      const int g = luma + ((-VQSA_FIX16(0.34414) * cb - VQSA_FIX16(0.71414) * cr + 32768) >> 16);
      const int bl = luma + ((VQSA_FIX16(1.77200) * cb + 32768) >> 16);
      p[0] = static_cast<uint8_t>(clamp(r, 0, 255));
      p[1] = static_cast<uint8_t>(clamp(g, 0, 255));
      p[2] = static_cast<uint8_t>(clamp(bl, 0, 255));
    });
  }
};

#undef VQSA_FIX16
#undef VQSA_FIX13

}  // namespace VQSA_ISA
}  // namespace vqsa

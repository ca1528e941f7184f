// elastic_transform: a smooth random displacement; hendrycks warps by a random affine map first.
#pragma once
#include "stage_gaussian.h"

namespace vqsa {
namespace VQSA_ISA {

constexpr int kElasticTaps = 64;  // wider smoothing takes the dense form

// Half-sample mirror of any index, as scipy's "reflect".
VQSA_HD int mirror_symmetric(int i, int n) {
  i = i % (2 * n);
  i = i < 0 ? i + 2 * n : i;
  return i < n ? i : 2 * n - 1 - i;
}

struct ElasticSettings {
  float alpha, amplitude;      // displacement = alpha * smoothed noise in [-amplitude, amplitude)
  double sigma_y, sigma_x;
  int radius_y, radius_x;
  VQSA_HD ElasticSettings(const Sample& s, const Tables* t) {
    const Constants& c = constants_of(s, t);
    const bool bethge = s.flavour == kBethge;
    alpha = static_cast<float>(bethge ? t->elastic_bethge_alpha[s.severity - 1] : c.v[0]);
    amplitude = bethge ? static_cast<float>(s.height * 0.005) : 1.0f;
    sigma_y = bethge ? s.height * 0.01 : c.v[1];
    sigma_x = bethge ? s.width * 0.01 : c.v[1];
    radius_y = sigma_y > 0 ? static_cast<int>(3.0 * sigma_y + 0.5) : 0;
    radius_x = sigma_x > 0 ? static_cast<int>(3.0 * sigma_x + 0.5) : 0;
  }
};

// Scratch: two noise planes, two planes in between, the filters of both axes, the warped image.
struct ElasticScratch {
  float *noise, *between, *filter_y, *filter_x, *warped;
  VQSA_HD explicit ElasticScratch(const Sample& s) {
    const size_t pixels = static_cast<size_t>(s.height) * s.width;
    noise = reinterpret_cast<float*>(s.work + kAccWords * 4);
    between = noise + 2 * pixels;
    filter_y = between + 2 * pixels;
    filter_x = filter_y + greatest(4 * s.height, kElasticTaps);
    warped = filter_x + greatest(4 * s.width, kElasticTaps);
  }
};

// Two uniform planes in [-1, 1): columns' displacement first, then rows', as the references draw.
struct ElasticNoise : NoSharedMemory {
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) {
    return ceil_div(ceil_div(2 * s.height * s.width, 4), shape.items);
  }
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const int n = 2 * s.height * s.width, first = tile * b.shape.items;
    const int count = least(b.shape.items, ceil_div(n, 4) - first);
    float* VQSA_RESTRICT planes = ElasticScratch(s).noise;
    const uint32_t* raw = s.noise;
    if (raw != nullptr) {
      b.each(least(4 * count, n - 4 * first), [=](int i) { field_from_bits(raw[4 * first + i], planes[4 * first + i]); });
      return;
    }
    const uint64_t key = s.key;
    const auto uniform = [](uint32_t w) { return static_cast<float>(static_cast<int32_t>(w) >> 8) * 0x1p-23f; };
    const int whole = greatest(least(count, n / 4 - first), 0);
    b.each(whole, [=](int i) {
      const Words4 q = draw_words(key, kStreamField, 0, static_cast<uint32_t>(first + i));
      float* f = planes + 4 * (first + i);
      f[0] = uniform(q.w0);
      f[1] = uniform(q.w1);
      f[2] = uniform(q.w2);
      f[3] = uniform(q.w3);
    });
    if (whole < count) {
      b.each(n % 4, [=](int j) {
        planes[n / 4 * 4 + j] = uniform(word_of(draw_words(key, kStreamField, 0, static_cast<uint32_t>(n / 4)), j));
      });
    }
  }
};

// The filter of each axis. Short: taps by distance. Long: the infinitely mirrored Gaussian folded into
// one period of 2n: entry n - 1 + d is the weight at distance d in (-n, n), entry 2n - 1 + k the weight
// of the mirror image at distance k + 1, for k in 0 .. 2n - 2.
struct ElasticFilter : NoSharedMemory {
  static VQSA_HD int tiles(const Sample&, const TileShape&) { return 2; }
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const ElasticSettings e(s, b.tables);
    const ElasticScratch scratch(s);
    const double sigma = tile == 0 ? e.sigma_y : e.sigma_x;
    const int radius = tile == 0 ? e.radius_y : e.radius_x, n = tile == 0 ? s.height : s.width;
    float* filter = tile == 0 ? scratch.filter_y : scratch.filter_x;
    double total = 1.0;
    for (int k = 1; k <= radius; ++k) total += 2.0 * exp_det(-0.5 * k * k / (sigma * sigma));
    if (radius < kElasticTaps) {
      b.each(radius + 1, [=](int k) {
        filter[k] = static_cast<float>((k == 0 ? 1.0 : exp_det(-0.5 * k * k / (sigma * sigma))) / total);
      });
      return;
    }
    b.each(4 * n - 2, [=](int i) {
      const int distance = i < 2 * n - 1 ? i - (n - 1) : i - (2 * n - 1) + 1;
      double sum = 0.0;
      const int turns = (radius + 2 * n) / (2 * n);
      for (int m = -turns; m <= turns; ++m) {
        const int d = distance + 2 * n * m;
        if (d <= radius && -d <= radius) sum += exp_det(-0.5 * d * d / (sigma * sigma));
      }
      filter[i] = static_cast<float>(sum / total);
    });
  }
};

struct ElasticGrid : NoSharedMemory {
  // Both planes: the tiles of the first, then of the second.
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) { return 2 * tile_count(s, shape); }
  struct Place {
    Tile tile;
    size_t plane;  // where the plane starts, in values
    template <class B>
    VQSA_HD Place(const B& b, const Sample& s, int number)
        : tile(tile_at(s, b.shape, number % tile_count(s, b.shape))),
          plane(static_cast<size_t>(number / tile_count(s, b.shape)) * s.height * s.width) {}
  };
};

struct ElasticDown : ElasticGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const ElasticSettings e(s, b.tables);
    const ElasticScratch scratch(s);
    const Place at(b, s, tile);
    const Tile t = at.tile;
    const int height = s.height, width = s.width;
    const float* VQSA_RESTRICT in = scratch.noise + at.plane + t.x;
    float* VQSA_RESTRICT out = scratch.between + at.plane + t.x;
    const float* VQSA_RESTRICT w = scratch.filter_y;
    const auto store = [=](int y, int x, float sum) { out[static_cast<size_t>(t.y + y) * width + x] = sum; };
    if (e.radius_y < kElasticTaps) {
      b.template accumulate<float>(
          t.height, t.width, e.radius_y + 1,
          [=](int y, int x, int k) {
            const int above = mirror_symmetric(t.y + y - k, height), below = mirror_symmetric(t.y + y + k, height);
            const float pair = in[static_cast<size_t>(above) * width + x] + in[static_cast<size_t>(below) * width + x];
            return (k == 0 ? 0.5f * w[0] : w[k]) * pair;
          },
          store);
      return;
    }
    b.template accumulate<float>(
        t.height, t.width, height,
        [=](int y, int x, int j) {
          const float weight = w[height - 1 + t.y + y - j] + w[2 * height - 1 + t.y + y + j];
          return weight * in[static_cast<size_t>(j) * width + x];
        },
        store);
  }
};

// Fields: displacement in pixels, planes (columns, rows).
struct ElasticAcross : ElasticGrid {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape& shape) {
    return sizeof(float) * shape.height * (shape.width + 2 * kElasticTaps);
  }
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const ElasticSettings e(s, b.tables);
    const ElasticScratch scratch(s);
    const Place at(b, s, tile);
    const Tile t = at.tile;
    const int width = s.width;
    const float* VQSA_RESTRICT in = scratch.between + at.plane;
    uint32_t* VQSA_RESTRICT out = s.fields + at.plane;
    const float* VQSA_RESTRICT w = scratch.filter_x;
    const float scale = e.alpha * e.amplitude;
    const auto store = [=](int y, int x, float sum) {
      out[static_cast<size_t>(t.y + y) * width + t.x + x] = field_bits(scale * sum);
    };
    if (e.radius_x < kElasticTaps) {
      const int radius = e.radius_x, span = t.width + 2 * radius;
      float* VQSA_RESTRICT padded = reinterpret_cast<float*>(b.shared);
      b.rows(t.height, span, [=](int y, int x) {
        padded[y * span + x] = in[static_cast<size_t>(t.y + y) * width + mirror_symmetric(t.x + x - radius, width)];
      });
      b.template accumulate<float>(
          t.height, t.width, radius + 1,
          [=](int y, int x, int k) {
            const float* p = padded + y * span + radius + x;
            return (k == 0 ? 0.5f * w[0] : w[k]) * (p[-k] + p[k]);
          },
          store);
      return;
    }
    b.template accumulate<float>(
        t.height, t.width, width,
        [=](int y, int x, int j) {
          const float weight = w[width - 1 + t.x + x - j] + w[2 * width - 1 + t.x + x + j];
          return weight * in[static_cast<size_t>(t.y + y) * width + j];
        },
        store);
  }
};

// Fields after the planes: how far the three reference points of the affine map move, (3, 2).
struct ElasticPoints : OneBlock {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int, int) {
    const float reach = static_cast<float>(constants_of(s, b.tables).v[2]);
    const size_t planes = 2 * static_cast<size_t>(s.height) * s.width;
    uint32_t* fields = s.fields + planes;
    const uint32_t* raw = s.noise;
    const uint64_t key = s.key;
    const bool bethge = s.flavour == kBethge;
    b.each(6, [=](int i) {
      const uint32_t w = word_of(draw_words(key, kStreamScalar, 0, static_cast<uint32_t>(i / 4)), i % 4);
      float u = static_cast<float>(static_cast<int32_t>(w) >> 8) * 0x1p-23f;
      if (raw != nullptr) field_from_bits(raw[planes + i], u);
      fields[i] = field_bits(bethge ? 0.0f : reach * u);
    });
  }
};

// The affine map from output to source, from three points and where they moved to.
struct AffineInverse {
  double xx, xy, x0, yx, yy, y0;
  VQSA_HD AffineInverse(const Sample& s, const uint32_t* moved) {
    const float centre_0 = static_cast<float>(s.height / 2), centre_1 = static_cast<float>(s.width / 2);
    const float reach = static_cast<float>(least(s.height, s.width) / 3);
    const float from[3][2] = {{centre_0 + reach, centre_1 + reach},
                              {centre_0 + reach, centre_1 - reach},
                              {centre_0 - reach, centre_1 - reach}};
    double to[3][2];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 2; ++j) {
        float m;
        field_from_bits(moved[2 * i + j], m);
        to[i][j] = static_cast<double>(from[i][j] + m);
      }
    }
    // Points are (x, y). Solve source = A * target + c on the two edges of the triangle.
    const double ax = to[1][0] - to[0][0], ay = to[1][1] - to[0][1], bx = to[2][0] - to[0][0], by = to[2][1] - to[0][1];
    const double fx1 = from[1][0] - from[0][0], fy1 = from[1][1] - from[0][1];
    const double fx2 = from[2][0] - from[0][0], fy2 = from[2][1] - from[0][1];
    const double det = ax * by - ay * bx;
    xx = (fx1 * by - fx2 * ay) / det;
    xy = (fx2 * ax - fx1 * bx) / det;
    yx = (fy1 * by - fy2 * ay) / det;
    yy = (fy2 * ax - fy1 * bx) / det;
    x0 = from[0][0] - xx * to[0][0] - xy * to[0][1];
    y0 = from[0][1] - yx * to[0][0] - yy * to[0][1];
  }
};

VQSA_HD int mirror_101_any(int i, int n) {
  const int period = 2 * (n - 1);
  i = i % period;
  i = i < 0 ? i + period : i;
  return i < n ? i : period - i;
}

// Bilinear. Written so that four equal values give that value, not one just below, which would
// truncate a flat area to one level less.
VQSA_HD float between_four(float a, float b, float c, float d, float fx, float fy) {
  const float upper = a + fx * (b - a), lower = c + fx * (d - c);
  return upper + fy * (lower - upper);
}

// Bilinear, borders mirrored without repeating the edge. Exact source positions, as in OpenCV 5's
// warpAffine; versions before rounded them to 1/32 pixel (up to 3 levels, 0.09 on average).
struct ElasticWarp : TileGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    if (s.flavour == kBethge) return;
    const Tile t = tile_at(s, b.shape, tile);
    const int height = s.height, width = s.width;
    const AffineInverse m(s, s.fields + 2 * static_cast<size_t>(height) * width);
    const uint8_t* VQSA_RESTRICT in = s.in;
    float* VQSA_RESTRICT out = ElasticScratch(s).warped;
    b.rows(t.height, t.width, [=](int dy, int dx) {
      const int y = t.y + dy, x = t.x + dx;
      const double sx = m.xx * x + m.xy * y + m.x0, sy = m.yx * x + m.yy * y + m.y0;
      int ix = static_cast<int>(sx), iy = static_cast<int>(sy);
      ix -= ix > sx ? 1 : 0;
      iy -= iy > sy ? 1 : 0;
      const float fx = static_cast<float>(sx - ix), fy = static_cast<float>(sy - iy);
      const int xa = 3 * mirror_101_any(ix, width), xb = 3 * mirror_101_any(ix + 1, width);
      const uint8_t* top = in + 3 * static_cast<size_t>(mirror_101_any(iy, height)) * width;
      const uint8_t* bottom = in + 3 * static_cast<size_t>(mirror_101_any(iy + 1, height)) * width;
      float* q = out + 3 * (static_cast<size_t>(y) * width + x);
      for (int c = 0; c < 3; ++c) {
        q[c] = between_four(top[xa + c], top[xb + c], bottom[xa + c], bottom[xb + c], fx, fy);
      }
    });
  }
};

struct ElasticSample : TileGrid {

  template <class T, class B>
  static VQSA_HD void sample(const B& b, const Sample& s, const Tile& t, const T* source) {
    const int height = s.height, width = s.width;
    const T* VQSA_RESTRICT in = source;
    const uint32_t* VQSA_RESTRICT columns = s.fields;
    const uint32_t* VQSA_RESTRICT rows = s.fields + static_cast<size_t>(height) * width;
    uint8_t* VQSA_RESTRICT out = s.out;
    b.rows(t.height, t.width, [=](int dy, int dx) {
      const int y = t.y + dy, x = t.x + dx;
      const size_t at = static_cast<size_t>(y) * width + x;
      float move_x, move_y;
      field_from_bits(columns[at], move_x);
      field_from_bits(rows[at], move_y);
      // Whole and fractional part of the displacement alone keep all bits of the fraction.
      int ix = static_cast<int>(move_x), iy = static_cast<int>(move_y);
      ix -= static_cast<float>(ix) > move_x ? 1 : 0;
      iy -= static_cast<float>(iy) > move_y ? 1 : 0;
      const float fx = move_x - static_cast<float>(ix), fy = move_y - static_cast<float>(iy);
      const int xa = 3 * mirror_symmetric(x + ix, width), xb = 3 * mirror_symmetric(x + ix + 1, width);
      const T* top = in + 3 * static_cast<size_t>(mirror_symmetric(y + iy, height)) * width;
      const T* bottom = in + 3 * static_cast<size_t>(mirror_symmetric(y + iy + 1, height)) * width;
      for (int c = 0; c < 3; ++c) {
        out[3 * at + c] = quantise(between_four(top[xa + c], top[xb + c], bottom[xa + c], bottom[xb + c], fx, fy));
      }
    });
  }

  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const Tile t = tile_at(s, b.shape, tile);
    if (s.flavour == kBethge) {
      sample(b, s, t, s.in);
    } else {
      sample(b, s, t, static_cast<const float*>(ElasticScratch(s).warped));
    }
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

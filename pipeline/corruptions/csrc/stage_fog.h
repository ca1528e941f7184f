// fog: the image mixed with a plasma fractal, made by diamond-square on a torus.
#pragma once
#include "stage_colour.h"

namespace vqsa {
namespace VQSA_ISA {

constexpr int kFogCoarse = 32;  // side up to which one block makes the plasma

VQSA_HD int fog_side(const Sample& s) {
  const int longest = greatest(s.height, s.width);
  int side = kFogCoarse;
  while (side < longest) side *= 2;
  return side;
}

// Two planes that take turns: the plane of side n is number log2(n) & 1.
VQSA_HD float* fog_plane(const Sample& s, int side) {
  const int full = fog_side(s);
  int level = 0;
  for (int n = side; n > 1; n /= 2) ++level;
  return reinterpret_cast<float*>(s.work + kAccWords * 4) + static_cast<size_t>(level & 1) * full * full;
}

// Uniform in [-1, 1): field `which` of cell `index` at the level with n x n cells. Raw noise comes
// level by level, three n x n fields each.
struct FogNoise {
  uint64_t key;
  const uint32_t* raw;
  VQSA_HD void three(int n, int index, float& u0, float& u1, float& u2) const {
    const Words4 q = draw_words(key, kStreamField, static_cast<uint32_t>(n), static_cast<uint32_t>(index));
    u0 = static_cast<float>(static_cast<int32_t>(q.w0) >> 8) * 0x1p-23f;
    u1 = static_cast<float>(static_cast<int32_t>(q.w1) >> 8) * 0x1p-23f;
    u2 = static_cast<float>(static_cast<int32_t>(q.w2) >> 8) * 0x1p-23f;
  }
  VQSA_HD void three_raw(int n, int index, float& u0, float& u1, float& u2) const {
    const uint32_t* level = raw + (n * n - 1);  // 3 * (1 + 4 + 16 + ...) words before
    field_from_bits(level[index], u0);
    field_from_bits(level[n * n + index], u1);
    field_from_bits(level[2 * n * n + index], u2);
  }
};

// Half-width of the noise at the level with n x n cells: w^2, where w = 100 / decay^level.
VQSA_HD float fog_amplitude(int n, double decay) {
  double w = 100.0;
  for (; n > 1; n /= 2) w = w / decay;
  return static_cast<float>(w * w);
}

// Refines rows [y0, y0 + rows) and columns [x0, x0 + columns) of the n x n grid `from` into the
// 2n x 2n grid `to`. `scratch` holds three floats for each of (rows + 1) * (columns + 1) cells.
template <class B>
VQSA_HD void fog_refine(const B& b, const FogNoise& noise, int n, float amplitude, const float* from, float* to, int y0,
                        int x0, int rows, int columns, float* scratch) {
  const int span = columns + 1, cells = (rows + 1) * span, mask = n - 1;
  float* VQSA_RESTRICT centre = scratch;
  float* VQSA_RESTRICT u1 = scratch + cells;
  float* VQSA_RESTRICT u2 = scratch + 2 * cells;
  if (noise.raw != nullptr) {
    b.rows(rows + 1, span, [=](int i, int j) {
      const int at = i * span + j;
      noise.three_raw(n, ((y0 + i - 1) & mask) * n + ((x0 + j - 1) & mask), centre[at], u1[at], u2[at]);
    });
  } else {
    b.rows(rows + 1, span, [=](int i, int j) {
      const int at = i * span + j;
      noise.three(n, ((y0 + i - 1) & mask) * n + ((x0 + j - 1) & mask), centre[at], u1[at], u2[at]);
    });
  }
  b.rows(rows + 1, span, [=](int i, int j) {
    const int y = (y0 + i - 1) & mask, x = (x0 + j - 1) & mask, below = (y + 1) & mask, right = (x + 1) & mask;
    const float corners = (from[y * n + x] + from[below * n + x]) + (from[y * n + right] + from[below * n + right]);
    centre[i * span + j] = corners * 0.25f + amplitude * centre[i * span + j];
  });
  b.rows(rows, columns, [=](int i, int j) {
    const int y = y0 + i, x = x0 + j, at = (i + 1) * span + j + 1;
    const float corner = from[y * n + x];
    const float right = from[y * n + ((x + 1) & mask)], below = from[((y + 1) & mask) * n + x];
    float* q = to + static_cast<size_t>(2 * y) * (2 * n) + 2 * x;
    q[0] = corner;
    q[1] = ((centre[at] + centre[at - span]) + (corner + right)) * 0.25f + amplitude * u1[at];
    q[2 * n] = ((centre[at] + centre[at - 1]) + (corner + below)) * 0.25f + amplitude * u2[at];
    q[2 * n + 1] = centre[at];
  });
}

struct FogCoarse : OneBlock {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape&) {
    const int n = kFogCoarse;
    return 4 * (3 * (n / 2 + 1) * (n / 2 + 1) + 2 * n * n);
  }
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int, int) {
    const double decay = constants_of(s, b.tables).v[1];
    float* planes[2] = {reinterpret_cast<float*>(b.shared), reinterpret_cast<float*>(b.shared) + kFogCoarse * kFogCoarse};
    float* scratch = planes[1] + kFogCoarse * kFogCoarse;
    float* start = planes[0];
    b.each(1, [=](int) { start[0] = 0.0f; });
    const FogNoise noise = {s.key, s.noise};
    int which = 0;
    for (int n = 1; n < kFogCoarse; n *= 2, which ^= 1) {
      fog_refine(b, noise, n, fog_amplitude(n, decay), planes[which], planes[which ^ 1], 0, 0, n, n, scratch);
    }
    const float* result = planes[which];
    float* out = fog_plane(s, kFogCoarse);
    b.each(kFogCoarse * kFogCoarse, [=](int i) { out[i] = result[i]; });
  }
};

struct FogRefine {
  static VQSA_HD int side(const TileShape& shape) { return shape.width < 32 ? 32 : shape.width; }
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) {
    return ceil_div(fog_side(s) / 2, shape.height) * ceil_div(fog_side(s) / 2, side(shape));
  }
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape& shape) {
    return sizeof(float) * 3 * (shape.height + 1) * (side(shape) + 1);
  }
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int iteration) {
    const int n = kFogCoarse << iteration;
    if (n >= fog_side(s)) return;
    const int wide = side(b.shape), across = ceil_div(n, wide);
    const int x0 = tile % across * wide, y0 = tile / across * b.shape.height;
    if (y0 >= n) return;
    const FogNoise noise = {s.key, s.noise};
    fog_refine(b, noise, n, fog_amplitude(n, constants_of(s, b.tables).v[1]), fog_plane(s, n), fog_plane(s, 2 * n), y0, x0,
               least(b.shape.height, n - y0), least(wide, n - x0), reinterpret_cast<float*>(b.shared));
  }
};

// Floats as integers in the same order, so that extrema can be gathered in any order.
VQSA_HD uint32_t ordered_bits(float v) {
  const uint32_t u = static_cast<uint32_t>(bits_of(v));
  return (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
}
VQSA_HD float from_ordered_bits(uint32_t u) {
  return float_of(static_cast<int32_t>((u & 0x80000000u) != 0 ? u & 0x7FFFFFFFu : ~u));
}

// Words 0 and 1: the plasma's largest value and the complement of its smallest.
struct FogRange : NoSharedMemory {
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) {
    return ceil_div(fog_side(s) * fog_side(s), shape.items);
  }
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const int side = fog_side(s), first = tile * b.shape.items, count = least(b.shape.items, side * side - first);
    const float* plane = fog_plane(s, side) + first;
    uint32_t* acc = reinterpret_cast<uint32_t*>(s.work);
    b.largest(count, acc, [=](int i) { return ordered_bits(plane[i]); });
    b.largest(count, acc + 1, [=](int i) { return ~ordered_bits(plane[i]); });
  }
};

// Field: the plasma scaled to [0, 1] over its whole square, cropped to the image.
struct FogField : RowGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const int side = fog_side(s), width = s.width, y0 = tile * b.shape.height;
    const uint32_t* acc = reinterpret_cast<const uint32_t*>(s.work);
    const float low = from_ordered_bits(~acc[1]), range = from_ordered_bits(acc[0]) - low;
    const float* VQSA_RESTRICT plane = fog_plane(s, side);
    uint32_t* VQSA_RESTRICT fields = s.fields;
    b.rows(least(b.shape.height, s.height - y0), width, [=](int y, int x) {
      fields[static_cast<size_t>(y0 + y) * width + x] = field_bits((plane[static_cast<size_t>(y0 + y) * side + x] - low) / range);
    });
  }
};

// Word 2: the brightest level of the image.
struct FogBrightest : ValueGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const int first = tile * b.shape.items * 4, count = least(b.shape.items * 4, values(s) - first);
    const uint8_t* in = s.in + first;
    b.largest(count, reinterpret_cast<uint32_t*>(s.work) + 2, [=](int i) { return static_cast<uint32_t>(in[i]); });
  }
};

struct FogApply : PixelGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const float strength = static_cast<float>(constants_of(s, b.tables).v[0]);
    const float brightest = static_cast<float>(reinterpret_cast<const uint32_t*>(s.work)[2]) / 255.0f;
    const float scale = brightest / (brightest + strength), strength_255 = 255.0f * strength;
    const int first = tile * b.shape.items, count = least(b.shape.items, pixels(s) - first);
    const uint8_t* VQSA_RESTRICT in = s.in + 3 * static_cast<size_t>(first);
    uint8_t* VQSA_RESTRICT out = s.out + 3 * static_cast<size_t>(first);
    const uint32_t* VQSA_RESTRICT plasma = s.fields + first;
    b.each(count, [=](int i) {
      float p;
      field_from_bits(plasma[i], p);
      const float haze = strength_255 * p;
      out[3 * i] = quantise((in[3 * i] + haze) * scale);
      out[3 * i + 1] = quantise((in[3 * i + 1] + haze) * scale);
      out[3 * i + 2] = quantise((in[3 * i + 2] + haze) * scale);
    });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

// gaussian_noise, shot_noise, impulse_noise, speckle_noise: one random word or normal per pixel
// value, so drawing and applying fuse into one pass without storing the field.
//
// A law says what the field of four neighbouring values is and how one value is changed by it:
//   Field           float (a standard normal) or uint32_t (a uniform word)
//   four(words, f)  the fields of values 4i..4i+3 from Philox words of index i
//   Change          per image constants, with `uint8_t operator()(uint8_t x, Field f)`
#pragma once
#include "fmath.h"
#include "grids.h"
#include "philox.h"

namespace vqsa {
namespace VQSA_ISA {

VQSA_HD const Constants& constants_of(const Sample& s, const Tables* t) {
  return t->constants[s.set][s.kind][s.severity - 1];
}

VQSA_HD uint32_t field_bits(float f) { return static_cast<uint32_t>(bits_of(f)); }
VQSA_HD uint32_t field_bits(uint32_t f) { return f; }
VQSA_HD void field_from_bits(uint32_t b, float& f) { f = float_of(static_cast<int32_t>(b)); }
VQSA_HD void field_from_bits(uint32_t b, uint32_t& f) { f = b; }

struct NormalField {
  using Field = float;
  static VQSA_HD void four(const Words4& q, float& f0, float& f1, float& f2, float& f3) {
    normal_pair(q.w0, q.w1, f0, f1);
    normal_pair(q.w2, q.w3, f2, f3);
  }
};
struct UniformField {
  using Field = uint32_t;
  static VQSA_HD void four(const Words4& q, uint32_t& f0, uint32_t& f1, uint32_t& f2, uint32_t& f3) {
    f0 = q.w0;
    f1 = q.w1;
    f2 = q.w2;
    f3 = q.w3;
  }
};

struct GaussianLaw : NormalField {
  struct Change {
    float sigma_255;
    VQSA_HD Change(const Sample& s, const Tables* t) : sigma_255(static_cast<float>(constants_of(s, t).v[0] * 255.0)) {}
    VQSA_HD uint8_t operator()(uint8_t x, float n) const {
      return quantise(static_cast<float>(x) + sigma_255 * n);
    }
  };
};

struct SpeckleLaw : NormalField {
  struct Change {
    float sigma;
    VQSA_HD Change(const Sample& s, const Tables* t) : sigma(static_cast<float>(constants_of(s, t).v[0])) {}
    VQSA_HD uint8_t operator()(uint8_t x, float n) const {
      const float v = static_cast<float>(x);
      return quantise(v + v * (sigma * n));
    }
  };
};

// Below `flip` the value is replaced: by white in the lower half, by black in the upper.
struct ImpulseLaw : UniformField {
  struct Change {
    uint32_t flip, salt;
    VQSA_HD Change(const Sample& s, const Tables* t)
        : flip(static_cast<uint32_t>(constants_of(s, t).v[0] * 4294967296.0)), salt(flip / 2) {}
    VQSA_HD uint8_t operator()(uint8_t x, uint32_t u) const {
      const uint8_t replaced = u < salt ? 255 : 0;
      return u < flip ? replaced : x;
    }
  };
};

// Poisson by inversion: the count is the number of cumulative probabilities, as 32-bit fractions,
// that the word reaches. Integers only, so every device agrees.
struct ShotLaw : UniformField {
  struct Change {
    const PoissonTable* table;
    const uint32_t* thresholds;
    const uint16_t* guide;
    VQSA_HD Change(const Sample& s, const Tables* t)
        : table(&t->poisson[s.set][s.severity - 1]),
          thresholds(t->poisson_thresholds),
          guide(t->poisson_guide + ((s.set * 5 + s.severity - 1) << 16)) {}
    VQSA_HD uint8_t operator()(uint8_t x, uint32_t u) const {
      const uint32_t* steps = thresholds + table->offset[x];
      const int length = table->length[x];
      int k = guide[(static_cast<int>(x) << 8) | static_cast<int>(u >> 24)];
      while (k < length && u >= steps[k]) ++k;
      return table->level[table->first[x] + k];
    }
  };
};

VQSA_HD void store_four(uint8_t* p, uint8_t a, uint8_t b, uint8_t c, uint8_t d) {
#if defined(__CUDA_ARCH__)
  if ((reinterpret_cast<size_t>(p) & 3u) == 0) {
    *reinterpret_cast<uchar4*>(p) = make_uchar4(a, b, c, d);
    return;
  }
#endif
  p[0] = a;
  p[1] = b;
  p[2] = c;
  p[3] = d;
}

template <class Law>
struct NoiseFused : ValueGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    using Field = typename Law::Field;
    const typename Law::Change change(s, b.tables);
    const int n = values(s);
    const int first = tile * b.shape.items;
    const int count = least(b.shape.items, n / 4 - first);
    const uint8_t* VQSA_RESTRICT in = s.in + 4 * static_cast<size_t>(first);
    uint8_t* VQSA_RESTRICT out = s.out + 4 * static_cast<size_t>(first);
    const uint64_t key = s.key;
    if (count > 0) {
      b.each(count, [=](int i) {
        const Words4 q = draw_words(key, kStreamPixel, 0, static_cast<uint32_t>(first + i));
        Field f0, f1, f2, f3;
        Law::four(q, f0, f1, f2, f3);
        store_four(out + 4 * i, change(in[4 * i], f0), change(in[4 * i + 1], f1), change(in[4 * i + 2], f2),
                   change(in[4 * i + 3], f3));
      });
    }
    if (tile == tiles(s, b.shape) - 1) {  // the last one to three values
      const int rest = n / 4;
      const uint8_t* in0 = s.in;
      uint8_t* out0 = s.out;
      b.each(n - 4 * rest, [=](int j) {
        const Words4 q = draw_words(key, kStreamPixel, 0, static_cast<uint32_t>(rest));
        Field f[4];
        Law::four(q, f[0], f[1], f[2], f[3]);
        out0[4 * rest + j] = change(in0[4 * rest + j], f[j]);
      });
    }
  }
};

template <class Law>
struct NoiseDraw : ValueGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    using Field = typename Law::Field;
    const int n = values(s);
    const int first = tile * b.shape.items;
    const int count = least(b.shape.items, ceil_div(n, 4) - first);
    uint32_t* fields = s.fields;
    const uint64_t key = s.key;
    b.each(count, [=](int i) {
      const Words4 q = draw_words(key, kStreamPixel, 0, static_cast<uint32_t>(first + i));
      Field f[4];
      Law::four(q, f[0], f[1], f[2], f[3]);
      for (int j = 0; j < 4; ++j) {
        if (4 * (first + i) + j < n) fields[4 * (first + i) + j] = field_bits(f[j]);
      }
    });
  }
};

template <class Law>
struct NoiseApply : ValueGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    const typename Law::Change change(s, b.tables);
    const int first = tile * b.shape.items * 4;
    const int count = least(b.shape.items * 4, values(s) - first);
    const uint8_t* VQSA_RESTRICT in = s.in + first;
    uint8_t* VQSA_RESTRICT out = s.out + first;
    const uint32_t* VQSA_RESTRICT fields = s.fields + first;
    b.each(count, [=](int i) {
      typename Law::Field f;
      field_from_bits(fields[i], f);
      out[i] = change(in[i], f);
    });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

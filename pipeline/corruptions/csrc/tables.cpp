// Builds every table that the stages read. Done once, in double precision and with our own exp, so
// that all machines build the same bits.
#include "tables.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "fmath.h"

namespace vqsa {
namespace {

using generic::exp_det;

GaussianTaps gaussian_taps(double sigma, double truncate) {
  GaussianTaps taps = {};
  const int radius = sigma > 0 ? static_cast<int>(truncate * sigma + 0.5) : 0;
  double sum = 1.0;
  std::vector<double> w(radius + 1, 1.0);
  for (int k = 1; k <= radius; ++k) {
    w[k] = exp_det(-0.5 * k * k / (sigma * sigma));
    sum += 2.0 * w[k];
  }
  taps.radius = radius;
  for (int k = 0; k <= radius; ++k) taps.w[k] = static_cast<float>(w[k] / sum);
  return taps;
}

SmoothTaps smooth_taps(double sigma) {
  SmoothTaps taps = {};
  taps.radius = static_cast<int>(4.0 * sigma + 0.5);
  double sum = 1.0;
  taps.w[0] = 1.0;
  for (int k = 1; k <= taps.radius; ++k) {
    taps.w[k] = exp_det(-0.5 * k * k / (sigma * sigma));
    sum += 2.0 * taps.w[k];
  }
  for (int k = 0; k <= taps.radius; ++k) taps.w[k] /= sum;
  return taps;
}

int reflect_101(int i, int n) {
  if (i < 0) i = -i;
  return i >= n ? 2 * (n - 1) - i : i;
}

// A disk on a grid, smoothed by a small Gaussian with mirrored borders. Where the disk touches the
// edge of its array the mirror adds mass, so the sum exceeds 1 at severities 4 and 5; kept.
DiskKernel disk_kernel(double radius, double alias_sigma) {
  const int reach = radius <= 8 ? 8 : static_cast<int>(radius);
  const int size = 2 * reach + 1;
  const int smooth = radius <= 8 ? 1 : 2;
  std::vector<double> disk(size * size), row(size * size);
  double count = 0;
  for (int y = 0; y < size; ++y) {
    for (int x = 0; x < size; ++x) {
      const int dy = y - reach, dx = x - reach;
      disk[y * size + x] = dx * dx + dy * dy <= radius * radius ? 1.0 : 0.0;
      count += disk[y * size + x];
    }
  }
  double weight[3], total = 0;
  for (int k = 0; k <= smooth; ++k) {
    weight[k] = exp_det(-0.5 * k * k / (alias_sigma * alias_sigma));
    total += k == 0 ? weight[k] : 2 * weight[k];
  }
  for (int y = 0; y < size; ++y) {
    for (int x = 0; x < size; ++x) {
      double v = 0;
      for (int k = -smooth; k <= smooth; ++k) {
        v += weight[k < 0 ? -k : k] / total * disk[y * size + reflect_101(x + k, size)] / count;
      }
      row[y * size + x] = v;
    }
  }
  DiskKernel kernel = {};
  std::vector<double> quadrant(11 * 11, 0.0);
  for (int dy = 0; dy <= reach; ++dy) {
    for (int dx = 0; dx <= reach; ++dx) {
      double v = 0;
      for (int k = -smooth; k <= smooth; ++k) {
        v += weight[k < 0 ? -k : k] / total * row[reflect_101(reach + dy + k, size) * size + reach + dx];
      }
      quadrant[dy * 11 + dx] = v;
    }
  }
  kernel.plateau = static_cast<float>(1.0 / count);
  for (int dy = 0; dy <= reach; ++dy) {
    int inner = -1;
    while (inner + 1 <= reach && std::fabs(quadrant[dy * 11 + inner + 1] * count - 1.0) < 1e-6) ++inner;
    kernel.inner[dy] = inner;
    for (int dx = inner + 1; dx <= reach; ++dx) {
      const double v = quadrant[dy * 11 + dx];
      if (v <= 1e-12) continue;
      kernel.rim[kernel.rim_taps++] = {dy, dx, static_cast<float>(v * (dy == 0 ? 0.5 : 1.0) * (dx == 0 ? 0.5 : 1.0))};
      kernel.radius = std::max(kernel.radius, std::max(dy, dx));
    }
    if (inner >= 0) kernel.radius = std::max(kernel.radius, std::max(dy, inner));
  }
  return kernel;
}

MotionTaps motion_taps(double radius, double sigma) {
  MotionTaps taps = {};
  taps.count = 2 * static_cast<int>(radius) + 1;
  double w[kMotionTaps], sum = 0;
  for (int i = 0; i < taps.count; ++i) sum += w[i] = exp_det(-0.5 * i * i / (sigma * sigma));
  for (int i = 0; i < taps.count; ++i) taps.w[i] = static_cast<float>(w[i] / sum);
  return taps;
}

// As NumPy's arange computes them: 1 + i * ((1 + step) - 1).
ZoomFactors zoom_factors(double step, int count) {
  ZoomFactors z = {};
  z.count = count;
  const volatile double next = 1.0 + step;
  for (int i = 0; i < count; ++i) z.factor[i] = 1.0 + i * (next - 1.0);
  return z;
}

// Probability as a 32-bit fraction, rounded, saturated.
uint32_t fraction_32(double p) {
  const double v = p * 4294967296.0 + 0.5;
  return v >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(v);
}

struct Poisson {
  std::vector<uint32_t> thresholds;
  std::vector<uint16_t> guide;
};

void poisson_table(double photons, PoissonTable* table, Poisson* store, uint16_t* guide) {
  for (int count = 0; count < 1024; ++count) {
    const double v = count / photons * 255.0;
    // count / photons is clipped at 1, scaled and truncated.
    table->level[count] = v >= 255.0 ? 255 : static_cast<uint8_t>(v);
  }
  for (int x = 0; x < 256; ++x) {
    const double mean = x / 255.0 * photons;
    table->offset[x] = static_cast<int32_t>(store->thresholds.size());
    table->first[x] = 0;
    int length = 0;
    double p = exp_det(-mean), cumulative = p;
    bool started = false;
    for (int k = 0; k < 1000; ++k) {
      if (cumulative > 0.5 / 4294967296.0) {
        if (!started) table->first[x] = k;
        started = true;
        const uint32_t t = fraction_32(cumulative);
        if (t == 4294967295u) break;  // no word may reach past the last count
        store->thresholds.push_back(t);
        ++length;
      }
      p *= mean / (k + 1);
      cumulative += p;
    }
    table->length[x] = length;
    const uint32_t* steps = store->thresholds.data() + table->offset[x];
    int k = 0;
    for (int top = 0; top < 256; ++top) {
      while (k < length && steps[k] <= static_cast<uint32_t>(top) << 24) ++k;
      guide[(x << 8) | top] = static_cast<uint16_t>(k);
    }
  }
}

// Annex K of ITU-T T.81, natural order.
constexpr uint8_t kLuma[64] = {16, 11, 10, 16, 24,  40,  51,  61,  12, 12, 14, 19, 26,  58,  60,  55,
                               14, 13, 16, 24, 40,  57,  69,  56,  14, 17, 22, 29, 51,  87,  80,  62,
                               18, 22, 37, 56, 68,  109, 103, 77,  24, 35, 55, 64, 81,  104, 113, 92,
                               49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99};
constexpr uint8_t kChroma[64] = {17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
                                 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
                                 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
                                 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99};

QuantTable quant_table(int quality) {
  QuantTable q = {};
  const int scale = quality < 50 ? 5000 / quality : 200 - 2 * quality;
  for (int i = 0; i < 64; ++i) {
    const int luma = (kLuma[i] * scale + 50) / 100, chroma = (kChroma[i] * scale + 50) / 100;
    q.step[0][i] = luma < 1 ? 1 : luma > 255 ? 255 : luma;
    q.step[1][i] = chroma < 1 ? 1 : chroma > 255 ? 255 : chroma;
  }
  return q;
}

struct Built {
  Tables tables = {};
  Poisson poisson;

  Built() {
    for (int set = 0; set < kConstantSets; ++set) {
      for (const KindConstants& k : kConstantTable[set]) {
        for (int i = 0; i < 5; ++i) tables.constants[set][k.kind][i] = k.severity[i];
      }
    }
    poisson.guide.resize(static_cast<size_t>(kConstantSets) * 5 << 16);
    for (int i = 0; i < 5; ++i) tables.elastic_bethge_alpha[i] = kElasticBethgeAlpha[i];
    for (int set = 0; set < kConstantSets; ++set) {
      for (int i = 0; i < 5; ++i) {
        const auto& c = tables.constants[set];
        tables.gaussian[set][i] = gaussian_taps(c[kGaussianBlur][i].v[0], 4.0);
        tables.glass[set][i] = gaussian_taps(c[kGlassBlur][i].v[0], 4.0);
        tables.spatter_layer[set][i] = smooth_taps(c[kSpatter][i].v[2]);
        tables.spatter_mud[set][i] = smooth_taps(c[kSpatter][i].v[4]);
        tables.motion[set][i] = motion_taps(c[kMotionBlur][i].v[0], c[kMotionBlur][i].v[1]);
        tables.snow[set][i] = motion_taps(c[kSnow][i].v[4], c[kSnow][i].v[5]);
        tables.zoom[set][i] = zoom_factors(c[kZoomBlur][i].v[0], static_cast<int>(c[kZoomBlur][i].v[1]));
        tables.disk[set][i] = disk_kernel(c[kDefocusBlur][i].v[0], c[kDefocusBlur][i].v[1]);
        poisson_table(c[kShotNoise][i].v[0], &tables.poisson[set][i], &poisson,
                      poisson.guide.data() + (static_cast<size_t>(set * 5 + i) << 16));
      }
    }
    for (int quality = 1; quality <= 100; ++quality) tables.quant[quality] = quant_table(quality);
    tables.poisson_thresholds = poisson.thresholds.data();
    tables.poisson_guide = poisson.guide.data();
  }
};

Built& built() {
  static Built* const b = new Built;  // never freed: worker threads may outlive main
  return *b;
}

std::mutex frost_mutex;
std::atomic<bool> frost_set(false);

}  // namespace

const Tables& host_tables() { return built().tables; }

bool set_frost_textures(const Texture* textures) {
  std::lock_guard<std::mutex> lock(frost_mutex);
  if (frost_set) return false;
  for (int i = 0; i < kFrostVariants * 4; ++i) {
    const size_t bytes = size_t{3} * textures[i].height * textures[i].width;
    uint8_t* copy = new uint8_t[bytes];
    std::memcpy(copy, textures[i].rgb, bytes);
    built().tables.frost[i / 4][i % 4] = {copy, textures[i].height, textures[i].width};
  }
  frost_set = true;
  return true;
}

bool has_frost_textures() { return frost_set; }

TableExtents table_extents() { return {built().poisson.thresholds.size(), built().poisson.guide.size()}; }

}  // namespace vqsa

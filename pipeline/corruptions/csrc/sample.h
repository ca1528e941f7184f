// One image's work order, and the tables every stage may read. Plain data: the same structs are
// passed to CPU functions and, packed, as CUDA kernel parameters.
#pragma once
#include <cstddef>
#include <cstdint>

#include "constants.h"
#include "kinds.h"

namespace vqsa {

struct Sample {
  const uint8_t* in;      // height x width x 3, RGB
  uint8_t* out;           // the same size; never overlaps `in`
  uint32_t* fields;       // the draw's result, layout per kind (fields.h)
  const uint32_t* noise;  // raw noise to shape instead of Philox's, or null
  uint8_t* work;          // scratch: kAccWords zeroed words, then what plan() says
  uint64_t key;
  int32_t height, width;
  int16_t kind;
  uint8_t severity, set, flavour;
};

constexpr int64_t kMaxPixels = int64_t{1} << 24;  // of one image, so that sums fit in 32 bits

// Zeroed words at the start of a sample's scratch, for sums, extrema and histograms.
constexpr int kAccWords = 320;

struct GaussianTaps {
  int32_t radius;
  float w[64];  // w[0] is the centre, w[k] the weight at distance k
};

// The same in double precision, for sums that decide between grey levels.
constexpr int kSmoothRadius = 16;
struct SmoothTaps {
  int32_t radius;
  double w[kSmoothRadius + 1];
};

// A rim tap stands for four mirrored ones; where they coincide the weight is divided.
struct RimTap {
  int32_t dy, dx;
  float weight;
};

struct DiskKernel {
  int32_t radius;     // the support is (2 * radius + 1) squared
  int32_t rim_taps;
  float plateau;      // weight of |dx| <= inner[|dy|]
  int32_t inner[11];  // -1: the row has no plateau
  RimTap rim[121];
};

constexpr int kMotionTaps = 41;
struct MotionTaps {
  int32_t count;
  float w[kMotionTaps];
};

constexpr int kZoomLayers = 26;
struct ZoomFactors {
  int32_t count;
  double factor[kZoomLayers];
};

struct PoissonTable {
  int32_t first[256];    // smallest count with a threshold, per pixel value
  int32_t length[256];   // thresholds per pixel value
  int32_t offset[256];   // of the value's thresholds in Tables::poisson_thresholds
  uint8_t level[1024];   // count -> output level
};

struct QuantTable {
  // Divisors and multipliers of luma [0] and chroma [1], natural order.
  int32_t step[2][64];
};

// The textures as stored (hendrycks at 224 px), enlarged by 1.1 (bethge), and reduced to 0.3 and 0.2
// (hendrycks at 64 and 32 px).
enum FrostVariant : int32_t { kFrostRaw = 0, kFrostEnlarged, kFrostTiny, kFrostCifar, kFrostVariants };

struct Texture {
  const uint8_t* rgb;
  int32_t height, width;
};

struct Tables {
  Constants constants[kConstantSets][20][5];
  double elastic_bethge_alpha[5];
  GaussianTaps gaussian[kConstantSets][5];     // gaussian_blur
  GaussianTaps glass[kConstantSets][5];
  SmoothTaps spatter_layer[kConstantSets][5];
  SmoothTaps spatter_mud[kConstantSets][5];
  DiskKernel disk[kConstantSets][5];
  MotionTaps motion[kConstantSets][5];
  MotionTaps snow[kConstantSets][5];
  ZoomFactors zoom[kConstantSets][5];
  PoissonTable poisson[kConstantSets][5];
  const uint32_t* poisson_thresholds;          // count k when the word is >= k thresholds
  const uint16_t* poisson_guide;               // [set][severity][value][word >> 24] -> lower bound, less `first`
  QuantTable quant[101];                       // by quality
  Texture frost[kFrostVariants][4];            // null until vqsa_set_frost_textures
};

}  // namespace vqsa

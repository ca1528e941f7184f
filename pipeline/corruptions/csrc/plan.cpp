#include "plan.h"

#include <algorithm>

#include "stages.h"
#include "tables.h"

namespace vqsa {
namespace {

void add(std::vector<Step>& steps, int stage, int iterations = 1) {
  for (int i = 0; i < iterations; ++i) steps.push_back({stage, i});
}

int64_t fog_side(int height, int width) {
  Sample s = {};
  s.height = height;
  s.width = width;
  return generic::fog_side(s);
}

// Kinds whose field is one word per pixel value.
struct NoiseStages {
  int fused, draw, apply;
};
bool noise_stages(int kind, NoiseStages* out) {
  switch (kind) {
    case kGaussianNoise: *out = {kStageGaussianFused, kStageNormalDraw, kStageGaussianApply}; return true;
    case kShotNoise: *out = {kStageShotFused, kStageUniformDraw, kStageShotApply}; return true;
    case kImpulseNoise: *out = {kStageImpulseFused, kStageUniformDraw, kStageImpulseApply}; return true;
    case kSpeckleNoise: *out = {kStageSpeckleFused, kStageNormalDraw, kStageSpeckleApply}; return true;
    default: return false;
  }
}

}  // namespace

bool kind_available(int kind) { return !plan_steps(kind, kFused, 224, 224).empty(); }

std::vector<Step> plan_steps(int kind, Mode mode, int height, int width) {
  std::vector<Step> steps;
  NoiseStages noise;
  if (noise_stages(kind, &noise)) {
    add(steps, mode == kFused ? noise.fused : mode == kDraw ? noise.draw : noise.apply);
    return steps;
  }
  const bool draw = mode != kApply, apply = mode != kDraw;
  switch (kind) {
    case kIdentity:
      if (apply) add(steps, kStageCopy);
      break;
    case kBrightness:
      if (apply) add(steps, kStageBrightness);
      break;
    case kSaturate:
      if (apply) add(steps, kStageSaturate);
      break;
    case kContrast:
      if (apply) {
        add(steps, kStageClear);
        add(steps, kStageContrastSum);
        add(steps, kStageContrastApply);
      }
      break;
    case kGaussianBlur:
      if (apply) add(steps, kStageGaussianBlur);
      break;
    case kGlassBlur:
      if (draw) add(steps, kStageGlassDraw, 3);
      if (apply) {
        add(steps, kStageGlassBlurIn);
        add(steps, kStageGlassShuffle, 3);
        add(steps, kStageGlassBlurOut);
      }
      break;
    case kDefocusBlur:
      if (apply) add(steps, kStageDefocus);
      break;
    case kPixelate:
      if (apply) {
        add(steps, kStagePixelateMap);
        add(steps, kStagePixelateAcross);
        add(steps, kStagePixelateDown);
        add(steps, kStagePixelateUp);
      }
      break;
    case kJpegCompression:
    case kJpegQuality:
      if (apply) {
        add(steps, kStageJpegBlocks);
        add(steps, kStageJpegColours);
      }
      break;
    case kMotionBlur:
      if (draw) add(steps, kStageMotionDraw);
      if (apply) add(steps, kStageMotionApply);
      break;
    case kZoomBlur:
      if (apply) add(steps, kStageZoomBlur);
      break;
    case kSnow:
      if (draw) {
        add(steps, kStageSnowNormals);
        add(steps, kStageSnowZoom);
        add(steps, kStageSnowLayer);
      }
      if (apply) add(steps, kStageSnowApply);
      break;
    case kFrost:
      if (draw) add(steps, kStageFrostDraw);
      if (apply) add(steps, kStageFrostApply);
      break;
    case kFog:
      add(steps, kStageClear);
      if (draw) {
        int levels = 0;
        while ((generic::kFogCoarse << levels) < (height > width ? height : width)) ++levels;
        add(steps, kStageFogCoarse);
        add(steps, kStageFogRefine, levels);
        add(steps, kStageFogRange);
        add(steps, kStageFogField);
      }
      if (apply) {
        add(steps, kStageFogBrightest);
        add(steps, kStageFogApply);
      }
      break;
    case kElasticTransform:
      if (draw) {
        add(steps, kStageElasticNoise);
        add(steps, kStageElasticFilter);
        add(steps, kStageElasticDown);
        add(steps, kStageElasticAcross);
        add(steps, kStageElasticPoints);
      }
      if (apply) {
        add(steps, kStageElasticWarp);
        add(steps, kStageElasticSample);
      }
      break;
    case kSpatter:
      if (draw) {
        // Water and mud take turns by severity: the other's stages return at once.
        for (const int stage : {kStageClear, kStageSnowNormals, kStageSpatterLayer, kStageSpatterMud, kStageSpatterSobel,
                                kStageSpatterThin, kStageSpatterLink, kStageSpatterAcross, kStageSpatterDistance,
                                kStageSpatterSmooth, kStageSpatterRelief, kStageSpatterWater, kStageSpatterScale}) {
          add(steps, stage);
        }
      }
      if (apply) add(steps, kStageSpatterApply);
      break;
    default:
      break;
  }
  return steps;
}

int64_t field_words(int kind, int severity, int set, int flavour, int height, int width) {
  (void)flavour;
  NoiseStages noise;
  const int64_t pixels = int64_t{height} * width;
  if (noise_stages(kind, &noise)) return 3 * pixels;
  switch (kind) {
    case kGlassBlur:
      return pixels * static_cast<int64_t>(host_tables().constants[set][kind][severity - 1].v[2]);
    case kMotionBlur:
      return 1;
    case kSnow:
      return (pixels + 3) / 4;
    case kFrost:
      return 3;
    case kFog:
    case kSpatter:
      return pixels;
    case kElasticTransform:
      return 2 * pixels + 6;
    default:
      return 0;
  }
}

int64_t noise_words(int kind, int, int, int, int height, int width) {
  const int64_t pixels = int64_t{height} * width;
  switch (kind) {
    case kSpatter:
      return pixels;
    case kSnow:
      return pixels + 1;
    case kFog: {
      const int64_t side = fog_side(height, width);
      return side * side - 1;
    }
    case kElasticTransform:
      return 2 * pixels + 6;
    default:
      return 0;
  }
}

int64_t scratch_bytes(int kind, int, int, int, int height, int width) {
  const int64_t pixels = int64_t{height} * width;
  switch (kind) {
    case kGlassBlur:
      return 2 * 3 * pixels;
    case kPixelate:
      return 2 * 3 * pixels + 4 * (4 * (int64_t{height} + width) + 1);
    case kSnow:  // the enlargement overshoots by up to 5 rows and columns
      return 4 * (pixels + int64_t{height + 5} * (width + 5));
    case kSpatter:
      return (4 + 2 * 2 + 5) * pixels;
    case kFog: {
      const int64_t side = fog_side(height, width);
      return 2 * 4 * side * side;
    }
    case kElasticTransform:
      return 4 * (4 * pixels + std::max<int64_t>(4 * height, generic::kElasticTaps) +
                  std::max<int64_t>(4 * width, generic::kElasticTaps) + 3 * pixels);
    case kJpegCompression:
    case kJpegQuality:
      // Each chroma row has a value more at either end.
      return int64_t{(height + 15) / 16 * 16} * ((width + 15) / 16 * 16) * 3 / 2 + 2 * ((height + 15) / 16 * 16);
    default:
      return 0;
  }
}

bool fused_needs_fields(int kind) {
  NoiseStages noise;
  return !noise_stages(kind, &noise) && field_words(kind, 1, 0, 0, 224, 224) > 0;
}

}  // namespace vqsa

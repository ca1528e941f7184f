#include "plan.h"

#include "stages.h"

namespace vqsa {
namespace {

void add(std::vector<Step>& steps, int stage, int iterations = 1) {
  for (int i = 0; i < iterations; ++i) steps.push_back({stage, i});
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
  (void)draw;
  (void)height;
  (void)width;
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
    default:
      break;
  }
  return steps;
}

int64_t field_words(int kind, int severity, int set, int flavour, int height, int width) {
  (void)severity;
  (void)set;
  (void)flavour;
  NoiseStages noise;
  if (noise_stages(kind, &noise)) return int64_t{3} * height * width;
  return 0;
}

int64_t noise_words(int, int, int, int, int, int) { return 0; }

int64_t scratch_bytes(int, int, int, int, int, int) { return 0; }

bool fused_needs_fields(int kind) {
  NoiseStages noise;
  return !noise_stages(kind, &noise) && field_words(kind, 1, 0, 0, 224, 224) > 0;
}

}  // namespace vqsa

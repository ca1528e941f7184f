// The kinds of corruption, the constant sets and the flavours, by number. The numbers are part of
// the C interface and of the Python front's KINDS.
#pragma once
#include <cstdint>

namespace vqsa {

enum Kind : int32_t {
  kIdentity = 0,
  kGaussianNoise,
  kShotNoise,
  kImpulseNoise,
  kDefocusBlur,
  kGlassBlur,
  kMotionBlur,
  kZoomBlur,
  kSnow,
  kFrost,
  kFog,
  kBrightness,
  kContrast,
  kElasticTransform,
  kPixelate,
  kJpegCompression,
  kSpeckleNoise,
  kGaussianBlur,
  kSpatter,
  kSaturate,
  kKinds,
  // The severity is the JPEG quality 1..100: the pass that ImageNet-C's files went through.
  kJpegQuality = 100,
};

enum ConstantSet : int32_t { kImageNet = 0, kTinyImageNet = 1, kCifar10 = 2, kConstantSets = 3 };
enum Flavour : int32_t { kHendrycks = 0, kBethge = 1 };
enum Mode : int32_t { kFused = 0, kDraw = 1, kApply = 2 };

}  // namespace vqsa

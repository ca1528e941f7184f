// The list of all stages. A stage is a struct with
//   tiles(sample, shape)         how many blocks it takes
//   shared_bytes(sample, shape)  memory that the threads of a block share
//   run(block, sample, tile, iteration)
#pragma once
#include "stage_colour.h"
#include "stage_defocus.h"
#include "stage_elastic.h"
#include "stage_fog.h"
#include "stage_frost.h"
#include "stage_gaussian.h"
#include "stage_jpeg.h"
#include "stage_motion.h"
#include "stage_noise.h"
#include "stage_pixelate.h"
#include "stage_snow.h"
#include "stage_spatter.h"
#include "stage_spatter_water.h"
#include "stage_zoom.h"

#define VQSA_STAGES(X)                              \
  X(kStageCopy, Copy)                               \
  X(kStageClear, Clear)                             \
  X(kStageGaussianFused, NoiseFused<GaussianLaw>)   \
  X(kStageShotFused, NoiseFused<ShotLaw>)           \
  X(kStageImpulseFused, NoiseFused<ImpulseLaw>)     \
  X(kStageSpeckleFused, NoiseFused<SpeckleLaw>)     \
  X(kStageNormalDraw, NoiseDraw<GaussianLaw>)       \
  X(kStageUniformDraw, NoiseDraw<ShotLaw>)          \
  X(kStageGaussianApply, NoiseApply<GaussianLaw>)   \
  X(kStageShotApply, NoiseApply<ShotLaw>)           \
  X(kStageImpulseApply, NoiseApply<ImpulseLaw>)     \
  X(kStageSpeckleApply, NoiseApply<SpeckleLaw>)     \
  X(kStageBrightness, Brightness)                   \
  X(kStageContrastSum, ContrastSum)                 \
  X(kStageContrastApply, ContrastApply)             \
  X(kStageSaturate, Saturate)                       \
  X(kStageGaussianBlur, GaussianBlur)               \
  X(kStageGlassDraw, GlassDraw)                     \
  X(kStageGlassBlurIn, GlassBlurIn)                 \
  X(kStageGlassShuffle, GlassShuffle)               \
  X(kStageGlassBlurOut, GlassBlurOut)               \
  X(kStageDefocus, Defocus)                         \
  X(kStagePixelateMap, PixelateMap)                 \
  X(kStagePixelateAcross, PixelateAcross)           \
  X(kStagePixelateDown, PixelateDown)               \
  X(kStagePixelateUp, PixelateUp)                   \
  X(kStageJpegBlocks, JpegBlocks)                   \
  X(kStageJpegColours, JpegColours)                 \
  X(kStageMotionDraw, MotionDraw) \
  X(kStageMotionApply, MotionApply) \
  X(kStageZoomBlur, ZoomBlur) \
  X(kStageSnowNormals, SnowNormals) \
  X(kStageSnowZoom, SnowZoom) \
  X(kStageSnowLayer, SnowLayer) \
  X(kStageSnowApply, SnowApply) \
  X(kStageFrostDraw, FrostDraw) \
  X(kStageFrostApply, FrostApply) \
  X(kStageFogCoarse, FogCoarse) \
  X(kStageFogRefine, FogRefine) \
  X(kStageFogRange, FogRange) \
  X(kStageFogField, FogField) \
  X(kStageFogBrightest, FogBrightest) \
  X(kStageFogApply, FogApply) \
  X(kStageElasticNoise, ElasticNoise) \
  X(kStageElasticFilter, ElasticFilter) \
  X(kStageElasticDown, ElasticDown) \
  X(kStageElasticAcross, ElasticAcross) \
  X(kStageElasticPoints, ElasticPoints) \
  X(kStageElasticWarp, ElasticWarp) \
  X(kStageElasticSample, ElasticSample)             \
  X(kStageSpatterLayer, SpatterLayer) \
  X(kStageSpatterMud, SpatterMud) \
  X(kStageSpatterSobel, SpatterSobel) \
  X(kStageSpatterThin, SpatterThin) \
  X(kStageSpatterLink, SpatterLink) \
  X(kStageSpatterAcross, SpatterAcross) \
  X(kStageSpatterDistance, SpatterDistance) \
  X(kStageSpatterSmooth, SpatterSmooth) \
  X(kStageSpatterRelief, SpatterRelief) \
  X(kStageSpatterWater, SpatterWater) \
  X(kStageSpatterScale, SpatterScale) \
  X(kStageSpatterApply, SpatterApply)

namespace vqsa {

enum Stage : int32_t {
#define VQSA_NAME(name, type) name,
  VQSA_STAGES(VQSA_NAME)
#undef VQSA_NAME
      kStages
};

}  // namespace vqsa

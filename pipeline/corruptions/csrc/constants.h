// Every severity constant of ImageNet-C, Tiny-ImageNet-C and CIFAR-10-C, in one table.
// Source: hendrycks/robustness, make_imagenet_c.py, make_tinyimagenet_c.py, make_cifar_c.py
// (Apache-2.0), and, for the bethge flavour, PyPI imagecorruptions 1.1.2 (Apache-2.0).
#pragma once
#include "kinds.h"

namespace vqsa {

struct Constants {
  double v[7];
};

struct KindConstants {
  Kind kind;
  Constants severity[5];
};

// clang-format off
constexpr KindConstants kConstantTable[kConstantSets][19] = {
  {  // ImageNet-C, 224 px
    {kGaussianNoise,   {{.08}, {.12}, {.18}, {.26}, {.38}}},                    // sigma
    {kShotNoise,       {{60}, {25}, {12}, {5}, {3}}},                                // photons at white
    {kImpulseNoise,    {{.03}, {.06}, {.09}, {.17}, {.27}}},                    // probability
    {kDefocusBlur,     {{3, .1}, {4, .5}, {6, .5}, {8, .5}, {10, .5}}},         // radius, alias sigma
    {kGlassBlur,       {{.7, 1, 2}, {.9, 2, 1}, {1, 2, 3}, {1.1, 3, 2}, {1.5, 4, 2}}},  // sigma, reach, iterations
    {kMotionBlur,      {{10, 3}, {15, 5}, {15, 8}, {15, 12}, {20, 15}}},             // radius, sigma
    {kZoomBlur,        {{.01, 12}, {.01, 16}, {.02, 11}, {.02, 13}, {.03, 11}}},  // step, layers
    {kSnow,            {{.1, .3, 3, .5, 10, 4, .8}, {.2, .3, 2, .5, 12, 4, .7}, {.55, .3, 4, .9, 12, 8, .7},
                        {.55, .3, 4.5, .85, 12, 8, .65}, {.55, .3, 2.5, .85, 12, 12, .55}}},  // mean, sd, zoom, threshold, radius, sigma, mix
    {kFrost,           {{1, .4}, {.8, .6}, {.7, .7}, {.65, .7}, {.6, .75}}},  // image, texture
    {kFog,             {{1.5, 2}, {2, 2}, {2.5, 1.7}, {2.5, 1.5}, {3, 1.4}}},  // strength, decay
    {kBrightness,      {{.1}, {.2}, {.3}, {.4}, {.5}}},                         // added to HSV value
    {kContrast,        {{.4}, {.3}, {.2}, {.1}, {.05}}},                        // factor
    {kElasticTransform, {{488, 170.8, 24.4}, {488, 19.52, 48.8}, {12.2, 2.44, 4.88}, {17.08, 2.44, 4.88}, {29.28, 2.44, 4.88}}},  // alpha, sigma, affine
    {kPixelate,        {{.6}, {.5}, {.4}, {.3}, {.25}}},                        // size factor
    {kJpegCompression, {{25}, {18}, {15}, {10}, {7}}},                               // quality
    {kSpeckleNoise,    {{.15}, {.2}, {.35}, {.45}, {.6}}},                      // sigma
    {kGaussianBlur,    {{1}, {2}, {3}, {4}, {6}}},                                   // sigma
    {kSpatter,         {{.65, .3, 4, .69, .6, 0}, {.65, .3, 3, .68, .6, 0}, {.65, .3, 2, .68, .5, 0},
                        {.65, .3, 1, .65, 1.5, 1}, {.67, .4, 1, .65, 1.5, 1}}},  // mean, sd, sigma, threshold, strength or mud sigma, mud
    {kSaturate,        {{.3, 0}, {.1, 0}, {2, 0}, {5, .1}, {20, .2}}},           // factor, offset
  },
  {  // Tiny-ImageNet-C, 64 px
    {kGaussianNoise,   {{.04}, {.08}, {.12}, {.15}, {.18}}},
    {kShotNoise,       {{250}, {100}, {50}, {30}, {15}}},
    {kImpulseNoise,    {{.01}, {.02}, {.05}, {.08}, {.14}}},
    {kDefocusBlur,     {{.5, .6}, {1, .1}, {1.5, .1}, {2.5, .01}, {3, .1}}},
    {kGlassBlur,       {{.1, 1, 1}, {.5, 1, 1}, {.6, 1, 2}, {.7, 2, 1}, {.9, 2, 2}}},
    {kMotionBlur,      {{10, 1}, {10, 1.5}, {10, 2}, {10, 2.5}, {12, 3}}},
    {kZoomBlur,        {{.01, 7}, {.01, 12}, {.01, 16}, {.01, 21}, {.01, 26}}},
    {kSnow,            {{.1, .2, 1, .6, 8, 3, .8}, {.1, .2, 1, .5, 10, 4, .8}, {.15, .3, 1.75, .55, 10, 4, .7},
                        {.25, .3, 2.25, .6, 12, 6, .65}, {.3, .3, 1.25, .65, 14, 12, .6}}},
    {kFrost,           {{1, .3}, {.9, .4}, {.8, .45}, {.75, .5}, {.7, .55}}},
    {kFog,             {{.4, 3}, {.7, 3}, {1, 2.5}, {1.5, 2}, {2, 1.75}}},
    {kBrightness,      {{.1}, {.2}, {.3}, {.4}, {.5}}},
    {kContrast,        {{.4}, {.3}, {.2}, {.1}, {.05}}},
    {kElasticTransform, {{0, 0, 5.12}, {3.2, 19.2, 3.84}, {6.4, 5.12, 3.84}, {6.4, 1.92, 1.92}, {10.24, 1.92, 1.28}}},
    {kPixelate,        {{.9}, {.8}, {.7}, {.6}, {.5}}},
    {kJpegCompression, {{65}, {58}, {50}, {40}, {25}}},
    {kSpeckleNoise,    {{.15}, {.2}, {.25}, {.3}, {.35}}},
    {kGaussianBlur,    {{.5}, {.75}, {1}, {1.25}, {1.5}}},
    {kSpatter,         {{.62, .1, .7, .7, .6, 0}, {.65, .1, .8, .7, .6, 0}, {.65, .3, 1, .69, .6, 0},
                        {.65, .1, .7, .68, .6, 1}, {.65, .1, .5, .67, .6, 1}}},
    {kSaturate,        {{.3, 0}, {.1, 0}, {2, 0}, {5, .1}, {30, .2}}},
  },
  {  // CIFAR-10-C, 32 px
    {kGaussianNoise,   {{.04}, {.06}, {.08}, {.09}, {.10}}},
    {kShotNoise,       {{500}, {250}, {100}, {75}, {50}}},
    {kImpulseNoise,    {{.01}, {.02}, {.03}, {.05}, {.07}}},
    {kDefocusBlur,     {{.3, .4}, {.4, .5}, {.5, .6}, {1, .2}, {1.5, .1}}},
    {kGlassBlur,       {{.05, 1, 1}, {.25, 1, 1}, {.4, 1, 1}, {.25, 1, 2}, {.4, 1, 2}}},
    {kMotionBlur,      {{6, 1}, {6, 1.5}, {6, 2}, {8, 2}, {9, 2.5}}},
    {kZoomBlur,        {{.01, 7}, {.01, 12}, {.01, 16}, {.01, 21}, {.01, 26}}},
    {kSnow,            {{.1, .2, 1, .6, 8, 3, .95}, {.1, .2, 1, .5, 10, 4, .9}, {.15, .3, 1.75, .55, 10, 4, .9},
                        {.25, .3, 2.25, .6, 12, 6, .85}, {.3, .3, 1.25, .65, 14, 12, .8}}},
    {kFrost,           {{1, .2}, {1, .3}, {.9, .4}, {.85, .4}, {.75, .45}}},
    {kFog,             {{.2, 3}, {.5, 3}, {.75, 2.5}, {1, 2}, {1.5, 1.75}}},
    {kBrightness,      {{.05}, {.1}, {.15}, {.2}, {.3}}},
    {kContrast,        {{.75}, {.5}, {.4}, {.3}, {.15}}},
    {kElasticTransform, {{0, 0, 2.56}, {1.6, 6.4, 2.24}, {2.56, 1.92, 1.92}, {3.2, 1.28, 1.6}, {3.2, .96, .96}}},
    {kPixelate,        {{.95}, {.9}, {.85}, {.75}, {.65}}},
    {kJpegCompression, {{80}, {65}, {58}, {50}, {40}}},
    {kSpeckleNoise,    {{.06}, {.1}, {.12}, {.16}, {.2}}},
    {kGaussianBlur,    {{.4}, {.6}, {.7}, {.8}, {1}}},
    {kSpatter,         {{.62, .1, .7, .7, .5, 0}, {.65, .1, .8, .7, .5, 0}, {.65, .3, 1, .69, .5, 0},
                        {.65, .1, .7, .69, .6, 1}, {.65, .1, .5, .68, .6, 1}}},
    {kSaturate,        {{.3, 0}, {.1, 0}, {1.5, 0}, {2, .1}, {2.5, .2}}},
  },
};
// clang-format on

// Elastic transform as imagecorruptions defines it: alpha; the smoothing is 1 % of each side and
// the amplitude 0.5 % of the height, whatever the constant set.
constexpr double kElasticBethgeAlpha[5] = {12.5, 16.25, 21.25, 25.0, 30.0};

}  // namespace vqsa

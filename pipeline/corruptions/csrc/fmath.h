// Elementary functions built from +, -, *, / and sqrt only, so that every compiler level, every
// vector width and CUDA (with --fmad=false) give the same bits. libm promises no such thing.
// Minimax coefficients as in the Cephes library's logf, sinf and cosf.
#pragma once
#include <cmath>
#include <cstring>

#include "platform.h"

namespace vqsa {
namespace VQSA_ISA {

VQSA_HD int32_t bits_of(float v) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(v);
#else
  int32_t b;
  __builtin_memcpy(&b, &v, 4);
  return b;
#endif
}
VQSA_HD float float_of(int32_t b) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(b);
#else
  float v;
  __builtin_memcpy(&v, &b, 4);
  return v;
#endif
}

// Natural logarithm of a normal positive number; error below 2 ulp.
VQSA_HD float log_det(float x) {
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const int32_t b = bits_of(x);
  const int32_t shifted = b - 0x3F3504F3;
  const int32_t e = shifted >> 23;
  const float m = float_of(b - e * (1 << 23)) - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z;
  const float ef = static_cast<float>(e);
  p = p + ef * -2.12194440e-4f;
  p = p - 0.5f * z;
  return (m + p) + ef * 0.693359375f;
}

// sin and cos of 2*pi*w / 2^32: the reduction is exact because the angle comes as an integer.
VQSA_HD void sincos_turn(uint32_t w, float& s, float& c) {
  const uint32_t quadrant = (w + 0x20000000u) >> 30;
  const int32_t offset = static_cast<int32_t>(w - (quadrant << 30));  // in [-2^29, 2^29)
  const float a = static_cast<float>(offset >> 6) * (1.57079632679489662f / 16777216.0f);  // within pi/4
  const float z = a * a;
  const float sp = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * a + a;
  const float cp =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  const bool swap = (quadrant & 1u) != 0;
  const float s0 = swap ? cp : sp;
  const float c0 = swap ? sp : cp;
  s = (quadrant & 2u) != 0 ? -s0 : s0;
  c = ((quadrant + 1u) & 2u) != 0 ? -c0 : c0;
}

// In [0, 1), 24 bits.
VQSA_HD float unit_float(uint32_t w) { return static_cast<float>(static_cast<int32_t>(w >> 8)) * 0x1p-24f; }

// Two standard normals from two words (Box-Muller); |n| < 5.9.
VQSA_HD void normal_pair(uint32_t w0, uint32_t w1, float& n0, float& n1) {
  const float u = (static_cast<float>(static_cast<int32_t>(w0 >> 8)) + 0.5f) * 0x1p-24f;
#if defined(__CUDA_ARCH__)
  const float r = sqrtf(-2.0f * log_det(u));
#else
  const float r = __builtin_sqrtf(-2.0f * log_det(u));
#endif
  float s, c;
  sincos_turn(w1, s, c);
  n0 = r * c;
  n1 = r * s;
}

// exp for arguments <= 0, double; relative error about 1e-15. Used for filter taps and tables.
VQSA_HD double exp_det(double x) {
  if (x < -700.0) return 0.0;
  const double kLog2e = 1.4426950408889634, kLn2Hi = 0.693147180369123816490, kLn2Lo = 1.90821492927058770002e-10;
  const int n = static_cast<int>(x * kLog2e - 0.5);
  const double r = (x - n * kLn2Hi) - n * kLn2Lo;
  double sum = 1.0;
  for (int k = 18; k >= 1; --k) sum = 1.0 + sum * r / k;
  double scale = 1.0;
  for (int k = 0; k < -n; ++k) scale *= 0.5;
  return sum * scale;
}

// sin and cos for |x| <= pi, double; error about 1e-15.
VQSA_HD void sincos_det(double x, double& s, double& c) {
  const double h = x * 0.125;
  const double z = h * h;
  double sp = 1.0, cp = 1.0;
  for (int k = 19; k >= 3; k -= 2) sp = 1.0 - sp * z / (k * (k - 1));
  for (int k = 18; k >= 2; k -= 2) cp = 1.0 - cp * z / (k * (k - 1));
  s = sp * h;
  c = cp;
  for (int k = 0; k < 3; ++k) {  // double angle, three times
    const double s2 = 2.0 * s * c;
    c = 1.0 - 2.0 * s * s;
    s = s2;
  }
}

}  // namespace VQSA_ISA
}  // namespace vqsa

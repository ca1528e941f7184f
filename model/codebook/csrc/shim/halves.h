// float16 on a CPU, and sums that are cut off as a tensor core cuts them off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace shim {

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  float value;
  if (exponent == 0) {
    value = std::ldexp(float(fraction), -24);
  } else {
    const uint32_t word = exponent == 31 ? 0x7F800000u | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
    std::memcpy(&value, &word, 4);
  }
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word |= sign;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint16_t sign = uint16_t(word >> 16 & 0x8000);
  word &= 0x7FFFFFFF;
  if (word >= 0x7F800000) return uint16_t(sign | (word > 0x7F800000 ? 0x7E00 : 0x7C00));
  if (word >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65520 and more round to infinity
  if (word < 0x38800000) {                                 // below the normal range
    float magnitude;
    std::memcpy(&magnitude, &word, 4);
    return uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(magnitude, 24))));
  }
  word += 0xFFF + (word >> 13 & 1);
  return uint16_t(sign | ((word - 0x38000000) >> 13));
}

inline const float* half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (int i = 0; i < 65536; ++i) t[i] = half_to_float(uint16_t(i));
    return t;
  }();
  return table.data();
}

/// The float nearest to `value` on the side of zero.
inline float towards_zero(double value) {
  float rounded = float(value);
  if (std::fabs(double(rounded)) > std::fabs(value)) rounded = std::nextafter(rounded, 0.0f);
  return rounded;
}

}  // namespace shim

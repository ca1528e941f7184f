// Stage `prepare`: centre, scale and round rows to float16, and keep the exact norms of what was lost.
#pragma once

#include "fold.h"

namespace vqsa::codebook {

constexpr int kCentreChunks = 64;
constexpr double kUpwards = 1.0 + 0x1p-20;  // more than the rounding to float32 and of the float32 formulas takes

/// The least float32 that is surely not below `bound`, but for underflow (which kTiny of sweep.h covers).
VQ_DEVICE float upper(double bound) { return static_cast<float>(bound * kUpwards); }

/// Relative error that a tensor core may make in a dot product of `dim` products that are exact in float32.
///
/// Blocks of b >= 4 products are aligned with the sum so far to the largest exponent, cut off at 24 bits or
/// more, added, and cut off again: at most (b + 2) · 2^-23 · Σ|products| per block, thus 1.5 · dim · 2^-23 in
/// all for b = 4 and less for larger b. By Cauchy and Schwarz Σ|products| <= ‖ẑ‖‖ê‖. The 64 cover the float32
/// steps after it.
VQ_DEVICE double accumulation_rate(int dim) { return (1.5 * dim + 64.0) * 0x1p-23; }

/// Part of a squared distance that its float64 sum may be off by.
VQ_DEVICE double fold_rate(int dim) {
  int levels = 3;
  for (int width = dim; width > 0; width /= 2) ++levels;
  return 1.01 * levels * 0x1p-53;
}

/// Position of the leading bit of a positive finite number.
VQ_DEVICE int leading_bit(double positive) { return ilogb(positive); }

struct ShadowSums {
  double norm, kept, lost;  // ‖x‖, ‖ĥ‖ and ‖x − ĥ‖, times 2^exponent
};

/// Writes row(j) · 2^exponent as halves; numbers below float16's normal range become zero on every device.
template <class Row>
VQ_DEVICE ShadowSums write_shadow(uint16_t* shadow, int pitch, int dim, const Row& row, int exponent, double* scratch) {
  const double scale = ldexp(1.0, exponent);
  double norm = 0, kept = 0, lost = 0;
  for (int j = thread_index(); j < pitch; j += thread_count()) {
    uint16_t bits = 0;
    if (j < dim) {
      const double exact = row(j) * scale;
      bits = float_to_half(static_cast<float>(exact));
      if ((bits & 0x7C00) == 0) bits = 0;
      const double half = half_to_float(bits);
      norm += exact * exact;
      kept += half * half;
      lost += (exact - half) * (exact - half);
    }
    shadow[j] = bits;
  }
  return {sqrt(block_reduce(norm, scratch, Add())), sqrt(block_reduce(kept, scratch, Add())),
          sqrt(block_reduce(lost, scratch, Add()))};
}

/// Folded norms of the codes, -1 for a zero code: dividing by it leaves zeros, and its sign says what they are.
VQ_KERNEL(kRowThreads) norm_codes(Rows codes, Prepared prepared) {
  const int64_t i = block_index();
  const WholeBlock group = {reinterpret_cast<double*>(shared_memory())};
  const double norm = sqrt(fold(group, [&](int j) { const double x = value(codes, i, j); return x * x; }, codes.dim));
  if (thread_index() == 0) prepared.norm[i] = norm == 0 ? -1.0 : norm;
}

/// Sums and the largest |value| of one column block and one chunk of codes; values that are not finite count as 0.
VQ_KERNEL(kRowThreads) sum_codes(Rows codes, const double* norm, double* sums, float* most) {
  const int column_blocks = (codes.dim + kRowThreads - 1) / kRowThreads;
  const int chunk = block_index() / column_blocks;
  const int column = block_index() % column_blocks * kRowThreads + thread_index();
  const int64_t first = codes.count * chunk / kCentreChunks, last = codes.count * (chunk + 1) / kCentreChunks;
  double sum = 0, largest = 0;
  if (column < codes.dim) {
#pragma unroll 4
    for (int64_t i = first; i < last; ++i) {
      double x = value(codes, i, column);
      if (norm != nullptr) x /= norm[i];
      if (!isfinite(x)) x = 0;
      sum += x;
      largest = fabs(x) > largest ? fabs(x) : largest;
    }
    sums[static_cast<int64_t>(chunk) * codes.dim + column] = sum;
  }
  largest = block_reduce(largest, reinterpret_cast<double*>(shared_memory()), Largest());
  if (thread_index() == 0) most[block_index()] = static_cast<float>(largest);
}

VQ_KERNEL(kRowThreads) centre_codes(Rows codes, Prepared prepared, const double* sums, const float* most) {
  const int column = block_index() * kRowThreads + thread_index();
  if (column < codes.dim) {
    double sum = 0;
    for (int chunk = 0; chunk < kCentreChunks; ++chunk) sum += sums[static_cast<int64_t>(chunk) * codes.dim + column];
    prepared.centre[column] = sum / static_cast<double>(codes.count);
  }
  if (block_index() == 0) {
    double largest = 0;
    for (int i = thread_index(); i < block_count() * kCentreChunks; i += kRowThreads)
      largest = most[i] > largest ? most[i] : largest;
    largest = block_reduce(largest, reinterpret_cast<double*>(shared_memory()), Largest());
    if (thread_index() == 0) *prepared.header = {largest == 0 ? 0 : -leading_bit(largest), 0, 0, 0};
  }
}

/// One block per code: its shadow and its constants. `chosen` names the codes to do again, or null for all anew.
VQ_KERNEL(kRowThreads) shadow_codes(Rows codes, Prepared prepared, bool cosine, const int64_t* chosen) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t i = chosen == nullptr ? block_index() : chosen[block_index()];
  if (i < 0 || i >= codes.count) return;
  if (cosine && chosen != nullptr) {
    const WholeBlock group = {scratch};
    const double norm = sqrt(fold(group, [&](int j) { const double x = value(codes, i, j); return x * x; }, codes.dim));
    block_sync();
    if (thread_index() == 0) prepared.norm[i] = norm == 0 ? -1.0 : norm;
    block_sync();
  }
  const double norm_or_one = cosine ? prepared.norm[i] : 1.0;
  // Dividing by one changes nothing, but float64 division is slow.
  auto vector = [&](int j) { const double x = value(codes, i, j); return cosine ? x / norm_or_one : x; };
  double bad = 0, any = 0, largest = 0;
  for (int j = thread_index(); j < codes.dim; j += thread_count()) {
    const double x = value(codes, i, j);
    if (!isfinite(x)) bad = 1;
    if (x != 0) any = 1;
    const double shifted = fabs(vector(j) - prepared.centre[j]);
    largest = shifted > largest ? shifted : largest;
  }
  const bool broken = block_reduce(bad, scratch, Largest()) > 0;
  const bool zero = block_reduce(any, scratch, Largest()) == 0;
  largest = block_reduce(largest, scratch, Largest());

  const int unit = prepared.header->exponent;
  int raise = 0;  // shadow = codebook units · 2^raise
  if (!broken && largest > 0) {
    raise = 14 - (leading_bit(largest) + unit);
    raise = raise > 114 ? 114 : raise;
  }
  auto row = [&](int j) { return broken ? 0.0 : vector(j) - prepared.centre[j]; };
  const ShadowSums sums =
      write_shadow(prepared.shadow + i * prepared.pitch, prepared.pitch, codes.dim, row, unit + raise, scratch);
  if (thread_index() != 0) return;
  const double unscale = ldexp(1.0, -raise), norm = sums.kept * unscale;
  const bool uncertain = raise < -6;  // values above 2^20 codebook units
  // |z/‖z‖ − 0|² is 1, but 2 − 2 cos to a zero code is 2.
  const double surcharge = cosine && zero ? ldexp(1.0, 2 * unit) : 0.0;
  Code code;
  code.half_square = uncertain ? 0.0f : static_cast<float>(0.5 * (sums.norm * unscale * sums.norm * unscale + surcharge));
  code.unscale = broken ? -1.0f : uncertain ? 0.0f : static_cast<float>(unscale);
  code.error = uncertain ? 0.0f : upper(sums.lost * unscale + 1.01 * accumulation_rate(codes.dim) * norm);
  code.norm = uncertain ? -1.0f : upper(norm);
  const bool was_broken = chosen != nullptr && prepared.codes[i].unscale < 0;
  const bool was_uncertain = chosen != nullptr && prepared.codes[i].norm < 0;
  if (broken != was_broken) atomic_add(&prepared.header->broken, broken ? 1 : -1);
  if (uncertain != was_uncertain) atomic_add(&prepared.header->uncertain, uncertain ? 1 : -1);
  prepared.codes[i] = code;
}

/// The whole block writes feature r's shadow and constants, and an empty list of candidates.
VQ_DEVICE void shadow_feature(const Rows& z, int64_t row_of_z, const Prepared& prepared, const Workspace& work, int r,
                              bool cosine) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  double norm = 1.0;
  if (cosine) {
    const WholeBlock group = {scratch};
    norm = sqrt(fold(group, [&](int j) { const double x = value(z, row_of_z, j); return x * x; }, z.dim));
    block_sync();
  }
  const bool zero = cosine && norm == 0;
  const double divisor = zero ? 1.0 : norm;
  auto vector = [&](int j) { const double x = value(z, row_of_z, j); return cosine ? x / divisor : x; };
  double bad = 0, largest = 0;
  for (int j = thread_index(); j < z.dim; j += thread_count()) {
    const double x = value(z, row_of_z, j);
    if (!isfinite(x)) bad = 1;
    const double shifted = fabs(vector(j) - prepared.centre[j]);
    largest = shifted > largest ? shifted : largest;
  }
  const bool broken = block_reduce(bad, scratch, Largest()) > 0;
  largest = block_reduce(largest, scratch, Largest());
  const bool settled = broken || zero;

  const int unit = prepared.header->exponent;
  int exponent = unit;
  if (!settled && largest > 0) {
    exponent = 14 - leading_bit(largest);
    exponent = exponent > unit + kMostLift ? unit + kMostLift : exponent;
  }
  auto row = [&](int j) { return settled ? 0.0 : vector(j) - prepared.centre[j]; };
  const ShadowSums sums =
      write_shadow(work.shadow + static_cast<int64_t>(r) * prepared.pitch, prepared.pitch, z.dim, row, exponent, scratch);
  if (thread_index() != 0) return;
  Feature feature = {0, 0, 0, 0};
  if (!settled) {
    const int lift = exponent - unit;  // codebook units to units of this feature
    double slack = fold_rate(z.dim) * sums.norm * sums.norm * ldexp(1.0, -lift);
    // Dividing by the norms rounds each number: ‖z − e‖ may be off by 2^-51 of the unit vectors' length.
    if (cosine) slack += 0x1p-49 * (ldexp(sums.norm, unit) + ldexp(2.0, exponent + unit));
    feature.weight = lift < -120 ? 0.0f : static_cast<float>(ldexp(1.0, lift));
    feature.norm = upper(sums.norm);
    feature.residual = upper(sums.lost);
    feature.slack = lift < -120 || slack > 1e38 ? bits_float(0x7F800000u) : upper(slack);
  }
  work.features[r] = feature;
  if (cosine) work.norm[r] = divisor;
  work.kind[r] = broken ? kBroken : zero ? kZero : kNormal;
  work.limit[r] = ordered(bits_float(settled ? 0xFF800000u : 0x7F800000u));
  work.count[r] = 0;
  work.overflow[r] = 0;
  if (r == 0) *work.overflow_total = *work.stalled = 0;
}

/// One block per feature.
VQ_KERNEL(kRowThreads) shadow_features(Rows z, int64_t first, Prepared prepared, Workspace work, bool cosine) {
  shadow_feature(z, first + block_index(), prepared, work, block_index(), cosine);
}

}  // namespace vqsa::codebook

// Stage `prepare`: centre, scale and round rows to float16, and keep the exact norms of what was lost.
#pragma once

#include "fold.h"

namespace vqsa::codebook {

constexpr int kCentreChunks = 128;
constexpr int kColumns = kRowThreads * 4;  // of a block that sums columns

/// Blocks of a row each that fit on a multiprocessor, 80 registers a thread; float64 division takes more of them.
template <bool kCosine>
constexpr int kRowBlocks = kCosine ? 4 : 6;
constexpr double kUpwards = 1.0 + 0x1p-19;  // more than float32 takes: 2^-20.9 in sums of 16 squares, 2^-24 elsewhere

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

/// Position of the leading bit of a number that is not 0 and not below float64's normal range, from its upper word.
VQ_DEVICE int leading_bit(uint32_t upper) { return static_cast<int>(upper >> 20 & 0x7FF) - 1023; }
/// The order of magnitudes as integers; what is not finite is above all others.
VQ_DEVICE uint32_t magnitude(double value) { return upper_word(value) & 0x7FFFFFFFu; }
constexpr uint32_t kNotFinite = 0x7FF00000u;

constexpr int kPartFours = 4;  // groups of four values that a thread asks for at once: 128 threads together 2,048

struct ShadowSums {
  double norm, kept, lost;  // ‖x‖, ‖ĥ‖ and at least ‖x − ĥ‖, times 2^exponent
};

/// A row less the centre, by the whole block; it stays in registers if it is no longer than a part.
template <bool kCosine>
struct CentredRow {
  const Rows& rows;
  int64_t row;
  double norm;  // that it is divided by under cosine
  const Prepared& prepared;
  double values[kPartFours][4];

  VQ_DEVICE int column(int first, int group) const { return first + (group * thread_count() + thread_index()) * 4; }
  VQ_DEVICE int part() const { return thread_count() * 4 * kPartFours; }

  VQ_DEVICE void load(int first) {
    Four stored[kPartFours];
#pragma unroll
    for (int g = 0; g < kPartFours; ++g) stored[g] = load_four(rows, row, column(first, g));
#pragma unroll
    for (int g = 0; g < kPartFours; ++g) {
      const bool there = column(first, g) < prepared.pitch;
      double centre[4];
      float x[4];
      load_doubles(centre, prepared.centre + (there ? column(first, g) : 0));
      to_floats(stored[g], rows.type, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const double exact = (kCosine ? x[i] / norm : static_cast<double>(x[i])) - centre[i];
        values[g][i] = there ? exact : 0.0;
      }
    }
  }

  /// magnitude() of the largest value.
  VQ_DEVICE uint32_t largest(void* scratch) {
    uint32_t most[1] = {0};
    for (int first = 0; first < prepared.pitch; first += part()) {
      load(first);
#pragma unroll
      for (int g = 0; g < kPartFours; ++g)
#pragma unroll
        for (int i = 0; i < 4; ++i) most[0] = Largest()(most[0], magnitude(values[g][i]));
    }
    block_reduce(most, scratch, Largest());
    return most[0];
  }

  /// After `largest`: writes the row times 2^exponent as halves, or zeros; numbers below float16's normal range become
  /// zero on every device.
  VQ_DEVICE ShadowSums write(uint16_t* shadow, int exponent, bool zeros, void* scratch) {
    const double scale = ldexp(1.0, exponent);
    double sums[3] = {0, 0, 0};
    for (int first = 0; first < prepared.pitch; first += part()) {
      if (prepared.pitch > part()) load(first);
      // The numbers have 24 bits and their halves 11: what is lost between the two is exact, its square rounded.
      float kept = 0, lost = 0;
#pragma unroll
      for (int g = 0; g < kPartFours; ++g) {
        uint32_t words[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const double exact = zeros ? 0.0 : values[g][i] * scale;
          const float rounded = static_cast<float>(exact);
          uint32_t bits = float_to_half(rounded);
          if ((bits & 0x7C00) == 0) bits = 0;
          words[i / 2] |= bits << 16 * (i % 2);
          const float half = half_to_float(static_cast<uint16_t>(bits)), rest = rounded - half;
          sums[0] += exact * exact;
          kept += half * half;
          lost += rest * rest;
        }
        if (column(first, g) < prepared.pitch) store_words(shadow + column(first, g), words);
      }
      sums[1] += kept;
      sums[2] += lost;
    }
    block_reduce(sums, scratch, Add());
    const double norm = sqrt(sums[0]);
    // Rounding to float32 lost another 2^-24 of each number, and where that underflows, as squares may too, 2^-150: of
    // kMaxDim numbers that is less than 2^-67.
    return {norm, sqrt(sums[1]), sqrt(sums[2]) + 0x1.01p-24 * norm + (zeros ? 0.0 : 0x1p-67)};
  }
};

/// Folded norms of the codes, -1 for a zero code: dividing by it leaves zeros, and its sign says what they are.
VQ_KERNEL(kRowThreads, kRowBlocks<false>) norm_codes(Rows codes, Prepared prepared) {
  const int64_t i = block_index();
  const WholeBlock group = {reinterpret_cast<double*>(shared_memory())};
  const double norm = sqrt(fold(group, Squares{codes, i}, codes.dim));
  if (thread_index() == 0) prepared.norm[i] = norm == 0 ? -1.0 : norm;
}

/// Sums and the largest magnitude() of one column block and one chunk of codes; values that are not finite count as 0.
VQ_KERNEL(kRowThreads, 4) sum_codes(Rows codes, const double* norm, double* sums, uint32_t* most) {
  constexpr int kAhead = 8;  // codes that a thread asks for at once
  const int column_blocks = (codes.dim + kColumns - 1) / kColumns;
  const int chunk = block_index() / column_blocks;
  const int column = (block_index() % column_blocks * kRowThreads + thread_index()) * 4;
  const int64_t first = codes.count * chunk / kCentreChunks, last = codes.count * (chunk + 1) / kCentreChunks;
  double sum[4] = {0, 0, 0, 0};
  uint32_t largest[1] = {0};
  for (int64_t start = first; start < last; start += kAhead) {
    Four stored[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) stored[u] = load_four(codes, start + u < last ? start + u : first, column);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (start + u >= last) break;
      float values[4];
      to_floats(stored[u], codes.type, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        double x = values[i];
        if (norm != nullptr) x /= norm[start + u];
        if (magnitude(x) >= kNotFinite) x = 0;
        sum[i] += x;
        largest[0] = Largest()(largest[0], magnitude(x));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (column + i < codes.dim) sums[static_cast<int64_t>(chunk) * codes.dim + column + i] = sum[i];
  block_reduce(largest, shared_memory(), Largest());
  if (thread_index() == 0) most[block_index()] = largest[0];
}

VQ_KERNEL(kRowThreads, 4)
centre_codes(Rows codes, Prepared prepared, const double* sums, const uint32_t* most, int most_count) {
  const int column = block_index() * kRowThreads + thread_index();
  if (column < codes.dim) {
    double sum = 0;
#pragma unroll 16
    for (int chunk = 0; chunk < kCentreChunks; ++chunk) sum += sums[static_cast<int64_t>(chunk) * codes.dim + column];
    prepared.centre[column] = sum / static_cast<double>(codes.count);
  } else if (column < prepared.pitch) {
    prepared.centre[column] = 0;
  }
  if (block_index() == 0) {
    uint32_t largest[1] = {0};
    for (int i = thread_index(); i < most_count; i += kRowThreads) largest[0] = Largest()(largest[0], most[i]);
    block_reduce(largest, shared_memory(), Largest());
    if (thread_index() == 0) *prepared.header = {largest[0] == 0 ? 0 : -leading_bit(largest[0]), 0, 0, 0};
  }
}

/// One block per code: its shadow and its constants. `chosen` names the codes to do again, or null for all anew.
template <bool kCosine>
VQ_KERNEL(kRowThreads, kRowBlocks<kCosine>)
shadow_codes(Rows codes, Prepared prepared, const int64_t* chosen) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t i = chosen == nullptr ? block_index() : chosen[block_index()];
  if (i < 0 || i >= codes.count) return;
  double own_norm = 1.0;
  if (kCosine && chosen != nullptr) {
    own_norm = sqrt(fold(WholeBlock{scratch}, Squares{codes, i}, codes.dim));
    own_norm = own_norm == 0 ? -1.0 : own_norm;
    if (thread_index() == 0) prepared.norm[i] = own_norm;
  } else if (kCosine) {
    own_norm = prepared.norm[i];
  }
  CentredRow<kCosine> row = {codes, i, own_norm, prepared, {}};
  const uint32_t largest = row.largest(scratch);
  const bool broken = largest >= kNotFinite;

  const int unit = prepared.header->exponent;
  int raise = 0;  // shadow = codebook units · 2^raise
  if (!broken && largest > 0) {
    raise = 14 - (leading_bit(largest) + unit);
    raise = raise > 114 ? 114 : raise;
  }
  const ShadowSums sums = row.write(prepared.shadow + i * prepared.pitch, unit + raise, broken, scratch);
  if (thread_index() != 0) return;
  const double unscale = ldexp(1.0, -raise), norm = sums.kept * unscale;
  const bool uncertain = raise < -6;  // values above 2^20 codebook units
  // |z/‖z‖ − 0|² is 1, but 2 − 2 cos to a zero code is 2.
  const double surcharge = kCosine && own_norm < 0 ? ldexp(1.0, 2 * unit) : 0.0;
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
template <bool kCosine>
VQ_DEVICE void shadow_feature(const Rows& z, int64_t row_of_z, const Prepared& prepared, const Workspace& work, int r) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  double norm = 1.0;
  if (kCosine) norm = sqrt(fold(WholeBlock{scratch}, Squares{z, row_of_z}, z.dim));
  const bool zero = kCosine && norm == 0;
  const double divisor = zero ? 1.0 : norm;
  CentredRow<kCosine> row = {z, row_of_z, divisor, prepared, {}};
  const uint32_t largest = row.largest(scratch);
  const bool broken = largest >= kNotFinite;
  const bool settled = broken || zero;

  const int unit = prepared.header->exponent;
  int exponent = unit;
  if (!settled && largest > 0) {
    exponent = 14 - leading_bit(largest);
    exponent = exponent > unit + kMostLift ? unit + kMostLift : exponent;
  }
  const ShadowSums sums =
      row.write(work.shadow + static_cast<int64_t>(r) * prepared.pitch, exponent, settled, scratch);
  if (thread_index() != 0) return;
  Feature feature = {0, 0, 0, 0};
  if (!settled) {
    const int lift = exponent - unit;  // codebook units to units of this feature
    double slack = fold_rate(z.dim) * sums.norm * sums.norm * ldexp(1.0, -lift);
    // Dividing by the norms rounds each number: ‖z − e‖ may be off by 2^-51 of the unit vectors' length.
    if (kCosine) slack += 0x1p-49 * (ldexp(sums.norm, unit) + ldexp(2.0, exponent + unit));
    feature.weight = lift < -120 ? 0.0f : static_cast<float>(ldexp(1.0, lift));
    feature.norm = upper(sums.norm);
    feature.residual = upper(sums.lost);
    feature.slack = lift < -120 || slack > 1e38 ? bits_float(0x7F800000u) : upper(slack);
  }
  work.features[r] = feature;
  if (kCosine) work.norm[r] = divisor;
  work.kind[r] = broken ? kBroken : zero ? kZero : kNormal;
  work.limit[r] = ordered(bits_float(settled ? 0xFF800000u : 0x7F800000u));
  work.count[r] = 0;
  work.overflow[r] = 0;
  if (r == 0) *work.overflow_total = *work.stalled = 0;
}

/// One block per feature.
template <bool kCosine>
VQ_KERNEL(kRowThreads, kRowBlocks<kCosine>)
shadow_features(Rows z, int64_t first, Prepared prepared, Workspace work) {
  shadow_feature<kCosine>(z, first + block_index(), prepared, work, block_index());
}

}  // namespace vqsa::codebook

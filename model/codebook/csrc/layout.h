// What the stages hand to each other, and where it lies in the two buffers that the caller owns.
//
// Names: z = features, one row each; e = codes. A "shadow" is the float16 copy of a row, centred and scaled.
#pragma once

#include "device.h"

namespace vqsa::codebook {

/// A matrix as the caller stores it, row after row.
struct Rows {
  const void* data;
  int32_t type;  // 0 float32, 1 float16, 2 bfloat16, 3 float64 (segment sums only)
  int32_t dim;
  int64_t count;
  bool by_fours;  // every fourth value of every row may be read together with the next three
};

/// A code as the search sees it, in codebook units (true units times 2^exponent of the header).
struct alignas(16) Code {
  float half_square;  // ½‖e‖²
  float unscale;      // 2^-b: shadow to codebook units; negative: the code is not finite
  float error;        // ‖δe‖ + accumulation rate · ‖ê‖
  float norm;         // ‖ê‖; negative: too large for its units, nothing is certified about it
};

/// A feature as the search sees it, in the units of its own shadow.
struct alignas(16) Feature {
  float weight;    // codebook units to units of the score
  float norm;      // ‖z‖
  float residual;  // ‖δz‖
  float slack;     // what rounding of exact distances may change
};

enum FeatureKind : int32_t { kNormal = 0, kBroken = 1, kZero = 2 };

struct Header {
  int32_t exponent;    // codebook units
  int32_t broken;      // codes that are not finite
  int32_t uncertain;   // codes that are too large for the units
  uint32_t most_bits;  // largest |value| of the codes, as bits
};

/// The persistent half: what `prepare` makes of the codebook.
struct Prepared {
  Header* header;
  double* centre;    // (pitch), zeros from D on
  double* norm;      // (K), cosine only: ‖e‖ folded, -1 for a zero code
  Code* codes;       // (K), and room for whole tiles of the search
  uint16_t* shadow;  // (K, pitch)
  int32_t pitch;     // D rounded up to whole steps of the search
};

struct Candidate {
  float lower;
  int32_t code;
};

struct Partial {
  double sqdist;
  int64_t code;
};

/// The passing half: what one call needs for up to `rows` features at a time.
struct Workspace {
  uint16_t* shadow;   // (rows, pitch)
  Feature* features;  // (rows)
  double* norm;       // (rows), cosine only
  int32_t* kind;      // (rows)
  uint32_t* limit;    // (rows), as ordered(): the least upper bound of any code so far
  int32_t* count;     // (rows) candidates, those that found no place included
  int32_t* overflow;  // (rows) 1 + position in overflow_rows, or 0
  int32_t* overflow_rows;
  int32_t* overflow_total;  // (1)
  int32_t* stalled;         // (1) not 0: a block of the Hopper search gave up waiting
  Candidate* candidates;    // (rows, capacity)
  Partial* partial;         // (overflowed rows, splits)
  int32_t rows, capacity;
};

constexpr int kStep = 32;        // dimensions per step of the search
constexpr int kRowTile = 128;    // features per block of the search
constexpr int kFoldWidth = 512;  // sums of a distance held in shared memory
constexpr int kMaxDim = kFoldWidth << 5;
constexpr int kRowThreads = 128;  // threads of a block that works on one row
constexpr int kListPlaces = 16;   // candidates per feature and block
constexpr int kMostLift = 60;     // a feature's units are at most 2^this times finer than the codebook's

/// Bits whose order as unsigned integers is that of the floats.
VQ_DEVICE uint32_t ordered(float value) {
  const uint32_t bits = float_bits(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
VQ_DEVICE float from_ordered(uint32_t bits) {
  return bits_float(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits);
}

VQ_DEVICE double value(const Rows& rows, int64_t row, int column) {
  const int64_t at = row * rows.dim + column;
  if (rows.type == 0) return static_cast<const float*>(rows.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(rows.data)[at];
  return rows.type == 1 ? half_to_float(bits) : bits_float(static_cast<uint32_t>(bits) << 16);
}

/// Four values that stand side by side, as they are stored: halves take two words. Kernels ask for several of them
/// before they look at the first: what limits them is how many bytes are on their way from memory.
struct Four {
  uint32_t words[4];
};

/// Values `column` to `column` + 3 of a row of a matrix that is `by_fours`.
VQ_DEVICE Four load_aligned(const Rows& rows, int64_t row, int column) {
  Four four = {{0, 0, 0, 0}};
  const int64_t at = row * rows.dim + column;
  if (rows.type == 0) {
    load_words(four.words, static_cast<const uint32_t*>(rows.data) + at);
  } else {
    uint32_t two[2];
    load_words(two, static_cast<const uint16_t*>(rows.data) + at);
    four.words[0] = two[0], four.words[1] = two[1];
  }
  return four;
}

/// The same of any matrix, zeros from the dimension on.
VQ_DEVICE Four load_four(const Rows& rows, int64_t row, int column) {
  Four four = {{0, 0, 0, 0}};
  if (column >= rows.dim) return four;
  if (rows.by_fours) return load_aligned(rows, row, column);
  const int64_t at = row * rows.dim + column;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i >= rows.dim) break;
    if (rows.type == 0)
      four.words[i] = static_cast<const uint32_t*>(rows.data)[at + i];
    else
      four.words[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(rows.data)[at + i]) << 16 * (i % 2);
  }
  return four;
}

VQ_DEVICE void to_floats(const Four& four, int type, float (&values)[4]) {
  if (type == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = bits_float(four.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t half = four.words[i / 2] >> 16 * (i % 2) & 0xFFFF;
      values[i] = type == 1 ? half_to_float(static_cast<uint16_t>(half)) : bits_float(half << 16);
    }
  }
}

}  // namespace vqsa::codebook

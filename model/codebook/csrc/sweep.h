// The product of 128 features with all codes of a range, on tensor cores (mma.sync, sm_80 and later).
//
// Steps of 32 dimensions run through a ring of stages in shared memory, filled by cp.async without a break
// between code tiles. A row of a stage is 64 bytes; its four 16-byte pieces are exchanged by the row's number
// so that ldmatrix meets no bank twice.
#pragma once

#include "layout.h"

namespace vqsa::codebook {

constexpr int kSweepThreads = 256;

/// kCodes codes at a time, on warps laid out kWarpRows × kWarpColumns.
template <int kCodeTile, int kWarpRows, int kStageCount>
struct Tile {
  static constexpr int kCodes = kCodeTile;
  static constexpr int kStages = kStageCount;
  static constexpr int kWarpColumns = kSweepThreads / 32 / kWarpRows;
  static constexpr int kM = kRowTile / kWarpRows / 16;      // 16-row fragments of a warp
  static constexpr int kN = kCodeTile / kWarpColumns / 8;   // 8-code fragments of a warp
  static constexpr int kStageBytes = (kRowTile + kCodeTile) * kStep * 2;
  static constexpr int kBytes = kStageBytes * kStageCount;
};

/// Byte offset of 16-byte piece `piece` of row `row` in a stage.
VQ_DEVICE int piece_offset(int row, int piece) { return row * (kStep * 2) + ((piece ^ (row >> 1 & 3)) << 4); }

/// The element of a warp's fragments that (fragment, register) is, within the tile.
template <class T>
struct Place {
  int row, column;  // of this thread's element [0][0][0]
  VQ_DEVICE Place() {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    row = warp / T::kWarpColumns * (T::kM * 16) + lane / 4;
    column = warp % T::kWarpColumns * (T::kN * 8) + lane % 4 * 2;
  }
};

/// Calls done(acc, first code) for every tile of codes in [first_tile, last_tile); `rows` (shared memory, one
/// per feature of the tile) says where each feature's shadow is, -1 for none.
template <class T, class Done>
VQ_DEVICE void sweep(unsigned char* stages, const uint16_t* features, const int32_t* rows, const uint16_t* codes,
                     int pitch, int64_t code_count, int first_tile, int last_tile, const Done& done) {
  constexpr int kFeaturePieces = kRowTile * 4 / kSweepThreads;
  constexpr int kCodePieces = T::kCodes * 4 / kSweepThreads;
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int steps = pitch / kStep;

  const int piece = thread % 4, piece_row = thread / 4;
  const uint16_t* feature_from[kFeaturePieces];
  bool feature_valid[kFeaturePieces];
#pragma unroll
  for (int p = 0; p < kFeaturePieces; ++p) {
    const int row = rows[piece_row + p * (kSweepThreads / 4)];
    feature_valid[p] = row >= 0;
    feature_from[p] = features + static_cast<int64_t>(row >= 0 ? row : 0) * pitch + piece * 8;
  }
  int load_tile = first_tile, load_step = 0, load_stage = 0;
  auto load = [&] {
    if (load_tile < last_tile) {
      unsigned char* to = stages + load_stage * T::kStageBytes;
#pragma unroll
      for (int p = 0; p < kFeaturePieces; ++p)
        copy_async_16(to + piece_offset(piece_row + p * (kSweepThreads / 4), piece),
                      feature_from[p] + load_step * kStep, feature_valid[p]);
      to += kRowTile * kStep * 2;
#pragma unroll
      for (int p = 0; p < kCodePieces; ++p) {
        const int row = piece_row + p * (kSweepThreads / 4);
        const int64_t code = static_cast<int64_t>(load_tile) * T::kCodes + row;
        const bool valid = code < code_count;
        copy_async_16(to + piece_offset(row, piece), codes + (valid ? code : 0) * pitch + load_step * kStep + piece * 8,
                      valid);
      }
      if (++load_step == steps) {
        load_step = 0;
        ++load_tile;
      }
      load_stage = load_stage + 1 == T::kStages ? 0 : load_stage + 1;
    }
    copy_async_commit();  // an empty group too, so that the count of groups tells the stage
  };

  float acc[T::kM][T::kN][4];
#pragma unroll
  for (int i = 0; i < T::kM; ++i)
#pragma unroll
    for (int j = 0; j < T::kN; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[i][j][c] = 0;

  for (int s = 0; s < T::kStages - 1; ++s) load();
  const int a_row = warp / T::kWarpColumns * (T::kM * 16) + lane % 16, a_piece = lane / 16;
  const int b_row = warp % T::kWarpColumns * (T::kN * 8) + lane / 16 * 8 + lane % 8, b_piece = lane / 8 % 2;
  int stage = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<T::kStages - 2>();
      block_sync();
      load();  // into the stage that everyone left before the barrier
      const unsigned char* a_from = stages + stage * T::kStageBytes;
      const unsigned char* b_from = a_from + kRowTile * kStep * 2;
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        uint32_t a[T::kM][4], b[T::kN][2];
#pragma unroll
        for (int i = 0; i < T::kM; ++i) load_matrix_x4(a[i], a_from + piece_offset(a_row + i * 16, k * 2 + a_piece));
#pragma unroll
        for (int j = 0; j < T::kN; j += 2) {
          uint32_t two[4];
          load_matrix_x4(two, b_from + piece_offset(b_row + j * 8, k * 2 + b_piece));
          b[j][0] = two[0];
          b[j][1] = two[1];
          b[j + 1][0] = two[2];
          b[j + 1][1] = two[3];
        }
        warp_mma(acc, a, b);
      }
      stage = stage + 1 == T::kStages ? 0 : stage + 1;
    }
    done(acc, tile * T::kCodes);
#pragma unroll
    for (int i = 0; i < T::kM; ++i)
#pragma unroll
      for (int j = 0; j < T::kN; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[i][j][c] = 0;
  }
  copy_async_wait<0>();
  block_sync();
}

/// The bounds of a score, ½‖e‖² − z·e in the units of the feature, from the product of the shadows.
constexpr float kSquareRate = 0x1p-21f;  // rounding of ½‖e‖² and of the steps below
/// What underflow may take, gradual or to zero: 2^-150 wherever a float32 is rounded, times what it is multiplied with
/// afterwards. That is most for ½‖e‖², times a weight of up to 2^kMostLift: 2^-90. ‖ê‖ and the error of a code are
/// multiplied with norms of features (<= 2^22), those with norms of codes (<= 2^28), and the steps below with nothing.
/// All that together stays below 2^-120.
constexpr float kTiny = 0x1p-88f;
VQ_DEVICE float score_of(float product, const Code& code, const Feature& feature) {
  return fmaf(-code.unscale, product, feature.weight * code.half_square);
}
/// It rises with each of the code's constants, rounded as it is: that of the largest of several is none too low.
VQ_DEVICE float error_of(float half_square, float code_error, float code_norm, const Feature& feature) {
  float error = fmaf(kSquareRate, feature.weight * half_square, kTiny);
  error = fmaf(feature.residual, code_norm, error);
  return fmaf(feature.norm, code_error, error);
}
struct Bounds {
  float lower, upper;
  VQ_DEVICE Bounds(float product, const Code& code, const Feature& feature) {
    const float score = score_of(product, code, feature);
    const float error = error_of(code.half_square, code.error, code.norm, feature);
    lower = score - error;
    upper = score + error;
  }
};

}  // namespace vqsa::codebook

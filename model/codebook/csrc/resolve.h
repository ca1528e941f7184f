// Exact distances: stage `resolve` for the candidates of every feature, and before it `rescan`, the fallback for
// features that had more candidates than places.
#pragma once

#include "prepare.h"
#include "search.h"

namespace vqsa::codebook {

/// D = Σ(z − e)² in float64, in the order of `_fold` of search.py; under cosine of the normalised vectors.
template <bool kCosine, class Group>
VQ_DEVICE double exact_sqdist(const Group& group, const Rows& z, int64_t row, double z_norm, const Rows& codes,
                              int64_t code, const double* code_norm) {
  const double e_norm = kCosine ? code_norm[code] : 1.0;
  const double sqdist = fold(group, SquaredDifferences<kCosine>{z, codes, row, code, z_norm, e_norm}, z.dim);
  return e_norm < 0 ? sqdist + 1.0 : sqdist;  // |z/‖z‖ − 0|² is 1, but 2 − 2 cos is 2
}

/// How many ways the codes are divided when `overflowed` features are scanned again by `blocks` blocks.
VQ_DEVICE int rescan_splits(int overflowed, int tiles, int blocks) {
  const int row_tiles = (overflowed + kRowTile - 1) / kRowTile;
  const int splits = row_tiles == 0 ? 1 : blocks / row_tiles;
  return splits < 1 ? 1 : splits > tiles ? tiles : splits;
}

template <class T>
struct RescanState {
  double fold[kSweepThreads / 32][kFoldWidth];
  double sqdist[kRowTile];
  int64_t code[kRowTile];
  Feature features[kRowTile];
  float limit[kRowTile];
  uint32_t possible[kRowTile][T::kCodes / 32];
  int32_t rows[kRowTile];
};

template <class T>
constexpr size_t rescan_bytes() {
  return T::kBytes + sizeof(RescanState<T>);
}

/// The same bounds again for the features whose lists ran over, now with the final limit. Each code that it does not
/// rule out is measured at once, and only the least distance so far is kept: never a list, whatever the codebook.
template <class T>
VQ_KERNEL(kSweepThreads, 1)
rescan_codes(Rows z, int64_t first, Rows codes, Prepared prepared, Workspace work, bool cosine) {
  unsigned char* stages = shared_memory();
  RescanState<T>& own = *reinterpret_cast<RescanState<T>*>(stages + T::kBytes);
  const int overflowed = *work.overflow_total;
  const int tiles = static_cast<int>((codes.count + T::kCodes - 1) / T::kCodes);
  const int row_tiles = (overflowed + kRowTile - 1) / kRowTile;
  const int splits = rescan_splits(overflowed, tiles, block_count());
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const bool uncertain = prepared.header->uncertain != 0;
  const OneWarp group = {own.fold[warp]};
  const Place<T> place;

  for (int item = block_index(); item < row_tiles * splits; item += block_count()) {
    const int first_place = item % row_tiles * kRowTile, split = item / row_tiles;
    block_sync();
    if (thread < kRowTile) {
      const bool there = first_place + thread < overflowed;
      const int row = there ? work.overflow_rows[first_place + thread] : -1;
      own.rows[thread] = row;
      own.features[thread] = there ? work.features[row] : Feature{0, 0, 0, 0};
      own.limit[thread] = !there      ? bits_float(0xFF800000u)
                          : uncertain ? bits_float(0x7F800000u)
                                      : from_ordered(work.limit[row]);
      own.sqdist[thread] = static_cast<double>(bits_float(0x7F800000u));
      own.code[thread] = codes.count;
      for (int w = 0; w < T::kCodes / 32; ++w) own.possible[thread][w] = 0;
      if (there && split == 0) work.overflow[row] = first_place + thread + 1;
    }
    block_sync();
    auto done = [&](float (&acc)[T::kM][T::kN][4], int first_code) {
#pragma unroll
      for (int j = 0; j < T::kN; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = place.column + j * 8 + c;
          if (first_code + column < codes.count) {
            const Code constants = prepared.codes[first_code + column];
#pragma unroll
            for (int i = 0; i < T::kM; ++i)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const int row = place.row + i * 16 + h * 8;
                const Bounds bounds(acc[i][j][h * 2 + c], constants, own.features[row]);
                if (own.rows[row] >= 0 && (uncertain || !(bounds.lower > own.limit[row])))
                  atomic_or(&own.possible[row][column / 32], 1u << column % 32);
              }
          }
        }
      block_sync();
      for (int row = warp; row < kRowTile; row += kSweepThreads / 32) {
        double least = own.sqdist[row];
        int64_t nearest = own.code[row];
        warp_sync();
        for (int w = 0; w < T::kCodes / 32; ++w) {
          uint32_t bits = own.possible[row][w];
          while (bits != 0) {
            const int64_t code = first_code + w * 32 + first_bit(bits);
            bits &= bits - 1;
            const int r = own.rows[row];
            const double sqdist =
                cosine ? exact_sqdist<true>(group, z, first + r, work.norm[r], codes, code, prepared.norm)
                       : exact_sqdist<false>(group, z, first + r, 1.0, codes, code, nullptr);
            // Codes come in ascending order: an equal one later is not lower.
            if (sqdist < least) {
              least = sqdist;
              nearest = code;
            }
          }
        }
        warp_sync();
        if (lane == 0) {
          own.sqdist[row] = least;
          own.code[row] = nearest;
          for (int w = 0; w < T::kCodes / 32; ++w) own.possible[row][w] = 0;
        }
      }
      block_sync();
    };
    sweep<T>(stages, work.shadow, own.rows, prepared.shadow, prepared.pitch, codes.count,
             split_start(tiles, split, splits), split_start(tiles, split + 1, splits), done);
    if (thread < kRowTile && own.rows[thread] >= 0)
      work.partial[static_cast<int64_t>(first_place + thread) * splits + split] = {own.sqdist[thread], own.code[thread]};
  }
}

/// What the caller gets; all but the first two may be null.
struct Outputs {
  int64_t* index;    // (N)
  float* sqdist;     // (N), what the search minimised
  float* quantised;  // (N, D), the nearest code
  double* error;     // (N), Σ(z − e)² of the vectors as stored
  int64_t* usage;    // (K), counts are added
  int64_t* effort;   // (2), distances measured here and features scanned again are added
  int32_t* alarm;    // (1), set to 1 if a block of the Hopper search gave up waiting; the answers are right all the same
};

/// One block per feature; it asks for the numbers of both rows at once, which takes more registers than one row.
template <bool kCosine>
VQ_KERNEL(kRowThreads, kCosine ? 3 : 4)
resolve_codes(Rows z, int64_t first, Rows codes, Prepared prepared, Workspace work, int rescan_blocks, int rescan_tiles,
              Outputs out) {
  const WholeBlock group = {reinterpret_cast<double*>(shared_memory())};
  const int r = block_index();
  const int64_t row = first + r;
  const int32_t kind = prepared.header->broken != 0 ? static_cast<int32_t>(kBroken) : work.kind[r];
  const double nan = static_cast<double>(bits_float(0x7FC00000u));
  double least = static_cast<double>(bits_float(0x7F800000u));
  int64_t nearest = codes.count, measured = 0;
  const bool scanned = kind == kNormal && work.overflow[r] != 0;
  if (kind == kBroken) {
    nearest = -1;
    least = nan;
  } else if (kind == kZero) {
    nearest = 0;
    least = 2.0;
  } else if (scanned) {
    const int splits = rescan_splits(*work.overflow_total, rescan_tiles, rescan_blocks);
    const Partial* partial = work.partial + static_cast<int64_t>(work.overflow[r] - 1) * splits;
#pragma unroll 1
    for (int s = 0; s < splits; ++s) {
      if (partial[s].sqdist < least) {  // splits are in the order of their codes
        least = partial[s].sqdist;
        nearest = partial[s].code;
      }
    }
  } else {
    const float limit = from_ordered(work.limit[r]);
    const int count = work.count[r];
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const Candidate candidate = work.candidates[static_cast<int64_t>(r) * work.capacity + i];
      if (candidate.lower > limit) continue;
      ++measured;
      const double sqdist = exact_sqdist<kCosine>(group, z, row, kCosine ? work.norm[r] : 1.0, codes, candidate.code,
                                                  prepared.norm);
      if (sqdist < least || (sqdist == least && candidate.code < nearest)) {
        least = sqdist;
        nearest = candidate.code;
      }
    }
  }
  if (nearest >= codes.count) {  // cannot be; if it is, it is flagged
    nearest = -1;
    least = nan;
  }
  const int64_t gathered = nearest < 0 ? 0 : nearest;
  if (thread_index() == 0) {
    out.index[row] = nearest;
    out.sqdist[row] = static_cast<float>(least);
    if (out.usage != nullptr && nearest >= 0) atomic_add(&out.usage[nearest], int64_t{1});
    if (out.effort != nullptr) {
      atomic_add(&out.effort[0], measured);
      atomic_add(&out.effort[1], static_cast<int64_t>(scanned));
    }
    if (out.alarm != nullptr && r == 0 && *work.stalled != 0) *out.alarm = 1;
  }
  if (out.quantised != nullptr) {
    constexpr int kFours = 4;
    float* to = out.quantised + row * z.dim;
    const bool aligned = z.dim % 4 == 0 && reinterpret_cast<uintptr_t>(out.quantised) % 16 == 0;
    for (int first = thread_index() * 4; first < z.dim; first += thread_count() * 4 * kFours) {
      Four stored[kFours];
#pragma unroll
      for (int g = 0; g < kFours; ++g) stored[g] = load_four(codes, gathered, first + g * thread_count() * 4);
#pragma unroll
      for (int g = 0; g < kFours; ++g) {
        const int column = first + g * thread_count() * 4;
        float values[4];
        to_floats(stored[g], codes.type, values);
        if (aligned && column < z.dim) {
          store_words(to + column, {float_bits(values[0]), float_bits(values[1]), float_bits(values[2]),
                                    float_bits(values[3])});
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (column + i < z.dim) to[column + i] = values[i];
        }
      }
    }
  }
  if (out.error != nullptr) {
    double error = least;
    if (kCosine && nearest >= 0) error = exact_sqdist<false>(group, z, row, 1.0, codes, gathered, nullptr);
    if (thread_index() == 0) out.error[row] = error;
  }
}

}  // namespace vqsa::codebook

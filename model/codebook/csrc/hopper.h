// Stage `search` for Hopper (sm_90a): TMA loads, wgmma products, one warp that loads and eight that multiply.
//
// A block takes 128 features and 256 codes at a time. Each of two warpgroups has 64 of the features with all 256 codes,
// so a feature's scores lie in four lanes of one warp and its limit needs no barrier.
//
// No wait lasts for ever. A warp that waited in vain is done with its features: `rescan` answers for them, `stalled`
// tells the blocks to come not to begin, and the caller learns of it. It still issues its products, on whatever is in
// the stages, since the four warps of a warpgroup must; but it frees no stage, so that no load can start late and
// arrive after the block has ended.
#pragma once

#include "search.h"

namespace vqsa::codebook {

struct Hopper {
  static constexpr int kCodes = 256;
  static constexpr int kDims = 64;  // per step: rows of 128 bytes, the span of the hardware's swizzle
  static constexpr int kStages = 4;
  static constexpr int kFeatureBytes = kRowTile * kDims * 2;
  static constexpr int kStageBytes = (kRowTile + kCodes) * kDims * 2;
  static constexpr int kMultiplyThreads = 256;
  static constexpr int kThreads = kMultiplyThreads + 128;
};

struct HopperLists {
  Candidate list[kRowTile][kListPlaces];
  int32_t count[kRowTile];
  int32_t skip;  // nothing can be certified, or another block stalled
  MemoryBarrier full[Hopper::kStages];
  MemoryBarrier empty[Hopper::kStages];
};

/// With room to start the stages at a multiple of 1,024 bytes.
constexpr size_t kHopperBytes = Hopper::kStages * Hopper::kStageBytes + sizeof(HopperLists) + 1024;

#if !defined(VQ_NO_HOPPER)
VQ_DEVICE void hopper_load(const TensorMap& features, const TensorMap& codes, unsigned char* stages, HopperLists& own,
                           int first_row, int steps, int first_tile, int last_tile) {
  int stage = 0;
  uint32_t parity = 1;  // an empty stage needs no waiting for in the first round
  for (int tile = first_tile; tile < last_tile; ++tile) {
    for (int step = 0; step < steps; ++step) {
      unsigned char* to = stages + stage * Hopper::kStageBytes;
      if (!barrier_wait(&own.empty[stage], parity)) return;
      barrier_expect(&own.full[stage], Hopper::kStageBytes);
      load_tile(to, features, &own.full[stage], step * Hopper::kDims, first_row, kRowTile);
      load_tile(to + Hopper::kFeatureBytes, codes, &own.full[stage], step * Hopper::kDims, tile * Hopper::kCodes,
                Hopper::kCodes);
      if (++stage == Hopper::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

/// Sets the barriers up; `own` is in shared memory, and a block_sync must follow.
VQ_DEVICE void hopper_start(HopperLists& own) {
  for (int stage = 0; stage < Hopper::kStages; ++stage) {
    barrier_start(&own.full[stage], 1);
    barrier_start(&own.empty[stage], Hopper::kMultiplyThreads / 32);
  }
  barrier_started();
}

/// Calls take(acc, first code) for every tile of codes in [first_tile, last_tile), on a warp that multiplies. False if
/// it waited in vain: what it had then is not handed over.
template <class Take>
VQ_DEVICE bool hopper_multiply(const unsigned char* stages, HopperLists& own, int steps, int first_tile, int last_tile,
                               const Take& take) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  float acc[Hopper::kCodes / 8][4];
  int stage = 0;
  uint32_t parity = 0;
  bool sound = true;  // everything that this warp waited for has come
  for (int tile = first_tile; tile < last_tile; ++tile) {
    int before = -1;  // the stage that the products still in flight read
    for (int step = 0; step < steps; ++step) {
      if (sound) sound = warp_all(barrier_wait(&own.full[stage], parity));
      const unsigned char* a = stages + stage * Hopper::kStageBytes + warp / 4 * (64 * Hopper::kDims * 2);
      const unsigned char* b = stages + stage * Hopper::kStageBytes + Hopper::kFeatureBytes;
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < Hopper::kDims / 16; ++k) wgmma_64x256x16(acc, a, b, k, step > 0 || k > 0);
      wgmma_commit();
      if (before >= 0) {
        wgmma_wait<1>(acc);
        if (lane == 0 && sound) barrier_arrive(&own.empty[before]);
      }
      before = stage;
      if (++stage == Hopper::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    wgmma_wait<0>(acc);
    if (!sound) continue;
    if (lane == 0) barrier_arrive(&own.empty[before]);
    take(acc, tile * Hopper::kCodes);
  }
  return sound;
}

/// The least scores of a thread's two features with its codes of a tile, and the largest constants of those codes.
struct HopperLeast {
  float score[2], half_square, error, norm;
};
template <bool kWhole>
VQ_DEVICE HopperLeast hopper_least(const float (&acc)[Hopper::kCodes / 8][4], const Code* constants, int there,
                                   const Feature (&feature)[2]) {
  HopperLeast least = {{bits_float(0x7F800000u), bits_float(0x7F800000u)}, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < Hopper::kCodes / 8; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (kWhole || j * 8 + c < there) {
        const Code code = constants[j * 8 + c];
        least.half_square = fmaxf(least.half_square, code.half_square);
        least.error = fmaxf(least.error, code.error);
        least.norm = fmaxf(least.norm, code.norm);
#pragma unroll
        for (int h = 0; h < 2; ++h)
          least.score[h] = fminf(least.score[h], score_of(acc[j][h * 2 + c], code, feature[h]));
      }
    }
  return least;
}

/// Takes a tile's products in; limits are those of this thread's two features.
///
/// A feature has in most tiles no code that comes near its limit, and the least score with the largest error shows that.
/// Only otherwise bounds are worked out, of those codes alone that are near by the largest error.
VQ_DEVICE void hopper_take(const float (&acc)[Hopper::kCodes / 8][4], const Prepared& prepared, int64_t code_count,
                           int first_code, int row, const Feature (&feature)[2], float (&limit)[2], HopperLists& own) {
  const int pair = thread_index() % 4 * 2;
  const Code* constants = prepared.codes + first_code + pair;
  const int64_t beyond = code_count - first_code - pair;
  int there = beyond < Hopper::kCodes ? static_cast<int>(beyond) : Hopper::kCodes;  // codes from `pair` on
  // The last of a thread's codes is number 249. What is read beyond the codebook's end is room that nobody writes to.
  const HopperLeast least = there >= Hopper::kCodes - 6 ? hopper_least<true>(acc, constants, there, feature)
                                                        : hopper_least<false>(acc, constants, there, feature);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float margin = error_of(least.half_square, least.error, least.norm, feature[h]);
    // Not below what the row's least upper bound makes of its limit.
    float loose = least.score[h] + margin;
    loose = fminf(loose, shuffle_xor(loose, 1));
    loose = fminf(loose, shuffle_xor(loose, 2));
    const bool near = !(least.score[h] - margin > fminf(limit[h], loose + feature[h].slack));
    if (warp_all(!near)) continue;
    forget(there);  // work it all out again rather than keep it in registers since the first time
    // The limit takes the upper bound of the code with the least score, with its own error.
    float upper = bits_float(0x7F800000u);
    if (near && there > 0) {
      int nearest = Hopper::kCodes;
#pragma unroll
      for (int j = 0; j < Hopper::kCodes / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (score_of(acc[j][h * 2 + c], constants[j * 8 + c], feature[h]) == least.score[h]) nearest = j * 8 + c;
      upper = least.score[h] + margin;  // if what stands beyond the codebook's end looks the same
      if (nearest < there) {
        const Code code = constants[nearest];
        upper = least.score[h] + error_of(code.half_square, code.error, code.norm, feature[h]);
      }
    }
    upper = fminf(upper, shuffle_xor(upper, 1));
    upper = fminf(upper, shuffle_xor(upper, 2));
    limit[h] = fminf(limit[h], upper + feature[h].slack);
    if (least.score[h] - margin > limit[h]) continue;
    constexpr int kTogether = 2;  // times two codes that one look rules out
#pragma unroll
    for (int j = 0; j < Hopper::kCodes / 8; j += kTogether) {
      float score[kTogether][2], lowest = bits_float(0x7F800000u);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          score[i][c] = score_of(acc[j + i][h * 2 + c], constants[(j + i) * 8 + c], feature[h]);
          lowest = fminf(lowest, score[i][c]);
        }
      if (lowest - margin > limit[h]) continue;
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int number = (j + i) * 8 + c;
          const Code code = constants[number];
          const float lower = score[i][c] - error_of(code.half_square, code.error, code.norm, feature[h]);
          if (number >= there || lower > limit[h]) continue;
          const int at = atomic_add(&own.count[row + h * 8], 1);
          if (at < kListPlaces) own.list[row + h * 8][at] = {lower, first_code + pair + number};
        }
    }
  }
  warp_sync();
  if (pair == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int count = own.count[row + h * 8];
      if (count > kListPlaces / 2 && count <= kListPlaces)
        own.count[row + h * 8] = still_possible(own.list[row + h * 8], count, limit[h]);
    }
  }
  warp_sync();
}

#endif

VQ_KERNEL(Hopper::kThreads, 1)
search_codes_hopper(VQ_CONSTANT TensorMap feature_map, VQ_CONSTANT TensorMap code_map, Workspace work,
                    Prepared prepared, int row_count, int64_t code_count, int splits) {
  const int row_tiles = (row_count + kRowTile - 1) / kRowTile;
  const int first_row = block_index() % row_tiles * kRowTile, split = block_index() / row_tiles;
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
#if defined(VQ_NO_HOPPER)
  // This build has no code for the device's Hopper instructions; the features are scanned instead.
  (void)split, (void)warp, (void)lane, (void)prepared, (void)code_count, (void)splits;
  if (thread < kRowTile && first_row + thread < row_count && work.kind[first_row + thread] == kNormal)
    mark_overflow(work, first_row + thread);
#else
  const int tiles = static_cast<int>((code_count + Hopper::kCodes - 1) / Hopper::kCodes);
  const int first_tile = split_start(tiles, split, splits), last_tile = split_start(tiles, split + 1, splits);
  const int steps = (prepared.pitch + Hopper::kDims - 1) / Hopper::kDims;
  unsigned char* stages = align_shared(shared_memory(), 1024);
  HopperLists& own = *reinterpret_cast<HopperLists*>(stages + Hopper::kStages * Hopper::kStageBytes);
  if (thread < kRowTile) own.count[thread] = 0;
  if (thread == 0) {
    own.skip = prepared.header->uncertain != 0 || atomic_read(work.stalled) != 0;
    hopper_start(own);
  }
  block_sync();
  if (own.skip != 0) {
    if (thread < kRowTile && first_row + thread < row_count && work.kind[first_row + thread] == kNormal)
      mark_overflow(work, first_row + thread);
    return;
  }

  if (thread >= Hopper::kMultiplyThreads) {
    fewer_registers<40>();
    if (thread == Hopper::kMultiplyThreads)
      hopper_load(feature_map, code_map, stages, own, first_row, steps, first_tile, last_tile);
  } else {
    more_registers<232>();
    const int row = warp * 16 + lane / 4;  // and row + 8
    Feature feature[2];
    float limit[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool there = first_row + row + h * 8 < row_count;
      feature[h] = there ? work.features[first_row + row + h * 8] : Feature{0, 0, 0, 0};
      limit[h] = there ? from_ordered(atomic_read(&work.limit[first_row + row + h * 8])) : bits_float(0xFF800000u);
    }
    const auto take = [&](const float(&acc)[Hopper::kCodes / 8][4], int first_code) {
      hopper_take(acc, prepared, code_count, first_code, row, feature, limit, own);
    };
    const bool sound = hopper_multiply(stages, own, steps, first_tile, last_tile, take);
    if (lane % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int number = first_row + row + h * 8;
        if (number >= row_count) continue;
        if (sound) {
          finish_list(work, number, own.list[row + h * 8], own.count[row + h * 8], limit[h]);
        } else if (work.kind[number] == kNormal) {
          mark_overflow(work, number);
        }
      }
    }
    if (!sound && lane == 0) atomic_exchange(work.stalled, 1);
  }
#endif
}

/// For tests: the products of one tile of features with all codes, as the search accumulates them.
VQ_KERNEL(Hopper::kThreads, 1)
multiply_hopper(VQ_CONSTANT TensorMap feature_map, VQ_CONSTANT TensorMap code_map, int row_count, int64_t code_count,
                int pitch, float* products) {
#if defined(VQ_NO_HOPPER)
  (void)row_count, (void)code_count, (void)pitch, (void)products;
#else
  const int first_row = block_index() * kRowTile, thread = thread_index();
  const int tiles = static_cast<int>((code_count + Hopper::kCodes - 1) / Hopper::kCodes);
  const int steps = (pitch + Hopper::kDims - 1) / Hopper::kDims;
  unsigned char* stages = align_shared(shared_memory(), 1024);
  HopperLists& own = *reinterpret_cast<HopperLists*>(stages + Hopper::kStages * Hopper::kStageBytes);
  if (thread == 0) hopper_start(own);
  block_sync();
  if (thread >= Hopper::kMultiplyThreads) {
    fewer_registers<40>();
    if (thread == Hopper::kMultiplyThreads)
      hopper_load(feature_map, code_map, stages, own, first_row, steps, 0, tiles);
  } else {
    more_registers<232>();
    const int row = first_row + thread / 32 * 16 + thread % 32 / 4;
    const auto take = [&](const float(&acc)[Hopper::kCodes / 8][4], int first_code) {
#pragma unroll
      for (int j = 0; j < Hopper::kCodes / 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int64_t code = first_code + thread % 4 * 2 + j * 8 + c % 2;
          if (row + c / 2 * 8 < row_count && code < code_count)
            products[(row + c / 2 * 8) * code_count + code] = acc[j][c];
        }
    };
    hopper_multiply(stages, own, steps, 0, tiles, take);
  }
#endif
}

}  // namespace vqsa::codebook

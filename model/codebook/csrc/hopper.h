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

/// Takes a tile's products in; limits are those of this thread's two features.
VQ_DEVICE void hopper_take(const float (&acc)[Hopper::kCodes / 8][4], const Prepared& prepared, int64_t code_count,
                           int first_code, int row, const Feature (&feature)[2], float (&limit)[2], HopperLists& own) {
  const int pair = thread_index() % 4 * 2;
  const Code* constants = prepared.codes + first_code + pair;
  const int64_t beyond = code_count - first_code - pair;
  int there = beyond < Hopper::kCodes ? static_cast<int>(beyond) : Hopper::kCodes;  // codes from `pair` on
  float least_lower[2], least_upper[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) least_lower[h] = least_upper[h] = bits_float(0x7F800000u);
#pragma unroll
  for (int j = 0; j < Hopper::kCodes / 8; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (j * 8 + c < there) {
        const Code code = constants[j * 8 + c];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Bounds bounds(acc[j][h * 2 + c], code, feature[h]);
          least_lower[h] = fminf(least_lower[h], bounds.lower);
          least_upper[h] = fminf(least_upper[h], bounds.upper);
        }
      }
    }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float least = least_upper[h];
    least = fminf(least, shuffle_xor(least, 1));
    least = fminf(least, shuffle_xor(least, 2));
    limit[h] = fminf(limit[h], least + feature[h].slack);
    if (least_lower[h] > limit[h]) continue;  // so nearly always
    forget(there);  // work it all out again rather than keep it in registers since the first time
#pragma unroll
    for (int j = 0; j < Hopper::kCodes / 8; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (j * 8 + c < there) {
          const Bounds bounds(acc[j][h * 2 + c], constants[j * 8 + c], feature[h]);
          if (!(bounds.lower > limit[h])) {
            const int at = atomic_add(&own.count[row + h * 8], 1);
            if (at < kListPlaces) own.list[row + h * 8][at] = {bounds.lower, first_code + pair + j * 8 + c};
          }
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

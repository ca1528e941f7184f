// Stage `search`: for every feature the few codes that may be nearest, by certified bounds of their scores.
#pragma once

#include "sweep.h"

namespace vqsa::codebook {

/// What a block keeps in shared memory behind the stages.
struct SearchLists {
  Candidate list[kRowTile][kListPlaces];
  Feature features[kRowTile];
  uint32_t limit[kRowTile];
  int32_t count[kRowTile];
  int32_t rows[kRowTile];
};

template <class T>
constexpr size_t search_bytes() {
  return T::kBytes + sizeof(SearchLists);
}

/// First tile of split `split` of `splits`.
VQ_DEVICE int split_start(int tiles, int split, int splits) {
  return static_cast<int>(static_cast<int64_t>(tiles) * split / splits);
}

VQ_DEVICE void mark_overflow(const Workspace& work, int row) {
  if (atomic_exchange(&work.overflow[row], -1) == 0) {
    const int place = atomic_add(work.overflow_total, 1);
    work.overflow_rows[place] = row;
  }
}

/// Drops the entries that the limit has ruled out since.
VQ_DEVICE int still_possible(Candidate* list, int count, float limit) {
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    const Candidate entry = list[i];
    if (!(entry.lower > limit)) list[kept++] = entry;
  }
  return kept;
}

/// Hands a block's list for one feature over, less what all blocks together have ruled out by now.
VQ_DEVICE void finish_list(const Workspace& work, int row, Candidate* list, int count, float limit) {
  const uint32_t mine = ordered(limit), others = atomic_min(&work.limit[row], mine);
  if (count > kListPlaces) {
    mark_overflow(work, row);
    return;
  }
  const int kept = still_possible(list, count, from_ordered(others < mine ? others : mine));
  const int at = kept > 0 ? atomic_add(&work.count[row], kept) : 0;
  if (at + kept > work.capacity) {
    mark_overflow(work, row);
    return;
  }
  for (int i = 0; i < kept; ++i) work.candidates[static_cast<int64_t>(row) * work.capacity + at + i] = list[i];
}

/// What one block does. Blocks count through the feature tiles first, so that those at work at one time share their
/// codes in L2.
template <class T>
VQ_DEVICE void search_tile(const Workspace& work, const Prepared& prepared, int row_count, int64_t code_count,
                           int splits) {
  unsigned char* stages = shared_memory();
  SearchLists& own = *reinterpret_cast<SearchLists*>(stages + T::kBytes);
  const int row_tiles = (row_count + kRowTile - 1) / kRowTile;
  const int first_row = block_index() % row_tiles * kRowTile, split = block_index() / row_tiles;
  const int tiles = static_cast<int>((code_count + T::kCodes - 1) / T::kCodes);
  const int thread = thread_index();
  const bool uncertain = prepared.header->uncertain != 0;
  if (thread < kRowTile) {
    const int row = first_row + thread;
    const bool there = row < row_count;
    own.rows[thread] = there ? row : -1;
    own.features[thread] = there ? work.features[row] : Feature{0, 0, 0, 0};
    own.limit[thread] = there ? atomic_read(&work.limit[row]) : ordered(bits_float(0xFF800000u));
    own.count[thread] = 0;
    // Nothing is certified: every feature that needs an answer is measured against every code.
    if (there && uncertain && work.kind[row] == kNormal) mark_overflow(work, row);
  }
  if (uncertain) return;
  block_sync();

  const Place<T> place;
  auto done = [&](float (&acc)[T::kM][T::kN][4], int first_code) {
    float least_lower[T::kM][2];
    // Two fragments at a time: the constants of a code are read once for four rows, and registers suffice.
#pragma unroll
    for (int first = 0; first < T::kM; first += 2) {
      float least_upper[2][2];
      Feature feature[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          least_lower[first + i][h] = least_upper[i][h] = bits_float(0x7F800000u);
          feature[i][h] = own.features[place.row + (first + i) * 16 + h * 8];
        }
#pragma unroll
      for (int j = 0; j < T::kN; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int64_t code = first_code + place.column + j * 8 + c;
          if (code < code_count) {
            const Code constants = prepared.codes[code];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const Bounds bounds(acc[first + i][j][h * 2 + c], constants, feature[i][h]);
                least_lower[first + i][h] = fminf(least_lower[first + i][h], bounds.lower);
                least_upper[i][h] = fminf(least_upper[i][h], bounds.upper);
              }
          }
        }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // The four lanes of a row together, then the warps of the row through shared memory.
          float least = least_upper[i][h];
          least = fminf(least, shuffle_xor(least, 1));
          least = fminf(least, shuffle_xor(least, 2));
          const int row = place.row + (first + i) * 16 + h * 8;
          const uint32_t limit = ordered(least + feature[i][h].slack);
          if (thread % 4 == 0 && limit < atomic_read(&own.limit[row])) atomic_min(&own.limit[row], limit);
        }
    }
    block_sync();
#pragma unroll
    for (int i = 0; i < T::kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = place.row + i * 16 + h * 8;
        const float limit = from_ordered(atomic_read(&own.limit[row]));
        if (least_lower[i][h] > limit) continue;  // so nearly always
#pragma unroll
        for (int j = 0; j < T::kN; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int64_t code = first_code + place.column + j * 8 + c;
            if (code < code_count) {
              const Bounds bounds(acc[i][j][h * 2 + c], prepared.codes[code], own.features[row]);
              if (!(bounds.lower > limit)) {
                const int at = atomic_add(&own.count[row], 1);
                if (at < kListPlaces) own.list[row][at] = {bounds.lower, static_cast<int32_t>(code)};
              }
            }
          }
      }
    block_sync();
    if (thread < kRowTile) {
      const int count = own.count[thread];
      // A list that ran over stays over: what found no place is lost to this pass.
      if (count > kListPlaces / 2 && count <= kListPlaces)
        own.count[thread] = still_possible(own.list[thread], count, from_ordered(atomic_read(&own.limit[thread])));
    }
  };
  sweep<T>(stages, work.shadow, own.rows, prepared.shadow, prepared.pitch, code_count, split_start(tiles, split, splits),
           split_start(tiles, split + 1, splits), done);

  if (thread < kRowTile && own.rows[thread] >= 0)
    finish_list(work, own.rows[thread], own.list[thread], own.count[thread], from_ordered(own.limit[thread]));
}

template <class T>
VQ_KERNEL(kSweepThreads, 1)
search_codes(Workspace work, Prepared prepared, int row_count, int64_t code_count, int splits) {
  search_tile<T>(work, prepared, row_count, code_count, splits);
}

}  // namespace vqsa::codebook

// Few features: stages `convert` and `search` in one launch, for features that fill one tile at most.
//
// All blocks run at the same time. Each converts a feature, waits for the others, and searches its codes. It has asked
// for the first of those before, so that the memory is at work meanwhile: codes do not depend on features.
#pragma once

#include "prepare.h"
#include "search.h"

namespace vqsa::codebook {

/// Bytes of codes that a block asks for ahead: what the memory of an H200 brings while it converts (about 4 µs of
/// 4.3 TB/s by 132 blocks).
constexpr int kAheadBytes = 128 * 1024;
constexpr int kLineBytes = 128;

/// Asks for the first `bytes` of each of `rows` rows, a line at a time.
VQ_DEVICE void prefetch_rows(const void* first, int64_t row_bytes, int64_t rows, int64_t bytes) {
  const int64_t lines = ((bytes < row_bytes ? bytes : row_bytes) + kLineBytes - 1) / kLineBytes;
  for (int64_t i = thread_index(); i < rows * lines; i += thread_count())
    prefetch(static_cast<const unsigned char*>(first) + i / lines * row_bytes + i % lines * kLineBytes);
}

/// At least as many blocks as features and as `splits`, of which the first `splits` search.
template <class T>
VQ_KERNEL(kSweepThreads, 1)
convert_and_search_codes(Rows z, int64_t first_row, Prepared prepared, Workspace work, bool cosine, int row_count,
                         int64_t code_count, int splits, int ahead_bytes) {
  // What converting needs comes first, or it would queue behind the codes.
  const int64_t centre_bytes = static_cast<int64_t>(prepared.pitch) * 8;
  prefetch_rows(prepared.centre, centre_bytes, 1, centre_bytes);
  if (block_index() < splits) {
    // The steps of a tile go through all its codes together: the beginning of each.
    const int tiles = static_cast<int>((code_count + T::kCodes - 1) / T::kCodes);
    const int64_t first = static_cast<int64_t>(split_start(tiles, block_index(), splits)) * T::kCodes;
    const int64_t codes = code_count - first < T::kCodes ? code_count - first : T::kCodes;
    prefetch_rows(prepared.shadow + first * prepared.pitch, prepared.pitch * 2, codes, ahead_bytes / T::kCodes);
  }
  if (block_index() < row_count) {
    if (cosine)
      shadow_feature<true>(z, first_row + block_index(), prepared, work, block_index());
    else
      shadow_feature<false>(z, first_row + block_index(), prepared, work, block_index());
  }
  grid_sync();
  if (block_index() < splits) search_tile<T>(work, prepared, row_count, code_count, splits);
}

}  // namespace vqsa::codebook

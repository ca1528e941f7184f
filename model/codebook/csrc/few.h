// Few features: stages `convert` and `search` in one launch, for features that fill one tile at most.
//
// All blocks run at the same time. Each converts some of the features, waits for the others, and searches its codes. Of
// those it has asked for the first before it converts, so that the memory is at work meanwhile: codes do not depend on
// features.
#pragma once

#include "prepare.h"
#include "search.h"

namespace vqsa::codebook {

/// Bytes of codes that a block asks for ahead: what the memory of an H200 brings while it converts (about 4 µs of
/// 4.3 TB/s by 132 blocks).
constexpr int kAheadBytes = 128 * 1024;
constexpr int kLineBytes = 128;

/// The first `splits` blocks search; those beyond them only convert.
template <class T>
VQ_KERNEL(kSweepThreads)
convert_and_search_codes(Rows z, int64_t first_row, Prepared prepared, Workspace work, bool cosine, int row_count,
                         int64_t code_count, int splits, int ahead_bytes) {
  if (block_index() < splits) {
    const int tiles = static_cast<int>((code_count + T::kCodes - 1) / T::kCodes);
    const int64_t code_bytes = static_cast<int64_t>(prepared.pitch) * 2;
    const int64_t first = static_cast<int64_t>(split_start(tiles, block_index(), splits)) * T::kCodes * code_bytes;
    const int64_t left = code_count * code_bytes - first;
    const int64_t ahead = left < ahead_bytes ? left : ahead_bytes;
    const unsigned char* from = reinterpret_cast<const unsigned char*>(prepared.shadow) + first;
    for (int64_t at = thread_index() * kLineBytes; at < ahead; at += kSweepThreads * kLineBytes) prefetch(from + at);
  }
  for (int row = block_index(); row < row_count; row += block_count())
    shadow_feature(z, first_row + row, prepared, work, row, cosine);
  grid_sync();
  if (block_index() < splits) search_tile<T>(work, prepared, row_count, code_count, splits);
}

}  // namespace vqsa::codebook

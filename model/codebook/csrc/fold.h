// Sums over a row: the exact one, whose order depends on the dimension alone, and cheaper ones for bounds.
#pragma once

#include "layout.h"

namespace vqsa::codebook {

/// The threads that work on one sum together, and their shared memory of kFoldWidth doubles.
struct WholeBlock {
  double* buffer;
  VQ_DEVICE int rank() const { return thread_index(); }
  VQ_DEVICE int size() const { return thread_count(); }
  VQ_DEVICE void sync() const { block_sync(); }
};
struct OneWarp {
  double* buffer;
  VQ_DEVICE int rank() const { return thread_index() & 31; }
  VQ_DEVICE int size() const { return 32; }
  VQ_DEVICE void sync() const { warp_sync(); }
};

/// Position `j` after kLevels foldings of `width` terms: the second half has been added onto the first.
template <int kLevels, class Term>
VQ_DEVICE double folded(const Term& term, int width, int j) {
  if constexpr (kLevels == 0) {
    return term(j);
  } else {
    int before = width;
#pragma unroll
    for (int level = 1; level < kLevels; ++level) before = (before + 1) / 2;
    const int half = (before + 1) / 2;
    const double low = folded<kLevels - 1>(term, width, j);
    return j + half < before ? low + folded<kLevels - 1>(term, width, j + half) : low;
  }
}

template <int kLevels, class Group, class Term>
VQ_DEVICE int fold_into_buffer(const Group& group, const Term& term, int width) {
  int left = width;
#pragma unroll
  for (int level = 0; level < kLevels; ++level) left = (left + 1) / 2;
  for (int j = group.rank(); j < left; j += group.size()) group.buffer[j] = folded<kLevels>(term, width, j);
  return left;
}

/// Σ term(j) for j < width, to every thread of the group, as `_fold` of search.py adds it.
template <class Group, class Term>
VQ_DEVICE double fold(const Group& group, const Term& term, int width) {
  int left;
  group.sync();  // the last reader of the sum before may still be at it
  if (width <= kFoldWidth) {
    left = fold_into_buffer<0>(group, term, width);
  } else if (width <= kFoldWidth * 2) {
    left = fold_into_buffer<1>(group, term, width);
  } else if (width <= kFoldWidth * 4) {
    left = fold_into_buffer<2>(group, term, width);
  } else if (width <= kFoldWidth * 8) {
    left = fold_into_buffer<3>(group, term, width);
  } else {
    left = fold_into_buffer<5>(group, term, width);
  }
  group.sync();
  while (left > 1) {
    const int half = (left + 1) / 2;
    for (int j = group.rank(); j < left - half; j += group.size()) group.buffer[j] += group.buffer[j + half];
    left = half;
    group.sync();
  }
  return group.buffer[0];
}

struct Add {
  VQ_DEVICE double operator()(double a, double b) const { return a + b; }
};
struct Largest {
  VQ_DEVICE double operator()(double a, double b) const { return a > b ? a : b; }
};

/// Combines one value per thread of the block, to every thread; `scratch` holds a double per warp.
template <class Combine>
VQ_DEVICE double block_reduce(double mine, double* scratch, Combine combine) {
  for (int mask = 16; mask > 0; mask /= 2) mine = combine(mine, shuffle_xor(mine, mask));
  block_sync();
  if (thread_index() % 32 == 0) scratch[thread_index() / 32] = mine;
  block_sync();
  double all = scratch[0];
  for (int warp = 1; warp < thread_count() / 32; ++warp) all = combine(all, scratch[warp]);
  return all;
}

}  // namespace vqsa::codebook

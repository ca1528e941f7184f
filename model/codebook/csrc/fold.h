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
    double sum = 0;
#pragma unroll 1  // one copy of the code: more would only take registers
    for (int at = j; at < before; at += half) {
      const double part = folded<kLevels - 1>(term, width, at);
      sum = at == j ? part : sum + part;
    }
    return sum;
  }
}

/// The same for positions `j` to `j` + 3, of a width that divides by 4 · 2^kLevels. Four times 2^kLevelsAhead terms are
/// asked for before the first is looked at.
template <int kLevels, class Terms>
VQ_DEVICE void folded_four(const Terms& terms, int width, int j, double (&sum)[4]) {
  const int half = width >> kLevels;
  double other[4];
  if constexpr (kLevels > Terms::kLevelsAhead) {
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      folded_four<kLevels - 1>(terms, width, j + side * half, other);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = side == 0 ? other[i] : sum[i] + other[i];
    }
  } else {
    typename Terms::Stored stored[1 << kLevels];
#pragma unroll
    for (int part = 0; part < 1 << kLevels; ++part) stored[part] = terms.load(j + part * half);
    terms.values(stored[0], sum);
    if constexpr (kLevels == 1) {
      terms.values(stored[1], other);
    } else if constexpr (kLevels == 2) {
      double third[4];
      terms.values(stored[2], other);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += other[i];
      terms.values(stored[1], other);
      terms.values(stored[3], third);
#pragma unroll
      for (int i = 0; i < 4; ++i) other[i] += third[i];
    }
    if constexpr (kLevels > 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += other[i];
    }
  }
}

template <int kLevels, class Group, class Terms>
VQ_DEVICE int fold_into_buffer(const Group& group, const Terms& terms, int width) {
  int left = width;
#pragma unroll
  for (int level = 0; level < kLevels; ++level) left = (left + 1) / 2;
  if (terms.by_fours() && width % (4 << kLevels) == 0) {
    for (int j = group.rank() * 4; j < left; j += group.size() * 4) {
      double sum[4];
      folded_four<kLevels>(terms, width, j, sum);
#pragma unroll
      for (int i = 0; i < 4; ++i) group.buffer[j + i] = sum[i];
    }
  } else {
    for (int j = group.rank(); j < left; j += group.size()) group.buffer[j] = folded<kLevels>(terms, width, j);
  }
  return left;
}

/// Folds the buffer twice in place: each position is read by the one thread that writes where it goes.
template <class Group>
VQ_DEVICE int fold_buffer(const Group& group, int width) {
  const int half = (width + 1) / 2, quarter = (half + 1) / 2;
  for (int j = group.rank(); j < quarter; j += group.size()) {
    const auto pair = [&](int i) {
      const double low = group.buffer[i];
      return i + half < width ? low + group.buffer[i + half] : low;
    };
    const double low = pair(j);
    group.buffer[j] = j + quarter < half ? low + pair(j + quarter) : low;
  }
  return quarter;
}

/// The sum of `width` terms to every thread of the group, in the order in which `_fold` of search.py adds them.
template <class Group, class Terms>
VQ_DEVICE double fold(const Group& group, const Terms& terms, int width) {
  int left;
  group.sync();  // the last reader of the sum before may still be at it
  if (width <= kFoldWidth) {
    left = fold_into_buffer<0>(group, terms, width);
  } else if (width <= kFoldWidth * 2) {
    left = fold_into_buffer<1>(group, terms, width);
  } else if (width <= kFoldWidth * 4) {
    left = fold_into_buffer<2>(group, terms, width);
  } else if (width <= kFoldWidth * 8) {
    left = fold_into_buffer<3>(group, terms, width);
  } else {
    left = fold_into_buffer<5>(group, terms, width);
  }
  group.sync();
  while (left > 32) {
    left = fold_buffer(group, left);
    group.sync();
  }
  // Each warp for itself, without a barrier.
  const int lane = group.rank() & 31;
  double sum = lane < left ? group.buffer[lane] : 0.0;
  while (left > 1) {
    const int half = (left + 1) / 2;
    const double other = shuffle_down(sum, half);
    if (lane + half < left) sum += other;
    left = half;
  }
  return shuffle_first(sum);
}

/// x² of a row.
struct Squares {
  static constexpr int kLevelsAhead = 2;
  Rows rows;
  int64_t row;
  using Stored = Four;
  VQ_DEVICE bool by_fours() const { return rows.by_fours; }
  VQ_DEVICE Four load(int j) const { return load_aligned(rows, row, j); }
  VQ_DEVICE void values(const Four& stored, double (&out)[4]) const {
    float x[4];
    to_floats(stored, rows.type, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = static_cast<double>(x[i]) * x[i];
  }
  VQ_DEVICE double operator()(int j) const {
    const double x = value(rows, row, j);
    return x * x;
  }
};

/// (e − z)² of two rows, under cosine of both divided by their norms.
template <bool kCosine>
struct SquaredDifferences {
  static constexpr int kLevelsAhead = kCosine ? 1 : 2;  // a division takes the registers of two more
  Rows z, codes;
  int64_t row, code;
  double z_norm, code_norm;
  struct Stored {
    Four z, code;
  };
  VQ_DEVICE bool by_fours() const { return z.by_fours && codes.by_fours; }
  VQ_DEVICE Stored load(int j) const { return {load_aligned(z, row, j), load_aligned(codes, code, j)}; }
  VQ_DEVICE double square(double e, double x) const {
    const double difference = kCosine ? e / code_norm - x / z_norm : e - x;
    return difference * difference;
  }
  VQ_DEVICE void values(const Stored& stored, double (&out)[4]) const {
    float x[4], e[4];
    to_floats(stored.z, z.type, x);
    to_floats(stored.code, codes.type, e);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = square(e[i], x[i]);
  }
  VQ_DEVICE double operator()(int j) const { return square(value(codes, code, j), value(z, row, j)); }
};

struct Add {
  VQ_DEVICE double operator()(double a, double b) const { return a + b; }
};
struct Largest {
  VQ_DEVICE uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};

/// Combines the values of all threads of the block, in each place, to every thread; `shared` has room for a set of
/// values per warp.
template <class T, int kCount, class Combine>
VQ_DEVICE void block_reduce(T (&values)[kCount], void* shared, Combine combine) {
  T* scratch = static_cast<T*>(shared);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = combine(values[i], shuffle_xor(values[i], mask));
  block_sync();
  if (thread_index() % 32 == 0)
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch[thread_index() / 32 * kCount + i] = values[i];
  block_sync();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = scratch[i];
    for (int warp = 1; warp < thread_count() / 32; ++warp) values[i] = combine(values[i], scratch[warp * kCount + i]);
  }
}

}  // namespace vqsa::codebook

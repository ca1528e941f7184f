// Sums of the features that share a code, the same bits in every run: features come sorted by code, runs of a fixed
// number of them are summed in order, and the parts of a code that spans several runs are added in order.
#pragma once

#include "layout.h"

namespace vqsa::codebook {

constexpr int kRunRows = 64;  // sorted features that one block sums
constexpr int kAhead = 8;     // of them loaded before the first is added

/// What is summed: scale · (code − z) where there is a code for each feature, else z.
struct Terms {
  Rows z;
  const float* code;    // (N, D) or null
  const double* scale;  // (1) or null
};

/// Where it goes. `slot` ascends: the row of `out` of each feature in sorted order, negative to leave it out.
struct Segments {
  const int64_t* order;  // (N) number of the feature
  const int32_t* slot;   // (N)
  double* partial;       // (runs, 2, D): sums of a run's first segment if it began before, and of its last if it goes on
  void* out;             // (slots, D), float64 if z is, else float32
  int64_t slots;         // features with a higher slot are left out too
};

/// Position of the first feature whose slot is not below `wanted`.
VQ_DEVICE int64_t first_of(const int32_t* slot, int64_t count, int64_t wanted) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (slot[middle] < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

VQ_DEVICE void write(const Terms& terms, const Segments& segments, int slot, int column, double sum) {
  if (slot >= segments.slots) return;
  const int64_t at = static_cast<int64_t>(slot) * terms.z.dim + column;
  if (terms.z.type == 3)
    static_cast<double*>(segments.out)[at] = sum;
  else
    static_cast<float*>(segments.out)[at] = static_cast<float>(sum);
}

VQ_DEVICE double scaled(const Terms& terms, double sum) { return terms.scale == nullptr ? sum : sum * *terms.scale; }

/// One block per row of the result: zeros where there is no feature.
VQ_KERNEL(kRowThreads, 8) clear_rows(Terms terms, Segments segments) {
  const int slot = block_index();
  const int64_t at = first_of(segments.slot, terms.z.count, slot);
  if (at < terms.z.count && segments.slot[at] == slot) return;
  for (int column = thread_index(); column < terms.z.dim; column += thread_count())
    write(terms, segments, slot, column, 0.0);
}

/// Features as they are stored; the type is known before the loop, so that nothing stands between its loads.
struct Float {
  using Stored = float;
  static VQ_DEVICE double exact(float stored) { return stored; }
};
struct Double {
  using Stored = double;
  static VQ_DEVICE double exact(double stored) { return stored; }
};
struct Half {
  using Stored = uint16_t;
  static VQ_DEVICE double exact(uint16_t stored) { return half_to_float(stored); }
};
struct Bfloat {
  using Stored = uint16_t;
  static VQ_DEVICE double exact(uint16_t stored) { return bits_float(static_cast<uint32_t>(stored) << 16); }
};

/// One block per run of features and 128 columns.
template <class T>
VQ_KERNEL(kRowThreads, 6)
sum_runs(Terms terms, Segments segments) {
  int64_t* row = reinterpret_cast<int64_t*>(shared_memory());
  int32_t* slot = reinterpret_cast<int32_t*>(row + kRunRows);
  const int column_blocks = (terms.z.dim + kRowThreads - 1) / kRowThreads;
  const int64_t run = block_index() / column_blocks, first = run * kRunRows;
  const int column = block_index() % column_blocks * kRowThreads + thread_index();
  const int count = static_cast<int>(terms.z.count - first < kRunRows ? terms.z.count - first : kRunRows);
  if (thread_index() < count) {
    row[thread_index()] = segments.order[first + thread_index()];
    slot[thread_index()] = segments.slot[first + thread_index()];
  }
  block_sync();
  if (column >= terms.z.dim) return;
  const int before = first > 0 ? segments.slot[first - 1] : -1;
  const int after = first + count < terms.z.count ? segments.slot[first + count] : -1;
  const auto* features = static_cast<const typename T::Stored*>(terms.z.data);
  double sum = 0;
  int began = 0;
  for (int start = 0; start < count; start += kAhead) {
    // Numbers of features that are left out are read all the same, and those beyond the end are the run's last.
    typename T::Stored stored[kAhead];
    float code[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      stored[u] = features[row[start + u < count ? start + u : count - 1] * terms.z.dim + column];
    if (terms.code != nullptr)
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        code[u] = terms.code[row[start + u < count ? start + u : count - 1] * terms.z.dim + column];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = start + u;
      if (i >= count) break;
      const int own = slot[i];
      const double x = T::exact(stored[u]);
      if (own >= 0) sum += terms.code == nullptr ? x : code[u] - x;
      if (i + 1 < count && slot[i + 1] == own) continue;
      const bool open_before = began == 0 && before == own, open_after = i + 1 == count && after == own;
      if (own >= 0 && (open_before || open_after))
        segments.partial[(run * 2 + (open_before ? 0 : 1)) * terms.z.dim + column] = sum;
      else if (own >= 0)
        write(terms, segments, own, column, scaled(terms, sum));
      sum = 0;
      began = i + 1;
    }
  }
}

/// The same blocks again: one whose last segment goes on, and began in it, adds that segment's parts.
VQ_KERNEL(kRowThreads, 8) join_runs(Terms terms, Segments segments) {
  const int column_blocks = (terms.z.dim + kRowThreads - 1) / kRowThreads;
  const int64_t run = block_index() / column_blocks, first = run * kRunRows, next = first + kRunRows;
  const int column = block_index() % column_blocks * kRowThreads + thread_index();
  if (next >= terms.z.count || column >= terms.z.dim) return;
  const int own = segments.slot[next];
  if (own < 0 || segments.slot[next - 1] != own || (first > 0 && segments.slot[first - 1] == own)) return;
  const int64_t last = first_of(segments.slot, terms.z.count, static_cast<int64_t>(own) + 1) - 1;
  double sum = segments.partial[(run * 2 + 1) * terms.z.dim + column];
#pragma unroll 8
  for (int64_t other = run + 1; other <= last / kRunRows; ++other)
    sum += segments.partial[other * 2 * terms.z.dim + column];
  write(terms, segments, own, column, scaled(terms, sum));
}

}  // namespace vqsa::codebook

// The C interface: sizes, choice of tiles, and the launches of each stage in order.
#include "codebook.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <string>

#include "few.h"
#include "hopper.h"
#include "resolve.h"
#include "segment.h"

namespace vqsa::codebook {
namespace {

thread_local std::string last_error;
std::atomic<int64_t> searched_together{0};

using Large = Tile<256, 2, 4>;
using LargeShort = Tile<256, 2, 3>;  // for 99 KB of shared memory (sm_86, sm_89)
using Small = Tile<64, 4, 4>;

constexpr int64_t kShadowBytes = 32 << 20;  // features converted at a time
constexpr size_t kFoldBytes = kFoldWidth * sizeof(double);
constexpr size_t kScratchBytes = kFoldBytes;
constexpr const char* kNotHopper = "the Hopper kernel needs a device of compute capability 9.0";

int fail(const char* what, const char* why) {
  last_error = std::string(what) + ": " + why;
  return 1;
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

Rows rows_of(const void* data, int32_t type, int32_t dim, int64_t count) {
  const size_t four = type == 0 ? 16 : 8;
  return {data, type, dim, count, type != 3 && dim % 4 == 0 && reinterpret_cast<uintptr_t>(data) % four == 0};
}

/// Hands out pieces of a buffer, or only counts them when there is none.
struct Pieces {
  unsigned char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return piece;
  }
};

Prepared prepared_in(Pieces& pieces, int64_t codes, int32_t dim, bool cosine) {
  Prepared p;
  p.pitch = static_cast<int32_t>(round_up(dim, kStep));
  p.header = pieces.take<Header>(1);
  p.centre = pieces.take<double>(p.pitch);
  p.norm = cosine ? pieces.take<double>(codes) : nullptr;
  p.codes = pieces.take<Code>(round_up(codes, Hopper::kCodes));
  p.shadow = pieces.take<uint16_t>(codes * p.pitch);
  return p;
}

struct Plan {
  VqsaTile tile;
  int splits;
  bool together;  // convert and search in one launch, if the device can
};

bool allowed(VqsaTile tile, int32_t wanted, const Device& device) {
  if (wanted == VQSA_TILE_ANY) return tile != VQSA_TILE_HOPPER || device.capability == 90;
  return wanted == VQSA_TILE_AUTO ? tile != VQSA_TILE_HOPPER : wanted == tile;
}

/// The tile and number of splits that should end first: whole waves of blocks, each as long as its codes.
Plan plan_search(int rows, int64_t codes, int32_t asked, const Device& device) {
  const int row_tiles = static_cast<int>(divide_up(rows, kRowTile));
  const int32_t wanted = asked & ~VQSA_APART;
  Plan best = {VQSA_TILE_WIDE, 1, false};
  double least = 1e300;
  for (const VqsaTile tile : {VQSA_TILE_WIDE, VQSA_TILE_NARROW, VQSA_TILE_HOPPER}) {
    if (!allowed(tile, wanted, device)) continue;
    const bool large = tile != VQSA_TILE_NARROW;
    const int64_t tiles = divide_up(codes, large ? Large::kCodes : Small::kCodes);
    // A small tile moves more bytes for each product; mma.sync reaches some 0.6 of the rate of wgmma.
    const double tile_cost = tile == VQSA_TILE_HOPPER ? 0.6 * Hopper::kCodes : large ? Large::kCodes : 1.5 * Small::kCodes;
    const int64_t most = std::min<int64_t>(tiles, 4 * device.multiprocessors / row_tiles + 1);
    for (int64_t splits = 1; splits <= most; ++splits) {
      // Two narrow blocks fit on a multiprocessor and share its tensor cores: counted as one after the other.
      const double waves = static_cast<double>(divide_up(row_tiles * splits, device.multiprocessors));
      // A block has to fill its pipeline once; many splits leave more candidates.
      const double cost = waves * (static_cast<double>(divide_up(tiles, splits)) * tile_cost + 16) + 0.5 * splits;
      if (cost < least) {
        least = cost;
        best = {tile, static_cast<int>(splits), false};
      }
    }
  }
  best.together = wanted == asked && row_tiles == 1 && best.tile != VQSA_TILE_HOPPER &&
                  best.splits <= device.multiprocessors;
  return best;
}

struct Sizes {
  int rows, chunks, rescan_blocks, rescan_tiles;
  Plan plan;
};

Sizes sizes_for(int64_t features, int64_t codes, int32_t dim, int32_t tile, const Device& device) {
  Sizes s;
  const int64_t pitch = round_up(dim, kStep);
  const int64_t most = std::max<int64_t>(kShadowBytes / (2 * pitch) / kRowTile, 1) * kRowTile;
  s.chunks = static_cast<int>(std::max<int64_t>(divide_up(features, most), 1));
  s.rows = static_cast<int>(
      std::min<int64_t>(round_up(divide_up(std::max<int64_t>(features, 1), s.chunks), kRowTile), most));
  s.rescan_blocks = 2 * device.multiprocessors;
  s.rescan_tiles = static_cast<int>(divide_up(codes, Small::kCodes));
  s.plan = plan_search(s.rows, codes, tile, device);
  return s;
}

Workspace workspace_in(Pieces& pieces, const Sizes& sizes, int32_t dim, bool cosine) {
  Workspace w;
  w.rows = sizes.rows;
  w.capacity = 32 + 2 * sizes.plan.splits;
  w.shadow = pieces.take<uint16_t>(w.rows * round_up(dim, kStep));
  w.features = pieces.take<Feature>(w.rows);
  w.norm = cosine ? pieces.take<double>(w.rows) : nullptr;
  w.kind = pieces.take<int32_t>(w.rows);
  w.limit = pieces.take<uint32_t>(w.rows);
  w.count = pieces.take<int32_t>(w.rows);
  w.overflow = pieces.take<int32_t>(w.rows);
  w.overflow_rows = pieces.take<int32_t>(w.rows);
  w.overflow_total = pieces.take<int32_t>(1);
  w.stalled = pieces.take<int32_t>(1);
  w.candidates = pieces.take<Candidate>(static_cast<int64_t>(w.rows) * w.capacity);
  w.partial = pieces.take<Partial>(kRowTile * static_cast<int64_t>(std::max(sizes.rescan_blocks, w.rows / kRowTile)));
  return w;
}

int64_t centre_scratch_bytes(int32_t dim) {
  return round_up(static_cast<int64_t>(dim) * kCentreChunks * 8, 256) +
         round_up(divide_up(dim, kColumns) * kCentreChunks * 4, 256);
}

/// Features of the caller's matrix that are searched for at once, and what that needs.
struct Task {
  Rows z;
  int64_t first;
  int rows;
  int64_t codes;
  bool cosine;
  Prepared prepared;
  Workspace work;
  Plan plan;
};

const char* convert(const Task& task, Stream stream) {
  return launch(task.cosine ? shadow_features<true> : shadow_features<false>, task.rows, kRowThreads, kFoldBytes, stream,
                task.z, task.first, task.prepared, task.work);
}

template <class T>
const char* convert_and_search(const Task& task, const Device& device, Stream stream) {
  const Plan& plan = task.plan;
  // Features that had to wait for a block would cost more than a launch.
  if (plan.together && task.rows <= device.multiprocessors) {
    const int blocks = std::max(plan.splits, task.rows);
    // Half of L2, or what is asked for first is pushed out by what is asked for last.
    const int ahead = std::min(kAheadBytes, device.l2_bytes / 2 / plan.splits);
    const char* why = nullptr;
    if (launch_together(why, device, convert_and_search_codes<T>, blocks, kSweepThreads, search_bytes<T>(), stream,
                        task.z, task.first, task.prepared, task.work, task.cosine, task.rows, task.codes, plan.splits,
                        ahead)) {
      searched_together += why == nullptr;
      return why;
    }
  }
  if (const char* why = convert(task, stream)) return why;
  return launch(search_codes<T>, static_cast<int>(divide_up(task.rows, kRowTile)) * plan.splits, kSweepThreads,
                search_bytes<T>(), stream, task.work, task.prepared, task.rows, task.codes, plan.splits);
}

const char* convert_and_search_hopper(const Task& task, const Device& device, Stream stream) {
  if (device.capability != 90) return kNotHopper;
  const Prepared& prepared = task.prepared;
  TensorMap features, codes;
  const char* why = convert(task, stream);  // first: a launch, which the tensor maps need on a new thread
  if (why == nullptr) why = tensor_map(features, task.work.shadow, task.rows, prepared.pitch, kRowTile);
  if (why == nullptr) why = tensor_map(codes, prepared.shadow, task.codes, prepared.pitch, Hopper::kCodes);
  if (why != nullptr) return why;
  return launch(search_codes_hopper, static_cast<int>(divide_up(task.rows, kRowTile)) * task.plan.splits,
                Hopper::kThreads, kHopperBytes, stream, features, codes, task.work, prepared, task.rows, task.codes,
                task.plan.splits);
}

const char* convert_and_search(const Task& task, const Device& device, Stream stream) {
  if (task.plan.tile == VQSA_TILE_HOPPER) return convert_and_search_hopper(task, device, stream);
  if (task.plan.tile == VQSA_TILE_NARROW) return convert_and_search<Small>(task, device, stream);
  if (static_cast<size_t>(device.shared_bytes) < search_bytes<Large>())
    return convert_and_search<LargeShort>(task, device, stream);
  return convert_and_search<Large>(task, device, stream);
}

template <class T>
VQ_KERNEL(kSweepThreads, 1)
multiply(const uint16_t* features, const int32_t* numbers, int rows, const uint16_t* codes, int64_t code_count, int pitch,
         float* products) {
  int32_t* own = reinterpret_cast<int32_t*>(shared_memory() + T::kBytes);
  const int first = block_index() * kRowTile;
  if (thread_index() < kRowTile)
    own[thread_index()] = first + thread_index() < rows ? numbers[first + thread_index()] : -1;
  block_sync();
  const Place<T> place;
  auto done = [&](float (&acc)[T::kM][T::kN][4], int first_code) {
#pragma unroll
    for (int i = 0; i < T::kM; ++i)
#pragma unroll
      for (int j = 0; j < T::kN; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row = first + place.row + i * 16 + c / 2 * 8;
          const int64_t code = first_code + place.column + j * 8 + c % 2;
          if (row < rows && code < code_count) products[row * code_count + code] = acc[i][j][c];
        }
  };
  const int tiles = static_cast<int>((code_count + T::kCodes - 1) / T::kCodes);
  sweep<T>(shared_memory(), features, own, codes, pitch, code_count, 0, tiles, done);
}

template <class... Kernels>
const char* load_all(Kernels... kernels) {
  const char* why = nullptr;
  (void)((why = load(kernels), why == nullptr) && ...);
  return why;
}

}  // namespace
}  // namespace vqsa::codebook

using namespace vqsa::codebook;

const char* vqsa_codebook_last_error() { return last_error.c_str(); }

int64_t vqsa_codebook_max_dim() { return kMaxDim; }

int64_t vqsa_codebook_together() { return searched_together; }

int vqsa_codebook_usable() {
  const char* why = load_all(
      norm_codes, sum_codes, centre_codes, shadow_codes<false>, shadow_codes<true>, shadow_features<false>,
      shadow_features<true>, search_codes<Large>, search_codes<LargeShort>,
      search_codes<Small>, convert_and_search_codes<Large>, convert_and_search_codes<LargeShort>,
      convert_and_search_codes<Small>, search_codes_hopper, rescan_codes<Small>, resolve_codes<false>, resolve_codes<true>, clear_rows, sum_runs<Float>,
      sum_runs<Half>, sum_runs<Bfloat>, sum_runs<Double>, join_runs);
  return why == nullptr;
}

#ifndef VQSA_ARCHITECTURES
#define VQSA_ARCHITECTURES "none"
#endif
const char* vqsa_codebook_architectures() { return VQSA_ARCHITECTURES; }

int vqsa_codebook_capability(int32_t* capability) {
  Device found;
  if (const char* why = device(found)) return fail("asking for the device", why);
  *capability = found.capability;
  return 0;
}

int64_t vqsa_codebook_prepared_bytes(int64_t codes, int32_t dim, int32_t cosine) {
  Pieces pieces = {nullptr};
  prepared_in(pieces, codes, dim, cosine != 0);
  return pieces.used;
}

int64_t vqsa_codebook_workspace_bytes(int64_t features, int64_t codes, int32_t dim, int32_t cosine, int32_t tile) {
  Device found;
  if (const char* why = device(found)) {
    fail("asking for the device", why);
    return 0;
  }
  Pieces pieces = {nullptr};
  workspace_in(pieces, sizes_for(features, codes, dim, tile, found), dim, cosine != 0);
  return std::max(pieces.used, centre_scratch_bytes(dim));
}

int vqsa_codebook_prepare(const void* codes_data, int32_t codes_type, int64_t code_count, int32_t dim, int32_t cosine,
                          void* prepared_buffer, void* workspace, const int64_t* chosen, int64_t chosen_count,
                          void* stream_handle) {
  const Stream stream = static_cast<Stream>(stream_handle);
  const Rows codes = rows_of(codes_data, codes_type, dim, code_count);
  Pieces kept = {static_cast<unsigned char*>(prepared_buffer)};
  const Prepared prepared = prepared_in(kept, code_count, dim, cosine != 0);
  const char* why = nullptr;
  if (chosen == nullptr) {
    Pieces pieces = {static_cast<unsigned char*>(workspace)};
    double* sums = pieces.take<double>(static_cast<int64_t>(dim) * kCentreChunks);
    const int most_count = static_cast<int>(divide_up(dim, kColumns)) * kCentreChunks;
    uint32_t* most = pieces.take<uint32_t>(most_count);
    if (cosine != 0)
      why = launch(norm_codes, static_cast<int>(code_count), kRowThreads, kFoldBytes, stream, codes, prepared);
    if (why == nullptr)
      why = launch(sum_codes, most_count, kRowThreads, kScratchBytes, stream, codes,
                   static_cast<const double*>(prepared.norm), sums, most);
    if (why == nullptr)
      why = launch(centre_codes, static_cast<int>(divide_up(prepared.pitch, kRowThreads)), kRowThreads, kScratchBytes,
                   stream, codes, prepared, static_cast<const double*>(sums), static_cast<const uint32_t*>(most),
                   most_count);
  }
  const int64_t todo = chosen == nullptr ? code_count : chosen_count;
  if (why == nullptr && todo > 0)
    why = launch(cosine != 0 ? shadow_codes<true> : shadow_codes<false>, static_cast<int>(todo), kRowThreads, kFoldBytes,
                 stream, codes, prepared, chosen);
  return why == nullptr ? 0 : fail("preparing the codebook", why);
}

int vqsa_codebook_search(const void* z_data, int32_t z_type, int64_t features, const void* codes_data,
                         int32_t codes_type, int64_t code_count, int32_t dim, int32_t cosine, int32_t tile,
                         void* prepared_buffer, void* workspace, int64_t* index, float* sqdist, float* quantised,
                         double* error, int64_t* usage, int64_t* effort, int32_t* alarm,
                         void* stream_handle) {
  const Stream stream = static_cast<Stream>(stream_handle);
  Device found;
  if (const char* why = device(found)) return fail("asking for the device", why);
  const Rows z = rows_of(z_data, z_type, dim, features), codes = rows_of(codes_data, codes_type, dim, code_count);
  Pieces kept = {static_cast<unsigned char*>(prepared_buffer)};
  const Prepared prepared = prepared_in(kept, code_count, dim, cosine != 0);
  const Sizes sizes = sizes_for(features, code_count, dim, tile, found);
  Pieces pieces = {static_cast<unsigned char*>(workspace)};
  const Workspace work = workspace_in(pieces, sizes, dim, cosine != 0);
  const Outputs out = {index, sqdist, quantised, error, usage, effort, alarm};
  for (int64_t first = 0; first < features; first += sizes.rows) {
    const int rows = static_cast<int>(std::min<int64_t>(sizes.rows, features - first));
    const Task task = {z, first, rows, code_count, cosine != 0, prepared, work, sizes.plan};
    const char* why = convert_and_search(task, found, stream);
    if (why == nullptr)
      why = launch(rescan_codes<Small>, sizes.rescan_blocks, kSweepThreads, rescan_bytes<Small>(), stream, z, first,
                   codes, prepared, work, cosine != 0);
    if (why == nullptr)
      why = launch(cosine != 0 ? resolve_codes<true> : resolve_codes<false>, rows, kRowThreads, kFoldBytes, stream, z,
                   first, codes, prepared, work, sizes.rescan_blocks, sizes.rescan_tiles, out);
    if (why != nullptr) return fail("searching the codebook", why);
  }
  return 0;
}

int64_t vqsa_codebook_segment_sum_bytes(int64_t count, int32_t dim) {
  return 2 * divide_up(count, kRunRows) * dim * static_cast<int64_t>(sizeof(double));
}

int vqsa_codebook_segment_sum(const void* z, int32_t z_type, int64_t count, int32_t dim, const int64_t* order,
                              const int32_t* slot, const float* code, const double* scale, void* out, int64_t slots,
                              void* workspace, void* stream_handle) {
  const Stream stream = static_cast<Stream>(stream_handle);
  const Terms terms = {rows_of(z, z_type, dim, count), code, scale};
  const Segments segments = {order, slot, static_cast<double*>(workspace), out, slots};
  const int64_t blocks = divide_up(count, kRunRows) * divide_up(dim, kRowThreads);
  if (blocks > 0x7FFFFFFF || slots > 0x7FFFFFFF)
    return fail("summing segments", "too many features or codes for one launch");
  const char* why = nullptr;
  if (slots > 0) why = launch(clear_rows, static_cast<int>(slots), kRowThreads, 0, stream, terms, segments);
  if (blocks > 0 && why == nullptr) {
    constexpr void (*kSums[])(Terms, Segments) = {sum_runs<Float>, sum_runs<Half>, sum_runs<Bfloat>, sum_runs<Double>};
    why = launch(kSums[z_type], static_cast<int>(blocks), kRowThreads, kRunRows * 12, stream, terms, segments);
  }
  if (blocks > 0 && why == nullptr)
    why = launch(join_runs, static_cast<int>(blocks), kRowThreads, 0, stream, terms, segments);
  return why == nullptr ? 0 : fail("summing segments", why);
}

int vqsa_codebook_products(const void* features, const int32_t* numbers, int32_t rows, const void* codes,
                           int64_t code_count, int32_t pitch, int32_t tile, float* products, void* stream_handle) {
  const Stream stream = static_cast<Stream>(stream_handle);
  const int blocks = static_cast<int>(divide_up(rows, kRowTile));
  const uint16_t* left = static_cast<const uint16_t*>(features);
  const uint16_t* right = static_cast<const uint16_t*>(codes);
  const char* why = nullptr;
  if (tile == VQSA_TILE_HOPPER) {
    Device found;
    TensorMap feature_map, code_map;
    why = device(found);
    if (why == nullptr && found.capability != 90) why = kNotHopper;
    if (why == nullptr) why = load(multiply_hopper);
    if (why == nullptr) why = tensor_map(feature_map, left, rows, pitch, kRowTile);
    if (why == nullptr) why = tensor_map(code_map, right, code_count, pitch, Hopper::kCodes);
    if (why == nullptr)
      why = launch(multiply_hopper, blocks, Hopper::kThreads, kHopperBytes, stream, feature_map, code_map, rows,
                   code_count, pitch, products);
  } else if (tile == VQSA_TILE_WIDE) {
    why = launch(multiply<LargeShort>, blocks, kSweepThreads, LargeShort::kBytes + kRowTile * 4, stream, left, numbers,
                 rows, right, code_count, pitch, products);
  } else {
    why = launch(multiply<Small>, blocks, kSweepThreads, Small::kBytes + kRowTile * 4, stream, left, numbers, rows,
                 right, code_count, pitch, products);
  }
  return why == nullptr ? 0 : fail("multiplying", why);
}

// Copies that complete later: cp.async in groups, TMA with its memory barriers.
//
// VQSA_SHIM_FAULT plants what a device might do wrong, for tests: "lost", the bytes of some TMA loads never arrive;
// "swizzle", TMA leaves the pieces of a row in their places; "alone", blocks cannot run side by side; "foreign", the
// library was built for other devices.
#pragma once

#include "threads.h"

namespace vqsa::codebook {

inline void copy_async_16(void* shared, const void* global, bool valid) {
  std::memset(shared, 0xFF, 16);
#if defined(__SANITIZE_THREAD__)
  if (valid) __tsan_read16(const_cast<void*>(global));  // now or later: what it reads must stand there already
#endif
  this_fiber().groups.back().push_back({shared, global, valid});
}
inline void copy_async_commit() { this_fiber().groups.emplace_back(); }
template <int kPending>
inline void copy_async_wait() {
  auto& groups = this_fiber().groups;
  while (static_cast<int>(groups.size()) - 1 > kPending) {
    for (const shim::Copy& copy : groups.front()) {
      if (copy.valid)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

/// A barrier that counts arrivals and bytes, as Hopper's mbarrier.
struct MemoryBarrier {
  int32_t arrivals, waiting_for, bytes;
  uint32_t phase;
};
NO_TSAN inline void barrier_start(MemoryBarrier* barrier, int arrivals) { *barrier = {arrivals, arrivals, 0, 0}; }
inline void barrier_started() {}
NO_TSAN inline void barrier_check(MemoryBarrier* barrier) {
  if (barrier->waiting_for > 0 || barrier->bytes > 0) return;
  barrier->waiting_for = barrier->arrivals;
  barrier->phase ^= 1;
}
NO_TSAN inline void barrier_arrive(MemoryBarrier* barrier) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(reinterpret_cast<char*>(barrier) + (barrier->phase & 1));
#endif
  --barrier->waiting_for;
  barrier_check(barrier);
}
NO_TSAN inline void barrier_expect(MemoryBarrier* barrier, int bytes) {
  barrier->bytes += bytes;
  barrier_arrive(barrier);
}
NO_TSAN inline bool barrier_wait(MemoryBarrier* barrier, uint32_t parity) {
  for (int round = 0; (barrier->phase & 1) == parity; ++round) {
    if (round > 5000) return false;
    shim::to_scheduler();
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(reinterpret_cast<char*>(barrier) + parity);
#endif
  return true;
}
/// Bytes that TMA has brought.
NO_TSAN inline void barrier_bring(MemoryBarrier* barrier, int bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(reinterpret_cast<char*>(barrier) + (barrier->phase & 1));
#endif
  barrier->bytes -= bytes;
  barrier_check(barrier);
}

inline bool planted(const char* fault) {
  const char* wanted = std::getenv("VQSA_SHIM_FAULT");
  return wanted != nullptr && std::strcmp(wanted, fault) == 0;
}

struct TensorMap {
  const uint16_t* data;
  int64_t rows;
  int pitch;
};
inline const char* tensor_map(TensorMap& out, const uint16_t* data, int64_t rows, int pitch, int) {
  out = {data, rows, pitch};
  return shim::has_context() ? nullptr : "this thread has no context";
}
/// 64 halves of `count` rows, the pieces of a row exchanged as TMA's 128-byte swizzle does; zeros outside.
inline void load_tile(unsigned char* to, const TensorMap& map, MemoryBarrier* barrier, int column, int row, int count) {
  const bool swizzle = !planted("swizzle");
  for (int r = 0; r < count; ++r)
    for (int piece = 0; piece < 8; ++piece) {
      unsigned char* where = to + r * 128 + ((piece ^ (swizzle ? r & 7 : 0)) << 4);
      if (row + r < map.rows && column + piece * 8 < map.pitch)
        std::memcpy(where, map.data + (row + r) * int64_t(map.pitch) + column + piece * 8, 16);
      else
        std::memset(where, 0, 16);
    }
  if (column == 64 && planted("lost"))
    std::memset(to, 0, count * 128);
  else
    barrier_bring(barrier, count * 128);
}

}  // namespace vqsa::codebook

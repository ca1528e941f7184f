// The thread model of CUDA on a CPU, so that tests can run the kernels where there is no GPU.
//
// Every thread of a block is a fiber; blocks run one after another. A fiber runs until it reaches a barrier
// or an instruction of the whole warp (shuffle, ldmatrix, mma), which happens once all have arrived. What
// hardware leaves open is made hostile: shared memory starts as NaN; cp.async spoils its destination when it
// is issued and delivers when it is waited for, the latest moment allowed; mma rounds towards zero after
// every eight products, as the worst of the tensor cores seen so far. ThreadSanitizer is told about the
// fibers and learns of order only from barriers, so that it finds a missing one; AddressSanitizer works too.
#pragma once

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read16(void* address);
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void vqsa_shim_switch(void** save, void* load);
asm(R"(
.text
.type vqsa_shim_switch, @function
.globl vqsa_shim_switch
.hidden vqsa_shim_switch
vqsa_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vqsa_shim_switch, .-vqsa_shim_switch
)");

#define NO_TSAN __attribute__((no_sanitize("thread")))

namespace shim {

constexpr size_t kStackBytes = 256 * 1024;
enum class State { ready, at_warp, at_block, done };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Product {  // a wgmma that has been issued
  float* acc;
  const unsigned char* a;
  const unsigned char* b;
  int k;
  bool add;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  int thread = 0;
  std::vector<std::vector<Copy>> groups;       // cp.async, oldest first; the last one is still open
  std::vector<std::vector<Product>> products;  // wgmma, likewise
#if defined(__SANITIZE_THREAD__)
  void* tsan = __tsan_create_fiber(0);
#endif
};

/// Where ThreadSanitizer learns of a barrier's order: one address for the even rounds and one for the odd, since a
/// thread that wakes late must not learn from one that is at the next barrier already.
struct Rounds {
  int round = 0;
  char address[2] = {0, 0};
  NO_TSAN char* now() { return &address[round & 1]; }
};

struct Warp {
  int arrived = 0;
  void* slots[32];
  Rounds sync;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  int threads = 0, block = 0, blocks = 0, arrived = 0;
  char start = 0, end = 0;
  Rounds sync;
  unsigned char* shared = nullptr;
  std::function<void()> body;
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#endif
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

NO_TSAN inline void to_scheduler(bool last = false) {
  Machine& m = machine();
  Fiber* self = m.current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, m.stack_bottom, m.stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(m.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  (void)last;
  vqsa_shim_switch(&self->stack_pointer, m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &m.stack_bottom, &m.stack_size);
#endif
}

NO_TSAN inline void entry() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.stack_bottom, &m.stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&m.start);
#endif
  m.body();
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&m.end);
#endif
  m.current->state = State::done;
  to_scheduler(true);
  std::abort();
}

NO_TSAN inline void resume(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  vqsa_shim_switch(&m.scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

NO_TSAN inline void run_block(int block, int blocks, int threads, size_t shared_bytes) {
  Machine& m = machine();
  // Exactly as large as asked for: one byte too far is seen by AddressSanitizer.
  std::unique_ptr<unsigned char, decltype(&std::free)> shared(
      static_cast<unsigned char*>(std::aligned_alloc(128, std::max<size_t>(128, (shared_bytes + 127) / 128 * 128))), &std::free);
  std::memset(shared.get(), 0xFF, shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  const size_t rounded = std::max<size_t>(128, (shared_bytes + 127) / 128 * 128);
  __asan_poison_memory_region(shared.get() + shared_bytes, rounded - shared_bytes);
#endif
  m.shared = shared.get();
  m.block = block;
  m.blocks = blocks;
  m.threads = threads;
  m.arrived = 0;
  while (static_cast<int>(m.fibers.size()) < threads) {
    m.fibers.push_back(std::make_unique<Fiber>());
    m.fibers.back()->stack.reset(new char[kStackBytes]);
  }
  m.warps.assign(threads / 32, Warp());
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = *m.fibers[t];
    fiber.thread = t;
    fiber.state = State::ready;
    fiber.groups.assign(1, {});
    fiber.products.assign(1, {});
    // As if `entry` had been called: the stack pointer is 8 short of a multiple of 16 at its first instruction.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStackBytes) & ~uintptr_t(15));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
  }
#if defined(__SANITIZE_THREAD__)
  m.tsan = __tsan_get_current_fiber();
  __tsan_release(&m.start);
#endif
  for (int running = threads; running > 0;) {
    bool moved = false;
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = *m.fibers[t];
      if (fiber.state != State::ready) continue;
      resume(fiber);
      moved = true;
      if (fiber.state == State::done) --running;
    }
    if (!moved) {
      std::fprintf(stderr, "host shim: block %d hangs: threads wait at different barriers\n", block);
      std::abort();
    }
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&m.end);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(shared.get() + shared_bytes, rounded - shared_bytes);
#endif
}

/// Runs `act(slots)` once when all 32 lanes have arrived with their slot; the last to arrive runs it.
template <class Act>
NO_TSAN inline void warp_collective(void* slot, Act act) {
  Machine& m = machine();
  Fiber* self = m.current;
  Warp& warp = m.warps[self->thread / 32];
  warp.slots[self->thread % 32] = slot;
  if (++warp.arrived < 32) {
    self->state = State::at_warp;
    to_scheduler();
    return;
  }
  warp.arrived = 0;
  act(warp.slots);
  const int first = self->thread / 32 * 32;
  for (int t = first; t < first + 32; ++t) m.fibers[t]->state = State::ready;
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  float value;
  if (exponent == 0) {
    value = std::ldexp(float(fraction), -24);
  } else {
    const uint32_t word = exponent == 31 ? 0x7F800000u | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
    std::memcpy(&value, &word, 4);
  }
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word |= sign;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint16_t sign = uint16_t(word >> 16 & 0x8000);
  word &= 0x7FFFFFFF;
  if (word >= 0x7F800000) return uint16_t(sign | (word > 0x7F800000 ? 0x7E00 : 0x7C00));
  if (word >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65520 and more round to infinity
  if (word < 0x38800000) {                                 // below the normal range
    float magnitude;
    std::memcpy(&magnitude, &word, 4);
    return uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(magnitude, 24))));
  }
  word += 0xFFF + (word >> 13 & 1);
  return uint16_t(sign | ((word - 0x38000000) >> 13));
}

inline const float* half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (int i = 0; i < 65536; ++i) t[i] = half_to_float(uint16_t(i));
    return t;
  }();
  return table.data();
}

/// The float nearest to `value` on the side of zero.
inline float towards_zero(double value) {
  float rounded = float(value);
  if (std::fabs(double(rounded)) > std::fabs(value)) rounded = std::nextafter(rounded, 0.0f);
  return rounded;
}

}  // namespace shim

#define VQ_DEVICE inline
#define VQ_KERNEL(threads) inline void
#define VQ_CONSTANT const

namespace vqsa::codebook {

using Stream = void*;
using std::isfinite;

NO_TSAN inline int thread_index() { return shim::machine().current->thread; }
NO_TSAN inline int thread_count() { return shim::machine().threads; }
NO_TSAN inline int block_index() { return shim::machine().block; }
NO_TSAN inline int block_count() { return shim::machine().blocks; }
NO_TSAN inline unsigned char* shared_memory() { return shim::machine().shared; }

NO_TSAN inline void block_sync() {
  shim::Machine& m = shim::machine();
  shim::Fiber* self = m.current;
#if defined(__SANITIZE_THREAD__)
  char* sync = m.sync.now();
  __tsan_release(sync);
#endif
  if (++m.arrived < m.threads) {
    self->state = shim::State::at_block;
    shim::to_scheduler();
  } else {
    m.arrived = 0;
    ++m.sync.round;
    for (int t = 0; t < m.threads; ++t) m.fibers[t]->state = shim::State::ready;
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(sync);
#endif
}

NO_TSAN inline void warp_sync() {
#if defined(__SANITIZE_THREAD__)
  char* sync = shim::machine().warps[thread_index() / 32].sync.now();
  __tsan_release(sync);
#endif
  shim::Rounds* rounds = &shim::machine().warps[thread_index() / 32].sync;
  shim::warp_collective(nullptr, [rounds](void**) NO_TSAN { ++rounds->round; });
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(sync);
#endif
}

template <class T>
NO_TSAN inline T shuffle_xor(T value, int mask) {
  struct Slot {
    T in, out;
    int mask;
  } slot = {value, value, mask};
  shim::warp_collective(&slot, [](void** slots) NO_TSAN {
    for (int lane = 0; lane < 32; ++lane) {
      Slot* own = static_cast<Slot*>(slots[lane]);
      own->out = static_cast<Slot*>(slots[lane ^ own->mask])->in;
    }
  });
  return slot.out;
}

NO_TSAN inline void load_matrix_x4(uint32_t (&out)[4], const void* shared) {
  struct Slot {
    uint16_t row[8];
    uint32_t out[4];
  } slot;
#if defined(__SANITIZE_THREAD__)
  __tsan_read16(const_cast<void*>(shared));
#endif
  std::memcpy(slot.row, shared, 16);
  shim::warp_collective(&slot, [](void** slots) NO_TSAN {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const Slot* from = static_cast<Slot*>(slots[matrix * 8 + lane / 4]);
        std::memcpy(&static_cast<Slot*>(slots[lane])->out[matrix], &from->row[lane % 4 * 2], 4);
      }
    }
  });
  std::memcpy(out, slot.out, 16);
}

/// acc += A·Bᵀ of the warp's tile, fragment for fragment as mma.m16n8k16 has them.
template <int MT, int NT>
NO_TSAN inline void warp_mma(float (&acc)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2]) {
  struct Slot {
    float (*acc)[NT][4];
    const uint32_t (*a)[4];
    const uint32_t (*b)[2];
  } slot = {acc, a, b};
  shim::warp_collective(&slot, [](void** slots) NO_TSAN {
    const float* table = shim::half_table();
    static thread_local double left[MT * 16][16], right[16][NT * 8];
    for (int lane = 0; lane < 32; ++lane) {
      const Slot* own = static_cast<Slot*>(slots[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        const int shift = 16 * half;
        for (int i = 0; i < MT; ++i) {
          left[i * 16 + group][pair + half] = table[own->a[i][0] >> shift & 0xFFFF];
          left[i * 16 + group + 8][pair + half] = table[own->a[i][1] >> shift & 0xFFFF];
          left[i * 16 + group][pair + 8 + half] = table[own->a[i][2] >> shift & 0xFFFF];
          left[i * 16 + group + 8][pair + 8 + half] = table[own->a[i][3] >> shift & 0xFFFF];
        }
        for (int j = 0; j < NT; ++j) {
          right[pair + half][j * 8 + group] = table[own->b[j][0] >> shift & 0xFFFF];
          right[pair + 8 + half][j * 8 + group] = table[own->b[j][1] >> shift & 0xFFFF];
        }
      }
    }
    double sum[NT * 8];
    for (int row = 0; row < MT * 16; ++row) {
      auto element = [&](int column) -> float& {
        const Slot* owner = static_cast<Slot*>(slots[row % 8 * 4 + column % 8 / 2]);
        return owner->acc[row / 16][column / 8][(row % 16 / 8) * 2 + column % 2];
      };
      for (int column = 0; column < NT * 8; ++column) sum[column] = element(column);
      for (int first = 0; first < 16; first += 8) {
        for (int k = first; k < first + 8; ++k)
          for (int column = 0; column < NT * 8; ++column) sum[column] += left[row][k] * right[k][column];
        for (int column = 0; column < NT * 8; ++column) sum[column] = shim::towards_zero(sum[column]);
      }
      for (int column = 0; column < NT * 8; ++column) element(column) = float(sum[column]);
    }
  });
}

NO_TSAN inline shim::Fiber& this_fiber() { return *shim::machine().current; }
inline void copy_async_16(void* shared, const void* global, bool valid) {
  std::memset(shared, 0xFF, 16);
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
NO_TSAN inline void barrier_wait(MemoryBarrier* barrier, uint32_t parity) {
  for (int round = 0; (barrier->phase & 1) == parity; ++round) {
    if (round > 1000000) {
      std::fprintf(stderr, "host shim: block %d hangs at a memory barrier\n", block_index());
      std::abort();
    }
    shim::to_scheduler();
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(reinterpret_cast<char*>(barrier) + parity);
#endif
}
/// Bytes that TMA has brought.
NO_TSAN inline void barrier_bring(MemoryBarrier* barrier, int bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(reinterpret_cast<char*>(barrier) + (barrier->phase & 1));
#endif
  barrier->bytes -= bytes;
  barrier_check(barrier);
}

struct TensorMap {
  const uint16_t* data;
  int64_t rows;
  int pitch;
};
inline const char* tensor_map(TensorMap& out, const uint16_t* data, int64_t rows, int pitch, int) {
  out = {data, rows, pitch};
  return nullptr;
}
/// 64 halves of `count` rows, the pieces of a row exchanged as TMA's 128-byte swizzle does; zeros outside.
inline void load_tile(unsigned char* to, const TensorMap& map, MemoryBarrier* barrier, int column, int row, int count) {
  for (int r = 0; r < count; ++r)
    for (int piece = 0; piece < 8; ++piece) {
      unsigned char* where = to + r * 128 + ((piece ^ (r & 7)) << 4);
      if (row + r < map.rows && column + piece * 8 < map.pitch)
        std::memcpy(where, map.data + (row + r) * int64_t(map.pitch) + column + piece * 8, 16);
      else
        std::memset(where, 0, 16);
    }
  barrier_bring(barrier, count * 128);
}

inline void wgmma_begin() {}
inline void wgmma_64x256x16(float (&acc)[32][4], const unsigned char* a, const unsigned char* b, int k, bool add) {
  this_fiber().products.back().push_back({&acc[0][0], a, b, k, add});
}
inline void wgmma_commit() { this_fiber().products.emplace_back(); }
/// Carries the products out, as late as they may be; each thread its own part.
template <int kPending>
inline void wgmma_wait(float (&)[32][4]) {
  auto& products = this_fiber().products;
  const float* table = shim::half_table();
  const int lane = thread_index() % 32, warp = thread_index() / 32 % 4;
  while (static_cast<int>(products.size()) - 1 > kPending) {
    for (const shim::Product& p : products.front()) {
      auto values = [&](const unsigned char* tile, int row, double (&out)[16]) {
        for (int half = 0; half < 2; ++half) {
          uint16_t bits[8];
          std::memcpy(bits, tile + row * 128 + (((p.k * 2 + half) ^ (row & 7)) << 4), 16);
          for (int i = 0; i < 8; ++i) out[half * 8 + i] = table[bits[i]];
        }
      };
      double left[2][16], right[16];
      for (int h = 0; h < 2; ++h) values(p.a, warp * 16 + lane / 4 + h * 8, left[h]);
      for (int column = 0; column < 64; ++column) {
        values(p.b, column / 2 * 8 + lane % 4 * 2 + column % 2, right);
        for (int h = 0; h < 2; ++h) {
          float& element = p.acc[column / 2 * 4 + h * 2 + column % 2];
          double sum = p.add ? element : 0.0;
          for (int first = 0; first < 16; first += 8) {
            for (int i = first; i < first + 8; ++i) sum += left[h][i] * right[i];
            sum = shim::towards_zero(sum);
          }
          element = float(sum);
        }
      }
    }
    products.erase(products.begin());
  }
}
template <int kCount>
inline void fewer_registers() {}
template <int kCount>
inline void more_registers() {}
inline unsigned char* align_shared(unsigned char* pointer, size_t to) {
  return pointer + (to - reinterpret_cast<uintptr_t>(pointer) % to) % to;
}

inline uint32_t atomic_min(uint32_t* where, uint32_t value) {
  uint32_t before = __atomic_load_n(where, __ATOMIC_RELAXED);
  __atomic_store_n(where, std::min(before, value), __ATOMIC_RELAXED);
  return before;
}
inline uint32_t atomic_max(uint32_t* where, uint32_t value) {
  uint32_t before = __atomic_load_n(where, __ATOMIC_RELAXED);
  __atomic_store_n(where, std::max(before, value), __ATOMIC_RELAXED);
  return before;
}
inline int32_t atomic_add(int32_t* where, int32_t value) { return __atomic_fetch_add(where, value, __ATOMIC_RELAXED); }
inline void atomic_add(int64_t* where, int64_t value) { __atomic_fetch_add(where, value, __ATOMIC_RELAXED); }
inline void atomic_or(uint32_t* where, uint32_t value) { __atomic_fetch_or(where, value, __ATOMIC_RELAXED); }
inline int32_t atomic_exchange(int32_t* where, int32_t value) {
  return __atomic_exchange_n(where, value, __ATOMIC_RELAXED);
}
template <class T>
inline T atomic_read(const T* where) {
  return __atomic_load_n(where, __ATOMIC_RELAXED);
}

inline void forget(int&) {}
inline int first_bit(uint32_t word) { return __builtin_ctz(word); }
inline float half_to_float(uint16_t bits) { return shim::half_table()[bits]; }
inline uint16_t float_to_half(float value) { return shim::float_to_half(value); }
inline uint32_t float_bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}
inline float bits_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), int blocks, int threads, size_t shared_bytes, Stream, A... arguments) {
  shim::machine().body = [=] { kernel(arguments...); };
  for (int block = 0; block < blocks; ++block) shim::run_block(block, blocks, threads, shared_bytes);
  return nullptr;
}

struct Device {
  int multiprocessors, shared_bytes, capability;
};
inline const char* device(Device& out) {
  const char* multiprocessors = std::getenv("VQSA_SHIM_MULTIPROCESSORS");
  out = {multiprocessors == nullptr ? 4 : std::atoi(multiprocessors), 227 * 1024, 90};
  return nullptr;
}

}  // namespace vqsa::codebook

// The threads of a block as fibers of one CPU thread, with what they meet at: barriers and whole-warp instructions.
// Blocks run one after another, or side by side where the launch says so, since these may wait for each other.
//
// ThreadSanitizer is told about the fibers and learns of order only from barriers, so that it finds a missing one;
// AddressSanitizer knows their stacks and the exact size of shared memory.
#pragma once

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
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
enum class State { ready, at_warp, at_block, at_grid, done };

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

struct Block;

struct Fiber {
  Block* block = nullptr;
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

struct Block {
  int number = 0, arrived = 0;
  std::unique_ptr<Fiber>* fibers = nullptr;  // those of its threads
  std::vector<Warp> warps;
  Rounds sync;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> resident;  // those that run side by side
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  int threads = 0, blocks = 0, arrived = 0;
  char start = 0, end = 0;
  Rounds sync;  // of the grid
  std::function<void()> body;
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#endif
};

/// As on a device: a thread has a context once it has launched or loaded a kernel.
inline bool& has_context() {
  static thread_local bool instance = false;
  return instance;
}

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

/// Exactly as large as asked for: one byte too far is seen by AddressSanitizer.
NO_TSAN inline size_t room_for(size_t bytes) { return std::max<size_t>(128, (bytes + 127) / 128 * 128); }

NO_TSAN inline void start_block(Block& block, int number, std::unique_ptr<Fiber>* fibers, int threads,
                                size_t shared_bytes) {
  block.number = number;
  block.fibers = fibers;
  block.warps.assign(threads / 32, Warp());
  block.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(128, room_for(shared_bytes))));
  std::memset(block.shared.get(), 0xFF, shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.shared.get() + shared_bytes, room_for(shared_bytes) - shared_bytes);
#endif
  for (int t = 0; t < threads; ++t) {
    if (fibers[t] == nullptr) {
      fibers[t] = std::make_unique<Fiber>();
      fibers[t]->stack.reset(new char[kStackBytes]);
    }
    Fiber& fiber = *fibers[t];
    fiber.block = &block;
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
}

/// Runs blocks first … first + count - 1 of a launch side by side.
NO_TSAN inline void run_blocks(int first, int count, int blocks, int threads, size_t shared_bytes) {
  Machine& m = machine();
  m.blocks = blocks;
  m.threads = threads;
  m.arrived = 0;
  m.fibers.resize(std::max(m.fibers.size(), static_cast<size_t>(count) * threads));
  m.resident = std::vector<Block>(count);
  for (int b = 0; b < count; ++b) start_block(m.resident[b], first + b, &m.fibers[b * threads], threads, shared_bytes);
#if defined(__SANITIZE_THREAD__)
  m.tsan = __tsan_get_current_fiber();
  __tsan_release(&m.start);
#endif
  for (int running = count * threads; running > 0;) {
    bool moved = false;
    for (int t = 0; t < count * threads; ++t) {
      Fiber& fiber = *m.fibers[t];
      if (fiber.state != State::ready) continue;
      resume(fiber);
      moved = true;
      if (fiber.state == State::done) --running;
    }
    if (!moved) {
      std::fprintf(stderr, "host shim: block %d or one beside it hangs: threads wait at different barriers\n", first);
      std::abort();
    }
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&m.end);
#endif
#if defined(__SANITIZE_ADDRESS__)
  for (Block& block : m.resident)
    __asan_unpoison_memory_region(block.shared.get() + shared_bytes, room_for(shared_bytes) - shared_bytes);
#endif
}

/// Runs `act(slots)` once when all 32 lanes have arrived with their slot; the last to arrive runs it.
template <class Act>
NO_TSAN inline void warp_collective(void* slot, Act act) {
  Fiber* self = machine().current;
  Warp& warp = self->block->warps[self->thread / 32];
  warp.slots[self->thread % 32] = slot;
  if (++warp.arrived < 32) {
    self->state = State::at_warp;
    to_scheduler();
    return;
  }
  warp.arrived = 0;
  act(warp.slots);
  const int first = self->thread / 32 * 32;
  for (int t = first; t < first + 32; ++t) self->block->fibers[t]->state = State::ready;
}

}  // namespace shim

namespace vqsa::codebook {

NO_TSAN inline shim::Fiber& this_fiber() { return *shim::machine().current; }
NO_TSAN inline int thread_index() { return shim::machine().current->thread; }
NO_TSAN inline int thread_count() { return shim::machine().threads; }
NO_TSAN inline int block_index() { return this_fiber().block->number; }
NO_TSAN inline int block_count() { return shim::machine().blocks; }
NO_TSAN inline unsigned char* shared_memory() { return this_fiber().block->shared.get(); }

NO_TSAN inline void block_sync() {
  shim::Fiber* self = shim::machine().current;
  shim::Block* block = self->block;
#if defined(__SANITIZE_THREAD__)
  char* sync = block->sync.now();
  __tsan_release(sync);
#endif
  if (++block->arrived < thread_count()) {
    self->state = shim::State::at_block;
    shim::to_scheduler();
  } else {
    block->arrived = 0;
    ++block->sync.round;
    for (int t = 0; t < thread_count(); ++t) block->fibers[t]->state = shim::State::ready;
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(sync);
#endif
}

/// Waits for every thread of a launch whose blocks run side by side.
NO_TSAN inline void grid_sync() {
  shim::Machine& m = shim::machine();
  if (static_cast<int>(m.resident.size()) != m.blocks) {
    std::fprintf(stderr, "host shim: blocks of an ordinary launch wait for each other\n");
    std::abort();
  }
#if defined(__SANITIZE_THREAD__)
  char* sync = m.sync.now();
  __tsan_release(sync);
#endif
  const int all = m.blocks * m.threads;
  if (++m.arrived < all) {
    m.current->state = shim::State::at_grid;
    shim::to_scheduler();
  } else {
    m.arrived = 0;
    ++m.sync.round;
    for (int t = 0; t < all; ++t) m.fibers[t]->state = shim::State::ready;
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(sync);
#endif
}

NO_TSAN inline void warp_sync() {
#if defined(__SANITIZE_THREAD__)
  char* sync = this_fiber().block->warps[thread_index() / 32].sync.now();
  __tsan_release(sync);
#endif
  shim::Rounds* rounds = &this_fiber().block->warps[thread_index() / 32].sync;
  shim::warp_collective(nullptr, [rounds](void**) NO_TSAN { ++rounds->round; });
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(sync);
#endif
}

NO_TSAN inline bool warp_all(bool mine) {
  struct Slot {
    bool in, out;
  } slot = {mine, mine};
  shim::warp_collective(&slot, [](void** slots) NO_TSAN {
    bool all = true;
    for (int lane = 0; lane < 32; ++lane) all = all && static_cast<Slot*>(slots[lane])->in;
    for (int lane = 0; lane < 32; ++lane) static_cast<Slot*>(slots[lane])->out = all;
  });
  return slot.out;
}

NO_TSAN inline double shuffle_down(double value, int by) {
  struct Slot {
    double in, out;
    int by;
  } slot = {value, value, by};
  shim::warp_collective(&slot, [](void** slots) NO_TSAN {
    for (int lane = 0; lane < 32; ++lane) {
      Slot* own = static_cast<Slot*>(slots[lane]);
      if (lane + own->by < 32) own->out = static_cast<Slot*>(slots[lane + own->by])->in;
    }
  });
  return slot.out;
}
NO_TSAN inline double shuffle_first(double value) {
  shim::warp_collective(&value, [](void** slots) NO_TSAN {
    for (int lane = 1; lane < 32; ++lane) *static_cast<double*>(slots[lane]) = *static_cast<double*>(slots[0]);
  });
  return value;
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

}  // namespace vqsa::codebook

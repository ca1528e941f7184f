// CUDA on a CPU, so that tests can run the kernels where there is no GPU: what device.h has for a device.
//
// Every thread of a block is a fiber; blocks run one after another, those of `launch_together` side by side. A
// fiber runs until it reaches a barrier or an instruction of the whole warp (shuffle, ldmatrix, mma), which happens
// once all have arrived. What hardware leaves open is made hostile: shared memory starts as NaN; cp.async spoils its
// destination when it is issued and delivers when it is waited for, the latest moment allowed; mma rounds towards zero
// after every eight products, as the worst of the tensor cores seen so far.
#pragma once

#include "copies.h"
#include "tensor_cores.h"

#define VQ_DEVICE inline
#define VQ_KERNEL(threads, blocks) inline void
#define VQ_CONSTANT const

namespace vqsa::codebook {

using Stream = void*;
using std::isfinite;

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

inline uint32_t upper_word(double value) {
  uint64_t word;
  std::memcpy(&word, &value, 8);
  return static_cast<uint32_t>(word >> 32);
}

/// As CUDA has it: only from and to addresses that are a multiple of as many bytes.
inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  std::fprintf(stderr, "host shim: %zu bytes at once from or to %p\n", bytes, address);
  std::abort();
}
template <int kCount>
inline void load_words(uint32_t (&words)[kCount], const void* from) {
  check_aligned(from, sizeof(words));
  std::memcpy(words, from, sizeof(words));
}
inline void load_doubles(double (&values)[4], const double* from) {
  check_aligned(from, 16);
  std::memcpy(values, from, sizeof(values));
}
template <int kCount>
inline void store_words(void* to, const uint32_t (&words)[kCount]) {
  check_aligned(to, sizeof(words));
  std::memcpy(to, words, sizeof(words));
}

/// For AddressSanitizer: what is asked for has to be there.
inline void prefetch(const void* global) { (void)*static_cast<const volatile unsigned char*>(global); }

template <class... P>
const char* load(void (*)(P...)) {
  shim::has_context() = true;
  return planted("foreign") ? "no code for this device" : nullptr;
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), int blocks, int threads, size_t shared_bytes, Stream, A... arguments) {
  shim::has_context() = true;
  shim::machine().body = [=] { kernel(arguments...); };
  for (int block = 0; block < blocks; ++block) shim::run_blocks(block, 1, blocks, threads, shared_bytes);
  return nullptr;
}

struct Device {
  int multiprocessors, shared_bytes, l2_bytes, capability;
  bool together;
};
inline const char* device(Device& out) {
  const char* multiprocessors = std::getenv("VQSA_SHIM_MULTIPROCESSORS");
  out = {multiprocessors == nullptr ? 4 : std::atoi(multiprocessors), 227 * 1024, 50 << 20, 90,
         !planted("alone")};
  return nullptr;
}

template <class... P, class... A>
bool launch_together(const char*& why, const Device& device, void (*kernel)(P...), int blocks, int threads,
                     size_t shared_bytes, Stream, A... arguments) {
  why = nullptr;
  if (!device.together || blocks > device.multiprocessors) return false;
  shim::has_context() = true;
  shim::machine().body = [=] { kernel(arguments...); };
  shim::run_blocks(0, blocks, blocks, threads, shared_bytes);
  return true;
}

}  // namespace vqsa::codebook

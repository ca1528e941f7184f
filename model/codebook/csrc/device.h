// The instructions that the kernels use: CUDA's own, or the same on the CPU (host_shim.h) for tests.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(VQSA_HOST_SHIM)
#include "host_shim.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define VQ_DEVICE __device__ __forceinline__
#define VQ_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)

namespace vqsa::codebook {

using Stream = cudaStream_t;

VQ_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
VQ_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
VQ_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
VQ_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
VQ_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

VQ_DEVICE void block_sync() { __syncthreads(); }
VQ_DEVICE void warp_sync() { __syncwarp(); }

template <class T>
VQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

VQ_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

VQ_DEVICE void load_matrix_x4(uint32_t (&out)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared))
               : "memory");
}

/// acc += A·Bᵀ of the warp's tile: MT × NT products of 16×16 and 8×16 halves, accumulated in float32.
template <int MT, int NT>
VQ_DEVICE void warp_mma(float (&acc)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2]) {
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      float(&c)[4] = acc[i][j];
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
    }
  }
}

/// Copies 16 bytes to shared memory some time before the wait; zeros where not valid (`global` stays unread).
VQ_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
VQ_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
VQ_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

VQ_DEVICE uint32_t atomic_min(uint32_t* where, uint32_t value) { return atomicMin(where, value); }
VQ_DEVICE uint32_t atomic_max(uint32_t* where, uint32_t value) { return atomicMax(where, value); }
VQ_DEVICE int32_t atomic_add(int32_t* where, int32_t value) { return atomicAdd(where, value); }
VQ_DEVICE void atomic_add(int64_t* where, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(where), static_cast<unsigned long long>(value));
}
VQ_DEVICE void atomic_or(uint32_t* where, uint32_t value) { atomicOr(where, value); }
VQ_DEVICE int32_t atomic_exchange(int32_t* where, int32_t value) { return atomicExch(where, value); }
template <class T>
VQ_DEVICE T atomic_read(const T* where) {
  return *static_cast<const volatile T*>(where);
}

VQ_DEVICE int first_bit(uint32_t word) { return __ffs(static_cast<int>(word)) - 1; }
VQ_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
VQ_DEVICE uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
VQ_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
VQ_DEVICE float bits_float(uint32_t word) { return __uint_as_float(word); }

template <class... P, class... A>
const char* launch(void (*kernel)(P...), int blocks, int threads, size_t shared_bytes, Stream stream, A... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<blocks, threads, shared_bytes, stream>>>(static_cast<P>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

/// What the choice of tiles depends on.
struct Device {
  int multiprocessors, shared_bytes;
};
inline const char* device(Device& out) {
  int number = 0;
  cudaError_t error = cudaGetDevice(&number);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&out.multiprocessors, cudaDevAttrMultiProcessorCount, number);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&out.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vqsa::codebook

#endif

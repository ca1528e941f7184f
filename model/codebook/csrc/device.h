// The instructions that the kernels use: CUDA's own, or the same on the CPU (shim/) for tests.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(VQSA_HOST_SHIM)
#include "shim/cuda.h"
#else

#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>

#define VQ_DEVICE __device__ __forceinline__
/// Threads of a block, and how many blocks a multiprocessor has to have registers for.
#define VQ_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

#define VQ_CONSTANT const __grid_constant__
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VQ_NO_HOPPER
#endif

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
/// Waits for every thread of a `launch_together`; what they wrote before is seen after it.
VQ_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }
/// Asks for the line at `global` to be brought to L2, and does not wait for it.
VQ_DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }
VQ_DEVICE bool warp_all(bool mine) { return __all_sync(0xFFFFFFFFu, mine) != 0; }

template <class T>
VQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

VQ_DEVICE double shuffle_down(double value, int by) { return __shfl_down_sync(0xFFFFFFFFu, value, by); }
VQ_DEVICE double shuffle_first(double value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

/// Two or four words at once, from and to an address that is a multiple of as many bytes.
VQ_DEVICE void load_words(uint32_t (&words)[2], const void* from) {
  const uint2 two = *static_cast<const uint2*>(from);
  words[0] = two.x, words[1] = two.y;
}
VQ_DEVICE void load_words(uint32_t (&words)[4], const void* from) {
  const uint4 four = *static_cast<const uint4*>(from);
  words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
}
VQ_DEVICE void load_doubles(double (&values)[4], const double* from) {
  const double2 low = reinterpret_cast<const double2*>(from)[0], high = reinterpret_cast<const double2*>(from)[1];
  values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
}
VQ_DEVICE void store_words(void* to, const uint32_t (&words)[2]) { *static_cast<uint2*>(to) = {words[0], words[1]}; }
VQ_DEVICE void store_words(void* to, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
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

// Hopper. A barrier counts arrivals and the bytes that TMA has still to bring; its phase changes when both are in.
struct alignas(8) MemoryBarrier {
  uint64_t state;
};
using TensorMap = CUtensorMap;
#if !defined(VQ_NO_HOPPER)
VQ_DEVICE void barrier_start(MemoryBarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
VQ_DEVICE void barrier_started() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
VQ_DEVICE void barrier_arrive(MemoryBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
VQ_DEVICE void barrier_expect(MemoryBarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
VQ_DEVICE bool barrier_passed(MemoryBarrier* barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(passed)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return passed != 0;
}
/// False if the phase does not change within about a second, where microseconds are usual.
VQ_DEVICE bool barrier_wait(MemoryBarrier* barrier, uint32_t parity) {
  if (barrier_passed(barrier, parity)) return true;
  const long long began = clock64();
  while (!barrier_passed(barrier, parity))
    if (clock64() - began > 1ll << 31) return false;
  return true;
}
/// 64 halves of `count` rows (the map's box), swizzled by 128 bytes; zeros outside the matrix.
VQ_DEVICE void load_tile(unsigned char* to, const TensorMap& map, MemoryBarrier* barrier, int column, int row, int) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

/// Rows of 128 bytes in atoms of 8 rows (1,024 bytes), swizzled by 128 bytes; the k-th 16 halves of each row.
VQ_DEVICE uint64_t matrix_descriptor(const unsigned char* tile, int k) {
  const uint64_t start = (shared_address(tile) + k * 32) >> 4 & 0x3FFF;
  return start | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
VQ_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
VQ_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
VQ_DEVICE void wgmma_wait(float (&acc)[32][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int j = 0; j < 32; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(acc[j][c])::"memory");
}
/// acc = A·Bᵀ (+ acc) for the warpgroup's 64 features and 256 codes.
VQ_DEVICE void wgmma_64x256x16(float (&acc)[32][4], const unsigned char* a, const unsigned char* b, int k, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, add, 1, 1, 0, 0;\n}"
      : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]), "+f"(acc[1][0]), "+f"(acc[1][1]), "+f"(acc[1][2]), "+f"(acc[1][3]),
        "+f"(acc[2][0]), "+f"(acc[2][1]), "+f"(acc[2][2]), "+f"(acc[2][3]), "+f"(acc[3][0]), "+f"(acc[3][1]), "+f"(acc[3][2]), "+f"(acc[3][3]),
        "+f"(acc[4][0]), "+f"(acc[4][1]), "+f"(acc[4][2]), "+f"(acc[4][3]), "+f"(acc[5][0]), "+f"(acc[5][1]), "+f"(acc[5][2]), "+f"(acc[5][3]),
        "+f"(acc[6][0]), "+f"(acc[6][1]), "+f"(acc[6][2]), "+f"(acc[6][3]), "+f"(acc[7][0]), "+f"(acc[7][1]), "+f"(acc[7][2]), "+f"(acc[7][3]),
        "+f"(acc[8][0]), "+f"(acc[8][1]), "+f"(acc[8][2]), "+f"(acc[8][3]), "+f"(acc[9][0]), "+f"(acc[9][1]), "+f"(acc[9][2]), "+f"(acc[9][3]),
        "+f"(acc[10][0]), "+f"(acc[10][1]), "+f"(acc[10][2]), "+f"(acc[10][3]), "+f"(acc[11][0]), "+f"(acc[11][1]), "+f"(acc[11][2]), "+f"(acc[11][3]),
        "+f"(acc[12][0]), "+f"(acc[12][1]), "+f"(acc[12][2]), "+f"(acc[12][3]), "+f"(acc[13][0]), "+f"(acc[13][1]), "+f"(acc[13][2]), "+f"(acc[13][3]),
        "+f"(acc[14][0]), "+f"(acc[14][1]), "+f"(acc[14][2]), "+f"(acc[14][3]), "+f"(acc[15][0]), "+f"(acc[15][1]), "+f"(acc[15][2]), "+f"(acc[15][3]),
        "+f"(acc[16][0]), "+f"(acc[16][1]), "+f"(acc[16][2]), "+f"(acc[16][3]), "+f"(acc[17][0]), "+f"(acc[17][1]), "+f"(acc[17][2]), "+f"(acc[17][3]),
        "+f"(acc[18][0]), "+f"(acc[18][1]), "+f"(acc[18][2]), "+f"(acc[18][3]), "+f"(acc[19][0]), "+f"(acc[19][1]), "+f"(acc[19][2]), "+f"(acc[19][3]),
        "+f"(acc[20][0]), "+f"(acc[20][1]), "+f"(acc[20][2]), "+f"(acc[20][3]), "+f"(acc[21][0]), "+f"(acc[21][1]), "+f"(acc[21][2]), "+f"(acc[21][3]),
        "+f"(acc[22][0]), "+f"(acc[22][1]), "+f"(acc[22][2]), "+f"(acc[22][3]), "+f"(acc[23][0]), "+f"(acc[23][1]), "+f"(acc[23][2]), "+f"(acc[23][3]),
        "+f"(acc[24][0]), "+f"(acc[24][1]), "+f"(acc[24][2]), "+f"(acc[24][3]), "+f"(acc[25][0]), "+f"(acc[25][1]), "+f"(acc[25][2]), "+f"(acc[25][3]),
        "+f"(acc[26][0]), "+f"(acc[26][1]), "+f"(acc[26][2]), "+f"(acc[26][3]), "+f"(acc[27][0]), "+f"(acc[27][1]), "+f"(acc[27][2]), "+f"(acc[27][3]),
        "+f"(acc[28][0]), "+f"(acc[28][1]), "+f"(acc[28][2]), "+f"(acc[28][3]), "+f"(acc[29][0]), "+f"(acc[29][1]), "+f"(acc[29][2]), "+f"(acc[29][3]),
        "+f"(acc[30][0]), "+f"(acc[30][1]), "+f"(acc[30][2]), "+f"(acc[30][3]), "+f"(acc[31][0]), "+f"(acc[31][1]), "+f"(acc[31][2]), "+f"(acc[31][3])
      : "l"(matrix_descriptor(a, k)), "l"(matrix_descriptor(b, k)), "r"(static_cast<int>(add)));
}
template <int kCount>
VQ_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
VQ_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
VQ_DEVICE unsigned char* align_shared(unsigned char* pointer, uint32_t to) {
  return pointer + (to - shared_address(pointer) % to) % to;
}
#endif

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

/// Keeps the compiler from knowing the value.
VQ_DEVICE void forget(int& value) { asm volatile("" : "+r"(value)); }
VQ_DEVICE int first_bit(uint32_t word) { return __ffs(static_cast<int>(word)) - 1; }
VQ_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
VQ_DEVICE uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
VQ_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
VQ_DEVICE float bits_float(uint32_t word) { return __uint_as_float(word); }
VQ_DEVICE uint32_t upper_word(double value) { return static_cast<uint32_t>(__double2hiint(value)); }

/// What an error says, or null; it is taken from the runtime, so that no later call finds it.
inline const char* said(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <class... P>
const char* allow_shared(void (*kernel)(P...), size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return nullptr;
  return said(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
}

/// Loads a kernel, which needs and makes current the device's context; says so if there is no code for the device.
template <class... P>
const char* load(void (*kernel)(P...)) {
  cudaFuncAttributes attributes;
  return said(cudaFuncGetAttributes(&attributes, kernel));
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), int blocks, int threads, size_t shared_bytes, Stream stream, A... arguments) {
  if (const char* why = allow_shared(kernel, shared_bytes)) return why;
  kernel<<<blocks, threads, shared_bytes, stream>>>(static_cast<P>(arguments)...);
  return said(cudaGetLastError());
}

/// What the choice of tiles depends on.
struct Device {
  int multiprocessors, shared_bytes, l2_bytes, capability;
  bool together;  // can run blocks that wait for each other
};
inline const char* device(Device& out) {
  int number = 0, major = 0, minor = 0, together = 0;
  cudaError_t error = cudaGetDevice(&number);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, number);
  };
  ask(out.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(out.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(out.l2_bytes, cudaDevAttrL2CacheSize);
  ask(major, cudaDevAttrComputeCapabilityMajor);
  ask(minor, cudaDevAttrComputeCapabilityMinor);
  ask(together, cudaDevAttrCooperativeLaunch);
  out.capability = major * 10 + minor;
  out.together = together != 0;
  return said(error);
}

/// A launch whose blocks all run at the same time, so that they can wait for each other. False, with nothing queued,
/// where that is not certain: a part of the device may be lent to others, and of a graph that is being captured
/// nothing says where it will run. True with `why` set on an error.
template <class... P, class... A>
bool launch_together(const char*& why, const Device& device, void (*kernel)(P...), int blocks, int threads,
                     size_t shared_bytes, Stream stream, A... arguments) {
  why = nullptr;
  if (!device.together) return false;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  int resident = 0;
  why = said(cudaStreamIsCapturing(stream, &capture));
  if (why != nullptr) return true;
  if (capture != cudaStreamCaptureStatusNone) return false;
  why = allow_shared(kernel, shared_bytes);
  if (why == nullptr)
    why = said(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared_bytes));
  if (why != nullptr) return true;
  if (resident * device.multiprocessors < blocks) return false;
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  why = said(error);
  if (error != cudaErrorCooperativeLaunchTooLarge && error != cudaErrorNotSupported) return true;
  why = nullptr;
  return false;
}

/// Describes a half matrix (rows, pitch) that is loaded in boxes of 64 columns and `box_rows` rows. The driver wants the
/// thread to have a context, which a new thread has after its first `launch` or `load`.
inline const char* tensor_map(TensorMap& out, const uint16_t* data, int64_t rows, int pitch, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static std::atomic<Encode> known{nullptr};  // several threads may find it, and find the same
  Encode encode = known;
  if (encode == nullptr) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    if (error != cudaSuccess) return said(error);
    if (status != cudaDriverEntryPointSuccess) return "the driver has no cuTensorMapEncodeTiled";
    known = encode = reinterpret_cast<Encode>(found);
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(pitch), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(pitch) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(&out, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<uint16_t*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return nullptr;
  static thread_local char refused[128];
  std::snprintf(refused, sizeof(refused), "cuTensorMapEncodeTiled refused %lld rows of %d halves at %p: CUresult %d",
                static_cast<long long>(rows), pitch, static_cast<const void*>(data), static_cast<int>(result));
  return refused;
}

}  // namespace vqsa::codebook

#endif

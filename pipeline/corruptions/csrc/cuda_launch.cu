// Launches the stages as CUDA kernels: one kernel per stage, a block per tile (x) and sample (y).
// Work orders travel as kernel parameters, so a launch needs no copy to the device.
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "cuda_launch.h"
#include "launch_shape.h"
#include "stages.h"
#include "tables.h"

namespace vqsa {
namespace {

using namespace generic;

constexpr int kSamplesPerLaunch = 48;  // 48 * 72 bytes: within the 4 KB of kernel parameters
constexpr int kMaxDevices = 64;

struct Orders {
  Sample samples[kSamplesPerLaunch];
};
static_assert(sizeof(Orders) <= 3900, "kernel parameters are limited to 4 KB");

const Tables* device_tables[kMaxDevices];
bool frost_uploaded[kMaxDevices];
std::mutex device_tables_mutex;

// Four blocks on a multiprocessor: without this wish the compiler aims at more and spills a few bytes.
template <class S>
__global__ void __launch_bounds__(256, 4)
    stage_kernel(const __grid_constant__ Orders orders, const Tables* tables, int iteration) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Sample& sample = orders.samples[blockIdx.y];
  const int tile = static_cast<int>(blockIdx.x);
  if (tile >= S::tiles(sample, device_shape())) return;
  DeviceBlock block;
  block.shape = device_shape();
  block.shared = shared;
  block.tables = tables;
  S::run(block, sample, tile, iteration);
}

std::string message(const char* what, cudaError_t error) {
  return std::string(what) + ": " + cudaGetErrorString(error);
}

template <class S>
std::string launch(int iteration, const Sample* samples, int count, cudaStream_t stream, const Tables* tables) {
  int tiles = 0;
  size_t shared = 0;
  Orders orders;
  for (int i = 0; i < count; ++i) {
    orders.samples[i] = samples[i];
    tiles = std::max(tiles, S::tiles(samples[i], device_shape()));
    shared = std::max(shared, S::shared_bytes(samples[i], device_shape()));
  }
  if (tiles == 0) return "";
  if (shared > 48 * 1024) {
    const cudaError_t e = cudaFuncSetAttribute(stage_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(shared));
    if (e != cudaSuccess) return message("asking for shared memory", e);
  }
  stage_kernel<S><<<dim3(tiles, count), dim3(32, 8), shared, stream>>>(orders, tables, iteration);
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? "" : message("launching a corruption kernel", e);
}

template <class T>
cudaError_t upload(const T* host, size_t count, const T** device) {
  void* memory = nullptr;
  cudaError_t e = cudaMalloc(&memory, count * sizeof(T));
  if (e != cudaSuccess) return e;
  e = cudaMemcpy(memory, host, count * sizeof(T), cudaMemcpyHostToDevice);
  *device = static_cast<const T*>(memory);
  return e;
}

}  // namespace

bool cuda_built() { return true; }

std::string cuda_prepare() {
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e != cudaSuccess) return message("asking for the current CUDA device", e);
  if (device >= kMaxDevices) return "more than 64 CUDA devices";
  std::lock_guard<std::mutex> lock(device_tables_mutex);
  const bool frost = has_frost_textures();
  if (device_tables[device] != nullptr && (frost_uploaded[device] || !frost)) return "";
  // Kernels in flight may still read an earlier copy without textures: it stays.
  Tables tables = host_tables();
  const TableExtents extents = table_extents();
  e = upload(tables.poisson_thresholds, extents.poisson_thresholds, &tables.poisson_thresholds);
  if (e == cudaSuccess) e = upload(tables.poisson_guide, extents.poisson_guide, &tables.poisson_guide);
  for (auto& variant : tables.frost) {
    for (Texture& t : variant) {
      if (t.rgb != nullptr && e == cudaSuccess) e = upload(t.rgb, size_t{3} * t.height * t.width, &t.rgb);
    }
  }
  const Tables* copy = nullptr;
  if (e == cudaSuccess) e = upload(&tables, 1, &copy);
  if (e != cudaSuccess) return message("uploading the corruption tables", e);
  device_tables[device] = copy;
  frost_uploaded[device] = frost;
  return "";
}

std::string cuda_launch(const Step& step, const Sample* samples, int count, void* stream) {
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e != cudaSuccess) return message("asking for the current CUDA device", e);
  const Tables* tables = device_tables[device];
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  for (int begin = 0; begin < count; begin += kSamplesPerLaunch) {
    const int n = std::min(kSamplesPerLaunch, count - begin);
    std::string error;
    switch (step.stage) {
#define VQSA_CASE(name, ...)                                                       \
  case name:                                                                       \
    error = launch<__VA_ARGS__>(step.iteration, samples + begin, n, s, tables);    \
    break;
      VQSA_STAGES(VQSA_CASE)
#undef VQSA_CASE
      default:
        error = "unknown stage";
    }
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace vqsa

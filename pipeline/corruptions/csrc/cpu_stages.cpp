// Compiled once per instruction set, with VQSA_ISA naming the namespace (CMakeLists.txt). Uses
// nothing from the standard library but plain functions: an inline function compiled here for one
// instruction set must not be linked into another's code.
#include "cpu_stages.h"

#include "launch_shape.h"
#include "stages.h"

namespace vqsa {
namespace VQSA_ISA {
namespace {

TileShape host_shape(const Sample& s) { return {s.width, 32, 2048}; }

size_t shared_bytes(int stage, const Sample& s, const TileShape& shape) {
  switch (stage) {
#define VQSA_CASE(name, ...) \
  case name:                 \
    return __VA_ARGS__::shared_bytes(s, shape);
    VQSA_STAGES(VQSA_CASE)
#undef VQSA_CASE
    default:
      return 0;
  }
}

template <class S, class B>
__attribute__((noinline, flatten)) void run_blocks(const B& block, const Sample& s, int iteration) {
  const int tiles = S::tiles(s, block.shape);
  for (int tile = 0; tile < tiles; ++tile) S::run(block, s, tile, iteration);
}

template <class B>
void run_stage(int stage, int iteration, const Sample& s, const B& block) {
  switch (stage) {
#define VQSA_CASE(name, ...)                          \
  case name:                                          \
    run_blocks<__VA_ARGS__, B>(block, s, iteration);  \
    break;
    VQSA_STAGES(VQSA_CASE)
#undef VQSA_CASE
    default:
      break;
  }
}

size_t host_shared_bytes(int stage, const Sample& s) { return shared_bytes(stage, s, host_shape(s)); }

void run_host(int stage, int iteration, const Sample& s, const Tables* tables, unsigned char* shared) {
  HostBlock block;
  block.shape = host_shape(s);
  block.shared = shared;
  block.tables = tables;
  run_stage(stage, iteration, s, block);
}

size_t emulated_shared_bytes(int stage, const Sample& s) { return shared_bytes(stage, s, device_shape()); }

void run_emulated(int stage, int iteration, const Sample& s, const Tables* tables, unsigned char* shared) {
  EmulatedBlock block;
  block.shape = device_shape();
  block.shared = shared;
  block.tables = tables;
  run_stage(stage, iteration, s, block);
}

#define VQSA_STRING_(x) #x
#define VQSA_STRING(x) VQSA_STRING_(x)

}  // namespace

extern const CpuStages kCpuStages;
const CpuStages kCpuStages = {host_shared_bytes, run_host, emulated_shared_bytes, run_emulated, VQSA_STRING(VQSA_ISA)};

}  // namespace VQSA_ISA
}  // namespace vqsa

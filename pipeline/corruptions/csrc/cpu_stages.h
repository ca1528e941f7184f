// The CPU build of the stages, once per instruction set.
#pragma once
#include "sample.h"

namespace vqsa {

struct CpuStages {
  // Bytes of shared memory that `stage` wants for this sample.
  size_t (*shared_bytes)(int stage, const Sample& s);
  // Runs all blocks of one stage on the calling thread. `shared` holds shared_bytes bytes.
  void (*run)(int stage, int iteration, const Sample& s, const Tables* tables, unsigned char* shared);
  // The same two with CUDA's tile sizes and parallel forms, for tests.
  size_t (*emulated_shared_bytes)(int stage, const Sample& s);
  void (*run_emulated)(int stage, int iteration, const Sample& s, const Tables* tables, unsigned char* shared);
  const char* name;
};

// The best set that this processor runs. All sets give the same bytes.
const CpuStages& cpu_stages();

// A set by name ("generic", "v3", "v4"), or null where this build or processor lacks it.
const CpuStages* cpu_stages_named(const char* name);

}  // namespace vqsa

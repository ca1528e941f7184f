// The CUDA side, implemented in cuda_launch.cu, or by cuda_absent.cpp in a build without CUDA.
#pragma once
#include <string>

#include "plan.h"

namespace vqsa {

bool cuda_built();

// Uploads the tables to the current device, once. Empty string, or what went wrong.
std::string cuda_prepare();

// Queues one stage for `count` samples on a stream. `samples` is host memory, read before returning.
std::string cuda_launch(const Step& step, const Sample* samples, int count, void* stream);

}  // namespace vqsa

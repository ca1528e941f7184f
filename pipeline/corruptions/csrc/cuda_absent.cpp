#include "cuda_launch.h"

namespace vqsa {
namespace {
const char kAbsent[] =
    "this build of libvqsa_corrupt.so has no CUDA code: install a CUDA toolkit with nvcc, then reinstall vqsa";
}

bool cuda_built() { return false; }
std::string cuda_prepare() { return kAbsent; }
std::string cuda_launch(const Step&, const Sample*, int, void*) { return kAbsent; }

}  // namespace vqsa

// The tile sizes of the CUDA build.
#pragma once
#include "block.h"

namespace vqsa {
namespace VQSA_ISA {

VQSA_HD TileShape device_shape() { return {32, 32, 1024}; }

}  // namespace VQSA_ISA
}  // namespace vqsa

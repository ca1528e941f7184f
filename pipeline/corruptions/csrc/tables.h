#pragma once
#include "sample.h"

namespace vqsa {

// The tables in host memory, built at the first call; thread safe.
const Tables& host_tables();

// Sizes of the arrays that Tables points to, for a copy to a device.
struct TableExtents {
  size_t poisson_thresholds;  // words
  size_t poisson_guide;       // 16-bit words
};
TableExtents table_extents();

}  // namespace vqsa

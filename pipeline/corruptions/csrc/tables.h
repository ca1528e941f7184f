#pragma once
#include "sample.h"

namespace vqsa {

// The tables in host memory, built at the first call; thread safe.
const Tables& host_tables();

// Copies the textures, [variant][texture], into the tables. False if they are there already.
bool set_frost_textures(const Texture* textures);
bool has_frost_textures();

// Sizes of the arrays that Tables points to, for a copy to a device.
struct TableExtents {
  size_t poisson_thresholds;  // words
  size_t poisson_guide;       // 16-bit words
};
TableExtents table_extents();

}  // namespace vqsa

// How a stage cuts its work into blocks: bases of the stages. A stage that needs memory shared by the
// threads of a block says so in a shared_bytes of its own.
#pragma once
#include "block.h"

namespace vqsa {
namespace VQSA_ISA {

struct NoSharedMemory {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape&) { return 0; }
};

// One block does the whole image.
struct OneBlock : NoSharedMemory {
  static VQSA_HD int tiles(const Sample&, const TileShape&) { return 1; }
};

// Rectangles of the image.
struct TileGrid : NoSharedMemory {
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) { return tile_count(s, shape); }
};

// Whole rows.
struct RowGrid : NoSharedMemory {
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) { return ceil_div(s.height, shape.height); }
};

// Runs of pixels, whatever the row.
struct PixelGrid : NoSharedMemory {
  static VQSA_HD int pixels(const Sample& s) { return s.height * s.width; }
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) { return ceil_div(pixels(s), shape.items); }
};

// Runs of pixels, four to an item: what one Philox counter draws.
struct QuadGrid : NoSharedMemory {
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) {
    return ceil_div(ceil_div(s.height * s.width, 4), shape.items);
  }
};

// Runs of pixel values, three to a pixel, four to an item.
struct ValueGrid : NoSharedMemory {
  static VQSA_HD int values(const Sample& s) { return s.height * s.width * 3; }
  static VQSA_HD int tiles(const Sample& s, const TileShape& shape) { return ceil_div(values(s), shape.items * 4); }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

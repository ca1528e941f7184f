// spatter's drops of water: edges of the noise layer, distances to them, embossing. Image processing
// steps as OpenCV defines them: Canny, chamfer distance, histogram equalisation.
#pragma once
#include "stage_spatter.h"

namespace vqsa {
namespace VQSA_ISA {

constexpr int kSpatterReach = 20;                 // distances are cut off here
// Steps of 1, 1.4 and 2.1969, exactly. OpenCV 5 adds them up in float; OpenCV 4 rounded them to 1/65536,
// which makes a mean of 6 truncate to 5.
constexpr int kStraight = 10000, kDiagonal = 14000, kKnight = 21969;

// Words of the accumulators: the histogram of distances 0..20, and the largest mask value.
constexpr int kSpatterHistogram = 8, kSpatterLargest = 40;

// A step of water over a tile: Step::over(block, sample, tile, planes). Mud takes other steps.
template <class Step>
struct WaterTiles : TileGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    if (!spatter_is_mud(s, b.tables)) Step::over(b, s, tile_at(s, b.shape, tile), SpatterPlanes(s));
  }
};

struct SpatterSobel : WaterTiles<SpatterSobel> {
  template <class B>
  static VQSA_HD void over(const B& b, const Sample& s, const Tile& t, const SpatterPlanes& p) {
    const int height = s.height, width = s.width;
    const uint8_t* VQSA_RESTRICT in = p.layer;
    b.rows(t.height, t.width, [=](int y, int x) {
      const int row = t.y + y, column = t.x + x;
      const uint8_t* a = in + static_cast<size_t>(greatest(row - 1, 0)) * width;
      const uint8_t* m = in + static_cast<size_t>(row) * width;
      const uint8_t* z = in + static_cast<size_t>(least(row + 1, height - 1)) * width;
      const int l = greatest(column - 1, 0), r = least(column + 1, width - 1);
      const size_t at = static_cast<size_t>(row) * width + column;
      p.dx[at] = static_cast<int16_t>((a[r] - a[l]) + 2 * (m[r] - m[l]) + (z[r] - z[l]));
      p.dy[at] = static_cast<int16_t>((z[l] - a[l]) + 2 * (z[column] - a[column]) + (z[r] - a[r]));
    });
  }
};

// Canny's thinning: 0 none, 1 weak, 2 strong. Thresholds 50 and 150 on |dx| + |dy|.
struct SpatterThin : WaterTiles<SpatterThin> {
  template <class B>
  static VQSA_HD void over(const B& b, const Sample& s, const Tile& t, const SpatterPlanes& p) {
    const int height = s.height, width = s.width;
    const auto magnitude = [=](int y, int x) {  // 0 outside the image
      if (y < 0 || y >= height || x < 0 || x >= width) return 0;
      const size_t at = static_cast<size_t>(y) * width + x;
      const int dx = p.dx[at], dy = p.dy[at];
      return (dx < 0 ? -dx : dx) + (dy < 0 ? -dy : dy);
    };
    b.rows(t.height, t.width, [=](int dy_tile, int dx_tile) {
      const int y = t.y + dy_tile, x = t.x + dx_tile;
      const size_t at = static_cast<size_t>(y) * width + x;
      const int m = magnitude(y, x);
      uint8_t state = 0;
      if (m > 50) {
        const int dx = p.dx[at], dy = p.dy[at];
        const int ax = dx < 0 ? -dx : dx, ay = (dy < 0 ? -dy : dy) * 32768;
        const int flat = ax * 13573, steep = flat + ax * 65536;  // tan 22.5 and 67.5 degrees
        bool peak;
        if (ay < flat) {
          peak = m > magnitude(y, x - 1) && m >= magnitude(y, x + 1);
        } else if (ay > steep) {
          peak = m > magnitude(y - 1, x) && m >= magnitude(y + 1, x);
        } else {
          const int side = (dx ^ dy) < 0 ? -1 : 1;
          peak = m > magnitude(y - 1, x - side) && m > magnitude(y + 1, x + side);
        }
        if (peak) state = m > 150 ? 2 : 1;
      }
      p.edges[at] = state;
    });
  }
};

// Weak edges that touch strong ones become strong, until nothing changes. One block per image.
struct SpatterLink : OneBlock {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape&) { return 16; }
  // From every strong edge on; the stack takes the gradients' memory, and each pixel at most once.
  static VQSA_HD void follow(uint8_t* edges, int32_t* stack, int height, int width) {
    int waiting = 0;
    for (int i = 0; i < height * width; ++i) {
      if (edges[i] == 2) stack[waiting++] = i;
    }
    while (waiting > 0) {
      const int at = stack[--waiting], y = at / width, x = at % width;
      for (int j = greatest(y - 1, 0); j <= least(y + 1, height - 1); ++j) {
        for (int i = greatest(x - 1, 0); i <= least(x + 1, width - 1); ++i) {
          if (edges[j * width + i] != 1) continue;
          edges[j * width + i] = 2;
          stack[waiting++] = j * width + i;
        }
      }
    }
  }
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int, int) {
    if (spatter_is_mud(s, b.tables)) return;
    const int height = s.height, width = s.width;
    if (B::kSequential) {
      follow(SpatterPlanes(s).edges, reinterpret_cast<int32_t*>(SpatterPlanes(s).dx), height, width);
      return;
    }
    volatile uint8_t* edges = SpatterPlanes(s).edges;
    volatile int32_t* changed = reinterpret_cast<volatile int32_t*>(b.shared);
    bool again = true;
    while (again) {
      b.each(1, [=](int) { changed[0] = 0; });
      b.rows(height, width, [=](int y, int x) {
        const size_t at = static_cast<size_t>(y) * width + x;
        if (edges[at] != 1) return;
        for (int j = greatest(y - 1, 0); j <= least(y + 1, height - 1); ++j) {
          for (int i = greatest(x - 1, 0); i <= least(x + 1, width - 1); ++i) {
            if (edges[static_cast<size_t>(j) * width + i] == 2) {
              edges[at] = 2;
              changed[0] = 1;
            }
          }
        }
      });
      again = changed[0] != 0;
      b.each(0, [=](int) {});  // all threads have read the flag before it is cleared
    }
  }
};

// Distance to the nearest edge in the same row, at most kSpatterReach + 1.
struct SpatterAcross : RowGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    if (spatter_is_mud(s, b.tables)) return;
    const int y0 = tile * b.shape.height, width = s.width;
    const SpatterPlanes p(s);
    b.each(least(b.shape.height, s.height - y0), [=](int y) {
      const uint8_t* edges = p.edges + static_cast<size_t>(y0 + y) * width;
      uint8_t* across = p.across + static_cast<size_t>(y0 + y) * width;
      int d = kSpatterReach + 1;
      for (int x = 0; x < width; ++x) {
        d = edges[x] == 2 ? 0 : least(d + 1, kSpatterReach + 1);
        across[x] = static_cast<uint8_t>(d);
      }
      d = kSpatterReach + 1;
      for (int x = width - 1; x >= 0; --x) {
        d = edges[x] == 2 ? 0 : least(d + 1, kSpatterReach + 1);
        across[x] = static_cast<uint8_t>(least<int>(across[x], d));
      }
    });
  }
};

// Length of the shortest way over dx, dy in straight, diagonal and knight's steps: the larger of two
// linear forms, one for the offsets nearer to an axis, one for those nearer to a diagonal.
VQSA_HD int chamfer(int dx, int dy) {
  const int a = greatest(dx, dy), c = least(dx, dy);
  return greatest(kStraight * a + (kKnight - 2 * kStraight) * c, (kKnight - kDiagonal) * a + (2 * kDiagonal - kKnight) * c);
}

// The distance to the nearest edge in 1/kStraight pixel, over dx and dy's memory.
VQSA_HD int32_t* spatter_chamfer(const Sample& s) { return reinterpret_cast<int32_t*>(SpatterPlanes(s).dx); }

struct SpatterDistance : WaterTiles<SpatterDistance> {
  template <class B>
  static VQSA_HD void over(const B& b, const Sample& s, const Tile& t, const SpatterPlanes& p) {
    const int height = s.height, width = s.width;
    const uint8_t* VQSA_RESTRICT across = p.across;
    int32_t* VQSA_RESTRICT distance = spatter_chamfer(s);
    if (B::kSequential) {  // row against row, so that the loop over x is the vector loop
      b.rows(t.height, t.width, [=](int y, int x) {
        distance[static_cast<size_t>(t.y + y) * width + t.x + x] = kSpatterReach * kStraight;
      });
      for (int k = 1 - kSpatterReach; k < kSpatterReach; ++k) {
        const int away = k < 0 ? -k : k, first = greatest(t.y, -k), past = least(t.y + t.height, height - k);
        b.rows(greatest(past - first, 0), t.width, [=](int y, int x) {
          const size_t at = static_cast<size_t>(first + y) * width + t.x + x;
          distance[at] = least(distance[at], chamfer(across[at + static_cast<ptrdiff_t>(k) * width], away));
        });
      }
      return;
    }
    // Row by row outwards: no farther row can be nearer than its own offset.
    b.rows(t.height, t.width, [=](int dy, int dx) {
      const int y = t.y + dy, x = t.x + dx;
      int best = kSpatterReach * kStraight;
      for (int k = 0; k * kStraight < best; ++k) {
        const int up = y - k, down = y + k;
        if (up >= 0) best = least(best, chamfer(across[static_cast<size_t>(up) * width + x], k));
        if (down < height) best = least(best, chamfer(across[static_cast<size_t>(down) * width + x], k));
      }
      distance[static_cast<size_t>(y) * width + x] = best;
    });
  }
};

// 3 x 3 mean, truncated to whole levels; their histogram.
struct SpatterSmooth : WaterTiles<SpatterSmooth> {
  template <class B>
  static VQSA_HD void over(const B& b, const Sample& s, const Tile& t, const SpatterPlanes& p) {
    const int height = s.height, width = s.width;
    const int32_t* VQSA_RESTRICT in = spatter_chamfer(s);
    uint8_t* VQSA_RESTRICT out = p.distance;
    b.rows(t.height, t.width, [=](int dy, int dx) {
      const int y = t.y + dy, x = t.x + dx;
      const int l = mirror_101(x - 1, width), r = mirror_101(x + 1, width);
      int sum = 0;
      for (int k = -1; k <= 1; ++k) {
        const int32_t* q = in + static_cast<size_t>(mirror_101(y + k, height)) * width;
        sum += q[l] + q[x] + q[r];
      }
      out[static_cast<size_t>(y) * width + x] = static_cast<uint8_t>(sum / (9 * kStraight));
    });
    uint32_t* acc = reinterpret_cast<uint32_t*>(s.work) + kSpatterHistogram;
    if (B::kSequential) {
      for (int y = 0; y < t.height; ++y) {
        const uint8_t* row = out + static_cast<size_t>(t.y + y) * width + t.x;
        for (int x = 0; x < t.width; ++x) ++acc[row[x]];
      }
      return;
    }
    const uint8_t* corner = out + static_cast<size_t>(t.y) * width + t.x;
    for (int level = 0; level <= kSpatterReach; ++level) {
      b.sum(t.height, t.width, acc + level,
            [=](int y, int x) { return corner[static_cast<size_t>(y) * width + x] == level ? 1u : 0u; });
    }
  }
};

// Histogram equalisation, then embossing.
struct SpatterRelief : WaterTiles<SpatterRelief> {
  static VQSA_HD size_t shared_bytes(const Sample&, const TileShape&) { return sizeof(int32_t) * (kSpatterReach + 1); }
  template <class B>
  static VQSA_HD void over(const B& b, const Sample& s, const Tile& t, const SpatterPlanes& p) {
    const int height = s.height, width = s.width;
    const uint32_t* histogram = reinterpret_cast<const uint32_t*>(s.work) + kSpatterHistogram;
    int32_t* level = reinterpret_cast<int32_t*>(b.shared);
    b.each(1, [=](int) {
      const uint32_t total = static_cast<uint32_t>(height) * static_cast<uint32_t>(width);
      int first = 0;
      while (first < kSpatterReach && histogram[first] == 0) ++first;
      const bool flat = histogram[first] == total;
      const float scale = 255.0f / static_cast<float>(flat ? 1u : total - histogram[first]);
      uint32_t sum = 0;
      for (int i = 0; i <= kSpatterReach; ++i) {
        if (i > first) sum += histogram[i];
        const float v = static_cast<float>(sum) * scale;
        int rounded = static_cast<int>(v + 0.5f);
        if (static_cast<float>(rounded) - v == 0.5f && (rounded & 1) != 0) --rounded;  // half to even
        level[i] = flat ? first : least(rounded, 255);
      }
    });
    const uint8_t* VQSA_RESTRICT in = p.distance;
    b.rows(t.height, t.width, [=](int dy, int dx) {
      const int y = t.y + dy, x = t.x + dx;
      const uint8_t* a = in + static_cast<size_t>(mirror_101(y - 1, height)) * width;
      const uint8_t* m = in + static_cast<size_t>(y) * width;
      const uint8_t* z = in + static_cast<size_t>(mirror_101(y + 1, height)) * width;
      const int l = mirror_101(x - 1, width), r = mirror_101(x + 1, width);
      const int v = -2 * level[a[l]] - level[a[x]] - level[m[l]] + level[m[x]] + level[m[r]] + level[z[x]] + 2 * level[z[r]];
      p.relief[static_cast<size_t>(y) * width + x] = static_cast<uint8_t>(clamp(v, 0, 255));
    });
  }
};

// Water's field before scaling: layer times the smoothed relief; its largest value.
struct SpatterWater : WaterTiles<SpatterWater> {
  template <class B>
  static VQSA_HD void over(const B& b, const Sample& s, const Tile& t, const SpatterPlanes& p) {
    const int height = s.height, width = s.width;
    uint32_t* fields = s.fields;
    b.rows(t.height, t.width, [=](int dy, int dx) {
      const int y = t.y + dy, x = t.x + dx;
      const int l = mirror_101(x - 1, width), r = mirror_101(x + 1, width);
      int sum = 0;
      for (int k = -1; k <= 1; ++k) {
        const uint8_t* q = p.relief + static_cast<size_t>(mirror_101(y + k, height)) * width;
        sum += q[l] + q[x] + q[r];
      }
      const size_t at = static_cast<size_t>(y) * width + x;
      fields[at] = static_cast<uint32_t>(p.layer[at]) * static_cast<uint32_t>((2 * sum + 9) / 18);
    });
    uint32_t* acc = reinterpret_cast<uint32_t*>(s.work) + kSpatterLargest;
    const uint32_t* corner = fields + static_cast<size_t>(t.y) * width + t.x;
    b.largest(t.height, t.width, acc, [=](int y, int x) { return corner[static_cast<size_t>(y) * width + x]; });
  }
};

// Field: the mask, scaled so that its largest value is the strength. (Without a single drop the
// reference divides by zero and returns black; here the image stays as it is.)
struct SpatterScale : PixelGrid {
  template <class B>
  static VQSA_HD void run(const B& b, const Sample& s, int tile, int) {
    if (spatter_is_mud(s, b.tables)) return;
    const uint32_t largest = reinterpret_cast<const uint32_t*>(s.work)[kSpatterLargest];
    const float divisor = static_cast<float>(largest == 0 ? 1u : largest);
    const float strength = static_cast<float>(constants_of(s, b.tables).v[4]);
    const int first = tile * b.shape.items;
    uint32_t* VQSA_RESTRICT fields = s.fields + first;
    b.each(least(b.shape.items, pixels(s) - first), [=](int i) {
      fields[i] = field_bits(static_cast<float>(static_cast<int32_t>(fields[i])) / divisor * strength);
    });
  }
};

}  // namespace VQSA_ISA
}  // namespace vqsa

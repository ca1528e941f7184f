// The codebook search on CUDA: a plain C interface that depends on no torch version.
//
// All pointers but the first of a function's strings are device memory; everything is queued on `stream` and nothing
// waits for the device, so calls can be captured in a CUDA graph. Types: 0 float32, 1 float16, 2 bfloat16, and for
// segment sums 3 float64. Functions return 0, or 1 with vqsa_codebook_last_error() saying why.
#pragma once

#include <stdint.h>

#define VQSA_API extern "C" __attribute__((visibility("default")))

VQSA_API const char* vqsa_codebook_last_error();

/// Dimensions that the kernels can take: 1 to this.
VQSA_API int64_t vqsa_codebook_max_dim();

/// Searches of this process so far that converted their features in the launch of the search.
VQSA_API int64_t vqsa_codebook_together();

/// Whether this library has code for the current device: 1, or 0 where it was built for others or there is none.
/// Loads the kernels, so that none is used for the first time while a graph is captured. Leaves no error behind.
VQSA_API int vqsa_codebook_usable();

/// The architectures that this library was built for, as CMake has them: "80-real, 90a-real".
VQSA_API const char* vqsa_codebook_architectures();

/// Compute capability of the current device, 90 for 9.0.
VQSA_API int vqsa_codebook_capability(int32_t* capability);

/// Bytes of the buffer that keeps the prepared codebook: 2·n·d (d rounded up to 32) and some per code.
VQSA_API int64_t vqsa_codebook_prepared_bytes(int64_t codes, int32_t dim, int32_t cosine);

/// How the search cuts its work. AUTO chooses between WIDE and NARROW, which use mma.sync; ANY between all three.
/// HOPPER uses wgmma and needs compute capability 9.0.
enum VqsaTile {
  VQSA_TILE_AUTO = 0,
  VQSA_TILE_WIDE = 1,
  VQSA_TILE_NARROW = 2,
  VQSA_TILE_HOPPER = 3,
  VQSA_TILE_ANY = 4
};
/// Added to a tile: features are converted in a launch of their own even where they are few.
enum { VQSA_APART = 8 };

/// Bytes of scratch for `features` rows, 0 on an error. Below 64 MB.
VQSA_API int64_t vqsa_codebook_workspace_bytes(int64_t features, int64_t codes, int32_t dim, int32_t cosine,
                                               int32_t tile);

/// Prepares the codebook: all of it with a new centre (chosen null), or `chosen_count` of its codes by number with the
/// centre as it is. The others must be as they were prepared.
VQSA_API int vqsa_codebook_prepare(const void* codes, int32_t codes_type, int64_t code_count, int32_t dim,
                                   int32_t cosine, void* prepared, void* workspace, const int64_t* chosen,
                                   int64_t chosen_count, void* stream);

/// The nearest code to each feature. What comes after sqdist may be null (see Outputs in resolve.h); alarm may be host
/// memory that the device can write.
VQSA_API int vqsa_codebook_search(const void* z, int32_t z_type, int64_t features, const void* codes,
                                  int32_t codes_type, int64_t code_count, int32_t dim, int32_t cosine, int32_t tile,
                                  void* prepared, void* workspace, int64_t* index, float* sqdist, float* quantised,
                                  double* error, int64_t* usage, int64_t* effort, int32_t* alarm, void* stream);

/// Bytes of scratch for vqsa_codebook_segment_sum.
VQSA_API int64_t vqsa_codebook_segment_sum_bytes(int64_t count, int32_t dim);

/// out[s] = Σ z[order[i]] over the i with slot[i] = s, or scale · Σ (code − z) where code (count, dim) is not null.
/// slot ascends; negative ones and those from `slots` on are left out, but order names features there too. out
/// (slots, dim) is float64 where z is, else float32. Sums are float64 and come in a fixed order.
VQSA_API int vqsa_codebook_segment_sum(const void* z, int32_t z_type, int64_t count, int32_t dim, const int64_t* order,
                                       const int32_t* slot, const float* code, const double* scale, void* out,
                                       int64_t slots, void* workspace, void* stream);

/// For tests: float32 products (rows, codes) of float16 matrices (rows, pitch) and (codes, pitch), as the search
/// accumulates them; pitch is a multiple of 32, tile is WIDE, NARROW or HOPPER. `numbers` holds 0, 1, … rows - 1.
VQSA_API int vqsa_codebook_products(const void* features, const int32_t* numbers, int32_t rows, const void* codes,
                                    int64_t code_count, int32_t pitch, int32_t tile, float* products, void* stream);

// The codebook search on CUDA: a plain C interface that depends on no torch version.
//
// All pointers but the first of a function's strings are device memory; everything is queued on `stream` and nothing
// waits for the device, so calls can be captured in a CUDA graph. Types: 0 float32, 1 float16, 2 bfloat16. Functions
// return 0, or 1 with vqsa_codebook_last_error() saying why.
#pragma once

#include <stdint.h>

#define VQSA_API extern "C" __attribute__((visibility("default")))

VQSA_API const char* vqsa_codebook_last_error();

/// Dimensions that the kernels can take: 1 to this.
VQSA_API int64_t vqsa_codebook_max_dim();

/// Bytes of the buffer that keeps the prepared codebook: 2·n·d (d rounded up to 32) and some per code.
VQSA_API int64_t vqsa_codebook_prepared_bytes(int64_t codes, int32_t dim, int32_t cosine);

/// How the search cuts its work; the fastest for the device by default.
/// HOPPER (compute capability 9.0 only) has never run on a device: it is never chosen by itself.
enum VqsaTile { VQSA_TILE_AUTO = 0, VQSA_TILE_WIDE = 1, VQSA_TILE_NARROW = 2, VQSA_TILE_HOPPER = 3 };

/// Bytes of scratch for `features` rows, 0 on an error. Below 64 MB.
VQSA_API int64_t vqsa_codebook_workspace_bytes(int64_t features, int64_t codes, int32_t dim, int32_t cosine,
                                               int32_t tile);

/// Prepares the codebook: all of it with a new centre (chosen null), or `chosen_count` of its codes by number with the
/// centre as it is. The others must be as they were prepared.
VQSA_API int vqsa_codebook_prepare(const void* codes, int32_t codes_type, int64_t code_count, int32_t dim,
                                   int32_t cosine, void* prepared, void* workspace, const int64_t* chosen,
                                   int64_t chosen_count, void* stream);

/// The nearest code to each feature. quantised, error, usage and effort may be null (see Outputs in resolve.h).
VQSA_API int vqsa_codebook_search(const void* z, int32_t z_type, int64_t features, const void* codes,
                                  int32_t codes_type, int64_t code_count, int32_t dim, int32_t cosine, int32_t tile,
                                  void* prepared, void* workspace, int64_t* index, float* sqdist, float* quantised,
                                  double* error, int64_t* usage, int64_t* effort, void* stream);

/// For tests: float32 products (rows, codes) of float16 matrices (rows, pitch) and (codes, pitch), as the search
/// accumulates them; pitch is a multiple of 32, tile is WIDE or NARROW. `numbers` holds 0, 1, … rows - 1.
VQSA_API int vqsa_codebook_products(const void* features, const int32_t* numbers, int32_t rows, const void* codes,
                                    int64_t code_count, int32_t pitch, int32_t tile, float* products, void* stream);

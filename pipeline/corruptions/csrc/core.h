// The C interface of libvqsa_corrupt.so: the ImageNet-C corruptions on CPU and CUDA.
//
// Every function that can fail returns 0 for success, VQSA_OUT_OF_MEMORY, or another number for wrong
// arguments; vqsa_last_error() then says, for the calling thread, what was wanted, what was found and what
// to do. Arguments are checked before any work is done or queued.
#ifndef VQSA_CORE_H
#define VQSA_CORE_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VQSA_API __attribute__((visibility("default")))

// One image: height x width x 3 uint8, RGB, contiguous. `out` must not overlap `in`.
typedef struct VqsaImage {
  const uint8_t* in;
  uint8_t* out;
  uint64_t key;        // names the random draw; equal keys give equal draws
  int32_t height;
  int32_t width;
  int32_t kind;        // kinds.h
  int32_t severity;    // 1..5; ignored for identity
  uint32_t* fields;    // draw: written; apply: read; corrupt: ignored
  const uint32_t* noise;  // draw: raw noise to shape instead of the key's, or null
} VqsaImage;

enum { VQSA_FLAVOUR_HENDRYCKS = 0, VQSA_FLAVOUR_BETHGE = 1 };
enum { VQSA_CONSTANTS_AUTO = -1, VQSA_CONSTANTS_IMAGENET = 0, VQSA_CONSTANTS_TINY_IMAGENET = 1, VQSA_CONSTANTS_CIFAR10 = 2 };
enum { VQSA_CORRUPT = 0, VQSA_DRAW = 1, VQSA_APPLY = 2 };
enum { VQSA_OUT_OF_MEMORY = 2 };
enum { VQSA_IMPL_BEST = 0, VQSA_IMPL_EMULATED = 1 };

VQSA_API const char* vqsa_last_error(void);
VQSA_API int vqsa_kind_available(int kind);
VQSA_API int vqsa_has_cuda(void);
// "generic", "v3" or "v4": the instruction set in use on this processor.
VQSA_API const char* vqsa_cpu_isa(void);

// 32-bit words of one image's fields and raw noise; -1 on an unknown kind.
VQSA_API int64_t vqsa_field_words(int kind, int severity, int flavour, int constants, int height, int width);
VQSA_API int64_t vqsa_noise_words(int kind, int severity, int flavour, int constants, int height, int width);

// Runs `mode` on n images with up to n_threads threads. `impl` VQSA_IMPL_EMULATED runs what the CUDA
// kernels run, on the CPU. `isa` null picks the best.
VQSA_API int vqsa_run_cpu(const VqsaImage* images, int64_t n, int mode, int flavour, int constants, int n_threads,
                          int impl, const char* isa);

// CUDA: bytes of workspace for a batch, and the launch on a stream. No allocation, no
// synchronisation, except that the first call on a device uploads the tables.
VQSA_API int vqsa_workspace_cuda(const VqsaImage* images, int64_t n, int mode, int flavour, int constants, size_t* bytes);
VQSA_API int vqsa_run_cuda(const VqsaImage* images, int64_t n, int mode, int flavour, int constants, void* workspace,
                           size_t workspace_bytes, void* stream);

// The frost textures, RGB uint8: 4 variants (as stored, x1.1, x0.3, x0.2) of 4 pictures (frost1, 2, 4, 5),
// variant by variant. Copied. Once per process: a second call is ignored.
VQSA_API int vqsa_set_frost_textures(const uint8_t* const* rgb, const int32_t* heights, const int32_t* widths);
VQSA_API int vqsa_has_frost_textures(void);

// Philox4x32-10, for tests: out[4] from counter[4] and key[2].
VQSA_API void vqsa_philox4x32(const uint32_t* counter, const uint32_t* key, uint32_t* out);

#ifdef __cplusplus
}
#endif
#endif

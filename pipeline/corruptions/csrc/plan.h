// Which stages make up a kind, and how much memory they want.
#pragma once
#include <vector>

#include "sample.h"

namespace vqsa {

struct Step {
  int32_t stage;
  int32_t iteration;
};

// True where `kind` is implemented by this library.
bool kind_available(int kind);

// The stages of a kind for images up to height x width, at any severity: a stage whose iteration a
// sample does not need returns at once.
std::vector<Step> plan_steps(int kind, Mode mode, int height, int width);

// 32-bit words of a kind's fields and of the raw noise they are shaped from (0: none).
int64_t field_words(int kind, int severity, int set, int flavour, int height, int width);
int64_t noise_words(int kind, int severity, int set, int flavour, int height, int width);

// Bytes of scratch after the kAccWords zeroed words.
int64_t scratch_bytes(int kind, int severity, int set, int flavour, int height, int width);

// True where the fused mode needs the fields in memory (they are then part of the workspace).
bool fused_needs_fields(int kind);

}  // namespace vqsa

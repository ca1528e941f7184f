// Picks the instruction set at run time.
#include <cstring>
#include <initializer_list>

#include "cpu_stages.h"

namespace vqsa {

namespace generic {
extern const CpuStages kCpuStages;
}
#if defined(VQSA_X86_LEVELS)
namespace v3 {
extern const CpuStages kCpuStages;
}
namespace v4 {
extern const CpuStages kCpuStages;
}
#endif

const CpuStages* cpu_stages_named(const char* name) {
#if defined(VQSA_X86_LEVELS)
  if (std::strcmp(name, "v4") == 0) return __builtin_cpu_supports("x86-64-v4") ? &v4::kCpuStages : nullptr;
  if (std::strcmp(name, "v3") == 0) return __builtin_cpu_supports("x86-64-v3") ? &v3::kCpuStages : nullptr;
#endif
  return std::strcmp(name, "generic") == 0 ? &generic::kCpuStages : nullptr;
}

const CpuStages& cpu_stages() {
  static const CpuStages* const best = [] {
    for (const char* name : {"v4", "v3"}) {
      if (const CpuStages* s = cpu_stages_named(name)) return s;
    }
    return &generic::kCpuStages;
  }();
  return *best;
}

}  // namespace vqsa

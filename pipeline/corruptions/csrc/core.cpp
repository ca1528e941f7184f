// The C interface: checks, memory, threads. No corruption is computed here.
#include "core.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu_stages.h"
#include "cuda_launch.h"
#include "philox.h"
#include "plan.h"
#include "tables.h"

namespace {

using namespace vqsa;

thread_local std::string last_error;

int fail(const std::string& message) {
  last_error = message;
  return 1;
}

std::string where(int64_t i, const char* what) { return "image " + std::to_string(i) + ": " + what; }

int resolved_set(int constants, int height, int width) {
  if (constants >= 0) return constants;
  if (height == 64 && width == 64) return kTinyImageNet;
  if (height == 32 && width == 32) return kCifar10;
  return kImageNet;
}

bool same_image(const VqsaImage& image, int mode) { return mode == VQSA_DRAW || (image.in && image.out); }

// Empty, or what is wrong with the batch.
std::string check_batch(const VqsaImage* images, int64_t n, int mode, int flavour, int constants) {
  if (n < 0 || (n > 0 && images == nullptr)) return "the batch has no images pointer";
  if (mode < 0 || mode > 2) return "mode is " + std::to_string(mode) + ", not corrupt, draw or apply";
  if (flavour != kHendrycks && flavour != kBethge) return "flavour is " + std::to_string(flavour) + ", not 0 or 1";
  if (constants < -1 || constants >= kConstantSets) return "constants is " + std::to_string(constants) + ", not in -1..2";
  for (int64_t i = 0; i < n; ++i) {
    const VqsaImage& image = images[i];
    if (image.kind == kIdentity || image.kind == kJpegQuality || (image.kind > 0 && image.kind < kKinds)) {
      if (!kind_available(image.kind)) return where(i, "kind ") + std::to_string(image.kind) + " is not implemented in this build";
    } else {
      return where(i, "kind ") + std::to_string(image.kind) + " is unknown";
    }
    if (image.kind == kFrost && !has_frost_textures()) {
      return where(i, "frost needs its textures: pip install --no-deps imagecorruptions, or set VQSA_FROST_DIR to a folder with "
                      "frost1.png, frost2.png, frost4.jpg and frost5.jpg");
    }
    const int top = image.kind == kJpegQuality ? 100 : 5;
    if (image.kind != kIdentity && (image.severity < 1 || image.severity > top)) {
      return where(i, "severity is ") + std::to_string(image.severity) + "; it must be in 1.." + std::to_string(top);
    }
    if (image.height < 32 || image.width < 32) {
      return where(i, "the image is ") + std::to_string(image.height) + " x " + std::to_string(image.width) +
             " pixels; corruptions need at least 32 x 32";
    }
    if (int64_t{image.height} * image.width > kMaxPixels) {
      return where(i, "the image is ") + std::to_string(image.height) + " x " + std::to_string(image.width) +
             " pixels; at most 16777216 pixels are supported";
    }
    if (!same_image(image, mode)) return where(i, "the input or output pointer is null");
    if (mode != VQSA_CORRUPT && image.fields == nullptr &&
        field_words(image.kind, std::max(image.severity, 1), resolved_set(constants, image.height, image.width), flavour,
                    image.height, image.width) > 0) {
      return where(i, "the fields pointer is null");
    }
  }
  return "";
}

constexpr int64_t kAlign = 256;
int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

struct Layout {
  int64_t fields = 0;  // offset of the fields, where the workspace holds them
  int64_t bytes = 0;   // of the whole workspace of one image
  bool own_fields = false;
};

Sample make_sample(const VqsaImage& image, int flavour, int constants) {
  Sample s = {};
  s.in = image.in;
  s.out = image.out;
  s.fields = image.fields;
  s.noise = image.noise;
  s.key = image.key;
  s.height = image.height;
  s.width = image.width;
  s.kind = static_cast<int16_t>(image.kind);
  s.severity = static_cast<uint8_t>(image.kind == kIdentity ? 1 : image.severity);
  s.set = static_cast<uint8_t>(resolved_set(constants, image.height, image.width));
  s.flavour = static_cast<uint8_t>(flavour);
  return s;
}

Layout layout_of(const Sample& s, int mode) {
  Layout layout;
  const int64_t head = kAccWords * 4;
  int64_t size = aligned(head + scratch_bytes(s.kind, s.severity, s.set, s.flavour, s.height, s.width));
  if (mode == VQSA_CORRUPT && fused_needs_fields(s.kind)) {
    layout.own_fields = true;
    layout.fields = size;
    size += aligned(4 * field_words(s.kind, s.severity, s.set, s.flavour, s.height, s.width));
  }
  layout.bytes = size;
  return layout;
}

void bind(Sample* s, const Layout& layout, uint8_t* workspace, int mode) {
  s->work = workspace;
  if (layout.own_fields) s->fields = reinterpret_cast<uint32_t*>(workspace + layout.fields);
  if (mode == VQSA_CORRUPT) s->noise = nullptr;
}

// Scratch buffers outlive the threads of one call, so that pages are not returned and zeroed again
// by the system for every batch.
class ScratchPool {
 public:
  struct Buffer {
    std::unique_ptr<unsigned char[]> memory;
    size_t size = 0;
    unsigned char* at_least(size_t bytes) {
      if (bytes + kAlign > size) {
        memory.reset();
        memory.reset(new unsigned char[bytes + kAlign]);
        size = bytes + kAlign;
      }
      const size_t address = reinterpret_cast<size_t>(memory.get());
      return memory.get() + (kAlign - address % kAlign) % kAlign;
    }
  };

  std::unique_ptr<Buffer> take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::unique_ptr<Buffer>(new Buffer);
    std::unique_ptr<Buffer> b = std::move(free_.back());
    free_.pop_back();
    return b;
  }
  void give(std::unique_ptr<Buffer> b) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(b));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Buffer>> free_;
};

ScratchPool& scratch_pool() {
  static ScratchPool* const pool = new ScratchPool;
  return *pool;
}

void run_image(const VqsaImage& image, int mode, int flavour, int constants, const CpuStages& stages, bool emulated,
               const Tables* tables, ScratchPool::Buffer* buffer) {
  Sample s = make_sample(image, flavour, constants);
  const Layout layout = layout_of(s, mode);
  const std::vector<Step> steps = plan_steps(s.kind, static_cast<Mode>(mode), s.height, s.width);
  size_t shared = 0;
  for (const Step& step : steps) {
    shared = std::max(shared, emulated ? stages.emulated_shared_bytes(step.stage, s) : stages.shared_bytes(step.stage, s));
  }
  unsigned char* memory = buffer->at_least(static_cast<size_t>(layout.bytes) + shared);
  bind(&s, layout, memory, mode);
  for (const Step& step : steps) {
    if (emulated) {
      // Shared memory starts undefined on a GPU: no stage may rely on what is there.
      std::memset(memory + layout.bytes, 0xA5, stages.emulated_shared_bytes(step.stage, s));
    }
    (emulated ? stages.run_emulated : stages.run)(step.stage, step.iteration, s, tables, memory + layout.bytes);
  }
}

}  // namespace

extern "C" {

const char* vqsa_last_error(void) { return last_error.c_str(); }

int vqsa_kind_available(int kind) { return kind_available(kind) ? 1 : 0; }

int vqsa_has_cuda(void) { return cuda_built() ? 1 : 0; }

const char* vqsa_cpu_isa(void) { return cpu_stages().name; }

int64_t vqsa_field_words(int kind, int severity, int flavour, int constants, int height, int width) {
  if (!kind_available(kind)) return -1;
  return field_words(kind, severity, resolved_set(constants, height, width), flavour, height, width);
}

int64_t vqsa_noise_words(int kind, int severity, int flavour, int constants, int height, int width) {
  if (!kind_available(kind)) return -1;
  return noise_words(kind, severity, resolved_set(constants, height, width), flavour, height, width);
}

int vqsa_run_cpu(const VqsaImage* images, int64_t n, int mode, int flavour, int constants, int n_threads, int impl,
                 const char* isa) {
  const std::string wrong = check_batch(images, n, mode, flavour, constants);
  if (!wrong.empty()) return fail(wrong);
  const CpuStages* stages = isa ? cpu_stages_named(isa) : &cpu_stages();
  if (stages == nullptr) return fail(std::string("this processor or build has no instruction set '") + isa + "'");
  const Tables* tables = &host_tables();
  const bool emulated = impl == VQSA_IMPL_EMULATED;

  std::atomic<int64_t> next(0);
  std::atomic<bool> out_of_memory(false);
  auto work = [&] {
    try {
      std::unique_ptr<ScratchPool::Buffer> buffer = scratch_pool().take();
      for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) {
        run_image(images[i], mode, flavour, constants, *stages, emulated, tables, buffer.get());
      }
      scratch_pool().give(std::move(buffer));
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
      next = n;
    }
  };
  const int64_t threads = std::min<int64_t>(std::max(n_threads, 1), n);
  std::vector<std::thread> helpers;
  try {
    for (int64_t t = 1; t < threads; ++t) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that run do all the work.
  }
  work();
  for (std::thread& t : helpers) t.join();
  if (out_of_memory) {
    fail("the CPU ran out of memory for the scratch of " + std::to_string(threads) +
         " threads, part of the batch is not corrupted; use fewer threads or smaller images");
    return VQSA_OUT_OF_MEMORY;
  }
  return 0;
}

int vqsa_workspace_cuda(const VqsaImage* images, int64_t n, int mode, int flavour, int constants, size_t* bytes) {
  const std::string wrong = check_batch(images, n, mode, flavour, constants);
  if (!wrong.empty()) return fail(wrong);
  size_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    total += static_cast<size_t>(layout_of(make_sample(images[i], flavour, constants), mode).bytes);
  }
  *bytes = total;
  return 0;
}

int vqsa_run_cuda(const VqsaImage* images, int64_t n, int mode, int flavour, int constants, void* workspace,
                  size_t workspace_bytes, void* stream) {
  const std::string wrong = check_batch(images, n, mode, flavour, constants);
  if (!wrong.empty()) return fail(wrong);
  if (n == 0) return 0;
  std::string error = cuda_prepare();
  if (!error.empty()) return fail(error);

  // Samples of one kind run together, so that a launch has one program.
  std::vector<Sample> samples(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) samples[i] = make_sample(images[i], flavour, constants);
  std::stable_sort(samples.begin(), samples.end(), [](const Sample& a, const Sample& b) { return a.kind < b.kind; });

  std::vector<Layout> layouts(samples.size());
  size_t offset = 0;
  for (size_t i = 0; i < samples.size(); ++i) {
    layouts[i] = layout_of(samples[i], mode);
    if (offset + static_cast<size_t>(layouts[i].bytes) > workspace_bytes) {
      return fail("the workspace has " + std::to_string(workspace_bytes) + " bytes; ask vqsa_workspace_cuda for the size");
    }
    bind(&samples[i], layouts[i], static_cast<uint8_t*>(workspace) + offset, mode);
    offset += static_cast<size_t>(layouts[i].bytes);
  }

  for (size_t begin = 0; begin < samples.size();) {
    size_t end = begin;
    int height = 0, width = 0;
    while (end < samples.size() && samples[end].kind == samples[begin].kind) {
      height = std::max(height, samples[end].height);
      width = std::max(width, samples[end].width);
      ++end;
    }
    for (const Step& step : plan_steps(samples[begin].kind, static_cast<Mode>(mode), height, width)) {
      error = cuda_launch(step, samples.data() + begin, static_cast<int>(end - begin), stream);
      if (!error.empty()) return fail(error);
    }
    begin = end;
  }
  return 0;
}

int vqsa_set_frost_textures(const uint8_t* const* rgb, const int32_t* heights, const int32_t* widths) {
  Texture textures[kFrostVariants * 4];
  for (int i = 0; i < kFrostVariants * 4; ++i) {
    if (rgb[i] == nullptr || heights[i] < 33 || widths[i] < 33) {
      return fail("frost texture " + std::to_string(i) + " is missing or smaller than 33 x 33 pixels");
    }
    textures[i] = {rgb[i], heights[i], widths[i]};
  }
  set_frost_textures(textures);
  return 0;
}

int vqsa_has_frost_textures(void) { return has_frost_textures() ? 1 : 0; }

void vqsa_philox4x32(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const generic::Words4 q = generic::philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  out[0] = q.w0;
  out[1] = q.w1;
  out[2] = q.w2;
  out[3] = q.w3;
}

}  // extern "C"

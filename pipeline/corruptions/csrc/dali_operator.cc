// The DALI operator vqsa.corrupt (registered as vqsa__Corrupt): per-sample corruption of HWC uint8
// images on CPU and GPU. A thin front: checking, drawing and applying are the core's.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "core.h"
#include "dali/core/error_handling.h"
#include "dali/kernels/dynamic_scratchpad.h"
#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#include "dali/pipeline/operator/operator.h"

namespace vqsa {

template <typename Backend>
class Corrupt : public ::dali::StatelessOperator<Backend> {
 public:
  explicit Corrupt(const ::dali::OpSpec& spec)
      : ::dali::StatelessOperator<Backend>(spec),
        flavour_(flavour_of(spec.GetArgument<std::string>("flavour"))),
        constants_(constants_of(spec.GetArgument<std::string>("constants"))) {}

 protected:
  bool SetupImpl(std::vector<::dali::OutputDesc>& output_desc, const ::dali::Workspace& ws) override {
    const auto& input = ws.Input<Backend>(0);
    DALI_ENFORCE(input.type() == DALI_UINT8,
                 ::dali::make_string("vqsa.corrupt needs uint8 images, got ", input.type(),
                                     "; corrupt before normalising"));
    const auto shape = input.shape();
    DALI_ENFORCE(shape.sample_dim() == 3, ::dali::make_string("vqsa.corrupt needs HWC images, got samples with ",
                                                              shape.sample_dim(), " dimensions"));
    const auto layout = input.GetLayout();
    DALI_ENFORCE(layout.empty() || layout == "HWC",
                 ::dali::make_string("vqsa.corrupt needs layout HWC, got ", layout.str()));
    for (int i = 0; i < shape.num_samples(); ++i) {
      DALI_ENFORCE(shape.tensor_shape_span(i)[2] == 3,
                   ::dali::make_string("vqsa.corrupt needs 3 channels (RGB), sample ", i, " has ",
                                       shape.tensor_shape_span(i)[2]));
    }
    output_desc.resize(1);
    output_desc[0] = {shape, DALI_UINT8};
    return true;
  }

  void RunImpl(::dali::Workspace& ws) override;

 private:
  static int flavour_of(const std::string& name) {
    if (name == "hendrycks") return VQSA_FLAVOUR_HENDRYCKS;
    if (name == "bethge") return VQSA_FLAVOUR_BETHGE;
    DALI_FAIL("vqsa.corrupt: unknown flavour '" + name + "'; use 'hendrycks' or 'bethge'");
  }

  static int constants_of(const std::string& name) {
    if (name == "auto") return VQSA_CONSTANTS_AUTO;
    if (name == "imagenet") return VQSA_CONSTANTS_IMAGENET;
    if (name == "tiny_imagenet") return VQSA_CONSTANTS_TINY_IMAGENET;
    if (name == "cifar10") return VQSA_CONSTANTS_CIFAR10;
    DALI_FAIL("vqsa.corrupt: unknown constants '" + name + "'; use 'auto', 'imagenet', 'tiny_imagenet' or 'cifar10'");
  }

  // One integer per sample, from a constant or a per-sample argument of 32 or 64 bits.
  std::vector<int64_t> integers(const ::dali::Workspace& ws, const std::string& name, int n, bool wide) const {
    std::vector<int64_t> values(n);
    if (!this->spec_.HasTensorArgument(name)) {
      const int64_t v = wide ? this->spec_.template GetArgument<int64_t>(name)
                             : int64_t{this->spec_.template GetArgument<int>(name)};
      std::fill(values.begin(), values.end(), v);
      return values;
    }
    const auto& arg = ws.ArgumentInput(name);
    DALI_ENFORCE(arg.num_samples() == n && arg.shape().num_elements() == n,
                 ::dali::make_string("vqsa.corrupt: '", name, "' needs one scalar per sample"));
    for (int i = 0; i < n; ++i) {
      switch (arg.type()) {
        case DALI_INT64:
          values[i] = *static_cast<const int64_t*>(arg.raw_tensor(i));
          break;
        case DALI_UINT64:
          values[i] = static_cast<int64_t>(*static_cast<const uint64_t*>(arg.raw_tensor(i)));
          break;
        case DALI_INT32:
          DALI_ENFORCE(!wide, "vqsa.corrupt: 'key' must be INT64; in numpy use .view(np.int64) on uint64 keys");
          values[i] = *static_cast<const int32_t*>(arg.raw_tensor(i));
          break;
        default:
          DALI_FAIL(::dali::make_string("vqsa.corrupt: '", name, "' is ", arg.type(), "; use INT32 or INT64"));
      }
    }
    return values;
  }

  std::vector<VqsaImage> images(::dali::Workspace& ws) const {
    const auto& input = ws.Input<Backend>(0);
    auto& output = ws.Output<Backend>(0);
    output.SetLayout("HWC");
    const int n = input.num_samples();
    const std::vector<int64_t> kind = integers(ws, "kind", n, false), severity = integers(ws, "severity", n, false),
                               key = integers(ws, "key", n, true);
    std::vector<VqsaImage> batch(n);
    for (int i = 0; i < n; ++i) {
      const auto shape = input.tensor_shape_span(i);
      batch[i] = VqsaImage{};
      batch[i].in = input.template tensor<uint8_t>(i);
      batch[i].out = output.template mutable_tensor<uint8_t>(i);
      batch[i].height = static_cast<int32_t>(shape[0]);
      batch[i].width = static_cast<int32_t>(shape[1]);
      batch[i].kind = static_cast<int32_t>(kind[i]);
      batch[i].severity = static_cast<int32_t>(severity[i]);
      batch[i].key = static_cast<uint64_t>(key[i]);
    }
    return batch;
  }

  int flavour_, constants_;
};

namespace {
void enforce(int status) {
  if (status != 0) DALI_FAIL(std::string("vqsa.corrupt: ") + vqsa_last_error());
}
}  // namespace

template <>
void Corrupt<::dali::CPUBackend>::RunImpl(::dali::Workspace& ws) {
  const std::vector<VqsaImage> batch = images(ws);
  auto& pool = ws.GetThreadPool();
  for (size_t i = 0; i < batch.size(); ++i) {
    const VqsaImage* image = &batch[i];
    pool.AddWork(
        [this, image, i](int) {
          if (vqsa_run_cpu(image, 1, VQSA_CORRUPT, flavour_, constants_, 1, VQSA_IMPL_BEST, nullptr) != 0) {
            DALI_FAIL(::dali::make_string("vqsa.corrupt: sample ", i, " of the batch: ", vqsa_last_error()));
          }
        },
        int64_t{image->height} * image->width);
  }
  pool.RunAll();
}

template <>
void Corrupt<::dali::GPUBackend>::RunImpl(::dali::Workspace& ws) {
  const std::vector<VqsaImage> batch = images(ws);
  const int64_t n = static_cast<int64_t>(batch.size());
  size_t bytes = 0;
  enforce(vqsa_workspace_cuda(batch.data(), n, VQSA_CORRUPT, flavour_, constants_, &bytes));
  ::dali::kernels::DynamicScratchpad scratch(ws.stream());
  void* workspace = bytes > 0 ? scratch.AllocateGPU<uint8_t>(bytes, 256) : nullptr;
  enforce(vqsa_run_cuda(batch.data(), n, VQSA_CORRUPT, flavour_, constants_, workspace, bytes, ws.stream()));
}

DALI_SCHEMA(vqsa__Corrupt)
    .DocStr("Applies one of the ImageNet-C corruptions to each image, chosen per sample. RGB uint8 HWC in and out; "
            "the result depends on the image, kind, severity and key only.")
    .NumInput(1)
    .NumOutput(1)
    .InputLayout(0, "HWC")
    .AddArg("kind", "Number of the corruption: its index in pipeline.corruptions.KINDS.", DALI_INT32, true)
    .AddArg("severity", "1 to 5; ignored for identity.", DALI_INT32, true)
    .AddArg("key", "The bits of a uint64 as INT64; equal keys give equal random draws.", DALI_INT64, true)
    .AddOptionalArg<std::string>("flavour", "'hendrycks' (ImageNet-C) or 'bethge' (PyPI imagecorruptions).", "hendrycks")
    .AddOptionalArg<std::string>("constants", "'auto', 'imagenet', 'tiny_imagenet' or 'cifar10'.", "auto");

DALI_REGISTER_OPERATOR(vqsa__Corrupt, Corrupt<::dali::CPUBackend>, ::dali::CPU);
DALI_REGISTER_OPERATOR(vqsa__Corrupt, Corrupt<::dali::GPUBackend>, ::dali::GPU);

}  // namespace vqsa

// Read from the file by dali_operator.py before the library is loaded.
extern "C" __attribute__((visibility("default"), used)) const char vqsa_dali_version[] =
    "vqsa compiled against DALI " VQSA_DALI_VERSION;

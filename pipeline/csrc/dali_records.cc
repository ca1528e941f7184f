// The DALI operator vqsa.records (registered as vqsa__Records): encoded images where they lie in memory.
//
// Feeding a batch to external_source as a list of arrays costs Python some 5 us per image, with the interpreter lock
// held; here one array of addresses is fed, and the images are handed on as views, without a copy.
#include <cstdint>
#include <memory>
#include <vector>

#include "dali/core/error_handling.h"
#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#include "dali/pipeline/operator/operator.h"

namespace vqsa {

class Records : public ::dali::StatelessOperator<::dali::CPUBackend> {
 public:
  explicit Records(const ::dali::OpSpec& spec) : ::dali::StatelessOperator<::dali::CPUBackend>(spec) {}

 protected:
  bool HasContiguousOutputs() const override { return false; }

  bool SetupImpl(std::vector<::dali::OutputDesc>&, const ::dali::Workspace&) override { return false; }

  void RunImpl(::dali::Workspace& ws) override {
    const auto& span = ws.Input<::dali::CPUBackend>(0);
    const int count = span.num_samples();
    DALI_ENFORCE(span.type() == DALI_INT64, "vqsa.records needs INT64: address and length of each image");
    ::dali::TensorList<::dali::CPUBackend> views;
    views.set_pinned(false);
    views.set_type(DALI_UINT8);
    views.set_sample_dim(1);
    views.SetSize(count);
    for (int i = 0; i < count; ++i) {
      const auto shape = span.tensor_shape_span(i);
      DALI_ENFORCE(shape.size() == 1 && shape[0] == 2,
                   "vqsa.records needs two numbers per sample: address and length of an image");
      const int64_t address = span.tensor<int64_t>(i)[0], length = span.tensor<int64_t>(i)[1];
      DALI_ENFORCE(address != 0 && length > 0,
                   ::dali::make_string("vqsa.records: sample ", i, " of the batch has ", length, " bytes at ", address));
      // Owned by who fed the addresses, who keeps the memory for as long as the batch is worked on.
      std::shared_ptr<void> view(std::shared_ptr<void>(), reinterpret_cast<void*>(address));
      views.SetSample(i, view, size_t(length), false, {length}, DALI_UINT8, views.device_id(), views.order());
    }
    ws.Output<::dali::CPUBackend>(0).ShareData(views);
  }
};

DALI_SCHEMA(vqsa__Records)
    .DocStr("Encoded images where they lie in this process's memory. The input has the address and the length in "
            "bytes of each, INT64; the memory must stay for as long as the batch is worked on. Nothing is copied.")
    .NumInput(1)
    .NumOutput(1)
    .InputDevice(0, ::dali::InputDevice::CPU);

DALI_REGISTER_OPERATOR(vqsa__Records, Records, ::dali::CPU);

}  // namespace vqsa

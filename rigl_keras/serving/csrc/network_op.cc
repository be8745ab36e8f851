// A TensorFlow operation that computes a whole network.

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../kernels/csrc/runtime.h"
#include "rigl_network.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/partial_tensor_shape.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/env.h"

namespace rigl_keras {
namespace {

// Before any operation is registered below.
const bool first_copy = FirstCopyOf("RiglKerasNetwork");

constexpr size_t kErrorBytes = 1024;

using Loaded = std::shared_ptr<rigl_network>;

// The checksum that stands in a file's header, or -1 where there is none.
int64_t ChecksumOf(const std::string& file) {
  constexpr size_t kPlace = 24;
  uint32_t checksum;
  if (file.size() < kPlace + sizeof checksum) return -1;
  std::memcpy(&checksum, file.data() + kPlace,
              sizeof checksum);
  return checksum;
}

tensorflow::Status Load(const std::string& path, int64_t checksum, int threads,
                        Loaded* loaded) {
  // Not mapped: whoever reads a mapped file that somebody cuts short is ended
  // by a signal.
  std::string file;
  TF_RETURN_IF_ERROR(
      tensorflow::ReadFileToString(tensorflow::Env::Default(), path, &file));
  // One of another model, or of an export that has taken its place.
  if (ChecksumOf(file) != checksum)
    return tensorflow::errors::DataLoss(
        "the file '", path, "' is not the one that this model was exported "
        "with. Export the model again");
  char error[kErrorBytes] = "";
  loaded->reset(rigl_network_load_memory(file.data(), file.size(), threads,
                                         error, sizeof error),
                rigl_network_free);
  if (*loaded) return tensorflow::OkStatus();
  loaded->reset();
  return tensorflow::errors::DataLoss("the file '", path,
                                      "' cannot be loaded: ", error);
}

// The network of a file. Those who ask for one that somebody has get the same:
// its weights are in memory once, however many functions call it.
tensorflow::Status Shared(const std::string& path, int64_t checksum,
                          int threads, Loaded* loaded) {
  static std::mutex* const mutex = new std::mutex;
  static auto* const known =
      new std::map<std::tuple<std::string, int64_t, int>,
                   std::weak_ptr<rigl_network>>;
  std::lock_guard<std::mutex> lock(*mutex);
  const auto key = std::make_tuple(path, checksum, threads);
  const auto at = known->find(key);
  if (at != known->end() && (*loaded = at->second.lock()))
    return tensorflow::OkStatus();
  TF_RETURN_IF_ERROR(Load(path, checksum, threads, loaded));
  for (auto one = known->begin(); one != known->end();)
    one = one->second.expired() ? known->erase(one) : std::next(one);
  (*known)[key] = *loaded;
  return tensorflow::OkStatus();
}

class NetworkOperation : public OpKernel {
 public:
  explicit NetworkOperation(OpKernelConstruction* context)
      : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("checksum", &checksum_));
    OP_REQUIRES_OK(context, context->GetAttr("threads", &threads_));
  }

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& path = context->input(0);
    if (path.dims() != 0)
      return InvalidArgument("a path is one string. Received: ",
                             path.shape().DebugString());
    Loaded network;
    TF_RETURN_IF_ERROR(
        Get(context, path.scalar<tensorflow::tstring>()(), &network));
    const int count = context->num_inputs() - 1;
    if (count != rigl_network_input_count(network.get()) ||
        context->num_outputs() != rigl_network_output_count(network.get()))
      return InvalidArgument(
          "the network has ", rigl_network_input_count(network.get()),
          " inputs and ", rigl_network_output_count(network.get()),
          " outputs. Received: ", count, " and ", context->num_outputs());
    std::vector<const float*> inputs;
    std::vector<int64_t> shapes;
    for (int i = 0; i < count; ++i) {
      const Tensor& input = context->input(i + 1);
      const rigl_network_value value = rigl_network_input(network.get(), i);
      if (input.dims() != value.axes)
        return InvalidArgument("input '", value.name, "' has ", value.axes,
                               " axes. Received: ",
                               input.shape().DebugString());
      inputs.push_back(Read(input));
      for (int a = 0; a < input.dims(); ++a)
        shapes.push_back(input.dim_size(a));
    }
    std::vector<int64_t> made(context->num_outputs() * RIGL_NETWORK_MOST_AXES);
    char error[kErrorBytes] = "";
    if (rigl_network_output_shapes(network.get(), shapes.data(), made.data(),
                                   error, sizeof error))
      return InvalidArgument(error);
    std::vector<float*> outputs;
    const int64_t* next = made.data();
    for (int i = 0; i < context->num_outputs(); ++i) {
      const int axes = rigl_network_output(network.get(), i).axes;
      TensorShape shape;
      TF_RETURN_IF_ERROR(
          tensorflow::TensorShapeUtils::MakeShape(next, axes, &shape));
      next += axes;
      Tensor* output = nullptr;
      TF_RETURN_IF_ERROR(context->allocate_output(i, shape, &output));
      outputs.push_back(Write(output));
    }
    if (rigl_network_run(network.get(), inputs.data(), shapes.data(),
                         outputs.data(), error, sizeof error))
      return InvalidArgument(error);
    return tensorflow::OkStatus();
  }

 private:
  tensorflow::Status Get(OpKernelContext* context, const std::string& path,
                         Loaded* network) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!network_ || path_ != path) {
      const int threads = threads_ ? threads_ : Threads(context);
      Loaded found;
      TF_RETURN_IF_ERROR(Shared(path, checksum_, threads, &found));
      network_ = std::move(found);
      path_ = path;
    }
    *network = network_;
    return tensorflow::OkStatus();
  }

  int64_t checksum_;
  int32_t threads_;
  std::mutex mutex_;  // of what follows
  std::string path_;
  Loaded network_;
};

namespace shapes = tensorflow::shape_inference;

// `shapes` are those of the outputs, their first axis the batch.
REGISTER_OP("RiglKerasNetwork")
    .Input("path: string")
    .Input("inputs: count * float")
    .Output("outputs: results * float")
    .Attr("count: int >= 1")
    .Attr("results: int >= 1")
    .Attr("checksum: int")
    .Attr("shapes: list(shape)")
    .Attr("threads: int >= 0 = 0")
    .SetShapeFn([](shapes::InferenceContext* context) {
      std::vector<tensorflow::PartialTensorShape> given;
      TF_RETURN_IF_ERROR(context->GetAttr("shapes", &given));
      if (static_cast<int>(given.size()) != context->num_outputs())
        return InvalidArgument("a shape is needed for each of ",
                               context->num_outputs(), " outputs. Received: ",
                               given.size());
      shapes::ShapeHandle path, input, output;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 0, &path));
      shapes::DimensionHandle batch = context->UnknownDim();
      for (int i = 1; i < context->num_inputs(); ++i) {
        TF_RETURN_IF_ERROR(
            context->WithRankAtLeast(context->input(i), 1, &input));
        if (context->RankKnown(input))
          TF_RETURN_IF_ERROR(
              context->Merge(batch, context->Dim(input, 0), &batch));
      }
      for (int i = 0; i < context->num_outputs(); ++i) {
        TF_RETURN_IF_ERROR(
            context->MakeShapeFromPartialTensorShape(given[i], &output));
        TF_RETURN_IF_ERROR(context->WithRankAtLeast(output, 1, &output));
        TF_RETURN_IF_ERROR(context->ReplaceDim(output, 0, batch, &output));
        context->set_output(i, output);
      }
      return tensorflow::OkStatus();
    });

[[maybe_unused]] const bool registered = [] {
  if (!first_copy) return false;
  Register<NetworkOperation>("RiglKerasNetwork");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

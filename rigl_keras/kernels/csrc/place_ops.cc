// TensorFlow operations on some places of a tensor, in few passes over all of
// it: what an update that looks at few weights takes its time for.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "plans.h"
#include "runtime.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace rigl_keras {
namespace {

// Before any operation is registered below.
const bool first_copy = FirstCopyOf("RiglKerasPlaces");

tensorflow::Status CheckPlaces(OpKernelContext* context, const Tensor& places,
                               int64_t size) {
  if (places.dims() != 1)
    return InvalidArgument("places must be a vector. Received: ",
                           places.shape().DebugString());
  const int64_t* at = Read<int64_t>(places);
  std::atomic<bool> inside{true};
  ForPieces(context, places.NumElements(),
            [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i)
                if (at[i] < 0 || at[i] >= size) inside = false;
            });
  if (inside) return tensorflow::OkStatus();
  return InvalidArgument("places must be in [0, ", size, ").");
}

void Copy(OpKernelContext* context, const Tensor& from, Tensor* to) {
  const char* source = static_cast<const char*>(from.data());
  char* target = static_cast<char*>(to->data());
  ForPieces(context, from.TotalBytes(),
            [=](int64_t begin, int64_t end) {
              std::memcpy(target + begin, source + begin, end - begin);
            });
}

// A mask of bytes (runtime.h), of one of bools and the places to look at.
class LookAt : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& mask = context->input(0);
    const Tensor& places = context->input(1);
    TF_RETURN_IF_ERROR(CheckPlaces(context, places, mask.NumElements()));
    Tensor* looked = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(0, mask.shape(), &looked));
    Copy(context, mask, looked);
    uint8_t* to = Write<uint8_t>(looked);
    const int64_t* at = Read<int64_t>(places);
    for (int64_t i = 0; i < places.NumElements(); ++i)
      to[at[i]] |= kLookedAt & ~kKept;
    return tensorflow::OkStatus();
  }
};

// Where a tensor of bytes is not 0, rising.
class PlacesOf : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& marked = context->input(0);
    const uint8_t* marks = Read<uint8_t>(marked);
    const int64_t size = marked.NumElements();
    constexpr int64_t kPiece = 1 << 16;
    const int64_t pieces = CeilDivide(size, kPiece);
    const auto for_pieces = [&](const auto& run) {
      ForEach(context, pieces, [&](int64_t i) {
        run(i, i * kPiece, std::min(size, (i + 1) * kPiece));
      });
    };
    std::vector<int64_t> first(pieces + 1);
    for_pieces([&](int64_t i, int64_t begin, int64_t end) {
      int32_t count = 0;
      for (int64_t e = begin; e < end; ++e) count += marks[e] != 0;
      first[i + 1] = count;
    });
    for (size_t i = 1; i < first.size(); ++i) first[i] += first[i - 1];
    Tensor* places = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(
        0, TensorShape({first.back()}), &places));
    int64_t* to = Write<int64_t>(places);
    for_pieces([&](int64_t i, int64_t begin, int64_t end) {
      int64_t next = first[i];
      // What was counted: somebody may write to what is not theirs.
      ForMarked(marks, 0xff, begin, end, [&](int64_t e) {
        if (next < first[i + 1]) to[next++] = e;
      });
    });
    return tensorflow::OkStatus();
  }
};

// A tensor with other values at some places, no two of them the same.
class WithValues : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& dense = context->input(0);
    const Tensor& places = context->input(1);
    const Tensor& values = context->input(2);
    TF_RETURN_IF_ERROR(CheckPlaces(context, places, dense.NumElements()));
    if (values.shape() != places.shape())
      return InvalidArgument("each place must have a value. Received: ",
                             values.shape().DebugString(), " for ",
                             places.shape().DebugString());
    Tensor* written = nullptr;
    TF_RETURN_IF_ERROR(context->forward_input_or_allocate_output(
        {0}, 0, dense.shape(), &written));
    if (written->data() != dense.data()) Copy(context, dense, written);
    if (dense.dtype() == tensorflow::DT_FLOAT)
      Put<float>(context, places, values, written);
    else
      Put<uint8_t>(context, places, values, written);
    return tensorflow::OkStatus();
  }

 private:
  template <typename T>
  static void Put(OpKernelContext* context, const Tensor& places,
                  const Tensor& values, Tensor* written) {
    const int64_t* at = Read<int64_t>(places);
    const T* from = Read<T>(values);
    T* to = Write<T>(written);
    ForPieces(context, places.NumElements(),
              [=](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) to[at[i]] = from[i];
              });
  }
};

namespace shapes = tensorflow::shape_inference;

REGISTER_OP("RiglKerasLookAt")
    .Input("mask: bool")
    .Input("places: int64")
    .Output("looked: uint8")
    .SetShapeFn(shapes::UnchangedShape);

REGISTER_OP("RiglKerasPlaces")
    .Input("marked: type")
    .Attr("type: {bool, uint8}")
    .Output("places: int64")
    .SetShapeFn([](shapes::InferenceContext* context) {
      context->set_output(0, context->Vector(context->UnknownDim()));
      return tensorflow::OkStatus();
    });

REGISTER_OP("RiglKerasWithValues")
    .Input("dense: type")
    .Input("places: int64")
    .Input("values: type")
    .Attr("type: {bool, float}")
    .Output("written: type")
    .SetShapeFn(shapes::UnchangedShape);

[[maybe_unused]] const bool registered = [] {
  if (!first_copy) return false;
  Register<LookAt>("RiglKerasLookAt");
  Register<PlacesOf>("RiglKerasPlaces");
  Register<WithValues>("RiglKerasWithValues");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

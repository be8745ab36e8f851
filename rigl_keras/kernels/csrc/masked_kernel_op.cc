// A TensorFlow operation that multiplies a kernel by its mask, where it must.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <list>
#include <mutex>

#include "plans.h"
#include "runtime.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace rigl_keras {
namespace {

// Before any operation is registered below.
const bool first_copy = FirstCopyOf("RiglKerasMaskedKernel");

// kernel * mask. What was computed is kept for as long as both are the same
// tensors, and is the kernel itself where that is zero outside its mask.
//
// As with plans (plan_cache.h) a tensor is known by its buffer: TensorFlow
// never writes to a buffer that somebody else holds, and these are held here.
// So a variable that has been assigned, or changed in its place, lies in
// another one.
class MaskedKernel : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& kernel = context->input(0);
    const Tensor& mask = context->input(1);
    if (kernel.shape() != mask.shape())
      return InvalidArgument("a mask has its kernel's shape. Received: ",
                             kernel.shape().DebugString(), " and ",
                             mask.shape().DebugString());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto at = kept_.begin(); at != kept_.end(); ++at) {
        if (!Same(at->kernel, kernel) || !Same(at->mask, mask)) continue;
        context->set_output(0, at->masked ? kernel : at->product);
        kept_.splice(kept_.begin(), kept_, at);
        return tensorflow::OkStatus();
      }
    }
    const MaskBytes kept(mask);
    const uint8_t* m = kept.data();
    Kept fresh{kernel, mask, IsMasked(context, kernel, m), Tensor()};
    if (fresh.masked) {
      context->set_output(0, kernel);
    } else {
      Tensor* product = nullptr;
      TF_RETURN_IF_ERROR(
          context->allocate_output(0, kernel.shape(), &product));
      const float* k = Read(kernel);
      float* to = Write(product);
      ForPieces(context, kernel.NumElements(),
                [=](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) to[i] = m[i] ? k[i] : 0.0f;
                });
      fresh.product = *product;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    // What nobody else holds will not come again.
    kept_.remove_if([](const Kept& one) {
      return one.kernel.RefCountIsOne() || one.mask.RefCountIsOne();
    });
    kept_.push_front(std::move(fresh));
    if (kept_.size() > kMostKernels) kept_.pop_back();
    return tensorflow::OkStatus();
  }

 private:
  // Run eagerly, all layers of a model may share a kernel of an operation.
  static constexpr size_t kMostKernels = 256;

  struct Kept {
    Tensor kernel, mask;
    bool masked;  // it is the product
    Tensor product;
  };

  // Whether the product would be the kernel, bit for bit.
  static bool IsMasked(OpKernelContext* context, const Tensor& kernel,
                       const uint8_t* m) {
    std::atomic<bool> masked{true};
    const float* k = Read(kernel);
    ForPieces(context, kernel.NumElements(), [&](int64_t begin, int64_t end) {
      if (!masked.load(std::memory_order_relaxed)) return;
      int32_t others = 0;  // without a branch: the loop is vectorised
      for (int64_t i = begin; i < end; ++i)
        others |= (m[i] == 0) & (k[i] != 0);
      if (others) masked.store(false, std::memory_order_relaxed);
    });
    return masked.load(std::memory_order_relaxed);
  }

  static bool Same(const Tensor& a, const Tensor& b) {
    return a.data() == b.data() && a.shape() == b.shape();
  }

  std::mutex mutex_;
  std::list<Kept> kept_;  // the latest first
};

namespace shapes = tensorflow::shape_inference;

REGISTER_OP("RiglKerasMaskedKernel")
    .Input("kernel: float")
    .Input("mask: mask_type")
    .Attr("mask_type: {bool, float} = DT_FLOAT")
    .Output("product: float")
    .SetShapeFn([](shapes::InferenceContext* context) {
      shapes::ShapeHandle shape;
      TF_RETURN_IF_ERROR(
          context->Merge(context->input(0), context->input(1), &shape));
      context->set_output(0, shape);
      return tensorflow::OkStatus();
    });

[[maybe_unused]] const bool registered = [] {
  if (!first_copy) return false;
  Register<MaskedKernel>("RiglKerasMaskedKernel");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

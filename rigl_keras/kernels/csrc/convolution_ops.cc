// TensorFlow operations over lanes.h: convolutions with a sparse kernel.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "convolution_shapes.h"
#include "lanes.h"
#include "plans.h"
#include "runtime.h"
#include "sparse_convolution.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/util.h"

namespace rigl_keras {
namespace {

// Before any operation is registered below.
const bool first_copy = FirstCopyOf("RiglKerasComputedBy");

template <bool transposed>
class SparseConv2D : public SparseProduct<transposed> {
 public:
  explicit SparseConv2D(OpKernelConstruction* context)
      : SparseProduct<transposed>(context, false) {}

 protected:
  bool Correlate(OpKernelContext* context, const RiglPlan& plan, bool add,
                 const float* x, const float* weights,
                 float* y) const override {
    const RiglLanes& lanes = BestLanes();
    std::atomic<bool> short_of_memory{false};
    ForEach(context, plan.groups * plan.splits, [&](int64_t unit) {
      const Scratch memory(plan.packed_floats + plan.micro_floats);
      if (!memory.data)
        short_of_memory = true;
      else
        lanes.correlate(&plan, add, x, weights, y, unit, memory.data);
    });
    return !short_of_memory;
  }
};

class SparseConv2DBackpropFilter : public KernelGradient {
 public:
  explicit SparseConv2DBackpropFilter(OpKernelConstruction* context)
      : KernelGradient(context, false) {}

 protected:
  int64_t Chunks(const RiglPlan&) const override { return 1; }

  bool SumUp(const RiglPlan& plan, const float* x, const float* dy,
             const Share& share, float* sums) const override {
    std::fill_n(sums, CountOf(plan), 0.0f);
    const Scratch memory(plan.packed_floats + plan.micro_floats);
    if (!memory.data) return false;
    for (int64_t group = share.begin; group < share.end; ++group)
      BestLanes().correlate_weights(&plan, x, dy, sums, group, memory.data);
    return true;
  }
};

// What a thread's memory would take, in bytes: of the forward pass, and of all
// three, were every weight left. More than the limit: no tile is within it.
class ScratchBytes : public SparseConvolution {
 public:
  explicit ScratchBytes(OpKernelConstruction* context)
      : SparseConvolution(context, false) {
    OP_REQUIRES_OK(context, context->GetAttr("in_lanes", &of_lanes_));
  }

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    TensorShape shapes[2], y_shape;
    for (int i = 0; i < 2; ++i) {
      const Tensor& sizes = context->input(i);
      if (sizes.dims() != 1 || sizes.dim_size(0) != 4)
        return InvalidArgument("images and kernel must be four sizes.");
      TF_RETURN_IF_ERROR(tensorflow::TensorShapeUtils::MakeShape(
          Read<int64_t>(sizes), 4, &shapes[i]));
    }
    Convolution conv;
    TF_RETURN_IF_ERROR(DescribeImages(shapes[0], shapes[1], of_lanes_, &conv,
                                      &y_shape));
    Tensor *bytes, *limit;
    TF_RETURN_IF_ERROR(
        context->allocate_output(0, TensorShape({2}), &bytes));
    TF_RETURN_IF_ERROR(context->allocate_output(1, TensorShape(), &limit));
    double most[2] = {};  // forward, and all passes
    if (shapes[0].num_elements() && y_shape.num_elements()) {
      const std::vector<int64_t> counts(
          int64_t{conv.kernel[0]} * conv.kernel[1], conv.weights());
      for (int pass = 0; pass < 3; ++pass) {  // the last is the filter's
        std::vector<Tap> taps = TapsOf(conv, counts, pass == 1);
        OwnedPlan owned;
        const bool fits =
            taps.empty() || PlanTaps(conv, pass == 1, pass < 2,
                                     Threads(context), BestLanes(), &taps,
                                     &owned);
        const RiglPlan& plan = owned.plan;
        const double floats =
            fits ? double(plan.packed_floats + plan.micro_floats)
                 : std::max(MostFloats() + 1, LeastFloats(plan, BestLanes()));
        if (!pass) most[0] = floats;
        most[1] = std::max(most[1], floats);
      }
    }
    for (int i = 0; i < 2; ++i)
      Write<int64_t>(bytes)[i] = std::min(most[i] * sizeof(float), 9e18);
    Write<int64_t>(limit)[0] = MostFloats() * sizeof(float);
    return tensorflow::OkStatus();
  }

 private:
  bool of_lanes_;
};

REGISTER_OP("RiglKerasConv2D")
    .Input("input: float")
    .Input("filter: float")
    .Input("mask: mask_type")
    .Attr("mask_type: {bool, uint8, float} = DT_FLOAT")
    .Output("output: float")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("dense_gradient: bool = false")
    .SetShapeFn([](InferenceContext* context) {
      Attributes attributes;
      TF_RETURN_IF_ERROR(attributes.Get(context));
      ShapeHandle kernel, y;
      TF_RETURN_IF_ERROR(
          context->Merge(context->input(1), context->input(2), &kernel));
      TF_RETURN_IF_ERROR(
          OutputOf(context, attributes, context->input(0), kernel, &y));
      return SetOutput(context, 0, y);
    });

REGISTER_OP("RiglKerasConv2DBackpropInput")
    .Input("out_backprop: float")
    .Input("filter: float")
    .Input("mask: mask_type")
    .Attr("mask_type: {bool, uint8, float} = DT_FLOAT")
    .Input("input_sizes: int32")
    .Output("output: float")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("dense_gradient: bool = false")
    .SetShapeFn([](InferenceContext* context) {
      Attributes attributes;
      TF_RETURN_IF_ERROR(attributes.Get(context));
      ShapeHandle x, kernel, y;
      TF_RETURN_IF_ERROR(context->MakeShapeFromShapeTensor(3, &x));
      TF_RETURN_IF_ERROR(context->WithRank(x, 4, &x));
      TF_RETURN_IF_ERROR(
          context->Merge(context->input(1), context->input(2), &kernel));
      TF_RETURN_IF_ERROR(OutputOf(context, attributes, x, kernel, &y));
      TF_RETURN_IF_ERROR(context->Merge(context->input(0), y, &y));
      return SetOutput(context, 0, x);
    });

REGISTER_OP("RiglKerasConv2DBackpropFilter")
    .Input("input: float")
    .Input("mask: mask_type")
    .Attr("mask_type: {bool, uint8, float} = DT_FLOAT")
    .Input("out_backprop: float")
    .Output("output: float")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .SetShapeFn([](InferenceContext* context) {
      Attributes attributes;
      TF_RETURN_IF_ERROR(attributes.Get(context));
      ShapeHandle kernel, y;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(1), 4, &kernel));
      TF_RETURN_IF_ERROR(
          OutputOf(context, attributes, context->input(0), kernel, &y));
      TF_RETURN_IF_ERROR(context->Merge(context->input(2), y, &y));
      return SetOutput(context, 0, kernel);
    });
// Bytes of a thread's memory (`ScratchBytes`).
REGISTER_OP("RiglKerasScratchBytes")
    .Input("images: int64")
    .Input("kernel: int64")
    .Output("bytes: int64")
    .Output("limit: int64")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("in_lanes: bool = false")
    .SetShapeFn([](InferenceContext* context) {
      context->set_output(0, context->Vector(2));
      context->set_output(1, context->Scalar());
      return tensorflow::OkStatus();
    });

// The instruction set of sparse products, and the library of TensorFlow's dense
// ones. The attribute says of which version the operations in a process are.
REGISTER_OP("RiglKerasComputedBy")
    .Output("sparse: string")
    .Output("dense: string")
    .Attr("sources: string = '" RIGL_SOURCES "'")
    .SetShapeFn([](shapes::InferenceContext* context) {
      context->set_output(0, context->Scalar());
      context->set_output(1, context->Scalar());
      return tensorflow::OkStatus();
    });

// How often a mask was turned into a plan in this process, and what the plans
// that are left take in memory.
REGISTER_OP("RiglKerasPlansMade")
    .Output("count: int64")
    .SetIsStateful()
    .SetShapeFn(shapes::ScalarShape);
REGISTER_OP("RiglKerasPlanBytes")
    .Output("bytes: int64")
    .SetIsStateful()
    .SetShapeFn(shapes::ScalarShape);

template <const std::atomic<int64_t>& number>
class Number : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    Tensor* output = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(0, TensorShape(), &output));
    *Write<int64_t>(output) = number.load(std::memory_order_relaxed);
    return tensorflow::OkStatus();
  }
};

class ComputedBy : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const char* const names[] = {
        BestLanes().name, tensorflow::IsMKLEnabled() ? "oneDNN" : "Eigen"};
    for (int i = 0; i < 2; ++i) {
      Tensor* name = nullptr;
      TF_RETURN_IF_ERROR(
          context->allocate_output(i, TensorShape(), &name));
      name->scalar<tensorflow::tstring>()() = names[i];
    }
    return tensorflow::OkStatus();
  }
};

[[maybe_unused]] const bool registered = [] {
  if (!first_copy) return false;
  Register<SparseConv2D<false>>("RiglKerasConv2D");
  Register<SparseConv2D<true>>("RiglKerasConv2DBackpropInput");
  Register<SparseConv2DBackpropFilter>("RiglKerasConv2DBackpropFilter");
  Register<ScratchBytes>("RiglKerasScratchBytes");
  Register<Number<plans_made>>("RiglKerasPlansMade");
  Register<Number<Order::held_bytes>>("RiglKerasPlanBytes");
  Register<ComputedBy>("RiglKerasComputedBy");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

// TensorFlow operations over lane_convolutions.h: convolutions with a sparse
// kernel, of images in lanes.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

#include "convolution_shapes.h"
#include "lane_convolutions.h"
#include "plans.h"
#include "runtime.h"
#include "sparse_convolution.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace rigl_keras {
namespace {

// Before any operation is registered below.
const bool first_copy = FirstCopyOf("RiglKerasLanesConv2D");

const RiglLaneConvolutions& BestLaneConvolutions() {
  static const RiglLaneConvolutions* const best =
      []() -> const RiglLaneConvolutions* {
    const std::string name = BestLanes().name;
#ifdef RIGL_X86
    if (name == rigl_lane_convolutions_avx512.name)
      return &rigl_lane_convolutions_avx512;
    if (name == rigl_lane_convolutions_avx2.name)
      return &rigl_lane_convolutions_avx2;
#endif
    return &rigl_lane_convolutions_portable;
  }();
  return *best;
}

// Units that one thread computes in a row, which each prefetches for the next.
int64_t UnitsInARow(OpKernelContext* context, int64_t units) {
  return std::max<int64_t>(1, units / (8 * Threads(context)));
}

template <bool transposed>
class LanesConv2D : public SparseProduct<transposed> {
 public:
  explicit LanesConv2D(OpKernelConstruction* context)
      : SparseProduct<transposed>(context, true) {}

 protected:
  bool Correlate(OpKernelContext* context, const RiglPlan& plan, bool add,
                 const float* x, const float* weights,
                 float* y) const override {
    const RiglLaneConvolutions& lanes = BestLaneConvolutions();
    std::atomic<bool> short_of_memory{false};
    ForEach(
        context, plan.groups,
        [&](int64_t unit) {
          const Scratch memory(plan.packed_floats + plan.micro_floats);
          if (!memory.data)
            short_of_memory = true;
          else
            lanes.correlate(&plan, add, x, weights, y, unit, memory.data);
        },
        UnitsInARow(context, plan.groups));
    return !short_of_memory;
  }
};

class LanesConv2DBackpropFilter : public KernelGradient {
 public:
  explicit LanesConv2DBackpropFilter(OpKernelConstruction* context)
      : KernelGradient(context, true) {}

 protected:
  int64_t Chunks(const RiglPlan& plan) const override {
    // Weights whose sums are kept at once: in a core's own cache.
    constexpr int64_t kMostSums = 12'000;
    return std::min(plan.out_channels, CeilDivide(CountOf(plan), kMostSums));
  }

  bool SumUp(const RiglPlan& plan, const float* x, const float* dy,
             const Share& share, float* sums) const override {
    const RiglLaneConvolutions& lanes = BestLaneConvolutions();
    const int64_t begin = plan.out_channels * share.chunk / share.chunks;
    const int64_t end = plan.out_channels * (share.chunk + 1) / share.chunks;
    // Its weights, block by block.
    const auto rows = [&](int b, int64_t o) {
      return plan.rows[b * plan.out_channels + o];
    };
    int64_t own = 0;
    for (int b = 0; b < plan.blocks; ++b) own += rows(b, end) - rows(b, begin);
    const Scratch memory(plan.packed_floats + plan.micro_floats +
                         own * (lanes.width + 1));
    if (!memory.data) return false;
    float* vectors = memory.data + plan.packed_floats + plan.micro_floats;
    std::fill_n(vectors, own * lanes.width, 0.0f);
    for (int64_t group = share.begin; group < share.end; ++group)
      lanes.correlate_weights(&plan, x, dy, vectors, begin, end, group,
                              memory.data);
    for (int b = 0; b < plan.blocks; ++b) {
      const int64_t some = rows(b, end) - rows(b, begin);
      lanes.sums(vectors, some, sums + rows(b, begin));
      vectors += some * lanes.width;
    }
    return true;
  }
};

// As OutputOf, of images in lanes.
tensorflow::Status LanesOutputOf(InferenceContext* context, ShapeHandle lanes,
                                 ShapeHandle kernel, ShapeHandle* outputs) {
  Attributes attributes;
  TF_RETURN_IF_ERROR(attributes.Get(context, true));
  ShapeHandle x, y;
  TF_RETURN_IF_ERROR(context->WithRank(lanes, 5, &x));
  TF_RETURN_IF_ERROR(OutputOf(
      context, attributes,
      context->MakeShape({context->UnknownDim(), context->Dim(x, 2),
                          context->Dim(x, 3), context->Dim(x, 1)}),
      kernel, &y));
  *outputs = context->MakeShape({context->Dim(x, 0), context->Dim(y, 3),
                                 context->Dim(y, 1), context->Dim(y, 2),
                                 context->Dim(x, 4)});
  return tensorflow::OkStatus();
}

REGISTER_OP("RiglKerasLanesConv2D")
    .Input("input: float")
    .Input("filter: float")
    .Input("mask: mask_type")
    .Attr("mask_type: {bool, uint8, float} = DT_FLOAT")
    .Output("output: float")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("pads: list(int) = [0, 0, 0, 0]")
    .Attr("dense_gradient: bool = false")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle kernel, y;
      TF_RETURN_IF_ERROR(
          context->Merge(context->input(1), context->input(2), &kernel));
      TF_RETURN_IF_ERROR(
          LanesOutputOf(context, context->input(0), kernel, &y));
      return SetOutput(context, 0, y);
    });

REGISTER_OP("RiglKerasLanesConv2DBackpropInput")
    .Input("out_backprop: float")
    .Input("filter: float")
    .Input("mask: mask_type")
    .Attr("mask_type: {bool, uint8, float} = DT_FLOAT")
    .Input("input_sizes: int32")
    .Output("output: float")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("pads: list(int) = [0, 0, 0, 0]")
    .Attr("dense_gradient: bool = false")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x, kernel, y;
      TF_RETURN_IF_ERROR(context->MakeShapeFromShapeTensor(3, &x));
      TF_RETURN_IF_ERROR(
          context->Merge(context->input(1), context->input(2), &kernel));
      TF_RETURN_IF_ERROR(LanesOutputOf(context, x, kernel, &y));
      TF_RETURN_IF_ERROR(context->Merge(context->input(0), y, &y));
      return SetOutput(context, 0, x);
    });

REGISTER_OP("RiglKerasLanesConv2DBackpropFilter")
    .Input("input: float")
    .Input("mask: mask_type")
    .Attr("mask_type: {bool, uint8, float} = DT_FLOAT")
    .Input("out_backprop: float")
    .Output("output: float")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("pads: list(int) = [0, 0, 0, 0]")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle kernel, y;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(1), 4, &kernel));
      TF_RETURN_IF_ERROR(
          LanesOutputOf(context, context->input(0), kernel, &y));
      TF_RETURN_IF_ERROR(context->Merge(context->input(2), y, &y));
      return SetOutput(context, 0, kernel);
    });
[[maybe_unused]] const bool registered = [] {
  if (!first_copy) return false;
  Register<LanesConv2D<false>>("RiglKerasLanesConv2D");
  Register<LanesConv2D<true>>("RiglKerasLanesConv2DBackpropInput");
  Register<LanesConv2DBackpropFilter>("RiglKerasLanesConv2DBackpropFilter");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

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
    if (HasFew(plan)) return 1;
    // A micro-tile of so many floats of outputs stays in a core's own cache.
    constexpr int64_t kMostFloats = 1 << 16;
    return std::min(plan.out_channels,
                    CeilDivide(plan.micro_floats, kMostFloats));
  }

  bool SumUp(const RiglPlan& plan, const float* x, const float* dy,
             const Share& share, float* sums) const override {
    const RiglLaneConvolutions& lanes = BestLaneConvolutions();
    const int64_t begin = plan.out_channels * share.chunk / share.chunks;
    const int64_t end = plan.out_channels * (share.chunk + 1) / share.chunks;
    const bool few = HasFew(plan);
    const int64_t count = CountOf(plan);
    const int64_t own = plan.packed_floats + plan.micro_floats;
    const Scratch memory(own + (few ? count * lanes.width : 0));
    if (!memory.data) return false;
    float* const vectors = memory.data + own;
    if (few) {
      std::fill_n(vectors, count * lanes.width, 0.0f);
    } else {
      for (int b = 0; b < plan.blocks; ++b) {
        const int32_t* rows = plan.rows + b * plan.out_channels;
        std::fill(sums + rows[begin], sums + rows[end], 0.0f);
      }
    }
    const auto correlate =
        few ? lanes.correlate_vectors : lanes.correlate_weights;
    for (int64_t group = share.begin; group < share.end; ++group)
      correlate(&plan, x, dy, few ? vectors : sums, begin, end, group,
                memory.data);
    if (few) lanes.sums(vectors, count, sums);
    return true;
  }

 private:
  // Whether a core's own cache holds a vector for each weight: it is cheaper to
  // keep one than to sum it up after each micro-tile.
  static bool HasFew(const RiglPlan& plan) { return CountOf(plan) <= 12'000; }
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

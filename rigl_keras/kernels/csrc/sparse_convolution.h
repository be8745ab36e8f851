// What the operations over sparse convolutions share, whichever layout their
// images have: sizes, plans of masks, and what is the same in each pass.
#ifndef RIGL_KERAS_SPARSE_CONVOLUTION_H_
#define RIGL_KERAS_SPARSE_CONVOLUTION_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "convolution_shapes.h"
#include "plan_cache.h"
#include "plans.h"
#include "runtime.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace rigl_keras {
namespace {

// The shape of images in lanes (lane_layers.h), as NHWC of whole groups.
inline tensorflow::Status ImagesOf(const TensorShape& lanes,
                                   TensorShape* images) {
  const int64_t width = BestLanes().width;
  if (lanes.dims() != 5 || lanes.dim_size(4) != width)
    return InvalidArgument("images in lanes are [groups, channels, rows, "
                           "columns, ", width, "]. Received: ",
                           lanes.DebugString());
  const int64_t sizes[] = {lanes.dim_size(0) * width, lanes.dim_size(2),
                           lanes.dim_size(3), lanes.dim_size(1)};
  return tensorflow::TensorShapeUtils::MakeShape(sizes, 4, images);
}

inline TensorShape LanesOf(const TensorShape& images) {
  const int64_t width = BestLanes().width;
  return TensorShape({CeilDivide(images.dim_size(0), width),
                      images.dim_size(3), images.dim_size(1),
                      images.dim_size(2), width});
}

class SparseConvolution : public OpKernel {
 public:
  SparseConvolution(OpKernelConstruction* context, bool in_lanes)
      : OpKernel(context), in_lanes_(in_lanes) {
    OP_REQUIRES_OK(context, attributes_.Get(context, in_lanes));
  }

 protected:
  // Of images in the layout of the operation.
  tensorflow::Status Describe(const TensorShape& x, const TensorShape& kernel,
                              Convolution* conv, TensorShape* y) const {
    if (!in_lanes_) return DescribeImages(x, kernel, false, conv, y);
    TensorShape images, outputs;
    TF_RETURN_IF_ERROR(ImagesOf(x, &images));
    TF_RETURN_IF_ERROR(DescribeImages(images, kernel, true, conv, &outputs));
    *y = LanesOf(outputs);
    return tensorflow::OkStatus();
  }

  // Of NHWC images.
  tensorflow::Status DescribeImages(const TensorShape& x,
                                    const TensorShape& kernel, bool in_lanes,
                                    Convolution* conv, TensorShape* y) const {
    *conv = {};
    conv->in_lanes = in_lanes;
    if (x.dims() != 4 || kernel.dims() != 4)
      return InvalidArgument("images must be [batch, rows, columns, channels] "
                             "and kernels [rows, columns, in, out]. Received: ",
                             x.DebugString(), " and ", kernel.DebugString());
    TF_RETURN_IF_ERROR(GroupsOf(x.dim_size(3), kernel.dim_size(2),
                                kernel.dim_size(3), &conv->groups));
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (kernel.num_elements() > kMost)
      return InvalidArgument("kernels of more than 2^31 weights");
    for (int a = 0; a < 4; ++a)
      if (kernel.dim_size(a) > kMost || (a && x.dim_size(a) > kMost))
        return InvalidArgument("sizes must be below 2^31. Received: ",
                               x.DebugString(), " and ", kernel.DebugString());
    if (kernel.dim_size(0) < 1 || kernel.dim_size(1) < 1)
      return InvalidArgument("a kernel must have rows and columns. Received: ",
                             kernel.DebugString());
    conv->images = x.dim_size(0);
    conv->height = x.dim_size(1), conv->width = x.dim_size(2);
    conv->channels = x.dim_size(3), conv->filters = kernel.dim_size(3);
    int64_t out[2];
    for (int a = 0; a < 2; ++a) {
      const int64_t length = x.dim_size(a + 1);
      conv->kernel[a] = kernel.dim_size(a);
      conv->stride[a] = attributes_.strides[a + 1];
      conv->dilation[a] = attributes_.dilations[a + 1];
      TF_RETURN_IF_ERROR(
          attributes_.Output(a, length, conv->kernel[a], false, &out[a]));
      const int64_t extent =
          int64_t{conv->kernel[a] - 1} * conv->dilation[a] + 1;
      conv->padding[a] =
          attributes_.padding == "VALID"
              ? attributes_.pads[2 * a]
              : std::max<int64_t>(
                    0, (out[a] - 1) * conv->stride[a] + extent - length) / 2;
      if (out[a] > kMost)
        return InvalidArgument("sizes must be below 2^31. Received: ", out[a],
                               " of the output");
    }
    const int64_t sizes[] = {conv->images, out[0], out[1], conv->filters};
    TF_RETURN_IF_ERROR(tensorflow::TensorShapeUtils::MakeShape(sizes, 4, y));
    conv->out_height = out[0], conv->out_width = out[1];
    // Rows of a matrix, which may be dealt to lanes as they come.
    if (!in_lanes && conv->kernel[0] == 1 && conv->kernel[1] == 1 &&
        conv->stride[0] == 1 && conv->stride[1] == 1 &&
        out[0] == conv->height && out[1] == conv->width) {
      conv->width = conv->images * conv->height * conv->width;
      conv->images = conv->height = conv->out_height = 1;
      conv->out_width = conv->width;
    }
    return tensorflow::OkStatus();
  }

  static tensorflow::Status Check(const TensorShape& is,
                                  const TensorShape& should,
                                  const char* what) {
    if (is == should) return tensorflow::OkStatus();
    return InvalidArgument(what, " must have shape ", should.DebugString(),
                           ". Received: ", is.DebugString());
  }

  // Makes the plans for weights that are left: `counts` at each position of
  // the kernel, and active() where, rising.
  template <typename Known, typename Active>
  static tensorflow::Status Make(OpKernelContext* context, bool transposed,
                                 bool may_split,
                                 const std::vector<int64_t>& counts,
                                 const Known& known, const Active& active,
                                 Plans::Made* made) {
    const Convolution& conv = made->conv;
    const RiglLanes& lanes = BestLanes();
    const std::vector<Tap> taps = TapsOf(conv, counts, transposed);
    const auto order_of = [&](const RiglPlan& plan,
                              const std::vector<Tap>& some) {
      std::vector<int64_t> key = KeyOf(conv, transposed, plan, some);
      if (auto order = known(key)) return order;
      return MakeOrder(conv, transposed, plan, some, std::move(key), active(),
                       lanes);
    };
    if ((!transposed || !taps.empty()) &&
        !MakePlans(conv, taps, transposed, may_split, Threads(context), lanes,
                   order_of, &made->parts))
      return ResourceExhausted(
          "a sparse product of ", conv.channels, " channels to ", conv.filters,
          " takes more than ", static_cast<int64_t>(MostFloats() * 4) >> 20,
          " MB a thread: use the dense one");
    // Backwards, what no weight reaches is in no plan.
    made->whole =
        !transposed ||
        (made->parts.size() == 1 &&
         made->parts[0].plan.out_phases ==
             std::min<int64_t>(conv.stride[0], conv.height) *
                 std::min<int64_t>(conv.stride[1], conv.width));
    return tensorflow::OkStatus();
  }

  // `which`: the bits of entries that the plan has.
  tensorflow::Status PlanOfMask(OpKernelContext* context, const Tensor& mask,
                                uint8_t which, const Convolution& conv,
                                bool transposed, bool may_split,
                                std::shared_ptr<const Plans::Made>* got) {
    const uint8_t bits = BitsOf(mask, which);
    const auto make = [&](const auto& known, Plans::Made* fresh) {
      const MaskBytes bytes(mask);
      const uint8_t* kept = bytes.data();
      const int64_t all = mask.NumElements();
      const int64_t each = conv.weights();
      std::vector<int64_t> counts(int64_t{conv.kernel[0]} * conv.kernel[1]);
      for (size_t k = 0; k < counts.size(); ++k)
        for (int64_t i = 0; i < each; ++i)
          counts[k] += (kept[k * each + i] & bits) != 0;
      std::vector<int32_t> active;
      return Make(context, transposed, may_split, counts, known,
                  [&]() -> const std::vector<int32_t>& {
                    if (active.empty())
                      ForMarked(kept, bits, 0, all,
                                [&](int64_t i) { active.push_back(i); });
                    return active;
                  },
                  fresh);
    };
    return plans_.Get(mask, conv, make, got);
  }

  static tensorflow::Status NoMemory(const RiglPlan& plan) {
    return ResourceExhausted(
        "there is not enough memory: each thread takes ",
        (plan.packed_floats + plan.micro_floats) * sizeof(float), " bytes");
  }

  const bool in_lanes_;
  Attributes attributes_;
  Plans plans_;
};

// y = x * (kernel, where the mask is 1); or with `transposed` the gradient of
// x for that of y.
template <bool transposed>
class SparseProduct : public SparseConvolution {
 public:
  using SparseConvolution::SparseConvolution;

 protected:
  // Writes what a plan computes, or with `add` adds it; false: there is not
  // enough memory. `weights`: in the order of the plan.
  virtual bool Correlate(OpKernelContext* context, const RiglPlan& plan,
                         bool add, const float* x, const float* weights,
                         float* y) const = 0;

  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& kernel = context->input(1);
    const Tensor& mask = context->input(2);
    TensorShape x_shape = x.shape(), y_shape;
    if (transposed)
      TF_RETURN_IF_ERROR(ShapeOf(context->input(3), &x_shape));
    TF_RETURN_IF_ERROR(Check(mask.shape(), kernel.shape(), "mask"));
    Convolution conv;
    TF_RETURN_IF_ERROR(Describe(x_shape, kernel.shape(), &conv, &y_shape));
    if (transposed)
      TF_RETURN_IF_ERROR(Check(x.shape(), y_shape, "out_backprop"));
    Tensor* y = nullptr;
    TF_RETURN_IF_ERROR(
        context->allocate_output(0, transposed ? x_shape : y_shape, &y));
    if (y->NumElements() == 0) return tensorflow::OkStatus();
    float* to = Write(y);
    if (x.NumElements() == 0) {
      std::fill_n(to, y->NumElements(), 0.0f);
      return tensorflow::OkStatus();
    }
    std::shared_ptr<const Plans::Made> made;
    TF_RETURN_IF_ERROR(
        PlanOfMask(context, mask, kKept, conv, transposed, true, &made));
    if (!made->whole) std::fill_n(to, y->NumElements(), 0.0f);
    const float* dense = Read(kernel);
    for (size_t i = 0; i < made->parts.size(); ++i) {
      const OwnedPlan& part = made->parts[i];
      const std::vector<int32_t>& places = part.order->weights;
      Tensor gathered;
      TF_RETURN_IF_ERROR(context->allocate_temp(
          tensorflow::DT_FLOAT, TensorShape({int64_t(places.size())}),
          &gathered));
      float* weights = Write(&gathered);
      for (size_t e = 0; e < places.size(); ++e) weights[e] = dense[places[e]];
      if (!Correlate(context, part.plan, i > 0, Read(x), weights, to))
        return NoMemory(part.plan);
    }
    return tensorflow::OkStatus();
  }

 private:
  // The sizes of the images that a gradient is of.
  tensorflow::Status ShapeOf(const Tensor& sizes, TensorShape* shape) const {
    const int count = in_lanes_ ? 5 : 4;
    if (sizes.dims() != 1 || sizes.dim_size(0) != count)
      return InvalidArgument("input_sizes must be ", in_lanes_ ? "five" : "four",
                             " sizes.");
    const int32_t* each = Read<int32_t>(sizes);
    if (*std::min_element(each, each + count) < 0)
      return InvalidArgument("input_sizes must not be negative.");
    return tensorflow::TensorShapeUtils::MakeShape(each, count, shape);
  }
};

// The gradient of the kernel where the mask is not 0, and zero elsewhere.
class KernelGradient : public SparseConvolution {
 public:
  using SparseConvolution::SparseConvolution;

 protected:
  // Some of the groups of a plan, and some of its weights: the chunk `chunk`
  // of `chunks`.
  struct Share {
    int64_t begin, end;
    int64_t chunk, chunks;
  };

  // How many chunks the weights of a plan should be split into.
  virtual int64_t Chunks(const RiglPlan& plan) const = 0;

  // Writes the sums of a share, where its weights are among those of the plan;
  // false: there is not enough memory.
  virtual bool SumUp(const RiglPlan& plan, const float* x, const float* dy,
                     const Share& share, float* sums) const = 0;

  static int64_t CountOf(const RiglPlan& plan) {
    return plan.rows[plan.blocks * plan.out_phases * plan.out_channels];
  }

  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& mask = context->input(1);
    const Tensor& dy = context->input(2);
    Convolution conv;
    TensorShape y_shape;
    TF_RETURN_IF_ERROR(Describe(x.shape(), mask.shape(), &conv, &y_shape));
    TF_RETURN_IF_ERROR(Check(dy.shape(), y_shape, "out_backprop"));
    Tensor* dw = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(0, mask.shape(), &dw));
    float* gradient = Write(dw);
    ForPieces(context, dw->NumElements(), [=](int64_t begin, int64_t end) {
      std::fill(gradient + begin, gradient + end, 0.0f);
    });
    if (dy.NumElements() == 0 || x.NumElements() == 0)
      return tensorflow::OkStatus();
    std::shared_ptr<const Plans::Made> made;
    TF_RETURN_IF_ERROR(
        PlanOfMask(context, mask, kLookedAt, conv, false, false, &made));
    for (const OwnedPlan& part : made->parts)
      TF_RETURN_IF_ERROR(Add(context, part, Read(x), Read(dy), gradient));
    return tensorflow::OkStatus();
  }

 private:
  // Writes the gradients of the weights of one plan.
  tensorflow::Status Add(OpKernelContext* context, const OwnedPlan& owned,
                         const float* x, const float* dy,
                         float* gradient) const {
    const RiglPlan& plan = owned.plan;
    const std::vector<int32_t>& places = owned.order->weights;
    const int64_t count = places.size();
    if (!count) return tensorflow::OkStatus();
    // Each part adds the same groups, whichever thread computes it, so that
    // the order of additions, and with it the result, is always the same.
    // There are fewer parts where their sums would take too much memory.
    const int64_t chunks = Chunks(plan);
    int64_t parts = CeilDivide(std::max(8, Threads(context)), chunks);
    parts = std::max<int64_t>(
        1, std::min<int64_t>(parts, parts * MostFloats() / count));
    parts = std::min(parts, plan.groups);
    Tensor sums;
    TF_RETURN_IF_ERROR(context->allocate_temp(
        tensorflow::DT_FLOAT, TensorShape({parts, count}), &sums));
    float* partial = Write(&sums);
    std::atomic<bool> short_of_memory{false};
    ForEach(context, parts * chunks, [&](int64_t unit) {
      const int64_t part = unit / chunks;
      const Share share = {plan.groups * part / parts,
                           plan.groups * (part + 1) / parts, unit % chunks,
                           chunks};
      if (!SumUp(plan, x, dy, share, partial + part * count))
        short_of_memory = true;
    });
    if (short_of_memory) return NoMemory(plan);
    ForPieces(context, count, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t e = begin; e < end; ++e)
          partial[e] += partial[part * count + e];
      for (int64_t e = begin; e < end; ++e) gradient[places[e]] = partial[e];
    });
    return tensorflow::OkStatus();
  }
};

}  // namespace
}  // namespace rigl_keras

#endif  // RIGL_KERAS_SPARSE_CONVOLUTION_H_

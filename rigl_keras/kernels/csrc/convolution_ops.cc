// TensorFlow operations over lanes.h: convolutions with a sparse kernel.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "lanes.h"
#include "plan_cache.h"
#include "plans.h"
#include "runtime.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/util.h"

namespace rigl_keras {
namespace {

// Before any operation is registered below.
const bool first_copy = FirstCopyOf("RiglKerasComputedBy");

// What the attributes of all convolutions say, and what follows from shapes.
struct Attributes {
  std::vector<int32_t> strides, dilations;
  std::vector<int32_t> pads = {0, 0, 0, 0};  // above, below, left, right
  std::string padding;

  // From a kernel's construction or a shape function. `padded`: of an
  // operation that has pads.
  template <typename Context>
  tensorflow::Status Get(Context* context, bool padded = false) {
    TF_RETURN_IF_ERROR(context->GetAttr("strides", &strides));
    TF_RETURN_IF_ERROR(context->GetAttr("dilations", &dilations));
    TF_RETURN_IF_ERROR(context->GetAttr("padding", &padding));
    for (const auto& given : {strides, dilations})
      if (given.size() != 4 || given[0] != 1 || given[3] != 1 ||
          given[1] < 1 || given[2] < 1)
        return InvalidArgument("strides and dilations must be [1, rows, "
                               "columns, 1], positive.");
    if (padding != "SAME" && padding != "VALID")
      return InvalidArgument("padding must be SAME or VALID. Received: ",
                             padding);
    if (!padded) return tensorflow::OkStatus();
    pads.clear();  // what is read is appended
    TF_RETURN_IF_ERROR(context->GetAttr("pads", &pads));
    constexpr int32_t kMostPad = 1 << 24;
    if (pads.size() != 4 ||
        *std::min_element(pads.begin(), pads.end()) < 0 ||
        *std::max_element(pads.begin(), pads.end()) > kMostPad ||
        (padding != "VALID" && pads != std::vector<int32_t>{0, 0, 0, 0}))
      return InvalidArgument("pads are four numbers from 0 to ", kMostPad,
                             ", with padding VALID.");
    return tensorflow::OkStatus();
  }

  // Rows (axis 0) or columns (1) of the output. `known`: before anything is
  // computed, where TensorFlow refuses what it computes an empty output of.
  tensorflow::Status Output(int axis, int64_t length, int64_t kernel,
                            bool known, int64_t* output) const {
    const int64_t stride = strides[axis + 1];
    const int64_t padded = length + pads[2 * axis] + pads[2 * axis + 1];
    const int64_t extent = (kernel - 1) * dilations[axis + 1] + 1;
    *output = padding == "SAME" ? CeilDivide(padded, stride)
                                : (padded - extent + stride) / stride;
    if (*output < 0 || (known && padding != "SAME" && padded < extent))
      return InvalidArgument("images must not be smaller than the kernel, with "
                             "padding VALID. Received: ",
                             padded, " pixels and a kernel of ", extent);
    return tensorflow::OkStatus();
  }
};

class SparseConvolution : public OpKernel {
 public:
  explicit SparseConvolution(OpKernelConstruction* context, bool padded = false)
      : OpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Get(context, padded));
  }

 protected:
  tensorflow::Status Describe(const TensorShape& x, const TensorShape& kernel,
                              Convolution* conv, TensorShape* y,
                              bool in_lanes = false) const {
    *conv = {};
    conv->in_lanes = in_lanes;
    if (x.dims() != 4 || kernel.dims() != 4)
      return InvalidArgument("images must be [batch, rows, columns, channels] "
                             "and kernels [rows, columns, in, out]. Received: ",
                             x.DebugString(), " and ", kernel.DebugString());
    if (x.dim_size(3) != kernel.dim_size(2))
      return InvalidArgument("the kernel takes ", kernel.dim_size(2),
                             " channels and the images have ", x.dim_size(3));
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
          " takes more than 64 MB a thread: use the dense one");
    // Backwards, what no weight reaches is in no plan.
    made->whole =
        !transposed ||
        (made->parts.size() == 1 &&
         made->parts[0].plan.out_phases ==
             std::min<int64_t>(conv.stride[0], conv.height) *
                 std::min<int64_t>(conv.stride[1], conv.width));
    return tensorflow::OkStatus();
  }

  tensorflow::Status PlanOfMask(OpKernelContext* context, const Tensor& mask,
                                const Convolution& conv, bool transposed,
                                bool may_split,
                                std::shared_ptr<const Plans::Made>* got) {
    const auto make = [&](const auto& known, Plans::Made* fresh) {
      const MaskBytes bytes(mask);
      const uint8_t* kept = bytes.data();
      const int64_t all = mask.NumElements();
      const int64_t each = conv.channels * conv.filters;
      std::vector<int64_t> counts(int64_t{conv.kernel[0]} * conv.kernel[1]);
      for (size_t k = 0; k < counts.size(); ++k)
        for (int64_t i = 0; i < each; ++i)
          counts[k] += kept[k * each + i] != 0;
      std::vector<int32_t> active;
      return Make(context, transposed, may_split, counts, known,
                  [&]() -> const std::vector<int32_t>& {
                    if (active.empty())
                      for (int64_t i = 0; i < all; ++i)
                        if (kept[i]) active.push_back(i);
                    return active;
                  },
                  fresh);
    };
    return plans_.Get(mask, conv, make, got);
  }

  // Computes all parts. `weights(part)`: in the order of its plan.
  template <typename Weights>
  tensorflow::Status Correlate(OpKernelContext* context,
                               const Plans::Made& made, const float* x,
                               const Weights& weights, Tensor* output) {
    const RiglLanes& lanes = BestLanes();
    float* y = Write(output);
    if (!made.whole) std::fill_n(y, output->NumElements(), 0.0f);
    for (size_t i = 0; i < made.parts.size(); ++i) {
      const RiglPlan& plan = made.parts[i].plan;
      const float* values = nullptr;
      TF_RETURN_IF_ERROR(weights(made.parts[i], &values));
      std::atomic<bool> short_of_memory{false};
      ForEach(context, plan.groups * plan.splits, [&](int64_t unit) {
        const Scratch memory(plan.packed_floats + plan.micro_floats);
        if (!memory.data)
          short_of_memory = true;
        else
          lanes.correlate(&plan, i > 0, x, values, y, unit, memory.data);
      });
      if (short_of_memory) return NoMemory(plan);
    }
    return tensorflow::OkStatus();
  }

  static tensorflow::Status NoMemory(const RiglPlan& plan) {
    return ResourceExhausted(
        "there is not enough memory: each thread takes ",
        (plan.packed_floats + plan.micro_floats) * sizeof(float), " bytes");
  }

  Attributes attributes_;
  Plans plans_;
};

// y = x * (kernel, where the mask is 1); or with `transposed` the gradient of
// x for that of y.
template <bool transposed>
class SparseConv2D : public SparseConvolution {
 public:
  explicit SparseConv2D(OpKernelConstruction* context)
      : SparseConvolution(context) {}

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& kernel = context->input(1);
    const Tensor& mask = context->input(2);
    TensorShape x_shape = x.shape(), y_shape;
    if (transposed) {
      const Tensor& sizes = context->input(3);
      if (sizes.dims() != 1 || sizes.dim_size(0) != 4)
        return InvalidArgument("input_sizes must be four sizes.");
      const int32_t* four = Read<int32_t>(sizes);
      if (*std::min_element(four, four + 4) < 0)
        return InvalidArgument("input_sizes must not be negative.");
      TF_RETURN_IF_ERROR(
          tensorflow::TensorShapeUtils::MakeShape(four, 4, &x_shape));
    }
    TF_RETURN_IF_ERROR(Check(mask.shape(), kernel.shape(), "mask"));
    Convolution conv;
    TF_RETURN_IF_ERROR(Describe(x_shape, kernel.shape(), &conv, &y_shape));
    if (transposed)
      TF_RETURN_IF_ERROR(Check(x.shape(), y_shape, "out_backprop"));
    Tensor* y = nullptr;
    TF_RETURN_IF_ERROR(
        context->allocate_output(0, transposed ? x_shape : y_shape, &y));
    if (y->NumElements() == 0) return tensorflow::OkStatus();
    if (x.NumElements() == 0) {
      std::fill_n(Write(y), y->NumElements(), 0.0f);
      return tensorflow::OkStatus();
    }
    std::shared_ptr<const Plans::Made> made;
    TF_RETURN_IF_ERROR(
        PlanOfMask(context, mask, conv, transposed, true, &made));
    const float* dense = Read(kernel);
    Tensor gathered;
    const auto weights = [&](const OwnedPlan& part, const float** values) {
      const std::vector<int32_t>& places = part.order->weights;
      TF_RETURN_IF_ERROR(context->allocate_temp(
          tensorflow::DT_FLOAT, TensorShape({int64_t(places.size())}),
          &gathered));
      float* to = Write(&gathered);
      for (size_t e = 0; e < places.size(); ++e) to[e] = dense[places[e]];
      *values = to;
      return tensorflow::OkStatus();
    };
    return Correlate(context, *made, Read(x), weights, y);
  }
};

// The gradient of the kernel where the mask is 1, and zero elsewhere.
class SparseConv2DBackpropFilter : public SparseConvolution {
 public:
  explicit SparseConv2DBackpropFilter(OpKernelConstruction* context)
      : SparseConvolution(context) {}

 protected:
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
    std::fill_n(gradient, dw->NumElements(), 0.0f);
    if (dy.NumElements() == 0 || x.NumElements() == 0)
      return tensorflow::OkStatus();
    std::shared_ptr<const Plans::Made> made;
    TF_RETURN_IF_ERROR(PlanOfMask(context, mask, conv, false, false, &made));
    for (const OwnedPlan& part : made->parts)
      TF_RETURN_IF_ERROR(Add(context, part, Read(x), Read(dy), gradient));
    return tensorflow::OkStatus();
  }

 private:
  // Writes the gradients of the weights of one plan.
  static tensorflow::Status Add(OpKernelContext* context,
                                const OwnedPlan& owned, const float* x,
                                const float* dy, float* gradient) {
    const RiglPlan& plan = owned.plan;
    const std::vector<int32_t>& places = owned.order->weights;
    const int64_t count = places.size();
    if (!count) return tensorflow::OkStatus();
    // Each part adds the same groups, whichever thread computes it, so that
    // the order of additions, and with it the result, is always the same.
    // There are fewer parts where their sums would take too much memory.
    int64_t parts = std::max(8, Threads(context));
    parts = std::max<int64_t>(
        1, std::min<int64_t>(parts, parts * kMostFloats / count));
    parts = std::min(parts, plan.groups);
    Tensor sums;
    TF_RETURN_IF_ERROR(context->allocate_temp(
        tensorflow::DT_FLOAT, TensorShape({parts, count}), &sums));
    float* partial = Write(&sums);
    const RiglLanes& lanes = BestLanes();
    std::atomic<bool> short_of_memory{false};
    ForEach(context, parts, [&](int64_t part) {
      float* sum = partial + part * count;
      std::fill_n(sum, count, 0.0f);
      const Scratch memory(plan.packed_floats + plan.micro_floats);
      if (!memory.data) {
        short_of_memory = true;
        return;
      }
      for (int64_t group = plan.groups * part / parts;
           group < plan.groups * (part + 1) / parts; ++group)
        lanes.correlate_weights(&plan, x, dy, sum, group, memory.data);
    });
    if (short_of_memory) return NoMemory(plan);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t e = 0; e < count; ++e)
        partial[e] += partial[part * count + e];
    for (int64_t e = 0; e < count; ++e) gradient[places[e]] = partial[e];
    return tensorflow::OkStatus();
  }
};

// The shape of images in lanes (lane_layers.h), as NHWC of whole groups.
tensorflow::Status ImagesOf(const TensorShape& lanes, TensorShape* images) {
  const int64_t width = BestLanes().width;
  if (lanes.dims() != 5 || lanes.dim_size(4) != width)
    return InvalidArgument("images in lanes are [groups, channels, rows, "
                           "columns, ", width, "]. Received: ",
                           lanes.DebugString());
  const int64_t sizes[] = {lanes.dim_size(0) * width, lanes.dim_size(2),
                           lanes.dim_size(3), lanes.dim_size(1)};
  return tensorflow::TensorShapeUtils::MakeShape(sizes, 4, images);
}

TensorShape LanesOf(const TensorShape& images) {
  const int64_t width = BestLanes().width;
  return TensorShape({CeilDivide(images.dim_size(0), width),
                      images.dim_size(3), images.dim_size(1),
                      images.dim_size(2), width});
}

// Units that one thread computes in a row, which each prefetches for the next.
int64_t UnitsInARow(OpKernelContext* context, int64_t units) {
  return std::max<int64_t>(1, units / (8 * Threads(context)));
}

// As SparseConv2D, of images in lanes.
template <bool transposed>
class LanesConv2D : public SparseConvolution {
 public:
  explicit LanesConv2D(OpKernelConstruction* context)
      : SparseConvolution(context, true) {}

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& kernel = context->input(1);
    const Tensor& mask = context->input(2);
    TensorShape x_shape = x.shape(), images, y_images;
    if (transposed) {
      const Tensor& sizes = context->input(3);
      if (sizes.dims() != 1 || sizes.dim_size(0) != 5)
        return InvalidArgument("input_sizes must be five sizes.");
      const int32_t* five = Read<int32_t>(sizes);
      if (*std::min_element(five, five + 5) < 0)
        return InvalidArgument("input_sizes must not be negative.");
      TF_RETURN_IF_ERROR(
          tensorflow::TensorShapeUtils::MakeShape(five, 5, &x_shape));
    }
    TF_RETURN_IF_ERROR(Check(mask.shape(), kernel.shape(), "mask"));
    TF_RETURN_IF_ERROR(ImagesOf(x_shape, &images));
    Convolution conv;
    TF_RETURN_IF_ERROR(
        Describe(images, kernel.shape(), &conv, &y_images, true));
    if (transposed)
      TF_RETURN_IF_ERROR(Check(x.shape(), LanesOf(y_images), "out_backprop"));
    Tensor* y = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(
        0, transposed ? x_shape : LanesOf(y_images), &y));
    if (y->NumElements() == 0) return tensorflow::OkStatus();
    float* to = Write(y);
    if (x.NumElements() == 0) {
      std::fill_n(to, y->NumElements(), 0.0f);
      return tensorflow::OkStatus();
    }
    std::shared_ptr<const Plans::Made> made;
    TF_RETURN_IF_ERROR(
        PlanOfMask(context, mask, conv, transposed, true, &made));
    if (made->parts.size() > 1) return TooLarge(conv);
    if (!made->whole) std::fill_n(to, y->NumElements(), 0.0f);
    if (made->parts.empty()) return tensorflow::OkStatus();
    const RiglPlan& plan = made->parts[0].plan;
    const std::vector<int32_t>& places = made->parts[0].order->weights;
    Tensor gathered;
    TF_RETURN_IF_ERROR(context->allocate_temp(
        tensorflow::DT_FLOAT, TensorShape({int64_t(places.size())}),
        &gathered));
    float* weights = Write(&gathered);
    const float* dense = Read(kernel);
    for (size_t e = 0; e < places.size(); ++e) weights[e] = dense[places[e]];
    std::atomic<bool> short_of_memory{false};
    const float* from = Read(x);
    const RiglLaneLayers& lanes = BestLaneLayers();
    ForEach(
        context, plan.groups,
        [&](int64_t unit) {
          const Scratch memory(plan.packed_floats + plan.micro_floats);
          if (!memory.data)
            short_of_memory = true;
          else
            lanes.correlate(&plan, from, weights, to, unit, memory.data);
        },
        UnitsInARow(context, plan.groups));
    return short_of_memory ? NoMemory(plan) : tensorflow::OkStatus();
  }

 private:
  static tensorflow::Status TooLarge(const Convolution& conv) {
    return ResourceExhausted("a sparse product of ", conv.channels,
                             " channels to ", conv.filters,
                             " takes too much memory for images in lanes");
  }
};

// As SparseConv2DBackpropFilter, of images in lanes.
class LanesConv2DBackpropFilter : public SparseConvolution {
 public:
  explicit LanesConv2DBackpropFilter(OpKernelConstruction* context)
      : SparseConvolution(context, true) {}

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& mask = context->input(1);
    const Tensor& dy = context->input(2);
    TensorShape images, y_images;
    TF_RETURN_IF_ERROR(ImagesOf(x.shape(), &images));
    Convolution conv;
    TF_RETURN_IF_ERROR(Describe(images, mask.shape(), &conv, &y_images, true));
    TF_RETURN_IF_ERROR(Check(dy.shape(), LanesOf(y_images), "out_backprop"));
    Tensor* dw = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(0, mask.shape(), &dw));
    float* gradient = Write(dw);
    std::fill_n(gradient, dw->NumElements(), 0.0f);
    if (dy.NumElements() == 0 || x.NumElements() == 0)
      return tensorflow::OkStatus();
    std::shared_ptr<const Plans::Made> made;
    TF_RETURN_IF_ERROR(PlanOfMask(context, mask, conv, false, false, &made));
    for (const OwnedPlan& part : made->parts)
      TF_RETURN_IF_ERROR(Add(context, part, Read(x), Read(dy), gradient));
    return tensorflow::OkStatus();
  }

 private:
  // Weights whose sums are kept at once: in a core's own cache.
  static constexpr int64_t kMostSums = 12'000;

  // Writes the gradients of the weights of one plan.
  static tensorflow::Status Add(OpKernelContext* context,
                                const OwnedPlan& owned, const float* x,
                                const float* dy, float* gradient) {
    const RiglPlan& plan = owned.plan;
    const std::vector<int32_t>& places = owned.order->weights;
    const int64_t count = places.size();
    if (!count) return tensorflow::OkStatus();
    // As in SparseConv2DBackpropFilter: additions are always in this order.
    int64_t parts = std::max(8, Threads(context));
    parts = std::max<int64_t>(
        1, std::min<int64_t>(parts, parts * kMostFloats / count));
    parts = std::min(parts, plan.groups);
    const int64_t chunks =
        std::min(plan.out_channels, CeilDivide(count, kMostSums));
    Tensor sums;
    TF_RETURN_IF_ERROR(context->allocate_temp(
        tensorflow::DT_FLOAT, TensorShape({parts, count}), &sums));
    float* partial = Write(&sums);
    const RiglLaneLayers& lanes = BestLaneLayers();
    std::atomic<bool> short_of_memory{false};
    ForEach(context, parts * chunks, [&](int64_t unit) {
      const int64_t part = unit / chunks, chunk = unit % chunks;
      const int64_t begin = plan.out_channels * chunk / chunks;
      const int64_t end = plan.out_channels * (chunk + 1) / chunks;
      // Its weights, block by block.
      const auto rows = [&](int b, int64_t o) {
        return plan.rows[b * plan.out_channels + o];
      };
      int64_t own = 0;
      for (int b = 0; b < plan.blocks; ++b)
        own += rows(b, end) - rows(b, begin);
      const Scratch memory(plan.packed_floats + plan.micro_floats +
                           own * (lanes.width + 1));
      if (!memory.data) {
        short_of_memory = true;
        return;
      }
      float* vectors = memory.data + plan.packed_floats + plan.micro_floats;
      std::fill_n(vectors, own * lanes.width, 0.0f);
      for (int64_t group = plan.groups * part / parts;
           group < plan.groups * (part + 1) / parts; ++group)
        lanes.correlate_weights(&plan, x, dy, vectors, begin, end, group,
                                memory.data);
      for (int b = 0; b < plan.blocks; ++b) {
        const int64_t some = rows(b, end) - rows(b, begin);
        lanes.sums(vectors, some, partial + part * count + rows(b, begin));
        vectors += some * lanes.width;
      }
    });
    if (short_of_memory) return NoMemory(plan);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t e = 0; e < count; ++e)
        partial[e] += partial[part * count + e];
    for (int64_t e = 0; e < count; ++e) gradient[places[e]] = partial[e];
    return tensorflow::OkStatus();
  }
};

// What a thread's memory would take, in bytes: of the forward pass, and of all
// three, were every weight left. More than the limit: no tile is within it.
class ScratchBytes : public SparseConvolution {
 public:
  explicit ScratchBytes(OpKernelConstruction* context)
      : SparseConvolution(context) {}

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
    TF_RETURN_IF_ERROR(Describe(shapes[0], shapes[1], &conv, &y_shape));
    Tensor *bytes, *limit;
    TF_RETURN_IF_ERROR(
        context->allocate_output(0, TensorShape({2}), &bytes));
    TF_RETURN_IF_ERROR(context->allocate_output(1, TensorShape(), &limit));
    double most[2] = {};  // forward, and all passes
    if (shapes[0].num_elements() && y_shape.num_elements()) {
      const std::vector<int64_t> counts(
          int64_t{conv.kernel[0]} * conv.kernel[1],
          conv.channels * conv.filters);
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
                 : std::max(kMostFloats + 1, LeastFloats(plan, BestLanes()));
        if (!pass) most[0] = floats;
        most[1] = std::max(most[1], floats);
      }
    }
    for (int i = 0; i < 2; ++i)
      Write<int64_t>(bytes)[i] = std::min(most[i] * sizeof(float), 9e18);
    Write<int64_t>(limit)[0] = kMostFloats * sizeof(float);
    return tensorflow::OkStatus();
  }
};

namespace shapes = tensorflow::shape_inference;

using shapes::DimensionHandle;
using shapes::InferenceContext;
using shapes::ShapeHandle;

// Sets an output that is of a known size only if a tensor can have it.
tensorflow::Status SetOutput(InferenceContext* context, int output,
                             ShapeHandle shape) {
  if (context->FullyDefined(shape)) {
    std::vector<int64_t> sizes;
    for (int a = 0; a < context->Rank(shape); ++a)
      sizes.push_back(context->Value(context->Dim(shape, a)));
    TensorShape any;
    TF_RETURN_IF_ERROR(tensorflow::TensorShapeUtils::MakeShape(sizes, &any));
  }
  context->set_output(output, shape);
  return tensorflow::OkStatus();
}

// The outputs of images, as kernels of operations compute them; what these
// would refuse is refused.
tensorflow::Status OutputOf(InferenceContext* context,
                            const Attributes& attributes, ShapeHandle images,
                            ShapeHandle kernel, ShapeHandle* outputs) {
  ShapeHandle x;
  TF_RETURN_IF_ERROR(context->WithRank(images, 4, &x));
  TF_RETURN_IF_ERROR(context->WithRank(kernel, 4, &kernel));
  DimensionHandle channels;
  TF_RETURN_IF_ERROR(context->Merge(context->Dim(x, 3), context->Dim(kernel, 2),
                                    &channels));
  DimensionHandle sizes[2];
  for (int a = 0; a < 2; ++a) {
    const DimensionHandle length = context->Dim(x, a + 1);
    const DimensionHandle positions = context->Dim(kernel, a);
    sizes[a] = context->UnknownDim();
    if (context->ValueKnown(positions) && context->Value(positions) < 1)
      return InvalidArgument("a kernel must have rows and columns.");
    if (!context->ValueKnown(length) || !context->ValueKnown(positions))
      continue;
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (context->Value(length) > kMost || context->Value(positions) > kMost)
      return InvalidArgument("sizes must be below 2^31.");
    int64_t output;
    TF_RETURN_IF_ERROR(attributes.Output(a, context->Value(length),
                                         context->Value(positions), true,
                                         &output));
    sizes[a] = context->MakeDim(output);
  }
  *outputs = context->MakeShape(
      {context->Dim(x, 0), sizes[0], sizes[1], context->Dim(kernel, 3)});
  return tensorflow::OkStatus();
}

REGISTER_OP("RiglKerasConv2D")
    .Input("input: float")
    .Input("filter: float")
    .Input("mask: mask_type")
    .Attr("mask_type: {bool, float} = DT_FLOAT")
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
    .Attr("mask_type: {bool, float} = DT_FLOAT")
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
    .Attr("mask_type: {bool, float} = DT_FLOAT")
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
    .Attr("mask_type: {bool, float} = DT_FLOAT")
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
    .Attr("mask_type: {bool, float} = DT_FLOAT")
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
    .Attr("mask_type: {bool, float} = DT_FLOAT")
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

// Bytes of a thread's memory (`ScratchBytes`).
REGISTER_OP("RiglKerasScratchBytes")
    .Input("images: int64")
    .Input("kernel: int64")
    .Output("bytes: int64")
    .Output("limit: int64")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
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
  Register<LanesConv2D<false>>("RiglKerasLanesConv2D");
  Register<LanesConv2D<true>>("RiglKerasLanesConv2DBackpropInput");
  Register<LanesConv2DBackpropFilter>("RiglKerasLanesConv2DBackpropFilter");
  Register<ScratchBytes>("RiglKerasScratchBytes");
  Register<Number<plans_made>>("RiglKerasPlansMade");
  Register<Number<Order::held_bytes>>("RiglKerasPlanBytes");
  Register<ComputedBy>("RiglKerasComputedBy");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

// TensorFlow operations over lane_layers.h: images in lanes, and what lies
// between convolutions of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "lane_layers.h"
#include "plans.h"
#include "runtime.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace rigl_keras {
namespace {

// Before any operation is registered below.
const bool first_copy = FirstCopyOf("RiglKerasToLanes");

// One channel of one group of images.
struct Plane {
  int64_t group, channel;
  int64_t number;  // of those before it
  RiglPlane lanes;

  // Where it begins among numbers, and among vectors.
  int64_t begin() const { return first() * BestLanes().width; }
  int64_t first() const { return number * lanes.vectors; }
};

// Images in lanes: [group, channel, row, column, lane].
struct Lanes {
  int64_t images, groups, channels, height, width;

  int64_t vectors() const { return height * width; }
  int64_t plane() const { return vectors() * BestLanes().width; }
  Plane PlaneOf(int64_t group, int64_t channel) const {
    const int64_t l = BestLanes().width;
    return {group,
            channel,
            group * channels + channel,
            {vectors(), static_cast<int>(std::min(l, images - group * l))}};
  }
};

tensorflow::Status Describe(const Tensor& x, const Tensor& images,
                            Lanes* lanes) {
  const int64_t l = BestLanes().width;
  if (x.dims() != 5 || x.dim_size(4) != l)
    return InvalidArgument("images in lanes are [groups, channels, rows, "
                           "columns, ", l, "]. Received: ",
                           x.shape().DebugString());
  if (images.NumElements() != 1)
    return InvalidArgument("images must be a number.");
  *lanes = {*Read<int32_t>(images), x.dim_size(0), x.dim_size(1),
            x.dim_size(2), x.dim_size(3)};
  if (lanes->images < 0 || CeilDivide(lanes->images, l) != lanes->groups)
    return InvalidArgument(lanes->images, " images are not ", lanes->groups,
                           " groups of ", l, " lanes.");
  return tensorflow::OkStatus();
}

// How many units a thread takes at once, each of so many numbers: 64 KB of them
// at least, but not more than the thread's share.
int64_t UnitsAtOnce(OpKernelContext* context, int64_t units,
                    int64_t numbers) {
  return std::min(CeilDivide(1 << 14, std::max<int64_t>(1, numbers)),
                  CeilDivide(units, Threads(context)));
}

// Calls run(plane) for each plane, or for that of each `step`-th channel.
template <typename Run>
void ForPlanes(OpKernelContext* context, const Lanes& lanes, const Run& run,
               int64_t step = 1) {
  if (!lanes.vectors()) return;
  const int64_t each = CeilDivide(lanes.channels, step);
  const int64_t units = lanes.groups * each;
  ForEach(
      context, units,
      [&](int64_t unit) {
        run(lanes.PlaneOf(unit / each, unit % each * step));
      },
      UnitsAtOnce(context, units, lanes.plane() * step));
}

// Calls run(channel) for each channel: its planes of all groups.
template <typename Run>
void ForChannels(OpKernelContext* context, const Lanes& lanes,
                 const Run& run) {
  ForEach(context, lanes.channels, run,
          UnitsAtOnce(context, lanes.channels, lanes.groups * lanes.plane()));
}

class ToLanes : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    if (x.dims() != 4)
      return InvalidArgument("images must be [batch, rows, columns, channels]. "
                             "Received: ", x.shape().DebugString());
    const RiglLaneLayers& layers = BestLaneLayers();
    const int64_t images = x.dim_size(0), height = x.dim_size(1),
                  width = x.dim_size(2), channels = x.dim_size(3);
    const int64_t groups = CeilDivide(images, layers.width);
    Tensor* lanes = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(
        0, TensorShape({groups, channels, height, width, layers.width}),
        &lanes));
    if (!lanes->NumElements()) return tensorflow::OkStatus();
    const float* from = Read(x);
    float* to = Write(lanes);
    ForEach(context, groups * height, [&](int64_t unit) {
      layers.to_lanes(from, images, height, width, channels, unit / height,
                      unit % height, to);
    });
    return tensorflow::OkStatus();
  }
};

class FromLanes : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    Lanes lanes;
    TF_RETURN_IF_ERROR(Describe(x, context->input(1), &lanes));
    Tensor* images = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(
        0,
        TensorShape(
            {lanes.images, lanes.height, lanes.width, lanes.channels}),
        &images));
    if (!images->NumElements()) return tensorflow::OkStatus();
    const RiglLaneLayers& layers = BestLaneLayers();
    const float* from = Read(x);
    float* to = Write(images);
    ForEach(context, lanes.groups * lanes.height, [&](int64_t unit) {
      layers.from_lanes(from, lanes.images, lanes.height, lanes.width,
                        lanes.channels, unit / lanes.height,
                        unit % lanes.height, to);
    });
    return tensorflow::OkStatus();
  }
};

tensorflow::Status CheckChannels(const Lanes& lanes,
                                 std::initializer_list<const Tensor*> vectors) {
  for (const Tensor* one : vectors)
    if (one->dims() != 1 || one->dim_size(0) != lanes.channels)
      return InvalidArgument("one number for each channel is needed. "
                             "Received: ", one->shape().DebugString());
  return tensorflow::OkStatus();
}

// The mean and the variance of each channel.
class LanesMoments : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    Lanes lanes;
    TF_RETURN_IF_ERROR(Describe(x, context->input(1), &lanes));
    Tensor *mean, *variance;
    TF_RETURN_IF_ERROR(
        context->allocate_output(0, TensorShape({lanes.channels}), &mean));
    TF_RETURN_IF_ERROR(
        context->allocate_output(1, TensorShape({lanes.channels}), &variance));
    const RiglLaneLayers& layers = BestLaneLayers();
    const float* from = Read(x);
    std::vector<float> moments(2 * lanes.groups * lanes.channels);
    ForPlanes(context, lanes, [&](const Plane& plane) {
      float* mine = moments.data() + 2 * plane.number;
      layers.moments(from + plane.begin(), plane.lanes, mine, mine + 1);
    });
    // As in BatchNorm.
    for (int64_t c = 0; c < lanes.channels; ++c) {
      double center = 0, squares = 0, seen = 0;
      for (int64_t g = 0; lanes.vectors() && g < lanes.groups; ++g) {
        const Plane plane = lanes.PlaneOf(g, c);
        const float* one = moments.data() + 2 * plane.number;
        const double more = plane.lanes.used * lanes.vectors();
        const double apart = one[0] - center;
        squares += one[1] + apart * apart * seen * more / (seen + more);
        seen += more;
        center += apart * more / seen;
      }
      const double var = squares / seen;
      Write(mean)[c] = seen ? center : var;  // of nothing: NaN, as variance
      Write(variance)[c] = var;
    }
    return tensorflow::OkStatus();
  }
};

// What is larger than caches, is written past them.
bool IsLarge(const Tensor& tensor) {
  return tensor.NumElements() > kRiglCachedFloats;
}

// Batch norm, with ReLU and dropout after it, or without; or with `adds`,
// always with an addend and ReLU.
template <bool adds>
class OverNorm : public OpKernel {
 public:
  explicit OverNorm(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
    if (adds) return;
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
    OP_REQUIRES_OK(context, context->GetAttr("rate", &rate_));
    OP_REQUIRES(context, rate_ >= 0 && rate_ < 1,
                InvalidArgument("rate must be in [0, 1). Received: ", rate_));
  }

 protected:
  std::vector<RiglNorm> NormsOf(const Tensor& mean, const Tensor& variance,
                                const Tensor& gamma,
                                const Tensor& beta) const {
    std::vector<RiglNorm> norms(mean.NumElements());
    const float kept = static_cast<float>(1 / (1 - double{rate_}));
    for (size_t c = 0; c < norms.size(); ++c) {
      const float scale =
          Read(gamma)[c] / std::sqrt(double{Read(variance)[c]} + epsilon_);
      norms[c] = {Read(mean)[c], scale, Read(beta)[c], relu_, kept};
    }
    return norms;
  }

  // Of an operation whose inputs are x, how many images, mean, variance, gamma
  // and beta, from input `first` on.
  tensorflow::Status Prepare(OpKernelContext* context, int first, Lanes* lanes,
                             std::vector<RiglNorm>* norms) const {
    const auto input = [&](int i) -> const Tensor& {
      return context->input(first + i);
    };
    TF_RETURN_IF_ERROR(Describe(input(0), input(1), lanes));
    TF_RETURN_IF_ERROR(CheckChannels(
        *lanes, {&input(2), &input(3), &input(4), &input(5)}));
    *norms = NormsOf(input(2), input(3), input(4), input(5));
    return tensorflow::OkStatus();
  }

  float epsilon_, rate_ = 0;
  bool relu_ = true;
};

class LanesNormalise : public OverNorm<false> {
 public:
  using OverNorm::OverNorm;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& key = context->input(6);
    const Tensor& counter = context->input(7);
    Lanes lanes;
    std::vector<RiglNorm> norms;
    TF_RETURN_IF_ERROR(Prepare(context, 0, &lanes, &norms));
    const bool dropout = rate_ > 0;
    if (dropout && (key.NumElements() != 1 || counter.NumElements() != 2 ||
                    lanes.channels % 4))
      return InvalidArgument("dropout needs a key, two counters, and a "
                             "multiple of four channels.");
    Tensor *y, *passed;
    TF_RETURN_IF_ERROR(context->allocate_output(0, x.shape(), &y));
    TF_RETURN_IF_ERROR(context->allocate_output(
        1,
        dropout ? TensorShape({lanes.groups, lanes.channels, lanes.height,
                               lanes.width})
                : TensorShape({0}),
        &passed));
    if (!x.NumElements()) return tensorflow::OkStatus();
    const RiglLaneLayers& layers = BestLaneLayers();
    const float* from = Read(x);
    float* to = Write(y);
    uint16_t* bits = dropout ? Write<uint16_t>(passed) : nullptr;
    // Numbers k / 2^23 of at least the rate.
    const uint32_t least = std::ceil(double{rate_} * (1 << 23));
    const int64_t step = dropout ? 4 : 1;
    const bool past = IsLarge(*y);
    ForPlanes(
        context, lanes,
        [&](const Plane& first) {
          if (dropout)
            layers.keep(lanes.height, lanes.width, lanes.channels, first.group,
                        first.channel, Read<uint64_t>(counter),
                        *Read<uint64_t>(key), least, bits + first.first());
          for (int64_t i = 0; i < step; ++i) {
            const Plane plane = lanes.PlaneOf(first.group, first.channel + i);
            layers.normalise(from + plane.begin(), plane.lanes,
                             norms[plane.channel],
                             dropout ? bits + plane.first() : nullptr,
                             past, to + plane.begin());
          }
        },
        step);
    return tensorflow::OkStatus();
  }
};

class LanesNormaliseAdd : public OverNorm<true> {
 public:
  using OverNorm::OverNorm;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& addend = context->input(6);
    Lanes lanes;
    std::vector<RiglNorm> norms;
    TF_RETURN_IF_ERROR(Prepare(context, 0, &lanes, &norms));
    if (addend.shape() != x.shape())
      return InvalidArgument("the addend must be of shape ",
                             x.shape().DebugString(), ". Received: ",
                             addend.shape().DebugString());
    Tensor *y, *passed;
    TF_RETURN_IF_ERROR(context->allocate_output(0, x.shape(), &y));
    TF_RETURN_IF_ERROR(context->allocate_output(
        1,
        TensorShape(
            {lanes.groups, lanes.channels, lanes.height, lanes.width}),
        &passed));
    if (!x.NumElements()) return tensorflow::OkStatus();
    const RiglLaneLayers& layers = BestLaneLayers();
    const float* from = Read(x);
    const float* more = Read(addend);
    float* to = Write(y);
    uint16_t* bits = Write<uint16_t>(passed);
    const bool past = IsLarge(*y);
    ForPlanes(context, lanes, [&](const Plane& plane) {
      layers.normalise_add(from + plane.begin(), more + plane.begin(),
                           plane.lanes, norms[plane.channel],
                           bits + plane.first(), past, to + plane.begin());
    });
    return tensorflow::OkStatus();
  }
};

// The gradients of x, gamma and beta, the mean and variance being those of x;
// and that of the addend. With one, the upstream gradient may be the sum of
// several terms.
template <bool adds>
class LanesNormaliseGrad : public OverNorm<adds> {
 public:
  using OverNorm<adds>::OverNorm;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const int first = context->num_inputs() - 7;  // after dy
    const Tensor& x = context->input(first);
    const Tensor& variance = context->input(first + 3);
    const Tensor& gamma = context->input(first + 4);
    const Tensor& passed = context->input(first + 6);
    Lanes lanes;
    std::vector<RiglNorm> norms;
    TF_RETURN_IF_ERROR(this->Prepare(context, first, &lanes, &norms));
    const bool marked = adds || this->rate_ > 0;
    if (marked && passed.NumElements() !=
                      lanes.groups * lanes.channels * lanes.vectors())
      return InvalidArgument("one number for each vector of the images is "
                             "needed. Received: ",
                             passed.shape().DebugString());
    std::vector<int> places;
    std::vector<const float*> terms;
    for (int i = 0; i < first; ++i) {
      const Tensor& dy = context->input(i);
      if (dy.shape() != x.shape())
        return InvalidArgument("the gradient must be of shape ",
                               x.shape().DebugString(), ". Received: ",
                               dy.shape().DebugString());
      places.push_back(i);
      terms.push_back(Read(dy));
    }
    Tensor *dx, *dgamma, *dbeta, *dz = nullptr;
    if (adds)
      TF_RETURN_IF_ERROR(context->allocate_output(0, x.shape(), &dx));
    TF_RETURN_IF_ERROR(context->forward_input_or_allocate_output(
        places, adds ? 3 : 0, x.shape(), adds ? &dz : &dx));
    TF_RETURN_IF_ERROR(
        context->allocate_output(1, TensorShape({lanes.channels}), &dgamma));
    TF_RETURN_IF_ERROR(
        context->allocate_output(2, TensorShape({lanes.channels}), &dbeta));
    const RiglLaneLayers& layers = BestLaneLayers();
    const float* from = Read(x);
    const uint16_t* bits = marked ? Read<uint16_t>(passed) : nullptr;
    const auto bits_of = [&](const Plane& plane) {
      return marked ? bits + plane.first() : nullptr;
    };
    const double n = double(lanes.images) * lanes.vectors();
    float* to = Write(dx);
    float* taken = adds ? Write(dz) : nullptr;
    // The sum takes the place of one of its terms, which is added first.
    const auto place = std::find(terms.begin(), terms.end(), taken);
    if (place != terms.end()) std::iter_swap(terms.begin(), place);
    const float* upstream = first > 1 ? taken : terms[0];
    const bool past = to != upstream && IsLarge(*dx);
    // Channel by channel, so that caches still hold what the sums were of.
    ForChannels(context, lanes, [&](int64_t c) {
      double sum = 0, product = 0;
      for (int64_t g = 0; g < lanes.groups; ++g) {
        const Plane plane = lanes.PlaneOf(g, c);
        for (int i = 1; i < first; ++i)
          layers.add((i > 1 ? taken : terms[0]) + plane.begin(),
                     terms[i] + plane.begin(), plane.lanes,
                     taken + plane.begin());
        float one, other;
        layers.upstream_sums(from + plane.begin(), upstream + plane.begin(),
                             plane.lanes, norms[c], bits_of(plane), &one,
                             &other);
        sum += one, product += other;
      }
      const double inverse =
          1 / std::sqrt(double{Read(variance)[c]} + this->epsilon_);
      const double a = Read(gamma)[c] * inverse;
      const float slope = -a * inverse * inverse * product / n;
      const float constant = -a * sum / n;
      Write(dgamma)[c] = product * inverse;
      Write(dbeta)[c] = sum;
      for (int64_t g = lanes.groups; g-- > 0;) {
        const Plane plane = lanes.PlaneOf(g, c);
        layers.combine(from + plane.begin(), upstream + plane.begin(),
                       plane.lanes, norms[c], bits_of(plane), slope, constant,
                       past, to + plane.begin(),
                       adds ? taken + plane.begin() : nullptr);
      }
    });
    return tensorflow::OkStatus();
  }
};

namespace shapes = tensorflow::shape_inference;

using shapes::DimensionHandle;
using shapes::InferenceContext;
using shapes::ShapeHandle;

REGISTER_OP("RiglKerasToLanes")
    .Input("images: float")
    .Output("lanes: float")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 4, &x));
      const int64_t width = BestLanes().width;
      DimensionHandle groups = context->UnknownDim();
      if (context->ValueKnown(context->Dim(x, 0)))
        groups = context->MakeDim(
            CeilDivide(context->Value(context->Dim(x, 0)), width));
      context->set_output(
          0, context->MakeShape({groups, context->Dim(x, 3),
                                 context->Dim(x, 1), context->Dim(x, 2),
                                 context->MakeDim(width)}));
      return tensorflow::OkStatus();
    });

REGISTER_OP("RiglKerasFromLanes")
    .Input("lanes: float")
    .Input("count: int32")
    .Output("images: float")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 5, &x));
      DimensionHandle images = context->UnknownDim();
      TF_RETURN_IF_ERROR(context->MakeDimForScalarInput(1, &images));
      context->set_output(
          0, context->MakeShape({images, context->Dim(x, 2),
                                 context->Dim(x, 3), context->Dim(x, 1)}));
      return tensorflow::OkStatus();
    });

// Merges what inputs have for each channel of the lanes.
tensorflow::Status Channels(InferenceContext* context, int lanes,
                            std::initializer_list<int> vectors,
                            ShapeHandle* x, DimensionHandle* channels) {
  TF_RETURN_IF_ERROR(context->WithRank(context->input(lanes), 5, x));
  *channels = context->Dim(*x, 1);
  ShapeHandle vector;
  for (int i : vectors) {
    TF_RETURN_IF_ERROR(context->WithRank(context->input(i), 1, &vector));
    TF_RETURN_IF_ERROR(
        context->Merge(context->Dim(vector, 0), *channels, channels));
  }
  return tensorflow::OkStatus();
}

REGISTER_OP("RiglKerasLanesMoments")
    .Input("lanes: float")
    .Input("count: int32")
    .Output("mean: float")
    .Output("variance: float")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x;
      DimensionHandle channels;
      TF_RETURN_IF_ERROR(Channels(context, 0, {}, &x, &channels));
      context->set_output(0, context->Vector(channels));
      context->set_output(1, context->Vector(channels));
      return tensorflow::OkStatus();
    });

REGISTER_OP("RiglKerasLanesNormalise")
    .Input("lanes: float")
    .Input("count: int32")
    .Input("mean: float")
    .Input("variance: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Input("key: uint64")
    .Input("counter: uint64")
    .Output("y: float")
    .Output("passed: uint16")
    .Attr("epsilon: float")
    .Attr("relu: bool = false")
    .Attr("rate: float = 0.0")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x;
      DimensionHandle channels;
      TF_RETURN_IF_ERROR(Channels(context, 0, {2, 3, 4, 5}, &x, &channels));
      context->set_output(0, x);
      context->set_output(1, context->UnknownShape());
      return tensorflow::OkStatus();
    });

REGISTER_OP("RiglKerasLanesNormaliseAdd")
    .Input("lanes: float")
    .Input("count: int32")
    .Input("mean: float")
    .Input("variance: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Input("addend: float")
    .Output("y: float")
    .Output("passed: uint16")
    .Attr("epsilon: float")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x;
      DimensionHandle channels;
      TF_RETURN_IF_ERROR(Channels(context, 0, {2, 3, 4, 5}, &x, &channels));
      TF_RETURN_IF_ERROR(context->Merge(context->input(6), x, &x));
      context->set_output(0, x);
      context->set_output(1, context->UnknownShape());
      return tensorflow::OkStatus();
    });

// Of both gradients of batch norm.
tensorflow::Status GradientShapes(InferenceContext* context) {
  ShapeHandle x;
  DimensionHandle channels;
  const int first = context->num_inputs() - 7;
  TF_RETURN_IF_ERROR(
      Channels(context, first, {first + 2, first + 3, first + 4, first + 5},
               &x, &channels));
  for (int i = 0; i < first; ++i)
    TF_RETURN_IF_ERROR(context->Merge(context->input(i), x, &x));
  context->set_output(0, x);
  context->set_output(1, context->Vector(channels));
  context->set_output(2, context->Vector(channels));
  if (context->num_outputs() > 3) context->set_output(3, x);
  return tensorflow::OkStatus();
}

REGISTER_OP("RiglKerasLanesNormaliseAddGrad")
    .Input("dy: terms * float")
    .Input("lanes: float")
    .Input("count: int32")
    .Input("mean: float")
    .Input("variance: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Input("passed: uint16")
    .Output("dx: float")
    .Output("dgamma: float")
    .Output("dbeta: float")
    .Output("daddend: float")
    .Attr("terms: int >= 1")
    .Attr("epsilon: float")
    .SetShapeFn(GradientShapes);

REGISTER_OP("RiglKerasLanesNormaliseGrad")
    .Input("dy: float")
    .Input("lanes: float")
    .Input("count: int32")
    .Input("mean: float")
    .Input("variance: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Input("passed: uint16")
    .Output("dx: float")
    .Output("dgamma: float")
    .Output("dbeta: float")
    .Attr("epsilon: float")
    .Attr("relu: bool = false")
    .Attr("rate: float = 0.0")
    .SetShapeFn(GradientShapes);

[[maybe_unused]] const bool registered = [] {
  if (!first_copy) return false;
  Register<ToLanes>("RiglKerasToLanes");
  Register<FromLanes>("RiglKerasFromLanes");
  Register<LanesMoments>("RiglKerasLanesMoments");
  Register<LanesNormalise>("RiglKerasLanesNormalise");
  Register<LanesNormaliseGrad<false>>("RiglKerasLanesNormaliseGrad");
  Register<LanesNormaliseAdd>("RiglKerasLanesNormaliseAdd");
  Register<LanesNormaliseGrad<true>>("RiglKerasLanesNormaliseAddGrad");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

// TensorFlow operations over rows.h: batch norm and dropout.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <vector>

#include "plans.h"
#include "rows.h"
#include "runtime.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace rigl_keras {
namespace {

// Before any operation is registered below.
const bool first_copy = FirstCopyOf("RiglKerasBatchNorm");

// Rows of channels, in pieces that stay in a core's own cache while they are
// read twice. What each piece sums up is added in their order, so that the
// result does not depend on threads.
class OverRows : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  struct Pieces {
    int64_t rows, channels, each, count;
  };

  static Pieces PiecesOf(const Tensor& x) {
    Pieces p;
    p.channels = x.dim_size(x.dims() - 1);
    p.rows = p.channels ? x.NumElements() / p.channels : 0;
    p.each = std::max<int64_t>(1, 16'384 / std::max<int64_t>(1, p.channels));
    p.count = CeilDivide(p.rows, p.each);
    return p;
  }

  // Calls run(piece, first row, rows) for each.
  static void ForPieces(
      OpKernelContext* context, const Pieces& p,
      const std::function<void(int64_t, int64_t, int64_t)>& run) {
    ForEach(context, p.count, [&](int64_t i) {
      const int64_t first = i * p.each;
      run(i, first, std::min(p.each, p.rows - first));
    });
  }

  static tensorflow::Status CheckChannels(
      const Tensor& x, std::initializer_list<const Tensor*> vectors) {
    if (x.dims() < 2)
      return InvalidArgument("rows of channels are needed. Received: ",
                             x.shape().DebugString());
    for (const Tensor* one : vectors)
      if (one->dims() != 1 || one->dim_size(0) != x.dim_size(x.dims() - 1))
        return InvalidArgument("one number for each channel is needed. "
                               "Received: ",
                               one->shape().DebugString());
    return tensorflow::OkStatus();
  }
};

// y = (x - mean) / sqrt(variance + epsilon) * gamma + beta, with the moments
// of the batch.
class BatchNorm : public OverRows {
 public:
  explicit BatchNorm(OpKernelConstruction* context) : OverRows(context) {
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
  }

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& gamma = context->input(1);
    const Tensor& beta = context->input(2);
    TF_RETURN_IF_ERROR(CheckChannels(x, {&gamma, &beta}));
    const Pieces p = PiecesOf(x);
    Tensor *y, *mean, *variance;
    TF_RETURN_IF_ERROR(context->allocate_output(0, x.shape(), &y));
    TF_RETURN_IF_ERROR(
        context->allocate_output(1, TensorShape({p.channels}), &mean));
    TF_RETURN_IF_ERROR(
        context->allocate_output(2, TensorShape({p.channels}), &variance));
    const RiglRows& rows = BestRows();
    const float* from = Read(x);
    std::vector<float> moments(2 * p.count * p.channels);
    ForPieces(context, p, [&](int64_t i, int64_t first, int64_t count) {
      float* mine = moments.data() + 2 * i * p.channels;
      rows.moments(from + first * p.channels, count, p.channels, mine,
                   mine + p.channels);
    });
    // Moments of pieces make those of the whole (Chan, Golub and LeVeque,
    // 1979, Updating formulae and a pairwise algorithm for computing sample
    // variances).
    std::vector<float> scale(p.channels);
    for (int64_t c = 0; c < p.channels; ++c) {
      double center = 0, squares = 0, seen = 0;
      for (int64_t i = 0; i < p.count; ++i) {
        const float* one = moments.data() + 2 * i * p.channels + c;
        const double more = std::min(p.each, p.rows - i * p.each);
        const double apart = one[0] - center;
        squares += one[p.channels] + apart * apart * seen * more /
                                         (seen + more);
        seen += more;
        center += apart * more / seen;
      }
      const double var = squares / p.rows;
      Write(mean)[c] = p.rows ? center : var;  // of nothing: NaN, as variance
      Write(variance)[c] = var;
      scale[c] = Read(gamma)[c] / std::sqrt(var + epsilon_);
    }
    float* to = Write(y);
    ForPieces(context, p, [&](int64_t, int64_t first, int64_t count) {
      rows.normalise(from + first * p.channels, count, p.channels,
                     Write(mean), scale.data(),
                     Read(beta), to + first * p.channels);
    });
    return tensorflow::OkStatus();
  }

 private:
  float epsilon_;
};

// The gradients of x, gamma and beta, for those of y, mean and variance.
class BatchNormGrad : public OverRows {
 public:
  explicit BatchNormGrad(OpKernelConstruction* context) : OverRows(context) {
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
  }

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& dy = context->input(0);
    const Tensor& dmean = context->input(1);
    const Tensor& dvariance = context->input(2);
    const Tensor& x = context->input(3);
    const Tensor& gamma = context->input(4);
    const Tensor& mean = context->input(5);
    const Tensor& variance = context->input(6);
    TF_RETURN_IF_ERROR(
        CheckChannels(x, {&dmean, &dvariance, &gamma, &mean, &variance}));
    if (dy.shape() != x.shape())
      return InvalidArgument("the gradient must be of shape ",
                             x.shape().DebugString(), ". Received: ",
                             dy.shape().DebugString());
    const Pieces p = PiecesOf(x);
    Tensor *dx, *dgamma, *dbeta;
    TF_RETURN_IF_ERROR(context->allocate_output(0, x.shape(), &dx));
    TF_RETURN_IF_ERROR(
        context->allocate_output(1, TensorShape({p.channels}), &dgamma));
    TF_RETURN_IF_ERROR(
        context->allocate_output(2, TensorShape({p.channels}), &dbeta));
    const RiglRows& rows = BestRows();
    const float* from = Read(x);
    const float* upstream = Read(dy);
    const float* center = Read(mean);
    std::vector<float> sums(2 * p.count * p.channels);
    ForPieces(context, p, [&](int64_t i, int64_t first, int64_t count) {
      float* mine = sums.data() + 2 * i * p.channels;
      rows.upstream_sums(from + first * p.channels,
                         upstream + first * p.channels, count, p.channels,
                         center, mine, mine + p.channels);
    });
    std::vector<float> scale(p.channels), slope(p.channels),
        shift(p.channels);
    for (int64_t c = 0; c < p.channels; ++c) {
      double sum = 0, product = 0;
      for (int64_t i = 0; i < p.count; ++i) {
        sum += sums[2 * i * p.channels + c];
        product += sums[(2 * i + 1) * p.channels + c];
      }
      const double inverse =
          1 / std::sqrt(double{Read(variance)[c]} + epsilon_);
      const double a = Read(gamma)[c] * inverse;
      const double n = p.rows;
      scale[c] = a;
      slope[c] = -a * inverse * inverse * product / n +
                 2 * Read(dvariance)[c] / n;
      shift[c] = -a * sum / n + Read(dmean)[c] / n;
      Write(dgamma)[c] = product * inverse;
      Write(dbeta)[c] = sum;
    }
    float* to = Write(dx);
    ForPieces(context, p, [&](int64_t, int64_t first, int64_t count) {
      rows.combine(from + first * p.channels, upstream + first * p.channels,
                   count, p.channels, center, scale.data(), slope.data(),
                   shift.data(), to + first * p.channels);
    });
    return tensorflow::OkStatus();
  }

 private:
  float epsilon_;
};

// Dropout by the numbers of tf.random.stateless_uniform.
class Dropout : public OpKernel {
 public:
  explicit Dropout(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("rate", &rate_));
    OP_REQUIRES(context, rate_ >= 0 && rate_ < 1,
                InvalidArgument("rate must be in [0, 1). Received: ", rate_));
  }

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& key = context->input(1);
    const Tensor& counter = context->input(2);
    if (key.NumElements() != 1 || counter.NumElements() != 2)
      return InvalidArgument("a key and two counters are needed.");
    Tensor* y = nullptr;
    TF_RETURN_IF_ERROR(
        context->forward_input_or_allocate_output({0}, 0, x.shape(), &y));
    const RiglRows& rows = BestRows();
    const uint64_t with = *Read<uint64_t>(key);
    const uint64_t* counters = Read<uint64_t>(counter);
    const float* from = Read(x);
    float* to = Write(y);
    constexpr int64_t kEach = 16'384;
    const float scale = static_cast<float>(1 / (1 - double{rate_}));
    const int64_t all = x.NumElements();
    ForEach(context, CeilDivide(all, kEach), [&](int64_t i) {
      const int64_t first = i * kEach;
      rows.dropout(from + first, std::min(kEach, all - first), first,
                   counters, with, rate_, scale, to + first);
    });
    return tensorflow::OkStatus();
  }

 private:
  float rate_;
};

namespace shapes = tensorflow::shape_inference;

using shapes::DimensionHandle;
using shapes::InferenceContext;
using shapes::ShapeHandle;

// Sets outputs: one of the shape of an input, and two of a number for each of
// its channels, which other inputs have, too.
tensorflow::Status RowsOfChannels(InferenceContext* context, int rows,
                                  std::initializer_list<int> vectors) {
  ShapeHandle x, vector;
  TF_RETURN_IF_ERROR(context->WithRankAtLeast(context->input(rows), 2, &x));
  DimensionHandle channels = context->UnknownDim();
  if (context->RankKnown(x)) channels = context->Dim(x, -1);
  for (int i : vectors) {
    TF_RETURN_IF_ERROR(context->WithRank(context->input(i), 1, &vector));
    TF_RETURN_IF_ERROR(
        context->Merge(context->Dim(vector, 0), channels, &channels));
  }
  context->set_output(0, x);
  context->set_output(1, context->Vector(channels));
  context->set_output(2, context->Vector(channels));
  return tensorflow::OkStatus();
}

REGISTER_OP("RiglKerasBatchNorm")
    .Input("x: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Output("y: float")
    .Output("mean: float")
    .Output("variance: float")
    .Attr("epsilon: float")
    .SetShapeFn([](InferenceContext* context) {
      return RowsOfChannels(context, 0, {1, 2});
    });

REGISTER_OP("RiglKerasBatchNormGrad")
    .Input("dy: float")
    .Input("dmean: float")
    .Input("dvariance: float")
    .Input("x: float")
    .Input("gamma: float")
    .Input("mean: float")
    .Input("variance: float")
    .Output("dx: float")
    .Output("dgamma: float")
    .Output("dbeta: float")
    .Attr("epsilon: float")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x;
      TF_RETURN_IF_ERROR(
          context->Merge(context->input(0), context->input(3), &x));
      return RowsOfChannels(context, 3, {1, 2, 4, 5, 6});
    });

REGISTER_OP("RiglKerasDropout")
    .Input("x: float")
    .Input("key: uint64")
    .Input("counter: uint64")
    .Output("y: float")
    .Attr("rate: float")
    .SetShapeFn([](InferenceContext* context) {
      float rate;
      TF_RETURN_IF_ERROR(context->GetAttr("rate", &rate));
      if (!(rate >= 0 && rate < 1))
        return InvalidArgument("rate must be in [0, 1). Received: ", rate);
      for (int i = 1; i <= 2; ++i)
        if (context->FullyDefined(context->input(i)) &&
            context->Value(context->NumElements(context->input(i))) != i)
          return InvalidArgument("a key and two counters are needed.");
      return shapes::UnchangedShape(context);
    });

[[maybe_unused]] const bool registered = [] {
  if (!first_copy) return false;
  Register<BatchNorm>("RiglKerasBatchNorm");
  Register<BatchNormGrad>("RiglKerasBatchNormGrad");
  Register<Dropout>("RiglKerasDropout");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

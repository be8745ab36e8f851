// TensorFlow operations over panels.h: products of matrices with a sparse one.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "panels.h"
#include "plans.h"
#include "runtime.h"
#include "sparse_matrix.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace rigl_keras {
namespace {

// Before any operation is registered below.
const bool first_copy = FirstCopyOf("RiglKerasMatMul");

// How the rows of a matrix are shared out: panels, each of which may be
// computed in parts where there are fewer of them than threads.
struct Panels {
  int64_t rows, panels;
  int vectors;  // of a panel
  int64_t pitch;  // its rows
  int splits;

  Panels(OpKernelContext* context, int64_t rows, int64_t columns)
      : rows(rows) {
    const RiglPanels& best = BestPanels();
    const int threads = Threads(context);
    vectors = best.vectors;
    const auto count = [&] {
      return CeilDivide(rows, int64_t{vectors} * best.width);
    };
    while (vectors > 2 && count() < threads) vectors /= 2;
    while (vectors > 1 && (rows <= int64_t{vectors} / 2 * best.width ||
                           double(columns) * vectors * best.width >
                               MostFloats()))
      vectors /= 2;
    panels = count();
    pitch = int64_t{vectors} * best.width;
    splits = panels && panels < threads ? CeilDivide(threads, panels) : 1;
  }

  int64_t first(int64_t panel) const { return panel * pitch; }
  int64_t count(int64_t panel) const {
    return std::min(pitch, rows - first(panel));
  }
  // Where a part of [0, size) begins.
  int64_t begin(int64_t size, int64_t split) const {
    return size * split / splits;
  }
};

tensorflow::Status NoMemory(int64_t floats) {
  return ResourceExhausted("there is not enough memory: each thread takes ",
                           floats * sizeof(float), " bytes");
}

// Whether the caches hold less than all of a tensor.
bool Streams(const Tensor& tensor) { return tensor.NumElements() > 1 << 22; }

tensorflow::Status CheckInputs(const Tensor& x, const Tensor& mask) {
  if (x.dims() < 1 || x.dim_size(x.dims() - 1) != mask.dim_size(0))
    return InvalidArgument("inputs of shape ", x.shape().DebugString(),
                           " do not fit a kernel of shape ",
                           mask.shape().DebugString());
  return tensorflow::OkStatus();
}

// All sizes but the last, and another one.
tensorflow::Status WithLast(const TensorShape& shape, int64_t last,
                            TensorShape* with) {
  std::vector<int64_t> sizes;
  for (int a = 0; a + 1 < shape.dims(); ++a)
    sizes.push_back(shape.dim_size(a));
  sizes.push_back(last);
  return tensorflow::TensorShapeUtils::MakeShape(sizes.data(), sizes.size(),
                                                 with);
}

int64_t RowsOf(const TensorShape& shape) {
  int64_t rows = 1;
  for (int a = 0; a + 1 < shape.dims(); ++a) rows *= shape.dim_size(a);
  return rows;
}

// y = x (kernel, where the mask is 1) + bias, and the weights that are left,
// row by row.
class SparseMatMul : public OpKernel {
 public:
  using OpKernel::OpKernel;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& kernel = context->input(1);
    const Tensor& mask = context->input(2);
    const Tensor& bias = context->input(3);
    TF_RETURN_IF_ERROR(CheckMatrix(kernel, mask));
    TF_RETURN_IF_ERROR(CheckInputs(x, mask));
    const int64_t inputs = mask.dim_size(0), outputs = mask.dim_size(1);
    if (bias.dims() != 1 ||
        (bias.NumElements() && bias.NumElements() != outputs))
      return InvalidArgument("bias must be empty, or a number for each of ",
                             outputs, " outputs. Received: ",
                             bias.shape().DebugString());
    TensorShape y_shape;
    TF_RETURN_IF_ERROR(WithLast(x.shape(), outputs, &y_shape));
    const std::shared_ptr<SparseMatrix> matrix = matrices_.Get(mask);
    Tensor *y, *weights, ordered;
    TF_RETURN_IF_ERROR(context->allocate_output(0, y_shape, &y));
    TF_RETURN_IF_ERROR(
        context->allocate_output(1, TensorShape({matrix->size()}), &weights));
    matrix->Gather(context, Read(kernel), Write(weights));
    if (!y->NumElements()) return tensorflow::OkStatus();
    const SortedWeights& sorted = matrix->sorted(false);
    TF_RETURN_IF_ERROR(Ordered(context, sorted, Read(*weights), &ordered));
    const RiglPanels& best = BestPanels();
    const Panels p(context, RowsOf(x.shape()), inputs + outputs);
    const float* from = Read(x);
    const float* shift = bias.NumElements() ? Read(bias) : nullptr;
    float* to = Write(y);
    const int64_t floats =
        (inputs + CeilDivide(outputs, p.splits)) * p.pitch;
    std::atomic<bool> short_of_memory{false};
    ForEach(context, p.panels * p.splits, [&](int64_t unit) {
      const Scratch memory(floats);
      if (!memory.data) {
        short_of_memory = true;
        return;
      }
      const int64_t panel = unit / p.splits, split = unit % p.splits;
      const int64_t begin = p.begin(outputs, split);
      const int64_t end = p.begin(outputs, split + 1);
      float* packed = memory.data;
      float* sums = packed + inputs * p.pitch;
      best.pack(from + p.first(panel) * inputs, inputs, p.count(panel), inputs,
                p.vectors, packed);
      best.multiply(sorted.view(), begin, end, p.vectors, packed,
                    Read(ordered), false, sums);
      best.unpack(sums, p.vectors, p.count(panel), end - begin,
                  shift ? shift + begin : nullptr, outputs, Streams(*y),
                  to + p.first(panel) * outputs + begin);
    });
    return short_of_memory ? NoMemory(floats) : tensorflow::OkStatus();
  }

 private:
  SparseMatrices matrices_;
};

// The gradients of x, of the kernel (zero where the mask is, and has nothing to
// look at) and of the bias, as far as they are asked for: of others the output is empty.
class SparseMatMulGrad : public OpKernel {
 public:
  explicit SparseMatMulGrad(OpKernelConstruction* context)
      : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("to_x", &to_x_));
    OP_REQUIRES_OK(context, context->GetAttr("to_kernel", &to_kernel_));
    OP_REQUIRES_OK(context, context->GetAttr("to_bias", &to_bias_));
  }

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    const Tensor& x = context->input(0);
    const Tensor& dy = context->input(1);
    const Tensor& kernel = context->input(2);
    const Tensor& mask = context->input(3);
    const Tensor& weights = context->input(4);
    TF_RETURN_IF_ERROR(CheckMatrix(kernel, mask));
    TF_RETURN_IF_ERROR(CheckInputs(x, mask));
    const int64_t inputs = mask.dim_size(0), outputs = mask.dim_size(1);
    TensorShape y_shape;
    TF_RETURN_IF_ERROR(WithLast(x.shape(), outputs, &y_shape));
    if (dy.shape() != y_shape)
      return InvalidArgument("the gradient must be of shape ",
                             y_shape.DebugString(), ". Received: ",
                             dy.shape().DebugString());
    const std::shared_ptr<SparseMatrix> matrix = matrices_.Get(mask);
    if (weights.dims() != 1 || weights.NumElements() != matrix->size())
      return InvalidArgument("the mask leaves ", matrix->size(),
                             " weights. Received: ", weights.NumElements());
    const std::shared_ptr<SparseMatrix> looked_at =
        to_kernel_ ? matrices_.Get(mask, kLookedAt) : matrix;
    const int64_t count = looked_at->size();
    Tensor *dx, *dbias, dkernel, ordered;
    const TensorShape none({0});
    TF_RETURN_IF_ERROR(
        context->allocate_output(0, to_x_ ? x.shape() : none, &dx));
    TF_RETURN_IF_ERROR(context->allocate_output(
        2, to_bias_ ? TensorShape({outputs}) : none, &dbias));
    const RiglPanels& best = BestPanels();
    const Panels p(context, RowsOf(x.shape()), inputs + outputs);
    const SortedWeights* forward = nullptr;
    const SortedWeights* backward = nullptr;
    if (to_kernel_) forward = &looked_at->sorted(false);
    if (to_x_) {
      backward = &matrix->sorted(true);
      TF_RETURN_IF_ERROR(Ordered(context, *backward, Read(weights), &ordered));
    }
    // Each part adds the same panels, whichever thread computes it, so that
    // the order of additions is always the same.
    const int64_t parts = std::min<int64_t>(
        p.panels,
        std::max<int64_t>(1, std::min<double>(std::max(8, Threads(context)),
                                              MostFloats() / (count + 1.0))));
    const bool by_vector = to_kernel_ && p.panels >= 3 * parts &&
                           count * best.width <= kMostVectorSums;
    Tensor sums;
    TF_RETURN_IF_ERROR(context->allocate_temp(
        tensorflow::DT_FLOAT,
        TensorShape({parts * ((to_kernel_ ? count : 0) +
                              (to_bias_ ? outputs : 0))}),
        &sums));
    float* const kernel_sums = Write(&sums);
    float* const bias_sums = kernel_sums + (to_kernel_ ? parts * count : 0);
    const int64_t in_x = to_kernel_ ? inputs * p.pitch : 0;
    const int64_t in_dx = to_x_ ? CeilDivide(inputs, p.splits) * p.pitch : 0;
    const int64_t in_bias = to_bias_ ? outputs * best.width : 0;
    const int64_t floats = outputs * p.pitch + in_x + in_dx + in_bias +
                           (by_vector ? count * best.width : 0);
    std::atomic<bool> short_of_memory{false};
    ForEach(context, parts * p.splits, [&](int64_t unit) {
      const Scratch memory(floats);
      if (!memory.data) {
        short_of_memory = true;
        return;
      }
      const int64_t part = unit / p.splits, split = unit % p.splits;
      float* upstream = memory.data;
      float* packed = upstream + outputs * p.pitch;
      float* downstream = packed + in_x;
      float* of_bias = downstream + in_dx;
      float* vectors = of_bias + in_bias;
      const int64_t first_in = p.begin(inputs, split);
      const int64_t last_in = p.begin(inputs, split + 1);
      const int64_t first_out = p.begin(outputs, split);
      const int64_t last_out = p.begin(outputs, split + 1);
      float* of_kernel = kernel_sums + part * count;
      std::fill_n(of_bias, in_bias, 0.0f);
      if (by_vector)
        std::fill_n(vectors, count * best.width, 0.0f);
      else if (to_kernel_)
        Clear(*forward->view(), first_out, last_out, of_kernel);
      for (int64_t panel = p.panels * part / parts;
           panel < p.panels * (part + 1) / parts; ++panel) {
        const int64_t first = p.first(panel), rows = p.count(panel);
        best.pack(Read(dy) + first * outputs, outputs, rows, outputs,
                  p.vectors, upstream);
        if (to_x_) {
          best.multiply(backward->view(), first_in, last_in, p.vectors,
                        upstream, Read(ordered), false, downstream);
          best.unpack(downstream, p.vectors, rows, last_in - first_in, nullptr,
                      inputs, Streams(*dx),
                      Write(dx) + first * inputs + first_in);
        }
        if (to_kernel_) {
          best.pack(Read(x) + first * inputs, inputs, rows, inputs, p.vectors,
                    packed);
          (by_vector ? best.vector_dots : best.dots)(
              forward->view(), first_out, last_out, p.vectors, packed,
              upstream, by_vector ? vectors : of_kernel);
        }
        if (to_bias_)
          best.column_sums(upstream + first_out * p.pitch, p.vectors,
                           last_out - first_out, of_bias);
      }
      if (by_vector) best.add_up(vectors, count, of_kernel);
      if (to_bias_)
        best.add_up(of_bias, last_out - first_out,
                    bias_sums + part * outputs + first_out);
    });
    if (short_of_memory) return NoMemory(floats);
    if (to_bias_)
      Total(context, bias_sums, parts, outputs,
            [&](int64_t o, float sum) { Write(dbias)[o] = sum; });
    if (!to_kernel_) {
      Tensor* nothing;
      return context->allocate_output(1, none, &nothing);
    }
    Tensor in_rows;
    TF_RETURN_IF_ERROR(context->allocate_temp(
        tensorflow::DT_FLOAT, TensorShape({count}), &in_rows));
    const int32_t* at = forward->from().data();
    float* to = Write(&in_rows);
    Total(context, kernel_sums, parts, count,
          [=](int64_t e, float sum) { to[at[e]] = sum; });
    TF_RETURN_IF_ERROR(looked_at->Scatter(context, to, &dkernel));
    context->set_output(1, dkernel);
    return tensorflow::OkStatus();
  }

 private:
  // Sums that are vectors stay in a core's caches, or are numbers.
  static constexpr int64_t kMostVectorSums = 1 << 21;

  // Zero for the weights of outputs [begin, end).
  static void Clear(const RiglWeights& weights, int64_t begin, int64_t end,
                    float* sums) {
    for (int b = 0; b < weights.blocks; ++b) {
      const int32_t* rows = weights.rows + b * weights.outputs;
      std::fill(sums + rows[begin], sums + rows[end], 0.0f);
    }
  }

  // Calls take(i, the sum over parts of number i).
  template <typename Take>
  static void Total(OpKernelContext* context, const float* sums, int64_t parts,
                    int64_t count, const Take& take) {
    ForPieces(context, count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float sum = 0;
        for (int64_t part = 0; part < parts; ++part)
          sum += sums[part * count + i];
        take(i, sum);
      }
    });
  }

  bool to_x_, to_kernel_, to_bias_;
  SparseMatrices matrices_;
};

namespace shapes = tensorflow::shape_inference;

using shapes::DimensionHandle;
using shapes::InferenceContext;
using shapes::ShapeHandle;

// The shape of outputs of a kernel, for inputs of a shape.
tensorflow::Status OutputsOf(InferenceContext* context, ShapeHandle* inputs,
                             ShapeHandle kernel, ShapeHandle* outputs) {
  TF_RETURN_IF_ERROR(context->WithRankAtLeast(*inputs, 1, inputs));
  if (!context->RankKnown(*inputs)) {
    *outputs = context->UnknownShape();
    return tensorflow::OkStatus();
  }
  DimensionHandle last;
  TF_RETURN_IF_ERROR(context->Merge(context->Dim(*inputs, -1),
                                    context->Dim(kernel, 0), &last));
  TF_RETURN_IF_ERROR(context->ReplaceDim(*inputs, -1, last, inputs));
  return context->ReplaceDim(*inputs, -1, context->Dim(kernel, 1), outputs);
}

tensorflow::Status KernelOf(InferenceContext* context, int kernel,
                            ShapeHandle* shape) {
  TF_RETURN_IF_ERROR(context->WithRank(context->input(kernel), 2, shape));
  return context->Merge(*shape, context->input(kernel + 1), shape);
}

REGISTER_OP("RiglKerasMatMul")
    .Input("x: float")
    .Input("kernel: float")
    .Input("mask: mask_type")
    .Attr("mask_type: {bool, uint8, float} = DT_FLOAT")
    .Input("bias: float")
    .Output("y: float")
    .Output("weights: float")
    .Attr("dense_gradient: bool = false")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x = context->input(0), kernel, bias, y;
      TF_RETURN_IF_ERROR(KernelOf(context, 1, &kernel));
      TF_RETURN_IF_ERROR(OutputsOf(context, &x, kernel, &y));
      TF_RETURN_IF_ERROR(context->WithRank(context->input(3), 1, &bias));
      context->set_output(0, y);
      context->set_output(1, context->Vector(context->UnknownDim()));
      return tensorflow::OkStatus();
    });

REGISTER_OP("RiglKerasMatMulGrad")
    .Input("x: float")
    .Input("dy: float")
    .Input("kernel: float")
    .Input("mask: mask_type")
    .Attr("mask_type: {bool, uint8, float} = DT_FLOAT")
    .Input("weights: float")
    .Output("dx: float")
    .Output("dkernel: float")
    .Output("dbias: float")
    .Attr("to_x: bool")
    .Attr("to_kernel: bool")
    .Attr("to_bias: bool")
    .Attr("dense_gradient: bool = false")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x = context->input(0), kernel, y;
      TF_RETURN_IF_ERROR(KernelOf(context, 2, &kernel));
      TF_RETURN_IF_ERROR(OutputsOf(context, &x, kernel, &y));
      TF_RETURN_IF_ERROR(context->Merge(y, context->input(1), &y));
      bool wanted[3];
      TF_RETURN_IF_ERROR(context->GetAttr("to_x", &wanted[0]));
      TF_RETURN_IF_ERROR(context->GetAttr("to_kernel", &wanted[1]));
      TF_RETURN_IF_ERROR(context->GetAttr("to_bias", &wanted[2]));
      const ShapeHandle outputs[] = {
          x, kernel, context->Vector(context->Dim(kernel, 1))};
      for (int i = 0; i < 3; ++i)
        context->set_output(i, wanted[i] ? outputs[i] : context->Vector(0));
      return tensorflow::OkStatus();
    });

[[maybe_unused]] const bool registered = [] {
  if (!first_copy) return false;
  Register<SparseMatMul>("RiglKerasMatMul");
  Register<SparseMatMulGrad>("RiglKerasMatMulGrad");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

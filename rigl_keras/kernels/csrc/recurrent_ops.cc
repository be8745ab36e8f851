// TensorFlow operations over panels.h and recurrent.h: LSTM and GRU layers
// with sparse kernels, a whole sequence at a time.
//
// Some rows of the batch are a panel, which one thread takes through all steps
// of the sequence: no step waits for another thread.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "panels.h"
#include "plans.h"
#include "recurrent.h"
#include "runtime.h"
#include "sparse_matrix.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace rigl_keras {
namespace {

// Before any operation is registered below.
const bool first_copy = FirstCopyOf("RiglKerasRecurrent");

const RiglRecurrent& BestRecurrent() {
  static const RiglRecurrent* const best = []() -> const RiglRecurrent* {
    const std::string name = BestLanes().name;
#ifdef RIGL_X86
    if (name == rigl_recurrent_avx512.name) return &rigl_recurrent_avx512;
    if (name == rigl_recurrent_avx2.name) return &rigl_recurrent_avx2;
#endif
    return &rigl_recurrent_portable;
  }();
  return *best;
}

// Sizes of a layer, and how its batch is shared out.
struct Sizes {
  int64_t batch, steps, inputs, units;
  int64_t gates;  // products of a step, in units: 4 of an LSTM, 3 of a GRU
  bool lstm;
  // Whether x has been multiplied by the kernel, which has no rows then.
  bool projected;
  int64_t out_steps;
  int vectors;
  int64_t pitch, panels;

  // What is kept of each step for the gradient, in rows of a panel: gates, the
  // carry of an LSTM, the state.
  int64_t kept() const { return units * (lstm ? 6 : 5); }
  int64_t carry_at() const { return 4 * units * pitch; }
  int64_t state_at() const { return units * (lstm ? 5 : 4) * pitch; }
  int64_t reserve() const { return panels * steps * kept() * pitch; }
  int64_t count(int64_t panel) const {
    return std::min(pitch, batch - panel * pitch);
  }
};

class Recurrent : public OpKernel {
 public:
  explicit Recurrent(OpKernelConstruction* context) : OpKernel(context) {
    std::string kind;
    OP_REQUIRES_OK(context, context->GetAttr("kind", &kind));
    lstm_ = kind == "lstm";
    OP_REQUIRES_OK(context, context->GetAttr("sequences", &sequences_));
    OP_REQUIRES_OK(context, context->GetAttr("backwards", &backwards_));
  }

 protected:
  // Inputs: x, state, carry, kernel, mask, recurrent kernel, its mask, bias.
  tensorflow::Status Describe(OpKernelContext* context, Sizes* sizes) const {
    const Tensor& x = context->input(0);
    const Tensor& state = context->input(1);
    const Tensor& carry = context->input(2);
    const Tensor& kernel = context->input(3);
    const Tensor& recurrent = context->input(5);
    const Tensor& bias = context->input(7);
    TF_RETURN_IF_ERROR(CheckMatrix(kernel, context->input(4)));
    TF_RETURN_IF_ERROR(CheckMatrix(recurrent, context->input(6)));
    Sizes& s = *sizes;
    s.lstm = lstm_;
    s.gates = lstm_ ? 4 : 3;
    s.units = recurrent.dim_size(0);
    s.inputs = kernel.dim_size(0);
    s.projected = x.dims() == 3 && !s.inputs && x.dim_size(2);
    if (s.projected) s.inputs = s.gates * s.units;
    if (x.dims() != 3 || x.dim_size(2) != s.inputs || x.dim_size(1) < 1)
      return InvalidArgument("sequences must be [batch, steps, ", s.inputs,
                             "], of a step at least. Received: ",
                             x.shape().DebugString());
    s.batch = x.dim_size(0), s.steps = x.dim_size(1);
    const int64_t products = s.gates * s.units;
    if (kernel.dim_size(1) != products || recurrent.dim_size(1) != products)
      return InvalidArgument("kernels must have ", products,
                             " columns. Received: ",
                             kernel.shape().DebugString(), " and ",
                             recurrent.shape().DebugString());
    const TensorShape of_state({s.batch, s.units});
    if (state.shape() != of_state || (lstm_ && carry.shape() != of_state))
      return InvalidArgument("states must be of shape ",
                             of_state.DebugString(), ". Received: ",
                             state.shape().DebugString(), " and ",
                             carry.shape().DebugString());
    const int64_t biases = lstm_ ? products : 2 * products;
    if (bias.dims() != 1 ||
        (bias.NumElements() && bias.NumElements() != biases))
      return InvalidArgument("bias must be empty, or ", biases,
                             " numbers. Received: ",
                             bias.shape().DebugString());
    s.out_steps = sequences_ ? s.steps : 1;
    const RiglPanels& best = BestPanels();
    const int threads = Threads(context);
    s.vectors = best.vectors;
    const auto count = [&] {
      return CeilDivide(s.batch, int64_t{s.vectors} * best.width);
    };
    while (s.vectors > 1 && (count() < threads ||
                             s.batch <= int64_t{s.vectors} / 2 * best.width))
      s.vectors /= 2;
    s.pitch = int64_t{s.vectors} * best.width;
    s.panels = count();
    return tensorflow::OkStatus();
  }

  int64_t TimeOf(const Sizes& s, int64_t step) const {
    return backwards_ ? s.steps - 1 - step : step;
  }

  static tensorflow::Status NoMemory(int64_t floats) {
    return ResourceExhausted("there is not enough memory: each thread takes ",
                             floats * sizeof(float), " bytes");
  }

  static const float* BiasOf(const Tensor& bias) {
    return bias.NumElements() ? Read(bias) : nullptr;
  }

  bool lstm_, sequences_, backwards_;
  SparseMatrices matrices_;
};

class RecurrentForward : public Recurrent {
 public:
  using Recurrent::Recurrent;

 protected:
  tensorflow::Status Run(OpKernelContext* context) {
    Sizes s;
    TF_RETURN_IF_ERROR(Describe(context, &s));
    const Tensor& x = context->input(0);
    Tensor *y, *last, *kept, *weights[2];
    TF_RETURN_IF_ERROR(context->allocate_output(
        0, TensorShape({s.batch, s.out_steps, s.units}), &y));
    TF_RETURN_IF_ERROR(context->allocate_output(
        1, lstm_ ? TensorShape({s.batch, s.units}) : TensorShape({0}), &last));
    TF_RETURN_IF_ERROR(
        context->allocate_output(2, TensorShape({s.reserve()}), &kept));
    Tensor ordered[2];
    const RiglWeights* views[2];
    for (int k = 0; k < 2; ++k) {
      const auto matrix = matrices_.Get(context->input(4 + 2 * k));
      TF_RETURN_IF_ERROR(context->allocate_output(
          3 + k, TensorShape({matrix->size()}), &weights[k]));
      matrix->Gather(context, Read(context->input(3 + 2 * k)),
                     Write(weights[k]));
      const SortedWeights& sorted = matrix->sorted(false);
      TF_RETURN_IF_ERROR(
          Ordered(context, sorted, Read(*weights[k]), &ordered[k]));
      views[k] = sorted.view();
    }
    const RiglPanels& best = BestPanels();
    const RiglRecurrent& gate = BestRecurrent();
    const float* bias = BiasOf(context->input(7));
    const int64_t products = s.gates * s.units;
    const int64_t state = s.units * s.pitch;
    const int64_t floats =
        s.inputs * s.pitch + 2 * state + (lstm_ ? 0 : 2 * products * s.pitch);
    std::atomic<bool> short_of_memory{false};
    ForEach(context, s.panels, [&](int64_t panel) {
      const Scratch memory(floats);
      if (!memory.data) {
        short_of_memory = true;
        return;
      }
      const int64_t first = panel * s.pitch, rows = s.count(panel);
      float* packed = memory.data;
      float* first_state = packed + s.inputs * s.pitch;
      float* first_carry = first_state + state;
      float* of_inputs = first_carry + state;
      float* of_state = of_inputs + products * s.pitch;
      best.pack(Read(context->input(1)) + first * s.units, s.units, rows,
                s.units, s.vectors, first_state);
      if (lstm_)
        best.pack(Read(context->input(2)) + first * s.units, s.units, rows,
                  s.units, s.vectors, first_carry);
      const float* before = first_state;
      const float* carry_before = first_carry;
      for (int64_t step = 0; step < s.steps; ++step) {
        float* gates =
            Write(kept) + (panel * s.steps + step) * s.kept() * s.pitch;
        float* carry = gates + s.carry_at();
        float* after = gates + s.state_at();
        float* projected = lstm_ ? gates : of_inputs;
        best.pack(Read(x) + (first * s.steps + TimeOf(s, step)) * s.inputs,
                  s.steps * s.inputs, rows, s.inputs, s.vectors,
                  s.projected ? projected : packed);
        if (!s.projected)
          best.multiply(views[0], 0, products, s.vectors, packed,
                        Read(ordered[0]), false, projected);
        best.multiply(views[1], 0, products, s.vectors, before,
                      Read(ordered[1]), lstm_, lstm_ ? gates : of_state);
        if (lstm_)
          gate.lstm(s.units, s.pitch, bias, gates, carry_before, carry, after);
        else
          gate.gru(s.units, s.pitch, bias, of_inputs, of_state, before, gates,
                   after);
        before = after;
        carry_before = carry;
        if (sequences_ || step + 1 == s.steps)
          best.unpack(after, s.vectors, rows, s.units, nullptr,
                      s.out_steps * s.units, false,
                      Write(y) + (first * s.out_steps +
                                  (sequences_ ? step : 0)) * s.units);
      }
      if (lstm_)
        best.unpack(carry_before, s.vectors, rows, s.units, nullptr, s.units,
                    false, Write(last) + first * s.units);
    });
    return short_of_memory ? NoMemory(floats) : tensorflow::OkStatus();
  }
};

class RecurrentGrad : public Recurrent {
 public:
  explicit RecurrentGrad(OpKernelConstruction* context) : Recurrent(context) {
    OP_REQUIRES_OK(context, context->GetAttr("to_x", &to_x_));
    OP_REQUIRES_OK(context, context->GetAttr("dense_gradient", &dense_));
  }

 protected:
  // After the inputs of the forward pass: what it kept, its weights, and the
  // gradients of y and of the last carry.
  tensorflow::Status Run(OpKernelContext* context) {
    Sizes s;
    TF_RETURN_IF_ERROR(Describe(context, &s));
    const Tensor& x = context->input(0);
    const Tensor& bias = context->input(7);
    const Tensor& kept = context->input(8);
    const Tensor& dy = context->input(11);
    const Tensor& dlast = context->input(12);
    if (kept.NumElements() != s.reserve())
      return InvalidArgument("the forward pass has kept ", s.reserve(),
                             " numbers. Received: ", kept.NumElements());
    const TensorShape y_shape({s.batch, s.out_steps, s.units});
    if (dy.shape() != y_shape ||
        (lstm_ && dlast.shape() != TensorShape({s.batch, s.units})))
      return InvalidArgument("the gradients must be of shape ",
                             y_shape.DebugString(), ". Received: ",
                             dy.shape().DebugString(), " and ",
                             dlast.shape().DebugString());
    const TensorShape none({0});
    const int64_t products = s.gates * s.units;
    // Gradients of products of the inputs and of the state; of an LSTM they
    // are the same.
    const int sides = lstm_ ? 1 : 2;
    Tensor *dx, *dstate, *dcarry, *dbias, *of_products[2];
    TF_RETURN_IF_ERROR(
        context->allocate_output(0, to_x_ ? x.shape() : none, &dx));
    TF_RETURN_IF_ERROR(context->allocate_output(
        1, TensorShape({s.batch, s.units}), &dstate));
    TF_RETURN_IF_ERROR(context->allocate_output(
        2, lstm_ ? TensorShape({s.batch, s.units}) : none, &dcarry));
    TF_RETURN_IF_ERROR(context->allocate_output(5, bias.shape(), &dbias));
    for (int k = 0; k < 2; ++k)
      TF_RETURN_IF_ERROR(context->allocate_output(
          6 + k,
          dense_ && k < sides ? TensorShape({s.batch, s.steps, products})
                              : none,
          &of_products[k]));
    std::shared_ptr<SparseMatrix> matrices[2], looked_at[2];
    const RiglWeights *forward[2], *backward[2];
    const std::vector<int32_t>* from[2];
    Tensor ordered[2];
    int64_t counts[2];
    for (int k = 0; k < 2; ++k) {
      matrices[k] = matrices_.Get(context->input(4 + 2 * k));
      looked_at[k] = matrices_.Get(context->input(4 + 2 * k), kLookedAt);
      counts[k] = looked_at[k]->size();
      const Tensor& weights = context->input(9 + k);
      if (weights.dims() != 1 || weights.NumElements() != matrices[k]->size())
        return InvalidArgument("the mask leaves ", matrices[k]->size(),
                               " weights. Received: ", weights.NumElements());
      const SortedWeights& reverse = matrices[k]->sorted(true);
      backward[k] = reverse.view();
      TF_RETURN_IF_ERROR(
          Ordered(context, reverse, Read(weights), &ordered[k]));
      const SortedWeights& sorted = looked_at[k]->sorted(false);
      forward[k] = sorted.view();
      from[k] = &sorted.from();
    }
    const RiglPanels& best = BestPanels();
    const RiglRecurrent& gate = BestRecurrent();
    bool by_vector[2];
    int64_t in_sums = 0;
    for (int k = 0; k < 2; ++k) {
      by_vector[k] = counts[k] * best.width <= kMostVectorSums;
      if (!dense_ && by_vector[k]) in_sums += counts[k] * best.width;
    }
    const int64_t biases = bias.NumElements();
    // Panels add up to parts, each of which one thread computes.
    const int64_t parts = std::min<int64_t>(
        s.panels, std::max<int64_t>(8, Threads(context)));
    const int64_t in_part = biases + (dense_ ? 0 : counts[0] + counts[1]);
    Tensor sums;
    TF_RETURN_IF_ERROR(context->allocate_temp(
        tensorflow::DT_FLOAT, TensorShape({parts * in_part}), &sums));
    std::fill_n(Write(&sums), sums.NumElements(), 0.0f);
    const int64_t state = s.units * s.pitch;
    const int64_t floats = in_sums + 5 * state + 2 * s.inputs * s.pitch +
                           sides * products * s.pitch +
                           biases * best.width;
    std::atomic<bool> short_of_memory{false};
    ForEach(context, parts, [&](int64_t part) {
      const Scratch memory(floats);
      if (!memory.data) {
        short_of_memory = true;
        return;
      }
      float* at = memory.data;
      const auto take = [&at](int64_t count) {
        float* taken = at;
        at += count;
        return taken;
      };
      float* upstream = take(state);  // of a step's output
      float* of_state = take(state);
      float* of_carry = take(state);
      float* first_state = take(state);
      float* first_carry = take(state);
      float* packed = take(s.inputs * s.pitch);
      float* downstream = take(s.inputs * s.pitch);
      float* of[2];
      of[0] = of[1] = take(products * s.pitch);
      if (!lstm_) of[1] = take(products * s.pitch);
      float* of_bias = take(biases * best.width);
      std::fill_n(of_bias, biases * best.width, 0.0f);
      // Sums of the weights of both kernels: numbers, or vectors.
      float *numbers[2], *adding[2];
      numbers[0] = Write(&sums) + part * in_part + biases;
      numbers[1] = numbers[0] + counts[0];
      for (int k = 0; k < 2; ++k) {
        adding[k] = numbers[k];
        if (dense_ || !by_vector[k]) continue;
        adding[k] = take(counts[k] * best.width);
        std::fill_n(adding[k], counts[k] * best.width, 0.0f);
      }
      for (int64_t panel = s.panels * part / parts;
           panel < s.panels * (part + 1) / parts; ++panel) {
        const int64_t first = panel * s.pitch, rows = s.count(panel);
        best.pack(Read(context->input(1)) + first * s.units, s.units, rows,
                  s.units, s.vectors, first_state);
        std::fill_n(of_state, state, 0.0f);
        if (lstm_) {
          best.pack(Read(context->input(2)) + first * s.units, s.units, rows,
                    s.units, s.vectors, first_carry);
          best.pack(Read(dlast) + first * s.units, s.units, rows, s.units,
                    s.vectors, of_carry);
        }
        for (int64_t step = s.steps - 1; step >= 0; --step) {
          const int64_t size = s.kept() * s.pitch;
          const float* gates = Read(kept) + (panel * s.steps + step) * size;
          const float* carry = gates + s.carry_at();
          const float* before =
              step ? gates - size + s.state_at() : first_state;
          const float* carry_before =
              step ? gates - size + s.carry_at() : first_carry;
          if (sequences_ || step + 1 == s.steps) {
            best.pack(Read(dy) + (first * s.out_steps +
                                  (sequences_ ? step : 0)) * s.units,
                      s.out_steps * s.units, rows, s.units, s.vectors,
                      upstream);
            for (int64_t i = 0; i < state; ++i) of_state[i] += upstream[i];
          }
          if (lstm_)
            gate.lstm_grad(s.units, s.pitch, gates, carry_before, carry,
                           of_state, of_carry, of[0]);
          else
            gate.gru_grad(s.units, s.pitch, gates, before, of_state, of[0],
                          of[1]);
          // Of a GRU, to what reaches the state directly.
          best.multiply(backward[1], 0, s.units, s.vectors, of[1],
                        Read(ordered[1]), !lstm_, of_state);
          const int64_t time = first * s.steps + TimeOf(s, step);
          if (to_x_) {
            if (!s.projected)
              best.multiply(backward[0], 0, s.inputs, s.vectors, of[0],
                            Read(ordered[0]), false, downstream);
            best.unpack(s.projected ? of[0] : downstream, s.vectors, rows, s.inputs, nullptr,
                        s.steps * s.inputs, false,
                        Write(dx) + time * s.inputs);
          }
          if (biases) {
            best.column_sums(of[0], s.vectors, products, of_bias);
            if (!lstm_)
              best.column_sums(of[1], s.vectors, products,
                               of_bias + products * best.width);
          }
          if (dense_) {
            for (int k = 0; k < sides; ++k)
              best.unpack(of[k], s.vectors, rows, products, nullptr,
                          s.steps * products, false,
                          Write(of_products[k]) +
                              (first * s.steps + step) * products);
            continue;
          }
          if (!s.projected) {
            best.pack(Read(x) + time * s.inputs, s.steps * s.inputs, rows,
                      s.inputs, s.vectors, packed);
            (by_vector[0] ? best.vector_dots : best.dots)(
                forward[0], 0, products, s.vectors, packed, of[0], adding[0]);
          }
          (by_vector[1] ? best.vector_dots : best.dots)(
              forward[1], 0, products, s.vectors, before, of[1], adding[1]);
        }
        best.unpack(of_state, s.vectors, rows, s.units, nullptr, s.units,
                    false, Write(dstate) + first * s.units);
        if (lstm_)
          best.unpack(of_carry, s.vectors, rows, s.units, nullptr, s.units,
                      false, Write(dcarry) + first * s.units);
      }
      best.add_up(of_bias, biases, Write(&sums) + part * in_part);
      for (int k = 0; k < 2; ++k)
        if (!dense_ && by_vector[k])
          best.add_up(adding[k], counts[k], numbers[k]);
    });
    if (short_of_memory) return NoMemory(floats);
    // In the order of parts, whichever thread computed them.
    float* total = Write(&sums);
    std::vector<float> nothing;
    if (!parts) {
      nothing.assign(std::max<int64_t>(1, in_part), 0.0f);
      total = nothing.data();
    }
    ForPieces(context, in_part, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = begin; i < end; ++i)
          total[i] += total[part * in_part + i];
    });
    std::copy_n(total, biases, Write(dbias));
    const float* of_kernel = total + biases;
    for (int k = 0; k < 2; ++k) {
      if (dense_) {
        Tensor* empty;
        TF_RETURN_IF_ERROR(context->allocate_output(3 + k, none, &empty));
        continue;
      }
      Tensor in_rows, dkernel;
      TF_RETURN_IF_ERROR(context->allocate_temp(
          tensorflow::DT_FLOAT, TensorShape({counts[k]}), &in_rows));
      float* to = Write(&in_rows);
      for (int64_t e = 0; e < counts[k]; ++e) to[(*from[k])[e]] = of_kernel[e];
      TF_RETURN_IF_ERROR(looked_at[k]->Scatter(context, to, &dkernel));
      context->set_output(3 + k, dkernel);
      of_kernel += counts[k];
    }
    return tensorflow::OkStatus();
  }

 private:
  // Sums that are vectors stay in a core's caches, or are numbers.
  static constexpr int64_t kMostVectorSums = 1 << 21;

  bool to_x_, dense_;
};

namespace shapes = tensorflow::shape_inference;

using shapes::DimensionHandle;
using shapes::InferenceContext;
using shapes::ShapeHandle;

REGISTER_OP("RiglKerasRecurrent")
    .Input("x: float")
    .Input("state: float")
    .Input("carry: float")
    .Input("kernel: float")
    .Input("kernel_mask: mask_type")
    .Attr("mask_type: {bool, uint8, float} = DT_FLOAT")
    .Input("recurrent: float")
    .Input("recurrent_mask: mask_type")
    .Input("bias: float")
    .Output("y: float")
    .Output("last: float")
    .Output("kept: float")
    .Output("kernel_weights: float")
    .Output("recurrent_weights: float")
    .Attr("kind: {'lstm', 'gru'}")
    .Attr("sequences: bool")
    .Attr("backwards: bool")
    .Attr("dense_gradient: bool = false")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle x, state, recurrent;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 3, &x));
      TF_RETURN_IF_ERROR(context->WithRank(context->input(1), 2, &state));
      TF_RETURN_IF_ERROR(context->WithRank(context->input(5), 2, &recurrent));
      DimensionHandle batch, units;
      TF_RETURN_IF_ERROR(context->Merge(context->Dim(x, 0),
                                        context->Dim(state, 0), &batch));
      TF_RETURN_IF_ERROR(context->Merge(context->Dim(state, 1),
                                        context->Dim(recurrent, 0), &units));
      std::string kind;
      bool sequences;
      TF_RETURN_IF_ERROR(context->GetAttr("kind", &kind));
      TF_RETURN_IF_ERROR(context->GetAttr("sequences", &sequences));
      context->set_output(
          0, context->MakeShape({batch,
                                 sequences ? context->Dim(x, 1)
                                           : context->MakeDim(1),
                                 units}));
      context->set_output(1, kind == "lstm" ? context->Matrix(batch, units)
                                            : context->Vector(0));
      for (int i = 2; i < 5; ++i)
        context->set_output(i, context->Vector(context->UnknownDim()));
      return tensorflow::OkStatus();
    });

REGISTER_OP("RiglKerasRecurrentGrad")
    .Input("x: float")
    .Input("state: float")
    .Input("carry: float")
    .Input("kernel: float")
    .Input("kernel_mask: mask_type")
    .Attr("mask_type: {bool, uint8, float} = DT_FLOAT")
    .Input("recurrent: float")
    .Input("recurrent_mask: mask_type")
    .Input("bias: float")
    .Input("kept: float")
    .Input("kernel_weights: float")
    .Input("recurrent_weights: float")
    .Input("dy: float")
    .Input("dlast: float")
    .Output("dx: float")
    .Output("dstate: float")
    .Output("dcarry: float")
    .Output("dkernel: float")
    .Output("drecurrent: float")
    .Output("dbias: float")
    .Output("of_inputs: float")
    .Output("of_state: float")
    .Attr("kind: {'lstm', 'gru'}")
    .Attr("sequences: bool")
    .Attr("backwards: bool")
    .Attr("to_x: bool")
    .Attr("dense_gradient: bool = false")
    .SetShapeFn([](InferenceContext* context) {
      bool to_x, dense;
      std::string kind;
      TF_RETURN_IF_ERROR(context->GetAttr("to_x", &to_x));
      TF_RETURN_IF_ERROR(context->GetAttr("dense_gradient", &dense));
      TF_RETURN_IF_ERROR(context->GetAttr("kind", &kind));
      ShapeHandle x;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 3, &x));
      const ShapeHandle none = context->Vector(0);
      const ShapeHandle products = context->MakeShape(
          {context->Dim(x, 0), context->Dim(x, 1), context->UnknownDim()});
      context->set_output(0, to_x ? x : none);
      context->set_output(1, context->input(1));
      context->set_output(2, kind == "lstm" ? context->input(2) : none);
      context->set_output(3, dense ? none : context->input(3));
      context->set_output(4, dense ? none : context->input(5));
      context->set_output(5, context->input(7));
      context->set_output(6, dense ? products : none);
      context->set_output(7, dense && kind == "gru" ? products : none);
      return tensorflow::OkStatus();
    });

[[maybe_unused]] const bool registered = [] {
  if (!first_copy) return false;
  Register<RecurrentForward>("RiglKerasRecurrent");
  Register<RecurrentGrad>("RiglKerasRecurrentGrad");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

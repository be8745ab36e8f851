// TensorFlow operations over lanes.h: convolutions with a sparse kernel.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <list>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "plans.h"
#include "rows.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "tensorflow/core/util/util.h"

namespace rigl_keras {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::errors::InvalidArgument;

// Whether this is the first copy of the library in the process: an exported
// model brings one, too. Asked before any operation is registered below. Of
// two kernels for an operation TensorFlow would take neither.
const bool first_copy =
    tensorflow::OpRegistry::Global()->LookUp("RiglKerasComputedBy") == nullptr;

// The instruction set of this machine's processor. RIGL_KERAS_ISA names
// another one that it has, for tests.
const RiglLanes& BestLanes() {
  static const RiglLanes* const best = [] {
    std::vector<const RiglLanes*> have;
#ifdef RIGL_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq"))
      have.push_back(&rigl_lanes_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      have.push_back(&rigl_lanes_avx2);
#endif
    have.push_back(&rigl_lanes_portable);
    if (const char* wanted = std::getenv("RIGL_KERAS_ISA"))
      for (const RiglLanes* lanes : have)
        if (!std::strcmp(lanes->name, wanted)) return lanes;
    return have.front();
  }();
  return *best;
}

const RiglRows& BestRows() {
  static const RiglRows* const best = []() -> const RiglRows* {
    const std::string name = BestLanes().name;
#ifdef RIGL_X86
    if (name == rigl_rows_avx512.name) return &rigl_rows_avx512;
    if (name == rigl_rows_avx2.name) return &rigl_rows_avx2;
#endif
    return &rigl_rows_portable;
  }();
  return *best;
}

// Memory of one thread, kept for its next use.
float* Memory(int64_t floats) {
  struct Kept {
    float* begin = nullptr;
    int64_t floats = 0;
    ~Kept() { std::free(begin); }
  };
  thread_local Kept kept;
  if (kept.floats < floats) {
    std::free(kept.begin);
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    kept.begin = static_cast<float*>(std::aligned_alloc(64, bytes));
    kept.floats = kept.begin ? floats : 0;
  }
  return kept.begin;
}

int Threads(OpKernelContext* context) {
  return context->device()->tensorflow_cpu_worker_threads()->num_threads;
}

// Tells the thread sanitizer, which sees nothing of what TensorFlow does, that
// what came before came before.
void InOrder() {
#ifdef __SANITIZE_THREAD__
  static std::atomic<int64_t> order{0};
  order.fetch_add(1, std::memory_order_acq_rel);
#endif
}

// Calls a function for each of [0, count), on TensorFlow's own threads.
void ForEach(OpKernelContext* context, int64_t count,
             const std::function<void(int64_t)>& run) {
  // Made here, and not in the call below: before what is told to be before.
  const std::function<void(int64_t, int64_t)> run_all = [&run](int64_t begin,
                                                               int64_t end) {
    InOrder();
    for (int64_t i = begin; i < end; ++i) run(i);
    InOrder();
  };
  if (count == 1) return run_all(0, 1);
  InOrder();
  context->device()->tensorflow_cpu_worker_threads()->workers->ParallelFor(
      count,
      tensorflow::thread::ThreadPool::SchedulingParams(
          tensorflow::thread::ThreadPool::SchedulingStrategy::kFixedBlockSize,
          std::nullopt, 1),
      run_all);
  InOrder();
}

// Of all operations, for tests.
std::atomic<int64_t> plans_made{0};

// What was made of a mask, for as long as TensorFlow holds it.
//
// The version of a mask is the buffer that it is in. TensorFlow never writes
// to a buffer that somebody else holds, and these hold theirs: a mask that has
// been assigned is in another one.
class Plans {
 public:
  struct Made {
    Tensor mask;    // or the places of weights
    Tensor frozen;  // values that never change, or nothing
    Convolution conv;
    OwnedPlan owned;
    std::vector<float> weights;  // the frozen values, in the plan's order
  };

  ~Plans() { InOrder(); }  // after all that used them

  // Finds what was made, or makes it: `make(Made*)` fills in the rest, or
  // says why it cannot.
  template <typename Make>
  tensorflow::Status Get(const Tensor& mask, const Tensor& frozen,
                         const Convolution& conv, const Make& make,
                         std::shared_ptr<const Made>* got) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto at = made_.begin(); at != made_.end(); ++at) {
        if (Same((*at)->mask, mask) && Same((*at)->frozen, frozen) &&
            Same((*at)->conv, conv)) {
          made_.splice(made_.begin(), made_, at);
          *got = made_.front();
          return tensorflow::OkStatus();
        }
      }
    }
    auto fresh = std::make_shared<Made>();
    fresh->mask = mask;
    fresh->frozen = frozen;
    fresh->conv = conv;
    TF_RETURN_IF_ERROR(make(fresh.get()));
    plans_made.fetch_add(1, std::memory_order_relaxed);
    std::lock_guard<std::mutex> lock(mutex_);
    // Masks that nobody else holds will not come again.
    made_.remove_if([](const std::shared_ptr<const Made>& one) {
      return one->mask.RefCountIsOne();
    });
    made_.push_front(fresh);
    if (made_.size() > kMost) made_.pop_back();
    *got = fresh;
    return tensorflow::OkStatus();
  }

 private:
  static constexpr size_t kMost = 64;  // run eagerly, layers share kernels

  // Parts of one buffer, as slices are, begin at different places in it.
  static bool Same(const Tensor& a, const Tensor& b) {
    return a.tensor_data().data() == b.tensor_data().data() &&
           a.tensor_data().size() == b.tensor_data().size();
  }

  static bool Same(const Convolution& a, const Convolution& b) {
    static_assert(std::has_unique_object_representations_v<Convolution>);
    return !std::memcmp(&a, &b, sizeof(Convolution));
  }

  std::mutex mutex_;
  std::list<std::shared_ptr<const Made>> made_;
};

std::vector<int32_t> ActiveOf(const Tensor& mask) {
  std::vector<int32_t> active;
  auto values = mask.flat<float>();
  for (int64_t i = 0; i < values.size(); ++i)
    if (values(i) > 0) active.push_back(i);
  return active;
}

// Rows or columns of what a convolution makes, of `length` padded ones.
int64_t OutputLength(int64_t length, int64_t kernel, int64_t stride,
                     int64_t dilation, const std::string& padding) {
  if (padding != "VALID") return CeilDivide(length, stride);
  const int64_t extent = (kernel - 1) * dilation + 1;
  return std::max<int64_t>(0, CeilDivide(length - extent + 1, stride));
}

// Attributes that all have, and what follows from shapes.
class SparseConvolution : public OpKernel {
 public:
  explicit SparseConvolution(OpKernelConstruction* context)
      : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("strides", &strides_));
    OP_REQUIRES_OK(context, context->GetAttr("dilations", &dilations_));
    OP_REQUIRES_OK(context, context->GetAttr("padding", &padding_));
    for (const auto& given : {strides_, dilations_}) {
      OP_REQUIRES(context,
                  given.size() == 4 && given[0] == 1 && given[3] == 1 &&
                      given[1] > 0 && given[2] > 0,
                  InvalidArgument("strides and dilations must be [1, rows, "
                                  "columns, 1], positive."));
    }
  }

 protected:
  tensorflow::Status Describe(const TensorShape& x, const TensorShape& kernel,
                              Convolution* conv) const {
    *conv = {};
    if (x.dims() != 4 || kernel.dims() != 4)
      return InvalidArgument("images must be [batch, rows, columns, channels] "
                             "and kernels [rows, columns, in, out]. Received: ",
                             x.DebugString(), " and ", kernel.DebugString());
    if (x.dim_size(3) != kernel.dim_size(2))
      return InvalidArgument("the kernel takes ", kernel.dim_size(2),
                             " channels and the images have ", x.dim_size(3));
    if (kernel.num_elements() > std::numeric_limits<int32_t>::max())
      return InvalidArgument("kernels of more than 2^31 weights");
    conv->images = x.dim_size(0);
    conv->height = x.dim_size(1), conv->width = x.dim_size(2);
    conv->channels = x.dim_size(3), conv->filters = kernel.dim_size(3);
    int64_t out[2];
    for (int a = 0; a < 2; ++a) {
      conv->kernel[a] = kernel.dim_size(a);
      conv->stride[a] = strides_[a + 1];
      conv->dilation[a] = dilations_[a + 1];
      const int64_t length = x.dim_size(a + 1) + pads_[2 * a] +
                             pads_[2 * a + 1];
      const int64_t extent =
          int64_t{conv->kernel[a] - 1} * conv->dilation[a] + 1;
      out[a] = OutputLength(length, conv->kernel[a], conv->stride[a],
                            conv->dilation[a], padding_);
      conv->padding[a] =
          padding_ == "VALID"
              ? pads_[2 * a]
              : std::max<int64_t>(
                    0, (out[a] - 1) * conv->stride[a] + extent - length) / 2;
    }
    conv->out_height = out[0], conv->out_width = out[1];
    // Rows of a matrix, which may be dealt to lanes as they come.
    if (conv->kernel[0] == 1 && conv->kernel[1] == 1 &&
        conv->stride[0] == 1 && conv->stride[1] == 1 &&
        out[0] == conv->height && out[1] == conv->width) {
      conv->width = conv->images * conv->height * conv->width;
      conv->images = conv->height = conv->out_height = 1;
      conv->out_width = conv->width;
    }
    return tensorflow::OkStatus();
  }

  TensorShape OutputShape(const TensorShape& x,
                          const TensorShape& kernel) const {
    TensorShape y = x;
    for (int a = 0; a < 2; ++a) {
      const int64_t length =
          x.dim_size(a + 1) + pads_[2 * a] + pads_[2 * a + 1];
      y.set_dim(a + 1, OutputLength(length, kernel.dim_size(a),
                                    strides_[a + 1], dilations_[a + 1],
                                    padding_));
    }
    y.set_dim(3, kernel.dim_size(3));
    return y;
  }

  static tensorflow::Status Check(const TensorShape& is,
                                  const TensorShape& should,
                                  const char* what) {
    if (is == should) return tensorflow::OkStatus();
    return InvalidArgument(what, " must have shape ", should.DebugString(),
                           ". Received: ", is.DebugString());
  }

  tensorflow::Status PlanOfMask(OpKernelContext* context, const Tensor& mask,
                                const Convolution& conv, bool transposed,
                                bool may_split,
                                std::shared_ptr<const Plans::Made>* got) {
    return plans_.Get(
        mask, Tensor(), conv,
        [&](Plans::Made* fresh) {
          fresh->owned = MakePlan(conv, ActiveOf(mask), transposed, may_split,
                                  Threads(context), BestLanes());
          return tensorflow::OkStatus();
        },
        got);
  }

  std::vector<int32_t> strides_, dilations_;
  std::vector<int32_t> pads_ = {0, 0, 0, 0};  // of VALID
  std::string padding_;
  Plans plans_;
};

// y = x * (kernel, where the mask is 1); or with `transposed` the gradient of
// x for that of y.
template <bool transposed>
class SparseConv2D : public SparseConvolution {
 public:
  using SparseConvolution::SparseConvolution;

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    const Tensor& kernel = context->input(1);
    const Tensor& mask = context->input(2);
    TensorShape x_shape = x.shape();
    if (transposed) {
      const Tensor& sizes = context->input(3);
      OP_REQUIRES(context, sizes.dims() == 1 && sizes.dim_size(0) == 4,
                  InvalidArgument("input_sizes must be four sizes."));
      x_shape = TensorShape();
      for (int i = 0; i < 4; ++i) {
        OP_REQUIRES(context, sizes.flat<int32_t>()(i) >= 0,
                    InvalidArgument("input_sizes must not be negative."));
        x_shape.AddDim(sizes.flat<int32_t>()(i));
      }
    }
    OP_REQUIRES_OK(context, Check(mask.shape(), kernel.shape(), "mask"));
    Convolution conv;
    OP_REQUIRES_OK(context, Describe(x_shape, kernel.shape(), &conv));
    TensorShape y_shape = OutputShape(x_shape, kernel.shape());
    if (transposed)
      OP_REQUIRES_OK(context, Check(x.shape(), y_shape, "out_backprop"));
    Tensor* y = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(
                                0, transposed ? x_shape : y_shape, &y));
    if (y->NumElements() == 0) return;
    if (x.NumElements() == 0) {
      y->flat<float>().setZero();
      return;
    }
    std::shared_ptr<const Plans::Made> made;
    OP_REQUIRES_OK(context,
                   PlanOfMask(context, mask, conv, transposed, true, &made));
    const OwnedPlan& owned = made->owned;
    Tensor gathered;
    OP_REQUIRES_OK(context, context->allocate_temp(
                                tensorflow::DT_FLOAT,
                                TensorShape({int64_t(owned.weights.size())}),
                                &gathered));
    float* weights = gathered.flat<float>().data();
    const float* dense = kernel.flat<float>().data();
    for (size_t e = 0; e < owned.weights.size(); ++e)
      weights[e] = dense[owned.weights[e]];
    Run(context, owned.plan, nullptr, x.flat<float>().data(), weights,
        y->flat<float>().data());
  }

 protected:
  void Run(OpKernelContext* context, const RiglPlan& plan,
           const RiglFused* fused, const float* x, const float* weights,
           float* y) {
    const RiglLanes& lanes = BestLanes();
    ForEach(context, plan.groups * plan.splits, [&](int64_t unit) {
      float* memory = Memory(plan.packed_floats + plan.micro_floats);
      lanes.correlate(&plan, fused, x, weights, y, unit, memory);
    });
  }
};

// The gradient of the kernel where the mask is 1, and zero elsewhere.
class SparseConv2DBackpropFilter : public SparseConvolution {
 public:
  using SparseConvolution::SparseConvolution;

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    const Tensor& mask = context->input(1);
    const Tensor& dy = context->input(2);
    Convolution conv;
    OP_REQUIRES_OK(context, Describe(x.shape(), mask.shape(), &conv));
    OP_REQUIRES_OK(context, Check(dy.shape(),
                                  OutputShape(x.shape(), mask.shape()),
                                  "out_backprop"));
    Tensor* dw = nullptr;
    OP_REQUIRES_OK(context,
                   context->allocate_output(0, mask.shape(), &dw));
    float* gradient = dw->flat<float>().data();
    std::fill_n(gradient, dw->NumElements(), 0.0f);
    if (dy.NumElements() == 0 || x.NumElements() == 0) return;
    std::shared_ptr<const Plans::Made> made;
    OP_REQUIRES_OK(context,
                   PlanOfMask(context, mask, conv, false, false, &made));
    const OwnedPlan& owned = made->owned;
    const RiglPlan& plan = owned.plan;
    const int64_t count = owned.weights.size();
    if (!count) return;
    // Each part sums up groups of its own, whichever thread takes it: the
    // order of additions, and so the result, is always the same.
    const int64_t parts =
        std::min<int64_t>(plan.groups, std::max(8, Threads(context)));
    Tensor sums;
    OP_REQUIRES_OK(context, context->allocate_temp(
                                tensorflow::DT_FLOAT,
                                TensorShape({parts, count}), &sums));
    float* partial = sums.flat<float>().data();
    const RiglLanes& lanes = BestLanes();
    ForEach(context, parts, [&](int64_t part) {
      float* sum = partial + part * count;
      std::fill_n(sum, count, 0.0f);
      float* memory = Memory(plan.packed_floats +
                             plan.micro_floats);
      for (int64_t group = plan.groups * part / parts;
           group < plan.groups * (part + 1) / parts; ++group)
        lanes.correlate_weights(&plan, x.flat<float>().data(),
                                dy.flat<float>().data(), sum, group, memory);
    });
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t e = 0; e < count; ++e)
        partial[e] += partial[part * count + e];
    for (int64_t e = 0; e < count; ++e) gradient[owned.weights[e]] = partial[e];
  }
};

// For inference: the weights that are left with their places, and what comes
// before and after the convolution.
class FrozenSparseConv2D : public SparseConv2D<false> {
 public:
  explicit FrozenSparseConv2D(OpKernelConstruction* context)
      : SparseConv2D<false>(context) {
    OP_REQUIRES_OK(context, context->GetAttr("kernel_shape", &kernel_shape_));
    pads_.clear();  // what is read is appended
    OP_REQUIRES_OK(context, context->GetAttr("pads", &pads_));
    OP_REQUIRES(context,
                pads_.size() == 4 &&
                    *std::min_element(pads_.begin(), pads_.end()) >= 0 &&
                    (padding_ == "VALID" ||
                     pads_ == std::vector<int32_t>{0, 0, 0, 0}),
                InvalidArgument("pads are four numbers of at least 0, with "
                                "padding VALID."));
    OP_REQUIRES_OK(context, context->GetAttr("relu_before", &relu_before_));
    OP_REQUIRES_OK(context, context->GetAttr("relu_after", &relu_after_));
    OP_REQUIRES(context, kernel_shape_.dims() == 4,
                InvalidArgument("kernel_shape must have four sizes."));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    const Tensor& values = context->input(1);
    const Tensor& places = context->input(2);
    const Tensor& scale = context->input(3);
    const Tensor& shift = context->input(4);
    const Tensor& bias = context->input(5);
    const Tensor& residual = context->input(6);
    OP_REQUIRES_OK(context, Check(values.shape(), places.shape(), "values"));
    Convolution conv;
    OP_REQUIRES_OK(context, Describe(x.shape(), kernel_shape_, &conv));
    const TensorShape y_shape = OutputShape(x.shape(), kernel_shape_);
    for (const Tensor* one : {&scale, &shift})
      if (one->NumElements())
        OP_REQUIRES_OK(context, Check(one->shape(), {conv.channels},
                                      "scale and shift"));
    OP_REQUIRES(context, scale.NumElements() == shift.NumElements(),
                InvalidArgument("scale and shift are given both or neither."));
    if (bias.NumElements())
      OP_REQUIRES_OK(context, Check(bias.shape(), {conv.filters}, "bias"));
    if (residual.NumElements())
      OP_REQUIRES_OK(context, Check(residual.shape(), y_shape, "residual"));
    Tensor* y = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, y_shape, &y));
    if (y->NumElements() == 0) return;
    std::shared_ptr<const Plans::Made> made;
    OP_REQUIRES_OK(
        context,
        plans_.Get(
            places, values, conv,
            [&](Plans::Made* fresh) {
              return MakeFrozen(context, places, values, conv, fresh);
            },
            &made));
    auto data = [](const Tensor& tensor) {
      return tensor.NumElements() ? tensor.flat<float>().data() : nullptr;
    };
    const RiglFused fused = {data(scale), data(shift),    relu_before_,
                             data(bias),  data(residual), relu_after_};
    Run(context, made->owned.plan, &fused, x.flat<float>().data(),
        made->weights.data(), y->flat<float>().data());
  }

 private:
  tensorflow::Status MakeFrozen(OpKernelContext* context, const Tensor& places,
                                const Tensor& values, const Convolution& conv,
                                Plans::Made* fresh) const {
    const auto at = places.flat<int32_t>();
    const std::vector<int32_t> active(at.data(), at.data() + at.size());
    const bool rising =
        std::adjacent_find(active.begin(), active.end(),
                           std::greater_equal<int32_t>()) == active.end();
    if (!rising ||
        (!active.empty() && (active.front() < 0 ||
                             active.back() >= kernel_shape_.num_elements())))
      return InvalidArgument("places must rise, within the kernel.");
    fresh->owned =
        MakePlan(conv, active, false, true, Threads(context), BestLanes());
    for (int32_t w : fresh->owned.weights)
      fresh->weights.push_back(values.flat<float>()(
          std::lower_bound(active.begin(), active.end(), w) -
          active.begin()));
    return tensorflow::OkStatus();
  }

  TensorShape kernel_shape_;
  bool relu_before_, relu_after_;
};

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

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    const Tensor& gamma = context->input(1);
    const Tensor& beta = context->input(2);
    OP_REQUIRES_OK(context, CheckChannels(x, {&gamma, &beta}));
    const Pieces p = PiecesOf(x);
    Tensor *y, *mean, *variance;
    OP_REQUIRES_OK(context, context->allocate_output(0, x.shape(), &y));
    OP_REQUIRES_OK(context, context->allocate_output(
                                1, TensorShape({p.channels}), &mean));
    OP_REQUIRES_OK(context, context->allocate_output(
                                2, TensorShape({p.channels}), &variance));
    const RiglRows& rows = BestRows();
    const float* from = x.flat<float>().data();
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
      mean->flat<float>()(c) = center;
      variance->flat<float>()(c) = var;
      scale[c] = gamma.flat<float>()(c) / std::sqrt(var + epsilon_);
    }
    float* to = y->flat<float>().data();
    ForPieces(context, p, [&](int64_t, int64_t first, int64_t count) {
      rows.normalise(from + first * p.channels, count, p.channels,
                     mean->flat<float>().data(), scale.data(),
                     beta.flat<float>().data(), to + first * p.channels);
    });
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

  void Compute(OpKernelContext* context) override {
    const Tensor& dy = context->input(0);
    const Tensor& dmean = context->input(1);
    const Tensor& dvariance = context->input(2);
    const Tensor& x = context->input(3);
    const Tensor& gamma = context->input(4);
    const Tensor& mean = context->input(5);
    const Tensor& variance = context->input(6);
    OP_REQUIRES_OK(context, CheckChannels(x, {&dmean, &dvariance, &gamma,
                                              &mean, &variance}));
    OP_REQUIRES(context, dy.shape() == x.shape(),
                InvalidArgument("the gradient must be of shape ",
                                x.shape().DebugString(), ". Received: ",
                                dy.shape().DebugString()));
    const Pieces p = PiecesOf(x);
    Tensor *dx, *dgamma, *dbeta;
    OP_REQUIRES_OK(context, context->allocate_output(0, x.shape(), &dx));
    OP_REQUIRES_OK(context, context->allocate_output(
                                1, TensorShape({p.channels}), &dgamma));
    OP_REQUIRES_OK(context, context->allocate_output(
                                2, TensorShape({p.channels}), &dbeta));
    const RiglRows& rows = BestRows();
    const float* from = x.flat<float>().data();
    const float* upstream = dy.flat<float>().data();
    const float* center = mean.flat<float>().data();
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
          1 / std::sqrt(double{variance.flat<float>()(c)} + epsilon_);
      const double a = gamma.flat<float>()(c) * inverse;
      const double n = p.rows;
      scale[c] = a;
      slope[c] = -a * inverse * inverse * product / n +
                 2 * dvariance.flat<float>()(c) / n;
      shift[c] = -a * sum / n + dmean.flat<float>()(c) / n;
      dgamma->flat<float>()(c) = product * inverse;
      dbeta->flat<float>()(c) = sum;
    }
    float* to = dx->flat<float>().data();
    ForPieces(context, p, [&](int64_t, int64_t first, int64_t count) {
      rows.combine(from + first * p.channels, upstream + first * p.channels,
                   count, p.channels, center, scale.data(), slope.data(),
                   shift.data(), to + first * p.channels);
    });
  }

 private:
  float epsilon_;
};

// Dropout by the numbers of tf.random.stateless_uniform.
class Dropout : public OpKernel {
 public:
  explicit Dropout(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("rate", &rate_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    const Tensor& key = context->input(1);
    const Tensor& counter = context->input(2);
    OP_REQUIRES(context,
                key.NumElements() == 1 && counter.NumElements() == 2,
                InvalidArgument("a key and two counters are needed."));
    Tensor* y = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(
                                {0}, 0, x.shape(), &y));
    const RiglRows& rows = BestRows();
    const uint64_t with =
        static_cast<uint64_t>(key.flat<tensorflow::uint64>()(0));
    const uint64_t counters[2] = {
        static_cast<uint64_t>(counter.flat<tensorflow::uint64>()(0)),
        static_cast<uint64_t>(counter.flat<tensorflow::uint64>()(1))};
    const float* from = x.flat<float>().data();
    float* to = y->flat<float>().data();
    constexpr int64_t kEach = 16'384;
    const float scale = static_cast<float>(1 / (1 - double{rate_}));
    const int64_t all = x.NumElements();
    ForEach(context, CeilDivide(all, kEach), [&](int64_t i) {
      const int64_t first = i * kEach;
      rows.dropout(from + first, std::min(kEach, all - first), first,
                   counters, with, rate_, scale, to + first);
    });
  }

 private:
  float rate_;
};

namespace shapes = tensorflow::shape_inference;

tensorflow::Status SameAsConv2D(shapes::InferenceContext* context) {
  return shapes::Conv2DShape(context);
}

REGISTER_OP("RiglKerasConv2D")
    .Input("input: float")
    .Input("filter: float")
    .Input("mask: float")
    .Output("output: float")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("dense_gradient: bool = false")
    .SetShapeFn(SameAsConv2D);

REGISTER_OP("RiglKerasConv2DBackpropInput")
    .Input("out_backprop: float")
    .Input("filter: float")
    .Input("mask: float")
    .Input("input_sizes: int32")
    .Output("output: float")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("dense_gradient: bool = false")
    .SetShapeFn([](shapes::InferenceContext* context) {
      shapes::ShapeHandle x;
      TF_RETURN_IF_ERROR(context->MakeShapeFromShapeTensor(3, &x));
      TF_RETURN_IF_ERROR(context->WithRank(x, 4, &x));
      context->set_output(0, x);
      return tensorflow::OkStatus();
    });

REGISTER_OP("RiglKerasConv2DBackpropFilter")
    .Input("input: float")
    .Input("mask: float")
    .Input("out_backprop: float")
    .Output("output: float")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .SetShapeFn([](shapes::InferenceContext* context) {
      context->set_output(0, context->input(1));
      return tensorflow::OkStatus();
    });

REGISTER_OP("RiglKerasFrozenConv2D")
    .Input("input: float")
    .Input("values: float")
    .Input("places: int32")
    .Input("scale: float")
    .Input("shift: float")
    .Input("bias: float")
    .Input("residual: float")
    .Output("output: float")
    .Attr("kernel_shape: shape")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID'}")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("pads: list(int) = [0, 0, 0, 0]")
    .Attr("relu_before: bool = false")
    .Attr("relu_after: bool = false")
    .SetShapeFn([](shapes::InferenceContext* context) {
      std::vector<int32_t> strides, dilations, pads;
      std::string padding;
      tensorflow::PartialTensorShape kernel;
      TF_RETURN_IF_ERROR(context->GetAttr("pads", &pads));
      TF_RETURN_IF_ERROR(context->GetAttr("strides", &strides));
      TF_RETURN_IF_ERROR(context->GetAttr("dilations", &dilations));
      TF_RETURN_IF_ERROR(context->GetAttr("padding", &padding));
      TF_RETURN_IF_ERROR(context->GetAttr("kernel_shape", &kernel));
      shapes::ShapeHandle x;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 4, &x));
      if (kernel.dims() != 4 || strides.size() != 4 || dilations.size() != 4 ||
          pads.size() != 4)
        return InvalidArgument("kernel_shape, strides, dilations and pads "
                               "have four numbers.");
      shapes::ShapeHandle y = x;
      for (int a = 1; a <= 2; ++a) {
        shapes::DimensionHandle length = context->UnknownDim();
        if (context->ValueKnown(context->Dim(x, a))) {
          const int64_t known = context->Value(context->Dim(x, a)) +
                                pads[2 * a - 2] + pads[2 * a - 1];
          length = context->MakeDim(OutputLength(
              known, kernel.dim_size(a - 1), strides[a], dilations[a],
              padding));
        }
        TF_RETURN_IF_ERROR(context->ReplaceDim(y, a, length, &y));
      }
      TF_RETURN_IF_ERROR(context->ReplaceDim(
          y, 3, context->MakeDim(kernel.dim_size(3)), &y));
      context->set_output(0, y);
      return tensorflow::OkStatus();
    });

REGISTER_OP("RiglKerasBatchNorm")
    .Input("x: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Output("y: float")
    .Output("mean: float")
    .Output("variance: float")
    .Attr("epsilon: float")
    .SetShapeFn([](shapes::InferenceContext* context) {
      context->set_output(0, context->input(0));
      context->set_output(1, context->input(1));
      context->set_output(2, context->input(1));
      return tensorflow::OkStatus();
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
    .SetShapeFn([](shapes::InferenceContext* context) {
      context->set_output(0, context->input(3));
      context->set_output(1, context->input(4));
      context->set_output(2, context->input(4));
      return tensorflow::OkStatus();
    });

REGISTER_OP("RiglKerasDropout")
    .Input("x: float")
    .Input("key: uint64")
    .Input("counter: uint64")
    .Output("y: float")
    .Attr("rate: float")
    .SetShapeFn(shapes::UnchangedShape);

// What sparse products are computed by, and what TensorFlow's dense ones. Its
// attribute tells who finds the operations in a process which ones they are.
REGISTER_OP("RiglKerasComputedBy")
    .Output("sparse: string")
    .Output("dense: string")
    .Attr("sources: string = '" RIGL_SOURCES "'")
    .SetShapeFn([](shapes::InferenceContext* context) {
      context->set_output(0, context->Scalar());
      context->set_output(1, context->Scalar());
      return tensorflow::OkStatus();
    });

// How often a mask was turned into a plan in this process.
REGISTER_OP("RiglKerasPlansMade")
    .Output("count: int64")
    .SetIsStateful()
    .SetShapeFn(shapes::ScalarShape);

class PlansMade : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    Tensor* count = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape(), &count));
    count->scalar<int64_t>()() = plans_made.load(std::memory_order_relaxed);
  }
};

class ComputedBy : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    const char* const names[] = {
        BestLanes().name, tensorflow::IsMKLEnabled() ? "oneDNN" : "Eigen"};
    for (int i = 0; i < 2; ++i) {
      Tensor* name = nullptr;
      OP_REQUIRES_OK(context,
                     context->allocate_output(i, TensorShape(), &name));
      name->scalar<tensorflow::tstring>()() = names[i];
    }
  }
};

template <class Kernel>
void Register(const char* name) {
  tensorflow::kernel_factory::OpKernelRegistrar(
      tensorflow::register_kernel::Name(name)
          .Device(tensorflow::DEVICE_CPU)
          .Build(),
      name, [](OpKernelConstruction* context) -> OpKernel* {
        return new Kernel(context);
      });
}

[[maybe_unused]] const bool registered = [] {
  if (!first_copy) return false;
  Register<SparseConv2D<false>>("RiglKerasConv2D");
  Register<SparseConv2D<true>>("RiglKerasConv2DBackpropInput");
  Register<SparseConv2DBackpropFilter>("RiglKerasConv2DBackpropFilter");
  Register<FrozenSparseConv2D>("RiglKerasFrozenConv2D");
  Register<BatchNorm>("RiglKerasBatchNorm");
  Register<BatchNormGrad>("RiglKerasBatchNormGrad");
  Register<Dropout>("RiglKerasDropout");
  Register<PlansMade>("RiglKerasPlansMade");
  Register<ComputedBy>("RiglKerasComputedBy");
  return true;
}();

}  // namespace
}  // namespace rigl_keras

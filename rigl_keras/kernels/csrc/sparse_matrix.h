// The weights that a mask leaves of a matrix, in the orders in which products
// read them, kept for as long as the mask.
#ifndef RIGL_KERAS_SPARSE_MATRIX_H_
#define RIGL_KERAS_SPARSE_MATRIX_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "held_tensors.h"
#include "panels.h"
#include "plans.h"
#include "runtime.h"

namespace rigl_keras {
namespace {

inline const RiglPanels& BestPanels() {
  static const RiglPanels* const best = []() -> const RiglPanels* {
    const std::string name = BestLanes().name;
#ifdef RIGL_X86
    if (name == rigl_panels_avx512.name) return &rigl_panels_avx512;
    if (name == rigl_panels_avx2.name) return &rigl_panels_avx2;
#endif
    return &rigl_panels_portable;
  }();
  return *best;
}

// The weights in the order of a product: those of a forward one, or with
// `transposed` of that by which the gradient of the input is computed.
class SortedWeights {
 public:
  // `places`: rising, in a matrix [inputs, outputs].
  SortedWeights(const std::vector<int32_t>& places, int64_t inputs,
                int64_t outputs, bool transposed)
      : from_(places.size()), inputs_(places.size()) {
    const int64_t columns = outputs;
    if (transposed) std::swap(inputs, outputs);
    const int64_t block = BlockOf(places.size(), inputs, outputs);
    const int64_t blocks = std::max<int64_t>(1, CeilDivide(inputs, block));
    rows_.assign(blocks * outputs + 1, 0);
    const auto bin_of = [&](int32_t place, int64_t* in) {
      *in = place / columns;
      int64_t out = place % columns;
      if (transposed) std::swap(*in, out);
      return *in / block * outputs + out;
    };
    int64_t in;
    for (int32_t place : places) ++rows_[bin_of(place, &in) + 1];
    for (size_t b = 1; b < rows_.size(); ++b) rows_[b] += rows_[b - 1];
    std::vector<int32_t> next(rows_.begin(), rows_.end() - 1);
    for (size_t i = 0; i < places.size(); ++i) {
      const int32_t e = next[bin_of(places[i], &in)]++;
      inputs_[e] = in;
      from_[e] = i;
    }
    view_ = {outputs, static_cast<int32_t>(blocks), rows_.data(),
             inputs_.data()};
  }
  SortedWeights(const SortedWeights&) = delete;

  const RiglWeights* view() const { return &view_; }
  // Where each weight is among all, row by row.
  const std::vector<int32_t>& from() const { return from_; }

 private:
  // How many inputs are read before the next ones: what a panel has of them
  // stays in the first cache, but sums are not read and written again for a
  // few weights alone.
  static int64_t BlockOf(int64_t weights, int64_t inputs, int64_t outputs) {
    constexpr int64_t kFloats = 10'240, kFewest = 8;
    const RiglPanels& panels = BestPanels();
    const int64_t fits = kFloats / (panels.width * panels.vectors);
    const int64_t few =
        weights ? CeilDivide(kFewest * inputs * outputs, weights) : inputs;
    const int64_t block = std::max(fits, few);
    // Of equal lengths.
    const int64_t blocks = CeilDivide(std::max<int64_t>(1, inputs), block);
    return std::max<int64_t>(1, CeilDivide(inputs, blocks));
  }

  std::vector<int32_t> from_, inputs_, rows_;
  RiglWeights view_;
};

// Positions in a matrix, rising.
using Places = std::shared_ptr<const std::vector<int32_t>>;

// Matrices that are zero but at some places. They are kept, and written to
// again where nobody else has them any more: to fill as many zeros takes longer
// than a sparse product, and there are the fewer of them. Operations share
// them, for as long as one of them lives.
class ScatteredArrays {
 public:
  static std::shared_ptr<ScatteredArrays> Shared() {
    static std::mutex mutex;
    static std::weak_ptr<ScatteredArrays> shared;
    std::lock_guard<std::mutex> lock(mutex);
    auto found = shared.lock();
    if (!found) shared = found = std::make_shared<ScatteredArrays>();
    return found;
  }

  // A tensor of a shape with weights at places, and zero elsewhere.
  tensorflow::Status Get(OpKernelContext* context, const TensorShape& shape,
                         const Places& places, const float* weights,
                         Tensor* dense) {
    Places before;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++calls_;
      for (auto at = kept_.begin(); at != kept_.end(); ++at) {
        if (at->dense.shape() != shape || !at->dense.RefCountIsOne()) continue;
        *dense = at->dense, before = at->places;
        kept_.erase(at);
        break;
      }
      // What a few steps have not used, none may ever use.
      const int64_t oldest = calls_ - 8 * int64_t(kept_.size() + 1);
      kept_.remove_if([&](const Kept& one) {
        return one.used < oldest && one.dense.RefCountIsOne();
      });
    }
    if (!before)
      TF_RETURN_IF_ERROR(
          context->allocate_temp(tensorflow::DT_FLOAT, shape, dense));
    float* to = Write(dense);
    if (!before) {
      ForPieces(context, dense->NumElements(),
                [=](int64_t begin, int64_t end) {
                  std::fill(to + begin, to + end, 0.0f);
                });
    } else if (before != places) {
      const int32_t* at = before->data();
      ForPieces(context, before->size(), [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) to[at[i]] = 0;
      });
    }
    const int32_t* at = places->data();
    ForPieces(context, places->size(), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[at[i]] = weights[i];
    });
    std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_front({*dense, places, calls_});
    if (kept_.size() > kMost) kept_.pop_back();
    return tensorflow::OkStatus();
  }

 private:
  static constexpr size_t kMost = 256;

  struct Kept {
    Tensor dense;
    Places places;
    int64_t used;
  };

  std::mutex mutex_;
  int64_t calls_ = 0;
  std::list<Kept> kept_;  // the latest first
};

// The weights that a mask leaves of a matrix [inputs, outputs].
class SparseMatrix {
 public:
  // `bits`: which of the mask's leave a weight.
  SparseMatrix(const uint8_t* mask, uint8_t bits, int64_t inputs,
               int64_t outputs)
      : inputs_(inputs), outputs_(outputs) {
    const int64_t all = inputs * outputs;
    int64_t count = 0;
    for (int64_t i = 0; i < all; ++i) count += (mask[i] & bits) != 0;
    std::vector<int32_t> places;
    places.reserve(count);
    // What was counted: somebody may write to a mask that is not theirs.
    ForMarked(mask, bits, 0, all, [&](int64_t i) {
      if (int64_t(places.size()) < count) places.push_back(i);
    });
    places_ = std::make_shared<const std::vector<int32_t>>(std::move(places));
    plans_made.fetch_add(1, std::memory_order_relaxed);
  }

  int64_t size() const { return places_->size(); }

  const SortedWeights& sorted(bool transposed) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& found = sorted_[transposed];
    if (!found)
      found = std::make_unique<SortedWeights>(*places_, inputs_, outputs_,
                                              transposed);
    return *found;
  }

  // The weights of a dense matrix, row by row.
  void Gather(OpKernelContext* context, const float* dense, float* to) const {
    const int32_t* at = places_->data();
    ForPieces(context, size(), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = dense[at[i]];
    });
  }

  // A tensor of the matrix's shape with these weights, and zero elsewhere.
  tensorflow::Status Scatter(OpKernelContext* context, const float* weights,
                             Tensor* dense) const {
    return arrays_->Get(context, TensorShape({inputs_, outputs_}), places_,
                        weights, dense);
  }

 private:
  const int64_t inputs_, outputs_;
  Places places_;
  std::mutex mutex_;
  std::unique_ptr<SortedWeights> sorted_[2];
  const std::shared_ptr<ScatteredArrays> arrays_ = ScatteredArrays::Shared();
};

// Matrices by mask, for as long as TensorFlow holds the mask. As with plans
// (plan_cache.h) a mask is known by its buffer, which is held here.
class SparseMatrices {
 public:
  // `bits`: which of the mask's leave a weight.
  std::shared_ptr<SparseMatrix> Get(const Tensor& mask,
                                    uint8_t bits = kKept) {
    if (mask.dtype() != tensorflow::DT_UINT8) bits = kKept;  // all the same
    std::lock_guard<std::mutex> lock(mutex_);
    auto at = std::find_if(kept_.begin(), kept_.end(), [&](const Kept& one) {
      return one.mask->data() == mask.data() && one.shape == mask.shape();
    });
    if (at != kept_.end()) {
      kept_.splice(kept_.begin(), kept_, at);
    } else {
      // Masks that nobody else holds will not come again.
      kept_.remove_if(
          [](const Kept& one) { return one.mask->RefCountIsOne(); });
      kept_.push_front({HeldTensors::Hold(mask), mask.shape(), {}});
      if (kept_.size() > kMostMasks) kept_.pop_back();
    }
    std::shared_ptr<SparseMatrix>& found =
        kept_.front().matrices[bits == kLookedAt];
    if (!found) {
      const MaskBytes bytes(mask);
      found = std::make_shared<SparseMatrix>(bytes.data(), BitsOf(mask, bits),
                                             mask.dim_size(0),
                                             mask.dim_size(1));
    }
    return found;
  }

 private:
  // Run eagerly, all layers of a model may share a kernel of an operation.
  static constexpr size_t kMostMasks = 256;

  struct Kept {
    HeldTensor mask;
    TensorShape shape;  // others may see its buffer in another one
    std::shared_ptr<SparseMatrix> matrices[2];  // of each of the bits
  };

  std::mutex mutex_;
  std::list<Kept> kept_;  // the latest first
};

// Weights in the order of a product.
inline tensorflow::Status Ordered(OpKernelContext* context,
                                  const SortedWeights& sorted,
                                  const float* weights, Tensor* ordered) {
  const std::vector<int32_t>& from = sorted.from();
  TF_RETURN_IF_ERROR(context->allocate_temp(
      tensorflow::DT_FLOAT, TensorShape({int64_t(from.size())}), ordered));
  float* to = Write(ordered);
  const int32_t* at = from.data();
  ForPieces(context, from.size(), [=](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) to[e] = weights[at[e]];
  });
  return tensorflow::OkStatus();
}

// Matrices must have so few entries that positions have 32 bits.
inline tensorflow::Status CheckMatrix(const Tensor& kernel,
                                      const Tensor& mask) {
  if (kernel.dims() != 2 || kernel.shape() != mask.shape())
    return InvalidArgument("kernel and mask must be matrices of one shape. "
                           "Received: ",
                           kernel.shape().DebugString(), " and ",
                           mask.shape().DebugString());
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (kernel.NumElements() > kMost || kernel.dim_size(0) > kMost ||
      kernel.dim_size(1) > kMost)
    return InvalidArgument("kernels of more than 2^31 weights");
  return tensorflow::OkStatus();
}

}  // namespace
}  // namespace rigl_keras

#endif  // RIGL_KERAS_SPARSE_MATRIX_H_

// What the operations share: the processor's instruction set, memory, threads,
// and how TensorFlow calls them.
#ifndef RIGL_KERAS_RUNTIME_H_
#define RIGL_KERAS_RUNTIME_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "lane_layers.h"
#include "lanes.h"
#include "rows.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace rigl_keras {

#ifdef __SANITIZE_THREAD__
// One for all operations: each may read what another has written.
inline std::atomic<int64_t> sanitizer_order{0};
#endif

// The rest is separate in each source, and in each copy of the library that a
// process loads (an exported model brings one): no variable is shared.
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::errors::InvalidArgument;
using tensorflow::errors::ResourceExhausted;

// Whether this is the first copy of the library in the process. A source asks
// for one of the operations that it registers, before it does: TensorFlow runs
// no operation that has two kernels.
inline bool FirstCopyOf(const char* operation) {
  return tensorflow::OpRegistry::Global()->LookUp(operation) == nullptr;
}

// The instruction set of this machine's processor. RIGL_KERAS_ISA names
// another one that it has, for tests.
inline const RiglLanes& BestLanes() {
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

inline const RiglRows& BestRows() {
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

inline const RiglLaneLayers& BestLaneLayers() {
  static const RiglLaneLayers* const best = []() -> const RiglLaneLayers* {
    const std::string name = BestLanes().name;
#ifdef RIGL_X86
    if (name == rigl_lane_layers_avx512.name) return &rigl_lane_layers_avx512;
    if (name == rigl_lane_layers_avx2.name) return &rigl_lane_layers_avx2;
#endif
    return &rigl_lane_layers_portable;
  }();
  return *best;
}

// Memory of one thread. What is small is kept for the thread's next use.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    thread_local struct Kept {
      float* begin = nullptr;
      int64_t floats = 0;
      ~Kept() { std::free(begin); }
    } kept;
    if (floats > kMostKept) {
      data = own_ = Allocated(floats);
      return;
    }
    if (kept.floats < floats) {
      std::free(kept.begin);
      kept.begin = Allocated(floats);
      kept.floats = kept.begin ? floats : 0;
    }
    data = kept.begin;
  }
  ~Scratch() { std::free(own_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data;  // aligned to 64 bytes; null: there is no memory left

 private:
  static constexpr int64_t kMostKept = 1 << 21;  // 8 MB

  static float* Allocated(int64_t floats) {
    const size_t bytes =
        std::max<size_t>(1, (floats * sizeof(float) + 63) / 64) * 64;
    return static_cast<float*>(std::aligned_alloc(64, bytes));
  }

  float* own_ = nullptr;
};

// The numbers of a tensor, wherever they begin: TensorFlow's own `flat` ends
// the process where that is no multiple of 64.
template <typename T = float>
const T* Read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data());
}
template <typename T = float>
T* Write(Tensor* tensor) {
  return static_cast<T*>(tensor->data());
}

// Of the bytes of a mask (`MaskBytes`), those that tell what a product keeps,
// and what the gradient of its kernel is computed of.
constexpr uint8_t kKept = 1, kLookedAt = 3;

// Those of a mask that have the bits: of masks that have not two of them, all.
inline uint8_t BitsOf(const Tensor& mask, uint8_t bits) {
  return mask.dtype() == tensorflow::DT_UINT8 ? bits : 0xff;
}

// A mask, a byte for each entry. Masks are bools; graphs that earlier versions
// have traced hold float ones. One of bytes is 1 where it keeps, and has 2 more
// where the gradient of the kernel is wanted as well.
class MaskBytes {
 public:
  explicit MaskBytes(const Tensor& mask) {
    if (mask.dtype() != tensorflow::DT_FLOAT) {
      data_ = Read<uint8_t>(mask);
      return;
    }
    const float* floats = Read(mask);
    converted_.resize(mask.NumElements());
    for (size_t i = 0; i < converted_.size(); ++i)
      converted_[i] = floats[i] > 0;
    data_ = converted_.data();
  }
  MaskBytes(const MaskBytes&) = delete;
  MaskBytes& operator=(const MaskBytes&) = delete;

  const uint8_t* data() const { return data_; }

 private:
  const uint8_t* data_;
  std::vector<uint8_t> converted_;
};

// Calls take(i) for each of the bytes [begin, end) that has some of the bits.
template <typename Take>
void ForMarked(const uint8_t* bytes, uint8_t bits, int64_t begin, int64_t end,
               const Take& take) {
  while (begin < end) {
    const int64_t last = std::min<int64_t>(begin + 8, end);
    uint64_t eight = 1;  // of which most are 0 where a mask keeps little
    if (last - begin == 8) std::memcpy(&eight, bytes + begin, 8);
    if (!eight) begin = last;
    for (; begin < last; ++begin)
      if (bytes[begin] & bits) take(begin);
  }
}

inline int Threads(OpKernelContext* context) {
  return context->device()->tensorflow_cpu_worker_threads()->num_threads;
}

// Orders what operations do for the thread sanitizer, which does not see how
// TensorFlow's threads wait for one another.
inline void InOrder() {
#ifdef __SANITIZE_THREAD__
  sanitizer_order.fetch_add(1, std::memory_order_acq_rel);
#endif
}

// Calls a function for each of [0, count), on TensorFlow's own threads; for
// `block` of them in a row by the same one.
inline void ForEach(OpKernelContext* context, int64_t count,
                    const std::function<void(int64_t)>& run,
                    int64_t block = 1) {
  // Made here, and not in the call below: before `InOrder`.
  const std::function<void(int64_t, int64_t)> run_all = [&run](int64_t begin,
                                                               int64_t end) {
    InOrder();
    for (int64_t i = begin; i < end; ++i) run(i);
    InOrder();
  };
  if (count <= block) return run_all(0, count);
  InOrder();
  context->device()->tensorflow_cpu_worker_threads()->workers->ParallelFor(
      count,
      tensorflow::thread::ThreadPool::SchedulingParams(
          tensorflow::thread::ThreadPool::SchedulingStrategy::kFixedBlockSize,
          std::nullopt, block),
      run_all);
  InOrder();
}

// Calls run(begin, end) for pieces of [0, size).
template <typename Run>
void ForPieces(OpKernelContext* context, int64_t size, const Run& run) {
  constexpr int64_t kPiece = 1 << 15;
  ForEach(context, (size + kPiece - 1) / kPiece, [&](int64_t i) {
    run(i * kPiece, std::min(size, (i + 1) * kPiece));
  });
}

// What TensorFlow calls: it fails where there is no memory, and the process
// goes on. It is destroyed after all calls.
template <class Kernel>
class Guarded final : public Kernel {
 public:
  explicit Guarded(OpKernelConstruction* context) : Kernel(context) {}
  ~Guarded() override { InOrder(); }

  void Compute(OpKernelContext* context) override {
    InOrder();
    try {
      context->SetStatus(Kernel::Run(context));
    } catch (const std::exception& error) {  // of vectors
      context->SetStatus(ResourceExhausted(
          "there is not enough memory (", error.what(), ")"));
    }
    InOrder();
  }
};

template <class Kernel>
void Register(const char* name) {
  tensorflow::kernel_factory::OpKernelRegistrar(
      tensorflow::register_kernel::Name(name)
          .Device(tensorflow::DEVICE_CPU)
          .Build(),
      name, [](OpKernelConstruction* context) -> OpKernel* {
        return new Guarded<Kernel>(context);
      });
}

}  // namespace
}  // namespace rigl_keras

#endif  // RIGL_KERAS_RUNTIME_H_

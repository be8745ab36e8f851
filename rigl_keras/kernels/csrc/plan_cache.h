// The plans of an operation's masks, kept for as long as the masks.
#ifndef RIGL_KERAS_PLAN_CACHE_H_
#define RIGL_KERAS_PLAN_CACHE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "held_tensors.h"
#include "plans.h"
#include "runtime.h"

namespace rigl_keras {
namespace {

// Plans by mask, for as long as TensorFlow holds the mask.
//
// A mask is known by its buffer. TensorFlow never writes to a buffer that
// somebody else holds, and these hold theirs, so that a mask that has been
// assigned lies in another one.
class Plans {
 public:
  struct Made {
    Convolution conv;
    std::vector<OwnedPlan> parts;  // whose results are added
    bool whole;                    // they write all of the output
  };

  // Finds what was made, or makes it: `make(known, Made*)` fills in the rest,
  // or says why it cannot; known(key) is an order that there is, or null.
  template <typename Make>
  tensorflow::Status Get(const Tensor& mask, const Convolution& conv,
                         const Make& make,
                         std::shared_ptr<const Made>* got) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (Kept* kept = Find(mask)) {
        auto& made = kept->made;
        for (auto at = made.begin(); at != made.end(); ++at) {
          if (!Same((*at)->conv, conv)) continue;
          made.splice(made.begin(), made, at);
          *got = made.front();
          return tensorflow::OkStatus();
        }
      }
    }
    auto fresh = std::make_shared<Made>();
    fresh->conv = conv;
    const auto known = [&](const std::vector<int64_t>& key) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (const Kept* kept = Find(mask))
        for (const auto& made : kept->made)
          for (const OwnedPlan& part : made->parts)
            if (part.order->key == key) return part.order;
      return std::shared_ptr<const Order>();
    };
    TF_RETURN_IF_ERROR(make(known, fresh.get()));
    plans_made.fetch_add(1, std::memory_order_relaxed);
    *got = fresh;
    std::lock_guard<std::mutex> lock(mutex_);
    // Masks that nobody else holds will not come again.
    kept_.remove_if([](const Kept& one) { return one.mask->RefCountIsOne(); });
    Kept* kept = Find(mask);
    if (!kept) {
      kept_.push_front({HeldTensors::Hold(mask), {}});
      kept = &kept_.front();
    }
    if (kept_.size() > kMostMasks) kept_.pop_back();
    kept->made.push_front(std::move(fresh));
    // The plans of a mask take no more than three dense kernels do.
    const int64_t kernel =
        conv.weights() * conv.kernel[0] * conv.kernel[1] * sizeof(float);
    const int64_t most = std::max<int64_t>(1 << 20, 3 * kernel);
    while (kept->made.size() > 1 && Bytes(kept->made) > most)
      kept->made.pop_back();
    return tensorflow::OkStatus();
  }

 private:
  // Run eagerly, all layers of a model may share a kernel of an operation.
  static constexpr size_t kMostMasks = 256;

  using List = std::list<std::shared_ptr<const Made>>;

  struct Kept {
    HeldTensor mask;
    List made;  // the latest first
  };

  // With the lock held. What is found is the first from then on.
  Kept* Find(const Tensor& mask) {
    for (auto at = kept_.begin(); at != kept_.end(); ++at) {
      if (!Same(*at->mask, mask)) continue;
      kept_.splice(kept_.begin(), kept_, at);
      return &kept_.front();
    }
    return nullptr;
  }

  static int64_t Bytes(const List& list) {
    int64_t bytes = 0;
    std::vector<const Order*> seen;
    for (const auto& made : list) {
      bytes += sizeof(Made) + 256;
      for (const OwnedPlan& part : made->parts) {
        bytes += sizeof(OwnedPlan) + 8 * (part.in_rows.size() +
                                          part.out_rows.size());
        const Order* order = part.order.get();
        if (std::find(seen.begin(), seen.end(), order) != seen.end()) continue;
        seen.push_back(order);
        bytes += order->bytes();
      }
    }
    return bytes;
  }

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
  std::list<Kept> kept_;
};

}  // namespace
}  // namespace rigl_keras

#endif  // RIGL_KERAS_PLAN_CACHE_H_

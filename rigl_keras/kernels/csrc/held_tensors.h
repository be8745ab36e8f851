// The process's one reference to each tensor that operations remember.
#ifndef RIGL_KERAS_HELD_TENSORS_H_
#define RIGL_KERAS_HELD_TENSORS_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "tensorflow/core/framework/tensor.h"

namespace rigl_keras {

// A tensor that is held. All who hold its buffer share one reference, so that
// `RefCountIsOne` says whether nobody else has it: it will not come again.
using HeldTensor = std::shared_ptr<const tensorflow::Tensor>;

// What is held, by buffer. Not in an unnamed namespace: the sources of a
// library share it.
class HeldTensors {
 public:
  static HeldTensor Hold(const tensorflow::Tensor& tensor) {
    return Instance().Found(tensor);
  }

 private:
  // Never destroyed: operations may outlive what is static.
  static HeldTensors& Instance() {
    static HeldTensors* const held = new HeldTensors;
    return *held;
  }

  HeldTensor Found(const tensorflow::Tensor& tensor) {
    const Key key{tensor.tensor_data().data(), tensor.tensor_data().size()};
    std::lock_guard<std::mutex> lock(mutex_);
    std::weak_ptr<const tensorflow::Tensor>& known = held_[key];
    if (HeldTensor found = known.lock()) return found;
    HeldTensor fresh(new tensorflow::Tensor(tensor),
                     [this, key](const tensorflow::Tensor* last) {
                       Forget(key);
                       delete last;  // from here on the buffer may be another's
                     });
    known = fresh;
    return fresh;
  }

  struct Key {
    const char* data;
    std::size_t size;

    bool operator==(const Key& other) const {
      return data == other.data && size == other.size;
    }
  };

  struct Hash {
    std::size_t operator()(const Key& key) const {
      return std::hash<const char*>()(key.data) ^ key.size;
    }
  };

  // Unless it is held again since.
  void Forget(const Key& key) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto at = held_.find(key);
    if (at != held_.end() && at->second.expired()) held_.erase(at);
  }

  std::mutex mutex_;
  std::unordered_map<Key, std::weak_ptr<const tensorflow::Tensor>, Hash> held_;
};

}  // namespace rigl_keras

#endif  // RIGL_KERAS_HELD_TENSORS_H_

// The functions of rigl_network.h.

#include "rigl_network.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model.h"

using rigl_serving::Error;
using rigl_serving::Model;
using rigl_serving::Shape;

struct rigl_network {
  rigl_network(const void* bytes, size_t size, int threads)
      : model(bytes, size, threads) {}

  Model model;
  std::string hints, profile;
};

namespace {

std::unique_ptr<rigl_network> Loaded(const void* bytes, size_t size,
                                     int threads) {
  if (threads < 0 || threads > 1024)
    throw Error("threads must be 0 to 1024. Received: " +
                std::to_string(threads));
  return std::make_unique<rigl_network>(bytes, size, threads);
}

// A file that is open, for as long as this lives.
class File {
 public:
  explicit File(const char* path)
      : path_(path), number_(open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (number_ < 0) Fail();
  }
  ~File() { close(number_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Returns the file's network. It is read and not mapped: whoever reads a
  // mapped file that somebody cuts short is ended by a signal.
  std::unique_ptr<rigl_network> Load(int threads) const {
    struct stat about;
    if (fstat(number_, &about) != 0) Fail();
    if (!S_ISREG(about.st_mode))
      throw Error(std::string("'") + path_ + "' is not a regular file");
    const size_t size = static_cast<size_t>(about.st_size);
    // What is no network gets no memory, however large it is.
    char header[rigl_serving::kHeader] = {};
    ReadInto(header, std::min(size, sizeof header));
    rigl_serving::ReadHeader(header, size);
    const std::unique_ptr<char[]> bytes(new char[size]);  // not filled first
    std::memcpy(bytes.get(), header, sizeof header);
    ReadInto(bytes.get() + sizeof header, size - sizeof header);
    return Loaded(bytes.get(), size, threads);
  }

 private:
  void ReadInto(char* to, size_t size) const {
    while (size > 0) {
      const ssize_t count = read(number_, to, size);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) Fail();
      if (count == 0)
        throw Error(std::string("'") + path_ +
                    "' has become shorter while it was read");
      to += count;
      size -= static_cast<size_t>(count);
    }
  }

  [[noreturn]] void Fail() const {
    throw Error(std::string("'") + path_ +
                "' cannot be read: " + std::strerror(errno));
  }

  const char* const path_;
  const int number_;
};

void Say(const char* what, char* error, size_t error_size) {
  if (error && error_size) std::snprintf(error, error_size, "%s", what);
}

// Runs something, and turns what it throws into text. True: it did not throw.
template <typename Run>
bool Guarded(char* error, size_t error_size, const Run& run) {
  try {
    run();
    return true;
  } catch (const Error& e) {
    Say(e.what(), error, error_size);
  } catch (const std::bad_alloc&) {
    Say("there is not enough memory", error, error_size);
  } catch (const std::exception& e) {
    Say(e.what(), error, error_size);
  }
  return false;
}

constexpr double kMostSeconds = 1e6;  // of measuring

template <typename Network>  // const or not
auto& ModelOf(Network* network) {
  if (!network) throw Error("the network is missing");
  return network->model;
}

// Arrays that nothing is read from or written to may be missing.
template <typename Pointer>
void CheckArrays(Pointer const* arrays, size_t count, int64_t batch,
                 const char* what) {
  if (batch == 0) return;
  if (!arrays) throw Error(std::string("the ") + what + " are missing");
  for (size_t i = 0; i < count; ++i)
    if (!arrays[i])
      throw Error(std::string("one of the ") + what + " is missing");
}

// The shapes of a call, without the batch, and the batch.
struct Call {
  std::vector<Shape> shapes;
  int64_t batch = 0;

  Call(const Model& model, const int64_t* given) {
    if (!given) throw Error("the shapes of the inputs are missing");
    for (size_t i = 0; i < model.inputs().size(); ++i) {
      const rigl_serving::Node& node =
          model.network().nodes[model.inputs()[i]];
      const int64_t first = *given++;
      if (i == 0) batch = first;
      if (first != batch || first < 0)
        throw Error("all inputs must have one batch size, 0 or more. "
                    "Received: " + std::to_string(batch) + " and " +
                    std::to_string(first));
      Shape shape;
      for (int64_t want : node.shape) {
        const int64_t length = *given++;
        if (length < 1 || (want >= 0 && length != want))
          throw Error("axis " + std::to_string(shape.size() + 1) +
                      " of input '" + node.name + "' must be " +
                      (want >= 0 ? std::to_string(want) : "1 or more") +
                      ". Received: " + std::to_string(length));
        shape.push_back(length);
      }
      shapes.push_back(std::move(shape));
    }
    if (batch > INT32_MAX)
      throw Error("the batch is too large: " + std::to_string(batch));
  }
};

rigl_network_value Value(const std::string& name, const Shape& shape) {
  rigl_network_value value{};
  value.name = name.c_str();
  value.axes = static_cast<int>(shape.size()) + 1;
  value.shape[0] = -1;
  for (size_t i = 0; i < shape.size() && i + 1 < RIGL_NETWORK_MOST_AXES; ++i)
    value.shape[i + 1] = shape[i];
  return value;
}

}  // namespace

extern "C" {

rigl_network* rigl_network_load(const char* path, int threads, char* error,
                                size_t error_size) {
  rigl_network* network = nullptr;
  Guarded(error, error_size, [&] {
    if (!path) throw Error("the path is missing");
    network = File(path).Load(threads).release();
  });
  return network;
}

rigl_network* rigl_network_load_memory(const void* bytes, size_t size,
                                       int threads, char* error,
                                       size_t error_size) {
  rigl_network* network = nullptr;
  Guarded(error, error_size, [&] {
    if (!bytes) throw Error("the bytes are missing");
    network = Loaded(bytes, size, threads).release();
  });
  return network;
}

void rigl_network_free(rigl_network* network) { delete network; }

int rigl_network_input_count(const rigl_network* network) {
  if (!network) return 0;
  return static_cast<int>(network->model.inputs().size());
}

int rigl_network_output_count(const rigl_network* network) {
  if (!network) return 0;
  return static_cast<int>(network->model.network().outputs.size());
}

rigl_network_value rigl_network_input(const rigl_network* network, int i) {
  if (i < 0 || i >= rigl_network_input_count(network)) return {};
  const rigl_serving::Node& node =
      network->model.network().nodes[network->model.inputs()[i]];
  return Value(node.name, node.shape);
}

rigl_network_value rigl_network_output(const rigl_network* network, int i) {
  if (i < 0 || i >= rigl_network_output_count(network)) return {};
  rigl_network_value value{};
  Guarded(nullptr, 0, [&] {
    value = Value(network->model.network().outputs[i].name,
                  network->model.OutputShape(i));
  });
  return value;
}

int rigl_network_output_shapes(const rigl_network* network,
                               const int64_t* input_shapes,
                               int64_t* output_shapes, char* error,
                               size_t error_size) {
  return !Guarded(error, error_size, [&] {
    const auto& model = ModelOf(network);
    const Call call(model, input_shapes);
    if (!output_shapes) throw Error("the place for shapes is missing");
    for (const Shape& shape : model.OutputShapes(call.shapes)) {
      *output_shapes++ = call.batch;
      for (int64_t length : shape) *output_shapes++ = length;
    }
  });
}

int rigl_network_run(rigl_network* network, const float* const* inputs,
                     const int64_t* input_shapes, float* const* outputs,
                     char* error, size_t error_size) {
  return !Guarded(error, error_size, [&] {
    auto& model = ModelOf(network);
    const Call call(model, input_shapes);
    CheckArrays(inputs, model.inputs().size(), call.batch, "inputs");
    CheckArrays(outputs, model.network().outputs.size(), call.batch,
                "outputs");
    model.Run(inputs, call.shapes, call.batch, outputs);
  });
}

int rigl_network_tune(rigl_network* network, const int64_t* input_shapes,
                      double seconds, char* error, size_t error_size) {
  return !Guarded(error, error_size, [&] {
    auto& model = ModelOf(network);
    const Call call(model, input_shapes);
    if (call.batch < 1) throw Error("a batch of one or more is needed");
    if (!(seconds >= 0 && seconds <= kMostSeconds))  // not a NaN
      throw Error("seconds must be from 0 to a million. Received: " +
                  std::to_string(seconds));
    model.Tune(call.shapes, call.batch, seconds);
  });
}

const char* rigl_network_hints(rigl_network* network) {
  if (!network) return "";
  Guarded(nullptr, 0, [&] { network->hints = network->model.Hints(); });
  return network->hints.c_str();
}

const char* rigl_network_profile(rigl_network* network,
                                 const int64_t* input_shapes, char* error,
                                 size_t error_size) {
  const bool done = Guarded(error, error_size, [&] {
    auto& model = ModelOf(network);
    const Call call(model, input_shapes);
    network->profile = model.Profile(call.shapes, call.batch);
  });
  return done ? network->profile.c_str() : nullptr;
}

const char* rigl_network_instruction_set(void) {
  return rigl_serving::TilesOf(0)->name;
}

}  // extern "C"

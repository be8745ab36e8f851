// The functions of rigl_network.h.

#include "rigl_network.h"

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
#include <sys/mman.h>
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

// What a file holds, for as long as this lives.
class Mapped {
 public:
  explicit Mapped(const char* path) {
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) Fail(path);
    struct stat about;
    if (fstat(file, &about) != 0) {
      close(file);
      Fail(path);
    }
    if (!S_ISREG(about.st_mode)) {
      close(file);
      throw Error(std::string("'") + path + "' is no file");
    }
    size_ = static_cast<size_t>(about.st_size);
    if (size_ > 0)
      bytes_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (bytes_ == MAP_FAILED) Fail(path);
  }
  ~Mapped() {
    if (bytes_) munmap(bytes_, size_);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  const void* bytes() const { return bytes_; }
  size_t size() const { return size_; }

 private:
  [[noreturn]] static void Fail(const char* path) {
    throw Error(std::string("'") + path +
                "' cannot be read: " + std::strerror(errno));
  }

  void* bytes_ = nullptr;
  size_t size_ = 0;
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

rigl_network* Loaded(const void* bytes, size_t size, int threads) {
  if (threads < 0 || threads > 1024)
    throw Error("threads must be 0 to 1024. Received: " +
                std::to_string(threads));
  return new rigl_network(bytes, size, threads);
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
    const Mapped file(path);
    network = Loaded(file.bytes(), file.size(), threads);
  });
  return network;
}

rigl_network* rigl_network_load_memory(const void* bytes, size_t size,
                                       int threads, char* error,
                                       size_t error_size) {
  rigl_network* network = nullptr;
  Guarded(error, error_size, [&] {
    if (!bytes) throw Error("the bytes are missing");
    network = Loaded(bytes, size, threads);
  });
  return network;
}

void rigl_network_free(rigl_network* network) { delete network; }

int rigl_network_input_count(const rigl_network* network) {
  return static_cast<int>(network->model.inputs().size());
}

int rigl_network_output_count(const rigl_network* network) {
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
    const Call call(network->model, input_shapes);
    for (const Shape& shape : network->model.OutputShapes(call.shapes)) {
      *output_shapes++ = call.batch;
      for (int64_t length : shape) *output_shapes++ = length;
    }
  });
}

int rigl_network_run(rigl_network* network, const float* const* inputs,
                     const int64_t* input_shapes, float* const* outputs,
                     char* error, size_t error_size) {
  return !Guarded(error, error_size, [&] {
    const Call call(network->model, input_shapes);
    network->model.Run(inputs, call.shapes, call.batch, outputs);
  });
}

int rigl_network_tune(rigl_network* network, const int64_t* input_shapes,
                      double seconds, char* error, size_t error_size) {
  return !Guarded(error, error_size, [&] {
    const Call call(network->model, input_shapes);
    if (call.batch < 1) throw Error("a batch of one or more is needed");
    network->model.Tune(call.shapes, call.batch, seconds);
  });
}

const char* rigl_network_hints(rigl_network* network) {
  Guarded(nullptr, 0, [&] { network->hints = network->model.Hints(); });
  return network->hints.c_str();
}

const char* rigl_network_profile(rigl_network* network,
                                 const int64_t* input_shapes, char* error,
                                 size_t error_size) {
  const bool done = Guarded(error, error_size, [&] {
    const Call call(network->model, input_shapes);
    network->profile = network->model.Profile(call.shapes, call.batch);
  });
  return done ? network->profile.c_str() : nullptr;
}

const char* rigl_network_instruction_set(void) {
  return rigl_serving::TilesOf(0)->name;
}

}  // extern "C"

// Changes the file of a network at random, thousands of times, and runs it if it
// is still valid. It is compiled with a sanitizer, which aborts at wrong uses of
// memory, threads or numbers.
//
//   network_fuzz BODY TURNS

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

#include "bytes.h"
#include "model.h"

using namespace rigl_serving;

namespace {

constexpr int kSecondsOfATurn = 120;  // then it hangs
constexpr double kMost = 1 << 20;     // most numbers and products of a run

std::mt19937 random_bits(0);

uint32_t Below(uint32_t end) { return random_bits() % end; }

template <typename Number>
void Append(std::string* to, Number number) {
  to->append(reinterpret_cast<const char*>(&number), sizeof number);
}

std::string FileOf(const std::string& body) {
  std::string file = "RIGLNET\n";
  Append(&file, uint32_t{2});
  Append(&file, uint32_t{0});
  Append(&file, uint64_t{body.size()});
  Append(&file,
         Checksum(reinterpret_cast<const uint8_t*>(body.data()), body.size()));
  Append(&file, uint32_t{0});
  return file + body;
}

std::string Broken(std::string body) {
  static const uint32_t numbers[] = {
      0,       1,       2,         3,          5,          16,        255,
      1 << 10, 1 << 20, 1u << 30, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF};
  for (uint32_t changes = Below(3) + 1; changes > 0 && !body.empty();
       --changes) {
    size_t at = Below(body.size());
    switch (Below(7)) {
      case 0:
        body[at] ^= 1 << Below(8);
        break;
      case 1:
        body[at] = static_cast<char>(Below(256));
        break;
      case 2:
      case 3: {  // a field
        at = std::min(at, body.size() - std::min<size_t>(4, body.size()));
        const uint32_t number = numbers[Below(std::size(numbers))];
        std::memcpy(&body[at], &number, std::min<size_t>(4, body.size()));
        break;
      }
      case 4:
        body.erase(at, Below(40) + 1);
        break;
      case 5:
        body.insert(at, std::string(Below(8) + 1, static_cast<char>(Below(4))));
        break;
      default:
        // A number in the text of the hints, at the end.
        for (size_t i = 0; i < 50 && at < body.size(); ++i, ++at)
          if (body[at] >= '0' && body[at] <= '9') {
            body[at] = static_cast<char>('0' + Below(10));
            break;
          }
    }
  }
  return body;
}

double SizeOf(const Shape& shape) {
  double size = 1;
  for (int64_t length : shape) size *= static_cast<double>(length);
  return size;
}

// The numbers that a run stores and the products that it computes.
double WorkOf(const Network& network, const std::vector<Shape>& shapes) {
  double work = 0;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Node& node = network.nodes[i];
    work += SizeOf(shapes[i]);
    if (node.operation == Operation::kRecurrent)
      work += static_cast<double>(node.kernel.values.size()) *
              shapes[node.inputs[0]][0];
    if (node.operation != Operation::kConvolution &&
        node.operation != Operation::kPool)
      continue;
    const bool pool = node.operation == Operation::kPool;
    Shape padded = shapes[node.inputs[0]];
    double window = 1;
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t size = pool ? node.size[axis] : node.kernel.shape[axis];
      padded[axis] += (size - 1) * node.dilations[axis] + node.padding.top +
                      node.padding.bottom + node.padding.left +
                      node.padding.right;
      window *= static_cast<double>(size);
    }
    work += SizeOf(padded) + SizeOf(shapes[i]) * window;
  }
  return work;
}

struct Memory {
  std::vector<std::vector<float>> arrays;
  std::vector<float*> places;

  Memory(const std::vector<Shape>& shapes, int64_t batch) {
    for (const Shape& shape : shapes)
      arrays.emplace_back(static_cast<size_t>(SizeOf(shape) * batch), 0.5f);
    for (std::vector<float>& array : arrays) places.push_back(array.data());
  }
};

void Run(Model* model, const std::vector<Shape>& shapes, int64_t batch) {
  const Memory in(shapes, batch);
  const Memory out(model->OutputShapes(shapes), batch);
  model->Run(in.places.data(), shapes, batch, out.places.data());
}

std::vector<Shape> InputsOf(const Network& network) {
  std::vector<Shape> shapes;
  for (const Node& node : network.nodes) {
    if (node.operation != Operation::kInput) continue;
    shapes.push_back(node.shape);
    for (int64_t& length : shapes.back())
      if (length < 0) length = 1 + Below(9);
  }
  return shapes;
}

// Returns 0 for an invalid file, 1 for one that is too large to run, else 2.
int Turn(const std::string& body) {
  // On the heap with this length, so that the sanitizer sees reads beyond it.
  const std::string text = FileOf(body);
  const std::vector<char> file(text.begin(), text.end());
  int reached = 0;
  try {
    Model model(file.data(), file.size(), 1 + Below(3));
    reached = 1;
    const std::vector<Shape> shapes = InputsOf(model.network());
    if (WorkOf(model.network(), Shapes(model.network(), shapes)) > kMost)
      return reached;
    static const int64_t batches[] = {1, 2, 5, 17};
    Run(&model, shapes, batches[Below(4)]);
    reached = 2;
  } catch (const Error& error) {
    if (std::strchr(error.what(), '\n')) std::abort();
  }
  return reached;
}

// Calls one network from several threads, with several batch sizes.
void Together(const std::string& body) {
  const std::string file = FileOf(body);
  Model model(file.data(), file.size(), 3);
  std::vector<Shape> shapes = InputsOf(model.network());
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&, caller] {
      for (int64_t batch : {1, 3, 17, 1, 40}) Run(&model, shapes, batch + caller);
    });
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::ifstream stream(argv[1], std::ios::binary);
  std::string body((std::istreambuf_iterator<char>(stream)), {});
  // Replaces the hints, which come last, by those of this machine.
  {
    const std::string file = FileOf(body);
    Model model(file.data(), file.size(), 2);
    const std::vector<Shape> shapes = InputsOf(model.network());
    model.Tune(shapes, 1, 0.5);
    model.Tune(shapes, 17, 0.5);
    const std::string hints = model.Hints();
    if (hints.empty()) return 3;
    body.resize(body.size() - 4 - model.network().hints.size());
    Append(&body, static_cast<uint32_t>(hints.size()));
    body += hints;
  }
  if (Turn(body) != 2) return 4;
  for (int i = 0; i < 20; ++i) Together(body);
  int reached[3] = {0, 0, 0};
  for (int turn = std::atoi(argv[2]); turn > 0; --turn) {
    alarm(kSecondsOfATurn);
    ++reached[Turn(Broken(body))];
  }
  std::printf("%d refused, %d too large, %d run\n", reached[0], reached[1],
              reached[2]);
  return 0;
}

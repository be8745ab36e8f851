// From the bytes of a file to a network. Nothing in a file is believed: what
// it announces is compared with the bytes that are left before memory is made
// for it, so that a file takes memory and time in proportion to its own size.
#include "network.h"

#include <algorithm>
#include <string>
#include <unordered_set>

#include "bytes.h"

namespace rigl_serving {

namespace {

constexpr char kMagic[8] = {'R', 'I', 'G', 'L', 'N', 'E', 'T', '\n'};
// Version 1 had no recurrent nodes. A file without them still is of it.
constexpr uint32_t kVersion = 2;

constexpr uint32_t kMostNodes = 1 << 16;
constexpr uint32_t kMostAxes = 8;  // the batch is one of a value's
// Rows and columns that are stepped over, padded or repeated.
constexpr int32_t kMostPixels = 1 << 20;
// Channels and filters. A kernel without weights takes no bytes in a file, and
// a plan has memory for each of its filters.
constexpr int64_t kMostChannels = 1 << 24;
constexpr int64_t kMostNumbers = (int64_t{1} << 31) - 1;

bool ReadFlag(Bytes& bytes, const char* what) {
  const uint32_t flag = bytes.Read<uint32_t>(what);
  if (flag > 1)
    throw Error(std::string(what) + " is 0 or 1, and not " +
                std::to_string(flag));
  return flag;
}

// A name ends at its first NUL where C reads it: it must have none.
std::string ReadName(Bytes& bytes, const char* what) {
  std::string name = bytes.ReadString(what);
  if (name.find('\0') != std::string::npos)
    throw Error(std::string(what) + " has a NUL in it");
  return name;
}

void ReadPair(Bytes& bytes, const char* what, int32_t* pair) {
  for (int i = 0; i < 2; ++i) {
    pair[i] = bytes.Read<int32_t>(what);
    if (pair[i] < 1 || pair[i] > kMostPixels)
      throw Error("each of its " + std::string(what) + " is 1 to " +
                  std::to_string(kMostPixels) + ", and not " +
                  std::to_string(pair[i]));
  }
}

Padding ReadPadding(Bytes& bytes, bool crops) {
  Padding padding;
  padding.same = ReadFlag(bytes, "whether its padding is `same`");
  const int32_t least = crops ? -kMostPixels : 0;
  for (int32_t* side :
       {&padding.top, &padding.bottom, &padding.left, &padding.right}) {
    *side = bytes.Read<int32_t>("its padding");
    if (*side < least || *side > kMostPixels)
      throw Error("its padding is " + std::to_string(least) + " to " +
                  std::to_string(kMostPixels) + ", and not " +
                  std::to_string(*side));
    if (padding.same && (*side != 0 || crops))
      throw Error(crops ? "what pads alone cannot pad as `same`"
                        : "its padding is `same` and has a width as well");
  }
  return padding;
}

// Without the batch; -1 is free.
std::vector<int64_t> ReadShape(Bytes& bytes, bool one_free) {
  const uint32_t axes = bytes.Read<uint32_t>("its shape");
  if (axes > kMostAxes - 1)
    throw Error("its shape has " + std::to_string(axes) +
                " axes beside the batch, and at most " +
                std::to_string(kMostAxes - 1) + " are possible");
  std::vector<int64_t> shape;
  int free = 0;
  for (uint32_t i = 0; i < axes; ++i) {
    shape.push_back(bytes.Read<int32_t>("its shape"));
    free += shape[i] == -1;
    if (shape[i] < 1 && shape[i] != -1)
      throw Error("its shape has a length of " + std::to_string(shape[i]) +
                  ": lengths are at least 1, or -1 where they are free");
  }
  if (one_free && free > 1)
    throw Error("its shape " + TextOf(shape) +
                " has more than one free length");
  return shape;
}

int64_t ReadArrayShape(Bytes& bytes, const char* what, Array& array) {
  const uint32_t axes = bytes.Read<uint32_t>(what);
  if (axes < 1 || axes > kMostAxes)
    throw Error(std::string(what) + " has 1 to " + std::to_string(kMostAxes) +
                " axes, and not " + std::to_string(axes));
  int64_t size = 1;
  for (uint32_t i = 0; i < axes; ++i) {
    // Divided, because a product could overflow.
    const int64_t length = bytes.Read<uint32_t>(what);
    if (length > kMostNumbers / std::max<int64_t>(size, 1))
      throw Error(std::string(what) + " would have more than 2^31 - 1 numbers");
    size *= length;
    array.shape.push_back(length);
  }
  if (size == 0 && axes > 1)
    throw Error(std::string(what) + " has a length of 0: " +
                TextOf(array.shape));
  return size;
}

// The places of the bits that are one.
void ReadBitmask(const uint8_t* mask, int64_t size,
                 std::vector<int64_t>& places) {
  const int64_t bytes = (size + 7) / 8;
  for (int64_t i = 0; i < bytes; ++i)
    for (uint32_t rest = mask[i]; rest != 0;) {
      const int first = __builtin_clz(rest) - 24;  // the highest bit is first
      places.push_back(8 * i + first);
      rest &= ~(0x80u >> first);
    }
}

int64_t CountOnes(const uint8_t* mask, int64_t bytes) {
  int64_t ones = 0;
  for (int64_t i = 0; i < bytes; ++i) ones += __builtin_popcount(mask[i]);
  return ones;
}

Array ReadArray(Bytes& bytes, const char* what) {
  Array array;
  const uint32_t encoding = bytes.Read<uint32_t>(what);
  if (encoding > 2)
    throw Error(std::string(what) + " is encoded as " +
                std::to_string(encoding) +
                ", and only 0, 1 and 2 are known: dense, bitmask and gaps");
  const int64_t size = ReadArrayShape(bytes, what, array);
  const uint32_t count = bytes.Read<uint32_t>(what);
  const uint8_t* values = bytes.Take(count, sizeof(float), what);
  if (encoding == 0) {
    if (count != size)
      throw Error(std::string(what) + " has " + std::to_string(count) +
                  " numbers where its shape is " + TextOf(array.shape));
    array.values.resize(count);
    if (count > 0)
      std::memcpy(array.values.data(), values, count * sizeof(float));
    return array;
  }
  array.sparse = true;
  if (encoding == 1) {
    const int64_t mask_bytes = (size + 7) / 8;
    const uint8_t* mask = bytes.Take(mask_bytes, 1, what);
    const int64_t ones = CountOnes(mask, mask_bytes);
    if (ones != count)
      throw Error(std::string(what) + " has " + std::to_string(count) +
                  " numbers, and its mask " + std::to_string(ones) + " ones");
    array.places.reserve(count);
    ReadBitmask(mask, size, array.places);
  } else {
    const uint8_t* gaps = bytes.Take(count, 1, what);
    array.places.reserve(count);
    int64_t place = 0;
    for (uint32_t i = 0; i < count; ++i) {
      if (i > 0 && gaps[i] == 0)
        throw Error(std::string(what) + " has two numbers in one place");
      place += gaps[i];
      array.places.push_back(place);
    }
  }
  if (count > 0 && array.places.back() >= size)
    throw Error(std::string(what) + " has a number at place " +
                std::to_string(array.places.back()) + ", and " +
                std::to_string(size) + " places");
  // Without those that bridge gaps.
  array.values.resize(count);
  size_t kept = 0;
  for (uint32_t i = 0; i < count; ++i) {
    float value;
    std::memcpy(&value, values + i * sizeof(float), sizeof(float));
    if (value == 0) continue;
    array.values[kept] = value;
    array.places[kept++] = array.places[i];
  }
  array.values.resize(kept);
  array.places.resize(kept);
  return array;
}

// One number for each channel, or fewer.
Array ReadVector(Bytes& bytes, const char* what) {
  Array array = ReadArray(bytes, what);
  if (array.sparse || array.shape.size() != 1)
    throw Error(std::string(what) + " is a dense vector, and not " +
                (array.sparse ? "sparse" : "of shape " + TextOf(array.shape)));
  return array;
}

// A kernel and the bias that follows it.
void ReadWeights(Bytes& bytes, size_t axes, Node& node) {
  node.kernel = ReadArray(bytes, "its kernel");
  const Shape& shape = node.kernel.shape;
  if (shape.size() != axes)
    throw Error("its kernel has " + std::to_string(axes) +
                " axes, and not the shape " + TextOf(shape));
  for (size_t i = 0; i < axes; ++i) {
    const bool pixels = i + 2 < axes;
    const int64_t most = pixels ? kMostPixels : kMostChannels;
    if (shape[i] > most)
      throw Error("its kernel of shape " + TextOf(shape) + " has more than " +
                  std::to_string(most) + (pixels ? " rows or columns"
                                                 : " channels or filters"));
  }
  node.bias = ReadVector(bytes, "its bias");
  const int64_t biases = node.bias.shape[0];
  if (biases != 0 && biases != shape.back())
    throw Error("its bias has " + std::to_string(biases) +
                " numbers, and its kernel " + std::to_string(shape.back()) +
                " filters");
}

void ReadConvolution(Bytes& bytes, Node& node) {
  ReadPair(bytes, "strides", node.strides);
  ReadPair(bytes, "dilations", node.dilations);
  node.groups = bytes.Read<int32_t>("its groups");
  node.padding = ReadPadding(bytes, false);
  ReadWeights(bytes, 4, node);
  const int64_t filters = node.kernel.shape[3];
  if (node.groups < 1 || filters % node.groups != 0)
    throw Error("its " + std::to_string(node.groups) +
                " groups do not divide its " + std::to_string(filters) +
                " filters");
}

void ReadAffine(Bytes& bytes, Node& node) {
  node.scale = ReadVector(bytes, "its scale");
  node.shift = ReadVector(bytes, "its shift");
  const int64_t scales = node.scale.shape[0], shifts = node.shift.shape[0];
  if (scales == 0 || shifts == 0 ||
      (scales != 1 && shifts != 1 && scales != shifts))
    throw Error("its scale has " + std::to_string(scales) +
                " numbers and its shift " + std::to_string(shifts) +
                ": each has one, or one for each channel");
}

void ReadActivation(Bytes& bytes, Node& node) {
  const uint32_t activation = bytes.Read<uint32_t>("its activation");
  const uint32_t count = static_cast<uint32_t>(Activation::kCount);
  if (activation >= count)
    throw Error("its activation is " + std::to_string(activation) +
                ", and this library knows 0 to " + std::to_string(count - 1));
  node.activation = static_cast<Activation>(activation);
  node.a = bytes.Read<float>("its activation");
  node.b = bytes.Read<float>("its activation");
  // A bound may be infinite. Not `a > b`: NaNs are refused, too.
  if (node.activation == Activation::kClip && !(node.a <= node.b))
    throw Error("it clips to a range from " + std::to_string(node.a) + " to " +
                std::to_string(node.b));
}

void ReadPool(Bytes& bytes, Node& node) {
  node.maximum = ReadFlag(bytes, "whether it takes the maximum");
  ReadPair(bytes, "window sizes", node.size);
  ReadPair(bytes, "strides", node.strides);
  node.padding = ReadPadding(bytes, false);
  if (int64_t{node.size[0]} * node.size[1] > kMostPixels)
    throw Error("its window has more than " + std::to_string(kMostPixels) +
                " pixels");
  const Padding& padding = node.padding;
  if (std::max(padding.top, padding.bottom) >= node.size[0] ||
      std::max(padding.left, padding.right) >= node.size[1])
    throw Error("its padding is as wide as its window, which would have no "
                "pixel of the image");
}

void ReadRecurrent(Bytes& bytes, Node& node) {
  const uint32_t cell = bytes.Read<uint32_t>("its cell");
  const uint32_t count = static_cast<uint32_t>(Cell::kCount);
  if (cell >= count)
    throw Error("its cell is " + std::to_string(cell) +
                ", and this library knows 0 to " + std::to_string(count - 1));
  node.cell = static_cast<Cell>(cell);
  node.sequences = ReadFlag(bytes, "whether it returns sequences");
  node.backwards = ReadFlag(bytes, "whether it goes backwards");
  node.reversed = ReadFlag(bytes, "whether its outputs are reversed");
  node.kernel = ReadArray(bytes, "its kernel");
  const Shape& shape = node.kernel.shape;
  const int64_t gates = GatesOf(node.cell);
  if (shape.size() != 2 || shape[1] != gates * shape[0])
    throw Error("its kernel of shape " + TextOf(shape) +
                " is none of units and " + std::to_string(gates) +
                " gates of them");
  node.bias = ReadVector(bytes, "its bias");
  const int64_t biases = node.bias.shape[0];
  if (biases != 0 && (node.cell != Cell::kGru || biases != shape[0]))
    throw Error("its bias has " + std::to_string(biases) +
                " numbers, and " +
                (node.cell == Cell::kGru ? "its units are " +
                                               std::to_string(shape[0])
                                         : "its cell has none"));
}

size_t InputCount(Operation operation) {
  switch (operation) {
    case Operation::kInput:
      return 0;
    case Operation::kAdd:
    case Operation::kSubtract:
    case Operation::kMultiply:
      return 2;
    default:
      return 1;  // kConcatenate: or more
  }
}

void ReadInputs(Bytes& bytes, size_t number, Node& node) {
  const uint32_t count = bytes.Read<uint32_t>("its inputs");
  const size_t needed = InputCount(node.operation);
  const bool several = node.operation == Operation::kConcatenate;
  if (several ? count < needed : count != needed)
    throw Error("it has " + std::to_string(count) + " inputs, and needs " +
                std::to_string(needed) + (several ? " or more" : ""));
  const uint8_t* inputs = bytes.Take(count, sizeof(int32_t), "its inputs");
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t input;
    std::memcpy(&input, inputs + i * sizeof(input), sizeof(input));
    if (input >= number)
      throw Error("it reads node " + std::to_string(input) +
                  ", which does not come before it");
    node.inputs.push_back(static_cast<int32_t>(input));
  }
}

void ReadFields(Bytes& bytes, Node& node) {
  switch (node.operation) {
    case Operation::kInput:
      node.shape = ReadShape(bytes, false);
      break;
    case Operation::kConvolution:
      return ReadConvolution(bytes, node);
    case Operation::kDense:
      return ReadWeights(bytes, 2, node);
    case Operation::kAffine:
      return ReadAffine(bytes, node);
    case Operation::kActivation:
      return ReadActivation(bytes, node);
    case Operation::kAdd:
    case Operation::kSubtract:
    case Operation::kMultiply:
    case Operation::kConcatenate:
    case Operation::kSoftmax:
      break;
    case Operation::kPool:
      return ReadPool(bytes, node);
    case Operation::kGlobalPool:
      node.maximum = ReadFlag(bytes, "whether it takes the maximum");
      node.keep_axes = ReadFlag(bytes, "whether it keeps its axes");
      break;
    case Operation::kPad:
      node.padding = ReadPadding(bytes, true);
      node.a = bytes.Read<float>("what it pads with");
      break;
    case Operation::kUpsample:
      ReadPair(bytes, "factors", node.factors);
      node.bilinear = ReadFlag(bytes, "whether it is bilinear");
      break;
    case Operation::kReshape:
      node.shape = ReadShape(bytes, true);
      break;
    case Operation::kRecurrent:
      return ReadRecurrent(bytes, node);
  }
}

// Appends a node, so that a message can name it.
void ReadNode(Bytes& bytes, Network& network) {
  const size_t number = network.nodes.size();
  network.nodes.emplace_back();
  Node& node = network.nodes.back();
  const uint32_t operation = bytes.Read<uint32_t>("its operation");
  const uint32_t last = static_cast<uint32_t>(Operation::kRecurrent);
  if (operation > last)
    throw Error("its operation is " + std::to_string(operation) +
                ", and this library knows 0 to " + std::to_string(last));
  node.operation = static_cast<Operation>(operation);
  node.name = ReadName(bytes, "its name");
  ReadInputs(bytes, number, node);
  ReadFields(bytes, node);
}

using Names = std::unordered_set<std::string>;

// By these a caller asks for inputs and outputs.
void CheckName(const std::string& name, const char* what, Names& names) {
  if (name.empty()) throw Error(std::string(what) + " has no name");
  if (!names.insert(name).second)
    throw Error(std::string("two ") + what + "s have the name " +
                Quoted(name));
}

void ReadNodes(Bytes& bytes, Network& network) {
  const uint32_t count = bytes.Read<uint32_t>("the number of nodes");
  if (count > kMostNodes)
    throw Error("the file announces " + std::to_string(count) +
                " nodes, and at most " + std::to_string(kMostNodes) +
                " are possible");
  Names names;
  for (uint32_t i = 0; i < count; ++i) {
    try {
      ReadNode(bytes, network);
    } catch (const Error& error) {
      throw Error(NameOf(network, i) + ": " + error.what());
    }
    const Node& node = network.nodes.back();
    if (node.operation == Operation::kInput)
      CheckName(node.name, "input", names);
  }
  if (names.empty()) throw Error("the network has no input");
}

void ReadOutputs(Bytes& bytes, Network& network) {
  const uint32_t count = bytes.Read<uint32_t>("the number of outputs");
  if (count == 0) throw Error("the network has no output");
  Names names;
  for (uint32_t i = 0; i < count; ++i) {
    Output output;
    output.name = ReadName(bytes, "the name of an output");
    CheckName(output.name, "output", names);
    const uint32_t node = bytes.Read<uint32_t>("the node of an output");
    if (node >= network.nodes.size())
      throw Error("output " + Quoted(output.name) + " is of node " +
                  std::to_string(node) + ", and the network has " +
                  std::to_string(network.nodes.size()));
    output.node = static_cast<int32_t>(node);
    network.outputs.push_back(std::move(output));
  }
}

}  // namespace

uint32_t ReadHeader(const void* bytes, uint64_t size) {
  const size_t begun = std::min<uint64_t>(size, sizeof(kMagic));
  if (size == 0) throw Error("the file is empty");
  if (std::memcmp(bytes, kMagic, begun) != 0)
    throw Error("the file is not a network that rigl_keras has exported");
  if (size < kHeader)
    throw Error("the file is cut off: it has " + std::to_string(size) +
                " bytes, and its header alone " + std::to_string(kHeader));
  Bytes header(static_cast<const uint8_t*>(bytes) + sizeof(kMagic),
               kHeader - sizeof(kMagic));
  const uint32_t version = header.Read<uint32_t>("the version");
  const uint32_t zero = header.Read<uint32_t>("the header");
  const uint64_t body = header.Read<uint64_t>("the header");
  const uint32_t checksum = header.Read<uint32_t>("the header");
  const uint32_t zero2 = header.Read<uint32_t>("the header");
  if (version > kVersion)
    throw Error("the file has format version " + std::to_string(version) +
                ", and this library reads versions 1 to " +
                std::to_string(kVersion) +
                ": use the library of the rigl_keras that wrote the file");
  const uint64_t left = size - kHeader;
  if (body > left)
    throw Error("the file is cut off: it has " + std::to_string(size) +
                " bytes, of which " + std::to_string(body - left) +
                " are missing");
  if (version < 1 || zero != 0 || zero2 != 0 || body < left)
    throw Error("the file is damaged: " +
                (body < left ? std::to_string(left - body) +
                                   " bytes follow its end"
                             : "its header is none of any version"));
  return checksum;
}

Network Parse(const void* bytes, size_t size) {
  const uint32_t checksum = ReadHeader(bytes, size);
  const uint8_t* const begin = static_cast<const uint8_t*>(bytes) + kHeader;
  if (Checksum(begin, size - kHeader) != checksum)
    throw Error("the file is damaged: its checksum is another one");
  Bytes body(begin, size - kHeader);
  Network network;
  ReadNodes(body, network);
  ReadOutputs(body, network);
  network.hints = body.ReadString("the hints");
  if (body.left() != 0)
    throw Error(std::to_string(body.left()) + " bytes follow the hints");
  // As far as they are known: what fits no input is refused here.
  std::vector<Shape> inputs;
  for (const Node& node : network.nodes)
    if (node.operation == Operation::kInput) inputs.push_back(node.shape);
  Shapes(network, inputs);
  return network;
}

}  // namespace rigl_serving

// The shapes of a network's values. A length of -1 is free: it is not known
// yet, and what follows from it is not known either.
#include <algorithm>
#include <string>

#include "bytes.h"
#include "network.h"

namespace rigl_serving {

namespace {

constexpr int64_t kFree = -1;
constexpr int64_t kMostNumbers = (int64_t{1} << 31) - 1;

bool Known(int64_t length) { return length != kFree; }

// Free lengths count as one.
void CheckSize(const Shape& shape, const char* what) {
  int64_t size = 1;
  for (int64_t length : shape) {
    if (!Known(length)) continue;
    if (length > kMostNumbers / size)
      throw Error(std::string(what) + " would have the shape " +
                  TextOf(shape) + ", which is more than 2^31 - 1 numbers");
    size *= length;
  }
}

void CheckImage(const Shape& shape) {
  if (shape.size() != 3)
    throw Error("it needs an image (rows, columns, channels) for each sample, "
                "and its input has the shape " + TextOf(shape));
}

void CheckChannels(const Shape& shape) {
  if (shape.empty())
    throw Error("it needs channels, and its input has no axis but the batch");
}

// An axis of an image, and what a window that moves over it makes of it.
struct Axis {
  int64_t length, window, stride, before, after;
  bool same;

  // With what is added on its sides.
  int64_t Padded() const {
    if (!Known(length)) return kFree;
    if (!same) return length + before + after;
    return std::max(length, (Ceiling() - 1) * stride + window);
  }

  int64_t Windows() const {
    if (!Known(length)) return kFree;
    if (same) return Ceiling();
    if (Padded() < window)
      throw Error("its window of " + std::to_string(window) +
                  " does not fit into the " + std::to_string(Padded()) +
                  " rows or columns of its input");
    return (Padded() - window) / stride + 1;
  }

 private:
  int64_t Ceiling() const { return (length - 1) / stride + 1; }
};

// The shape after a window has moved over an image, which is then
// `channels` deep.
Shape Slide(const Node& node, const Shape& image, const int64_t* window,
            int64_t channels) {
  const Padding& padding = node.padding;
  const Axis rows{image[0],    window[0],      node.strides[0],
                  padding.top, padding.bottom, padding.same};
  const Axis columns{image[1],     window[1],     node.strides[1],
                     padding.left, padding.right, padding.same};
  CheckSize({rows.Padded(), columns.Padded(), image[2]},
            "its input with its padding");
  return {rows.Windows(), columns.Windows(), channels};
}

Shape OfConvolution(const Node& node, const Shape& image) {
  CheckImage(image);
  const Shape& kernel = node.kernel.shape;
  const int64_t channels = kernel[2] * node.groups;
  if (Known(image[2]) && image[2] != channels)
    throw Error("its kernel of shape " + TextOf(kernel) + " in " +
                std::to_string(node.groups) + " groups needs " +
                std::to_string(channels) + " channels, and its input has " +
                std::to_string(image[2]));
  const int64_t window[2] = {(kernel[0] - 1) * node.dilations[0] + 1,
                             (kernel[1] - 1) * node.dilations[1] + 1};
  return Slide(node, {image[0], image[1], channels}, window, kernel[3]);
}

Shape OfDense(const Node& node, Shape shape) {
  CheckChannels(shape);
  const Shape& kernel = node.kernel.shape;
  if (Known(shape.back()) && shape.back() != kernel[0])
    throw Error("its kernel of shape " + TextOf(kernel) + " needs " +
                std::to_string(kernel[0]) +
                " channels, and its input has the shape " + TextOf(shape));
  shape.back() = kernel[1];
  return shape;
}

Shape OfAffine(const Node& node, Shape shape) {
  CheckChannels(shape);
  const int64_t channels =
      std::max(node.scale.shape[0], node.shift.shape[0]);
  if (channels == 1) return shape;
  if (Known(shape.back()) && shape.back() != channels)
    throw Error("it scales and shifts " + std::to_string(channels) +
                " channels, and its input has the shape " + TextOf(shape));
  shape.back() = channels;
  return shape;
}

// Has what is known of an axis that two values share in `length`. Returns
// whether they can share it.
bool Share(int64_t& length, int64_t other) {
  if (!Known(length)) length = other;
  return !Known(other) || length == other;
}

// Whether one of two images has one pixel, or may turn out to have.
bool MayBePixel(const Shape& left, const Shape& right) {
  if (left.size() != 3 || right.size() != 3) return false;
  for (const Shape* shape : {&left, &right})
    if ((*shape)[0] <= 1 && (*shape)[1] <= 1) return true;  // or free
  return false;
}

Shape OfBinary(const Shape& left, const Shape& right) {
  CheckChannels(left);
  CheckChannels(right);
  Shape shape = left;
  bool fits = left.size() == right.size();
  const bool pixel = MayBePixel(left, right);
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    if (pixel && i < 2 && shape[i] == 1)
      shape[i] = right[i];
    else if (!(pixel && i < 2 && right[i] == 1))
      fits = Share(shape[i], right[i]);
  }
  if (!fits)
    throw Error("its inputs have the shapes " + TextOf(left) + " and " +
                TextOf(right) +
                ": they must be equal, or one of them an image of one pixel");
  return shape;
}

Shape OfConcatenate(const std::vector<const Shape*>& inputs) {
  Shape shape = *inputs[0];
  CheckChannels(shape);
  for (size_t i = 1; i < inputs.size(); ++i) {
    const Shape& other = *inputs[i];
    bool fits = other.size() == shape.size();
    for (size_t axis = 0; fits && axis + 1 < shape.size(); ++axis)
      fits = Share(shape[axis], other[axis]);
    if (!fits)
      throw Error("its inputs 0 and " + std::to_string(i) +
                  " have the shapes " + TextOf(*inputs[0]) + " and " +
                  TextOf(other) + ", which differ before the last axis");
    shape.back() = Known(shape.back()) && Known(other.back())
                       ? shape.back() + other.back()
                       : kFree;
    CheckSize(shape, "its output");  // before the next sum
  }
  return shape;
}

Shape OfPool(const Node& node, const Shape& image) {
  CheckImage(image);
  const int64_t window[2] = {node.size[0], node.size[1]};
  return Slide(node, image, window, image[2]);
}

Shape OfGlobalPool(const Node& node, const Shape& image) {
  CheckImage(image);
  return node.keep_axes ? Shape{1, 1, image[2]} : Shape{image[2]};
}

Shape OfPad(const Node& node, Shape image) {
  CheckImage(image);
  const Padding& padding = node.padding;
  const int32_t sides[2][2] = {{padding.top, padding.bottom},
                               {padding.left, padding.right}};
  for (int i = 0; i < 2; ++i) {
    if (!Known(image[i])) continue;
    const auto [before, after] = sides[i];
    // What is cropped must be of the image, not of the other side's padding.
    if (std::max(-before, 0) + std::max(-after, 0) >= image[i])
      throw Error("it crops all of the " + std::to_string(image[i]) +
                  " rows or columns of its input");
    image[i] += int64_t{before} + after;
  }
  return image;
}

Shape OfUpsample(const Node& node, Shape image) {
  CheckImage(image);
  for (int i = 0; i < 2; ++i)
    if (Known(image[i])) image[i] *= node.factors[i];
  return image;
}

// How many numbers a value has; free if a length is.
int64_t SizeOf(const Shape& shape) {
  int64_t size = 1;
  for (int64_t length : shape) {
    if (!Known(length)) return kFree;
    size *= length;  // CheckSize has seen it
  }
  return size;
}

Shape OfReshape(const Node& node, const Shape& from) {
  Shape shape = node.shape;
  CheckSize(shape, "its output");
  const int64_t numbers = SizeOf(from);
  if (!Known(numbers)) return shape;
  int64_t rest = 1;
  for (int64_t length : shape)
    if (Known(length)) rest *= length;
  const auto free = std::find(shape.begin(), shape.end(), kFree);
  if (free == shape.end() ? rest != numbers : numbers % rest != 0)
    throw Error("what has the shape " + TextOf(from) +
                " cannot be given the shape " + TextOf(shape));
  if (free != shape.end()) *free = numbers / rest;
  return shape;
}

Shape OfRecurrent(const Node& node, const Shape& shape) {
  const Shape& kernel = node.kernel.shape;
  if (shape.size() != 2 || (Known(shape[1]) && shape[1] != kernel[1]))
    throw Error("it needs a sequence (steps, " + std::to_string(kernel[1]) +
                "), and its input has the shape " + TextOf(shape));
  return node.sequences ? Shape{shape[0], kernel[0]} : Shape{kernel[0]};
}

Shape ShapeOf(const Node& node, const std::vector<const Shape*>& inputs) {
  const Shape& input = *inputs[0];
  switch (node.operation) {
    case Operation::kInput:
      break;  // has no inputs: never here
    case Operation::kConvolution:
      return OfConvolution(node, input);
    case Operation::kDense:
      return OfDense(node, input);
    case Operation::kAffine:
      return OfAffine(node, input);
    case Operation::kActivation:
    case Operation::kSoftmax:
      CheckChannels(input);
      return input;
    case Operation::kAdd:
    case Operation::kSubtract:
    case Operation::kMultiply:
      return OfBinary(input, *inputs[1]);
    case Operation::kConcatenate:
      return OfConcatenate(inputs);
    case Operation::kPool:
      return OfPool(node, input);
    case Operation::kGlobalPool:
      return OfGlobalPool(node, input);
    case Operation::kPad:
      return OfPad(node, input);
    case Operation::kUpsample:
      return OfUpsample(node, input);
    case Operation::kReshape:
      return OfReshape(node, input);
    case Operation::kRecurrent:
      return OfRecurrent(node, input);
  }
  throw Error("its operation is unknown");
}

// What a caller gives as an input, against what the network says.
void CheckInput(const Node& node, const Shape& given) {
  bool fits = given.size() == node.shape.size();
  for (size_t i = 0; fits && i < given.size(); ++i)
    fits = Known(node.shape[i]) ? given[i] == node.shape[i]
                                : given[i] >= 1 || !Known(given[i]);
  if (!fits)
    throw Error("input " + Quoted(node.name) + " has the shape " +
                TextOf(node.shape) + " beside the batch, and not " +
                TextOf(given));
  CheckSize(given, ("input " + Quoted(node.name)).c_str());
}

}  // namespace

std::vector<Shape> Shapes(const Network& network,
                          const std::vector<Shape>& inputs) {
  std::vector<Shape> shapes;
  shapes.reserve(network.nodes.size());
  size_t given = 0;
  for (size_t i = 0; i < network.nodes.size(); ++i) {
    const Node& node = network.nodes[i];
    if (node.operation == Operation::kInput) {
      if (given == inputs.size())
        throw Error("the network has more than " +
                    std::to_string(inputs.size()) + " inputs");
      CheckInput(node, inputs[given]);
      shapes.push_back(inputs[given++]);
      continue;
    }
    std::vector<const Shape*> read;
    for (int32_t input : node.inputs) read.push_back(&shapes[input]);
    try {
      shapes.push_back(ShapeOf(node, read));
      CheckSize(shapes.back(), "its output");
    } catch (const Error& error) {
      throw Error(NameOf(network, i) + ": " + error.what());
    }
  }
  if (given != inputs.size())
    throw Error("the network has " + std::to_string(given) +
                " inputs, and not " + std::to_string(inputs.size()));
  return shapes;
}

}  // namespace rigl_serving

// A network as it stands in a file: what is computed, and nothing of how.
#ifndef RIGL_KERAS_NETWORK_H_
#define RIGL_KERAS_NETWORK_H_

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace rigl_serving {

// What a node computes. The numbers stand in files: they never change.
enum class Operation : uint32_t {
  kInput = 0,
  kConvolution = 1,  // also depthwise (as many groups as channels)
  kDense = 2,        // over the last axis
  kAffine = 3,       // x * scale + shift, by the last axis
  kActivation = 4,
  kAdd = 5,
  kSubtract = 6,
  kMultiply = 7,
  kConcatenate = 8,  // along the last axis
  kPool = 9,
  kGlobalPool = 10,
  kPad = 11,
  kUpsample = 12,
  kReshape = 13,
  kSoftmax = 14,  // over the last axis
  kRecurrent = 15,  // the loop of an LSTM or a GRU over a sequence
};

// The gates of a recurrent step, in the order of their columns.
enum class Cell : uint32_t {
  kLstm = 0,       // input, forget, candidate, output
  kGru = 1,        // update, reset, candidate, whose product is reset
  kGruBefore = 2,  // the same where the state is reset before its product
  kCount = 3,
};

inline int GatesOf(Cell cell) { return cell == Cell::kLstm ? 4 : 3; }

enum class Activation : uint32_t {
  kRelu = 0,
  kClip = 1,         // min(max(x, a), b): relu6 is 0 and 6
  kLeakyRelu = 2,    // x < 0 ? a x : x
  kElu = 3,          // x < 0 ? a (exp(x) - 1) : x
  kSigmoid = 4,
  kTanh = 5,
  kSilu = 6,         // x sigmoid(x)
  kGelu = 7,         // by the error function
  kGeluTanh = 8,     // by tanh
  kHardSigmoid = 9,  // min(max(x / 6 + 1 / 2, 0), 1)
  kHardSilu = 10,    // x hard_sigmoid(x)
  kSoftplus = 11,
  kSelu = 12,
  kExponential = 13,
  kCount = 14,
};

// Zeros beyond the edges of an image: as many as stand here, or as many as
// make `same` padding of TensorFlow.
struct Padding {
  bool same = false;
  int32_t top = 0, bottom = 0, left = 0, right = 0;
};

// Float32, row by row. Of a sparse one the weights that are not zero, and
// their places in the dense one, which rise.
struct Array {
  std::vector<int64_t> shape;
  bool sparse = false;
  std::vector<float> values;
  std::vector<int64_t> places;

  int64_t size() const {
    int64_t size = 1;
    for (int64_t length : shape) size *= length;
    return size;
  }
};

// Which fields an operation has, beside its inputs, follows it here.
struct Node {
  Operation operation = Operation::kInput;
  std::string name;
  std::vector<int32_t> inputs;  // nodes before this one

  // kConvolution, kPool: rows and columns of each. A pool's window is `size`.
  int32_t size[2] = {1, 1}, strides[2] = {1, 1}, dilations[2] = {1, 1};
  int32_t groups = 1;
  Padding padding;  // and kPad, where a negative number crops

  // kConvolution: [rows, columns, channels / groups, filters]; kDense:
  // [inputs, units]. An empty bias is none. kRecurrent, which reads the products
  // of its inputs [steps, gates * units]: [units, gates * units]; the bias is
  // for kGru alone, [units]: of the candidate's product with the state.
  Array kernel, bias;

  Array scale, shift;  // kAffine: [channels], or [1] for all of them
  Activation activation = Activation::kRelu;
  float a = 0, b = 0;  // of the activation; kPad: `a` is what it pads with

  bool maximum = false;   // kPool, kGlobalPool: or the average, of the image
                          // alone where a window passes its edge
  bool keep_axes = false; // kGlobalPool: [1, 1, channels] rather than [channels]

  int32_t factors[2] = {1, 1};  // kUpsample: rows and columns
  bool bilinear = false;        // or nearest; half-pixel centers

  Cell cell = Cell::kLstm;  // kRecurrent
  bool sequences = false;   // all outputs [steps, units], or the last [units]
  bool backwards = false;   // from the last step to the first
  bool reversed = false;    // outputs are the other way round than inputs

  // kInput: its shape without the batch, -1 where it is free. kReshape: the
  // same, where -1 is what is left.
  std::vector<int64_t> shape;
};

struct Output {
  std::string name;
  int32_t node = 0;
};

// One that `Parse` has checked: inputs come before their readers, shapes of
// weights agree with one another and with what a node needs.
struct Network {
  std::vector<Node> nodes;  // inputs are those of kInput, in this order
  std::vector<Output> outputs;
  std::string hints;  // what a planner has measured; may be empty, or nonsense
};

// A shape without its batch.
using Shape = std::vector<int64_t>;

// What is wrong with a file, or with a call, in one line for a user.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Bytes that a file begins with, before the network.
constexpr size_t kHeader = 32;

// Returns the checksum of what follows the header of a file of `size` bytes.
// The first ones, `kHeader` or as many as there are, are at `bytes`. Throws
// Error where no network can follow them.
uint32_t ReadHeader(const void* bytes, uint64_t size);

// Returns the network of a file. Throws Error, whatever the bytes are.
Network Parse(const void* bytes, size_t size);

// Returns the shape of every node, given those of the inputs, in their order.
// Lengths of -1 are free, and so are those that follow from them: the inputs'
// own shapes give what is known before a call. Throws Error where shapes do
// not fit, or a value, or an image with its padding, would have 2^31 numbers.
std::vector<Shape> Shapes(const Network& network,
                          const std::vector<Shape>& inputs);

}  // namespace rigl_serving

#endif  // RIGL_KERAS_NETWORK_H_

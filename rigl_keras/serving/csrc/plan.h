// From a network to the steps that compute it, in one layout of `tiles.h`.
#ifndef RIGL_KERAS_PLAN_H_
#define RIGL_KERAS_PLAN_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "generated.h"
#include "network.h"
#include "recurrence.h"
#include "tiles.h"

namespace rigl_serving {

struct Layout {
  const Tiles* tiles;
  bool positions;

  int32_t length() const { return tiles->length; }
};

// Where the numbers of a value lie within memory of its own.
struct Geometry {
  int32_t channels = 0, rows = 0, columns = 0;  // pixels
  int32_t cells = 0, last = 0;                  // as in `Field`
  int32_t top = 0, bottom = 0, left = 0, right = 0;  // the margin, in pixels
  int64_t pitch = 0, plane = 0;                      // floats
  int64_t lead = 0;  // floats before channel 0, row 0, cell 0
  float fill = 0;    // what the margin is

  bool is_pixel() const { return rows == 1 && columns == 1; }
  int64_t floats() const { return lead + channels * plane + kSlack; }

  static constexpr int64_t kSlack = 64;  // read, never used
};

// A value or a part of its channels: which memory, and where in it.
struct Operand {
  int32_t slot = -1;  // -1: none
  Geometry geometry;
  int32_t channel = 0;  // of the slot's, the first one of the value

  explicit operator bool() const { return slot >= 0; }
};

// Weights of a convolution, ready for the kernels. `Convolution` points here.
struct Weights {
  std::vector<Entry> entries;
  std::vector<int32_t> rows;
  std::vector<int32_t> offsets, dense_blocks;
  std::vector<float> dense;
  int32_t blocks = 1;
  Generated generated;
};

// How a convolution is computed: what a planner chooses.
enum class Product : char {
  kSparse = 's', kDense = 'd', kGenerated = 'g', kDepthwise = 'w'
};

struct Choice {
  Product product = Product::kSparse;
  int32_t tile[2] = {1, 1};
  int32_t block = 0;  // channels of the input at a time

  bool operator==(const Choice& other) const {
    return product == other.product && tile[0] == other.tile[0] &&
           tile[1] == other.tile[1] && block == other.block;
  }
};

enum class StepKind {
  kPack, kUnpack, kConvolution, kElementwise, kPool, kGlobalPool,
  kPhases,   // columns of a stride apart, a margin of another fill, or the
             // pixels that a window reads
  kSplat,    // a value of one pixel fills its cells
  kPad, kUpsample, kReshape, kSoftmax, kRecurrent,
};

// One step of a unit of work. All threads that share the unit pass a barrier
// after it.
struct Step {
  StepKind kind = StepKind::kPack;
  int32_t node = 0;    // that it computes, or the last of several
  int32_t number = 0;  // kPack, kUnpack: of the input or output
  Operand in, other, to, to2;
  std::vector<Operand> phases;  // kPhases: where they go
  std::vector<int32_t> phase_numbers;

  const Node* of = nullptr;  // of kConvolution, kPool and what is rare
  // kConvolution, kPool: where a position of the window reads.
  struct Tap {
    int32_t place;   // row * columns + column of the window
    int32_t phase;   // which of the input's phases
    int64_t offset;  // from the output's place, floats
  };
  std::vector<Tap> taps;
  int64_t in_pitch = 0, in_step = 0;
  bool every_other = false;  // as in `Convolution`; no other product can
  Choice choice;
  std::shared_ptr<const Weights> weights;
  const float* bias = nullptr;
  std::vector<int32_t> offsets;  // kPool
  std::vector<float> factors;    // kPool, of averages
  std::shared_ptr<const Recurrence> recurrence;
  int32_t stride = 1, first = 0;  // kPhases: of columns; which is the first
  int32_t row_stride = 1, first_row = 0;  // as well, where a cell is a pixel

  // Of an epilogue, without its fields.
  const float *scale = nullptr, *shift = nullptr;
  const float *scale2 = nullptr, *shift2 = nullptr;
  char combine = '+';
  int32_t act = -1, act2 = -1;
  float a = 0, b = 0, a2 = 0, b2 = 0;

  int64_t products = 0;  // multiplications of a unit, for one image
};

struct Plan {
  Layout layout;
  std::vector<Shape> shapes;     // of all nodes
  std::vector<Step> steps;
  std::vector<int64_t> slots;    // floats of each
  std::vector<float> fills;      // what each is filled with at first
  std::vector<std::unique_ptr<std::vector<float>>> constants;
};

// Choices that were measured, by node. Others are made by rules.
using Choices = std::map<int32_t, Choice>;

// A part of a network: the nodes after `first`, whose value comes in, up to
// `last`, whose value goes out. Nothing before `first` is read after it.
struct Range {
  int32_t first = -1;  // -1: from the inputs of the network
  int32_t last = -1;   // -1: to its outputs

  bool operator<(const Range& other) const {
    return first != other.first ? first < other.first : last < other.last;
  }
};

// Nodes at which a network can be cut in two: what comes after one reads
// nothing before it.
std::vector<int32_t> Cuts(const Network& network);

// Throws Error where a value is too large to be addressed.
Plan MakePlan(const Network& network, const std::vector<Shape>& shapes,
              const Layout& layout, const Choices& choices,
              const Range& range = {});

// What could be chosen for a convolution, the likely best one first. `out` are
// its rows and cells.
std::vector<Choice> ChoicesFor(const Step& step, const Geometry& out,
                               const Layout& layout);

// Gives a convolution another choice, and the weights for it.
void Choose(Step* step, const Choice& choice, const Layout& layout);

}  // namespace rigl_serving

#endif  // RIGL_KERAS_PLAN_H_

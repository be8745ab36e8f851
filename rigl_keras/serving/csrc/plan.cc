#include "plan.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <limits>
#include <optional>
#include <set>
#include <tuple>

namespace rigl_serving {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

constexpr int64_t kLine = 16;  // floats of a cache line

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A value's shape as rows and columns of pixels.
struct Pixels {
  int32_t rows = 1, columns = 1, channels = 1;

  explicit Pixels(const Shape& shape) {
    const size_t axes = shape.size();
    if (axes > 0) channels = shape[axes - 1];
    if (axes > 1) columns = shape[axes - 2];
    for (size_t i = 0; i + 2 < axes; ++i) rows *= shape[i];
  }
  bool is_pixel() const { return rows == 1 && columns == 1; }
  bool operator==(const Pixels& other) const {
    return rows == other.rows && columns == other.columns &&
           channels == other.channels;
  }
};

struct Margin {
  int32_t top = 0, bottom = 0, left = 0, right = 0;

  void Widen(const Margin& other) {
    top = std::max(top, other.top);
    bottom = std::max(bottom, other.bottom);
    left = std::max(left, other.left);
    right = std::max(right, other.right);
  }
  bool any() const { return top || bottom || left || right; }
};

Geometry GeometryOf(const Pixels& pixels, const Margin& margin,
                    const Layout& layout, float fill = 0) {
  const int64_t length = layout.length();
  Geometry g;
  g.channels = pixels.channels;
  g.rows = pixels.rows;
  g.columns = pixels.columns;
  g.top = margin.top;
  g.bottom = margin.bottom;
  g.left = margin.left;
  g.right = margin.right;
  g.fill = fill;
  // Neighbouring rows share a margin, and so do neighbouring planes.
  const int64_t wide = g.columns + int64_t{std::max(g.left, g.right)};
  if (layout.positions) {
    g.cells = (g.columns + length - 1) / length;
    g.last = g.columns - (g.cells - 1) * length;
    if (g.is_pixel()) g.last = length;
    g.pitch = RoundUp(wide, length);
    g.lead = RoundUp(g.left, length);
  } else {
    g.cells = g.columns;
    g.last = length;
    g.pitch = wide * length;
    g.lead = g.left * length;
  }
  g.plane = (g.rows + int64_t{std::max(g.top, g.bottom)}) * g.pitch;
  // An odd number of cache lines: the planes of a tile lie in all sets of the
  // cache, and do not push one another out of a few.
  g.plane = RoundUp(g.plane, kLine);
  if (g.plane / kLine % 2 == 0) g.plane += kLine;
  g.lead += g.top * g.pitch;
  if (g.floats() > INT32_MAX)
    throw Error("a value of the network is too large to be planned");
  return g;
}

// What one window position reads: the offset of its first output, in pixels.
struct WindowTap {
  int32_t place, row, column;
};

// The positions of a window that read the image somewhere.
std::vector<WindowTap> LiveTaps(const int32_t* size, const int32_t* strides,
                                const int32_t* dilations, int32_t top,
                                int32_t left, const Pixels& in,
                                const Pixels& out) {
  const auto lives = [](int64_t first, int64_t stride, int64_t count,
                        int64_t length) {
    // Some i in [0, count) with 0 <= first + i * stride < length.
    const int64_t i = first >= 0 ? 0 : (-first + stride - 1) / stride;
    return i < count && first + i * stride < length;
  };
  std::vector<WindowTap> taps;
  for (int32_t y = 0; y < size[0]; ++y) {
    const int64_t row = int64_t{y} * dilations[0] - top;
    if (!lives(row, strides[0], out.rows, in.rows)) continue;
    for (int32_t x = 0; x < size[1]; ++x) {
      const int64_t column = int64_t{x} * dilations[1] - left;
      if (!lives(column, strides[1], out.columns, in.columns)) continue;
      taps.push_back({y * size[1] + x, static_cast<int32_t>(row),
                      static_cast<int32_t>(column)});
    }
  }
  return taps;
}

Margin MarginFor(const std::vector<WindowTap>& taps, const int32_t* strides,
                 const Pixels& in, const Pixels& out) {
  Margin m;
  for (const WindowTap& tap : taps) {
    const int64_t bottom =
        tap.row + int64_t{out.rows - 1} * strides[0] - (in.rows - 1);
    const int64_t right =
        tap.column + int64_t{out.columns - 1} * strides[1] - (in.columns - 1);
    m.Widen({std::max(0, -tap.row), static_cast<int32_t>(std::max<int64_t>(
                                        0, bottom)),
             std::max(0, -tap.column),
             static_cast<int32_t>(std::max<int64_t>(0, right))});
  }
  return m;
}

class Planner {
 public:
  Planner(const Network& network, const std::vector<Shape>& shapes,
          const Layout& layout, const Choices& choices, const Range& range)
      : network_(network), layout_(layout), choices_(choices),
        first_(range.first),
        last_(range.last >= 0 ? range.last
                              : static_cast<int32_t>(network.nodes.size()) -
                                    1),
        ends_(range.last < 0) {
    plan_.layout = layout;
    plan_.shapes = shapes;
    for (const Shape& shape : shapes) pixels_.emplace_back(shape);
  }

  Plan Make();

 private:
  // What a step computes: a node, those after it that its epilogue does, and
  // the values that this makes.
  struct Group {
    int32_t base = 0;
    int32_t y = 0, z = -1;
    bool keeps_y = true;
    int32_t other = -1;
    Step epilogue;
  };

  // A window over a value: a convolution, or a pool.
  struct Window {
    std::vector<WindowTap> taps;
    const int32_t* strides = nullptr;
    Margin margin;   // that it reads
    bool copied;     // it reads a copy: phases, or with another fill
    bool thinned = false;  // which has the pixels alone that it reads
    bool every_other = false;  // as in `Step`
    float fill = 0;
  };

  int32_t Same(int32_t node) const { return same_[node]; }
  const Node& At(int32_t node) const { return network_.nodes[node]; }
  int Uses(int32_t value) const {
    return static_cast<int>(readers_[value].size()) + outputs_[value];
  }

  void FindReaders();
  std::vector<Group> Groups();
  void Absorb(Group* group);
  bool AbsorbOne(Group* group, int32_t reader);
  void FindSecond(Group* group);
  static bool ReadsEveryOther(const Node& node, const Window& window);
  Window WindowOf(int32_t node) const;
  void FindMargins(const std::vector<Group>& groups);
  void Emit(const Group& group);
  Operand CopyFor(const Window& window, const Pixels& out, Step* step);
  void EmitConcatenation(int32_t node);
  void EmitOutputs(int32_t value);
  const float* Constant(const Array& array, int32_t channels, float sign = 1);

  Operand ValueOf(int32_t value) { return values_.at(Same(value)); }
  Operand NewOperand(const Geometry& geometry);
  Operand NewValue(int32_t value);
  void Push(Step step) { plan_.steps.push_back(std::move(step)); }
  void Allocate();

  const Network& network_;
  const Layout layout_;
  const Choices& choices_;
  const int32_t first_, last_;  // of the nodes; the first one's value is given
  const bool ends_;             // with the network's outputs
  Plan plan_;
  std::vector<Pixels> pixels_;
  std::vector<int32_t> same_;  // the node whose value a node's is
  std::vector<std::vector<int32_t>> readers_;
  std::vector<int> outputs_;  // of the network, that are this value
  std::vector<bool> absorbed_, computed_;
  std::vector<Margin> margins_;
  std::map<int32_t, Operand> values_;
  std::vector<Geometry> wanted_;  // of each operand, before slots are shared
  // Phases that exist already: by value, first column, stride and numbers.
  std::map<std::tuple<int32_t, int32_t, int32_t, float, std::vector<int32_t>,
                      std::vector<int64_t>>,
           Operand>
      copies_;
};

bool IsBinary(Operation operation) {
  return operation == Operation::kAdd || operation == Operation::kSubtract ||
         operation == Operation::kMultiply;
}

void Planner::FindReaders() {
  const int32_t count = static_cast<int32_t>(network_.nodes.size());
  same_.resize(count);
  readers_.resize(count);
  outputs_.assign(count, 0);
  absorbed_.assign(count, false);
  computed_.assign(count, false);
  margins_.resize(count);
  for (int32_t n = 0; n < count; ++n) {
    const Node& node = At(n);
    same_[n] = n;
    if (n <= first_ || n > last_) continue;
    if (node.operation == Operation::kReshape &&
        pixels_[n] == pixels_[node.inputs[0]]) {
      same_[n] = same_[node.inputs[0]];
      continue;
    }
    for (int32_t input : node.inputs) readers_[Same(input)].push_back(n);
  }
  if (ends_)
    for (const Output& output : network_.outputs) ++outputs_[Same(output.node)];
  else
    ++outputs_[Same(last_)];
}

const float* Planner::Constant(const Array& array, int32_t channels,
                               float sign) {
  auto values = std::make_unique<std::vector<float>>(channels, 0.0f);
  for (size_t i = 0; i < array.values.size(); ++i) {
    const int64_t place = array.sparse ? array.places[i] : i;
    const float value = sign * array.values[i];
    if (array.size() == 1)
      std::fill(values->begin(), values->end(), value);
    else
      (*values)[place] = value;
  }
  plan_.constants.push_back(std::move(values));
  return plan_.constants.back()->data();
}

bool Planner::AbsorbOne(Group* group, int32_t reader) {
  const Node& node = At(reader);
  Step& e = group->epilogue;
  const int32_t channels = pixels_[reader].channels;
  if (node.operation == Operation::kActivation && e.act < 0) {
    e.act = static_cast<int32_t>(node.activation);
    e.a = node.a;
    e.b = node.b;
    return true;
  }
  if (e.act >= 0 || group->other >= 0) return false;
  if (node.operation == Operation::kAffine && !e.scale && !e.shift) {
    e.scale = Constant(node.scale, channels);
    e.shift = Constant(node.shift, channels);
    return true;
  }
  if (!IsBinary(node.operation)) return false;
  const bool first = Same(node.inputs[0]) == group->y;
  const int32_t other = Same(node.inputs[first ? 1 : 0]);
  if (other == group->y || !computed_[other]) return false;
  if (!(pixels_[group->y] == pixels_[reader])) return false;
  if (!(pixels_[other] == pixels_[reader]) && !pixels_[other].is_pixel())
    return false;
  e.combine = node.operation == Operation::kAdd        ? '+'
              : node.operation == Operation::kMultiply ? '*'
                                                       : '-';
  if (e.combine == '-' && !first) {  // other - x
    if (e.scale || e.shift) return false;
    e.combine = '+';
    Array minus;
    minus.shape = {1};
    minus.values = {-1};
    e.scale = Constant(minus, channels);
  }
  group->other = other;
  return true;
}

void Planner::Absorb(Group* group) {
  while (Uses(group->y) == 1 && readers_[group->y].size() == 1) {
    const int32_t reader = readers_[group->y][0];
    if (absorbed_[reader] || !AbsorbOne(group, reader)) break;
    absorbed_[reader] = true;
    group->y = reader;
  }
  FindSecond(group);
}

// Another value that is the first one, changed: what comes before the next
// convolution of a pre-activation network.
void Planner::FindSecond(Group* group) {
  const int32_t y = group->y;
  Step& e = group->epilogue;
  for (int32_t reader : readers_[y]) {
    const Node& node = At(reader);
    if (absorbed_[reader]) continue;
    if (node.operation == Operation::kAffine) {
      e.scale2 = Constant(node.scale, pixels_[y].channels);
      e.shift2 = Constant(node.shift, pixels_[y].channels);
      absorbed_[reader] = true;
      group->z = reader;
      if (Uses(reader) == 1 && readers_[reader].size() == 1) {
        const Node& next = At(readers_[reader][0]);
        if (next.operation == Operation::kActivation) {
          e.act2 = static_cast<int32_t>(next.activation);
          e.a2 = next.a;
          e.b2 = next.b;
          group->z = readers_[reader][0];
          absorbed_[group->z] = true;
        }
      }
      break;
    }
    if (node.operation == Operation::kActivation) {
      e.act2 = static_cast<int32_t>(node.activation);
      e.a2 = node.a;
      e.b2 = node.b;
      absorbed_[reader] = true;
      group->z = reader;
      break;
    }
  }
  group->keeps_y = group->z < 0 || Uses(y) > 1;
}

std::vector<Planner::Group> Planner::Groups() {
  std::vector<Group> groups;
  for (int32_t n = std::max(first_, 0); n <= last_; ++n) {
    if (absorbed_[n] || Same(n) != n) continue;
    Group group;
    group.base = group.y = n;
    if (n != first_) switch (At(n).operation) {
      case Operation::kConvolution:
      case Operation::kDense:
      case Operation::kPool:
      case Operation::kGlobalPool:
        Absorb(&group);
        break;
      case Operation::kAdd:
      case Operation::kSubtract:
      case Operation::kMultiply: {
        // One side goes in, the other one comes with the epilogue.
        int32_t in = Same(At(n).inputs[0]), other = Same(At(n).inputs[1]);
        group.epilogue.combine = At(n).operation == Operation::kAdd ? '+'
                                 : At(n).operation == Operation::kMultiply
                                     ? '*'
                                     : '-';
        if (!(pixels_[in] == pixels_[n])) {
          std::swap(in, other);
          if (group.epilogue.combine == '-') {
            group.epilogue.combine = '+';
            Array minus;
            minus.shape = {1};
            minus.values = {-1};
            group.epilogue.scale = Constant(minus, pixels_[n].channels);
          }
        }
        group.other = other;
        Absorb(&group);
        break;
      }
      case Operation::kAffine:
        group.epilogue.scale = Constant(At(n).scale, pixels_[n].channels);
        group.epilogue.shift = Constant(At(n).shift, pixels_[n].channels);
        Absorb(&group);
        break;
      case Operation::kActivation:
        group.epilogue.act = static_cast<int32_t>(At(n).activation);
        group.epilogue.a = At(n).a;
        group.epilogue.b = At(n).b;
        Absorb(&group);
        break;
      default:
        break;
    }
    computed_[group.y] = true;
    if (group.z >= 0) computed_[group.z] = true;
    groups.push_back(std::move(group));
  }
  return groups;
}

bool IsNotNegative(const Node& node) {
  return node.operation == Operation::kActivation &&
         (node.activation == Activation::kRelu ||
          node.activation == Activation::kSigmoid ||
          node.activation == Activation::kHardSigmoid ||
          node.activation == Activation::kExponential ||
          node.activation == Activation::kSoftplus ||
          (node.activation == Activation::kClip && node.a >= 0));
}

// Whether each channel is convolved by itself, with a window of 3 rows and
// columns, to every other column. What is read beyond a row is never used, and
// no more than a field has beyond its last one.
bool Planner::ReadsEveryOther(const Node& node, const Window& window) {
  constexpr int32_t kMost = Geometry::kSlack / 4;
  const std::vector<int64_t>& shape = node.kernel.shape;
  return shape[0] == 3 && shape[1] == 3 && shape[2] == 1 &&
         shape[3] == node.groups && node.strides[1] == 2 &&
         node.dilations[0] == 1 && node.dilations[1] == 1 &&
         window.taps.size() == 9 && window.margin.left <= kMost &&
         window.margin.right <= kMost;
}

Planner::Window Planner::WindowOf(int32_t n) const {
  const Node& node = At(n);
  const int32_t value = Same(node.inputs[0]);
  const Pixels &in = pixels_[value], &out = pixels_[n];
  static const int32_t ones[2] = {1, 1};
  Window window;
  if (node.operation == Operation::kDense) {
    window.strides = ones;
    window.taps = {{0, 0, 0}};
    window.copied = false;
    return window;
  }
  const bool convolves = node.operation == Operation::kConvolution;
  int32_t size[2] = {node.size[0], node.size[1]};
  if (convolves) {
    size[0] = node.kernel.shape[0];
    size[1] = node.kernel.shape[1];
  }
  const int32_t* dilations = convolves ? node.dilations : ones;
  int32_t top = node.padding.top, left = node.padding.left;
  if (node.padding.same) {
    const auto before = [](int64_t out, int64_t stride, int64_t size,
                           int64_t dilation, int64_t length) {
      return std::max<int64_t>(
                 0, (out - 1) * stride + (size - 1) * dilation + 1 - length) /
             2;
    };
    top = before(out.rows, node.strides[0], size[0], dilations[0], in.rows);
    left = before(out.columns, node.strides[1], size[1], dilations[1],
                  in.columns);
  }
  window.strides = node.strides;
  window.taps =
      LiveTaps(size, node.strides, dilations, top, left, in, out);
  window.margin = MarginFor(window.taps, node.strides, in, out);
  if (!convolves && node.maximum && window.margin.any() &&
      !IsNotNegative(At(value)))
    window.fill = kNone;
  window.every_other = convolves && layout_.positions && out.columns > 1 &&
                       ReadsEveryOther(node, window);
  window.copied =
      !window.taps.empty() && !window.every_other &&
      (window.fill != 0 ||
      (layout_.positions &&
       ((node.strides[1] > 1 && out.columns > 1) ||
        (in.is_pixel() && !out.is_pixel()))));
  // Pixels that are read, between others that are not, lie in a part of the
  // sets of the caches.
  window.thinned = !layout_.positions && convolves && !window.copied &&
                   window.taps.size() == 1 && !window.margin.any() &&
                   node.strides[1] > 1 && !out.is_pixel();
  window.copied |= window.thinned;
  return window;
}

void Planner::FindMargins(const std::vector<Group>& groups) {
  for (const Group& group : groups) {
    if (group.base == first_) continue;
    const Operation operation = At(group.base).operation;
    if (operation != Operation::kConvolution && operation != Operation::kPool)
      continue;
    const Window window = WindowOf(group.base);
    if (!window.copied)
      margins_[Same(At(group.base).inputs[0])].Widen(window.margin);
  }
}

Operand Planner::NewOperand(const Geometry& geometry) {
  Operand operand;
  operand.slot = static_cast<int32_t>(wanted_.size());
  operand.geometry = geometry;
  wanted_.push_back(geometry);
  return operand;
}

Operand Planner::NewValue(int32_t value) {
  return values_[value] = NewOperand(
             GeometryOf(pixels_[value], margins_[value], layout_));
}

// A step's input as the window reads it: the value, or a copy.
Operand Planner::CopyFor(const Window& window, const Pixels& out,
                         Step* step) {
  const int32_t value = Same(step->of->inputs[0]);
  const Operand from = ValueOf(value);
  const Geometry& g = from.geometry;
  const int64_t length = layout_.length();
  step->in_pitch = window.strides[0];
  if (!window.copied) {
    const int64_t column = layout_.positions ? 1 : length;
    for (const WindowTap& tap : window.taps)
      step->taps.push_back({tap.place, 0,
                            tap.row * g.pitch + tap.column * column});
    step->in_pitch *= g.pitch;
    step->every_other = window.every_other;
    step->in_step = layout_.positions && !window.every_other
                        ? length
                        : window.strides[1] * length;
    return from;
  }
  const bool thinned = window.thinned;
  const int32_t stride =
      layout_.positions || thinned ? window.strides[1] : 1;
  const int32_t first =
      thinned ? window.taps[0].column : -window.margin.left;
  const int32_t first_row = thinned ? window.taps[0].row : 0;
  const int32_t row_stride = thinned ? window.strides[0] : 1;
  Margin margin = window.margin;
  Pixels pixels = pixels_[value];
  std::vector<int32_t> numbers;
  if (layout_.positions) {
    // Phases begin where the window's first column is: no margin at the left.
    margin.left = margin.right = 0;
    int32_t most = 0;
    for (const WindowTap& tap : window.taps) {
      const int32_t phase = (tap.column - first) % stride;
      if (std::find(numbers.begin(), numbers.end(), phase) == numbers.end())
        numbers.push_back(phase);
      most = std::max(most, (tap.column - first) / stride);
    }
    std::sort(numbers.begin(), numbers.end());
    pixels.columns = out.columns + most;
  } else {
    numbers = {0};
    if (thinned) {
      pixels.rows = out.rows;
      pixels.columns = out.columns;
    }
  }
  Pixels all = pixels;
  all.channels *= static_cast<int32_t>(numbers.size());
  Geometry geometry = GeometryOf(all, margin, layout_, window.fill);
  if (all.is_pixel() && layout_.positions) geometry.last = 1;
  const auto key = std::make_tuple(
      value, first, stride, window.fill, numbers,
      std::vector<int64_t>{geometry.top, geometry.bottom, geometry.left,
                           geometry.right, geometry.columns, geometry.rows,
                           first_row, row_stride});
  auto found = copies_.find(key);
  if (found == copies_.end()) {
    found = copies_.emplace(key, NewOperand(geometry)).first;
    Step copy;
    copy.kind = StepKind::kPhases;
    copy.node = step->node;
    copy.in = from;
    copy.stride = stride;
    copy.first = layout_.positions || thinned ? first : 0;
    copy.row_stride = row_stride;
    copy.first_row = first_row;
    copy.phase_numbers = numbers;
    for (size_t i = 0; i < numbers.size(); ++i) {
      Operand phase = found->second;
      phase.channel = static_cast<int32_t>(i) * pixels.channels;
      phase.geometry.channels = pixels.channels;
      copy.phases.push_back(phase);
    }
    Push(std::move(copy));
  }
  if (thinned) {
    step->taps.push_back({window.taps[0].place, 0, 0});
    step->in_pitch = geometry.pitch;
    step->in_step = length;
    return found->second;
  }
  for (const WindowTap& tap : window.taps) {
    const int32_t number = layout_.positions ? (tap.column - first) % stride
                                             : 0;
    const int32_t phase = static_cast<int32_t>(
        std::find(numbers.begin(), numbers.end(), number) - numbers.begin());
    const int64_t column = layout_.positions ? (tap.column - first) / stride
                                             : tap.column * length;
    step->taps.push_back(
        {tap.place, phase, tap.row * geometry.pitch + column});
  }
  step->in_pitch *= geometry.pitch;
  step->in_step = layout_.positions ? length : window.strides[1] * length;
  return found->second;
}

void Planner::EmitOutputs(int32_t value) {
  if (!ends_) {
    if (Same(last_) != value) return;
    Step step;
    step.kind = StepKind::kUnpack;
    step.node = value;
    step.in = ValueOf(value);
    Push(std::move(step));
    return;
  }
  for (size_t i = 0; i < network_.outputs.size(); ++i) {
    if (Same(network_.outputs[i].node) != value) continue;
    Step step;
    step.kind = StepKind::kUnpack;
    step.node = value;
    step.number = static_cast<int32_t>(i);
    step.in = ValueOf(value);
    Push(std::move(step));
  }
}

void Planner::EmitConcatenation(int32_t n) {
  const Operand to = NewValue(n);
  int32_t channel = 0;
  for (int32_t input : At(n).inputs) {
    Step step;
    step.kind = StepKind::kElementwise;
    step.node = n;
    step.in = ValueOf(input);
    step.to = to;
    step.to.channel += channel;
    step.to.geometry.channels = step.in.geometry.channels;
    channel += step.in.geometry.channels;
    Push(std::move(step));
  }
}

void Planner::Emit(const Group& group) {
  const int32_t n = group.base;
  const Node& node = At(n);
  Step step = group.epilogue;
  step.node = n;
  step.of = &node;
  if (group.other >= 0) step.other = ValueOf(group.other);
  const auto store = [&] {
    if (group.keeps_y) step.to = NewValue(group.y);
    if (group.z >= 0) step.to2 = NewValue(group.z);
  };
  if (n == first_) {
    step.kind = StepKind::kPack;
    step.to = NewValue(n);
    Push(std::move(step));
    EmitOutputs(n);  // what was cut at may be one
    return;
  }
  switch (node.operation) {
    case Operation::kInput:
      step.kind = StepKind::kPack;
      step.number = 0;
      for (int32_t before = 0; before < n; ++before)
        step.number += At(before).operation == Operation::kInput;
      step.to = NewValue(n);
      Push(std::move(step));
      break;
    case Operation::kConvolution:
    case Operation::kDense:
    case Operation::kPool: {
      const Window window = WindowOf(n);
      const bool pools = node.operation == Operation::kPool;
      step.kind = pools ? StepKind::kPool : StepKind::kConvolution;
      step.in = CopyFor(window, pixels_[n], &step);
      store();
      if (pools) {
        for (const Step::Tap& tap : step.taps) step.offsets.push_back(
            tap.offset + tap.phase * int64_t{pixels_[n].channels} *
                             step.in.geometry.plane);
        if (!node.maximum) {
          // By the pixels of each window that lie in the image.
          const Geometry g = GeometryOf(pixels_[n], {}, layout_);
          const int32_t length = layout_.length();
          step.factors.assign(int64_t{g.rows} * g.cells * length, 0.0f);
          const Pixels& in = pixels_[Same(node.inputs[0])];
          for (int32_t i = 0; i < g.rows; ++i) {
            for (int32_t j = 0; j < g.columns; ++j) {
              int32_t pixels = 0;
              for (const WindowTap& tap : window.taps) {
                const int64_t row = tap.row + int64_t{i} * node.strides[0];
                const int64_t column =
                    tap.column + int64_t{j} * node.strides[1];
                pixels += row >= 0 && row < in.rows && column >= 0 &&
                          column < in.columns;
              }
              const float factor = 1.0f / pixels;
              float* to = step.factors.data() + int64_t{i} * g.cells * length;
              if (layout_.positions)
                to[j] = factor;
              else
                std::fill(to + j * length, to + (j + 1) * length, factor);
            }
          }
        }
        Push(std::move(step));
      } else {
        step.products = int64_t{pixels_[n].rows} * pixels_[n].columns *
                        static_cast<int64_t>(node.kernel.values.size());
        const auto chosen = choices_.find(n);
        const std::vector<Choice> some = ChoicesFor(
            step, GeometryOf(pixels_[n], {}, layout_), layout_);
        Choice choice = some.front();
        if (chosen != choices_.end() &&
            std::find(some.begin(), some.end(), chosen->second) != some.end())
          choice = chosen->second;
        if (node.bias.size() > 0)
          step.bias = Constant(node.bias, pixels_[n].channels);
        Choose(&step, choice, layout_);
        Push(std::move(step));
      }
      // What was computed for the other positions of a cell is none of them.
      if (layout_.positions && pixels_[n].is_pixel() &&
          (!pixels_[Same(node.inputs[0])].is_pixel() || window.copied)) {
        for (int32_t value : {group.keeps_y ? group.y : -1, group.z}) {
          if (value < 0) continue;
          Step splat;
    splat.kind = StepKind::kSplat;
          splat.node = n;
          splat.in = splat.to = ValueOf(value);
          Push(std::move(splat));
        }
      }
      break;
    }
    case Operation::kGlobalPool:
      step.kind = StepKind::kGlobalPool;
      step.in = ValueOf(node.inputs[0]);
      store();
      Push(std::move(step));
      break;
    case Operation::kAdd:
    case Operation::kSubtract:
    case Operation::kMultiply: {
      const int32_t first = Same(node.inputs[0]);
      step.kind = StepKind::kElementwise;
      step.in = ValueOf(pixels_[first] == pixels_[n] ? first : node.inputs[1]);
      if (!(pixels_[first] == pixels_[n])) step.other = ValueOf(first);
      store();
      Push(std::move(step));
      break;
    }
    case Operation::kAffine:
    case Operation::kActivation:
      step.kind = StepKind::kElementwise;
      step.in = ValueOf(node.inputs[0]);
      store();
      Push(std::move(step));
      break;
    case Operation::kConcatenate:
      EmitConcatenation(n);
      break;
    case Operation::kRecurrent:
      step.kind = StepKind::kRecurrent;
      step.in = ValueOf(node.inputs[0]);
      step.to = NewValue(n);
      step.recurrence = RecurrenceOf(node, *layout_.tiles);
      step.products = static_cast<int64_t>(step.recurrence->weights.size()) *
                      step.in.geometry.columns;
      Push(std::move(step));
      break;
    case Operation::kPad:
    case Operation::kUpsample:
    case Operation::kReshape:
    case Operation::kSoftmax:
      step.kind = node.operation == Operation::kPad       ? StepKind::kPad
                  : node.operation == Operation::kUpsample ? StepKind::kUpsample
                  : node.operation == Operation::kReshape  ? StepKind::kReshape
                                                           : StepKind::kSoftmax;
      step.in = ValueOf(node.inputs[0]);
      step.to = NewValue(n);
      Push(std::move(step));
      break;
  }
  if (group.keeps_y) EmitOutputs(group.y);
  if (group.z >= 0) EmitOutputs(group.z);
}

// Shares memory: operands of one geometry, but for their channels, use the
// same where they are not needed at the same time. What is a margin for one
// of them is a margin for all.
void Planner::Allocate() {
  std::vector<Operand*> of_step;
  const auto operands = [](Step& step) {
    std::vector<Operand*> all;
    for (Operand* o : {&step.in, &step.other, &step.to, &step.to2})
      if (*o) all.push_back(o);
    for (Operand& o : step.phases) all.push_back(&o);
    return all;
  };
  std::vector<int32_t> last(wanted_.size(), -1);
  for (size_t s = 0; s < plan_.steps.size(); ++s)
    for (const Operand* o : operands(plan_.steps[s])) last[o->slot] = s;
  struct Slot {
    Geometry geometry;
    int32_t owner;  // what lies in it; -1: it is free
  };
  std::vector<Slot> slots;
  std::vector<int32_t> slot_of(wanted_.size(), -1);
  const auto fits = [](const Geometry& a, const Geometry& b) {
    return std::make_tuple(a.rows, a.columns, a.top, a.bottom, a.left,
                           a.right, a.last, a.fill, a.pitch) ==
           std::make_tuple(b.rows, b.columns, b.top, b.bottom, b.left,
                           b.right, b.last, b.fill, b.pitch);
  };
  // Each number that is added is read once, where the sum is written: it lies
  // in a cache then, and may be overwritten after its last use.
  const auto overwrites = [&](const Step& step, const Operand& operand) {
    const Operand& other = step.other;
    return &operand == &step.to && other && other.slot != step.in.slot &&
           other.slot != operand.slot && last[other.slot] == &step -
           plan_.steps.data() && other.channel == 0 && operand.channel == 0 &&
           other.geometry.channels == operand.geometry.channels &&
           fits(wanted_[other.slot], wanted_[operand.slot]);
  };
  for (size_t s = 0; s < plan_.steps.size(); ++s) {
    for (Operand* o : operands(plan_.steps[s])) {
      const int32_t want = o->slot;
      if (slot_of[want] >= 0) continue;
      if (overwrites(plan_.steps[s], *o)) {
        slot_of[want] = slot_of[plan_.steps[s].other.slot];
        slots[slot_of[want]].owner = want;
        continue;
      }
      const Geometry& g = wanted_[want];
      int32_t best = -1;
      for (size_t i = 0; i < slots.size(); ++i) {
        if (slots[i].owner >= 0 || !fits(slots[i].geometry, g)) continue;
        const int32_t have = slots[i].geometry.channels;
        const int32_t had = best < 0 ? 0 : slots[best].geometry.channels;
        // The smallest that is large enough, or else the largest.
        if (best < 0 || (have >= g.channels
                             ? had < g.channels || have < had
                             : had < g.channels && have > had))
          best = i;
      }
      if (best < 0) {
        best = slots.size();
        slots.push_back({g, -1});
      }
      slots[best].owner = want;
      slots[best].geometry.channels =
          std::max(slots[best].geometry.channels, g.channels);
      slot_of[want] = best;
    }
    for (size_t want = 0; want < last.size(); ++want)
      if (last[want] == static_cast<int32_t>(s) && slot_of[want] >= 0 &&
          slots[slot_of[want]].owner == static_cast<int32_t>(want))
        slots[slot_of[want]].owner = -1;
  }
  for (Step& step : plan_.steps)
    for (Operand* o : operands(step)) o->slot = slot_of[o->slot];
  for (const Slot& slot : slots) {
    plan_.slots.push_back(slot.geometry.floats());
    plan_.fills.push_back(slot.geometry.fill);
  }
}

Plan Planner::Make() {
  FindReaders();
  const std::vector<Group> groups = Groups();
  FindMargins(groups);
  for (const Group& group : groups) Emit(group);
  Allocate();
  return std::move(plan_);
}

}  // namespace

std::vector<int32_t> Cuts(const Network& network) {
  const int32_t count = static_cast<int32_t>(network.nodes.size());
  // The first node that anything after it, or an output, reads.
  std::vector<int32_t> least(count + 1, count);
  for (const Output& output : network.outputs)
    least[count] = std::min(least[count], output.node);
  for (int32_t n = count - 1; n >= 0; --n) {
    least[n] = least[n + 1];
    for (int32_t input : network.nodes[n].inputs)
      least[n] = std::min(least[n], input);
    if (network.nodes[n].operation == Operation::kInput) least[n] = -1;
  }
  std::vector<int32_t> cuts;
  for (int32_t n = 0; n + 1 < count; ++n) {
    // An activation is computed with what it follows.
    if (network.nodes[n].operation != Operation::kInput &&
        network.nodes[n].operation != Operation::kReshape &&
        network.nodes[n + 1].operation != Operation::kActivation &&
        least[n + 1] >= n)
      cuts.push_back(n);
  }
  return cuts;
}

Plan MakePlan(const Network& network, const std::vector<Shape>& shapes,
              const Layout& layout, const Choices& choices,
              const Range& range) {
  return Planner(network, shapes, layout, choices, range).Make();
}

}  // namespace rigl_serving

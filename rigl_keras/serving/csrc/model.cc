#include "model.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <sstream>

namespace rigl_serving {
namespace {

// Input shapes for which plans are kept.
constexpr size_t kMostReady = 8;
// Instances that are kept for later calls, of each plan and thread count.
constexpr size_t kMostFree = 16;

double Now() {
  return std::chrono::duration<double>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int64_t FloatsOf(const Shape& shape) {
  int64_t floats = 1;
  for (int64_t length : shape) floats *= length;
  return floats;
}

}  // namespace

Prepared::Loan::Loan(Prepared* from, int threads)
    : from_(from), threads_(threads) {
  {
    std::lock_guard<std::mutex> lock(from->mutex_);
    auto& free = from->free_[threads];
    if (!free.empty()) {
      instance_ = std::move(free.back());
      free.pop_back();
    }
  }
  if (!instance_) instance_ = std::make_unique<Instance>(from->plan_, threads);
}

Prepared::Loan::~Loan() {
  if (!instance_) return;
  std::lock_guard<std::mutex> lock(from_->mutex_);
  auto& free = from_->free_[threads_];
  if (free.size() < kMostFree) free.push_back(std::move(instance_));
}

Model::Model(const void* bytes, size_t size, int threads)
    : network_(Parse(bytes, size)), team_(threads) {
  for (size_t n = 0; n < network_.nodes.size(); ++n)
    if (network_.nodes[n].operation == Operation::kInput)
      inputs_.push_back(static_cast<int32_t>(n));
  if (getenv("IL")) images_length_ = atoi(getenv("IL"));  if (getenv("PL")) positions_length_ = atoi(getenv("PL"));
  ReadHints();
}

std::vector<Shape> Model::OutputShapes(
    const std::vector<Shape>& inputs) const {
  const std::vector<Shape> all = Shapes(network_, inputs);
  std::vector<Shape> shapes;
  for (const Output& output : network_.outputs)
    shapes.push_back(all[output.node]);
  return shapes;
}

Shape Model::OutputShape(int32_t output) const {
  // Axes that two lengths of the free ones both leave as they are, are fixed.
  std::vector<Shape> found;
  for (int64_t length : {64, 96}) {
    std::vector<Shape> inputs;
    for (int32_t node : inputs_) {
      inputs.push_back(network_.nodes[node].shape);
      for (int64_t& axis : inputs.back())
        if (axis < 0) axis = length;
    }
    try {
      found.push_back(OutputShapes(inputs)[output]);
    } catch (const Error&) {
      // These lengths do not fit: how many axes there are is known.
    }
  }
  if (found.empty()) return {};
  Shape shape = found.front();
  for (size_t i = 0; i < shape.size(); ++i)
    if (found.size() < 2 || found.back()[i] != shape[i]) shape[i] = -1;
  return shape;
}

Layout Model::LayoutFor(bool positions) const {
  const int32_t wanted = positions ? (positions_length_ ? positions_length_ : 8)
                                   : images_length_;
  const Tiles* tiles = TilesOf(wanted);
  return {tiles ? tiles : TilesOf(0), positions};
}

std::string Model::KeyOf(bool positions) const {
  const Layout layout = LayoutFor(positions);
  return std::string(layout.tiles->name) + (positions ? " p" : " i") +
         std::to_string(layout.length());
}

std::shared_ptr<Model::Ready> Model::ReadyFor(
    const std::vector<Shape>& shapes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ready_.find(shapes);
  if (found != ready_.end()) return found->second;
  auto ready = std::make_shared<Ready>();
  ready->shapes = Shapes(network_, shapes);
  if (ready_.size() >= kMostReady) ready_.erase(ready_.begin());
  ready_[shapes] = ready;
  return ready;
}

Prepared& Model::PlanFor(Ready* ready, bool positions) {
  std::lock_guard<std::mutex> lock(ready->mutex);
  std::unique_ptr<Prepared>& plan =
      positions ? ready->positions : ready->images;
  if (!plan) {
    Choices choices;
    {
      std::lock_guard<std::mutex> all(mutex_);
      const auto found = choices_.find(KeyOf(positions));
      if (found != choices_.end()) choices = found->second;
    }
    plan = std::make_unique<Prepared>(network_, ready->shapes,
                                      LayoutFor(positions), choices);
  }
  return *plan;
}

Model::Shares Model::SharesFor(int64_t batch) const {
  const int64_t threads = team_.threads();
  const int64_t length = LayoutFor(false).length();
  Costs costs;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = costs_.find(KeyOf(true) + " " +
                                   std::to_string(threads));
    if (found != costs_.end()) costs = found->second;
  }
  // In units of an image alone, where nothing was measured.
  if (costs.alone <= 0) costs.alone = 1;
  if (costs.shared <= 0)
    costs.shared = threads == 1 ? costs.alone : 1.25 / threads * costs.alone;
  if (costs.images <= 0) costs.images = 0.7 * length * costs.alone;
  Shares best;
  double least = std::numeric_limits<double>::infinity();
  const int64_t most = (batch + length - 1) / length;
  // All but the last few groups are certain.
  for (int64_t groups = std::max<int64_t>(0, most - 2 * threads);
       groups <= most; ++groups) {
    const int64_t left = std::max<int64_t>(0, batch - groups * length);
    for (int64_t alone : {left, left / threads * threads, int64_t{0}}) {
      const double seconds =
          std::ceil(double(groups) / threads) * costs.images +
          std::ceil(double(alone) / threads) * costs.alone +
          (left - alone) * costs.shared;
      if (seconds < least) {
        least = seconds;
        best = {groups, alone, left - alone};
      }
    }
  }
  return best;
}

Unit Model::UnitOf(const float* const* inputs, float* const* outputs,
                   const Ready& ready, int64_t first, int64_t count) const {
  Unit unit;
  unit.count = static_cast<int32_t>(count);
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const int64_t floats = FloatsOf(ready.shapes[inputs_[i]]);
    // Not written: a unit has one type for both.
    unit.inputs.push_back(
        {const_cast<float*>(inputs[i]) + first * floats, floats});
  }
  for (size_t i = 0; i < network_.outputs.size(); ++i) {
    const int64_t floats = FloatsOf(ready.shapes[network_.outputs[i].node]);
    unit.outputs.push_back({outputs[i] + first * floats, floats});
  }
  return unit;
}

void Model::Run(const float* const* inputs, const std::vector<Shape>& shapes,
                int64_t batch, float* const* outputs) {
  if (batch == 0) return;
  const std::shared_ptr<Ready> ready = ReadyFor(shapes);
  RunShares(ready.get(), SharesFor(batch), inputs, batch, outputs);
}

void Model::RunShares(Ready* ready, const Shares& shares,
                      const float* const* inputs, int64_t batch,
                      float* const* outputs) {
  const int threads = team_.threads();
  const int64_t length = LayoutFor(false).length();
  // All memory is there before threads start: they cannot fail.
  std::vector<Prepared::Loan> images, alone, shared;
  const auto borrow = [&](std::vector<Prepared::Loan>* loans, bool positions,
                          int64_t count, int each) {
    if (!count) return;
    Prepared& plan = PlanFor(ready, positions);
    for (int64_t i = 0; i < count; ++i) loans->emplace_back(&plan, each);
  };
  borrow(&images, false, std::min<int64_t>(threads, shares.groups), 1);
  borrow(&alone, true, std::min<int64_t>(threads, shares.alone), 1);
  borrow(&shared, true, shares.shared ? 1 : 0, threads);
  std::vector<Unit> units;
  const int64_t after_groups = std::min(shares.groups * length, batch);
  for (int64_t g = 0; g < shares.groups; ++g)
    units.push_back(UnitOf(inputs, outputs, *ready, g * length,
                           std::min(length, batch - g * length)));
  for (int64_t i = after_groups; i < batch; ++i)
    units.push_back(UnitOf(inputs, outputs, *ready, i, 1));

  std::atomic<int64_t> next_group{0}, next_alone{0};
  Barrier barrier(threads);
  team_.Run([&](int thread, int count) {
    for (int64_t g; thread < static_cast<int>(images.size()) &&
                    (g = next_group++) < shares.groups;)
      images[thread]->Run(units[g]);
    for (int64_t i; thread < static_cast<int>(alone.size()) &&
                    (i = next_alone++) < shares.alone;)
      alone[thread]->Run(units[shares.groups + i]);
    for (int64_t i = 0; i < shares.shared; ++i) {
      const Unit& unit = units[shares.groups + shares.alone + i];
      Instance& instance = *shared[0];
      if (count == 1) {
        instance.Run(unit);
        continue;
      }
      for (int32_t s = 0; s < instance.steps(); ++s) {
        instance.Run(s, thread, count, unit);
        barrier.Wait();
      }
    }
  });
}

// Hints are lines: `<instruction set> <i or p><L> choice <node> <d or s>
// <rows> <cells> <block>`, and `... costs <threads> <images> <alone>
// <shared>`, and `<instruction set> <positions or images> <L>`. What is no such line is passed over: choices that no plan has
// are not followed.

void Model::ReadHints() {
  std::istringstream lines(network_.hints);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string set, layout, what;
    if (!(words >> set >> layout >> what)) continue;
    const std::string key = set + " " + layout;
    if (layout == "positions" || layout == "images") {
      if (set == TilesOf(0)->name)
        (layout == "images" ? images_length_ : positions_length_) =
            std::atoi(what.c_str());
    } else if (what == "choice") {
      int32_t node;
      std::string product;
      Choice choice;
      if (!(words >> node >> product >> choice.tile[0] >> choice.tile[1] >>
            choice.block))
        continue;
      if (product != "s" && product != "d" && product != "g") continue;
      choice.product = static_cast<Product>(product[0]);
      choices_[key][node] = choice;
    } else if (what == "costs") {
      std::string threads;
      Costs costs;
      if (words >> threads >> costs.images >> costs.alone >> costs.shared)
        costs_[key + " " + threads] = costs;
    }
  }
}

std::string Model::Hints() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::ostringstream text;
  if (positions_length_)
    text << TilesOf(0)->name << " positions " << positions_length_ << "\n";
  if (images_length_)
    text << TilesOf(0)->name << " images " << images_length_ << "\n";
  for (const auto& [key, choices] : choices_)
    for (const auto& [node, c] : choices)
      text << key << " choice " << node << " "
           << static_cast<char>(c.product) << " " << c.tile[0] << " " << c.tile[1] << " " << c.block << "\n";
  for (const auto& [key, c] : costs_) {
    const size_t at = key.rfind(' ');
    text << key.substr(0, at) << " costs " << key.substr(at + 1) << " "
         << c.images << " " << c.alone << " " << c.shared << "\n";
  }
  return text.str();
}

std::string Model::Profile(const std::vector<Shape>& shapes, int64_t batch) {
  const std::shared_ptr<Ready> ready = ReadyFor(shapes);
  const Shares shares = SharesFor(batch);
  const bool positions = shares.groups == 0;
  const int threads = shares.shared && !shares.alone ? team_.threads() : 1;
  Prepared& prepared = PlanFor(ready.get(), positions);
  Prepared::Loan instance(&prepared, threads);
  const int64_t count = positions ? 1 : LayoutFor(false).length();
  std::vector<std::vector<float>> memory;
  std::vector<float*> in, out;
  const auto room = [&](int32_t node, std::vector<float*>* to) {
    memory.emplace_back(FloatsOf(ready->shapes[node]) * count, 0.5f);
    to->push_back(memory.back().data());
  };
  memory.reserve(inputs_.size() + network_.outputs.size());
  for (int32_t node : inputs_) room(node, &in);
  for (const Output& output : network_.outputs) room(output.node, &out);
  const Unit unit = UnitOf(in.data(), out.data(), *ready, 0, count);
  std::vector<double> least(instance->steps(),
                            std::numeric_limits<double>::infinity());
  Barrier barrier(threads);
  for (int round = 0; round < 30; ++round) {
    const auto run = [&](int thread, int of) {
      for (int32_t s = 0; s < instance->steps(); ++s) {
        const double start = Now();
        instance->Run(s, thread, of, unit);
        if (of > 1) barrier.Wait();
        if (thread == 0) least[s] = std::min(least[s], Now() - start);
      }
    };
    if (threads > 1)
      team_.Run(run);
    else
      run(0, 1);
  }
  static const char* const names[] = {
      "pack", "unpack", "convolution", "elementwise", "pool", "global_pool",
      "phases", "splat", "pad", "upsample", "reshape", "softmax"};
  std::ostringstream text;
  text << KeyOf(positions) << ", " << threads << " threads, " << count
       << " images\n";
  for (int32_t s = 0; s < instance->steps(); ++s) {
    const Step& step = prepared.plan().steps[s];
    char line[256];
    const Geometry& g =
        (step.to ? step.to : step.to2 ? step.to2 : step.in).geometry;
    std::snprintf(line, sizeof line,
                  "%4d %-11s %-28.28s %4dx%-4d %5d %c %2dx%-2d %5d %9.1f us "
                  "%6.1f GFLOP/s\n",
                  step.node, names[static_cast<int>(step.kind)],
                  network_.nodes[step.node].name.c_str(), g.rows, g.columns,
                  g.channels, static_cast<char>(step.choice.product),
                  step.choice.tile[0], step.choice.tile[1], step.choice.block,
                  least[s] * 1e6,
                  2e-9 * step.products * count / least[s]);
    text << line;
  }
  return text.str();
}

}  // namespace rigl_serving

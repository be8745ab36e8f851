// Measures what `Model` may choose from.

#include <algorithm>
#include <chrono>
#include <limits>

#include "model.h"

namespace rigl_serving {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// How much of the time is for choices; the rest is for whole calls.
constexpr double kForChoices = 0.7;
// The fewest rounds in which choices take turns.
constexpr int kRounds = 3;
constexpr double kTurn = 2e-4;  // seconds

double Now() {
  return std::chrono::duration<double>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Numbers for all inputs and outputs of a network.
class Examples {
 public:
  Examples(const Network& network, const std::vector<Shape>& shapes,
           int64_t batch) {
    uint32_t state = 1;
    const auto room = [&](int32_t node) {
      int64_t floats = batch;
      for (int64_t length : shapes[node]) floats *= length;
      memory_.emplace_back(floats);
      for (float& x : memory_.back()) {
        state = state * 1664525u + 1013904223u;
        x = static_cast<float>(state >> 8) / (1 << 23) - 1;
      }
    };
    for (size_t n = 0; n < network.nodes.size(); ++n)
      if (network.nodes[n].operation == Operation::kInput)
        room(static_cast<int32_t>(n));
    const size_t first = memory_.size();
    for (const Output& output : network.outputs) room(output.node);
    for (size_t i = 0; i < memory_.size(); ++i)
      (i < first ? inputs_ : outputs_).push_back(memory_[i].data());
  }

  float* const* inputs() const { return inputs_.data(); }
  float* const* outputs() const { return outputs_.data(); }

 private:
  std::vector<std::vector<float>> memory_;
  std::vector<float*> inputs_, outputs_;
};

}  // namespace

double Model::SecondsOf(const std::vector<Shape>& shapes, int64_t batch,
                        const Shares& shares, double seconds) {
  const std::shared_ptr<Ready> ready = ReadyFor(shapes);
  const Examples examples(network_, ready->shapes, batch);
  double least = kInfinity;
  const double until = Now() + seconds;
  for (int round = 0; round < kRounds || Now() < until; ++round) {
    const double start = Now();
    RunShares(ready.get(), shares, examples.inputs(), batch,
              examples.outputs());
    least = std::min(least, Now() - start);
  }
  return least;
}

Choices Model::Measured(const Ready& ready, bool positions, int threads,
                        double seconds) {
  const Layout layout = LayoutFor(positions);
  Plan plan = MakePlan(network_, ready.shapes, layout, {});
  Instance instance(plan, threads);
  const int64_t count = positions ? 1 : layout.length();
  const Examples examples(network_, ready.shapes, count);
  const Unit unit =
      UnitOf(examples.inputs(), examples.outputs(), ready, 0, count);
  Barrier barrier(threads);

  // Seconds of a step, of some turns.
  const auto time = [&](int32_t s, int turns) {
    double taken = 0;
    const auto run = [&](int thread, int of) {
      if (of > 1) barrier.Wait();
      const double start = Now();
      for (int i = 0; i < turns; ++i) {
        instance.Run(s, thread, of, unit);
        if (of > 1) barrier.Wait();
      }
      if (thread == 0) taken = (Now() - start) / turns;
    };
    if (threads > 1)
      team_.Run(run);
    else
      run(0, 1);
    return taken;
  };

  // Values are what they would be: denormals, say, are slow.
  for (int32_t s = 0; s < instance.steps(); ++s) time(s, 1);
  std::vector<int32_t> open;
  for (int32_t s = 0; s < instance.steps(); ++s)
    if (plan.steps[s].kind == StepKind::kConvolution) open.push_back(s);
  Choices measured;
  for (size_t k = 0; k < open.size(); ++k) {
    const int32_t s = open[k];
    Step& step = plan.steps[s];
    const double until = Now() + seconds / open.size();
    const Geometry& out = (step.to ? step.to : step.to2).geometry;
    std::vector<Choice> choices = ChoicesFor(step, out, layout);
    std::vector<double> least(choices.size(), kInfinity);
    size_t best = 0;
    for (int round = 0; round < kRounds || Now() < until; ++round) {
      for (size_t i = 0; i < choices.size(); ++i) {
        // Far behind the best one is behind it for good.
        if (round > 0 && least[i] > 1.3 * least[best]) continue;
        Choose(&step, choices[i], layout);
        instance.Bind(s);
        const double once = time(s, 1);
        const int turns = static_cast<int>(
            std::clamp(kTurn / std::max(once, 1e-7), 1.0, 50.0));
        least[i] = std::min(least[i], time(s, turns));
        if (least[i] < least[best]) best = i;
      }
      if (Now() > until + seconds) break;  // a machine that is very busy
    }
    Choose(&step, choices[best], layout);
    instance.Bind(s);
    measured[step.node] = step.choice;
  }
  return measured;
}

void Model::Tune(const std::vector<Shape>& shapes, int64_t batch,
                 double seconds) {
  const int threads = team_.threads();
  const int64_t length = LayoutFor(false).length();
  const bool grouped = batch >= length / 2;
  const auto forget = [&] {
    std::lock_guard<std::mutex> lock(mutex_);
    ready_.clear();
  };
  const auto choose = [&](bool positions, int of, double share) {
    const std::shared_ptr<Ready> ready = ReadyFor(shapes);
    const Choices measured =
        Measured(*ready, positions, of, share * seconds);
    std::lock_guard<std::mutex> lock(mutex_);
    choices_[KeyOf(positions)] = measured;
  };
  // How wide vectors of positions are best is for the smallest batch to say.
  if (batch < threads || choices_.find(KeyOf(true)) == choices_.end()) {
    std::vector<int32_t> lengths;
    for (int32_t one : {8, 16, 4})
      if (TilesOf(one)) lengths.push_back(one);
    double least = kInfinity;
    int32_t best = lengths.front();
    for (int32_t one : lengths) {
      positions_length_ = one;
      choose(true, batch < threads ? threads : 1,
             kForChoices / 2 / lengths.size());
      forget();
      const double taken = SecondsOf(shapes, 1, {0, 0, 1}, seconds / 20);
      if (taken < least) {
        least = taken;
        best = one;
      }
      forget();
    }
    positions_length_ = best;
  }
  if (grouped) choose(false, 1, kForChoices / 2);
  forget();

  Costs costs;
  const double share = (1 - kForChoices) / 3 * seconds;
  costs.shared = SecondsOf(shapes, 1, {0, 0, 1}, share);
  costs.alone = SecondsOf(shapes, threads, {0, threads, 0}, share);
  if (grouped)
    costs.images =
        SecondsOf(shapes, threads * length, {threads, 0, 0}, share);
  std::lock_guard<std::mutex> lock(mutex_);
  Costs& kept = costs_[KeyOf(true) + " " + std::to_string(threads)];
  if (!grouped) costs.images = kept.images;
  kept = costs;
}

}  // namespace rigl_serving

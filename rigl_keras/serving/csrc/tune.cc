// Measures what `Model` may choose from.

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "model.h"

namespace rigl_serving {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// How much of the time is for choices; the rest is for whole calls.
constexpr double kForChoices = 0.7;
// Of that for choices, how much is for whole ways through a network.
constexpr double kForWays = 0.3;
// The fewest rounds in which choices take turns.
constexpr int kRounds = 3;
constexpr double kTurn = 2e-4;  // seconds
// What a number costs that goes from one layout to another, in seconds.
constexpr double kPerFloat = 1e-9;

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

Model::Measurement Model::Measured(const Ready& ready, const Leg& leg,
                                   bool shared, double seconds) {
  const Layout layout = LayoutOf(leg);
  const int threads = team_.threads();
  const int64_t count = leg.positions ? 1 : layout.length();
  Plan plan = MakePlan(network_, ready.shapes, layout, {});
  // Threads that compute units of their own are in one another's way, too:
  // all are busy while one of them is measured.
  std::vector<std::unique_ptr<Instance>> instances;
  std::vector<Examples> examples;
  std::vector<Unit> units;
  for (int t = 0; t < (shared ? 1 : threads); ++t) {
    instances.push_back(
        std::make_unique<Instance>(plan, shared ? threads : 1));
    examples.emplace_back(network_, ready.shapes, count);
    units.push_back(UnitOf(examples[t].inputs(), examples[t].outputs(), ready,
                           0, count));
  }
  const auto bind = [&](int32_t s) {
    for (auto& instance : instances) instance->Bind(s);
  };
  Barrier barrier(threads);
  // Seconds of a step, of some turns.
  const auto time = [&](int32_t s, int turns) {
    double taken = 0;
    team_.Run([&](int thread, int of) {
      if (of > 1) barrier.Wait();
      const double start = Now();
      for (int i = 0; i < turns; ++i) {
        if (!shared) {
          instances[thread]->Run(s, 0, 1, units[thread], nullptr);
          continue;
        }
        instances[0]->Run(s, thread, of, units[0], &barrier);
        if (of > 1) barrier.Wait();
      }
      if (thread == 0) taken = (Now() - start) / turns;
    });
    return taken;
  };
  const auto turns_of = [](double once) {
    return static_cast<int>(
        std::clamp(kTurn / std::max(once, 1e-7), 1.0, 50.0));
  };

  // Values are what they would be: denormals, say, are slow.
  for (size_t s = 0; s < plan.steps.size(); ++s) time(s, 1);
  int64_t all = 0;
  for (const Step& step : plan.steps) all += step.products;
  Measurement measured;
  for (size_t s = 0; s < plan.steps.size(); ++s) {
    Step& step = plan.steps[s];
    double taken = time(s, turns_of(time(s, 1)));
    if (step.kind == StepKind::kConvolution) {
      const double until =
          Now() + seconds * step.products / std::max<int64_t>(all, 1);
      const Geometry& out = (step.to ? step.to : step.to2).geometry;
      const std::vector<Choice> choices = ChoicesFor(step, out, layout);
      std::vector<double> least(choices.size(), kInfinity);
      size_t best = 0;
      for (int round = 0; round < kRounds || Now() < until; ++round) {
        int open = 0;
        for (size_t i = 0; i < choices.size(); ++i) {
          // Far behind the best one is behind it for good.
          if (round > 1 && least[i] > (round > 2 ? 1.08 : 1.25) * least[best])
            continue;
          ++open;
          Choose(&step, choices[i], layout);
          bind(s);
          const double once = time(s, 1);
          const int turns = turns_of(once);
          least[i] = std::min(
              least[i], turns > 1 ? std::min(once, time(s, turns)) : once);
          if (least[i] < least[best]) best = i;
        }
        if (open == 1 && round >= kRounds) break;
      }
      Choose(&step, choices[best], layout);
      bind(s);
      measured.choices[step.node] = step.choice;
      taken = least[best];
    }
    measured.seconds[step.node] += taken;
  }
  return measured;
}

// Measures the layouts that a mode may have, and where one of them is to take
// over from another.
void Model::TuneMode(const std::vector<Shape>& shapes, Mode mode,
                     double seconds) {
  const std::shared_ptr<Ready> ready = ReadyFor(shapes);
  const int threads = team_.threads();
  // As many units as keep all threads busy.
  const Shares whole = mode == Mode::kGroups  ? Shares{threads, 0, 0, 0}
                       : mode == Mode::kAlone ? Shares{0, threads, 0, 0}
                                              : Shares{0, 0, 1, 0};
  const int64_t images = mode == Mode::kGroups  ? threads * GroupLength()
                         : mode == Mode::kAlone ? threads
                                                : 1;
  std::map<std::string, Choices> choices_before;
  std::map<Mode, Route> routes_before;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    choices_before = choices_;
    routes_before = routes_;
  }
  std::vector<Leg> legs;
  for (int32_t length : {16, 8, 4}) {
    Leg leg;
    leg.length = length;
    leg.together = mode == Mode::kShared;
    if (TilesFor(length)) legs.push_back(leg);
  }
  if (mode == Mode::kGroups) {
    legs.resize(1);
    Leg images;
    images.positions = false;
    images.length = static_cast<int32_t>(GroupLength());
    legs.push_back(images);
  }
  std::vector<Measurement> measured;
  for (const Leg& leg : legs) {
    measured.push_back(Measured(*ready, leg, mode == Mode::kShared,
                                (1 - kForWays) * seconds / legs.size()));
    std::lock_guard<std::mutex> lock(mutex_);
    choices_[KeyOf(leg)] = measured.back().choices;
  }
  // All of one layout, or the first ones until a cut and then another.
  const int32_t count = static_cast<int32_t>(network_.nodes.size());
  const auto cost = [&](size_t leg, int32_t first, int32_t last) {
    const double times =
        mode == Mode::kGroups && legs[leg].positions ? GroupLength() : 1;
    double sum = 0;
    for (const auto& [node, taken] : measured[leg].seconds)
      if (node > first && node <= last) sum += taken * times;
    return sum;
  };
  Route best;
  double least = kInfinity;
  for (size_t leg = 0; leg < legs.size(); ++leg) {
    if (cost(leg, -1, count) < least) {
      least = cost(leg, -1, count);
      best = {legs[leg]};
    }
  }
  for (size_t early = 0; early < legs.size(); ++early) {
    for (size_t late = 0; late < legs.size(); ++late) {
      if (early == late || (!legs[early].positions && legs[late].positions))
        continue;
      for (int32_t cut : cuts_) {
        int64_t floats = mode == Mode::kGroups ? GroupLength() : 1;
        for (int64_t length : ready->shapes[cut]) floats *= length;
        const double taken = cost(early, -1, cut) + cost(late, cut, count) +
                             kPerFloat * floats;
        if (taken >= 0.99 * least) continue;
        least = taken;
        best = {legs[early], legs[late]};
        best[0].range.last = best[1].range.first = cut;
      }
    }
  }
  // What is best step by step, each in a warm cache, need not be best in all:
  // the route is tried with the choices that were there, and with the new ones.
  // All ways take turns, as the machine may be slower for some of the time.
  struct Way {
    std::map<std::string, Choices> choices;
    std::map<Mode, Route> routes;
    std::map<std::vector<Shape>, std::shared_ptr<Ready>> ready;
    double least = kInfinity;
  };
  Way ways[4];
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ready_.clear();
    for (int w = 0; w < 4; ++w) {
      ways[w].choices = w < 2 ? choices_before : choices_;
      ways[w].routes = routes_before;
      if (w % 2) ways[w].routes[mode] = best;
    }
  }
  const auto follow = [&](Way& way) {
    std::lock_guard<std::mutex> lock(mutex_);
    choices_ = way.choices;
    routes_ = way.routes;
    ready_.swap(way.ready);
  };
  const double until = Now() + kForWays * seconds;
  for (int round = 0; round < kRounds || Now() < until; ++round) {
    for (Way& way : ways) {
      // Far behind the best one is behind it for good.
      if (round >= kRounds && way.least > 1.1 * ways[0].least) continue;
      follow(way);
      way.least = std::min(way.least, SecondsOf(shapes, images, whole, 0));
      std::lock_guard<std::mutex> lock(mutex_);
      ready_.swap(way.ready);
    }
  }
  Way* fastest = &ways[0];
  for (Way& way : ways)
    if (way.least < 0.99 * fastest->least) fastest = &way;
  follow(*fastest);
}

void Model::Tune(const std::vector<Shape>& shapes, int64_t batch,
                 double seconds) {
  const int threads = team_.threads();
  const int64_t length = GroupLength();
  const bool grouped = batch >= length / 2;
  const bool alone = batch >= threads && threads > 1;
  const int modes = grouped + alone + (batch < threads || threads == 1);
  const double each = kForChoices * seconds / modes;
  if (batch < threads || threads == 1)
    TuneMode(shapes, Mode::kShared, each);
  if (alone) TuneMode(shapes, Mode::kAlone, each);
  if (grouped) TuneMode(shapes, Mode::kGroups, each);

  Costs costs;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    costs = costs_[threads];
  }
  const double share = (1 - kForChoices) / 3 * seconds;
  costs.shared = SecondsOf(shapes, 1, {0, 0, 1, 0}, share);
  costs.alone = SecondsOf(shapes, threads, {0, threads, 0, 0}, share);
  if (grouped) {
    costs.groups =
        SecondsOf(shapes, threads * length, {threads, 0, 0, 0}, share / 2);
    costs.together = SecondsOf(shapes, length, {0, 0, 0, 1}, share / 2);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  costs_[threads] = costs;
}

}  // namespace rigl_serving

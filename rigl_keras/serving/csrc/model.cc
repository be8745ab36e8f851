#include "model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>

namespace rigl_serving {
namespace {

// Input shapes for which plans are kept.
constexpr size_t kMostReady = 8;
// Vehicles that are kept for later calls, of each mode.
constexpr size_t kMostFree = 16;
// Above what a unit of work takes.
constexpr double kMostSeconds = 1e6;

int64_t FloatsOf(const Shape& shape) {
  int64_t floats = 1;
  for (int64_t length : shape) floats *= length;
  return floats;
}

// Floats of a value in one image up to which a group of images is computed
// side by side: more of them do not stay in a cache.
constexpr int64_t kGroupFloats = 200'000;

}  // namespace

std::string KeyOf(const Leg& leg) {
  return (leg.together ? "s" : leg.positions ? "p" : "i") +
         std::to_string(leg.length);
}

Model::Model(const void* bytes, size_t size, int threads)
    : network_(Parse(bytes, size)),
      tiles_{TilesOf(16), TilesOf(8), TilesOf(4)},
      cuts_(Cuts(network_)), team_(threads) {
  for (size_t n = 0; n < network_.nodes.size(); ++n)
    if (network_.nodes[n].operation == Operation::kInput)
      inputs_.push_back(static_cast<int32_t>(n));
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
  std::vector<Shape> inputs;
  for (int32_t node : inputs_) inputs.push_back(network_.nodes[node].shape);
  return OutputShapes(inputs)[output];  // -1 where it follows from a free one
}

const Tiles* Model::TilesFor(int32_t length) const {
  for (const Tiles* tiles : tiles_)
    if (tiles && (length == 0 || tiles->length == length)) return tiles;
  return nullptr;
}

Layout Model::LayoutOf(const Leg& leg) const {
  return {TilesFor(leg.length), leg.positions};
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

const Plan& Model::PlanFor(Ready* ready, const Leg& leg) {
  std::lock_guard<std::mutex> lock(ready->mutex);
  const std::string key = KeyOf(leg);
  std::unique_ptr<Plan>& plan = ready->plans[{key, leg.range}];
  if (!plan) {
    Choices choices;
    {
      std::lock_guard<std::mutex> all(mutex_);
      const auto found = choices_.find(key);
      if (found != choices_.end()) choices = found->second;
    }
    plan = std::make_unique<Plan>(MakePlan(network_, ready->shapes,
                                           LayoutOf(leg), choices, leg.range));
  }
  return *plan;
}

// Rules, where nothing was measured. Generated code wants wide vectors, and
// these want wide images; the values of a group of images are to stay in a
// cache.
Route Model::DefaultRoute(const Ready& ready, Mode mode) const {
  const int32_t widest = TilesFor()->length;
  Leg early, late;
  early.length = widest;
  early.together = late.together = mode == Mode::kShared;
  late.positions = mode != Mode::kGroups;
  late.length = late.positions && TilesFor(8) ? 8 : widest;
  if (!CanGenerate(*TilesFor())) return {late};
  // Early is what comes before images get narrow; of groups, as long as the
  // values of a group would leave the cache.
  int32_t early_until = -1;
  const int32_t count = static_cast<int32_t>(ready.shapes.size());
  for (int32_t n = 0; n < count; ++n) {
    const Shape& shape = ready.shapes[n];
    const int64_t columns = shape.size() < 2 ? 1 : shape[shape.size() - 2];
    if (mode == Mode::kGroups ? FloatsOf(shape) > kGroupFloats
                              : columns >= widest)
      early_until = n;
  }
  int32_t at = -1;
  for (int32_t cut : cuts_)
    if (at < early_until) at = cut;
  if (at < early_until) return {mode == Mode::kGroups ? late : early};
  if (at < 0) return {late};
  early.range.last = late.range.first = at;
  return {early, late};
}

const Route& Model::RouteFor(Ready* ready, Mode mode) {
  if (mode == Mode::kTogether) mode = Mode::kGroups;
  std::lock_guard<std::mutex> lock(ready->mutex);
  auto found = ready->routes.find(mode);
  if (found == ready->routes.end()) {
    Route route;
    {
      std::lock_guard<std::mutex> all(mutex_);
      const auto measured = routes_.find(mode);
      if (measured != routes_.end()) route = measured->second;
    }
    if (route.empty()) route = DefaultRoute(*ready, mode);
    found = ready->routes.emplace(mode, std::move(route)).first;
  }
  return found->second;
}

Model::Borrowed Model::VehicleFor(Ready* ready, Mode mode) {
  {
    std::lock_guard<std::mutex> lock(ready->mutex);
    auto& free = ready->free[mode];
    if (!free.empty()) {
      Borrowed borrowed(ready, mode, std::move(free.back()));
      free.pop_back();
      return borrowed;
    }
  }
  const int threads = IsShared(mode) ? team_.threads() : 1;
  const int64_t images = IsGroup(mode) ? GroupLength() : 1;
  auto vehicle = std::make_unique<Vehicle>();
  vehicle->route = &RouteFor(ready, mode);
  for (const Leg& leg : *vehicle->route) {
    vehicle->legs.push_back(
        std::make_unique<Instance>(PlanFor(ready, leg), threads));
    if (leg.range.last < 0) continue;
    vehicle->floats.push_back(FloatsOf(ready->shapes[leg.range.last]));
    vehicle->between.emplace_back(vehicle->floats.back() * images);
  }
  return Borrowed(ready, mode, std::move(vehicle));
}

Model::Borrowed::~Borrowed() {
  if (!vehicle_) return;
  std::lock_guard<std::mutex> lock(from_->mutex);
  auto& free = from_->free[mode_];
  if (free.size() < kMostFree) free.push_back(std::move(vehicle_));
}

// What a leg is given of a unit: of all its images, or of one.
Unit Model::UnitOfLeg(Vehicle* vehicle, size_t leg, const Unit& unit,
                      int64_t image) {
  const int64_t first = image < 0 ? 0 : image;
  Unit of_leg;
  of_leg.count = image < 0 ? unit.count : 1;
  const auto add = [&](const std::vector<Unit::Value>& values,
                       std::vector<Unit::Value>* to) {
    for (const Unit::Value& value : values)
      to->push_back({value.pixels + first * value.floats, value.floats});
  };
  const auto between = [&](size_t at) {
    return std::vector<Unit::Value>{
        {vehicle->between[at].data(), vehicle->floats[at]}};
  };
  add(leg == 0 ? unit.inputs : between(leg - 1), &of_leg.inputs);
  add(leg + 1 == vehicle->legs.size() ? unit.outputs : between(leg),
      &of_leg.outputs);
  return of_leg;
}

void Model::Drive(Vehicle* vehicle, const Unit& unit) {
  for (size_t leg = 0; leg < vehicle->legs.size(); ++leg) {
    Instance& instance = *vehicle->legs[leg];
    if (!(*vehicle->route)[leg].positions) {
      instance.Run(UnitOfLeg(vehicle, leg, unit, -1));
      continue;
    }
    for (int32_t image = 0; image < unit.count; ++image)
      instance.Run(UnitOfLeg(vehicle, leg, unit, image));
  }
}

void Model::DriveTogether(Vehicle* vehicle, const Unit& unit, int thread,
                          int threads, Barrier* barrier) {
  for (size_t leg = 0; leg < vehicle->legs.size(); ++leg) {
    Instance& instance = *vehicle->legs[leg];
    const auto run = [&](int64_t image) {
      const Unit of_leg = UnitOfLeg(vehicle, leg, unit, image);
      for (int32_t step = 0; step < instance.steps(); ++step) {
        instance.Run(step, thread, threads, of_leg, barrier);
        barrier->Wait();
      }
    };
    if (!(*vehicle->route)[leg].positions) {
      run(-1);
      continue;
    }
    for (int32_t image = 0; image < unit.count; ++image) run(image);
  }
}

Model::Shares Model::SharesFor(int64_t batch) const {
  const int64_t threads = team_.threads();
  const int64_t length = GroupLength();
  Costs costs;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = costs_.find(static_cast<int>(threads));
    if (found != costs_.end()) costs = found->second;
  }
  // In units of an image alone, where nothing was measured.
  if (costs.alone <= 0)
    costs.alone = costs.shared > 0 ? costs.shared * 0.8 * threads : 1;
  if (costs.shared <= 0)
    costs.shared = threads == 1 ? costs.alone : 1.25 / threads * costs.alone;
  if (costs.groups <= 0) costs.groups = 0.7 * length * costs.alone;
  if (costs.together <= 0)
    costs.together =
        threads == 1 ? costs.groups : 1.25 / threads * costs.groups;
  Shares best;
  double least = std::numeric_limits<double>::infinity();
  const int64_t most = (batch + length - 1) / length;
  // All but the last few groups are certain.
  for (int64_t groups = std::max<int64_t>(0, most - 2 * threads);
       groups <= most; ++groups) {
    const int64_t most_together =
        threads == 1 ? 0 : std::min<int64_t>(threads, most - groups);
    for (int64_t together = 0; together <= most_together; ++together) {
      const int64_t left =
          std::max<int64_t>(0, batch - (groups + together) * length);
      for (int64_t alone : {left, left / threads * threads, int64_t{0}}) {
        const double seconds =
            std::ceil(double(groups) / threads) * costs.groups +
            together * costs.together +
            std::ceil(double(alone) / threads) * costs.alone +
            (left - alone) * costs.shared;
        if (seconds < least) {
          least = seconds;
          best = {groups, alone, left - alone, together};
        }
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
  const int64_t length = GroupLength();
  // All memory is there before threads start: they cannot fail.
  std::vector<Borrowed> groups, alone, shared, together;
  for (int64_t i = 0; i < std::min<int64_t>(threads, shares.groups); ++i)
    groups.push_back(VehicleFor(ready, Mode::kGroups));
  for (int64_t i = 0; i < std::min<int64_t>(threads, shares.alone); ++i)
    alone.push_back(VehicleFor(ready, Mode::kAlone));
  if (shares.shared) shared.push_back(VehicleFor(ready, Mode::kShared));
  if (shares.together) together.push_back(VehicleFor(ready, Mode::kTogether));
  std::vector<Unit> units;
  const int64_t all_groups = shares.groups + shares.together;
  for (int64_t g = 0; g < all_groups; ++g)
    units.push_back(UnitOf(inputs, outputs, *ready, g * length,
                           std::min(length, batch - g * length)));
  for (int64_t i = std::min(all_groups * length, batch); i < batch; ++i)
    units.push_back(UnitOf(inputs, outputs, *ready, i, 1));

  std::atomic<int64_t> next_group{0}, next_alone{0};
  std::atomic<bool> failed{false};
  Barrier barrier(threads);
  team_.Run([&](int thread, int count) {
    try {
      const size_t mine = static_cast<size_t>(thread);
      for (int64_t g;
           mine < groups.size() && (g = next_group++) < shares.groups;)
        Drive(groups[mine].get(), units[g]);
      for (int64_t i; mine < alone.size() && (i = next_alone++) < shares.alone;)
        Drive(alone[mine].get(), units[all_groups + i]);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    const auto drive = [&](const Borrowed& vehicle, const Unit& unit) {
      if (count == 1)
        Drive(vehicle.get(), unit);
      else
        DriveTogether(vehicle.get(), unit, thread, count, &barrier);
    };
    for (int64_t g = 0; g < shares.together; ++g)
      drive(together[0], units[shares.groups + g]);
    for (int64_t i = 0; i < shares.shared; ++i)
      drive(shared[0], units[all_groups + shares.alone + i]);
  });
  if (failed) throw std::bad_alloc();
}

// Hints are lines of words, each for one instruction set:
//
//   <set> choice <i, p or s><L> <node> <s, d, g or w> <rows> <cells> <block>
//   <set> route <mode> {<i, p or s><L> <last node>}
//   <set> costs <threads> <groups> <alone> <shared> <together>
//
// What is no such line, or does not fit the network, is passed over.

void Model::ReadHints() {
  std::istringstream lines(network_.hints);
  const auto leg_of = [this](const std::string& word, Leg* leg) {
    if (word.size() < 2 || !std::strchr("psi", word[0])) return false;
    leg->positions = word[0] != 'i';
    leg->together = word[0] == 's';
    leg->length = std::atoi(word.c_str() + 1);
    return leg->length > 0 && TilesFor(leg->length) != nullptr;
  };
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string set, what, word;
    if (!(words >> set >> what) || set != TilesFor()->name) continue;
    if (what == "choice") {
      int32_t node;
      std::string product;
      Choice choice;
      Leg leg;
      if (!(words >> word >> node >> product >> choice.tile[0] >>
            choice.tile[1] >> choice.block) ||
          !leg_of(word, &leg) ||
          product.size() != 1 || !std::strchr("sdgw", product[0]))
        continue;
      choice.product = static_cast<Product>(product[0]);
      choices_[KeyOf(leg)][node] = choice;
    } else if (what == "costs") {
      int threads;
      Costs costs;
      if (!(words >> threads >> costs.groups >> costs.alone >> costs.shared))
        continue;
      if (!(words >> costs.together)) costs.together = 0;  // an earlier file
      // Sums of them are compared.
      bool good = true;
      for (double seconds :
           {costs.groups, costs.alone, costs.shared, costs.together})
        good &= seconds >= 0 && seconds < kMostSeconds;
      if (good) costs_[threads] = costs;
    } else if (what == "route") {
      int mode;
      if (!(words >> mode) || mode < 0 || mode > 2) continue;
      Route route;
      int32_t first = -1;
      bool good = true;
      for (Leg leg; good && (words >> word >> leg.range.last);) {
        good = leg_of(word, &leg) && (leg.positions || mode == 0) &&
               leg.together == (mode == static_cast<int>(Mode::kShared)) &&
               (leg.range.last < 0 ||
                (leg.range.last > first &&
                 std::find(cuts_.begin(), cuts_.end(), leg.range.last) !=
                     cuts_.end())) &&
               (route.empty() || first >= 0) &&
               (leg.positions || leg.length == GroupLength());
        leg.range.first = first;
        first = leg.range.last;
        route.push_back(leg);
      }
      if (good && !route.empty() && first < 0)
        routes_[static_cast<Mode>(mode)] = route;
    }
  }
}

std::string Model::Hints() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const char* set = TilesFor()->name;
  std::ostringstream text;
  for (const auto& [key, choices] : choices_)
    for (const auto& [node, c] : choices)
      text << set << " choice " << key << " " << node << " "
           << static_cast<char>(c.product) << " " << c.tile[0] << " "
           << c.tile[1] << " " << c.block << "\n";
  for (const auto& [mode, route] : routes_) {
    text << set << " route " << static_cast<int>(mode);
    for (const Leg& leg : route)
      text << " " << KeyOf(leg) << " " << leg.range.last;
    text << "\n";
  }
  for (const auto& [threads, c] : costs_)
    text << set << " costs " << threads << " " << c.groups << " " << c.alone
         << " " << c.shared << " " << c.together << "\n";
  return text.str();
}

std::string Model::Profile(const std::vector<Shape>& shapes, int64_t batch) {
  const std::shared_ptr<Ready> ready = ReadyFor(shapes);
  const Shares shares = SharesFor(batch);
  const Mode mode = shares.groups     ? Mode::kGroups
                    : shares.together ? Mode::kTogether
                    : shares.alone    ? Mode::kAlone
                                      : Mode::kShared;
  const int threads = IsShared(mode) ? team_.threads() : 1;
  const int64_t count = IsGroup(mode) ? GroupLength() : 1;
  const Borrowed borrowed = VehicleFor(ready.get(), mode);
  Vehicle& vehicle = *borrowed;
  std::vector<std::vector<float>> memory;
  std::vector<float*> in, out;
  memory.reserve(inputs_.size() + network_.outputs.size());
  const auto room = [&](int32_t node, std::vector<float*>* to) {
    memory.emplace_back(FloatsOf(ready->shapes[node]) * count, 0.5f);
    to->push_back(memory.back().data());
  };
  for (int32_t node : inputs_) room(node, &in);
  for (const Output& output : network_.outputs) room(output.node, &out);
  const Unit unit = UnitOf(in.data(), out.data(), *ready, 0, count);
  static const char* const names[] = {
      "pack", "unpack", "convolution", "elementwise", "pool", "global_pool",
      "phases", "splat", "pad", "upsample", "reshape", "softmax",
      "recurrent"};
  std::ostringstream text;
  Barrier barrier(threads);
  for (size_t leg = 0; leg < vehicle.legs.size(); ++leg) {
    const Leg& of = (*vehicle.route)[leg];
    Instance& instance = *vehicle.legs[leg];
    const int64_t images = of.positions ? 1 : count;
    const Unit part = UnitOfLeg(&vehicle, leg, unit, of.positions ? 0 : -1);
    std::vector<double> least(instance.steps(),
                              std::numeric_limits<double>::infinity());
    const auto run = [&](int thread, int all) {
      for (int32_t s = 0; s < instance.steps(); ++s) {
        const double start = Now();
        instance.Run(s, thread, all, part, &barrier);
        if (all > 1) barrier.Wait();
        if (thread == 0) least[s] = std::min(least[s], Now() - start);
      }
    };
    for (int round = 0; round < 30; ++round) {
      if (threads > 1)
        team_.Run(run);
      else
        run(0, 1);
    }
    text << TilesFor()->name << " " << KeyOf(of) << ", " << threads
         << " threads, " << images << " images\n";
    const Plan& plan = PlanFor(ready.get(), of);
    for (int32_t s = 0; s < instance.steps(); ++s) {
      const Step& step = plan.steps[s];
      char line[256];
      const Geometry& g =
          (step.to ? step.to : step.to2 ? step.to2 : step.in).geometry;
      std::snprintf(
          line, sizeof line,
          "%4d %-11s %-36.36s %4dx%-4d %5d %c %2dx%-2d %5d %9.1f us "
          "%6.1f GFLOP/s\n",
          step.node, names[static_cast<int>(step.kind)],
          network_.nodes[step.node].name.c_str(), g.rows, g.columns,
          g.channels, static_cast<char>(step.choice.product),
          step.choice.tile[0], step.choice.tile[1], step.choice.block,
          least[s] * 1e6, 2e-9 * step.products * images / least[s]);
      text << line;
    }
  }
  return text.str();
}

}  // namespace rigl_serving

// A network that can be run: its plans, their memory, and threads.
#ifndef RIGL_KERAS_MODEL_H_
#define RIGL_KERAS_MODEL_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "execute.h"
#include "network.h"
#include "plan.h"
#include "team.h"

namespace rigl_serving {

// Seconds of a clock that is never set.
inline double Now() {
  return std::chrono::duration<double>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// How images are computed.
enum class Mode {
  kGroups,    // L images side by side, each thread a group of them
  kAlone,     // each thread an image
  kShared,    // all threads one image
  kTogether,  // all threads a group of images, in the layouts of `kGroups`
};

// Whether all threads compute a unit of a mode.
inline bool IsShared(Mode mode) {
  return mode == Mode::kShared || mode == Mode::kTogether;
}

// Whether a unit of a mode is a group of images.
inline bool IsGroup(Mode mode) {
  return mode == Mode::kGroups || mode == Mode::kTogether;
}

// A part of a network in one layout. Between two of them values are as in the
// network's inputs: pixel by pixel.
struct Leg {
  bool positions = true;
  bool together = false;  // of all threads: what is best may be another choice
  int32_t length = 0;
  Range range;
};
using Route = std::vector<Leg>;

// "p16": which layout a leg is in.
std::string KeyOf(const Leg& leg);

// Seconds that units of work take; how a batch is shared out follows.
struct Costs {
  double groups = 0;    // a group of images, by one thread
  double alone = 0;     // one image by one thread
  double shared = 0;    // one image by all threads
  double together = 0;  // a group of images, by all threads
};

class Model {
 public:
  // Throws Error.
  Model(const void* bytes, size_t size, int threads);

  const Network& network() const { return network_; }
  // Nodes of the inputs, in their order.
  const std::vector<int32_t>& inputs() const { return inputs_; }

  // Shapes of the outputs without the batch, for those of the inputs.
  std::vector<Shape> OutputShapes(const std::vector<Shape>& inputs) const;

  // The shape of an output, -1 where it depends on a free axis.
  Shape OutputShape(int32_t output) const;

  void Run(const float* const* inputs, const std::vector<Shape>& shapes,
           int64_t batch, float* const* outputs);

  // Measures what can be chosen, for one batch size, for some seconds, and
  // follows it from now on.
  void Tune(const std::vector<Shape>& shapes, int64_t batch, double seconds);

  // What was measured, as the text that a file keeps.
  std::string Hints() const;

  // One line for each step: node, kind, choice, microseconds, GFLOP/s.
  std::string Profile(const std::vector<Shape>& shapes, int64_t batch);

 private:
  // What one thread, or all of them together, need to follow a route.
  struct Vehicle {
    const Route* route = nullptr;
    std::vector<std::unique_ptr<Instance>> legs;
    std::vector<std::vector<float>> between;  // values after each leg
    std::vector<int64_t> floats;              // of an image there
  };
  // Plans for one set of input shapes, and vehicles that nobody uses now.
  struct Ready {
    std::vector<Shape> shapes;  // of all nodes
    std::mutex mutex;
    std::map<std::pair<std::string, Range>, std::unique_ptr<Plan>> plans;
    std::map<Mode, Route> routes;
    std::map<Mode, std::vector<std::unique_ptr<Vehicle>>> free;
  };
  // A vehicle that is given back when this is destroyed.
  class Borrowed {
   public:
    Borrowed(Ready* from, Mode mode, std::unique_ptr<Vehicle> vehicle)
        : from_(from), mode_(mode), vehicle_(std::move(vehicle)) {}
    Borrowed(Borrowed&&) = default;
    ~Borrowed();
    Vehicle& operator*() const { return *vehicle_; }
    Vehicle* get() const { return vehicle_.get(); }

   private:
    Ready* from_;
    Mode mode_;
    std::unique_ptr<Vehicle> vehicle_;
  };
  // How a batch is computed: so many units of each kind. The batch has groups
  // first, then those that are computed together, then single images.
  struct Shares {
    int64_t groups = 0, alone = 0, shared = 0, together = 0;
  };
  // What was measured of a layout: what to choose, and what nodes take then.
  struct Measurement {
    Choices choices;
    std::map<int32_t, double> seconds;
  };

  std::shared_ptr<Ready> ReadyFor(const std::vector<Shape>& shapes);
  const Plan& PlanFor(Ready* ready, const Leg& leg);
  Route DefaultRoute(const Ready& ready, Mode mode) const;
  const Route& RouteFor(Ready* ready, Mode mode);
  Borrowed VehicleFor(Ready* ready, Mode mode);
  static void Drive(Vehicle* vehicle, const Unit& unit);
  static void DriveTogether(Vehicle* vehicle, const Unit& unit, int thread,
                            int threads, Barrier* barrier);
  static Unit UnitOfLeg(Vehicle* vehicle, size_t leg, const Unit& unit,
                        int64_t image);
  Shares SharesFor(int64_t batch) const;
  // Kernels with vectors of so many floats, 0: the widest; null: there are
  // none. Whatever the environment says later, they are of one set.
  const Tiles* TilesFor(int32_t length = 0) const;
  Layout LayoutOf(const Leg& leg) const;
  int64_t GroupLength() const { return TilesFor()->length; }
  void ReadHints();
  Unit UnitOf(const float* const* inputs, float* const* outputs,
              const Ready& ready, int64_t first, int64_t count) const;
  void RunShares(Ready* ready, const Shares& shares,
                 const float* const* inputs, int64_t batch,
                 float* const* outputs);

  // Seconds of a call, the least of many.
  double SecondsOf(const std::vector<Shape>& shapes, int64_t batch,
                   const Shares& shares, double seconds);
  Measurement Measured(const Ready& ready, const Leg& leg, bool shared,
                       double seconds);
  void TuneMode(const std::vector<Shape>& shapes, Mode mode, double seconds);

  const Network network_;
  const Tiles* const tiles_[3];  // the widest first; null: none so wide
  std::vector<int32_t> inputs_, cuts_;
  Team team_;
  mutable std::mutex mutex_;  // of what follows
  std::map<std::vector<Shape>, std::shared_ptr<Ready>> ready_;
  std::map<std::string, Choices> choices_;  // by layout
  std::map<Mode, Route> routes_;            // that were measured to be best
  std::map<int, Costs> costs_;              // by threads
};

}  // namespace rigl_serving

#endif  // RIGL_KERAS_MODEL_H_

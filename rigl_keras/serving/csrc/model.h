// A network that can be run: its plans, their memory, and threads.
#ifndef RIGL_KERAS_MODEL_H_
#define RIGL_KERAS_MODEL_H_

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

// Seconds that units of work take; how a batch is shared out follows.
struct Costs {
  double images = 0;  // L images by one thread, in the layout of images
  double alone = 0;   // one image by one thread
  double shared = 0;  // one image by all threads
};

// A plan, with instances that callers take and give back.
class Prepared {
 public:
  Prepared(const Network& network, const std::vector<Shape>& shapes,
           const Layout& layout, const Choices& choices)
      : plan_(MakePlan(network, shapes, layout, choices)) {}

  // An instance for a number of threads, returned when this is destroyed.
  class Loan {
   public:
    Loan(Prepared* from, int threads);
    ~Loan();
    Loan(Loan&& other) noexcept
        : from_(other.from_), instance_(std::move(other.instance_)),
          threads_(other.threads_) {}
    Instance* operator->() const { return instance_.get(); }
    Instance& operator*() const { return *instance_; }

   private:
    Prepared* from_;
    std::unique_ptr<Instance> instance_;
    int threads_;
  };

  Plan& plan() { return plan_; }

 private:
  Plan plan_;
  std::mutex mutex_;
  std::map<int, std::vector<std::unique_ptr<Instance>>> free_;  // by threads
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
  // Plans for one set of input shapes.
  struct Ready {
    std::vector<Shape> shapes;  // of all nodes
    std::mutex mutex;
    std::unique_ptr<Prepared> images, positions;
  };
  // How a batch is computed: so many units of each kind, one after another.
  struct Shares {
    int64_t groups = 0, alone = 0, shared = 0;
  };

  std::shared_ptr<Ready> ReadyFor(const std::vector<Shape>& shapes);
  Prepared& PlanFor(Ready* ready, bool positions);
  Shares SharesFor(int64_t batch) const;
  Layout LayoutFor(bool positions) const;
  std::string KeyOf(bool positions) const;
  void ReadHints();
  Unit UnitOf(const float* const* inputs, float* const* outputs,
              const Ready& ready, int64_t first, int64_t count) const;
  // Seconds of a call, the least of many.
  double SecondsOf(const std::vector<Shape>& shapes, int64_t batch,
                   const Shares& shares, double seconds);
  Choices Measured(const Ready& ready, bool positions, int threads,
                   double seconds);
  void RunShares(Ready* ready, const Shares& shares,
                 const float* const* inputs, int64_t batch,
                 float* const* outputs);

  const Network network_;
  std::vector<int32_t> inputs_;
  Team team_;
  mutable std::mutex mutex_;  // of what follows
  std::map<std::vector<Shape>, std::shared_ptr<Ready>> ready_;
  std::map<std::string, Choices> choices_;  // by layout
  std::map<std::string, Costs> costs_;
  // Lengths of vectors that were measured to be best; 0: none were.
  int32_t positions_length_ = 0, images_length_ = 0;
};

}  // namespace rigl_serving

#endif  // RIGL_KERAS_MODEL_H_

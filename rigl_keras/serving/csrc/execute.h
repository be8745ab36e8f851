// Runs the steps of a plan, in memory of its own.
#ifndef RIGL_KERAS_EXECUTE_H_
#define RIGL_KERAS_EXECUTE_H_

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "plan.h"
#include "team.h"

namespace rigl_serving {

// The values of one unit of work that come from the caller, or go there: for
// each input and output of the network its first image's pixels, and how many
// floats an image has.
struct Unit {
  struct Value {
    float* pixels;
    int64_t floats;
  };
  std::vector<Value> inputs, outputs;
  int32_t count = 1;  // images
};

// A plan with memory for one unit, which several threads may work on.
class Instance {
 public:
  Instance(const Plan& plan, int threads);
  Instance(const Instance&) = delete;
  Instance& operator=(const Instance&) = delete;

  int32_t steps() const { return static_cast<int32_t>(bound_.size()); }

  // Computes what one of `threads` threads does of a step. With more than
  // one they pass a barrier between any two steps; some steps need it, too.
  void Run(int32_t step, int thread, int threads, const Unit& unit,
           Barrier* barrier);

  // All steps, by one thread.
  void Run(const Unit& unit) {
    for (int32_t step = 0; step < steps(); ++step) Run(step, 0, 1, unit, nullptr);
  }

  // Follows another choice for a step of the plan.
  void Bind(int32_t step);

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<float[], Free>;

  // A step with addresses.
  struct Bound {
    Field in, to;
    Epilogue after;
    Convolution convolution;
    Pool pool;
    std::vector<Field> phases;
    std::vector<Part> parts;  // of each thread
    Memory states;  // kRecurrent: of all threads
    int32_t area[2] = {1, 1};  // of what generated code computes at a time
  };

  static Memory Allocated(int64_t floats);
  Field FieldOf(const Operand& operand) const;
  Epilogue EpilogueOf(const Step& step) const;
  std::vector<Part> PartsOf(const Step& step, const Convolution& whole) const;
  void Reserve();

  float* At(const Field& field, const Generated::Block& block, int32_t row,
            int32_t cell) const;
  void SetArea(const Step& step, Bound* bound) const;
  int32_t PanelOf(const Step& step) const;
  void RunGenerated(const Step& step, const Bound& bound, const Part& part,
                    float* scratch) const;

  void Phases(const Step& step, const Bound& bound, int32_t begin,
              int32_t end) const;
  void Splat(const Bound& bound, int32_t begin, int32_t end) const;
  void PadPixels(const Step& step, const Bound& bound, int32_t begin,
                 int32_t end) const;
  void Upsample(const Step& step, const Bound& bound, int32_t begin,
                int32_t end) const;
  void Softmax(const Step& step, const Bound& bound, int32_t begin,
               int32_t end) const;
  void Reshape(const Step& step, const Bound& bound, float* scratch) const;

  const Plan& plan_;
  const Tiles& tiles_;
  const int threads_;
  Memory memory_;
  std::vector<float*> slots_;
  std::vector<Memory> scratch_;  // of each thread
  int64_t scratch_floats_ = 0;
  std::vector<Bound> bound_;
};

}  // namespace rigl_serving

#endif  // RIGL_KERAS_EXECUTE_H_

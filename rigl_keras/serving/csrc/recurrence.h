// The loop of an LSTM or a GRU over a sequence, whose inputs have been multiplied
// by the kernel: over the panels and the gates of the TensorFlow operation.
#ifndef RIGL_KERAS_RECURRENCE_H_
#define RIGL_KERAS_RECURRENCE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "../../kernels/csrc/panels.h"
#include "../../kernels/csrc/recurrent.h"
#include "network.h"
#include "team.h"
#include "tiles.h"

namespace rigl_serving {

// A recurrent kernel without its zeros, ready for the loops.
struct Recurrence {
  Cell cell;
  int64_t units;
  bool sequences, backwards, reversed;
  std::vector<int32_t> rows, inputs;  // of `RiglWeights`
  std::vector<float> weights, bias;
  int32_t length;  // L of the fields
  const RiglPanels* panels;
  const RiglRecurrent* gates;

  // Memory in multiples of `Floats`: of all threads, and scratch of each.
  static constexpr int64_t kStates = 4, kScratch = 10;

  // Floats of a state, in whole vectors.
  int64_t Floats(bool positions) const;

  // Computes all steps of a field. Units are shared out among threads, which
  // pass the barrier after each step; those of a small layer are of one thread.
  void Run(const Field& in, int64_t steps, bool positions, const Field& to,
           bool to_is_pixel, float* states, float* scratch, int thread,
           int threads, Barrier* barrier) const;
};

std::shared_ptr<const Recurrence> RecurrenceOf(const Node& node,
                                               const Tiles& tiles);

}  // namespace rigl_serving

#endif  // RIGL_KERAS_RECURRENCE_H_

#include "recurrence.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace rigl_serving {
namespace {

// Weights of each thread above which the threads share a step: they wait for
// one another after it.
constexpr int64_t kWorthSharing = 8192;

// Those of the instruction set of some kernels.
void ChooseLoops(const Tiles& tiles, Recurrence* recurrence) {
  recurrence->panels = &rigl_panels_portable;
  recurrence->gates = &rigl_recurrent_portable;
#ifdef RIGL_X86
  const std::string name = tiles.name;
  if (name == rigl_panels_avx512.name) {
    recurrence->panels = &rigl_panels_avx512;
    recurrence->gates = &rigl_recurrent_avx512;
  } else if (name == rigl_panels_avx2.name) {
    recurrence->panels = &rigl_panels_avx2;
    recurrence->gates = &rigl_recurrent_avx2;
  }
#endif
}

}  // namespace

std::shared_ptr<const Recurrence> RecurrenceOf(const Node& node,
                                               const Tiles& tiles) {
  auto made = std::make_shared<Recurrence>();
  made->cell = node.cell;
  made->units = node.kernel.shape[0];
  made->sequences = node.sequences;
  made->backwards = node.backwards;
  made->reversed = node.reversed;
  made->length = tiles.length;
  made->bias = node.bias.values;
  ChooseLoops(tiles, made.get());
  // By column. Places rise, and so do the inputs of a column.
  const Array& kernel = node.kernel;
  const int64_t columns = kernel.shape[1];
  const auto for_each = [&](const auto& use) {
    for (size_t i = 0; i < kernel.values.size(); ++i) {
      const int64_t place = kernel.sparse ? kernel.places[i] : i;
      if (kernel.values[i] != 0)
        use(place % columns, place / columns, kernel.values[i]);
    }
  };
  made->rows.assign(columns + 1, 0);
  for_each([&](int64_t column, int64_t, float) { ++made->rows[column + 1]; });
  for (int64_t c = 0; c < columns; ++c) made->rows[c + 1] += made->rows[c];
  made->inputs.resize(made->rows.back());
  made->weights.resize(made->rows.back());
  std::vector<int32_t> next(made->rows.begin(), made->rows.end() - 1);
  for_each([&](int64_t column, int64_t input, float weight) {
    made->inputs[next[column]] = static_cast<int32_t>(input);
    made->weights[next[column]++] = weight;
  });
  return made;
}

int64_t Recurrence::Floats(bool positions) const {
  const int64_t width = panels->width;
  return positions ? (units + width - 1) / width * width : units * length;
}

// A state has `lanes` numbers for each unit: of one image, or of a group.
void Recurrence::Run(const Field& in, int64_t steps, bool positions,
                     const Field& to, bool to_is_pixel, float* states,
                     float* scratch, int thread, int threads,
                     Barrier* barrier) const {
  if (static_cast<int64_t>(weights.size()) < kWorthSharing * threads) {
    if (thread > 0) return;
    threads = 1;
  }
  const int64_t lanes = positions ? 1 : length;
  const int64_t width = panels->width;
  const int64_t floats = Floats(positions);
  const int64_t blocks = floats / width;
  // This thread's part of a state, in floats and in units.
  const int64_t begin = blocks * thread / threads * width;
  const int64_t end = blocks * (thread + 1) / threads * width;
  const int64_t count = end - begin;
  const int64_t first = begin / lanes;
  const int64_t last = std::max(first, std::min(end / lanes, units));
  float* const both[2] = {states, states + floats};
  float* const carry = states + 2 * floats;
  float* const reset = states + 3 * floats;
  for (int64_t i = 0; i < kStates; ++i)
    std::fill_n(states + i * floats + begin, count, 0.0f);
  // What is beyond the units is computed with them, and is to be a number.
  std::fill_n(scratch, kScratch * count, 0.0f);
  const RiglWeights view = {GatesOf(cell) * units, 1, rows.data(),
                            inputs.data()};
  const auto wait = [&] {
    if (threads > 1) barrier->Wait();
  };
  // A gate's products of the inputs, at a step.
  const auto load = [&](int gate, int64_t time, float* products) {
    const float* from = in.data + (gate * units + first) * in.plane;
    for (int64_t u = first; u < last; ++u, from += in.plane) {
      if (positions)
        *products++ = from[time];
      else
        products = std::copy_n(from + time * length, length, products);
    }
  };
  const auto multiply = [&](int gate, const float* state, bool add,
                            float* products) {
    const int64_t from = gate * units + first, until = gate * units + last;
    if (positions)
      panels->multiply_row(&view, from, until, state, weights.data(), add,
                           products);
    else
      panels->multiply(&view, from, until, static_cast<int>(lanes / width),
                       state, weights.data(), add, products);
  };
  const auto store = [&](int64_t time, const float* state) {
    for (int64_t u = first; u < last; ++u) {
      float* cell_of = to.data + u * to.plane;
      if (!positions)
        std::copy_n(state + u * length, length, cell_of + time * length);
      else if (to_is_pixel)
        std::fill_n(cell_of, length, state[u]);
      else
        cell_of[time] = state[u];
    }
  };
  wait();
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t time = backwards ? steps - 1 - step : step;
    const float* before = both[step % 2];
    float* after = both[(step + 1) % 2];
    if (count) {
      if (cell == Cell::kLstm) {
        for (int gate = 0; gate < 4; ++gate) {
          load(gate, time, scratch + gate * count);
          multiply(gate, before, true, scratch + gate * count);
        }
        gates->lstm(1, count, nullptr, scratch, carry + begin, carry + begin,
                    after + begin);
      } else if (cell == Cell::kGru) {
        float* of_state = scratch + 3 * count;
        for (int gate = 0; gate < 3; ++gate) {
          load(gate, time, scratch + gate * count);
          const bool adds = gate == 2 && !bias.empty();
          if (adds)
            for (int64_t u = first; u < last; ++u)
              std::fill_n(of_state + 2 * count + (u - first) * lanes, lanes,
                          bias[u]);
          multiply(gate, before, adds, of_state + gate * count);
        }
        gates->gru(1, count, nullptr, scratch, of_state, before + begin,
                   scratch + 6 * count, after + begin);
      } else {
        for (int gate = 0; gate < 2; ++gate) {
          load(gate, time, scratch + gate * count);
          multiply(gate, before, true, scratch + gate * count);
        }
        gates->gru_reset(count, scratch, before + begin, reset + begin);
      }
    }
    if (cell == Cell::kGruBefore) {
      wait();  // all of the reset state is multiplied
      if (count) {
        float* products = scratch + 2 * count;
        load(2, time, products);
        multiply(2, reset, true, products);
        gates->gru_update(count, scratch, products, before + begin,
                          after + begin);
      }
    }
    if (sequences)
      store(reversed ? steps - 1 - time : time, after);
    else if (step + 1 == steps)
      store(0, after);
    if (step + 1 < steps) wait();
  }
}

}  // namespace rigl_serving

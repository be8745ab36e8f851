// From a mask to the order in which its weights are worked off.
#ifndef RIGL_KERAS_PLANS_H_
#define RIGL_KERAS_PLANS_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <unordered_map>
#include <vector>

#include <unistd.h>

#include "lanes.h"

namespace rigl_keras {

// Of all operations, for tests.
inline std::atomic<int64_t> plans_made{0};

struct Convolution {
  int64_t images, height, width, channels;  // of the input
  int64_t out_height, out_width, filters;
  int kernel[2];
  int stride[2];
  int dilation[2];
  int64_t padding[2];  // before the first row and column
  // Whether images are in lanes (lane_layers.h); then they are whole groups.
  int64_t in_lanes;
  // Of channels and filters: each filter sees the channels of its own.
  int64_t groups;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_filters() const { return filters / groups; }
  // Of one position of the kernel.
  int64_t weights() const { return group_channels() * filters; }
};

// In what order a plan works off its weights, and where each finds its input.
// It does not depend on how many images there are, nor on their size where
// the tile is the same: plans share it.
struct Order {
  // Of all that there are.
  static inline std::atomic<int64_t> held_bytes{0};

  ~Order() { held_bytes.fetch_sub(counted, std::memory_order_relaxed); }

  std::vector<int64_t> key;  // of equal keys, orders are equal
  std::vector<int32_t> rows, offsets;
  std::vector<int32_t> weights;  // where each is in the kernel (HWIO)
  int64_t counted = 0;

  int64_t bytes() const {
    return 8 * key.size() +
           4 * (rows.size() + offsets.size() + weights.size());
  }
};

// A plan with the arrays that it points to.
struct OwnedPlan {
  RiglPlan plan = {};
  std::vector<int> in_rows, in_columns, out_rows, out_columns;
  std::shared_ptr<const Order> order;
};

inline int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t FloorDivide(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -CeilDivide(-a, b);
}

// What the weights at one position of the kernel do: from which phase of the
// input to which of the output, shifted by how much.
struct Tap {
  int64_t position;
  int64_t weights;  // that are left there
  int phase[2];     // row and column: of the input, or transposed the output
  int64_t shift[2];
  int in_phase, out_phase;  // numbers in the plan
};

// What a thread's memory may take, in floats: 64 MB. RIGL_KERAS_SCRATCH names
// fewer bytes, for tests.
inline double MostFloats() {
  static const double most = [] {
    constexpr double kMost = 1 << 24;
    const char* const bytes = std::getenv("RIGL_KERAS_SCRATCH");
    const double asked = bytes ? std::atof(bytes) / sizeof(float) : 0;
    return asked > 0 ? std::min(asked, kMost) : kMost;
  }();
  return most;
}

// The cycles of one unit, roughly: enough to tell tiles apart.
inline double Cost(const RiglPlan& p, const RiglLanes& lanes, int64_t weights,
                   int threads) {
  const double l = lanes.width;
  const double transposed = l * (std::log2(l) + 2);  // of l x l values
  const double vector = p.micro[0] * p.micro[1];
  const double in_blocks = std::ceil(p.in_channels / l);
  const double out_blocks = std::ceil(p.out_channels / l) / p.splits;
  const double pack = 1.0 * p.packed[0] * p.packed[1] * p.in_phases *
                      (in_blocks * transposed + 30);
  const double micro_tiles = 1.0 * CeilDivide(p.tile[0], p.micro[0]) *
                             CeilDivide(p.tile[1], p.micro[1]);
  const double planes = out_blocks * l * p.out_phases * p.blocks;
  const double compute =
      micro_tiles * (weights / p.splits * (vector + 1.5) +
                     planes * (1.5 * vector + 8));
  const double unpack = 1.0 * p.tile[0] * p.tile[1] * p.out_phases *
                        (out_blocks * transposed + 30);
  const double units = 1.0 * p.groups * p.splits;
  // Beyond a core's own cache, memory is slower.
  const double floats = p.packed_floats + p.micro_floats;
  const double slow = floats > 240'000 ? 1.15 : 1.0;
  return std::ceil(units / threads) * (slow * (pack + compute) + unpack + 500);
}

inline void SetTile(RiglPlan* p, int th, int tw, int r, int c, int splits,
                    const RiglLanes& lanes) {
  const int l = lanes.width;
  p->tile[0] = th, p->tile[1] = tw;
  p->micro[0] = r, p->micro[1] = c;
  p->packed[0] = CeilDivide(th, r) * r + p->halo[0];
  p->packed[1] = CeilDivide(tw, c) * c + p->halo[1];
  p->tiles[0] = CeilDivide(p->height, th);
  p->tiles[1] = CeilDivide(p->width, tw);
  p->groups = CeilDivide(p->images * p->tiles[0] * p->tiles[1], l);
  p->splits = splits;
  // Input channels whose part of a micro-tile fits into the first cache.
  const int64_t floats =
      int64_t{r + p->halo[0]} * (c + p->halo[1]) * p->in_phases * l;
  p->channel_block = std::max<int64_t>(
      1, std::min(p->in_channels, 10'000 / std::max<int64_t>(1, floats)));
  // Without channels, one: what is summed up begins at zero in the first.
  p->blocks =
      std::max<int64_t>(1, CeilDivide(p->in_channels, p->channel_block));
  p->packed_floats = p->in_channels * p->in_phases * p->packed[0] *
                     p->packed[1] * l;
  const int64_t vectors = CeilDivide(CeilDivide(p->out_channels, l), splits);
  p->micro_floats = p->out_phases * vectors * l * r * c * l;
}

// The memory of a thread with a tile, in floats: packed, and per split.
struct Floats {
  double packed, micro;
};

inline Floats FloatsOf(const RiglPlan& p, int th, int tw, int r, int c,
                       const RiglLanes& lanes) {
  const double l = lanes.width;
  const double rows = CeilDivide(th, r) * r + double(p.halo[0]);
  const double columns = CeilDivide(tw, c) * c + double(p.halo[1]);
  return {rows * columns * p.in_phases * p.in_channels * l,
          double(p.out_phases) * std::ceil(p.out_channels / l) * l * r * c * l};
}

// What a thread needs at least.
inline double LeastFloats(const RiglPlan& p, const RiglLanes& lanes) {
  const Floats least = FloatsOf(p, 1, 1, 1, 1, lanes);
  return least.packed + least.micro;
}

// Chooses the tile of a lane by its cost; false: none is within the bounds.
inline bool ChooseTile(RiglPlan* plan, const RiglLanes& lanes,
                       int64_t weights, int threads, bool may_split) {
  static const int micro[][2] = {{4, 4}, {2, 8}, {1, 16}, {2, 4}, {1, 8},
                                 {2, 2}, {1, 4}, {1, 2},  {1, 1}};
  double least = std::numeric_limits<double>::infinity();
  RiglPlan best = *plan;
  // Tiles that differ in no count of tiles are as good as the smallest.
  auto sizes = [](int64_t length) {
    std::vector<int> found;
    for (int64_t n = 1; n <= length; ++n) {
      const int64_t size = CeilDivide(length, n);
      if (size > 64) {
        n = length / 64;
        continue;
      }
      if (found.empty() || found.back() != size) found.push_back(size);
      if (size == 1) break;
    }
    return found;
  };
  const std::vector<int> heights = sizes(plan->height);
  const std::vector<int> widths = sizes(plan->width);
  const int64_t vectors = CeilDivide(plan->out_channels, lanes.width);
  for (int th : heights) {
    for (int tw : widths) {
      for (const auto& m : micro) {
        if (m[0] * m[1] > lanes.registers) continue;
        // As many parts as it takes to be within the bounds.
        const Floats floats = FloatsOf(*plan, th, tw, m[0], m[1], lanes);
        const double left = MostFloats() - floats.packed;
        const double each = floats.micro / vectors;
        if (left < each) continue;
        const int least_splits =
            floats.micro <= left
                ? 1
                : CeilDivide(vectors, static_cast<int64_t>(left / each));
        if (least_splits > 1 && !may_split) continue;
        for (int splits = least_splits;
             splits <= std::max(least_splits, may_split ? threads : 1);
             ++splits) {
          if (splits > vectors) break;
          SetTile(plan, th, tw, m[0], m[1], splits, lanes);
          if (splits > least_splits && plan->groups >= 2 * threads) break;
          // Numbers of rows are 32 bits wide.
          if (double(plan->blocks) * plan->out_phases * plan->out_channels >=
              std::numeric_limits<int32_t>::max())
            break;
          const double cost = Cost(*plan, lanes, weights, threads);
          if (cost < least) least = cost, best = *plan;
        }
      }
    }
  }
  *plan = best;
  return least < std::numeric_limits<double>::infinity();
}

// What a core's first cache holds beside what streams through it, in floats.
inline int64_t FirstCacheFloats() {
  static const int64_t floats = [] {
    int64_t bytes = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    constexpr int64_t kLeast = 32 << 10, kMost = 128 << 10;
    return std::min(std::max(bytes, kLeast), kMost) / 16 * 15 /
           static_cast<int64_t>(sizeof(float));
  }();
  return floats;
}

// Chooses the micro-tile of a plan whose images are in lanes already
// (lane_layers.h): what one takes of a block of channels is copied to where the
// first cache has it. A unit is a line of micro-tiles; false: none is within
// the bounds.
// `sums`: it keeps sums of outputs, and not of weights.
inline bool ChooseLine(RiglPlan* p, const RiglLanes& lanes, int64_t weights,
                       bool sums) {
  static const int micro[][2] = {{2, 4}, {2, 8}, {4, 4}, {1, 8}, {2, 2},
                                 {1, 4}, {1, 2}, {1, 1}};
  const int64_t l = lanes.width;
  const int64_t cached = FirstCacheFloats();
  double least = std::numeric_limits<double>::infinity();
  RiglPlan best = *p;
  for (const auto& m : micro) {
    const int r = m[0], c = m[1];
    if (r * c > lanes.registers) continue;
    p->micro[0] = r, p->micro[1] = c;
    p->tile[0] = r, p->tile[1] = p->width;
    p->packed[0] = r + p->halo[0], p->packed[1] = c + p->halo[1];
    p->tiles[0] = CeilDivide(p->height, r), p->tiles[1] = 1;
    p->groups = CeilDivide(p->images, l) * p->tiles[0];
    p->splits = 1;
    const double area =
        std::max(1.0, 1.0 * p->packed[0] * p->packed[1] * p->in_phases);
    p->channel_block = std::max<int64_t>(
        1, std::min<int64_t>(p->in_channels, cached / (area * l)));
    p->blocks =
        std::max<int64_t>(1, CeilDivide(p->in_channels, p->channel_block));
    const double planes = double(p->out_phases) * p->out_channels;
    if (p->blocks * planes >= std::numeric_limits<int32_t>::max() ||
        (p->channel_block * area + planes * r * c) * l > MostFloats())
      continue;
    p->packed_floats = p->channel_block * area * l;
    p->micro_floats = planes * r * c * l;
    // Sums that are many are not in the first cache.
    const double moved = sums ? planes * r * c * l > 6'000 ? 3 : 1.5 : 1;
    const double one = weights * (r * c + 1.5) + p->in_channels * area * 2 +
                       p->blocks * planes * (moved * r * c + 12);
    const double cost =
        one * p->tiles[0] * static_cast<double>(CeilDivide(p->width, c));
    if (cost < least) least = cost, best = *p;
  }
  *p = best;
  return least < std::numeric_limits<double>::infinity();
}

// The positions of the kernel that have weights and reach a pixel. `counts`:
// the weights that are left at each.
//
// Row o of the output takes row s o + t of the input, t = k d - padding: row
// o + floor(t / s) of the phase t mod s. The other way round, row m of the
// phase t mod s of the input takes row m - floor(t / s) of the output.
inline std::vector<Tap> TapsOf(const Convolution& conv,
                               const std::vector<int64_t>& counts,
                               bool transposed) {
  const int64_t in[2] = {conv.height, conv.width};
  const int64_t out[2] = {conv.out_height, conv.out_width};
  std::vector<Tap> taps;
  for (size_t k = 0; k < counts.size(); ++k) {
    if (!counts[k]) continue;
    Tap tap = {};
    tap.position = k, tap.weights = counts[k];
    bool reaches = true;
    for (int a = 0; a < 2; ++a) {
      const int64_t at = a ? k % conv.kernel[1] : k / conv.kernel[1];
      const int64_t s = conv.stride[a];
      const int64_t t = at * conv.dilation[a] - conv.padding[a];
      const int64_t first = std::max<int64_t>(0, CeilDivide(-t, s));
      reaches &= first < out[a] && s * first + t < in[a];
      const int64_t q = FloorDivide(t, s);
      tap.phase[a] = t - q * s;
      tap.shift[a] = transposed ? -q : q;
    }
    if (reaches) taps.push_back(tap);
  }
  return taps;
}

// Plans the weights at some positions, but for their order; false: not within
// the bounds of memory.
inline bool PlanTaps(const Convolution& conv, bool transposed, bool may_split,
                     int threads, const RiglLanes& lanes,
                     std::vector<Tap>* taps, OwnedPlan* owned) {
  RiglPlan& p = owned->plan;
  p.images = conv.images;
  p.in_height = conv.height, p.in_width = conv.width;
  p.in_channels = conv.channels;
  p.out_height = conv.out_height, p.out_width = conv.out_width;
  p.out_channels = conv.filters;
  for (int a = 0; a < 2; ++a) {
    p.in_stride[a] = transposed ? 1 : conv.stride[a];
    p.out_stride[a] = transposed ? conv.stride[a] : 1;
  }
  p.height = conv.out_height, p.width = conv.out_width;
  if (transposed) {
    std::swap(p.in_height, p.out_height);
    std::swap(p.in_width, p.out_width);
    std::swap(p.in_channels, p.out_channels);
    p.height = CeilDivide(conv.height, conv.stride[0]);
    p.width = CeilDivide(conv.width, conv.stride[1]);
  }
  std::vector<int>& fine_rows = transposed ? owned->out_rows : owned->in_rows;
  std::vector<int>& fine_columns =
      transposed ? owned->out_columns : owned->in_columns;
  std::unordered_map<int64_t, int> phases;
  int64_t least[2] = {}, most[2] = {}, weights = 0;
  for (Tap& tap : *taps) {
    const int64_t both = int64_t{tap.phase[0]} * conv.stride[1] + tap.phase[1];
    const auto found = phases.try_emplace(both, phases.size());
    if (found.second) {
      fine_rows.push_back(tap.phase[0]);
      fine_columns.push_back(tap.phase[1]);
    }
    tap.in_phase = transposed ? 0 : found.first->second;
    tap.out_phase = transposed ? found.first->second : 0;
    const bool first = &tap == taps->data();
    for (int a = 0; a < 2; ++a) {
      least[a] = first ? tap.shift[a] : std::min(least[a], tap.shift[a]);
      most[a] = first ? tap.shift[a] : std::max(most[a], tap.shift[a]);
    }
    weights += tap.weights;
  }
  (transposed ? owned->in_rows : owned->out_rows) = {0};
  (transposed ? owned->in_columns : owned->out_columns) = {0};
  p.in_phases = owned->in_rows.size();
  p.out_phases = owned->out_rows.size();
  p.in_phase_rows = owned->in_rows.data();
  p.in_phase_columns = owned->in_columns.data();
  p.out_phase_rows = owned->out_rows.data();
  p.out_phase_columns = owned->out_columns.data();
  for (int a = 0; a < 2; ++a) {
    p.first_shift[a] = least[a];
    p.halo[a] = std::min<int64_t>(most[a] - least[a], MostFloats());
  }
  if (conv.in_lanes) return ChooseLine(&p, lanes, weights, may_split);
  return ChooseTile(&p, lanes, weights, threads, may_split);
}

inline std::vector<int64_t> KeyOf(const Convolution& conv, bool transposed,
                                  const RiglPlan& p,
                                  const std::vector<Tap>& taps) {
  std::vector<int64_t> key = {
      transposed,   conv.in_lanes,   conv.kernel[1], conv.channels,
      conv.filters, conv.groups,     p.channel_block, p.in_phases,
      p.out_phases, p.packed[0],     p.packed[1]};
  for (const Tap& tap : taps)
    key.insert(key.end(), {tap.position, tap.in_phase, tap.out_phase,
                           tap.shift[0] - p.first_shift[0],
                           tap.shift[1] - p.first_shift[1]});
  return key;
}

// Sorts weights by block of input channels and output plane, counting each.
// `active`: where those that are left are in the kernel (HWIO), rising.
inline std::shared_ptr<const Order> MakeOrder(
    const Convolution& conv, bool transposed, const RiglPlan& p,
    const std::vector<Tap>& taps, std::vector<int64_t> key,
    const std::vector<int32_t>& active, const RiglLanes& lanes) {
  auto order = std::make_shared<Order>();
  order->key = std::move(key);
  const int64_t per_position = conv.weights();
  const int64_t pitch = int64_t{p.packed[1]} * lanes.width;
  const int64_t plane = p.packed[0] * pitch;
  int64_t count = 0;
  for (const Tap& tap : taps) count += tap.weights;
  order->rows.assign(int64_t{p.blocks} * p.out_phases * p.out_channels + 1, 0);
  std::vector<int32_t> bins(count), shifted(count), from(count);
  auto tap = taps.begin();
  int64_t found = 0;
  // What was counted: somebody may write to a mask that is not theirs.
  for (size_t e = 0; e < active.size() && found < count; ++e) {
    const int64_t position = active[e] / per_position;
    while (tap != taps.end() && tap->position < position) ++tap;
    if (tap == taps.end()) break;
    if (tap->position != position) continue;  // it reaches no pixel
    const int64_t in_kernel = active[e] % per_position;
    int64_t in = in_kernel / conv.filters, out = in_kernel % conv.filters;
    in += out / conv.group_filters() * conv.group_channels();
    if (transposed) std::swap(in, out);
    bins[found] = (in / p.channel_block * p.out_phases + tap->out_phase) *
                      p.out_channels + out;
    if (conv.in_lanes) in %= p.channel_block;  // copied block by block
    shifted[found] = (in * p.in_phases + tap->in_phase) * plane +
                     (tap->shift[0] - p.first_shift[0]) * pitch +
                     (tap->shift[1] - p.first_shift[1]) * lanes.width;
    from[found] = e;
    ++order->rows[bins[found++] + 1];
  }
  for (size_t b = 1; b < order->rows.size(); ++b)
    order->rows[b] += order->rows[b - 1];
  order->offsets.resize(count);
  order->weights.resize(count);
  std::vector<int32_t> next(order->rows.begin(), order->rows.end() - 1);
  for (int64_t e = 0; e < count; ++e) {
    const int32_t to = next[bins[e]]++;
    order->offsets[to] = shifted[e];
    order->weights[to] = active[from[e]];
  }
  order->counted = order->bytes();
  Order::held_bytes.fetch_add(order->counted, std::memory_order_relaxed);
  return order;
}

using OrderOf = std::function<std::shared_ptr<const Order>(
    const RiglPlan&, const std::vector<Tap>&)>;

// Plans the forward pass, or with `transposed` the gradient of its input. Where
// one plan would take too much memory, several share the positions of the
// kernel, and what they compute is to be added; false: even one position does.
inline bool MakePlans(const Convolution& conv, std::vector<Tap> taps,
                      bool transposed, bool may_split, int threads,
                      const RiglLanes& lanes, const OrderOf& order_of,
                      std::vector<OwnedPlan>* plans) {
  OwnedPlan owned;
  if (PlanTaps(conv, transposed, may_split, threads, lanes, &taps, &owned)) {
    owned.order = order_of(owned.plan, taps);
    owned.plan.rows = owned.order->rows.data();
    owned.plan.offsets = owned.order->offsets.data();
    plans->push_back(std::move(owned));
    return true;
  }
  if (taps.size() < 2) return false;
  const auto middle = taps.begin() + taps.size() / 2;
  for (const auto& half : {std::vector<Tap>(taps.begin(), middle),
                           std::vector<Tap>(middle, taps.end())})
    if (!MakePlans(conv, half, transposed, may_split, threads, lanes, order_of,
                   plans))
      return false;
  return true;
}

}  // namespace rigl_keras

#endif  // RIGL_KERAS_PLANS_H_

// From a mask to the order in which its weights are worked off.
#ifndef RIGL_KERAS_PLANS_H_
#define RIGL_KERAS_PLANS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"

namespace rigl_keras {

struct Convolution {
  int64_t images, height, width, channels;  // of the input
  int64_t out_height, out_width, filters;
  int kernel[2];
  int stride[2];
  int dilation[2];
  int64_t padding[2];  // before the first row and column
};

// A plan with the arrays that it points to.
struct OwnedPlan {
  RiglPlan plan = {};
  std::vector<int> in_rows, in_columns, out_rows, out_columns;
  std::vector<int32_t> rows, offsets;
  std::vector<int32_t> weights;  // where each is in the kernel (HWIO)
};

inline int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t FloorDivide(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -CeilDivide(-a, b);
}

// What a weight at one position of the kernel does: from which phase of the
// input to which of the output, shifted by how much.
struct Tap {
  int in_phase, out_phase;
  int64_t shift[2];
};

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
      1, std::min<int64_t>(p->in_channels, 10'000 / floats));
  p->blocks = CeilDivide(p->in_channels, p->channel_block);
  p->packed_floats = p->in_channels * p->in_phases * p->packed[0] *
                     p->packed[1] * l;
  const int64_t vectors = CeilDivide(CeilDivide(p->out_channels, l), splits);
  p->micro_floats = p->out_phases * vectors * l * r * c * l;
}

// Chooses the tile of a lane by its cost.
inline void ChooseTile(RiglPlan* plan, const RiglLanes& lanes,
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
        for (int splits = 1; splits <= (may_split ? threads : 1); ++splits) {
          if (splits > vectors) break;
          SetTile(plan, th, tw, m[0], m[1], splits, lanes);
          if (splits > 1 && plan->groups >= 2 * threads) break;
          const double cost = Cost(*plan, lanes, weights, threads);
          if (cost < least) least = cost, best = *plan;
        }
      }
    }
  }
  *plan = best;
}

// Plans the forward pass, or with `transposed` the gradient of its input.
// `active`: where the weights that are left are in the kernel (HWIO), sorted.
inline OwnedPlan MakePlan(const Convolution& conv,
                          const std::vector<int32_t>& active, bool transposed,
                          bool may_split, int threads,
                          const RiglLanes& lanes) {
  OwnedPlan owned;
  RiglPlan& p = owned.plan;
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

  // Row o of the output takes row s o + t of the input, t = k d - padding:
  // row o + floor(t / s) of the phase t mod s. The other way round, row m of
  // the phase t mod s of the input takes row m - floor(t / s) of the output.
  std::vector<int>& fine_rows = transposed ? owned.out_rows : owned.in_rows;
  std::vector<int>& fine_columns =
      transposed ? owned.out_columns : owned.in_columns;
  auto phase_of = [&](int row, int column) {
    for (size_t f = 0; f < fine_rows.size(); ++f)
      if (fine_rows[f] == row && fine_columns[f] == column) return int(f);
    fine_rows.push_back(row);
    fine_columns.push_back(column);
    return int(fine_rows.size()) - 1;
  };
  if (transposed)  // what no weight reaches is zero, and written
    for (int a = 0; a < conv.stride[0]; ++a)
      for (int b = 0; b < conv.stride[1]; ++b) phase_of(a, b);

  const int positions = conv.kernel[0] * conv.kernel[1];
  const int64_t per_position = conv.channels * conv.filters;
  std::vector<bool> used(positions, false);
  for (int32_t w : active) used[w / per_position] = true;
  std::vector<Tap> taps(positions);
  int64_t most[2] = {};
  bool first = true;
  for (int k = 0; k < positions; ++k) {
    if (!used[k]) continue;
    const int at[2] = {k / conv.kernel[1], k % conv.kernel[1]};
    int phase[2];
    for (int a = 0; a < 2; ++a) {
      const int64_t t = int64_t{at[a]} * conv.dilation[a] - conv.padding[a];
      const int64_t q = FloorDivide(t, conv.stride[a]);
      phase[a] = t - q * conv.stride[a];
      taps[k].shift[a] = transposed ? -q : q;
    }
    const int fine = phase_of(phase[0], phase[1]);
    taps[k].in_phase = transposed ? 0 : fine;
    taps[k].out_phase = transposed ? fine : 0;
    for (int a = 0; a < 2; ++a) {
      const int64_t q = taps[k].shift[a];
      if (first || q < p.first_shift[a]) p.first_shift[a] = q;
      if (first || q > most[a]) most[a] = q;
    }
    first = false;
  }
  for (int a = 0; a < 2; ++a) p.halo[a] = most[a] - p.first_shift[a];
  if (fine_rows.empty()) phase_of(0, 0);  // no weight is left
  (transposed ? owned.in_rows : owned.out_rows) = {0};
  (transposed ? owned.in_columns : owned.out_columns) = {0};
  p.in_phases = owned.in_rows.size();
  p.out_phases = owned.out_rows.size();

  ChooseTile(&p, lanes, active.size(), threads, may_split);

  // Sorted by block of input channels and output plane, counting each.
  const int64_t planes = p.out_phases * p.out_channels;
  owned.rows.assign(p.blocks * planes + 1, 0);
  std::vector<int32_t> bins(active.size());
  std::vector<int32_t> shifted(active.size());
  const int64_t pitch = int64_t{p.packed[1]} * lanes.width;
  const int64_t plane = p.packed[0] * pitch;
  for (size_t e = 0; e < active.size(); ++e) {
    const int64_t in_kernel = active[e] % per_position;
    const Tap& tap = taps[active[e] / per_position];
    int64_t in = in_kernel / conv.filters, out = in_kernel % conv.filters;
    if (transposed) std::swap(in, out);
    bins[e] = (in / p.channel_block * p.out_phases + tap.out_phase) *
                  p.out_channels + out;
    shifted[e] = (in * p.in_phases + tap.in_phase) * plane +
                 (tap.shift[0] - p.first_shift[0]) * pitch +
                 (tap.shift[1] - p.first_shift[1]) * lanes.width;
    ++owned.rows[bins[e] + 1];
  }
  for (size_t b = 1; b < owned.rows.size(); ++b)
    owned.rows[b] += owned.rows[b - 1];
  owned.offsets.resize(active.size());
  owned.weights.resize(active.size());
  std::vector<int32_t> next(owned.rows.begin(), owned.rows.end() - 1);
  for (size_t e = 0; e < active.size(); ++e) {
    const int32_t to = next[bins[e]]++;
    owned.offsets[to] = shifted[e];
    owned.weights[to] = active[e];
  }

  p.in_phase_rows = owned.in_rows.data();
  p.in_phase_columns = owned.in_columns.data();
  p.out_phase_rows = owned.out_rows.data();
  p.out_phase_columns = owned.out_columns.data();
  p.rows = owned.rows.data();
  p.offsets = owned.offsets.data();
  return owned;
}

}  // namespace rigl_keras

#endif  // RIGL_KERAS_PLANS_H_

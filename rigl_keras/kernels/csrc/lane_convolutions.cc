// The arithmetic of lane_convolutions.h for one instruction set, RIGL_ISA.

#include "lane_convolutions.h"

#include "isa.h"
#include "micro_tiles.h"
#include "vectors.h"

namespace {

using namespace vectors;

constexpr int kOutputsAhead = 3;
constexpr int kChannelsAhead = 6;

// The line of micro-tiles that a group of a plan is.
struct Line {
  int64_t group;  // of images
  int64_t row;
};

RIGL_INLINE Line LineOf(const RiglPlan& plan, int64_t group) {
  return {group / plan.tiles[0], group % plan.tiles[0] * plan.micro[0]};
}

// Asks for vectors that are read soon.
RIGL_INLINE void Fetch(const float* from, int64_t count, int64_t step) {
  for (int64_t j = 0; j < count; ++j)
    __builtin_prefetch(from + j * step, 0, 3);
}

// Copies what a micro-tile takes of a block of channels: [channel, phase, row,
// column, lane], zero where the image ends. `cold`: nobody has fetched it.
template <int R, int C, bool cold = false>
RIGL_INLINE void CopyBlock(const RiglPlan& plan, const Line& line,
                           int64_t column, int block, const float* x,
                           float* packed) {
  const int64_t channel = int64_t{block} * plan.channel_block;
  int64_t channels = plan.in_channels - channel;
  if (channels > plan.channel_block) channels = plan.channel_block;
  const int64_t stride = plan.in_stride[1];
  const int64_t plane = plan.in_height * plan.in_width * L;
  const float* from = x + (line.group * plan.in_channels + channel) * plane;
  const int64_t pitch = int64_t{plan.packed[1]} * L;
  const int64_t each = plan.in_phases * plan.packed[0] * pitch;
  for (int f = 0; f < plan.in_phases; ++f) {
    // Columns [begin, end) are in the image.
    const int64_t first = (column + plan.first_shift[1]) * stride +
                          plan.in_phase_columns[f];
    int64_t begin = first < 0 ? (-first + stride - 1) / stride : 0;
    int64_t end = (plan.in_width - first + stride - 1) / stride;
    if (end > plan.packed[1]) end = plan.packed[1];
    if (begin > end) begin = end = 0;
    for (int i = 0; i < plan.packed[0]; ++i) {
      float* to = packed + (f * plan.packed[0] + i) * pitch;
      const int64_t row =
          (line.row + i + plan.first_shift[0]) * plan.in_stride[0] +
          plan.in_phase_rows[f];
      const bool inside = row >= 0 && row < plan.in_height;
      const float* at = from + (row * plan.in_width + first) * L;
      const int64_t last = inside ? end : 0, head = inside ? begin : 0;
      if (inside && begin == 0 && end == C + 2 && stride == 1 &&
          plan.packed[1] == C + 2) {
        for (int64_t c = 0; c < channels; ++c) {
          if (cold && c + kChannelsAhead < channels)
            Fetch(at + (c + kChannelsAhead) * plane, C + 2, L);
#pragma GCC unroll 10
          for (int j = 0; j < C + 2; ++j)
            At(to + c * each + j * L) = At(at + c * plane + j * L);
        }
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        float* own = to + c * each;
        const float* theirs = at + c * plane;
        if (cold && inside && c + kChannelsAhead < channels)
          Fetch(theirs + kChannelsAhead * plane + head * stride * L,
                last - head, stride * L);
        int64_t j = 0;
        for (; j < head; ++j) At(own + j * L) = Vector{};
        for (; j < last; ++j) At(own + j * L) = At(theirs + j * stride * L);
        for (; j < plan.packed[1]; ++j) At(own + j * L) = Vector{};
      }
    }
  }
}

// What the next micro-tile takes of a block of channels, asked for while this
// one is computed: memory is far away, and no processor guesses these strides.
struct Ahead {
  const float* from;  // of the first channel and row
  int64_t plane, pitch, channels;
  int rows, columns;

  // The parts [part, part + 1) / parts of it.
  inline __attribute__((always_inline)) void Fetch(int64_t part,
                                                   int64_t parts) const {
    for (int64_t c = channels * part / parts;
         c < channels * (part + 1) / parts; ++c)
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j)
          __builtin_prefetch(from + c * plane + i * pitch + j * L, 0, 2);
  }
};

template <int R, int C>
RIGL_INLINE Ahead AheadOf(const RiglPlan& plan, const float* x, Line line,
                          int64_t column, int block) {
  Ahead ahead = {};
  // On the same line, the halo is there already.
  int64_t first_column = plan.first_shift[1], columns = C + plan.halo[1];
  column += C;
  if (column < plan.width) {
    first_column += column + plan.halo[1];
    columns = C;
  } else if (line.row + R < plan.height) {
    line.row += R;
  } else if ((line.group + 1) * L < plan.images) {
    line = {line.group + 1, 0};
  } else {
    return ahead;
  }
  int64_t row = (line.row + plan.first_shift[0]) * plan.in_stride[0];
  int64_t end = row + (R + plan.halo[0]) * plan.in_stride[0];
  if (row < 0) row = 0;
  if (end > plan.in_height) end = plan.in_height;
  int64_t begin = first_column * plan.in_stride[1];
  int64_t last = begin + columns * plan.in_stride[1];
  if (begin < 0) begin = 0;
  if (last > plan.in_width) last = plan.in_width;
  if (end <= row || last <= begin) return ahead;
  const int64_t channel = int64_t{block} * plan.channel_block;
  ahead.channels = plan.in_channels - channel;
  if (ahead.channels > plan.channel_block)
    ahead.channels = plan.channel_block;
  ahead.pitch = plan.in_width * L;
  ahead.plane = plan.in_height * ahead.pitch;
  ahead.rows = end - row;
  ahead.columns = last - begin;
  ahead.from = x + (line.group * plan.in_channels + channel) * ahead.plane +
               row * ahead.pitch + begin * L;
  return ahead;
}

// Whether a whole micro-tile is whole lines of 64 bytes.
template <int C>
RIGL_INLINE bool FillsLines(const RiglPlan& plan) {
  constexpr int kVectors = 64 / (L * 4);  // in a line
  return kVectors == 1 || (C % kVectors == 0 && plan.out_stride[1] == 1 &&
                           plan.out_width % kVectors == 0);
}

template <int R, int C>
void Correlate(const RiglPlan& plan, bool add, const float* x,
               const float* weights, float* y, int64_t unit, float* memory) {
  const Line line = LineOf(plan, unit);
  float* packed = memory;
  float* sums = memory + plan.packed_floats;
  const int64_t pitch = int64_t{plan.packed[1]} * L;
  const int64_t kept = plan.out_channels;
  const int64_t out_plane = plan.out_height * plan.out_width * L;
  const int64_t out_row = plan.out_stride[0] * plan.out_width * L;
  const int64_t out_column = plan.out_stride[1] * L;
  const int64_t groups = (plan.images + L - 1) / L;
  const bool past = groups * kept * out_plane > kRiglCachedFloats &&
                    FillsLines<C>(plan);
  for (int64_t j = 0; j < plan.width; j += C) {
    for (int b = 0; b < plan.blocks; ++b) {
      CopyBlock<R, C>(plan, line, j, b, x, packed);
      const Ahead ahead = AheadOf<R, C>(plan, x, line, j, b);
      const bool last = b + 1 == plan.blocks;
      for (int g = 0; g < plan.out_phases; ++g) {
        const int32_t* rows =
            plan.rows +
            (int64_t{b} * plan.out_phases + g) * plan.out_channels;
        float* mine = sums + g * kept * R * C * L;
        const int64_t row =
            line.row * plan.out_stride[0] + plan.out_phase_rows[g];
        const int64_t column =
            j * plan.out_stride[1] + plan.out_phase_columns[g];
        // The rows and columns of the micro-tile that are outputs.
        const int64_t height =
            (plan.out_height - row + plan.out_stride[0] - 1) /
            plan.out_stride[0];
        const int64_t width =
            (plan.out_width - column + plan.out_stride[1] - 1) /
            plan.out_stride[1];
        const bool whole = height >= R && width >= C;
        float* to = y + line.group * plan.out_channels * out_plane +
                    (row * plan.out_width + column) * L;
        for (int64_t o = 0; o < kept; ++o) {
          float* own = mine + o * R * C * L;
          const bool direct = last && whole;
          if (g == 0) ahead.Fetch(o, kept);
          if (add && b == 0)
            for (int r = 0; r < R && r < height; ++r)
              for (int c = 0; c < C && c < width; ++c)
                At(own + (r * C + c) * L) =
                    At(to + o * out_plane + r * out_row + c * out_column);
          if (direct && !past && o + kOutputsAhead < kept)
            for (int r = 0; r < R; ++r)
              for (int c = 0; c < C; ++c)
                __builtin_prefetch(to + (o + kOutputsAhead) * out_plane +
                                       r * out_row + c * out_column,
                                   1, 3);
          Accumulate<R, C>(packed, pitch, plan.offsets + rows[o],
                           weights + rows[o], rows[o + 1] - rows[o],
                           b || add ? own : nullptr,
                           direct ? to + o * out_plane : own,
                           direct ? out_row : C * L,
                           direct ? out_column : L, direct && past);
          if (last && !whole)
            for (int r = 0; r < R && r < height; ++r)
              for (int c = 0; c < C && c < width; ++c)
                At(to + o * out_plane + r * out_row + c * out_column) =
                    At(own + (r * C + c) * L);
        }
      }
    }
  }
  if (past) WrittenPast();
}

// Adds an output channel's gradient times what each of K weights takes.
template <int K, int R, int C>
RIGL_INLINE void AddProducts(const Vector (&upstream)[R][C],
                             const float* const (&lines)[R],
                             const int32_t* offsets, Vector* sums) {
  int64_t from[K];
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) from[k] = offsets[k];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k)
        sums[k] += upstream[r][c] * At(lines[r] + from[k] + c * L);
}

// Adds the gradients of the weights of one output channel over a micro-tile:
// to a vector for each, or to a number.
template <int R, int C, bool vectors>
RIGL_INLINE void AccumulateWeights(const float* packed, int64_t pitch,
                                   const int32_t* offsets, int count,
                                   const float* dy, float* dw) {
  Vector upstream[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) upstream[r][c] = At(dy + (r * C + c) * L);
  const float* lines[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) lines[r] = Hidden(packed + r * pitch);
  // Four at once, to hide what an addition takes.
  constexpr int kChains = 4;
  int e = 0;
  for (; e + kChains <= count; e += kChains) {
    Vector sums[kChains] = {};
    if (vectors)
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k) sums[k] = At(dw + (e + k) * L);
    AddProducts<kChains>(upstream, lines, offsets + e, sums);
    if (vectors)
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k) At(dw + (e + k) * L) = sums[k];
    else
      AddSums(sums, dw + e);
  }
  const int left = count - e;
  if (!left) return;
  Vector sums[kChains] = {};
  if (left == 1)
    AddProducts<1>(upstream, lines, offsets + e, sums);
  else if (left == 2)
    AddProducts<2>(upstream, lines, offsets + e, sums);
  else
    AddProducts<3>(upstream, lines, offsets + e, sums);
  if (vectors) {
    for (int k = 0; k < left; ++k) At(dw + (e + k) * L) += sums[k];
  } else {
    float some[kChains] = {};
    AddSums(sums, some);
    for (int k = 0; k < left; ++k) dw[e + k] += some[k];
  }
}

template <int R, int C, bool vectors>
void CorrelateWeights(const RiglPlan& plan, const float* x, const float* dy,
                      float* dw, int64_t begin, int64_t end, int64_t group,
                      float* memory) {
  const Line line = LineOf(plan, group);
  float* packed = memory;
  float* upstream = memory + plan.packed_floats;
  const int64_t pitch = int64_t{plan.packed[1]} * L;
  const int64_t out_plane = plan.out_height * plan.out_width * L;
  const int64_t height = plan.out_height - line.row;
  for (int64_t j = 0; j < plan.width; j += C) {
    const int64_t width = plan.out_width - j;
    for (int64_t o = begin; o < end; ++o) {
      const float* from = dy +
                          (line.group * plan.out_channels + o) * out_plane +
                          (line.row * plan.out_width + j) * L;
      float* to = upstream + (o - begin) * R * C * L;
      if (o + kChannelsAhead < end)
        for (int r = 0; r < R && r < height; ++r)
          Fetch(from + kChannelsAhead * out_plane + r * plan.out_width * L, C,
                L);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c)
          At(to + (r * C + c) * L) =
              r < height && c < width
                  ? At(from + (r * plan.out_width + c) * L)
                  : Vector{};
    }
    float* own = dw;
    for (int b = 0; b < plan.blocks; ++b) {
      CopyBlock<R, C, true>(plan, line, j, b, x, packed);
      const int32_t* rows = plan.rows + int64_t{b} * plan.out_channels;
      for (int64_t o = begin; o < end; ++o) {
        const int count = rows[o + 1] - rows[o];
        AccumulateWeights<R, C, vectors>(
            packed, pitch, plan.offsets + rows[o], count,
            upstream + (o - begin) * R * C * L, vectors ? own : dw + rows[o]);
        own += int64_t{count} * L;
      }
    }
  }
}

void CorrelateAny(const RiglPlan* plan, int add, const float* x,
                  const float* weights, float* y, int64_t unit,
                  float* memory) {
#define RIGL_CASE(R, C)                           \
  if (plan->micro[0] == R && plan->micro[1] == C) \
    return Correlate<R, C>(*plan, add, x, weights, y, unit, memory);
  RIGL_MICRO_TILES(RIGL_CASE)
#undef RIGL_CASE
}

template <bool vectors>
void CorrelateWeightsAny(const RiglPlan* plan, const float* x, const float* dy,
                         float* dw, int64_t begin, int64_t end, int64_t group,
                         float* memory) {
#define RIGL_CASE(R, C)                           \
  if (plan->micro[0] == R && plan->micro[1] == C) \
    return CorrelateWeights<R, C, vectors>(*plan, x, dy, dw, begin, end, group, \
                                           memory);
  RIGL_MICRO_TILES(RIGL_CASE)
#undef RIGL_CASE
}

void Sums(const float* vectors, int64_t count, float* sums) {
  for (int64_t e = 0; e < count; ++e) sums[e] = 0;
  int64_t e = 0;
  for (; e + 4 <= count; e += 4)
    AddSums((const Vector*)(vectors + e * L), sums + e);
  for (; e < count; ++e) sums[e] = Sum(At(vectors + e * L));
}

}  // namespace

extern "C" const RiglLaneConvolutions RIGL_JOIN(rigl_lane_convolutions_,
                                                RIGL_ISA) = {
    RIGL_TEXT(RIGL_ISA),
    L,
    CorrelateAny,
    CorrelateWeightsAny<true>,
    Sums,
    CorrelateWeightsAny<false>};

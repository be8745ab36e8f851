// The arithmetic of lanes.h for one instruction set, RIGL_ISA.

#include "lanes.h"

#include "isa.h"
#include "micro_tiles.h"
#include "vectors.h"

namespace {

using namespace vectors;

// Sixteen sums need more registers than AVX2 has.
constexpr int kRegisters = L == 16 ? 16 : 8;

// The lanes of one group: which image each is of, and where its tile begins.
struct Lanes {
  int64_t image[L];
  int64_t row[L];
  int64_t column[L];
  int count;  // lanes that are in use
  bool one_column;
};

Lanes LanesOf(const RiglPlan& plan, int64_t group) {
  Lanes lanes;
  const int64_t all = plan.images * plan.tiles[0] * plan.tiles[1];
  lanes.count = 0;
  lanes.one_column = true;
  for (int l = 0; l < L; ++l) {
    const int64_t lane = group * L + l;
    if (lane >= all) break;
    const int64_t tile = lane / plan.images;
    lanes.image[l] = lane % plan.images;
    lanes.row[l] = tile / plan.tiles[1] * plan.tile[0];
    lanes.column[l] = tile % plan.tiles[1] * plan.tile[1];
    lanes.one_column &= lanes.column[l] == lanes.column[0];
    ++lanes.count;
  }
  return lanes;
}

// Reads the channels [from, from + L) of one pixel of each lane, and writes
// one vector for each channel, `stride` floats apart. Null lanes are zero.
template <bool whole>
RIGL_INLINE void PackChannels(const float* const* pixels, int64_t from,
                              int count, float* packed, int64_t stride) {
  Vector rows[L];
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    Vector v{};
    if (pixels[l]) {
      if (whole) {
        v = *(const Unaligned*)(pixels[l] + from);
      } else {
        for (int i = 0; i < count; ++i) v[i] = pixels[l][from + i];
      }
    }
    rows[l] = v;
  }
  Transpose(rows);
  if (whole) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) *(Vector*)(packed + i * stride) = rows[i];
  } else {
    for (int i = 0; i < count; ++i) *(Vector*)(packed + i * stride) = rows[i];
  }
}

void PackPixel(const float* const* pixels, int64_t channels, float* packed,
               int64_t stride) {
  int64_t c = 0;
  for (; c + L <= channels; c += L)
    PackChannels<true>(pixels, c, L, packed + c * stride, stride);
  if (c < channels)
    PackChannels<false>(pixels, c, channels - c, packed + c * stride, stride);
}

// Writes the tiles of a group with their halos: [channel, phase, row, column,
// lane], zero where the image ends.
void PackTile(const RiglPlan& plan, const Lanes& lanes, const float* x,
              float* packed) {
  const int64_t plane = int64_t{plan.packed[0]} * plan.packed[1] * L;
  const int64_t stride = plane * plan.in_phases;
  for (int f = 0; f < plan.in_phases; ++f) {
    for (int i = 0; i < plan.packed[0]; ++i) {
      const float* begins[L];
      bool any = false;
      for (int l = 0; l < L; ++l) {
        begins[l] = nullptr;
        if (l >= lanes.count) continue;
        const int64_t row =
            (lanes.row[l] + i + plan.first_shift[0]) * plan.in_stride[0] +
            plan.in_phase_rows[f];
        // Beyond the tile and its halo, nothing is needed.
        if (row < 0 || row >= plan.in_height ||
            i >= plan.tile[0] + plan.halo[0])
          continue;
        begins[l] = x + (lanes.image[l] * plan.in_height + row) *
                            plan.in_width * plan.in_channels;
        any = true;
      }
      for (int j = 0; j < plan.packed[1]; ++j) {
        float* to = packed + f * plane +
                    (int64_t{i} * plan.packed[1] + j) * L;
        const float* pixels[L];
        bool some = false;
        if (any && j < plan.tile[1] + plan.halo[1]) {
          for (int l = 0; l < L; ++l) {
            pixels[l] = nullptr;
            if (!begins[l]) continue;
            const int64_t column =
                (lanes.column[l] + j + plan.first_shift[1]) *
                    plan.in_stride[1] +
                plan.in_phase_columns[f];
            if (column < 0 || column >= plan.in_width) {
              if (lanes.one_column) break;
              continue;
            }
            pixels[l] = begins[l] + column * plan.in_channels;
            some = true;
          }
        }
        if (some) {
          PackPixel(pixels, plan.in_channels, to, stride);
        } else {
          for (int64_t c = 0; c < plan.in_channels; ++c)
            *(Vector*)(to + c * stride) = Vector{};
        }
      }
    }
  }
}

// Where a lane's pixel of the output is, or null: outside the tile or image.
RIGL_INLINE void OutputPixels(const RiglPlan& plan, const Lanes& lanes,
                              int phase, int i, int j, int64_t* at) {
  for (int l = 0; l < L; ++l) {
    at[l] = -1;
    if (l >= lanes.count || i >= plan.tile[0] || j >= plan.tile[1]) continue;
    const int64_t row = (lanes.row[l] + i) * plan.out_stride[0] +
                        plan.out_phase_rows[phase];
    const int64_t column = (lanes.column[l] + j) * plan.out_stride[1] +
                           plan.out_phase_columns[phase];
    if (row >= plan.out_height || column >= plan.out_width) continue;
    at[l] = ((lanes.image[l] * plan.out_height + row) * plan.out_width +
             column) *
            plan.out_channels;
  }
}

// Writes one pixel of each lane, or adds to it: channels [begin, end) of the
// sums.
template <bool add>
RIGL_INLINE void UnpackPixel(const float* sums, int64_t stride, int64_t begin,
                             int64_t end, const int64_t* at, float* y) {
  for (int64_t c = begin; c < end; c += L) {
    const int count = end - c < L ? end - c : L;
    Vector rows[L];
    if (count == L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        rows[i] = *(const Vector*)(sums + (c - begin + i) * stride);
    } else {
      for (int i = 0; i < L; ++i)
        rows[i] = i < count
                      ? *(const Vector*)(sums + (c - begin + i) * stride)
                      : Vector{};
    }
    Transpose(rows);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      if (at[l] < 0) continue;
      float* const to = y + at[l] + c;
      Vector v = rows[l];
      if (count == L) {
        if (add) v += *(const Unaligned*)to;
        *(Unaligned*)to = v;
      } else {
        for (int i = 0; i < count; ++i) to[i] = add ? to[i] + v[i] : v[i];
      }
    }
  }
}

template <int R, int C, bool add>
void Correlate(const RiglPlan& plan, const float* x, const float* weights,
               float* y, int64_t unit, float* memory) {
  const Lanes lanes = LanesOf(plan, unit / plan.splits);
  float* packed = memory;
  float* sums = memory + plan.packed_floats;
  PackTile(plan, lanes, x, packed);

  // The output channels of this unit, whole vectors of them.
  const int64_t vectors = (plan.out_channels + L - 1) / L;
  const int64_t split = unit % plan.splits;
  const int64_t begin = vectors * split / plan.splits * L;
  int64_t end = vectors * (split + 1) / plan.splits * L;
  if (end > plan.out_channels) end = plan.out_channels;

  const int64_t pitch = int64_t{plan.packed[1]} * L;
  const int64_t kept = end - begin;
  for (int i = 0; i < plan.tile[0]; i += R) {
    for (int j = 0; j < plan.tile[1]; j += C) {
      const float* at = packed + i * pitch + j * L;
      for (int b = 0; b < plan.blocks; ++b) {
        for (int g = 0; g < plan.out_phases; ++g) {
          const int32_t* rows =
              plan.rows +
              (int64_t{b} * plan.out_phases + g) * plan.out_channels + begin;
          float* out = sums + g * kept * R * C * L;
          for (int64_t o = 0; o < kept; ++o)
            Accumulate<R, C>(at, pitch, plan.offsets + rows[o],
                             weights + rows[o], rows[o + 1] - rows[o],
                             b ? out + o * R * C * L : nullptr,
                             out + o * R * C * L, C * L, L);
        }
      }
      for (int g = 0; g < plan.out_phases; ++g) {
        for (int p = 0; p < R * C; ++p) {
          int64_t pixels[L];
          OutputPixels(plan, lanes, g, i + p / C, j + p % C, pixels);
          UnpackPixel<add>(sums + (g * kept * R * C + p) * L,
                           int64_t{R} * C * L, begin, end, pixels, y);
        }
      }
    }
  }
}

// Adds the gradients of the weights of one output channel over a micro-tile.
template <int R, int C>
RIGL_INLINE void AccumulateWeights(const float* packed, int64_t pitch,
                                   const int32_t* offsets, int count,
                                   const float* dy, float* dw) {
  Vector upstream[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      upstream[r][c] = *(const Vector*)(dy + (r * C + c) * L);
  int e = 0;
  for (; e + 4 <= count; e += 4) {
    Vector sums[4];
    const float* from[4];
    for (int k = 0; k < 4; ++k) from[k] = packed + offsets[e + k];
    for (int k = 0; k < 4; ++k) sums[k] = Vector{};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
          sums[k] +=
              upstream[r][c] * *(const Vector*)(from[k] + r * pitch + c * L);
    AddSums(sums, dw + e);
  }
  for (; e < count; ++e) {
    const float* from = packed + offsets[e];
    Vector sum{};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        sum += upstream[r][c] * *(const Vector*)(from + r * pitch + c * L);
    dw[e] += Sum(sum);
  }
}

template <int R, int C>
void CorrelateWeights(const RiglPlan& plan, const float* x, const float* dy,
                      float* dw, int64_t group, float* memory) {
  const Lanes lanes = LanesOf(plan, group);
  float* packed = memory;
  float* upstream = memory + plan.packed_floats;
  PackTile(plan, lanes, x, packed);
  const int64_t pitch = int64_t{plan.packed[1]} * L;
  for (int i = 0; i < plan.tile[0]; i += R) {
    for (int j = 0; j < plan.tile[1]; j += C) {
      for (int p = 0; p < R * C; ++p) {
        int64_t at[L];
        const float* pixels[L];
        OutputPixels(plan, lanes, 0, i + p / C, j + p % C, at);
        for (int l = 0; l < L; ++l) pixels[l] = at[l] < 0 ? nullptr : dy + at[l];
        PackPixel(pixels, plan.out_channels, upstream + p * L,
                  int64_t{R} * C * L);
      }
      const float* at = packed + i * pitch + j * L;
      for (int b = 0; b < plan.blocks; ++b) {
        const int32_t* rows = plan.rows + int64_t{b} * plan.out_channels;
        for (int64_t o = 0; o < plan.out_channels; ++o)
          AccumulateWeights<R, C>(at, pitch, plan.offsets + rows[o],
                                  rows[o + 1] - rows[o],
                                  upstream + o * R * C * L, dw + rows[o]);
      }
    }
  }
}

void CorrelateAny(const RiglPlan* plan, int add, const float* x,
                  const float* weights, float* y, int64_t unit,
                  float* memory) {
#define RIGL_CASE(R, C)                                                   \
  if (plan->micro[0] == R && plan->micro[1] == C) {                       \
    return add ? Correlate<R, C, true>(*plan, x, weights, y, unit, memory) \
               : Correlate<R, C, false>(*plan, x, weights, y, unit,       \
                                        memory);                          \
  }
  RIGL_MICRO_TILES(RIGL_CASE)
#undef RIGL_CASE
}

void CorrelateWeightsAny(const RiglPlan* plan, const float* x, const float* dy,
                         float* dw, int64_t group, float* memory) {
#define RIGL_CASE(R, C)                               \
  if (plan->micro[0] == R && plan->micro[1] == C)     \
    return CorrelateWeights<R, C>(*plan, x, dy, dw, group, memory);
  RIGL_MICRO_TILES(RIGL_CASE)
#undef RIGL_CASE
}

}  // namespace

extern "C" const RiglLanes RIGL_JOIN(rigl_lanes_, RIGL_ISA) = {
    RIGL_TEXT(RIGL_ISA), L, kRegisters, CorrelateAny, CorrelateWeightsAny};

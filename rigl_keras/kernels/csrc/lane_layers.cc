// The arithmetic of lane_layers.h for one instruction set, RIGL_ISA.

#include "lane_layers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "philox.h"
#include "vectors.h"

namespace {

using namespace vectors;

RIGL_INLINE Vector& At(float* to) { return *(Vector*)to; }
RIGL_INLINE Vector At(const float* from) { return *(const Vector*)from; }

RIGL_INLINE Vector Relu(Vector v) {
  // A NaN stays one, as in TensorFlow.
  return v < Vector{} ? Vector{} : v;
}

// The values of lanes whose bit is set, and 0.
RIGL_INLINE Vector Where(unsigned bits, Vector v) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)v);
#else
  Indices each{};
  for (int l = 0; l < L; ++l) each[l] = 1 << l;
  const Indices kept = ((Indices{} + (int)bits) & each) == each;
  return (Vector)((Indices)v & kept);
#endif
}

RIGL_INLINE unsigned Positive(Vector v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(v > Vector{}));
#else
  unsigned bits = 0;
  for (int l = 0; l < L; ++l) bits |= unsigned{v[l] > 0} << l;
  return bits;
#endif
}

RIGL_INLINE unsigned Used(int lanes) { return (1u << lanes) - 1; }

// ---------------------------------------------------------------- Convolution

// The compiler shall not know where this pointer comes from: it would make
// each address anew, with more instructions than there are products.
RIGL_INLINE const float* Hidden(const float* pointer) {
  __asm__("" : "+r"(pointer));
  return pointer;
}

constexpr int kOutputsAhead = 3;

// The line of micro-tiles that a group of a plan is.
struct Line {
  int64_t group;  // of images
  int64_t row;
};

RIGL_INLINE Line LineOf(const RiglPlan& plan, int64_t group) {
  return {group / plan.tiles[0], group % plan.tiles[0] * plan.micro[0]};
}

// Copies what a micro-tile takes of a block of channels: [channel, phase, row,
// column, lane], zero where the image ends.
template <int R, int C>
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
        for (int64_t c = 0; c < channels; ++c)
#pragma GCC unroll 10
          for (int j = 0; j < C + 2; ++j)
            At(to + c * each + j * L) = At(at + c * plane + j * L);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        float* own = to + c * each;
        const float* theirs = at + c * plane;
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

// Adds the products of some weights of one output channel to a micro-tile.
template <int R, int C>
RIGL_INLINE void Accumulate(const float* packed, int64_t pitch,
                            const int32_t* offsets, const float* weights,
                            int count, const float* before, float* out,
                            int64_t out_row, int64_t out_column) {
  Vector sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      sums[r][c] = before ? At(before + (r * C + c) * L) : Vector{};
  const float* lines[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) lines[r] = Hidden(packed + r * pitch);
  for (int e = 0; e < count; ++e) {
    const int64_t from = offsets[e];
    const Vector weight = All(weights[e]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        sums[r][c] += weight * At(lines[r] + from + c * L);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      At(out + r * out_row + c * out_column) = sums[r][c];
}

template <int R, int C>
void Correlate(const RiglPlan& plan, const float* x, const float* weights,
               float* y, int64_t unit, float* memory) {
  const Line line = LineOf(plan, unit);
  float* packed = memory;
  float* sums = memory + plan.packed_floats;
  const int64_t pitch = int64_t{plan.packed[1]} * L;
  const int64_t kept = plan.out_channels;
  const int64_t out_plane = plan.out_height * plan.out_width * L;
  const int64_t out_row = plan.out_stride[0] * plan.out_width * L;
  const int64_t out_column = plan.out_stride[1] * L;
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
          if (direct && o + kOutputsAhead < kept)
            for (int r = 0; r < R; ++r)
              for (int c = 0; c < C; ++c)
                __builtin_prefetch(to + (o + kOutputsAhead) * out_plane +
                                       r * out_row + c * out_column,
                                   1, 3);
          Accumulate<R, C>(packed, pitch, plan.offsets + rows[o],
                           weights + rows[o], rows[o + 1] - rows[o],
                           b ? own : nullptr,
                           direct ? to + o * out_plane : own,
                           direct ? out_row : C * L,
                           direct ? out_column : L);
          if (last && !whole)
            for (int r = 0; r < R && r < height; ++r)
              for (int c = 0; c < C && c < width; ++c)
                At(to + o * out_plane + r * out_row + c * out_column) =
                    At(own + (r * C + c) * L);
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
    for (int c = 0; c < C; ++c) upstream[r][c] = At(dy + (r * C + c) * L);
  const float* lines[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) lines[r] = Hidden(packed + r * pitch);
  // Four at once, to hide what an addition takes.
  constexpr int kChains = 4;
  int e = 0;
  for (; e + kChains <= count; e += kChains) {
    Vector sums[kChains];
    int64_t from[kChains];
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) {
      from[k] = offsets[e + k];
      sums[k] = At(dw + (e + k) * L);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int k = 0; k < kChains; ++k)
          sums[k] += upstream[r][c] * At(lines[r] + from[k] + c * L);
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) At(dw + (e + k) * L) = sums[k];
  }
  for (; e < count; ++e) {
    const int64_t from = offsets[e];
    Vector sum = At(dw + e * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        sum += upstream[r][c] * At(lines[r] + from + c * L);
    At(dw + e * L) = sum;
  }
}

template <int R, int C>
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
      CopyBlock<R, C>(plan, line, j, b, x, packed);
      const Ahead ahead = AheadOf<R, C>(plan, x, line, j, b);
      const int32_t* rows = plan.rows + int64_t{b} * plan.out_channels;
      for (int64_t o = begin; o < end; ++o) {
        ahead.Fetch(o - begin, end - begin);
        if (b == 0)
          for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c)
              __builtin_prefetch(
                  dy + (line.group * plan.out_channels + o) * out_plane +
                      ((line.row + r) * plan.out_width + j + C + c) * L,
                  0, 2);
        const int count = rows[o + 1] - rows[o];
        AccumulateWeights<R, C>(packed, pitch, plan.offsets + rows[o], count,
                                upstream + (o - begin) * R * C * L, own);
        own += int64_t{count} * L;
      }
    }
  }
}

// The micro-tiles that there are. An instruction set with few registers has
// none of sixteen vectors.
#define RIGL_MICRO_TILES(with)                                              \
  with(1, 1) with(1, 2) with(1, 4) with(1, 8) with(2, 2) with(2, 4)         \
      RIGL_LARGE_MICRO_TILES(with)
#if defined(__AVX512F__)
#define RIGL_LARGE_MICRO_TILES(with) with(4, 4) with(2, 8) with(1, 16)
#else
#define RIGL_LARGE_MICRO_TILES(with)
#endif

void CorrelateAny(const RiglPlan* plan, const float* x, const float* weights,
                  float* y, int64_t unit, float* memory) {
#define RIGL_CASE(R, C)                           \
  if (plan->micro[0] == R && plan->micro[1] == C) \
    return Correlate<R, C>(*plan, x, weights, y, unit, memory);
  RIGL_MICRO_TILES(RIGL_CASE)
#undef RIGL_CASE
}

void CorrelateWeightsAny(const RiglPlan* plan, const float* x, const float* dy,
                         float* dw, int64_t begin, int64_t end, int64_t group,
                         float* memory) {
#define RIGL_CASE(R, C)                           \
  if (plan->micro[0] == R && plan->micro[1] == C) \
    return CorrelateWeights<R, C>(*plan, x, dy, dw, begin, end, group, memory);
  RIGL_MICRO_TILES(RIGL_CASE)
#undef RIGL_CASE
}

void Sums(const float* vectors, int64_t count, float* sums) {
  for (int64_t e = 0; e < count; ++e) sums[e] = Sum(At(vectors + e * L));
}

// --------------------------------------------------------------------- Layout

void ToLanes(const float* x, int64_t images, int64_t height, int64_t width,
             int64_t channels, int64_t group, int64_t row, float* lanes) {
  const int64_t plane = height * width * L;
  float* to = lanes + group * channels * plane + row * width * L;
  for (int64_t c = 0; c < channels; c += L) {
    const int count = channels - c < L ? channels - c : L;
    for (int64_t w = 0; w < width; ++w) {
      Vector rows[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        rows[l] = Vector{};
        const int64_t image = group * L + l;
        if (image >= images) continue;
        const float* from =
            x + ((image * height + row) * width + w) * channels + c;
        if (count == L)
          rows[l] = *(const Unaligned*)from;
        else
          for (int i = 0; i < count; ++i) rows[l][i] = from[i];
      }
      Transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (i < count) At(to + (c + i) * plane + w * L) = rows[i];
    }
  }
}

void FromLanes(const float* lanes, int64_t images, int64_t height,
               int64_t width, int64_t channels, int64_t group, int64_t row,
               float* x) {
  const int64_t plane = height * width * L;
  const float* from = lanes + group * channels * plane + row * width * L;
  for (int64_t c = 0; c < channels; c += L) {
    const int count = channels - c < L ? channels - c : L;
    for (int64_t w = 0; w < width; ++w) {
      Vector rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        rows[i] = i < count ? At(from + (c + i) * plane + w * L) : Vector{};
      Transpose(rows);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        const int64_t image = group * L + l;
        if (image >= images) continue;
        float* to = x + ((image * height + row) * width + w) * channels + c;
        if (count == L)
          *(Unaligned*)to = rows[l];
        else
          for (int i = 0; i < count; ++i) to[i] = rows[l][i];
      }
    }
  }
}

// ----------------------------------------------------- Batch norm and dropout

constexpr int kChains = 4;  // sums at once, to hide what an addition takes

// The sum over vectors of f(vector).
template <typename F>
RIGL_INLINE Vector SumOver(int64_t vectors, F f) {
  Vector sums[kChains] = {};
  int64_t v = 0;
  for (; v + kChains <= vectors; v += kChains)
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) sums[i] += f(v + i);
  for (; v < vectors; ++v) sums[0] += f(v);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void Moments(const float* x, RiglPlane plane, float* mean, float* squares) {
  const unsigned used = Used(plane.used);
  const float count = static_cast<float>(plane.vectors * plane.used);
  // From the first on, so that what they have in common costs no digits.
  const Vector first = All(x[0]);
  const float center =
      x[0] + Sum(Where(used, SumOver(plane.vectors, [&](int64_t v) {
               return At(x + v * L) - first;
             }))) / count;
  *mean = center;
  const Vector middle = All(center);
  *squares = Sum(Where(used, SumOver(plane.vectors, [&](int64_t v) {
               const Vector left = At(x + v * L) - middle;
               return left * left;
             })));
}

void Keep(int64_t height, int64_t width, int64_t channels, int64_t group,
          int64_t channel, const uint64_t* counter, uint64_t key,
          uint32_t least, uint16_t* bits) {
  constexpr int kWords = sizeof(Words) / 8;  // images at once
  const int64_t pixels = height * width;
  // A counter is of four numbers, as each of these is.
  const uint64_t each = pixels * channels / 4;
  Words image{};
  for (int l = 0; l < kWords; ++l) image[l] = l;
  for (int64_t p = 0; p < pixels; ++p) {
    unsigned found[4] = {};
    for (int from = 0; from < L; from += kWords) {
      Words words[4];
      const Words step = (image + uint64_t(group * L + from)) * each +
                         uint64_t((p * channels + channel) / 4);
      const Words low = step + counter[0];
      const Words high = counter[1] - (Words)(low < step);  // -1 where it is
      words[0] = low & 0xFFFFFFFFull;
      words[1] = low >> 32;
      words[2] = high & 0xFFFFFFFFull;
      words[3] = high >> 32;
      Philox(words, key);
      for (int i = 0; i < 4; ++i) {
        const Words number = words[i] & 0x7FFFFFull;
#if defined(__AVX512F__)
        const unsigned kept = _mm512_cmpge_epu64_mask(
            (__m512i)number, _mm512_set1_epi64(least));
#else
        unsigned kept = 0;
        for (int l = 0; l < kWords; ++l)
          kept |= unsigned{number[l] >= least} << l;
#endif
        found[i] |= kept << from;
      }
    }
    for (int i = 0; i < 4; ++i) bits[i * pixels + p] = found[i] & Used(L);
  }
}

// Calls run(relu, dropout) with both as constants.
#define RIGL_FOR_NORM(run)                   \
  if (norm.relu)                             \
    passed ? run(true, true) : run(true, false); \
  else                                       \
    passed ? run(false, true) : run(false, false)

template <bool relu, bool dropout>
void NormaliseAs(const float* x, RiglPlane plane, RiglNorm norm,
                 uint16_t* passed, float* y) {
  const Vector mean = All(norm.mean), scale = All(norm.scale),
               shift = All(norm.shift), kept = All(norm.kept);
  const unsigned used = Used(plane.used);
  for (int64_t v = 0; v < plane.vectors; ++v) {
    Vector value = (At(x + v * L) - mean) * scale + shift;
    unsigned bits = used;
    if (dropout) {
      bits &= passed[v];
      passed[v] = relu ? bits & Positive(value) : bits;
    }
    if (relu) value = Relu(value);
    if (dropout) value *= kept;
    At(y + v * L) = dropout || used != Used(L) ? Where(bits, value) : value;
  }
}

void Normalise(const float* x, RiglPlane plane, RiglNorm norm,
               uint16_t* passed, float* y) {
#define RIGL_RUN(relu, dropout) \
  NormaliseAs<relu, dropout>(x, plane, norm, passed, y)
  RIGL_FOR_NORM(RIGL_RUN);
#undef RIGL_RUN
}

// The gradient of what ReLU and dropout take; `left` is x - mean.
template <bool relu, bool dropout>
RIGL_INLINE Vector Upstream(Vector left, Vector dy, unsigned passed,
                            Vector scale, Vector shift, Vector kept) {
  if (dropout) return Where(passed, dy * kept);
  if (relu) return Where(Positive(left * scale + shift), dy);
  return dy;
}

template <bool relu, bool dropout>
void UpstreamSumsAs(const float* x, const float* dy, RiglPlane plane,
                    RiglNorm norm, const uint16_t* passed, float* sum,
                    float* product) {
  const Vector mean = All(norm.mean), scale = All(norm.scale),
               shift = All(norm.shift), kept = All(norm.kept);
  Vector sums[2] = {}, products[2] = {};
  const auto add = [&](int64_t v, int i) {
    const Vector left = At(x + v * L) - mean;
    const Vector dz =
        Upstream<relu, dropout>(left, At(dy + v * L),
                                dropout ? passed[v] : 0, scale, shift, kept);
    sums[i] += dz;
    products[i] += dz * left;
  };
  int64_t v = 0;
  for (; v + 2 <= plane.vectors; v += 2) add(v, 0), add(v + 1, 1);
  if (v < plane.vectors) add(v, 0);
  const unsigned used = Used(plane.used);
  *sum = Sum(Where(used, sums[0] + sums[1]));
  *product = Sum(Where(used, products[0] + products[1]));
}

void UpstreamSums(const float* x, const float* dy, RiglPlane plane,
                  RiglNorm norm, const uint16_t* passed, float* sum,
                  float* product) {
#define RIGL_RUN(relu, dropout) \
  UpstreamSumsAs<relu, dropout>(x, dy, plane, norm, passed, sum, product)
  RIGL_FOR_NORM(RIGL_RUN);
#undef RIGL_RUN
}

template <bool relu, bool dropout>
void CombineAs(const float* x, const float* dy, RiglPlane plane, RiglNorm norm,
               const uint16_t* passed, float slope, float constant,
               float* dx) {
  const Vector mean = All(norm.mean), scale = All(norm.scale),
               shift = All(norm.shift), kept = All(norm.kept);
  const Vector steep = All(slope), more = All(constant);
  const unsigned used = Used(plane.used);
  for (int64_t v = 0; v < plane.vectors; ++v) {
    const Vector left = At(x + v * L) - mean;
    const Vector dz =
        Upstream<relu, dropout>(left, At(dy + v * L),
                                dropout ? passed[v] : 0, scale, shift, kept);
    const Vector value = dz * scale + left * steep + more;
    At(dx + v * L) = used != Used(L) ? Where(used, value) : value;
  }
}

void Combine(const float* x, const float* dy, RiglPlane plane, RiglNorm norm,
             const uint16_t* passed, float slope, float constant, float* dx) {
#define RIGL_RUN(relu, dropout) \
  CombineAs<relu, dropout>(x, dy, plane, norm, passed, slope, constant, dx)
  RIGL_FOR_NORM(RIGL_RUN);
#undef RIGL_RUN
}

}  // namespace

extern "C" const RiglLaneLayers RIGL_JOIN(rigl_lane_layers_, RIGL_ISA) = {
    RIGL_TEXT(RIGL_ISA),
    L,
    CorrelateAny,
    CorrelateWeightsAny,
    Sums,
    ToLanes,
    FromLanes,
    Moments,
    Keep,
    Normalise,
    UpstreamSums,
    Combine};

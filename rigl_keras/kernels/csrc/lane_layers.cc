// The arithmetic of lane_layers.h for one instruction set, RIGL_ISA.

#include "lane_layers.h"

#include "isa.h"
#include "philox.h"
#include "vectors.h"

namespace {

using namespace vectors;

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

// Layout.

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

// Batch norm and dropout.

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
                 uint16_t* passed, bool past, float* y) {
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
    if (dropout || used != Used(L)) value = Where(bits, value);
    if (past)
      WritePast(y + v * L, value);
    else
      At(y + v * L) = value;
  }
  if (past) WrittenPast();
}

void Normalise(const float* x, RiglPlane plane, RiglNorm norm,
               uint16_t* passed, int past, float* y) {
#define RIGL_RUN(relu, dropout) \
  NormaliseAs<relu, dropout>(x, plane, norm, passed, past, y)
  RIGL_FOR_NORM(RIGL_RUN);
#undef RIGL_RUN
}

void NormaliseAdd(const float* x, const float* addend, RiglPlane plane,
                  RiglNorm norm, uint16_t* passed, int past, float* y) {
  const Vector mean = All(norm.mean), scale = All(norm.scale),
               shift = All(norm.shift);
  const unsigned used = Used(plane.used);
  for (int64_t v = 0; v < plane.vectors; ++v) {
    Vector value =
        (At(x + v * L) - mean) * scale + shift + At(addend + v * L);
    passed[v] = used & Positive(value);
    value = Relu(value);
    if (used != Used(L)) value = Where(used, value);
    if (past)
      WritePast(y + v * L, value);
    else
      At(y + v * L) = value;
  }
  if (past) WrittenPast();
}

void Add(const float* a, const float* b, RiglPlane plane, float* sum) {
  for (int64_t v = 0; v < plane.vectors; ++v)
    At(sum + v * L) = At(a + v * L) + At(b + v * L);
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
               const uint16_t* passed, float slope, float constant, bool past,
               float* dx, float* dz) {
  const Vector mean = All(norm.mean), scale = All(norm.scale),
               shift = All(norm.shift), kept = All(norm.kept);
  const Vector steep = All(slope), more = All(constant);
  const unsigned used = Used(plane.used);
  for (int64_t v = 0; v < plane.vectors; ++v) {
    const Vector left = At(x + v * L) - mean;
    const Vector taken =
        Upstream<relu, dropout>(left, At(dy + v * L),
                                dropout ? passed[v] : 0, scale, shift, kept);
    Vector value = taken * scale + left * steep + more;
    if (used != Used(L)) value = Where(used, value);
    if (dz) At(dz + v * L) = taken;
    if (past)
      WritePast(dx + v * L, value);
    else
      At(dx + v * L) = value;
  }
  if (past) WrittenPast();
}

void Combine(const float* x, const float* dy, RiglPlane plane, RiglNorm norm,
             const uint16_t* passed, float slope, float constant, int past,
             float* dx, float* dz) {
#define RIGL_RUN(relu, dropout)                                             \
  CombineAs<relu, dropout>(x, dy, plane, norm, passed, slope, constant, past, \
                           dx, dz)
  RIGL_FOR_NORM(RIGL_RUN);
#undef RIGL_RUN
}

}  // namespace

extern "C" const RiglLaneLayers RIGL_JOIN(rigl_lane_layers_, RIGL_ISA) = {
    RIGL_TEXT(RIGL_ISA),
    L,
    ToLanes,
    FromLanes,
    Moments,
    Keep,
    Normalise,
    NormaliseAdd,
    Add,
    UpstreamSums,
    Combine};

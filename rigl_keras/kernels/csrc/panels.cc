// The arithmetic of panels.h for one instruction set, RIGL_ISA.

#include "panels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "vectors.h"

namespace {

using vectors::AddSums;
using vectors::All;
using vectors::Sum;
using vectors::Transpose;

constexpr int kVectors = 8;

// Writes of whole cache lines need not read them first.
#if defined(__AVX512F__)
constexpr bool kStreams = true;
RIGL_INLINE void Stream(float* to, Vector v) {
  _mm512_stream_ps(to, (__m512)v);
}
RIGL_INLINE void Fence() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
RIGL_INLINE void Stream(float*, Vector) {}
RIGL_INLINE void Fence() {}
#endif

// Columns [from, from + L) of L rows, or fewer: null rows are zero.
template <bool whole>
RIGL_INLINE void PackColumns(const float* const* rows, int64_t from, int count,
                             int64_t pitch, float* panel) {
  Vector values[L];
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    Vector v{};
    if (rows[l]) {
      if (whole) {
        v = *(const Unaligned*)(rows[l] + from);
      } else {
        for (int i = 0; i < count; ++i) v[i] = rows[l][from + i];
      }
    }
    values[l] = v;
  }
  Transpose(values);
  float* to = panel + from * pitch;
  if (whole) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) *(Vector*)(to + i * pitch) = values[i];
  } else {
    for (int i = 0; i < count; ++i) *(Vector*)(to + i * pitch) = values[i];
  }
}

void Pack(const float* x, int64_t stride, int64_t rows, int64_t columns,
          int vectors, float* panel) {
  const int64_t pitch = int64_t{vectors} * L;
  const float* begins[kVectors * L];
  for (int64_t r = 0; r < pitch; ++r)
    begins[r] = r < rows ? x + r * stride : nullptr;
  // Not more rows at a time than the processor reads ahead of.
  for (int v = 0; v < vectors; ++v) {
    const float* const* of_vector = begins + v * L;
    float* to = panel + v * L;
    int64_t c = 0;
    for (; c + L <= columns; c += L)
      PackColumns<true>(of_vector, c, L, pitch, to);
    if (c < columns)
      PackColumns<false>(of_vector, c, columns - c, pitch, to);
  }
}

// Columns [from, from + count) of L columns of a panel, to `left` rows.
// `streamed`: whole ones that begin where a vector may, past the caches.
template <bool whole, bool streamed>
RIGL_INLINE void UnpackColumns(const float* panel, int64_t pitch,
                               int64_t from, int count, const float* bias,
                               int64_t left, int64_t stride, float* y) {
  Vector values[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    values[i] = whole || i < count
                    ? *(const Vector*)(panel + (from + i) * pitch)
                    : Vector{};
  Transpose(values);
  Vector shift{};
  if (bias) {
    if (whole) {
      shift = *(const Unaligned*)(bias + from);
    } else {
      for (int i = 0; i < count; ++i) shift[i] = bias[from + i];
    }
  }
  float* to = y + from;
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    if (l >= left) break;
    const Vector sum = values[l] + shift;
    if (streamed) {
      Stream(to + l * stride, sum);
    } else if (whole) {
      *(Unaligned*)(to + l * stride) = sum;
    } else {
      for (int i = 0; i < count; ++i) to[l * stride + i] = sum[i];
    }
  }
}

void Unpack(const float* panel, int vectors, int64_t rows, int64_t columns,
            const float* bias, int64_t stride, bool stream, float* y) {
  const int64_t pitch = int64_t{vectors} * L;
  const bool streamed =
      kStreams && stream && (intptr_t)y % (L * 4) == 0 && stride % L == 0;
  for (int64_t first = 0; first < rows; first += L) {
    const int64_t left = rows - first < L ? rows - first : L;
    const float* from = panel + first;
    float* to = y + first * stride;
    int64_t c = 0;
    if (streamed)
      for (; c + L <= columns; c += L)
        UnpackColumns<true, true>(from, pitch, c, L, bias, left, stride, to);
    for (; c + L <= columns; c += L)
      UnpackColumns<true, false>(from, pitch, c, L, bias, left, stride, to);
    if (c < columns)
      UnpackColumns<false, false>(from, pitch, c, columns - c, bias, left,
                                  stride, to);
  }
  if (streamed) Fence();
}

template <int V>
void Multiply(const RiglWeights& s, int64_t begin, int64_t end, const float* x,
              const float* weights, bool add, float* y) {
  for (int b = 0; b < s.blocks; ++b) {
    const int32_t* rows = s.rows + b * s.outputs;
    const bool first = b == 0 && !add;
    for (int64_t o = begin; o < end; ++o) {
      float* to = y + (o - begin) * V * L;
      Vector sums[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        sums[v] = first ? Vector{} : *(const Vector*)(to + v * L);
      for (int32_t e = rows[o]; e < rows[o + 1]; ++e) {
        const float* from = x + int64_t{s.inputs[e]} * V * L;
        const Vector weight = All(weights[e]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
          sums[v] += weight * *(const Vector*)(from + v * L);
      }
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) *(Vector*)(to + v * L) = sums[v];
    }
  }
}

// Four sums take turns: none waits for the one before it.
void MultiplyRow(const RiglWeights* s, int64_t begin, int64_t end,
                 const float* x, const float* weights, bool add, float* y) {
  for (int b = 0; b < s->blocks; ++b) {
    const int32_t* rows = s->rows + b * s->outputs;
    const bool first = b == 0 && !add;
    for (int64_t o = begin; o < end; ++o) {
      float sums[4] = {first ? 0.f : y[o - begin], 0, 0, 0};
      int32_t e = rows[o];
      for (; e + 4 <= rows[o + 1]; e += 4)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
          sums[k] += weights[e + k] * x[s->inputs[e + k]];
      for (; e < rows[o + 1]; ++e) sums[0] += weights[e] * x[s->inputs[e]];
      y[o - begin] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  }
}

// The products of a weight's input and output, as one vector.
template <int V>
RIGL_INLINE Vector Dot(const Vector* upstream, const float* from) {
  Vector even = upstream[0] * *(const Vector*)from, odd{};
#pragma GCC unroll 16
  for (int v = 1; v < V; ++v)
    (v % 2 ? odd : even) += upstream[v] * *(const Vector*)(from + v * L);
  return even + odd;
}

template <int V, bool by_vector>
void Dots(const RiglWeights& s, int64_t begin, int64_t end, const float* x,
          const float* dy, float* sums) {
  for (int b = 0; b < s.blocks; ++b) {
    const int32_t* rows = s.rows + b * s.outputs;
    for (int64_t o = begin; o < end; ++o) {
      if (rows[o] == rows[o + 1]) continue;
      Vector upstream[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        upstream[v] = *(const Vector*)(dy + o * V * L + v * L);
      int32_t e = rows[o];
      if (by_vector) {
        for (; e < rows[o + 1]; ++e)
          *(Vector*)(sums + int64_t{e} * L) +=
              Dot<V>(upstream, x + int64_t{s.inputs[e]} * V * L);
        continue;
      }
      for (; e + 4 <= rows[o + 1]; e += 4) {
        Vector four[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
          four[k] = Dot<V>(upstream, x + int64_t{s.inputs[e + k]} * V * L);
        AddSums(four, sums + e);
      }
      for (; e < rows[o + 1]; ++e)
        sums[e] += Sum(Dot<V>(upstream, x + int64_t{s.inputs[e]} * V * L));
    }
  }
}

void ColumnSums(const float* panel, int vectors, int64_t columns,
                float* sums) {
  for (int64_t c = 0; c < columns; ++c) {
    Vector sum = *(const Vector*)(sums + c * L);
    for (int v = 0; v < vectors; ++v, panel += L)
      sum += *(const Vector*)panel;
    *(Vector*)(sums + c * L) = sum;
  }
}

void AddUp(const float* vectors, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int k = 0; k < 4; ++k) to[i + k] = 0;
    AddSums((const Vector*)(vectors + i * L), to + i);
  }
  for (; i < count; ++i) to[i] = Sum(*(const Vector*)(vectors + i * L));
}

#define RIGL_FOR_VECTORS(with) \
  switch (vectors) {           \
    case 1: return with(1);    \
    case 2: return with(2);    \
    case 4: return with(4);    \
    case 8: return with(8);    \
  }

void MultiplyAny(const RiglWeights* s, int64_t begin, int64_t end, int vectors,
                 const float* x, const float* weights, bool add, float* y) {
#define RIGL_CALL(V) Multiply<V>(*s, begin, end, x, weights, add, y)
  RIGL_FOR_VECTORS(RIGL_CALL)
#undef RIGL_CALL
}

void DotsAny(const RiglWeights* s, int64_t begin, int64_t end, int vectors,
             const float* x, const float* dy, float* sums) {
#define RIGL_CALL(V) Dots<V, false>(*s, begin, end, x, dy, sums)
  RIGL_FOR_VECTORS(RIGL_CALL)
#undef RIGL_CALL
}

void VectorDotsAny(const RiglWeights* s, int64_t begin, int64_t end,
                   int vectors, const float* x, const float* dy, float* sums) {
#define RIGL_CALL(V) Dots<V, true>(*s, begin, end, x, dy, sums)
  RIGL_FOR_VECTORS(RIGL_CALL)
#undef RIGL_CALL
}

}  // namespace

extern "C" const RiglPanels RIGL_JOIN(rigl_panels_, RIGL_ISA) = {
    RIGL_TEXT(RIGL_ISA), L,       kVectors,      Pack,       Unpack, MultiplyAny,
    MultiplyRow,         DotsAny, VectorDotsAny, ColumnSums, AddUp};

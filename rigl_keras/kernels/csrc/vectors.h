// Vectors of the instruction set that a source is compiled for: how they are
// filled, interleaved and transposed.
#ifndef RIGL_KERAS_VECTORS_H_
#define RIGL_KERAS_VECTORS_H_

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace {
namespace vectors {

typedef int Indices __attribute__((vector_size(L * 4)));

RIGL_INLINE Vector All(float value) { return value - Vector{}; }

// The vector at an aligned address.
RIGL_INLINE Vector& At(float* to) { return *(Vector*)to; }
RIGL_INLINE Vector At(const float* from) { return *(const Vector*)from; }

// Writes a vector past the caches: a line that is not read before others have
// replaced it need not be fetched to be written.
template <typename V>
RIGL_INLINE void WritePast(float* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_ps(to, (__m512)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_ps(to, (__m256)v);
#endif
  At(to) = v;
}

// After WritePast, before another thread reads.
RIGL_INLINE void WrittenPast() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The values at some places of two vectors, one after the other.
RIGL_INLINE Vector Shuffled(Vector a, Vector b, Indices places) {
#if defined(__clang__)
  Vector both;
#pragma unroll
  for (int i = 0; i < L; ++i)
    both[i] = (places[i] < L ? a : b)[places[i] % L];
  return both;
#else
  return __builtin_shuffle(a, b, places);
#endif
}

// The values of two vectors in turn: of their first halves, or of the second
// ones.
template <bool second>
RIGL_INLINE Vector Interleaved(Vector a, Vector b) {
  Indices places{};
  for (int i = 0; i < L; ++i)
    places[i] = i / 2 + (second ? L / 2 : 0) + i % 2 * L;
  return Shuffled(a, b, places);
}

// Every other value of two vectors that follow one another: the first, the
// third, ...; or with `second` the others.
template <bool second>
RIGL_INLINE Vector EveryOther(Vector a, Vector b) {
  Indices places{};
  for (int i = 0; i < L; ++i) places[i] = 2 * i + second;
  return Shuffled(a, b, places);
}

// Turns L vectors of L values on their diagonal. Each pass interleaves row i
// with row i + L / 2; log2(L) of them are the transposition.
template <int pass = 1>
RIGL_INLINE void Transpose(Vector* rows) {
  if constexpr (pass < L) {
    Vector next[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = Interleaved<false>(rows[i], rows[i + L / 2]);
      next[2 * i + 1] = Interleaved<true>(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
    Transpose<pass * 2>(rows);
  }
}

RIGL_INLINE float Sum(Vector v) {
  float sum = 0;
  for (int l = 0; l < L; ++l) sum += v[l];
  return sum;
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// As Interleaved by runs of `run`, of each four values apart: no value leaves
// its four.
template <int run, bool second>
RIGL_INLINE Vector InterleavedFours(Vector a, Vector b) {
  Indices places{};
  for (int i = 0; i < L; ++i)
    places[i] = i / 4 * 4 + i % 4 / (2 * run) * run + i % run +
                (second ? 2 : 0) + i % 4 / run % 2 * L;
  return Shuffled(a, b, places);
}

// Adds to each value the one that is `step` further on.
template <int step>
RIGL_INLINE Vector AddedToItself(Vector v) {
  Indices places{};
  for (int i = 0; i < L; ++i) places[i] = (i + step) % L;
  return v + Shuffled(v, v, places);
}

// Adds the sums of four vectors to four numbers.
RIGL_INLINE void AddSums(const Vector* four, float* to) {
  const Vector a = InterleavedFours<1, false>(four[0], four[1]) +
                   InterleavedFours<1, true>(four[0], four[1]);
  const Vector b = InterleavedFours<1, false>(four[2], four[3]) +
                   InterleavedFours<1, true>(four[2], four[3]);
  Vector sums = InterleavedFours<2, false>(a, b) +
                InterleavedFours<2, true>(a, b);
  if constexpr (L > 8) sums = AddedToItself<8>(sums);
  if constexpr (L > 4) sums = AddedToItself<4>(sums);
  *(Four*)to += *(const Four*)&sums;
}

}  // namespace vectors
}  // namespace

#endif  // RIGL_KERAS_VECTORS_H_

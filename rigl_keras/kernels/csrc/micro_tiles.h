// Micro-tiles: so many rows and columns of an output that their sums stay in
// registers while all weights of a channel are worked off.
#ifndef RIGL_KERAS_MICRO_TILES_H_
#define RIGL_KERAS_MICRO_TILES_H_

#include <stdint.h>

#include "isa.h"
#include "vectors.h"

// Those that there are, of rows and columns. An instruction set with few
// registers has none of sixteen vectors.
#define RIGL_MICRO_TILES(with)                                              \
  with(1, 1) with(1, 2) with(1, 4) with(1, 8) with(2, 2) with(2, 4)         \
      RIGL_LARGE_MICRO_TILES(with)
#if defined(__AVX512F__)
#define RIGL_LARGE_MICRO_TILES(with) with(4, 4) with(2, 8) with(1, 16)
#else
#define RIGL_LARGE_MICRO_TILES(with)
#endif

namespace {
namespace vectors {

// The compiler shall not know where this pointer comes from: it would compute
// each address again, with more instructions than there are products.
RIGL_INLINE const float* Hidden(const float* pointer) {
  __asm__("" : "+r"(pointer));
  return pointer;
}

// Adds the products of some weights of one output channel to a micro-tile;
// `past` the caches, where it is whole lines of them.
template <int R, int C>
RIGL_INLINE void Accumulate(const float* packed, int64_t pitch,
                            const int32_t* offsets, const float* weights,
                            int count, const float* before, float* out,
                            int64_t out_row, int64_t out_column,
                            bool past = false) {
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
  if (past) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        WritePast(out + r * out_row + c * out_column, sums[r][c]);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      At(out + r * out_row + c * out_column) = sums[r][c];
}

}  // namespace vectors
}  // namespace

#endif  // RIGL_KERAS_MICRO_TILES_H_

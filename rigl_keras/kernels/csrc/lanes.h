// Convolutions with a sparse kernel, sixteen (eight, four) outputs at a time.
//
// A vector holds one value for each of L lanes. A lane is a tile of an image:
// whole strips of sixteen images where the batch is large, sixteen tiles of
// one image where it is not. Lanes lie side by side in packed memory, so that
// every load is aligned, whichever weights are left.
//
// Nothing here knows TensorFlow or the C++ library: lanes.cc is compiled once
// for each instruction set, and code that the linker may share between these
// must not be in it.
#ifndef RIGL_KERAS_LANES_H_
#define RIGL_KERAS_LANES_H_

#include <stdint.h>

// What is of more floats, 8 MB, no cache holds until it is read: it is written
// past the caches.
constexpr int64_t kRiglCachedFloats = 1 << 21;

// One correlation: y[g, o] = sum of w * x[f, c] shifted by q, over the weights
// that are left. Strides are taken apart into phases f of the input (every
// s-th row and column from f on) and g of the output, which leaves a stride
// of 1. Images are NHWC outside.
struct RiglPlan {
  int64_t images;
  int64_t in_height, in_width, in_channels;
  int64_t out_height, out_width, out_channels;
  // Phases: rows[f] + in_stride * i is row i of the plane of phase f.
  int in_stride[2];
  int in_phases;
  const int* in_phase_rows;
  const int* in_phase_columns;
  int out_stride[2];
  int out_phases;
  const int* out_phase_rows;
  const int* out_phase_columns;
  // Positions of the output in each phase, and the shifts that occur.
  int64_t height, width;
  int first_shift[2];  // the least, of rows and columns
  int halo[2];         // the largest less the least
  // A lane's tile, in micro-tiles that are held in registers.
  int tile[2];
  int micro[2];
  int packed[2];  // rows and columns of the tile with its halo
  int64_t tiles[2];
  int64_t groups;  // of L lanes
  int splits;      // parts that the output's channels are split into
  // Weights by blocks of input channels, then output phase and channel.
  int channel_block;
  int blocks;
  const int32_t* rows;     // [blocks * out_phases * out_channels + 1]
  const int32_t* offsets;  // [weights], of floats in packed memory
  // Sizes of a thread's memory, in floats.
  int64_t packed_floats;
  int64_t micro_floats;
};

struct RiglLanes {
  const char* name;
  int width;      // L
  int registers;  // micro-tiles of how many vectors fit
  // One part of the output, which is written, or with `add` added to what is
  // there: unit of groups * splits. `memory` holds packed_floats +
  // micro_floats, aligned to 64 bytes.
  void (*correlate)(const RiglPlan* plan, int add, const float* x,
                    const float* weights, float* y, int64_t unit,
                    float* memory);
  // Adds dL/dw of one group, at the weights that are left, in their order.
  void (*correlate_weights)(const RiglPlan* plan, const float* x,
                            const float* dy, float* dw, int64_t group,
                            float* memory);
};

extern "C" {
extern const RiglLanes rigl_lanes_avx512;
extern const RiglLanes rigl_lanes_avx2;
extern const RiglLanes rigl_lanes_portable;
}

#endif  // RIGL_KERAS_LANES_H_

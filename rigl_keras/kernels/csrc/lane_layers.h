// Layers over activations that stay in lanes: [group, channel, row, column,
// lane]. A group is L images, and each vector one number of all of them. So
// no layer transposes, and convolutions read as they compute.
//
// Lanes without an image are zero. As lanes.cc, lane_layers.cc is compiled
// once for each instruction set.
#ifndef RIGL_KERAS_LANE_LAYERS_H_
#define RIGL_KERAS_LANE_LAYERS_H_

#include <stdint.h>

#include "lanes.h"

// A plane: one channel of one group.
struct RiglPlane {
  int64_t vectors;
  int used;  // lanes that have an image
};

// What batch norm, ReLU and dropout do to a channel.
struct RiglNorm {
  float mean, scale, shift;  // (x - mean) * scale + shift
  int relu;                  // then max(y, 0)
  float kept;                // then y * kept, where `passed` says so
};

struct RiglLaneLayers {
  const char* name;
  int width;  // L
  // One row of a group, from and to NHWC.
  void (*to_lanes)(const float* x, int64_t images, int64_t height,
                   int64_t width, int64_t channels, int64_t group, int64_t row,
                   float* lanes);
  void (*from_lanes)(const float* lanes, int64_t images, int64_t height,
                     int64_t width, int64_t channels, int64_t group,
                     int64_t row, float* x);
  // The mean, and the sum of squares of what it leaves.
  void (*moments)(const float* x, RiglPlane plane, float* mean,
                  float* squares);
  // Bits of the lanes where TensorFlow's uniform number of a position is at
  // least `least` / 2^23: four channels of a group, from `channel` on, as
  // [channel, row, column].
  void (*keep)(int64_t height, int64_t width, int64_t channels, int64_t group,
               int64_t channel, const uint64_t* counter, uint64_t key,
               uint32_t least, uint16_t* bits);
  // `passed`: what dropout keeps, and then what is not 0 after all; null:
  // there is no dropout. Written `past` the caches, or into them.
  void (*normalise)(const float* x, RiglPlane plane, RiglNorm norm,
                    uint16_t* passed, int past, float* y);
  // max(addend + (x - mean) * scale + shift, 0); `passed`: what is not 0.
  void (*normalise_add)(const float* x, const float* addend, RiglPlane plane,
                        RiglNorm norm, uint16_t* passed, int past, float* y);
  // a + b, which may be where one of them is.
  void (*add)(const float* a, const float* b, RiglPlane plane, float* sum);
  // The sums of dz and of dz * (x - mean), dz being the gradient of what ReLU
  // and dropout take.
  void (*upstream_sums)(const float* x, const float* dy, RiglPlane plane,
                        RiglNorm norm, const uint16_t* passed, float* sum,
                        float* product);
  // dx = dz * scale + (x - mean) * slope + constant; and dz, unless null. Each
  // of them may be where dy is.
  void (*combine)(const float* x, const float* dy, RiglPlane plane,
                  RiglNorm norm, const uint16_t* passed, float slope,
                  float constant, int past, float* dx, float* dz);
};

extern "C" {
extern const RiglLaneLayers rigl_lane_layers_avx512;
extern const RiglLaneLayers rigl_lane_layers_avx2;
extern const RiglLaneLayers rigl_lane_layers_portable;
}

#endif  // RIGL_KERAS_LANE_LAYERS_H_

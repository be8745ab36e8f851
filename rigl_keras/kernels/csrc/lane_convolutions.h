// Convolutions of images in lanes (lane_layers.h), with a sparse kernel. As
// lanes.cc, lane_convolutions.cc is compiled once for each instruction set.
#ifndef RIGL_KERAS_LANE_CONVOLUTIONS_H_
#define RIGL_KERAS_LANE_CONVOLUTIONS_H_

#include <stdint.h>

#include "lanes.h"

struct RiglLaneConvolutions {
  const char* name;
  int width;  // L
  // As in RiglLanes, with images in lanes; the images of the plan are those
  // of whole groups.
  void (*correlate)(const RiglPlan* plan, int add, const float* x,
                    const float* weights, float* y, int64_t unit,
                    float* memory);
  // Adds a vector of dL/dw for each weight of the output channels [begin,
  // end), block by block. For few weights, whose vectors the caches hold.
  void (*correlate_vectors)(const RiglPlan* plan, const float* x,
                            const float* dy, float* dw, int64_t begin,
                            int64_t end, int64_t group, float* memory);
  // Sums up each vector.
  void (*sums)(const float* vectors, int64_t count, float* sums);
  // Adds dL/dw of each weight of the output channels [begin, end), in the order
  // of the plan.
  void (*correlate_weights)(const RiglPlan* plan, const float* x,
                            const float* dy, float* dw, int64_t begin,
                            int64_t end, int64_t group, float* memory);
};

extern "C" {
extern const RiglLaneConvolutions rigl_lane_convolutions_avx512;
extern const RiglLaneConvolutions rigl_lane_convolutions_avx2;
extern const RiglLaneConvolutions rigl_lane_convolutions_portable;
}

#endif  // RIGL_KERAS_LANE_CONVOLUTIONS_H_

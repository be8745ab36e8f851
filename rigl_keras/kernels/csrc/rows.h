// What lies between convolutions: batch norm and dropout, over rows of
// channels. As lanes.cc, rows.cc is compiled once for each instruction set.
#ifndef RIGL_KERAS_ROWS_H_
#define RIGL_KERAS_ROWS_H_

#include <stdint.h>

struct RiglRows {
  const char* name;
  // The mean of each channel, and the sum of squares of what it leaves.
  void (*moments)(const float* x, int64_t rows, int64_t channels, float* mean,
                  float* squares);
  // y = (x - mean) * scale + shift
  void (*normalise)(const float* x, int64_t rows, int64_t channels,
                    const float* mean, const float* scale, const float* shift,
                    float* y);
  // The sums of dy and of dy * (x - mean).
  void (*upstream_sums)(const float* x, const float* dy, int64_t rows,
                        int64_t channels, const float* mean, float* sum,
                        float* product);
  // dx = dy * scale + (x - mean) * slope + shift
  void (*combine)(const float* x, const float* dy, int64_t rows,
                  int64_t channels, const float* mean, const float* scale,
                  const float* slope, const float* shift, float* dx);
  // y = x * scale where TensorFlow's uniform number of the position is at
  // least `rate`, and 0 elsewhere. `first`, of the first, is a multiple of 32.
  void (*dropout)(const float* x, int64_t count, uint64_t first,
                  const uint64_t* counter, uint64_t key, float rate,
                  float scale, float* y);
};

extern "C" {
extern const RiglRows rigl_rows_avx512;
extern const RiglRows rigl_rows_avx2;
extern const RiglRows rigl_rows_portable;
}

#endif  // RIGL_KERAS_ROWS_H_

// Products of matrices with a sparse one, over panels.
//
// A panel holds a number of rows of a matrix (P = V vectors of L), transposed:
// [columns][P]. A row of the panel is one input for P rows of the matrix, side
// by side, so that a weight multiplies whole vectors that are aligned, and
// which weights are left does not matter.
//
// Nothing here knows TensorFlow or the C++ library: panels.cc is compiled once
// for each instruction set, and code that the linker may share between these
// must not be in it.
#ifndef RIGL_KERAS_PANELS_H_
#define RIGL_KERAS_PANELS_H_

#include <stdint.h>

// Where weights are, sorted by block of inputs, then by output. A block's part
// of a panel stays in the first cache.
struct RiglWeights {
  int64_t outputs;
  int32_t blocks;
  const int32_t* rows;    // [blocks * outputs + 1]
  const int32_t* inputs;  // [weights]: the input of each
};


struct RiglPanels {
  const char* name;
  int width;    // L
  int vectors;  // V at most: a power of two

  // The first `rows` rows of x, which are `stride` floats apart, to a panel.
  // What the panel has beyond them is zero.
  void (*pack)(const float* x, int64_t stride, int64_t rows, int64_t columns,
               int vectors, float* panel);
  // The columns of a panel to rows of y, and a bias added to each row; null:
  // none. `stream`: past the caches, where they do not hold all of y.
  void (*unpack)(const float* panel, int vectors, int64_t rows,
                 int64_t columns, const float* bias, int64_t stride,
                 bool stream, float* y);

  // y[o] = sum of weight * x[input] for outputs [begin, end); y[begin] is the
  // first. `add`: to what is there.
  void (*multiply)(const RiglWeights*, int64_t begin, int64_t end, int vectors,
                   const float* x, const float* weights, bool add, float* y);
  // The same for one row of the matrix: x and y are vectors, not panels.
  void (*multiply_row)(const RiglWeights*, int64_t begin, int64_t end,
                       const float* x, const float* weights, bool add,
                       float* y);
  // sums[weight] += sum over rows of x[input] * dy[output], for the weights of
  // outputs [begin, end). Each sum is a number.
  void (*dots)(const RiglWeights*, int64_t begin, int64_t end, int vectors,
               const float* x, const float* dy, float* sums);
  // The same where each sum is a vector, whose numbers are to be added in the
  // end: less work where there are many panels.
  void (*vector_dots)(const RiglWeights*, int64_t begin, int64_t end,
                      int vectors, const float* x, const float* dy,
                      float* sums);
  // Vector c of `sums` += the vectors of column c of a panel.
  void (*column_sums)(const float* panel, int vectors, int64_t columns,
                      float* sums);
  // to[i] = the sum of vector i.
  void (*add_up)(const float* vectors, int64_t count, float* to);
};

extern "C" {
extern const RiglPanels rigl_panels_avx512;
extern const RiglPanels rigl_panels_avx2;
extern const RiglPanels rigl_panels_portable;
}

#endif  // RIGL_KERAS_PANELS_H_

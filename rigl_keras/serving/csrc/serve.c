/* Runs a network that rigl_keras has exported, and prints what comes out.
 *
 *   cc serve.c ./rigl_keras_network.so -Wl,-rpath,'$ORIGIN' -o serve
 *   ./serve network.rigl 2 images.bin
 *
 * A file for each input has its numbers as float32, row by row: those of the
 * whole batch. Inputs without a file are zeros. */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "rigl_network.h"

enum { kMostValues = 16 };

static void fail(const char* what, const char* why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(1);
}

/* How many numbers an array has. */
static size_t numbers_of(const int64_t* shape, int axes) {
  size_t numbers = 1;
  for (int i = 0; i < axes; ++i) {
    if (shape[i] != 0 && numbers > SIZE_MAX / sizeof(float) / (size_t)shape[i])
      fail("shape", "there is not enough memory");
    numbers *= (size_t)shape[i];
  }
  return numbers;
}

static float* zeros(size_t numbers) {
  float* made = calloc(numbers ? numbers : 1, sizeof(float));
  if (!made) fail("array", "there is not enough memory");
  return made;
}

static void read_floats(const char* path, float* to, size_t numbers) {
  FILE* file = fopen(path, "rb");
  if (!file) fail(path, "it cannot be read");
  if (fread(to, sizeof(float), numbers, file) != numbers ||
      fgetc(file) != EOF) {
    char why[80];
    snprintf(why, sizeof why, "it must have %zu numbers of 4 bytes", numbers);
    fail(path, why);
  }
  fclose(file);
}

static void print(const char* name, const float* numbers,
                  const int64_t* shape, int axes) {
  const size_t count = numbers_of(shape, axes);
  const size_t row = axes > 1 ? (size_t)shape[axes - 1] : 1;
  printf("%s (", name);
  for (int i = 0; i < axes; ++i)
    printf("%s%" PRId64, i ? ", " : "", shape[i]);
  printf(")\n");
  for (size_t i = 0; i < count; ++i)
    printf("%.9g%c", numbers[i], (i + 1) % row ? ' ' : '\n');
}

int main(int argc, char** argv) {
  if (argc < 2) fail("usage", "serve NETWORK [BATCH [FILE]...]");
  const int64_t batch = argc > 2 ? atoll(argv[2]) : 1;
  if (batch < 1) fail(argv[2], "a batch has one sample or more");

  /* All threads of a program can share one network. */
  char error[512];
  rigl_network* network = rigl_network_load(argv[1], 0, error, sizeof error);
  if (!network) fail("cannot load", error);

  const int inputs = rigl_network_input_count(network);
  const int outputs = rigl_network_output_count(network);
  if (inputs > kMostValues || outputs > kMostValues)
    fail(argv[1], "this example is too small for its inputs and outputs");
  if (argc - 3 > inputs) fail(argv[inputs + 3], "there is no input for it");

  /* Shapes stand one after another. */
  int64_t in_shapes[kMostValues * RIGL_NETWORK_MOST_AXES];
  int64_t out_shapes[kMostValues * RIGL_NETWORK_MOST_AXES];
  float *in[kMostValues], *out[kMostValues];
  int64_t* shape = in_shapes;
  for (int i = 0; i < inputs; ++i) {
    const rigl_network_value value = rigl_network_input(network, i);
    for (int axis = 0; axis < value.axes; ++axis) {
      shape[axis] = axis == 0 ? batch : value.shape[axis];
      if (shape[axis] < 0) fail(value.name, "it has an axis without a length");
    }
    const size_t numbers = numbers_of(shape, value.axes);
    in[i] = zeros(numbers);
    if (i + 3 < argc) read_floats(argv[i + 3], in[i], numbers);
    shape += value.axes;
  }

  if (rigl_network_output_shapes(network, in_shapes, out_shapes, error,
                                 sizeof error))
    fail("cannot run", error);
  shape = out_shapes;
  for (int i = 0; i < outputs; ++i) {
    const int axes = rigl_network_output(network, i).axes;
    out[i] = zeros(numbers_of(shape, axes));
    shape += axes;
  }

  if (rigl_network_run(network, (const float* const*)in, in_shapes, out, error,
                       sizeof error))
    fail("cannot run", error);

  shape = out_shapes;
  for (int i = 0; i < outputs; ++i) {
    const rigl_network_value value = rigl_network_output(network, i);
    print(value.name, out[i], shape, value.axes);
    shape += value.axes;
    free(out[i]);
  }
  for (int i = 0; i < inputs; ++i) free(in[i]);
  rigl_network_free(network);
  return 0;
}

/* Runs a network that rigl_keras has exported, without TensorFlow.
 *
 * A network may be run by many threads at once. Functions that can fail return
 * NULL or a number other than 0, and write why, one line, into `error`. */
#ifndef RIGL_NETWORK_H_
#define RIGL_NETWORK_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#define RIGL_NETWORK_MOST_AXES 8

typedef struct rigl_network rigl_network;

/* A value that goes in or comes out: row by row, its last axis the channels. */
typedef struct {
  const char* name; /* lives as long as the network */
  int axes;         /* the batch is the first */
  int64_t shape[RIGL_NETWORK_MOST_AXES]; /* -1: free */
} rigl_network_value;

/* Reads a file. A call runs on `threads` threads, the caller's included; 0:
 * one for each core that the process may use. */
rigl_network* rigl_network_load(const char* path, int threads, char* error,
                                size_t error_size);

/* The same of bytes in memory, which are not needed afterwards. */
rigl_network* rigl_network_load_memory(const void* bytes, size_t size,
                                       int threads, char* error,
                                       size_t error_size);

void rigl_network_free(rigl_network* network);

int rigl_network_input_count(const rigl_network* network);
int rigl_network_output_count(const rigl_network* network);
rigl_network_value rigl_network_input(const rigl_network* network, int i);
rigl_network_value rigl_network_output(const rigl_network* network, int i);

/* Writes the shapes that the outputs have for inputs of these shapes. Shapes
 * stand one after the other, as many numbers for each as it has axes. */
int rigl_network_output_shapes(const rigl_network* network,
                               const int64_t* input_shapes,
                               int64_t* output_shapes, char* error,
                               size_t error_size);

/* Computes the outputs, into memory that the caller has made for them. */
int rigl_network_run(rigl_network* network, const float* const* inputs,
                     const int64_t* input_shapes, float* const* outputs,
                     char* error, size_t error_size);

/* Measures for `seconds`, at most a million, how calls of this batch size (the first number of
 * each shape) are computed fastest on this machine, and follows it from now
 * on. No other call may run meanwhile. */
int rigl_network_tune(rigl_network* network, const int64_t* input_shapes,
                      double seconds, char* error, size_t error_size);

/* What was measured, as the text of `hints` that a file has. It lives until
 * the next call of this function. */
const char* rigl_network_hints(rigl_network* network);

/* One line for each step of a call: what it is, and what it takes. It lives
 * until the next call of this function; NULL where there is an error. */
const char* rigl_network_profile(rigl_network* network,
                                 const int64_t* input_shapes, char* error,
                                 size_t error_size);

/* "avx512", "avx2" or "portable". */
const char* rigl_network_instruction_set(void);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

#endif /* RIGL_NETWORK_H_ */

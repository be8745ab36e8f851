// What the units of recurrent layers do with the products of a step, over the
// panels of panels.h. As panels.cc, recurrent.cc is compiled once for each
// instruction set.
#ifndef RIGL_KERAS_RECURRENT_H_
#define RIGL_KERAS_RECURRENT_H_

#include <stdint.h>

// Panels are [rows][P], P numbers that are a multiple of L. `bias` has a number
// for each row of products, or is null.
struct RiglRecurrent {
  const char* name;

  // gates: the products for i, f, c and o (4 units), which become the gates.
  // carry = f * before + i * c, state = o * tanh(carry)
  void (*lstm)(int64_t units, int64_t pitch, const float* bias, float* gates,
               const float* before, float* carry, float* state);
  // From dstate and dcarry, which becomes that of the carry before, to the
  // gradients of the products (4 units).
  void (*lstm_grad)(int64_t units, int64_t pitch, const float* gates,
                    const float* before, const float* carry,
                    const float* dstate, float* dcarry, float* dproducts);

  // The products of the inputs and of the state, for z, r and h (3 units
  // each). gates: z, r, h and the state's product for h (4 units).
  // state = z * before + (1 - z) * h, h = tanh(input + r * product)
  void (*gru)(int64_t units, int64_t pitch, const float* bias,
              const float* of_inputs, const float* of_state,
              const float* before, float* gates, float* state);
  // A GRU that resets the state before the product, of `count` units, a
  // multiple of L. gates: the products for z and r, which become the gates.
  // reset = r * before
  void (*gru_reset)(int64_t count, float* gates, const float* before,
                    float* reset);
  // state = z * before + (1 - z) * tanh(products)
  void (*gru_update)(int64_t count, const float* z, const float* products,
                     const float* before, float* state);
  // `dstate` becomes what reaches the state before directly.
  void (*gru_grad)(int64_t units, int64_t pitch, const float* gates,
                   const float* before, float* dstate, float* of_inputs,
                   float* of_state);
};

extern "C" {
extern const RiglRecurrent rigl_recurrent_avx512;
extern const RiglRecurrent rigl_recurrent_avx2;
extern const RiglRecurrent rigl_recurrent_portable;
}

#endif  // RIGL_KERAS_RECURRENT_H_

// The arithmetic of recurrent.h for one instruction set, RIGL_ISA.

#include "recurrent.h"

#include "isa.h"
#include "vectors.h"

namespace {

using vectors::All;
using vectors::Indices;

// exp(x) - 1 for x <= 0: x = n log(2) + r, and a series of r.
RIGL_INLINE Vector Expm1(Vector x) {
  x = x < All(-30.f) ? All(-30.f) : x;
  const Vector magic = All(12582912.f);  // 1.5 * 2^23: its sums are rounded
  const Vector shifted = x * All(1.44269504f) + magic;
  const Indices n = (Indices)shifted - (Indices)magic;
  const Vector whole = shifted - magic;
  // log(2) in two parts: the first has few digits, its products are exact.
  const Vector r =
      (x - whole * All(0.693359375f)) + whole * All(2.12194440e-4f);
  Vector p = All(1.f / 5040);
  p = p * r + All(1.f / 720);
  p = p * r + All(1.f / 120);
  p = p * r + All(1.f / 24);
  p = p * r + All(1.f / 6);
  p = p * r + All(0.5f);
  p = p * (r * r) + r;
  const Vector power = (Vector)((n + 127) << 23);
  return p * power + (power - All(1.f));
}

RIGL_INLINE Vector Absolute(Vector v) {
  return (Vector)((Indices)v & 0x7fffffff);
}

// 1 / (1 + exp(-x)). Below -30 it is not zero yet, but nearly.
RIGL_INLINE Vector Sigmoid(Vector x) {
  const Vector e = Expm1(-Absolute(x)) + All(1.f);
  const Vector small = e / (e + All(1.f));
  const Vector found = x < Vector{} ? small : All(1.f) / (e + All(1.f));
  return x == x ? found : x;  // a NaN stays one
}

RIGL_INLINE Vector Tanh(Vector x) {
  const Vector e = Expm1(All(-2.f) * Absolute(x));
  const Vector found = -e / (e + All(2.f));
  const Indices sign = (Indices)x & ~0x7fffffff;
  return x == x ? (Vector)((Indices)found | sign) : x;
}

RIGL_INLINE Vector At(const float* from, int64_t i) {
  return *(const Vector*)(from + i);
}
RIGL_INLINE void Put(float* to, int64_t i, Vector v) {
  *(Vector*)(to + i) = v;
}
RIGL_INLINE Vector BiasOf(const float* bias, int64_t i) {
  return All(bias ? bias[i] : 0.f);
}

void Lstm(int64_t units, int64_t pitch, const float* bias, float* gates,
          const float* before, float* carry, float* state) {
  const int64_t gate = units * pitch;
  for (int64_t u = 0; u < units; ++u) {
    const Vector bi = BiasOf(bias, u), bf = BiasOf(bias, units + u);
    const Vector bc = BiasOf(bias, 2 * units + u);
    const Vector bo = BiasOf(bias, 3 * units + u);
    for (int64_t k = u * pitch; k < (u + 1) * pitch; k += L) {
      const Vector i = Sigmoid(At(gates, k) + bi);
      const Vector f = Sigmoid(At(gates, k + gate) + bf);
      const Vector g = Tanh(At(gates, k + 2 * gate) + bc);
      const Vector o = Sigmoid(At(gates, k + 3 * gate) + bo);
      const Vector c = f * At(before, k) + i * g;
      Put(gates, k, i);
      Put(gates, k + gate, f);
      Put(gates, k + 2 * gate, g);
      Put(gates, k + 3 * gate, o);
      Put(carry, k, c);
      Put(state, k, o * Tanh(c));
    }
  }
}

void LstmGrad(int64_t units, int64_t pitch, const float* gates,
              const float* before, const float* carry, const float* dstate,
              float* dcarry, float* dproducts) {
  const Vector one = All(1.f);
  const int64_t gate = units * pitch;
  for (int64_t k = 0; k < gate; k += L) {
    const Vector i = At(gates, k), f = At(gates, k + gate);
    const Vector g = At(gates, k + 2 * gate), o = At(gates, k + 3 * gate);
    const Vector t = Tanh(At(carry, k)), dh = At(dstate, k);
    const Vector dc = At(dcarry, k) + dh * o * (one - t * t);
    Put(dproducts, k, dc * g * i * (one - i));
    Put(dproducts, k + gate, dc * At(before, k) * f * (one - f));
    Put(dproducts, k + 2 * gate, dc * i * (one - g * g));
    Put(dproducts, k + 3 * gate, dh * t * o * (one - o));
    Put(dcarry, k, dc * f);
  }
}

void Gru(int64_t units, int64_t pitch, const float* bias,
         const float* of_inputs, const float* of_state, const float* before,
         float* gates, float* state) {
  const int64_t gate = units * pitch;
  const float* of_bias = bias ? bias + 3 * units : nullptr;  // of the state
  for (int64_t u = 0; u < units; ++u) {
    const Vector bz = BiasOf(bias, u) + BiasOf(of_bias, u);
    const Vector br = BiasOf(bias, units + u) + BiasOf(of_bias, units + u);
    const Vector bh = BiasOf(bias, 2 * units + u);
    const Vector bq = BiasOf(of_bias, 2 * units + u);
    for (int64_t k = u * pitch; k < (u + 1) * pitch; k += L) {
      const Vector z = Sigmoid(At(of_inputs, k) + At(of_state, k) + bz);
      const Vector r =
          Sigmoid(At(of_inputs, k + gate) + At(of_state, k + gate) + br);
      const Vector q = At(of_state, k + 2 * gate) + bq;
      const Vector h = Tanh(At(of_inputs, k + 2 * gate) + bh + r * q);
      Put(gates, k, z);
      Put(gates, k + gate, r);
      Put(gates, k + 2 * gate, h);
      Put(gates, k + 3 * gate, q);
      Put(state, k, z * At(before, k) + (All(1.f) - z) * h);
    }
  }
}

void GruReset(int64_t count, float* gates, const float* before,
              float* reset) {
  for (int64_t k = 0; k < count; k += L) {
    const Vector r = Sigmoid(At(gates, k + count));
    Put(gates, k, Sigmoid(At(gates, k)));
    Put(gates, k + count, r);
    Put(reset, k, r * At(before, k));
  }
}

void GruUpdate(int64_t count, const float* z, const float* products,
               const float* before, float* state) {
  for (int64_t k = 0; k < count; k += L)
    Put(state, k, At(z, k) * At(before, k) +
                      (All(1.f) - At(z, k)) * Tanh(At(products, k)));
}

void GruGrad(int64_t units, int64_t pitch, const float* gates,
             const float* before, float* dstate, float* of_inputs,
             float* of_state) {
  const Vector one = All(1.f);
  const int64_t gate = units * pitch;
  for (int64_t k = 0; k < gate; k += L) {
    const Vector z = At(gates, k), r = At(gates, k + gate);
    const Vector h = At(gates, k + 2 * gate), q = At(gates, k + 3 * gate);
    const Vector upstream = At(dstate, k);
    const Vector dh = upstream * (one - z) * (one - h * h);
    const Vector dz = upstream * (At(before, k) - h) * z * (one - z);
    const Vector dr = dh * q * r * (one - r);
    Put(of_inputs, k, dz);
    Put(of_inputs, k + gate, dr);
    Put(of_inputs, k + 2 * gate, dh);
    Put(of_state, k, dz);
    Put(of_state, k + gate, dr);
    Put(of_state, k + 2 * gate, dh * r);
    Put(dstate, k, upstream * z);
  }
}

}  // namespace

extern "C" const RiglRecurrent RIGL_JOIN(rigl_recurrent_, RIGL_ISA) = {
    RIGL_TEXT(RIGL_ISA), Lstm, LstmGrad, Gru, GruReset, GruUpdate, GruGrad};

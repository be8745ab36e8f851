// Random numbers by counters, as TensorFlow draws them.
#ifndef RIGL_KERAS_PHILOX_H_
#define RIGL_KERAS_PHILOX_H_

#include <stdint.h>

#include "isa.h"

namespace {

// Philox 4x32-10 (Salmon et al., 2011, Parallel random numbers: as easy as 1,
// 2, 3) of eight counters at once. Each word has 64 bits, of which the upper
// half is zero.
typedef uint64_t Words __attribute__((vector_size(64)));

RIGL_INLINE void Philox(Words* counter, uint64_t key) {
  uint32_t low = static_cast<uint32_t>(key);
  uint32_t high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words a = counter[0] * 0xD2511F53ull;
    const Words b = counter[2] * 0xCD9E8D57ull;
    const Words mask = Words{} + 0xFFFFFFFFull;
    counter[0] = (b >> 32) ^ counter[1] ^ uint64_t{low};
    counter[1] = b & mask;
    counter[2] = (a >> 32) ^ counter[3] ^ uint64_t{high};
    counter[3] = a & mask;
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

}  // namespace

#endif  // RIGL_KERAS_PHILOX_H_

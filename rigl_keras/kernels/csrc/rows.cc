// The arithmetic of rows.h for one instruction set, RIGL_ISA.

#include "rows.h"

#include "isa.h"
#include "philox.h"

namespace {

// How columns are read and written: by vectors, or for what fills none, one by
// one. (A template of vectors would forget how these are aligned.)
struct ByVector {
  typedef Vector Value;
  static constexpr int kColumns = L;
  RIGL_INLINE Value Read(const float* from) { return *(const Unaligned*)from; }
  RIGL_INLINE void Write(float* to, Value v) { *(Unaligned*)to = v; }
};

struct ByOne {
  typedef float Value;
  static constexpr int kColumns = 1;
  RIGL_INLINE Value Read(const float* from) { return *from; }
  RIGL_INLINE void Write(float* to, Value v) { *to = v; }
};

constexpr int kChains = 4;  // sums at once, to hide what an addition takes

// Calls `column` for each vector of channels, and for each channel left over.
#define RIGL_FOR_COLUMNS(channels, column, ...)                       \
  {                                                                   \
    int64_t c = 0;                                                    \
    for (; c + L <= (channels); c += L) column<ByVector>(__VA_ARGS__); \
    for (; c < (channels); ++c) column<ByOne>(__VA_ARGS__);            \
  }

// The sum over rows of f(row).
template <typename By, typename F>
RIGL_INLINE typename By::Value SumOfRows(int64_t rows, F f) {
  typename By::Value sums[kChains] = {};
  int64_t r = 0;
  for (; r + kChains <= rows; r += kChains)
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) sums[i] += f(r + i);
  for (; r < rows; ++r) sums[0] += f(r);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <typename By>
void ColumnMoments(const float* x, int64_t rows, int64_t channels,
                   float* mean, float* squares) {
  // From the first row on, so that what they have in common costs no digits.
  const auto first = By::Read(x);
  const auto sum = SumOfRows<By>(
      rows, [&](int64_t r) { return By::Read(x + r * channels) - first; });
  const auto center = first + sum / static_cast<float>(rows);
  By::Write(squares, SumOfRows<By>(rows, [&](int64_t r) {
    const auto left = By::Read(x + r * channels) - center;
    return left * left;
  }));
  By::Write(mean, center);
}

void Moments(const float* x, int64_t rows, int64_t channels, float* mean,
             float* squares) {
  RIGL_FOR_COLUMNS(channels, ColumnMoments, x + c, rows, channels, mean + c,
                   squares + c);
}

template <typename By>
void ColumnNormalise(const float* x, int64_t rows, int64_t channels,
                     const float* mean, const float* scale,
                     const float* shift, float* y) {
  const auto m = By::Read(mean), s = By::Read(scale), b = By::Read(shift);
  for (int64_t r = 0; r < rows; ++r)
    By::Write(y + r * channels, (By::Read(x + r * channels) - m) * s + b);
}

void Normalise(const float* x, int64_t rows, int64_t channels,
               const float* mean, const float* scale, const float* shift,
               float* y) {
  RIGL_FOR_COLUMNS(channels, ColumnNormalise, x + c, rows, channels, mean + c,
                   scale + c, shift + c, y + c);
}

template <typename By>
void ColumnUpstreamSums(const float* x, const float* dy, int64_t rows,
                        int64_t channels, const float* mean, float* sum,
                        float* product) {
  const auto m = By::Read(mean);
  By::Write(sum, SumOfRows<By>(rows, [&](int64_t r) {
    return By::Read(dy + r * channels);
  }));
  By::Write(product, SumOfRows<By>(rows, [&](int64_t r) {
    return By::Read(dy + r * channels) * (By::Read(x + r * channels) - m);
  }));
}

void UpstreamSums(const float* x, const float* dy, int64_t rows,
                  int64_t channels, const float* mean, float* sum,
                  float* product) {
  RIGL_FOR_COLUMNS(channels, ColumnUpstreamSums, x + c, dy + c, rows, channels,
                   mean + c, sum + c, product + c);
}

template <typename By>
void ColumnCombine(const float* x, const float* dy, int64_t rows,
                   int64_t channels, const float* mean, const float* scale,
                   const float* slope, const float* shift, float* dx) {
  const auto m = By::Read(mean), a = By::Read(scale), k = By::Read(slope),
             b = By::Read(shift);
  for (int64_t r = 0; r < rows; ++r)
    By::Write(dx + r * channels,
              By::Read(dy + r * channels) * a +
                  (By::Read(x + r * channels) - m) * k + b);
}

void Combine(const float* x, const float* dy, int64_t rows, int64_t channels,
             const float* mean, const float* scale, const float* slope,
             const float* shift, float* dx) {
  RIGL_FOR_COLUMNS(channels, ColumnCombine, x + c, dy + c, rows, channels,
                   mean + c, scale + c, slope + c, shift + c, dx + c);
}

typedef uint32_t Bits __attribute__((vector_size(64)));
typedef float Numbers __attribute__((vector_size(64), may_alias));
typedef float LooseNumbers
    __attribute__((vector_size(64), aligned(4), may_alias));

// Sixteen uniform numbers in [0, 1), of 23 bits, as TensorFlow makes them.
RIGL_INLINE void Uniform(const Words& words, Numbers* numbers) {
  const Bits bits = ((Bits)words & 0x7FFFFFu) | 0x3F800000u;
  *numbers = (Numbers)bits - 1.0f;
}

// The words of two vectors in turn: of their first halves, or the second ones.
template <bool second>
RIGL_INLINE void InTurn(const Words& a, const Words& b, Words* both) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const Words& from = i % 2 ? b : a;
    (*both)[i] = from[i / 2 + (second ? 4 : 0)];
  }
}

void Dropout(const float* x, int64_t count, uint64_t first,
             const uint64_t* counter, uint64_t key, float rate, float scale,
             float* y) {
  for (int64_t done = 0; done < count; done += 32) {
    // Four numbers to a counter, which counts in 128 bits.
    Words words[4];
    for (int g = 0; g < 8; ++g) {
      const uint64_t step = (first + done) / 4 + g;
      const uint64_t low = counter[0] + step;
      const uint64_t high = counter[1] + (low < step);
      words[0][g] = low & 0xFFFFFFFFu;
      words[1][g] = low >> 32;
      words[2][g] = high & 0xFFFFFFFFu;
      words[3][g] = high >> 32;
    }
    Philox(words, key);
    const Words front = words[0] | (words[1] << 32);
    const Words back = words[2] | (words[3] << 32);
    Words turned[2] = {};
    InTurn<false>(front, back, &turned[0]);
    InTurn<true>(front, back, &turned[1]);
    Numbers numbers[2];
    for (int half = 0; half < 2; ++half)
      Uniform(turned[half], &numbers[half]);
    if (done + 32 <= count) {
      for (int half = 0; half < 2; ++half) {
        const int64_t at = done + 16 * half;
        const Numbers value = *(const LooseNumbers*)(x + at) * scale;
        *(LooseNumbers*)(y + at) = numbers[half] >= rate ? value : Numbers{};
      }
    } else {
      for (int64_t i = done; i < count; ++i)
        y[i] = numbers[(i - done) / 16][(i - done) % 16] >= rate ? x[i] * scale
                                                                 : 0.0f;
    }
  }
}

}  // namespace

extern "C" const RiglRows RIGL_JOIN(rigl_rows_, RIGL_ISA) = {
    RIGL_TEXT(RIGL_ISA), Moments,      Normalise,
    UpstreamSums,        Combine,      Dropout};

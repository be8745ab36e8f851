// The kernels of tiles.h for one instruction set, RIGL_ISA, and vectors of
// RIGL_LENGTH floats. They are `rigl_tiles_<RIGL_ISA>_<RIGL_LENGTH>`.
//
// Nothing here may be shared by the linker between instruction sets: functions
// are of this source alone, and none of the standard library's is called.

#include "tiles.h"

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../../kernels/csrc/vectors.h"
#include "network.h"

#define RIGL_TILES \
  RIGL_JOIN(rigl_tiles_, RIGL_JOIN(RIGL_ISA, RIGL_JOIN(_, RIGL_LENGTH)))
// A function that is large, and never made for a few of its arguments alone.
#if defined(__clang__)
#define RIGL_ONCE __attribute__((noinline))
#else
#define RIGL_ONCE __attribute__((noinline, noclone))
#endif

namespace rigl_serving {
namespace {

#if defined(__AVX512VL__)
constexpr int kRegisters = 28;  // of 32: sums, a weight, and a few to spare
constexpr int kDenseCells = 6;
#elif defined(__AVX2__)
constexpr int kRegisters = 14;  // of 16
constexpr int kDenseCells = 3;
#else
constexpr int kRegisters = 12;  // of 16, and products need one
constexpr int kDenseCells = 2;
#endif
constexpr int kMostRows = 16;
constexpr int kMostCells = 8;
constexpr int kPanel = 4;

typedef int32_t Integers __attribute__((vector_size(L * 4), may_alias));

RIGL_INLINE Vector All(float value) { return value - Vector{}; }
RIGL_INLINE Vector Load(const float* from) {
  return *reinterpret_cast<const Unaligned*>(from);
}
RIGL_INLINE void Store(float* to, Vector v) {
  *reinterpret_cast<Unaligned*>(to) = v;
}
// Stores a vector past the caches, which need not read its line from memory
// first. It is a whole line, or none is saved.
RIGL_INLINE void StorePast(float* to, Vector v) {
#if defined(__AVX512F__) && RIGL_LENGTH == 16
  _mm512_stream_ps(to, v);
#else
  Store(to, v);
#endif
}
// All of these stores are seen before any later one.
RIGL_INLINE void EndStoresPast() {
#if defined(__AVX512F__) && RIGL_LENGTH == 16
  _mm_sfence();
#endif
}
RIGL_INLINE int32_t Least(int32_t a, int32_t b) { return a < b ? a : b; }
// The compiler shall not know where this pointer comes from: it would keep
// each sum of it in a register of its own, and there are too few.
RIGL_INLINE const float* Hidden(const float* pointer) {
  __asm__("" : "+r"(pointer));
  return pointer;
}

// ---------------------------------------------------------------- Activations

RIGL_INLINE Integers Bits(Vector v) { return reinterpret_cast<Integers>(v); }
RIGL_INLINE Vector Floats(Integers v) { return reinterpret_cast<Vector>(v); }
RIGL_INLINE Vector Chosen(Integers which, Vector yes, Vector no) {
  return Floats((which & Bits(yes)) | (~which & Bits(no)));
}
RIGL_INLINE Vector Masked(Vector v, Integers kept) {
  return Floats(Bits(v) & kept);
}
RIGL_INLINE Vector Absolute(Vector v) {
  return Floats(Bits(v) & (Integers{} + 0x7fffffff));
}
// The first with the sign of the second.
RIGL_INLINE Vector WithSign(Vector v, Vector sign) {
  const Integers mask = Integers{} + 0x7fffffff;
  return Floats((Bits(v) & mask) | (Bits(sign) & ~mask));
}

// A NaN stays one, as in TensorFlow.
RIGL_INLINE Vector Clipped(Vector v, Vector low, Vector high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// exp(r) - 1 where |r| <= log(2) / 2.
RIGL_INLINE Vector SmallExpm1(Vector r) {
  Vector p = All(1.f / 5040);
  p = p * r + All(1.f / 720);
  p = p * r + All(1.f / 120);
  p = p * r + All(1.f / 24);
  p = p * r + All(1.f / 6);
  p = p * r + All(0.5f);
  return p * (r * r) + r;
}

// x as n log(2) + r: r, and n.
RIGL_INLINE Vector Reduced(Vector x, Integers* n) {
  const Vector magic = All(12582912.f);  // 1.5 * 2^23: its sums are rounded
  const Vector shifted = x * All(1.44269504f) + magic;
  *n = Bits(shifted) - Bits(magic);
  const Vector whole = shifted - magic;
  // log(2) in two parts: the first has few digits, its products are exact.
  return (x - whole * All(0.693359375f)) + whole * All(2.12194440e-4f);
}

RIGL_INLINE Vector PowerOf2(Integers n) { return Floats((n + 127) << 23); }

// exp(x + y), where y is tiny beside x and makes up for its rounding.
RIGL_INLINE Vector ExpOfSum(Vector x, Vector y) {
  // Beyond these it is 0 and infinite, and n keeps within 8 bits.
  x = Clipped(x, All(-104.f), All(89.f));
  Integers n;
  const Vector r = Reduced(x, &n) + y;
  const Integers half = n >> 1;  // 2^n alone may be no number, where exp is
  return (SmallExpm1(r) + All(1.f)) * PowerOf2(half) * PowerOf2(n - half);
}

RIGL_INLINE Vector Exp(Vector x) { return ExpOfSum(x, Vector{}); }

// exp(x) - 1 for x <= 0.
RIGL_INLINE Vector Expm1(Vector x) {
  x = x < All(-30.f) ? All(-30.f) : x;
  Integers n;
  const Vector r = Reduced(x, &n);
  const Vector power = PowerOf2(n);
  return SmallExpm1(r) * power + (power - All(1.f));
}

RIGL_INLINE Vector Sigmoid(Vector x) { return All(1.f) / (All(1.f) + Exp(-x)); }

RIGL_INLINE Vector Tanh(Vector x) {
  const Vector e = Expm1(All(-2.f) * Absolute(x));
  return WithSign(-e / (e + All(2.f)), x);
}

// log(1 + y) for y in [0, 1].
RIGL_INLINE Vector Log1p(Vector y) {
  const Vector s = y / (y + All(2.f));  // 2 atanh(s)
  const Vector q = s * s;
  Vector p = All(1.f / 17);
  p = p * q + All(1.f / 15);
  p = p * q + All(1.f / 13);
  p = p * q + All(1.f / 11);
  p = p * q + All(1.f / 9);
  p = p * q + All(1.f / 7);
  p = p * q + All(1.f / 5);
  p = p * q + All(1.f / 3);
  p = p * q;
  return All(2.f) * (s + s * p);
}

RIGL_INLINE Vector Softplus(Vector x) {
  const Vector positive = x < Vector{} ? Vector{} : x;
  return positive + Log1p(Exp(-Absolute(x)));
}

// x times the normal distribution's share below x.
RIGL_INLINE Vector Gelu(Vector x) {
  const Vector z = Absolute(x) * All(0.707106781f), q = z * z;
  // Below z = 1/2 erf(z) is z times a polynomial of its square, fitted.
  Vector p;
  p = All(0.00471756747f);
  p = p * q + All(-0.0267569721f);
  p = p * q + All(0.112828195f);
  p = p * q + All(-0.376126081f);
  p = p * q + All(1.12837911f);
  const Vector near = All(1.f) - p * z;
  // Above it erfc(z) is exp(-z^2) / (z + 1) times a polynomial, fitted, too.
  const Vector far_z = z < All(11.f) ? z : All(11.f);
  const Vector t = (far_z - All(1.f)) / (far_z + All(1.f));
  p = All(0.00182547292f);
  p = p * t + All(-0.00108790898f);
  p = p * t + All(-0.00265979278f);
  p = p * t + All(-0.00342681725f);
  p = p * t + All(-0.00120579964f);
  p = p * t + All(0.00951411109f);
  p = p * t + All(0.0253960583f);
  p = p * t + All(0.0139104323f);
  p = p * t + All(-0.0955564454f);
  p = p * t + All(-0.237680927f);
  p = p * t + All(0.855167150f);
  // x^2 with the digits that one float has not: the high half's square is
  // exact.
  Vector whole = Absolute(x);
  whole = whole < All(16.f) ? whole : All(16.f);
  const Vector high = Floats(Bits(whole) & (Integers{} + ~0xfff));
  const Vector rest = (whole - high) * (whole + high);
  const Vector far = ExpOfSum(All(-0.5f) * high * high, All(-0.5f) * rest) * p /
                     (far_z + All(1.f));
  const Vector tail = All(0.5f) * (z < All(0.5f) ? near : far);
  return x * (x < Vector{} ? tail : All(1.f) - tail);
}

RIGL_INLINE Vector GeluTanh(Vector x) {
  // 0.5 (1 + tanh(u)) is sigmoid(2 u).
  const Vector u = x + All(0.044715f) * x * x * x;
  return x * Sigmoid(All(1.59576912f) * u);
}

RIGL_INLINE Vector HardSigmoid(Vector x) {
  return Clipped(x * All(1.f / 6) + All(0.5f), Vector{}, All(1.f));
}

// An activation as min(max(x, low), high), if it is one.
struct Clip {
  bool is;
  float low, high;
};

RIGL_INLINE Clip ClipOf(int32_t act, float a, float b) {
  const float infinity = __builtin_inff();
  if (act == -1) return {true, -infinity, infinity};
  if (act == static_cast<int32_t>(Activation::kRelu))
    return {true, 0, infinity};
  return {act == static_cast<int32_t>(Activation::kClip), a, b};
}

template <class Function>
RIGL_INLINE void Each(Vector* v, int n, Function function) {
  for (int i = 0; i < n; ++i) v[i] = function(v[i]);
}

RIGL_ONCE void Activate(Vector* v, int n, int32_t act, float a_, float b_) {
  const Vector a = All(a_), b = All(b_), zero{};
  switch (static_cast<Activation>(act)) {
    case Activation::kRelu:
      return Each(v, n, [=](Vector x) { return x < zero ? zero : x; });
    case Activation::kClip:
      return Each(v, n, [=](Vector x) { return Clipped(x, a, b); });
    case Activation::kLeakyRelu:
      return Each(v, n, [=](Vector x) { return x < zero ? a * x : x; });
    case Activation::kElu:
      return Each(v, n, [=](Vector x) {
        return x < zero ? a * Expm1(x) : x;
      });
    case Activation::kSigmoid:
      return Each(v, n, [](Vector x) { return Sigmoid(x); });
    case Activation::kTanh:
      return Each(v, n, [](Vector x) { return Tanh(x); });
    case Activation::kSilu:
      return Each(v, n, [](Vector x) { return x * Sigmoid(x); });
    case Activation::kGelu:
      return Each(v, n, [](Vector x) { return Gelu(x); });
    case Activation::kGeluTanh:
      return Each(v, n, [](Vector x) { return GeluTanh(x); });
    case Activation::kHardSigmoid:
      return Each(v, n, [](Vector x) { return HardSigmoid(x); });
    case Activation::kHardSilu:
      return Each(v, n, [](Vector x) { return x * HardSigmoid(x); });
    case Activation::kSoftplus:
      return Each(v, n, [](Vector x) { return Softplus(x); });
    case Activation::kSelu:
      return Each(v, n, [=](Vector x) {
        return All(1.05070099f) *
               (x < zero ? All(1.67326324f) * Expm1(x) : x);
      });
    case Activation::kExponential:
      return Each(v, n, [](Vector x) { return Exp(x); });
    default:  // none
      return;
  }
}

// ------------------------------------------------------------------ Epilogues

// Numbers that count, as bits of a vector.
RIGL_INLINE Integers FirstOf(int32_t count) {
  Integers lanes;
  for (int i = 0; i < L; ++i) lanes[i] = i;
  return lanes < Integers{} + count;
}

RIGL_INLINE int64_t Place(const Field& field, int32_t channel, int32_t row,
                          int32_t cell) {
  return channel * field.plane + row * field.pitch + cell * L;
}

// Ends the numbers of some cells of a row, whatever the epilogue but for
// scale and shift. `kept` of the last of them count.
void FinishRow(const Epilogue& after, int32_t channel, int32_t row,
               int32_t cell, int32_t cells, Integers kept, Vector* v) {
  if (after.other.data) {
    const bool pixel = after.other_is_pixel;
    const float* other =
        after.other.data + (pixel ? Place(after.other, channel, 0, 0)
                                  : Place(after.other, channel, row, cell));
    const int64_t step = pixel ? 0 : L;
    if (after.combine == '+')
      for (int i = 0; i < cells; ++i) v[i] += Load(other + i * step);
    else if (after.combine == '-')
      for (int i = 0; i < cells; ++i) v[i] -= Load(other + i * step);
    else
      for (int i = 0; i < cells; ++i) v[i] *= Load(other + i * step);
  }
  Activate(v, cells, after.act, after.a, after.b);
  v[cells - 1] = Masked(v[cells - 1], kept);
  if (after.to.data) {
    float* to = after.to.data + Place(after.to, channel, row, cell);
    for (int i = 0; i < cells; ++i) Store(to + i * L, v[i]);
  }
  if (after.to2.data) {
    const Vector scale = All(after.scale2 ? after.scale2[channel] : 1.f);
    const Vector shift = All(after.shift2 ? after.shift2[channel] : 0.f);
    for (int i = 0; i < cells; ++i) v[i] = v[i] * scale + shift;
    Activate(v, cells, after.act2, after.a2, after.b2);
    v[cells - 1] = Masked(v[cells - 1], kept);
    float* to = after.to2.data + Place(after.to2, channel, row, cell);
    for (int i = 0; i < cells; ++i) Store(to + i * L, v[i]);
  }
}

// Where a tile of a field begins, and how it goes on: what is kept here is not
// read again after each store, which might change it.
struct Cursor {
  float* data;
  int64_t plane, pitch;
};

RIGL_INLINE Cursor CursorOf(const Field& field, int32_t channel, int32_t row,
                            int32_t cell) {
  return {field.data + Place(field, channel, row, cell), field.plane,
          field.pitch};
}

template <int n>
struct Number {
  static constexpr int value = n;
};

// The same of channels [begin, end) of a tile, where all that happens is
// adding, clips, and the second output's scale and shift: in one pass. R
// and C: rows and cells, or 0 where they are only known here.
template <int R, int C, bool add, bool first, bool second>
RIGL_INLINE void FinishPlain(const Epilogue& after, const Clip& clip,
                             const Clip& clip2, int32_t begin, int32_t end,
                             int32_t row, int32_t cell, int32_t rows,
                             int32_t cells, int32_t last, const Vector* v) {
  if constexpr (R != 0) rows = R, cells = C;
  const Vector low = All(clip.low), high = All(clip.high);
  const Vector low2 = All(clip2.low), high2 = All(clip2.high);
  const float *scales = after.scale2, *shifts = after.shift2;
  Cursor other{}, to{}, to2{};
  if constexpr (add) other = CursorOf(after.other, begin, row, cell);
  if constexpr (first) to = CursorOf(after.to, begin, row, cell);
  if constexpr (second) to2 = CursorOf(after.to2, begin, row, cell);
  const Integers kept = FirstOf(last);
  // The last cell of a row, if it is ragged.
  const int32_t ragged = last < L ? cells - 1 : -1;
  for (int64_t o = begin; o < end; ++o) {
    const Vector scale = All(second && scales ? scales[o] : 1.f);
    const Vector shift = All(second && shifts ? shifts[o] : 0.f);
    for (int64_t r = 0; r < rows; ++r)
      for (int32_t c = 0; c < cells; ++c) {
        Vector x = *v++;
        if constexpr (add)
          x += Load(other.data + r * other.pitch + c * L);
        x = Clipped(x, low, high);
        if (c == ragged) x = Masked(x, kept);
        if constexpr (first) Store(to.data + r * to.pitch + c * L, x);
        if constexpr (second) {
          x = Clipped(x * scale + shift, low2, high2);
          if (c == ragged) x = Masked(x, kept);
          Store(to2.data + r * to2.pitch + c * L, x);
        }
      }
    if constexpr (add) other.data += other.plane;
    if constexpr (first) to.data += to.plane;
    if constexpr (second) to2.data += to2.plane;
  }
}

// Ends the sums of channels [begin, end), whatever the epilogue.
RIGL_ONCE void Finish(const Epilogue& after, float* sums, int32_t begin,
                      int32_t end, int32_t row, int32_t cell, int32_t rows,
                      int32_t cells, int32_t last) {
  Vector* v = reinterpret_cast<Vector*>(sums);
  const Clip clip = ClipOf(after.act, after.a, after.b);
  const Clip clip2 = ClipOf(after.act2, after.a2, after.b2);
  const bool add = after.other.data;
  const bool first = after.to.data, second = after.to2.data;
  if (after.scale || after.shift) {
    Vector* x = v;
    for (int32_t o = begin; o < end; ++o) {
      const Vector scale = All(after.scale ? after.scale[o] : 1.f);
      const Vector shift = All(after.shift ? after.shift[o] : 0.f);
      for (int32_t i = 0; i < rows * cells; ++i, ++x) *x = *x * scale + shift;
    }
  }
  if (!clip.is || (second && !clip2.is) || (!first && !second) ||
      (add && (after.combine != '+' || after.other_is_pixel))) {
    const Integers kept = FirstOf(last);
    for (int32_t o = begin; o < end; ++o)
      for (int32_t r = 0; r < rows; ++r, v += cells)
        FinishRow(after, o, row + r, cell, cells, kept, v);
    return;
  }
  const auto plain = [&](auto add, auto first, auto second) {
    const auto run = [&](auto r, auto c) {
      FinishPlain<r.value, c.value, add.value, first.value, second.value>(
          after, clip, clip2, begin, end, row, cell, rows, cells, last, v);
    };
    // Small tiles, whose sums were computed for many channels at once.
    if (rows == 1 && cells == 1)
      run(Number<1>{}, Number<1>{});
    else if (rows == 1 && cells == 2)
      run(Number<1>{}, Number<2>{});
    else if (rows == 2 && cells == 1)
      run(Number<2>{}, Number<1>{});
    else
      run(Number<0>{}, Number<0>{});
  };
  const Number<1> yes;
  const Number<0> no;
  if (add && first && second)
    plain(yes, yes, yes);
  else if (add && first)
    plain(yes, yes, no);
  else if (add)
    plain(yes, no, yes);
  else if (first && second)
    plain(no, yes, yes);
  else if (first)
    plain(no, yes, no);
  else
    plain(no, no, yes);
}

// The same of one channel.
RIGL_INLINE void FinishOne(const Epilogue& after, int32_t channel, int32_t row,
                           int32_t cell, int32_t rows, int32_t cells,
                           int32_t last, Vector* v) {
  Finish(after, reinterpret_cast<float*>(v), channel, channel + 1, row, cell,
         rows, cells, last);
}

// --------------------------------------------------------------- Convolutions

// A weight for all lanes, and its offset. Where a register can be spread they
// are read at once: loads are what a tile is bound by.
RIGL_INLINE Vector WeightOf(const Entry* entry, int32_t* offset) {
#if defined(__AVX2__)
  uint64_t both;
  __builtin_memcpy(&both, entry, sizeof both);
  __asm__("" : "+r"(both));  // as it stands: not each half by itself
  *offset = static_cast<int32_t>(both);
  return Floats(Integers{} + static_cast<int32_t>(both >> 32));
#else
  *offset = entry->offset;
  return All(entry->weight);
#endif
}

// Which tiles there are: each is a function, and what the compiler takes a
// while for. Of every width there are some, for the ends of rows.
constexpr bool Exists(int rows, int cells) {
  if (rows * cells > kRegisters) return false;
  if (rows == 1 || rows == 2 || rows == 4) return true;
  if (cells <= 2) return rows == 7 || rows == 8 || rows == 14 || rows == 16;
  return cells == 4 ? rows == 6 || rows == 7 : cells == 8 && rows == 3;
}

bool IsCompiled(int32_t rows, int32_t cells) { return Exists(rows, cells); }

// One tile of R rows and C cells, of all channels of the part.
template <int R, int C>
void SparseTile(const Convolution& k, const Part& part, float* scratch,
                int32_t row, int32_t cell) {
  // What is read here is not read again after each store, which might change
  // it.
  const int64_t pitch = k.in_pitch, step = k.in_step;
  const float* const in = Hidden(k.in + row * pitch + cell * step);
  const Entry* const entries = k.entries;
  const int32_t blocks = k.blocks;
  const float* const bias = k.bias;
  const Epilogue& after = k.after;
  const Clip clip = ClipOf(after.act, after.a, after.b);
  const bool plain = clip.is && !after.scale && !after.shift &&
                     !after.other.data && !after.to2.data && after.to.data;
  const int32_t last = cell + C == k.out_cells ? k.out_last : L;
  const bool ragged = last < L;
  const Integers kept = FirstOf(last);
  for (int32_t block = 0; block < blocks; ++block) {
    const int32_t* const rows =
        k.rows + static_cast<int64_t>(block) * k.channels;
    for (int32_t o = part.channel_begin; o < part.channel_end; ++o) {
      Vector sum[R][C];
      float* sums =
          scratch + static_cast<int64_t>(o - part.channel_begin) * (R * C * L);
      if (block == 0) {
        const Vector start = All(bias ? bias[o] : 0.f);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
          for (int c = 0; c < C; ++c) sum[r][c] = start;
      } else {
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
          for (int c = 0; c < C; ++c) sum[r][c] = Load(sums + (r * C + c) * L);
      }
      const Entry* const end = entries + rows[o + 1];
      for (const Entry* entry = entries + rows[o]; entry != end; ++entry) {
        int32_t offset;
        const Vector weight = WeightOf(entry, &offset);
        const float* at = in + offset;
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
          for (int c = 0; c < C; ++c)
            sum[r][c] += weight * Load(at + c * step);
          if (r + 1 < R) at = Hidden(at + pitch);
        }
      }
      const bool done = block + 1 == blocks;
      if (done && plain) {
        const Vector low = All(clip.low), high = All(clip.high);
        float* to = after.to.data + Place(after.to, o, row, cell);
        const int64_t to_pitch = after.to.pitch;
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
          for (int c = 0; c < C; ++c)
            sum[r][c] = Clipped(sum[r][c], low, high);
          if (ragged) sum[r][C - 1] = Masked(sum[r][C - 1], kept);
#pragma GCC unroll 32
          for (int c = 0; c < C; ++c) Store(to + c * L, sum[r][c]);
          to += to_pitch;
        }
      } else {
        Vector buffer[R * C];
        if (done) sums = reinterpret_cast<float*>(buffer);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
          for (int c = 0; c < C; ++c)
            Store(sums + (r * C + c) * L, sum[r][c]);
        if (done)
          FinishOne(after, o, row, cell, R, C, last, buffer);
      }
    }
  }
}

typedef void (*SparseFunction)(const Convolution&, const Part&, float*,
                               int32_t, int32_t);

template <int R, int C>
constexpr SparseFunction SparseTileOf() {
  if constexpr (Exists(R, C))
    return &SparseTile<R, C>;
  else
    return nullptr;
}

// Of all tiles: [rows - 1][cells - 1].
template <int... index>
struct SparseTable {
  static constexpr SparseFunction of[] = {
      SparseTileOf<index / kMostCells + 1, index % kMostCells + 1>()...};
};
template <int count, int... index>
struct SparseTableOf : SparseTableOf<count - 1, count - 1, index...> {};
template <int... index>
struct SparseTableOf<0, index...> : SparseTable<index...> {};

// Calls run(row, cell, rows, cells) for tiles that cover some rows of an
// output. At its right edge they are as wide as what is left, and higher.
// `exists` says which tiles there are.
template <class Exists, class Run>
RIGL_INLINE void ForTiles(const Convolution& k, const Part& part,
                          int32_t most_rows, int32_t most_cells, Exists exists,
                          Run run) {
  const int32_t width = Least(k.tile[1], most_cells);
  const int32_t most_sums = k.tile[0] * width;
  for (int32_t cell = 0; cell < k.out_cells;) {
    const int32_t cells = Least(k.out_cells - cell, width);
    const int32_t height =
        Least(cells == width ? k.tile[0] : most_sums / cells, most_rows);
    for (int32_t row = part.row_begin; row < part.row_end;) {
      int32_t rows = Least(height, part.row_end - row);
      while (!exists(rows, cells)) --rows;
      run(row, cell, rows, cells);
      row += rows;
    }
    cell += cells;
  }
}

void Sparse(const Convolution& k, const Part& part, float* scratch) {
  const SparseFunction* const table = SparseTableOf<kMostRows * kMostCells>::of;
  const auto tile = [table](int32_t rows, int32_t cells) {
    return table[(rows - 1) * kMostCells + cells - 1];
  };
  ForTiles(k, part, kMostRows, kMostCells, tile,
           [&](int32_t row, int32_t cell, int32_t rows, int32_t cells) {
             tile(rows, cells)(k, part, scratch, row, cell);
           });
}

// A channel of a depthwise convolution: its weights, and what ends a row of C
// cells.
template <int C>
struct DepthwiseChannel {
  const Convolution& k;
  const int32_t channel, cell;
  Vector w[9], bias, low, high;
  bool plain;
  int32_t last;
  Integers kept;
  float* to;
  int64_t to_pitch;

  inline __attribute__((always_inline)) DepthwiseChannel(const Convolution& k, const Part& part,
                               int32_t channel, int32_t cell)
      : k(k), channel(channel), cell(cell) {
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) w[i] = All(k.weights[channel * 9 + i]);
    bias = All(k.bias ? k.bias[channel] : 0.f);
    const Epilogue& after = k.after;
    const Clip clip = ClipOf(after.act, after.a, after.b);
    plain = clip.is && !after.scale && !after.shift && !after.other.data &&
            !after.to2.data && after.to.data;
    low = All(clip.low), high = All(clip.high);
    last = cell + C == k.out_cells ? k.out_last : L;
    kept = FirstOf(last);
    to = plain ? after.to.data + Place(after.to, channel, part.row_begin, cell)
               : nullptr;
    to_pitch = after.to.pitch;
  }

  // Of the rows of the part one after the other.
  inline __attribute__((always_inline)) void End(Vector* sums, int32_t row) {
    if (!plain) {
      FinishOne(k.after, channel, row, cell, 1, C, last, sums);
      return;
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Vector x = Clipped(sums[c], low, high);
      if (c == C - 1) x = Masked(x, kept);
      Store(to + c * L, x);
    }
    to += to_pitch;
  }
};

// Some rows of C cells of one channel. Where rows of the output read rows of
// the input that follow one another, each row read begins the sums of one row,
// goes on with those of another, and ends those of a third.
template <int C, bool follows>
RIGL_INLINE void DepthwiseCells(const Convolution& k, const Part& part,
                                int32_t channel, int32_t cell) {
  const int64_t pitch = k.in_pitch, step = k.in_step, row_pitch = k.row_pitch;
  const float* in = Hidden(k.in + channel * k.in_plane +
                           part.row_begin * pitch + cell * step);
  const int64_t left = k.offsets[0], middle = k.offsets[1],
                right = k.offsets[2];
  DepthwiseChannel<C> of(k, part, channel, cell);
  if constexpr (!follows) {
    for (int32_t row = part.row_begin; row < part.row_end; ++row) {
      Vector sums[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const float* at = in + c * step;
        sums[c] = of.bias;
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r, at += row_pitch) {
          sums[c] += of.w[3 * r] * Load(at + left);
          sums[c] += of.w[3 * r + 1] * Load(at + middle);
          sums[c] += of.w[3 * r + 2] * Load(at + right);
        }
      }
      in = Hidden(in + pitch);
      of.End(sums, row);
    }
    return;
  }
  Vector above[C], here[C], below[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) above[c] = here[c] = of.bias;
  // Rows of the input: those of the output, and two more.
  for (int32_t row = part.row_begin; row < part.row_end + 2; ++row) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const float* const at = in + c * step;
      const Vector x0 = Load(at + left), x1 = Load(at + middle),
                   x2 = Load(at + right);
      above[c] += of.w[6] * x0;
      here[c] += of.w[3] * x0;
      below[c] = of.bias + of.w[0] * x0;
      above[c] += of.w[7] * x1;
      here[c] += of.w[4] * x1;
      below[c] += of.w[1] * x1;
      above[c] += of.w[8] * x2;
      here[c] += of.w[5] * x2;
      below[c] += of.w[2] * x2;
    }
    in = Hidden(in + pitch);
    if (row - 2 >= part.row_begin) of.End(above, row - 2);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) above[c] = here[c], here[c] = below[c];
  }
}

// The same where the numbers of a cell read every other column. A row of the
// input that ends one row of the output begins the next.
template <int C>
RIGL_INLINE void DepthwiseEveryOther(const Convolution& k, const Part& part,
                                     int32_t channel, int32_t cell) {
  const int64_t step = k.in_step, row_pitch = k.row_pitch;
  const bool shares = k.in_pitch == 2 * row_pitch;
  const float* in = Hidden(k.in + channel * k.in_plane +
                           part.row_begin * k.in_pitch + cell * step +
                           k.offsets[0]);
  DepthwiseChannel<C> of(k, part, channel, cell);
  Vector x[C][3] = {};
  const auto read = [&](const float* at) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c, at += step) {
      const Vector a = Load(at), b = Load(at + L);
      x[c][0] = vectors::EveryOther<false>(a, b);
      x[c][1] = vectors::EveryOther<true>(a, b);
      x[c][2] = vectors::EveryOther<false>(Load(at + 2), Load(at + L + 2));
    }
  };
  for (int32_t row = part.row_begin; row < part.row_end; ++row) {
    if (row == part.row_begin || !shares) read(in);
    Vector sums[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[c] = of.bias;
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) {
      if (r > 0) read(in + r * row_pitch);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) sums[c] += of.w[3 * r + i] * x[c][i];
    }
    in = Hidden(in + k.in_pitch);
    of.End(sums, row);
  }
}

// Which of these tiles there are: their sums and weights are in registers.
constexpr int kDepthwiseCells = kRegisters >= 28 ? 4 : 1;

template <bool follows>
RIGL_INLINE void DepthwiseChannels(const Convolution& k, const Part& part) {
  for (int32_t o = part.channel_begin; o < part.channel_end; ++o) {
    int32_t cell = 0;
    if constexpr (kDepthwiseCells == 4) {
      for (; k.out_cells - cell >= 4; cell += 4)
        DepthwiseCells<4, follows>(k, part, o, cell);
      for (; k.out_cells - cell >= 2; cell += 2)
        DepthwiseCells<2, follows>(k, part, o, cell);
    }
    for (; cell < k.out_cells; ++cell)
      DepthwiseCells<1, follows>(k, part, o, cell);
  }
}

void DepthwiseEveryOtherChannels(const Convolution& k, const Part& part) {
  for (int32_t o = part.channel_begin; o < part.channel_end; ++o) {
    int32_t cell = 0;
    if constexpr (kDepthwiseCells == 4)
      for (; k.out_cells - cell >= 2; cell += 2)
        DepthwiseEveryOther<2>(k, part, o, cell);
    for (; cell < k.out_cells; ++cell)
      DepthwiseEveryOther<1>(k, part, o, cell);
  }
}

void Depthwise(const Convolution& k, const Part& part, float*) {
  if (k.every_other)
    DepthwiseEveryOtherChannels(k, part);
  else if (k.in_pitch == k.row_pitch)
    DepthwiseChannels<true>(k, part);
  else
    DepthwiseChannels<false>(k, part);
}

// Cells of a dense tile: how far they are from the first, in the input.
struct DenseCells {
  int64_t places[kDenseCells];
};

// Sums of `panels` panels of channels, and D cells, over one block.
template <int panels, int D>
RIGL_INLINE void DenseSums(const float* in, const DenseCells& cells,
                           const int32_t* offset, const int32_t* end,
                           const float* weights, int64_t panel_stride,
                           Vector (&sum)[panels * kPanel][D]) {
  int64_t place[D];
#pragma GCC unroll 32
  for (int d = 0; d < D; ++d) place[d] = cells.places[d];
  for (; offset != end; ++offset, weights += kPanel) {
    const float* const at = in + *offset;
    Vector x[D];
#pragma GCC unroll 32
    for (int d = 0; d < D; ++d) x[d] = Load(at + place[d]);
#pragma GCC unroll 32
    for (int p = 0; p < panels; ++p)
#pragma GCC unroll 32
      for (int i = 0; i < kPanel; ++i) {
        const Vector weight = All(weights[p * panel_stride + i]);
#pragma GCC unroll 32
        for (int d = 0; d < D; ++d) sum[p * kPanel + i][d] += weight * x[d];
      }
  }
}

// Some panels of a tile, over one block.
template <int panels, int D>
void DensePanels(const Convolution& k, const DenseCells& cells,
                 const float* in, int32_t block, int32_t channel, int32_t end,
                 float* scratch, int32_t row, int32_t cell, int32_t rows,
                 int32_t columns) {
  Vector sum[panels * kPanel][D];
  if (block == 0) {
#pragma GCC unroll 32
    for (int i = 0; i < panels * kPanel; ++i) {
      const Vector start =
          All(k.bias && channel + i < k.channels ? k.bias[channel + i] : 0.f);
#pragma GCC unroll 32
      for (int d = 0; d < D; ++d) sum[i][d] = start;
    }
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < panels * kPanel; ++i)
#pragma GCC unroll 32
      for (int d = 0; d < D; ++d) sum[i][d] = Load(scratch + (i * D + d) * L);
  }
  const int64_t panel_stride = static_cast<int64_t>(k.inputs) * kPanel;
  const int32_t first = k.dense_blocks[block];
  DenseSums<panels, D>(
      in, cells, k.offsets + first, k.offsets + k.dense_blocks[block + 1],
      k.weights + channel / kPanel * panel_stride + first * kPanel,
      panel_stride, sum);
  if (block + 1 < k.blocks) {
#pragma GCC unroll 32
    for (int i = 0; i < panels * kPanel; ++i)
#pragma GCC unroll 32
      for (int d = 0; d < D; ++d)
        Store(scratch + (i * D + d) * L, sum[i][d]);
    return;
  }
  Vector sums[panels * kPanel * D];
#pragma GCC unroll 32
  for (int i = 0; i < panels * kPanel; ++i)
#pragma GCC unroll 32
    for (int d = 0; d < D; ++d) sums[i * D + d] = sum[i][d];
  const int32_t count = Least(end - channel, panels * kPanel);
  const int32_t last = cell + columns == k.out_cells ? k.out_last : L;
  Finish(k.after, reinterpret_cast<float*>(sums), channel, channel + count, row,
         cell, rows, columns, last);
}

template <int D>
void DenseTile(const Convolution& k, const Part& part, float* scratch,
               int32_t row, int32_t cell, int32_t rows, int32_t columns) {
  // As many panels at a time as there are registers for.
  constexpr int most = kDenseCells / D > 1 ? kDenseCells / D : 1;
  const float* const in = k.in + row * k.in_pitch + cell * k.in_step;
  DenseCells cells;
  for (int d = 0; d < D; ++d)
    cells.places[d] = d / columns * k.in_pitch + d % columns * k.in_step;
  for (int32_t block = 0; block < k.blocks; ++block) {
    for (int32_t o = part.channel_begin; o < part.channel_end;) {
      float* const sums =
          scratch + static_cast<int64_t>(o - part.channel_begin) * (D * L);
      if (o + (most - 1) * kPanel < part.channel_end) {
        DensePanels<most, D>(k, cells, in, block, o, part.channel_end, sums,
                             row, cell, rows, columns);
        o += most * kPanel;
      } else {
        DensePanels<1, D>(k, cells, in, block, o, part.channel_end, sums, row,
                          cell, rows, columns);
        o += kPanel;
      }
    }
  }
}

void Dense(const Convolution& k, const Part& part, float* scratch) {
  ForTiles(k, part, kDenseCells, kDenseCells,
           [](int32_t rows, int32_t cells) {
             return rows * cells <= kDenseCells;
           },
           [&](int32_t row, int32_t cell, int32_t rows, int32_t cells) {
             switch (rows * cells) {
#define RIGL_CASE(D)                                                        \
  case D:                                                                   \
    return DenseTile<D>(k, part, scratch, row, cell, rows, cells);
               RIGL_CASE(1)
               RIGL_CASE(2)
#if defined(__AVX2__)
               RIGL_CASE(3)
#endif
#if defined(__AVX512VL__)
               RIGL_CASE(4)
               RIGL_CASE(5)
               RIGL_CASE(6)
#endif
#undef RIGL_CASE
             }
           });
}

// ------------------------------------------------ Elementwise, and of windows

constexpr int kChunk = 16;  // cells that are at work at a time

void Elementwise(const Field& in, const Epilogue& after, int32_t begin,
                 int32_t end) {
  for (int32_t o = begin; o < end; ++o)
    for (int32_t row = 0; row < in.rows; ++row)
      for (int32_t cell = 0; cell < in.cells; cell += kChunk) {
        const int32_t count = Least(in.cells - cell, kChunk);
        Vector v[kChunk];
        const float* from = in.data + Place(in, o, row, cell);
        for (int i = 0; i < count; ++i) v[i] = Load(from + i * L);
        FinishOne(after, o, row, cell, 1, count,
               cell + count == in.cells ? in.last : L, v);
      }
}

template <bool maximum>
RIGL_INLINE Vector Pooled(const float* at, const int32_t* offsets,
                          int32_t count) {
  Vector v = Load(at + offsets[0]);
  for (int32_t i = 1; i < count; ++i) {
    const Vector x = Load(at + offsets[i]);
    if constexpr (maximum)
      v = x > v ? x : v;
    else
      v += x;
  }
  return v;
}

void PoolWindows(const Pool& pool, int32_t begin, int32_t end) {
  for (int32_t o = begin; o < end; ++o)
    for (int32_t row = 0; row < pool.out_rows; ++row)
      for (int32_t cell = 0; cell < pool.out_cells; cell += kChunk) {
        const int32_t count = Least(pool.out_cells - cell, kChunk);
        Vector v[kChunk];
        const float* at = pool.in + o * pool.in_plane + row * pool.in_pitch +
                          cell * pool.in_step;
        if (pool.maximum)
          for (int i = 0; i < count; ++i, at += pool.in_step)
            v[i] = Pooled<true>(at, pool.offsets, pool.count);
        else
          for (int i = 0; i < count; ++i, at += pool.in_step)
            v[i] = Pooled<false>(at, pool.offsets, pool.count);
        if (pool.factors) {
          const float* factors =
              pool.factors +
              (static_cast<int64_t>(row) * pool.out_cells + cell) * L;
          for (int i = 0; i < count; ++i) v[i] *= Load(factors + i * L);
        }
        FinishOne(pool.after, o, row, cell, 1, count,
               cell + count == pool.out_cells ? pool.out_last : L, v);
      }
}

// A NaN stays one, as in TensorFlow's maximum of an axis.
RIGL_INLINE Vector Largest(Vector v, Vector x) {
  return (x > v) | (x != x) ? x : v;
}

void GlobalPool(const Field& in, bool maximum, bool positions, int32_t columns,
                const Epilogue& after, int32_t begin, int32_t end) {
  const Vector least = All(-__builtin_inff());
  // Of the last cell.
  const Integers kept = FirstOf(positions ? columns - (in.cells - 1) * L : L);
  for (int32_t o = begin; o < end; ++o) {
    Vector all = maximum ? least : Vector{};
    for (int32_t row = 0; row < in.rows; ++row) {
      const float* at = in.data + Place(in, o, row, 0);
      const Vector last = Load(at + (in.cells - 1) * L);
      if (maximum) {
        for (int32_t cell = 0; cell + 1 < in.cells; ++cell)
          all = Largest(all, Load(at + cell * L));
        all = Largest(all, Chosen(kept, last, least));
      } else {
        // By rows: a sum of few numbers is off by little.
        Vector sum = Masked(last, kept);
        for (int32_t cell = 0; cell + 1 < in.cells; ++cell)
          sum += Load(at + cell * L);
        all += sum;
      }
    }
    if (positions) {
      float one = all[0];
      for (int i = 1; i < L; ++i)
        if (!maximum)
          one += all[i];
        else if (all[i] > one || all[i] != all[i])
          one = all[i];
      all = All(one);
    }
    if (!maximum)
      all *= All(1.f / (static_cast<float>(in.rows) * columns));
    FinishOne(after, o, 0, 0, 1, 1, L, &all);
  }
}

// -------------------------------------------------------------------- Packing

void PackImages(const float* pixels, int64_t image_stride, int32_t count,
                int32_t columns, int32_t channels, const Field& to,
                int32_t row_begin, int32_t row_end) {
  // What follows in a row of each image is one cell after the other, whatever
  // the channels are.
  const int64_t numbers = static_cast<int64_t>(columns) * channels;
  const bool past = channels * to.plane > kCachedFloats;
  for (int32_t row = row_begin; row < row_end; ++row) {
    const float* from = pixels + row * numbers;
    float* const out = to.data + row * to.pitch;
    int64_t place = 0;
    int32_t channel = 0;
    for (int64_t i = 0; i < numbers; i += L) {
      const int32_t here = numbers - i < L ? numbers - i : L;
      Vector v[L];
      if (here == L) {
        for (int l = 0; l < L; ++l)
          v[l] = l < count ? Load(from + l * image_stride + i) : Vector{};
      } else {
        for (int l = 0; l < L; ++l) {
          v[l] = Vector{};
          for (int j = 0; l < count && j < here; ++j)
            v[l][j] = from[l * image_stride + i + j];
        }
      }
      vectors::Transpose(v);
      for (int j = 0; j < here; ++j) {
        if (past)
          StorePast(out + place, v[j]);
        else
          Store(out + place, v[j]);
        place += to.plane;
        if (++channel == channels) {
          channel = 0;
          place += L - channels * to.plane;
        }
      }
    }
  }
  if (past) EndStoresPast();
}

void UnpackImages(const Field& from, float* pixels, int64_t image_stride,
                  int32_t count, int32_t columns, int32_t channels,
                  int32_t row_begin, int32_t row_end) {
  const int64_t numbers = static_cast<int64_t>(columns) * channels;
  for (int32_t row = row_begin; row < row_end; ++row) {
    float* to = pixels + row * numbers;
    const float* const in = from.data + row * from.pitch;
    int64_t place = 0;
    int32_t channel = 0;
    for (int64_t i = 0; i < numbers; i += L) {
      const int32_t here = numbers - i < L ? numbers - i : L;
      Vector v[L];
      for (int j = 0; j < here; ++j) {
        v[j] = Load(in + place);
        place += from.plane;
        if (++channel == channels) {
          channel = 0;
          place += L - channels * from.plane;
        }
      }
      for (int j = here; j < L; ++j) v[j] = Vector{};
      vectors::Transpose(v);
      for (int l = 0; l < count; ++l)
        if (here == L)
          Store(to + l * image_stride + i, v[l]);
        else
          for (int j = 0; j < here; ++j)
            to[l * image_stride + i + j] = v[l][j];
    }
  }
}

void PackPositions(const float* pixels, int32_t columns, int32_t channels,
                   const Field& to, int32_t row_begin, int32_t row_end) {
  for (int32_t row = row_begin; row < row_end; ++row) {
    const float* const from =
        pixels + static_cast<int64_t>(row) * columns * channels;
    for (int32_t cell = 0; cell < to.cells; ++cell) {
      const int32_t column = cell * L, here = Least(columns - column, L);
      float* const out = to.data + Place(to, 0, row, cell);
      int32_t o = 0;
      for (; here == L && o + L <= channels; o += L) {
        Vector v[L];
        for (int i = 0; i < L; ++i)
          v[i] = Load(from + static_cast<int64_t>(column + i) * channels + o);
        vectors::Transpose(v);
        for (int i = 0; i < L; ++i)
          Store(out + (o + i) * to.plane, v[i]);
      }
      for (; o < channels; ++o) {
        const float* at = from + static_cast<int64_t>(column) * channels + o;
        Vector v{};
        for (int i = 0; i < here; ++i)
          v[i] = at[static_cast<int64_t>(i) * channels];
        // A single pixel fills its cell.
        if (columns == 1 && to.last > 1) v = All(*at);
        Store(out + o * to.plane, v);
      }
    }
  }
}

void UnpackPositions(const Field& from, float* pixels, int32_t columns,
                     int32_t channels, int32_t row_begin, int32_t row_end) {
  for (int32_t row = row_begin; row < row_end; ++row) {
    float* const to = pixels + static_cast<int64_t>(row) * columns * channels;
    for (int32_t cell = 0; cell < from.cells; ++cell) {
      const int32_t column = cell * L, here = Least(columns - column, L);
      const float* const in = from.data + Place(from, 0, row, cell);
      int32_t o = 0;
      for (; here > 1 && o + L <= channels; o += L) {
        Vector v[L];
        for (int i = 0; i < L; ++i) v[i] = Load(in + (o + i) * from.plane);
        vectors::Transpose(v);
        for (int i = 0; i < here; ++i)
          Store(to + static_cast<int64_t>(column + i) * channels + o,
                         v[i]);
      }
      for (; o < channels; ++o)
        for (int i = 0; i < here; ++i)
          to[static_cast<int64_t>(column + i) * channels + o] =
              in[o * from.plane + i];
    }
  }
}

void Pack(const float* pixels, int64_t image_stride, int32_t count,
          bool positions, int32_t columns, int32_t channels, const Field& to,
          int32_t row_begin, int32_t row_end) {
  if (positions)
    PackPositions(pixels, columns, channels, to, row_begin, row_end);
  else
    PackImages(pixels, image_stride, count, columns, channels, to, row_begin,
               row_end);
}

void Unpack(const Field& from, float* pixels, int64_t image_stride,
            int32_t count, bool positions, int32_t columns, int32_t channels,
            int32_t row_begin, int32_t row_end) {
  if (positions)
    UnpackPositions(from, pixels, columns, channels, row_begin, row_end);
  else
    UnpackImages(from, pixels, image_stride, count, columns, channels,
                 row_begin, row_end);
}

}  // namespace

extern const Tiles RIGL_TILES;
const Tiles RIGL_TILES = {
    RIGL_TEXT(RIGL_ISA), L,          kRegisters,  kMostRows, kMostCells,
    IsCompiled,          kPanel,     kDenseCells, Sparse,    Dense,
    Depthwise,
    Finish,              Elementwise, PoolWindows, GlobalPool, Pack,
    Unpack};

}  // namespace rigl_serving

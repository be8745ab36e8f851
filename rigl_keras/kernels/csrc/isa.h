// What the sources share that are compiled once for each instruction set: the
// length of its vectors, and the name RIGL_ISA of what they define.
#ifndef RIGL_KERAS_ISA_H_
#define RIGL_KERAS_ISA_H_

#define RIGL_JOIN_(a, b) a##b
#define RIGL_JOIN(a, b) RIGL_JOIN_(a, b)
#define RIGL_TEXT_(a) #a
#define RIGL_TEXT(a) RIGL_TEXT_(a)

// What the linker may share between instruction sets must not be here: all is
// either inlined or of one source alone.
#define RIGL_INLINE static inline __attribute__((always_inline))

namespace {

#if defined(RIGL_LENGTH)  // a source that is compiled for several
constexpr int L = RIGL_LENGTH;
#elif defined(__AVX512F__)
constexpr int L = 16;
#elif defined(__AVX2__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float Vector __attribute__((vector_size(L * 4), may_alias));
typedef float Unaligned
    __attribute__((vector_size(L * 4), aligned(4), may_alias));

}  // namespace

#endif  // RIGL_KERAS_ISA_H_

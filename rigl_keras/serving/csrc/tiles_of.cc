// Which kernels of tiles.cc this processor runs.

#include <cstdlib>
#include <cstring>

#include "tiles.h"

namespace rigl_serving {

#ifdef RIGL_X86
extern const Tiles rigl_tiles_avx512_16;
extern const Tiles rigl_tiles_avx512_8;
extern const Tiles rigl_tiles_avx2_8;
#endif
extern const Tiles rigl_tiles_portable_4;

namespace {

// The widest first.
struct InstructionSet {
  bool supported;
  const Tiles* tiles[2];  // null: there is no other
};

}  // namespace

const Tiles* TilesOf(int32_t length) {
  const InstructionSet sets[] = {
#ifdef RIGL_X86
      {__builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq"),
       {&rigl_tiles_avx512_16, &rigl_tiles_avx512_8}},
      {__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
       {&rigl_tiles_avx2_8, nullptr}},
#endif
      {true, {&rigl_tiles_portable_4, nullptr}},
  };
  const char* const wanted = std::getenv("RIGL_KERAS_ISA");
  const InstructionSet* best = nullptr;
  for (const InstructionSet& set : sets) {
    if (!set.supported) continue;
    const bool named = wanted && !std::strcmp(wanted, set.tiles[0]->name);
    if (!best || named) best = &set;
  }
  for (const Tiles* tiles : best->tiles)
    if (tiles && (length == 0 || tiles->length == length)) return tiles;
  return nullptr;
}

}  // namespace rigl_serving

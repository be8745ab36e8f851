// The functions that tests/support/tiles.py calls.
#include "tiles.h"

extern "C" {

__attribute__((visibility("default"))) const rigl_serving::Tiles* tiles_of(
    int32_t length) {
  return rigl_serving::TilesOf(length);
}

// The sizes of the structures that Python defines again.
__attribute__((visibility("default"))) void sizes(int64_t* to) {
  using namespace rigl_serving;
  to[0] = sizeof(Field);
  to[1] = sizeof(Entry);
  to[2] = sizeof(Epilogue);
  to[3] = sizeof(Convolution);
  to[4] = sizeof(Part);
  to[5] = sizeof(Pool);
  to[6] = sizeof(Tiles);
}
}

// The arithmetic of a planned network, compiled once for each instruction set.
//
// A field holds one value of the network for one unit of work, as planes, a
// plane for each channel. A plane has rows, a row has cells, and a cell is one
// vector of L numbers. There are two layouts, and nothing here but packing
// needs to know which one it is:
//
//   images     A cell is one pixel of L images.
//   positions  A cell is L neighbouring pixels of a row of one image. A value
//              of one pixel fills its cell L times.
//
// Around its rows a field has a margin that is zero and stays zero: wide
// enough for every convolution that reads it. In a row of positions, what the
// last cell has beyond the image is margin, too.
#ifndef RIGL_KERAS_TILES_H_
#define RIGL_KERAS_TILES_H_

#include <cstdint>

namespace rigl_serving {

// data + channel * plane + row * pitch + cell * L is aligned to L floats.
struct Field {
  float* data = nullptr;  // channel 0, row 0, cell 0
  int64_t plane = 0;      // floats from channel to channel
  int64_t pitch = 0;      // floats from row to row
  int32_t channels = 0, rows = 0, cells = 0;
  int32_t last = 0;  // numbers of the last cell of a row that count, 1 to L
};

// A value of more floats is not in the caches any more when it is read: it is
// written past them.
constexpr int64_t kCachedFloats = 1'500'000;

// One weight, and how far from its output's place it reads, in floats.
struct Entry {
  int32_t offset;
  float weight;
};

// What follows a convolution or stands alone, in this order:
//   y = act(x * scale + shift  +, - or *  other), stored in `to` if it has data
//   z = act2(y * scale2 + shift2), stored in `to2` if it has data
// What the last cell of a row has beyond `last` is stored as zero.
struct Epilogue {
  const float* scale = nullptr;  // [channels]; null: 1
  const float* shift = nullptr;  // [channels]; null: 0
  Field other;                   // no data: none
  char combine = '+';            // with `other`: + - *
  bool other_is_pixel = false;  // its single cell is for all rows and cells
  int32_t act = -1;     // an Activation; -1: none
  float a = 0, b = 0;
  Field to;
  Field to2;
  const float* scale2 = nullptr;  // [channels]; null: 1
  const float* shift2 = nullptr;  // [channels]; null: 0
  int32_t act2 = -1;
  float a2 = 0, b2 = 0;
};

// A convolution with a field, whole or some rows and channels of it. The
// number at (channel o, row i, cell j) is
//   bias[o] + sum over its entries of
//     weight * (the L floats at in + i * in_pitch + j * in_step + offset)
struct Convolution {
  const float* in = nullptr;
  int64_t in_pitch = 0, in_step = 0;

  // Entries of channel o within block b of the inputs' channels are those of
  // [rows[b * channels + o], rows[b * channels + o + 1]).
  const Entry* entries = nullptr;
  const int32_t* rows = nullptr;

  // Dense: instead of entries, `inputs` offsets for all channels, those of
  // block b being [dense_blocks[b], dense_blocks[b + 1]); and weights as
  // panels of `panel` channels: [ceil(channels / panel), inputs, panel], zero
  // beyond the channels.
  const int32_t* offsets = nullptr;
  const int32_t* dense_blocks = nullptr;
  const float* weights = nullptr;
  int32_t inputs = 0;

  // Depthwise: channel o reads channel o of the input alone, `in_plane` floats
  // on. `weights` are [channels][9], of a window of 3 rows and columns; the
  // columns of its first row are at offsets[0] to offsets[2], and each row
  // follows `row_pitch` floats after the one before. With `every_other` a cell
  // is of positions whose inputs are every other number, and offsets[0] to
  // offsets[2] follow one another.
  int64_t in_plane = 0, row_pitch = 0;
  bool every_other = false;

  int32_t blocks = 1;
  int32_t channels = 0;        // of the output, all of them
  const float* bias = nullptr;  // [channels]; null: zero
  int32_t out_rows = 0, out_cells = 0, out_last = 0;
  int32_t tile[2] = {1, 1};  // rows and cells whose sums are in registers
  Epilogue after;
};

struct Part {  // of a convolution: what one call computes
  int32_t row_begin, row_end, channel_begin, channel_end;
};

// The largest or the sum of the L floats at
//   in + channel * in_plane + i * in_pitch + j * in_step + offset
// over all offsets, times `factors`, for each row i and cell j.
struct Pool {
  const float* in = nullptr;
  int64_t in_plane = 0, in_pitch = 0, in_step = 0;
  const int32_t* offsets = nullptr;
  int32_t count = 0;  // of offsets, at least 1
  bool maximum = false;
  const float* factors = nullptr;  // [out_rows][out_cells][L]; null: 1
  int32_t out_rows = 0, out_cells = 0, out_last = 0;
  Epilogue after;
};

// The kernels of one instruction set and one length of vectors. Of AVX-512
// there are two: with vectors of 16, and of 8 (whose unaligned loads cross
// cache lines half as often), with all 32 registers.
struct Tiles {
  const char* name;   // "avx512", "avx2", "portable"
  int32_t length;     // L: floats of a vector
  // A tile may have so many sums (rows * cells), rows and cells. `sparse` takes
  // any; one that was not compiled is computed as several lower ones.
  int32_t registers, most_rows, most_cells;
  bool (*is_compiled)(int32_t rows, int32_t cells);
  int32_t panel;        // channels of a panel of dense weights
  int32_t dense_cells;  // rows * cells that a dense tile has at most

  // `scratch`: floats for `tile[0] * tile[1] * L` sums of each channel of the
  // part, where there is more than one block. Parts of a dense convolution
  // begin with a panel, and their scratch is for whole ones.
  void (*sparse)(const Convolution&, const Part&, float* scratch);
  void (*dense)(const Convolution&, const Part&, float* scratch);
  // Without strides a row of the input is read once for the three of the output
  // that it is for.
  void (*depthwise)(const Convolution&, const Part&, float* scratch);

  // The epilogue of sums that were computed elsewhere: [channel][cell][L], of
  // the channels [begin, end) of a tile of some rows and cells. They are
  // overwritten.
  void (*finish)(const Epilogue&, float* sums, int32_t begin, int32_t end,
                 int32_t row, int32_t cell, int32_t rows, int32_t cells,
                 int32_t last);

  // Channels [begin, end) of a field, changed by an epilogue alone. The field
  // may be the epilogue's own `to`.
  void (*elementwise)(const Field& in, const Epilogue&, int32_t begin,
                      int32_t end);
  void (*pool)(const Pool&, int32_t begin, int32_t end);
  // One cell for each channel: over all pixels of the image. `columns` are
  // the pixels in a row. In positions all of the cell's L numbers are it.
  void (*global_pool)(const Field& in, bool maximum, bool positions,
                      int32_t columns, const Epilogue&, int32_t begin,
                      int32_t end);

  // Images: pixels [row][column][channels] of `count` <= L images, which
  // begin `image_stride` floats apart, to channels [begin, end) of a field,
  // rows [row_begin, row_end); lanes beyond the count are zero.
  // Positions: count is 1.
  void (*pack)(const float* pixels, int64_t image_stride, int32_t count,
               bool positions, int32_t columns, int32_t channels,
               const Field& to, int32_t row_begin, int32_t row_end);
  void (*unpack)(const Field& from, float* pixels, int64_t image_stride,
                 int32_t count, bool positions, int32_t columns,
                 int32_t channels, int32_t row_begin, int32_t row_end);
};

// Those of this processor's instruction set, or of the one that RIGL_KERAS_ISA
// names: the widest, or (length) with vectors of so many floats, null if none.
// AVX-512 has 16 and 8, AVX2 has 8, portable code 4.
const Tiles* TilesOf(int32_t length = 0);

}  // namespace rigl_serving

#endif  // RIGL_KERAS_TILES_H_

// Machine code for one sparse convolution, made when it is planned.
//
// A loop that reads its weights from memory loads a vector of the input for
// every product, and the first cache gives one such load in a cycle, or half
// of one where it crosses a line. Code that is made for the weights keeps the
// sums of many output channels in registers, whose numbers stand in the
// instructions: it loads a vector of the input once for all these channels,
// and the processor then multiplies and adds in every cycle.
#ifndef RIGL_KERAS_GENERATED_H_
#define RIGL_KERAS_GENERATED_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "tiles.h"

namespace rigl_serving {

// Pages of code, which can be read and run, and no longer be written.
class Code {
 public:
  // Null where the system allows no such pages.
  static std::unique_ptr<Code> Of(const std::vector<uint8_t>& bytes);
  ~Code();
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;

  const uint8_t* begin() const { return begin_; }

 private:
  Code(uint8_t* begin, size_t size) : begin_(begin), size_(size) {}

  uint8_t* begin_;
  size_t size_;
};

// Sums of some output channels for the cells of a tile:
//   bias + sum of weight * in[offset + cell's place]
// written to `to` as [channel][cell][L], or ended as an `Ending` says.
using SumsFunction = void (*)(const float* in, const float* weights, float* to,
                              const float* other, float* to2);

// The epilogue of a convolution, where it is a plain one:
//   y = relu?(sum + other), z = relu?(y * scale + shift)
// each stored where there is a field for it.
struct Ending {
  bool adds = false, relu = false, stores = false;
  bool second = false, relu2 = false;
  bool past = false;  // stores do not go through the caches
  // Of the fields: floats from channel to channel, and a tile's cells.
  int64_t other_plane = 0, plane = 0, plane2 = 0;
  std::vector<int64_t> other_cells, cells, cells2;
  std::vector<float> scale, shift;  // of the block's channels
};

// What code is made for: some output channels of a convolution.
struct GeneratedBlock {
  int32_t channels = 0;
  // The vectors of the input that are read, in order, and with each of them
  // the products that it is for.
  struct Read {
    int32_t offset;  // floats
    int32_t first, count;  // of `products`
  };
  struct Product {
    int32_t channel;
    float weight;
  };
  std::vector<Read> reads;
  std::vector<Product> products;
  std::vector<float> bias;
};

// Blocks of output channels, one after another.
struct Generated {
  std::unique_ptr<Code> code;
  std::vector<float> weights;
  struct Block {
    int32_t first_channel, channels;
    int64_t code_at, weights_at;
  };
  std::vector<Block> blocks;
  bool ends = false;  // the code has the epilogue

  SumsFunction function(const Block& block) const {
    return reinterpret_cast<SumsFunction>(
        const_cast<uint8_t*>(code->begin() + block.code_at));
  }
};

// Whether this processor and this system run such code (RIGL_KERAS_GENERATED
// set to `off`: no) beside these kernels.
bool CanGenerate(const Tiles& tiles);

// How many output channels a block may have, for a tile of so many cells.
int32_t MostChannels(int32_t cells);

// Appends the code of a block, and its weights in the order in which it reads
// them. `cells` are the places of the tile's cells, in floats.
// `ending`: null where sums are all.
void Generate(const GeneratedBlock& block, const std::vector<int64_t>& cells,
              int32_t length, const Ending* ending,
              std::vector<uint8_t>* code, std::vector<float>* weights);

}  // namespace rigl_serving

#endif  // RIGL_KERAS_GENERATED_H_

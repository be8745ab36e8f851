#include "generated.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include <sys/mman.h>
#include <unistd.h>

namespace rigl_serving {
namespace {

// Registers of AVX-512: sums in the first ones, then the inputs of a tile's
// cells, then a weight.
constexpr int kRegisters = 32;

// General registers by which memory is found: the function's arguments rdi,
// rsi, rdx, rcx and r8.
enum Base { kInput = 7, kWeights = 6, kTo = 2, kOther = 1, kTo2 = 8 };

// Writes instructions of AVX-512, with vectors of 512 or 256 bits.
class Assembler {
 public:
  Assembler(std::vector<uint8_t>* code, int32_t length)
      : code_(code), wide_(length == 16), bytes_(length * 4) {}

  // vector = memory
  void Load(int vector, Base base, int64_t bytes) {
    Evex(1, 0, vector, 0, false);
    Byte(0x10);
    Memory(vector, base, bytes, bytes_);
  }
  // sum += memory
  void Add(int sum, Base base, int64_t bytes) {
    Evex(1, 0, sum, sum, false, 0, base);
    Byte(0x58);
    Memory(sum, base, bytes, bytes_);
  }
  // vector = 0
  void Clear(int vector) {
    Evex(1, 1, vector, vector, false, vector);
    Byte(0xef);
    Byte(0xc0 | (vector & 7) << 3 | (vector & 7));
  }
  // vector = max(zero, vector); a NaN stays one
  void Relu(int vector, int zero) {
    Evex(1, 0, vector, zero, false, vector);
    Byte(0x5f);
    Byte(0xc0 | (vector & 7) << 3 | (vector & 7));
  }
  // memory = vector; `past` the caches
  void Store(Base base, int64_t bytes, int vector, bool past = false) {
    Evex(1, 0, vector, 0, false, 0, base);
    Byte(past ? 0x2b : 0x11);
    Memory(vector, base, bytes, bytes_);
  }
  // Every number of a vector = one of memory.
  void Broadcast(int vector, Base base, int64_t bytes) {
    Evex(2, 1, vector, 0, false);
    Byte(0x18);
    Memory(vector, base, bytes, 4);
  }
  // sum += x * every number: one of memory
  void MultiplyAddBroadcast(int sum, int x, Base base, int64_t bytes) {
    Evex(2, 1, sum, x, true);
    Byte(0xb8);
    Memory(sum, base, bytes, 4);
  }
  // sum += x * y
  void MultiplyAdd(int sum, int x, int y) {
    Evex(2, 1, sum, x, false, y);
    Byte(0xb8);
    Byte(0xc0 | (sum & 7) << 3 | (y & 7));
  }
  // base += bytes
  void Advance(Base base, int32_t bytes) {
    Byte(0x48);
    Byte(0x81);
    Byte(0xc0 | base);
    Word(bytes);
  }
  void Return() { Byte(0xc3); }

 private:
  void Byte(int byte) { code_->push_back(static_cast<uint8_t>(byte)); }
  void Word(int64_t word) {
    if (word != static_cast<int32_t>(word))
      throw std::length_error("code reaches too far");
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(word));
    for (int i = 0; i < 4; ++i) Byte(bits >> (8 * i) & 0xff);
  }

  // The prefix: which registers, opcode map (1: 0F, 2: 0F38), and prefix
  // (0: none, 1: 66). `rm`: a vector in the place of memory.
  void Evex(int map, int prefix, int reg, int second, bool broadcast,
            int rm = 0, int base = 0) {
    Byte(0x62);
    Byte((~reg & 8) << 4 | (~rm & 16) << 2 | (~(rm | base) & 8) << 2 |
         (~reg & 16) | map);
    Byte((~second & 15) << 3 | 4 | prefix);
    Byte((wide_ ? 0x40 : 0x20) | (broadcast ? 0x10 : 0) |
         (~second & 16) >> 1);
  }

  // Operands: a register, and memory. A displacement that is a multiple of
  // `unit` may be one byte.
  void Memory(int reg, Base base, int64_t bytes, int unit) {
    const int64_t units = bytes / unit;
    const bool is_short = bytes % unit == 0 && units >= -128 && units < 128;
    Byte((is_short ? 0x40 : 0x80) | (reg & 7) << 3 | (base & 7));
    if (is_short)
      Byte(static_cast<int>(units) & 0xff);
    else
      Word(bytes);
  }

  std::vector<uint8_t>* code_;
  const bool wide_;
  const int bytes_;  // of a vector
};

}  // namespace

std::unique_ptr<Code> Code::Of(const std::vector<uint8_t>& bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t size = (bytes.size() + page) / page * page;
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  std::memcpy(memory, bytes.data(), bytes.size());
  if (mprotect(memory, size, PROT_READ | PROT_EXEC) != 0) {
    munmap(memory, size);
    return nullptr;
  }
  return std::unique_ptr<Code>(new Code(static_cast<uint8_t*>(memory), size));
}

Code::~Code() { munmap(begin_, size_); }

bool CanGenerate(const Tiles& tiles) {
#if defined(__x86_64__) && defined(__linux__)
  const char* asked = std::getenv("RIGL_KERAS_GENERATED");
  if (asked && !std::strcmp(asked, "off")) return false;
  static const bool can = [] {
    if (!__builtin_cpu_supports("avx512f") ||
        !__builtin_cpu_supports("avx512vl"))
      return false;
    // A system may forbid it: a function that returns tells.
    const std::unique_ptr<Code> code = Code::Of({0xc3});
    if (!code) return false;
    reinterpret_cast<void (*)()>(const_cast<uint8_t*>(code->begin()))();
    return true;
  }();
  // Kernels of AVX2 may be asked for where there is more.
  return can && !std::strcmp(tiles.name, "avx512");
#else
  (void)tiles;
  return false;
#endif
}

int32_t MostChannels(int32_t cells) {
  // One cell: the weight comes from memory with the product.
  const int32_t weight = cells > 1 ? 1 : 0;
  // Inputs of a cell in turn, so that one is loaded while another is used. In
  // the end three registers are for the epilogue.
  const int32_t inputs = cells == 1 ? 3 : cells;
  return (kRegisters - inputs - weight) / cells;
}

void Generate(const GeneratedBlock& block, const std::vector<int64_t>& cells,
              int32_t length, const Ending* ending,
              std::vector<uint8_t>* code, std::vector<float>* weights) {
  Assembler assembler(code, length);
  const int count = static_cast<int>(cells.size());
  const int channels = block.channels;
  if (channels < 1 || channels > MostChannels(count) ||
      block.bias.size() != static_cast<size_t>(channels))
    throw std::length_error("a block has too many channels");
  const auto sum = [&](int channel, int cell) {
    return channel * count + cell;
  };
  const int first_input = channels * count;

  // Weights are read in order. Those that a short displacement reaches come
  // before the pointer moves on.
  constexpr int kReach = 128;
  int at = 0;
  const auto next_weight = [&](float weight) {
    if (at == kReach) {
      assembler.Advance(kWeights, kReach * 4);
      at = 0;
    }
    weights->push_back(weight);
    return int64_t{4} * at++;
  };

  for (int channel = 0; channel < channels; ++channel) {
    const int64_t place = next_weight(block.bias[channel]);
    for (int cell = 0; cell < count; ++cell)
      assembler.Broadcast(sum(channel, cell), kWeights, place);
  }
  int turn = 0;
  for (const GeneratedBlock::Read& read : block.reads) {
    const int input = first_input + (count == 1 ? turn++ % 3 : 0);
    for (int cell = 0; cell < count; ++cell)
      assembler.Load(input + cell, kInput, 4 * (read.offset + cells[cell]));
    for (int32_t p = read.first; p < read.first + read.count; ++p) {
      const GeneratedBlock::Product& product = block.products[p];
      const int64_t place = next_weight(product.weight);
      if (count == 1) {
        assembler.MultiplyAddBroadcast(sum(product.channel, 0), input,
                                       kWeights, place);
        continue;
      }
      const int weight = kRegisters - 1;
      assembler.Broadcast(weight, kWeights, place);
      for (int cell = 0; cell < count; ++cell)
        assembler.MultiplyAdd(sum(product.channel, cell), input + cell,
                              weight);
    }
  }
  if (!ending) {
    for (int channel = 0; channel < channels; ++channel)
      for (int cell = 0; cell < count; ++cell)
        assembler.Store(kTo, int64_t{4} * length * (channel * count + cell),
                        sum(channel, cell));
    assembler.Return();
    return;
  }

  // Inputs and weights are done with: their registers are free.
  const int zero = first_input, scale = zero + 1, shift = zero + 2;
  if (ending->relu || ending->relu2) assembler.Clear(zero);
  const auto bytes = [](int channel, int64_t plane, int64_t cell) {
    return 4 * (channel * plane + cell);
  };
  for (int channel = 0; channel < channels; ++channel) {
    int64_t at_scale = 0, at_shift = 0;
    if (ending->second) {
      at_scale = next_weight(ending->scale[channel]);
      // Both are in reach: the pointer may not move on between them.
      at_shift = next_weight(ending->shift[channel]);
      if (at_shift < at_scale) {
        at_scale -= int64_t{4} * kReach;
      }
    }
    for (int cell = 0; cell < count; ++cell) {
      const int y = sum(channel, cell);
      if (ending->adds)
        assembler.Add(y, kOther, bytes(channel, ending->other_plane,
                                       ending->other_cells[cell]));
      if (ending->relu) assembler.Relu(y, zero);
      if (ending->stores)
        assembler.Store(kTo,
                        bytes(channel, ending->plane, ending->cells[cell]), y,
                        ending->past);
      if (!ending->second) continue;
      assembler.Broadcast(scale, kWeights, at_scale);
      assembler.Broadcast(shift, kWeights, at_shift);
      assembler.MultiplyAdd(shift, y, scale);
      if (ending->relu2) assembler.Relu(shift, zero);
      assembler.Store(kTo2,
                      bytes(channel, ending->plane2, ending->cells2[cell]),
                      shift, ending->past);
    }
  }
  assembler.Return();
}

}  // namespace rigl_serving

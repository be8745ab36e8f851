#include "bytes.h"

#include <array>

namespace rigl_serving {

namespace {

// Row r: the checksum of a byte that r bytes of zeros follow. So eight bytes
// take eight look-ups that do not wait for one another.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables MakeTables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t rest = byte;
    for (int bit = 0; bit < 8; ++bit)
      rest = (rest >> 1) ^ (rest & 1 ? 0xEDB88320u : 0);
    tables[0][byte] = rest;
  }
  for (size_t row = 1; row < tables.size(); ++row)
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[row - 1][byte];
      tables[row][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  return tables;
}

constexpr Tables kTables = MakeTables();

}  // namespace

uint32_t Checksum(const uint8_t* bytes, size_t size) {
  uint32_t rest = ~0u;
  for (; size >= 8; size -= 8, bytes += 8) {
    uint32_t low, high;
    std::memcpy(&low, bytes, 4);
    std::memcpy(&high, bytes + 4, 4);
    low ^= rest;
    rest = kTables[7][low & 0xFF] ^ kTables[6][(low >> 8) & 0xFF] ^
           kTables[5][(low >> 16) & 0xFF] ^ kTables[4][low >> 24] ^
           kTables[3][high & 0xFF] ^ kTables[2][(high >> 8) & 0xFF] ^
           kTables[1][(high >> 16) & 0xFF] ^ kTables[0][high >> 24];
  }
  for (; size > 0; --size, ++bytes)
    rest = (rest >> 8) ^ kTables[0][(rest ^ *bytes) & 0xFF];
  return ~rest;
}

std::string Quoted(const std::string& name) {
  constexpr size_t kMost = 60;
  std::string text = "'";
  for (size_t i = 0; i < name.size() && i < kMost; ++i)
    text += name[i] >= ' ' && name[i] <= '~' ? name[i] : '?';
  return text + (name.size() > kMost ? "...'" : "'");
}

std::string NameOf(const Network& network, size_t node) {
  return "node " + std::to_string(node) + " (" +
         Quoted(network.nodes[node].name) + ")";
}

std::string TextOf(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i)
    text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

}  // namespace rigl_serving

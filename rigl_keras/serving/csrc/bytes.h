// Bytes of a file that somebody else may have written.
#ifndef RIGL_KERAS_BYTES_H_
#define RIGL_KERAS_BYTES_H_

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "network.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "files are little endian, and are read as they are"
#endif

namespace rigl_serving {

// The CRC-32 of zlib, PNG and Ethernet.
uint32_t Checksum(const uint8_t* bytes, size_t size);

// A name as a message may show it: in quotes, of printable ASCII, not long.
std::string Quoted(const std::string& name);

// "node 3 ('conv_1')"
std::string NameOf(const Network& network, size_t node);

// "(28, 28, -1)"
std::string TextOf(const Shape& shape);

// What is left to read. It throws Error where less is left than is asked for.
class Bytes {
 public:
  Bytes(const uint8_t* begin, size_t size) : at_(begin), left_(size) {}

  size_t left() const { return left_; }

  // The next `count` pieces of `size` bytes, which are then behind it.
  const uint8_t* Take(uint64_t count, size_t size, const char* what) {
    // Divided, because a product could overflow.
    if (count > left_ / size)
      throw Error("the file ends within " + std::string(what) + ": " +
                  std::to_string(count) + " times " + std::to_string(size) +
                  " bytes are announced, and " + std::to_string(left_) +
                  " are left");
    const uint8_t* taken = at_;
    at_ += count * size;
    left_ -= count * size;
    return taken;
  }

  template <typename Number>
  Number Read(const char* what) {
    static_assert(std::is_arithmetic_v<Number>, "numbers alone");
    Number number;
    std::memcpy(&number, Take(1, sizeof(Number), what), sizeof(Number));
    return number;
  }

  std::string ReadString(const char* what) {
    const uint32_t size = Read<uint32_t>(what);
    const uint8_t* text = Take(size, 1, what);
    return std::string(reinterpret_cast<const char*>(text), size);
  }

 private:
  const uint8_t* at_;
  size_t left_;
};

}  // namespace rigl_serving

#endif  // RIGL_KERAS_BYTES_H_

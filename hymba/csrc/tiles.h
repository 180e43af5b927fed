// Matrix tiles (AMX): eight registers of up to 16 rows of 64 bytes, whose shape is a state of the thread. A product adds
// (M, 4 K bytes) times (K, N x 4 bytes), weights or activations interleaved as they are for the dot products of AVX-512.
#pragma once

#include "simd.h"

namespace hymba {
namespace HYMBA_ISA {

#if defined(HYMBA_AMX)
// To be called for what was written before tiles, or their shape, are loaded from there: GCC 12 does not know that they are.
HYMBA_INLINE void written(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// Shapes the calling thread's tiles as `use` says, and gives them up at its end, so that threads switch cheaply.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (rows_ > 0) _tile_release();
  }
  // Tiles 0 .. 3: sums, `rows` x 16; tile 4: the first factor, `rows` x `bytes`; tiles 5 .. 7: the second, bytes / 4 x 64.
  void use(int rows, int bytes) {
    if (rows == rows_ && bytes == bytes_) return;
    rows_ = rows, bytes_ = bytes;
    struct alignas(64) {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } shape = {1, 0, {}, {}, {}};
    for (int i = 0; i < 8; i++) {
      shape.bytes[i] = i == 4 ? bytes : 64;
      shape.rows[i] = i > 4 ? bytes / 4 : rows;
    }
    written(&shape);
    _tile_loadconfig(&shape);
  }

 private:
  int rows_ = 0, bytes_ = 0;
};
#else
class Tiles {};
#endif

}  // namespace HYMBA_ISA
}  // namespace hymba

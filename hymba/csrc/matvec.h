// Products of a weight matrix with rows of activations, for use inside a parallel region (decode.cpp); see
// matvec_dense.h and matvec_blocks.h for math, layouts and tiling.
#pragma once

#include "simd.h"

namespace hymba {

enum Format : int64_t { kDenseFloat32 = 0, kDenseBFloat16 = 1, kInt8 = 2, kInt4 = 3 };

// y = x W^T with W: (rows, cols). Four formats:
//   dense  `data` is W itself, row-major
//   int8   blocks of 16 rows, groups of 64 inputs; `scale` holds one float per row
//   int4   the same with groups of 32 and the scales inside `data`, one bf16 per row and group
struct Matrix {
  int64_t format, rows, cols;
  const void* data;
  const float* scale;
};

// Rows that a thread takes should start at a multiple of this: the int8 and int4 formats keep so many together.
constexpr int64_t kRowBlock = 16;

namespace HYMBA_ISA {

// Bytes ahead, into the second-level cache: memory and arithmetic overlap only if lines are asked for this early.
constexpr int kPrefetch = 16384;
constexpr int kCacheLine = 64;

HYMBA_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// out[i] = sum over the lanes of part[i]
HYMBA_INLINE void sum_of_each(const vf part[16], float out[16]) {
#if defined(__AVX512F__)
  // each step adds the halves of two vectors and puts them into one: 16 -> 8 -> 4 -> 2 -> 1
  vf a[8], b[4], c[2];
  for (int i = 0; i < 8; i++) {
    const vf x = part[2 * i], y = part[2 * i + 1];
    a[i] = __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < 4; i++) {
    const vf x = a[2 * i], y = a[2 * i + 1];
    b[i] = __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; i++) {
    const vf x = b[2 * i], y = b[2 * i + 1];
    c[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  store(out, __builtin_shufflevector(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                 __builtin_shufflevector(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
#else
  for (int i = 0; i < 16; i++) out[i] = sum(part[i]);
#endif
}

// How a row of a dense matrix of type T meets activations: elements per step, and the form of the activations.
template <class T>
struct Dot {
  using Input = float;
  using Chunk = vf;
  static constexpr int kStep = kW;
  static Chunk input(const Input* p) { return load(p); }
  static Chunk weight(const T* p) { return load(p); }
  static Chunk weight_n(const T* p, int64_t n) { return load_n(p, n); }
  static vf add(vf sum, Chunk w, Chunk x) { return sum + w * x; }
};
#if defined(__AVX512BF16__)
template <>
struct Dot<bf16> {
  using Input = bf16;
  using Chunk = __m512i;
  static constexpr int kStep = 2 * kW;
  static Chunk input(const Input* p) { return _mm512_loadu_si512(p); }
  static Chunk weight(const bf16* p) { return _mm512_loadu_si512(p); }
  static Chunk weight_n(const bf16* p, int64_t n) {
    return _mm512_maskz_loadu_epi16((1u << n) - 1, p);  // n < 32
  }
  static vf add(vf sum, Chunk w, Chunk x) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x); }
};
#endif

// elements from one row of prepared activations to the next: whole steps, the rest of the last one is zero
HYMBA_INLINE int64_t padded(int64_t cols) { return round_up(cols, 32); }

// x: rows of `cols` floats, row b at x + b x_row -> rows in the form that `Dot` wants, `padded(cols)` apart
template <class Input>
HYMBA_INLINE void dot_rows(const float* x, int64_t x_row, int64_t cols, int64_t rows, Input* out) {
  const int64_t ld = padded(cols);
  for (int64_t b = 0; b < rows; b++) {
    int64_t k = 0;
    for (; k + kW <= cols; k += kW) store(out + b * ld + k, load(x + b * x_row + k));
    for (; k < ld; k += kW) store(out + b * ld + k, k < cols ? load_n(x + b * x_row + k, cols - k) : zero());
  }
}

// Bytes that `prepare` writes at most for `batch` rows of `cols` activations, a multiple of 64.
int64_t input_bytes(int64_t cols, int64_t batch);

// Brings x: (batch, cols), row b at x + b x_row, into the form that `multiply` wants for matrices of w's format and
// width: rounded to bf16, or quantised to int8. `input`: 64-byte aligned.
void prepare(const Matrix& w, const float* x, int64_t x_row, int64_t batch, void* input);

// y[b y_row + r - first] = W[r] . x[b] for the rows r = first .. last - 1. `first` is a multiple of kRowBlock.
void multiply(const Matrix& w, const void* input, int64_t batch, int64_t first, int64_t last, float* y, int64_t y_row);

// Row `row` of W as floats: an embedding.
void lookup(const Matrix& w, int64_t row, float* out);

}  // namespace HYMBA_ISA
}  // namespace hymba

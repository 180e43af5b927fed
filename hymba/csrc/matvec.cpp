// Weight matrices times few activations: y[b][r] = sum_i W[r][i] x[b][i], for batches where reading W is what costs.
// matvec_dense.h has the products of bf16 and float32, matvec_blocks.h those of int8 and int4.
//
// The order of additions of one output depends neither on the number of threads nor on the other rows of W. In bf16 and
// float32 it depends on how many activations there are, and is the same for all of them.
#include "matvec.h"

#include "elementwise.h"
#include "matvec_blocks.h"
#include "matvec_dense.h"

namespace hymba {
namespace HYMBA_ISA {

namespace {

// rows first .. last - 1 of a batch, as `multiply` wants them beside int8 or int4 weights
void quantise_for(const Matrix& w, const float* x, int64_t x_row, int64_t batch, int64_t first, int64_t last, void* input) {
  if (w.format == kInt8)
    quantise<false>(x, x_row, w.cols, batch, first, last, input);
  else
    quantise<true>(x, x_row, w.cols, batch, first, last, input);
}

}  // namespace

int64_t input_bytes(int64_t cols, int64_t batch) {
  return round_up(dense_input_bytes(cols, batch), kCacheLine);  // more than the quantised form takes
}

void prepare(const Matrix& w, const float* x, int64_t x_row, int64_t batch, void* input) {
  if (w.format == kDenseFloat32)
    prepare_dense<float>(x, x_row, w.cols, batch, input);
  else if (w.format == kDenseBFloat16)
    prepare_dense<bf16>(x, x_row, w.cols, batch, input);
  else
    quantise_for(w, x, x_row, batch, 0, batch, input);
}

void multiply(const Matrix& w, const void* input, int64_t batch, int64_t first, int64_t last, float* y, int64_t y_row) {
  const int64_t rows = last - first, at = first * w.cols;
  if (rows <= 0) return;
  switch (w.format) {
    case kInt8: return blocks<false>(w, input, batch, first, last, y, y_row);
    case kInt4: return blocks<true>(w, input, batch, first, last, y, y_row);
    case kDenseFloat32: return multiply_dense(static_cast<const float*>(w.data) + at, w.cols, rows, input, batch, y, y_row);
    default: return multiply_dense(static_cast<const bf16*>(w.data) + at, w.cols, rows, input, batch, y, y_row);
  }
}

void lookup(const Matrix& w, int64_t row, float* out) {
  if (w.format == kDenseFloat32 || w.format == kDenseBFloat16) {
    for (int64_t i = 0; i < w.cols; i++)
      out[i] = w.format == kDenseFloat32 ? static_cast<const float*>(w.data)[row * w.cols + i]
                                         : to_float(static_cast<const bf16*>(w.data)[row * w.cols + i]);
    return;
  }
  const int64_t block = row / kRowBlock, r = row % kRowBlock;
  const uint8_t* data = static_cast<const uint8_t*>(w.data);
  if (w.format == kInt8) {
    const uint8_t* codes = data + block * block_bytes<false>(ceil_div(w.cols, kGroup<false>));
    for (int64_t i = 0; i < w.cols; i++) out[i] = w.scale[row] * (codes[i / 4 * 64 + 4 * r + i % 4] - 128);
    return;
  }
  const int64_t groups = ceil_div(w.cols, kGroup<true>);
  data += block * block_bytes<true>(groups);
  const bf16* scales = reinterpret_cast<const bf16*>(data);
  const uint8_t* codes = data + int4_scale_bytes(groups);
  for (int64_t i = 0; i < w.cols; i++) {
    const int nibble = codes[i / 8 * 64 + 4 * r + i % 4] >> (i / 4 % 2 * 4) & 15;
    out[i] = to_float(scales[i / kGroup<true> * 16 + r]) * kLevels[nibble];
  }
}

struct LinearArgs {
  Matrix w;        // int8 or int4
  int64_t dtype;   // of x and y
  const void* x;   // (batch, cols)
  int64_t batch;   // any number
  void* y;         // (batch, rows)
  int64_t n_threads;
};

// Many activations go through in chunks that stay in the second-level cache once quantised.
constexpr int64_t kChunkBytes = 512 * 1024, kMaxChunk = 512;
constexpr int64_t kStrip = 4 * kRowBlock;  // rows of W whose results are converted together: two lines of bf16 each

template <class T>
void linear(const LinearArgs& a, int thread, int n_threads, void* input, int64_t chunk) {
  const Matrix& w = a.w;
  const T* x = static_cast<const T*>(a.x);
  float* row = static_cast<float*>(scratch(1, w.cols * sizeof(float)));
  float* strip = static_cast<float*>(scratch(2, chunk * kStrip * sizeof(float)));
  const Range own = split(ceil_div(w.rows, kRowBlock), thread, n_threads);
  const int64_t first = own.first * kRowBlock, last = min(own.last * kRowBlock, w.rows);
  for (int64_t from = 0; from < a.batch; from += chunk) {
    const int64_t batch = min(chunk, a.batch - from);
    const Range mine = split(batch, thread, n_threads);
    for (int64_t b = mine.first; b < mine.last; b++) {
      to_floats(row, x + (from + b) * w.cols, w.cols);
      quantise_for(w, row, w.cols, batch, b, b + 1, input);
    }
    barrier(n_threads);
    for (int64_t r = first; r < last; r += kStrip) {
      const int64_t rows = min(kStrip, last - r);
      multiply(w, input, batch, r, r + rows, strip, kStrip);
      for (int64_t b = 0; b < batch; b++) {
        T* y = static_cast<T*>(a.y) + (from + b) * w.rows + r;
        int64_t i = 0;
        for (; i + kW <= rows; i += kW) store(y + i, load(strip + b * kStrip + i));
        if (i < rows) store_n(y + i, load(strip + b * kStrip + i), rows - i);
      }
    }
    barrier(n_threads);  // before the next chunk overwrites `input`
  }
}

// y = x W^T as nn.Linear, for a quantised W
HYMBA_KERNEL(quantised_linear)(const LinearArgs* a) {
  const int64_t fitting = kChunkBytes / round_up(a->w.cols, kGroup<false>) / kMaxColumns * kMaxColumns;
  const int64_t chunk = min(a->batch, min(max<int64_t>(fitting, 4 * kMaxColumns), kMaxChunk));
  void* input = scratch(0, input_bytes(a->w.cols, chunk));
  parallel_for((int)a->n_threads, [&](int thread, int n_threads) {
    with_type(a->dtype, [&](auto type) { linear<decltype(type)>(*a, thread, n_threads, input, chunk); });
  });
}

}  // namespace HYMBA_ISA
}  // namespace hymba

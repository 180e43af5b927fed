// Products of row-major weights, bf16 and float32, with few activations; used by matvec.cpp.
//
// Lanes run along the inputs:
//   batch 1: one row after the other, so that a thread reads one contiguous stream; four sums in flight per row.
//   batch > 1: a register tile of 6 rows x 4 activations (3 x 4 where there are 16 registers); the tile's sums are then
//   added up across lanes together (`sum_of_each`, 3 instructions a sum instead of 8). Larger batches take the rows in
//   several passes, while they are in a near cache.
//   bf16 products are exact, sums float32 (vdpbf16ps where there is one, else bf16 -> float32 and FMA).
//
// Lanes are 16 activations, bf16 with vdpbf16ps or matrix tiles: activations lie in panels of 16, of which the pair of
// inputs (2 i, 2 i + 1) makes one vector: (panel, padded(cols) / 2, 16, 2). A weight pair meets 16 activations in one
// instruction, 16 x 16 pairs of weights in one tile product, and a row is read once for all of a panel.
#pragma once

#include "matvec.h"
#include "tiles.h"

namespace hymba {
namespace HYMBA_ISA {
namespace {

// Register tiles: rows x activations. Of 24 sums in 32 registers, a tile loads 10 vectors for 24 dot products, which the
// second-level cache can follow: wide activations do not fit the first.
constexpr int kDenseRows = kW == 16 ? 6 : 3, kDenseColumns = 4;

// up to 16 rows for one activation
template <class T>
void dense_rows(const T* w, int n_rows, const typename Dot<T>::Input* x, int64_t cols, float* y) {
  using P = Dot<T>;
  constexpr int s = P::kStep;
  alignas(64) vf part[16];
  for (int r = 0; r < n_rows; r++) {
    const T* row = w + r * cols;
    vf a = zero(), b = a, c = a, d = a;
    int64_t k = 0;
    for (; k + 4 * s <= cols; k += 4 * s) {
      for (int line = 0; line < 4 * s * (int)sizeof(T); line += kCacheLine)
        prefetch(reinterpret_cast<const char*>(row + k) + line + kPrefetch);
      a = P::add(a, P::weight(row + k), P::input(x + k));
      b = P::add(b, P::weight(row + k + s), P::input(x + k + s));
      c = P::add(c, P::weight(row + k + 2 * s), P::input(x + k + 2 * s));
      d = P::add(d, P::weight(row + k + 3 * s), P::input(x + k + 3 * s));
    }
    for (; k + s <= cols; k += s) a = P::add(a, P::weight(row + k), P::input(x + k));
    if (k < cols) b = P::add(b, P::weight_n(row + k, cols - k), P::input(x + k));
    part[r] = (a + b) + (c + d);
  }
  if (n_rows == 16) return sum_of_each(part, y);
  for (int r = n_rows; r < 16; r++) part[r] = zero();
  float sums[16];
  sum_of_each(part, sums);
  for (int r = 0; r < n_rows; r++) y[r] = sums[r];
}

// R rows for C activations. This is pass `pass` of `passes` over these rows: each asks for its share of the rows to come.
template <class T, int R, int C>
void dense_tile(const T* w, const typename Dot<T>::Input* x, int64_t cols, int64_t pass, int64_t passes, float* y,
                int64_t y_row) {
  using P = Dot<T>;
  constexpr int s = P::kStep;
  const int64_t ld = padded(cols);
  // this far ahead lies the same place of a later tile
  const int64_t tile_bytes = R * cols * (int64_t)sizeof(T), ahead = round_up(kPrefetch, tile_bytes);
  const int ask_first = static_cast<int>(R * pass / passes), ask_last = static_cast<int>(R * (pass + 1) / passes);
  vf sums[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sums[r][c] = zero();
  int64_t k = 0;
  for (; k + s <= cols; k += s) {
    for (int r = ask_first; r < ask_last; r++) prefetch(reinterpret_cast<const char*>(w + r * cols + k) + ahead);
    typename P::Chunk row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) row[r] = P::weight(w + r * cols + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const typename P::Chunk column = P::input(x + c * ld + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r][c] = P::add(sums[r][c], row[r], column);
    }
  }
  if (k < cols) {
    for (int c = 0; c < C; c++) {
      const typename P::Chunk column = P::input(x + c * ld + k);
      for (int r = 0; r < R; r++) sums[r][c] = P::add(sums[r][c], P::weight_n(w + r * cols + k, cols - k), column);
    }
  }
  constexpr int kSums = (R * C + 15) / 16 * 16;
  alignas(64) vf part[kSums];
  alignas(64) float out[kSums];
  for (int c = 0; c < C; c++)
    for (int r = 0; r < R; r++) part[c * R + r] = sums[r][c];
  for (int i = R * C; i < kSums; i++) part[i] = zero();
  for (int i = 0; i < kSums; i += 16) sum_of_each(part + i, out + i);
  for (int c = 0; c < C; c++)
    for (int r = 0; r < R; r++) y[c * y_row + r] = out[c * R + r];
}

// R rows for any number of activations, in passes over the rows while a near cache holds them
template <class T, int R>
void dense_rows_by_columns(const T* w, const typename Dot<T>::Input* x, int64_t cols, int64_t batch, float* y,
                           int64_t y_row) {
  const int64_t ld = padded(cols), passes = ceil_div(batch, kDenseColumns);
  for (int64_t pass = 0, b = 0; pass < passes; pass++) {
    const int64_t columns = batch * (pass + 1) / passes - b;
    const typename Dot<T>::Input* xb = x + b * ld;
    float* yb = y + b * y_row;
    switch (columns) {
      case 1: dense_tile<T, R, 1>(w, xb, cols, pass, passes, yb, y_row); break;
      case 2: dense_tile<T, R, 2>(w, xb, cols, pass, passes, yb, y_row); break;
      case 3: dense_tile<T, R, 3>(w, xb, cols, pass, passes, yb, y_row); break;
      default: dense_tile<T, R, kDenseColumns>(w, xb, cols, pass, passes, yb, y_row); break;
    }
    b += columns;
  }
}

// ---------------------------------------------------------------------------------------------------- panels of bf16

constexpr int kPanel = 16;  // activations

// Whether so many activations go through in panels, of which the last is filled up with zeros.
template <class T>
HYMBA_INLINE bool in_panels(int64_t batch) {
#if defined(HYMBA_AMX)
  return sizeof(T) == 2 && batch > 1;
#elif defined(__AVX512BF16__)
  return sizeof(T) == 2 && (batch + 3) % kPanel < 4;  // a panel costs as much as 13 activations in register tiles
#else
  (void)batch;
  return false;
#endif
}

#if defined(__AVX512BF16__)
HYMBA_INLINE int64_t panel_size(int64_t cols) { return kPanel * padded(cols); }

void to_panels(const float* x, int64_t x_row, int64_t cols, int64_t batch, bf16* out) {
  for (int64_t b = 0; b < batch; b += kPanel, out += panel_size(cols))
    for (int64_t k = 0; k < padded(cols); k += 32) {
      __m512 pairs[kPanel];
      for (int64_t c = 0; c < kPanel; c++) {
        const float* row = x + (b + c) * x_row + k;
        const int64_t left = b + c < batch ? cols - k : 0;
        const vf first = left > 0 ? load_n(row, left) : zero(), second = left > kW ? load_n(row + kW, left - kW) : zero();
        pairs[c] = (__m512)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
      }
      transpose(pairs);
      for (int64_t i = 0; i < 16; i++) _mm512_storeu_ps(out + k * kPanel + i * 32, pairs[i]);
    }
}

// sums: (16 rows, 16 activations), the first `rows` and `columns` of them -> y[column y_row + row]
void store_panel(const float* sums, int64_t rows, int64_t columns, float* y, int64_t y_row) {
  if (rows == 16 && columns == kPanel) return transpose(y, y_row, sums, 16);
  for (int64_t c = 0; c < columns; c++)
    for (int64_t r = 0; r < rows; r++) y[c * y_row + r] = sums[r * 16 + c];
}
#endif

#if defined(HYMBA_AMX)
// 16 rows (or the last few) for P <= 4 panels
template <int P>
void panel_rows(const bf16* w, int64_t rows, int64_t cols, const bf16* x, float* sums) {
  const int64_t size = panel_size(cols);
  _tile_zero(0);
  if constexpr (P > 1) _tile_zero(1);
  if constexpr (P > 2) _tile_zero(2);
  if constexpr (P > 3) _tile_zero(3);
  alignas(64) bf16 copy[16 * 32];
  for (int64_t k = 0; k < cols; k += 32) {
    if (rows == 16 && k + 32 <= cols) {
      _tile_loadd(4, w + k, cols * sizeof(bf16));
    } else {  // a tile reads whole lines of 16 rows, and what lies behind the matrix is not ours
      const __mmask32 mask = cols - k >= 32 ? ~0u : (1u << (cols - k)) - 1;
      for (int64_t r = 0; r < 16; r++)
        _mm512_store_si512(copy + r * 32, _mm512_maskz_loadu_epi16(r < rows ? mask : 0, w + (r < rows ? r : 0) * cols + k));
      written(copy);
      _tile_loadd(4, copy, 64);
    }
    const bf16* pairs = x + k * kPanel;
    _tile_loadd(5, pairs, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (P > 1) {
      _tile_loadd(6, pairs + size, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (P > 2) {
      _tile_loadd(7, pairs + 2 * size, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (P > 3) {
      _tile_loadd(5, pairs + 3 * size, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (P > 1) _tile_stored(1, sums + 256, 64);
  if constexpr (P > 2) _tile_stored(2, sums + 512, 64);
  if constexpr (P > 3) _tile_stored(3, sums + 768, 64);
}

void multiply_panels(const bf16* w, int64_t cols, int64_t rows, const bf16* x, int64_t batch, float* y, int64_t y_row) {
  constexpr int64_t kAtOnce = 4 * kPanel;
  Tiles tiles;
  tiles.use(16, 64);
  alignas(64) float sums[kAtOnce * 16];
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t n = min<int64_t>(16, rows - r);
    for (int64_t b = 0; b < batch; b += kAtOnce) {
      const int64_t columns = min(kAtOnce, batch - b);
      const bf16* panels = x + b * padded(cols);
      switch (ceil_div(columns, kPanel)) {
        case 1: panel_rows<1>(w + r * cols, n, cols, panels, sums); break;
        case 2: panel_rows<2>(w + r * cols, n, cols, panels, sums); break;
        case 3: panel_rows<3>(w + r * cols, n, cols, panels, sums); break;
        default: panel_rows<4>(w + r * cols, n, cols, panels, sums); break;
      }
      for (int64_t c = 0; c < columns; c += kPanel)
        store_panel(sums + c * 16, n, min<int64_t>(kPanel, columns - c), y + (b + c) * y_row + r, y_row);
    }
  }
}
#elif defined(__AVX512BF16__)
// R rows for one panel. The first panel asks for the rows to come.
template <int R>
void panel_rows(const bf16* w, int64_t cols, const bf16* x, bool ask, float* sums) {
  __m512 sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
    const __m512bh pairs = (__m512bh)_mm512_loadu_si512(x + k * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      int32_t pair;
      __builtin_memcpy(&pair, w + r * cols + k, 4);
      sum[r] = _mm512_dpbf16_ps(sum[r], pairs, (__m512bh)_mm512_set1_epi32(pair));
    }
  };
  int64_t k = 0;
  for (; k + 32 <= cols; k += 32) {
    if (ask)
      for (int r = 0; r < R; r++) __builtin_prefetch(w + (R + r) * cols + k, 0, 2);  // the next tile's
#pragma GCC unroll 1
    for (int64_t i = 0; i < 32; i += 2) add(k + i);
  }
  for (; k + 2 <= cols; k += 2) add(k);
  if (k < cols) {  // its neighbour is another row's, or nobody's
    const __m512bh pairs = (__m512bh)_mm512_loadu_si512(x + k * kPanel);
    for (int r = 0; r < R; r++) {
      const int32_t pair = w[r * cols + k].bits;
      sum[r] = _mm512_dpbf16_ps(sum[r], pairs, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) _mm512_store_ps(sums + r * 16, sum[r]);
}

void multiply_panels(const bf16* w, int64_t cols, int64_t rows, const bf16* x, int64_t batch, float* y, int64_t y_row) {
  alignas(64) float sums[16 * 16];
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t n = min<int64_t>(16, rows - r);
    for (int64_t b = 0; b < batch; b += kPanel) {
      const bf16* panel = x + b * padded(cols);
      if (n == 16)
        panel_rows<16>(w + r * cols, cols, panel, b == 0, sums);
      else
        for (int64_t i = 0; i < n; i++) panel_rows<1>(w + (r + i) * cols, cols, panel, false, sums + i * 16);
      store_panel(sums, n, min<int64_t>(kPanel, batch - b), y + b * y_row + r, y_row);
    }
  }
}
#endif

// ------------------------------------------------------------------------------------------------------- both together

// Bytes of the activations of a product.
HYMBA_INLINE int64_t dense_input_bytes(int64_t cols, int64_t batch) {
  return padded(cols) * max<int64_t>(batch * sizeof(float), round_up(batch, kPanel) * sizeof(bf16));
}

template <class T>
void prepare_dense(const float* x, int64_t x_row, int64_t cols, int64_t batch, void* input) {
  auto* out = static_cast<typename Dot<T>::Input*>(input);
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2)
    if (in_panels<T>(batch)) return to_panels(x, x_row, cols, batch, out);
#endif
  dot_rows(x, x_row, cols, batch, out);
}

template <class T>
void multiply_dense(const T* w, int64_t cols, int64_t rows, const void* input, int64_t batch, float* y, int64_t y_row) {
  const auto* x = static_cast<const typename Dot<T>::Input*>(input);
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2)
    if (in_panels<T>(batch)) return multiply_panels(w, cols, rows, x, batch, y, y_row);
#endif
  int64_t r = 0;
  if (batch == 1)
    for (; r < rows; r += 16) dense_rows<T>(w + r * cols, (int)min<int64_t>(16, rows - r), x, cols, y + r);
  for (; r + kDenseRows <= rows; r += kDenseRows)
    dense_rows_by_columns<T, kDenseRows>(w + r * cols, x, cols, batch, y + r, y_row);
  for (; r < rows; r++) dense_rows_by_columns<T, 1>(w + r * cols, x, cols, batch, y + r, y_row);
}

}  // namespace
}  // namespace HYMBA_ISA
}  // namespace hymba

// Weight matrices times few activations: y[b][r] = sum_i W[r][i] x[b][i], for batches where reading W is what costs.
//
// Dense, bf16 and float32: W is nn.Linear's own row-major weight. Lanes run along the inputs.
//   batch 1: one row after the other, so that a thread reads one contiguous stream; four sums in flight per row.
//   batch > 1: a register tile of 6 rows x 4 activations (3 x 4 where there are 16 registers); the tile's sums are then
//   added up across lanes together (`sum_of_each`, 3 instructions a sum instead of 8). Larger batches take the rows in
//   several passes, while they are in a near cache.
//   bf16 products are exact, sums float32 (vdpbf16ps where there is one, else bf16 -> float32 and FMA).
//
// int8 and int4: lanes are 16 rows, so that no sum across lanes is needed, the last few inputs are no special case, and a
// scale for every row is one vector. Activations are quantised here, in groups of 32 inputs with a float32 scale each:
//       x[i] ~ xs[g] xq[i],  xq in -127 .. 127
//   block of 16 rows, group of 32 inputs: 8 steps of 64 bytes, step j holds bytes (row, i) for i = 4 j .. 4 j + 3
//   int8: byte = q + 128, q in -127 .. 127.   W[r][i] = scale[r] q
//   int4: two steps share 64 bytes: low nibble step 2 h, high nibble step 2 h + 1. A nibble is an index into kLevels, and
//         W[r][i] = scale[r][g] kLevels[nibble]. A block starts with its scales, (groups, 16) bf16, padded to 64 bytes.
//   Levels are not equidistant: they are the least-squares quantiser of a normal distribution whose groups of 32 are
//   scaled by their own best scale (0.9 dB better than 16 equal steps, 1.7 dB on heavier tails), in units of 1/127 so that
//   they fit the integer dot product, and come from the nibbles by one byte shuffle.
//   vpdpbusd multiplies unsigned by signed bytes: weights carry + 128, and the sum starts at -128 sum(xq).
//   Integer sums are exact; groups are added up in float32.
//   batch > 1: C <= 8 activations share each load (and shuffle) of weights; int8 for 8 and more: see panels.
//
// The order of additions of one output depends neither on the number of threads nor on the other rows.
#include "matvec.h"

#include "elementwise.h"

namespace hymba {
namespace HYMBA_ISA {
namespace {

constexpr int kGroup = 32;         // inputs that share an activation scale, and in int4 a weight scale
// Register tiles: rows x activations. Of 24 sums in 32 registers, a tile loads 10 vectors for 24 dot products, which the
// second-level cache can follow: wide activations do not fit the first.
constexpr int kDenseRows = kW == 16 ? 6 : 3, kDenseColumns = 4;
constexpr int kMaxColumns = 8;     // activations in one tile of int8 and int4
// Bytes ahead, into the second-level cache: memory and arithmetic overlap only if lines are asked for this early.
constexpr int kPrefetch = 16384;
constexpr int kCacheLine = 64;

alignas(64) constexpr int8_t kLevels[16] = {-127, -101, -79, -62, -48, -34, -22, -9, 2, 14, 25, 37, 50, 65, 83, 107};

HYMBA_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// ------------------------------------------------------------------------------------------------------------ dense

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

template <class T>
void dense(const T* w, int64_t cols, int64_t rows, const typename Dot<T>::Input* x, int64_t batch, float* y, int64_t y_row) {
  int64_t r = 0;
  if (batch == 1)
    for (; r < rows; r += 16) dense_rows<T>(w + r * cols, (int)min<int64_t>(16, rows - r), x, cols, y + r);
  for (; r + kDenseRows <= rows; r += kDenseRows)
    dense_rows_by_columns<T, kDenseRows>(w + r * cols, x, cols, batch, y + r, y_row);
  for (; r < rows; r++) dense_rows_by_columns<T, 1>(w + r * cols, x, cols, batch, y + r, y_row);
}

template <class Input>
void prepare_dense(const float* x, int64_t x_row, int64_t cols, int64_t batch, Input* out) {
  const int64_t ld = padded(cols);
  for (int64_t b = 0; b < batch; b++) {
    int64_t k = 0;
    for (; k + kW <= cols; k += kW) store(out + b * ld + k, load(x + b * x_row + k));
    for (; k < ld; k += kW) store(out + b * ld + k, k < cols ? load_n(x + b * x_row + k, cols - k) : zero());
  }
}

// ------------------------------------------------------------------------------------------------------ int8 and int4

// Quantised activations: for every group, the batch's values, scales, and -128 times the sum of the values.
struct Quantised {
  int8_t* x;     // (groups, batch, 32)
  float* scale;  // (groups, batch)
  int32_t* bias;
};

Quantised quantised(void* input, int64_t groups, int64_t batch) {
  Quantised q;
  q.x = static_cast<int8_t*>(input);
  q.scale = reinterpret_cast<float*>(q.x + groups * batch * kGroup);
  q.bias = reinterpret_cast<int32_t*>(q.scale + groups * batch);
  return q;
}

typedef int8_t vb __attribute__((vector_size(kW), aligned(1), may_alias));

// rows first .. last - 1 of x: (batch, cols)
void quantise(const float* x, int64_t x_row, int64_t cols, int64_t batch, int64_t first, int64_t last, void* input) {
  const int64_t groups = ceil_div(cols, kGroup);
  const Quantised q = quantised(input, groups, batch);
  constexpr int n = kGroup / kW;
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  for (int64_t b = first; b < last; b++)
    for (int64_t g = 0; g < groups; g++) {
      const float* p = x + (b - first) * x_row + g * kGroup;
      const int64_t left = cols - g * kGroup;
      vf v[n], top = zero();
      for (int i = 0; i < n; i++) {
        v[i] = left >= (i + 1) * kW ? load(p + i * kW) : load_n(p + i * kW, max<int64_t>(left - i * kW, 0));
        top = vmax(top, vabs(v[i]));
      }
      const float most = largest(top);
      const bool nothing = !(most > 1e-30f);  // the inverse of less is no normal number
      const float inverse = nothing ? 0.0f : 127.0f / most;
      vi total{};
      int8_t* out = q.x + (g * batch + b) * kGroup;
      for (int i = 0; i < n; i++) {
        const vi integer = (vi)(v[i] * inverse + to_integer) - 0x4b400000;
        total += integer;
#if defined(__AVX512F__)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * kW), _mm512_cvtepi32_epi8((__m512i)integer));
#else
        *reinterpret_cast<vb*>(out + i * kW) = __builtin_convertvector(integer, vb);
#endif
      }
#if defined(__AVX512F__)
      const int32_t s = _mm512_reduce_add_epi32((__m512i)total);
#else
      int32_t s = 0;
      for (int i = 0; i < kW; i++) s += total[i];
#endif
      q.scale[g * batch + b] = nothing ? 0.0f : most / 127.0f;
      q.bias[g * batch + b] = -128 * s;
    }
}

HYMBA_INLINE int64_t int4_scale_bytes(int64_t groups) { return round_up(groups * 32, kCacheLine); }

// bytes of 16 rows
HYMBA_INLINE int64_t block_bytes(bool four, int64_t groups) {
  return four ? int4_scale_bytes(groups) + groups * 256 : groups * 512;
}

// 16 rows for C activations, of which the first is number `b` of `batch`. In every group the lines from `line` to `last_line`
// of what lies `ahead` are asked for.
template <bool kFour, int C>
void block_tile(const uint8_t* w, const float* row_scale, const Quantised& q, int64_t b, int64_t batch, int64_t groups,
                int64_t ahead, int64_t line, int64_t last_line, float out[C][16]) {
  const bf16* scales = reinterpret_cast<const bf16*>(w);
  if (kFour) w += int4_scale_bytes(groups);
#if defined(__AVX512VNNI__)
  const __m512i low = _mm512_set1_epi8(15);
  __m512i levels = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kLevels)));
  levels = _mm512_xor_si512(levels, _mm512_set1_epi8(-128));  // + 128
  __m512 sums[C];
  for (int c = 0; c < C; c++) sums[c] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    const int8_t* x = q.x + (g * batch + b) * kGroup;
    const int32_t* bias = q.bias + g * batch + b;
    for (int64_t l = line; l < last_line; l++) prefetch(w + g * (kFour ? 256 : 512) + l * kCacheLine + ahead);
    if (kFour && line == 0) prefetch(reinterpret_cast<const char*>(scales + g * 16) + ahead);
    const float* scale = q.scale + g * batch + b;
    __m512i s[C], t[C];
    for (int c = 0; c < C; c++) s[c] = _mm512_set1_epi32(bias[c]), t[c] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) {
      __m512i first, second;
      if (kFour) {
        const __m512i v = _mm512_loadu_si512(w + g * 256 + h * 64);
        first = _mm512_shuffle_epi8(levels, _mm512_and_si512(v, low));
        second = _mm512_shuffle_epi8(levels, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
      } else {
        first = _mm512_loadu_si512(w + g * 512 + h * 128);
        second = _mm512_loadu_si512(w + g * 512 + h * 128 + 64);
      }
      for (int c = 0; c < C; c++) {
        int32_t x0, x1;
        __builtin_memcpy(&x0, x + c * kGroup + h * 8, 4);
        __builtin_memcpy(&x1, x + c * kGroup + h * 8 + 4, 4);
        s[c] = _mm512_dpbusd_epi32(s[c], first, _mm512_set1_epi32(x0));
        // one activation alone: two chains hide the instruction's latency
        __m512i& other = C <= 2 ? t[c] : s[c];
        other = _mm512_dpbusd_epi32(other, second, _mm512_set1_epi32(x1));
      }
    }
    const __m512 group_scale = kFour ? (__m512)load(scales + g * 16) : _mm512_setzero_ps();
    for (int c = 0; c < C; c++) {
      const __m512 dot = (__m512)__builtin_convertvector((vi)(C <= 2 ? _mm512_add_epi32(s[c], t[c]) : s[c]), vf);
      const __m512 xs = _mm512_set1_ps(scale[c]);
      sums[c] = _mm512_fmadd_ps(dot, kFour ? _mm512_mul_ps(group_scale, xs) : xs, sums[c]);
    }
  }
  const __m512 last = kFour ? _mm512_set1_ps(1.0f) : _mm512_loadu_ps(row_scale);
  for (int c = 0; c < C; c++) _mm512_storeu_ps(out[c], _mm512_mul_ps(sums[c], last));
#else
  float sums[C][16] = {};
  for (int64_t g = 0; g < groups; g++) {
    const int8_t* x = q.x + (g * batch + b) * kGroup;
    int32_t s[C][16] = {};
    for (int64_t l = line; l < last_line; l++) prefetch(w + g * (kFour ? 256 : 512) + l * kCacheLine + ahead);
    if (kFour && line == 0) prefetch(reinterpret_cast<const char*>(scales + g * 16) + ahead);
    for (int h = 0; h < 4; h++) {
      alignas(64) int8_t v[128];  // two steps of (16 rows, 4 inputs)
      if (kFour) {
        const uint8_t* p = w + g * 256 + h * 64;
#if defined(__AVX2__)
        const __m256i levels = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kLevels)));
        for (int i = 0; i < 64; i += 32) {
          const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)), low = _mm256_set1_epi8(15);
          const __m256i high = _mm256_and_si256(_mm256_srli_epi16(two, 4), low);
          _mm256_store_si256(reinterpret_cast<__m256i*>(v + i), _mm256_shuffle_epi8(levels, _mm256_and_si256(two, low)));
          _mm256_store_si256(reinterpret_cast<__m256i*>(v + 64 + i), _mm256_shuffle_epi8(levels, high));
        }
#else
        for (int i = 0; i < 64; i++) v[i] = kLevels[p[i] & 15], v[64 + i] = kLevels[p[i] >> 4];
#endif
      } else {
        const uint8_t* p = w + g * 512 + h * 128;
        for (int i = 0; i < 128; i++) v[i] = static_cast<int8_t>(p[i] ^ 128);
      }
      for (int step = 0; step < 2; step++)
        for (int c = 0; c < C; c++) {
          const int8_t* xc = x + c * kGroup + h * 8 + step * 4;
#if defined(__AVX2__)
          // |x| unsigned times w with x's sign: two products of 127 * 127 fit 16 bits
          int32_t four;
          __builtin_memcpy(&four, xc, 4);
          const __m256i xv = _mm256_set1_epi32(four), magnitude = _mm256_abs_epi8(xv), ones = _mm256_set1_epi16(1);
          for (int half = 0; half < 2; half++) {
            const __m256i wv = _mm256_load_si256(reinterpret_cast<const __m256i*>(v + 64 * step + 32 * half));
            const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(wv, xv));
            __m256i* sum = reinterpret_cast<__m256i*>(s[c] + 8 * half);
            const __m256i before = _mm256_loadu_si256(sum);
            _mm256_storeu_si256(sum, _mm256_add_epi32(before, _mm256_madd_epi16(pairs, ones)));
          }
#else
          for (int r = 0; r < 16; r++)
            for (int i = 0; i < 4; i++) s[c][r] += v[64 * step + 4 * r + i] * xc[i];
#endif
        }
    }
    for (int c = 0; c < C; c++)
      for (int r = 0; r < 16; r++) {
        const float xs = q.scale[g * batch + b + c];
        sums[c][r] += static_cast<float>(s[c][r]) * (kFour ? to_float(scales[g * 16 + r]) * xs : xs);
      }
  }
  for (int c = 0; c < C; c++)
    for (int r = 0; r < 16; r++) out[c][r] = sums[c][r] * (kFour ? 1.0f : row_scale[r]);
#endif
}

#if defined(__AVX512VNNI__)
// int8 for many activations: a tile of 3 blocks x 4 activations loads 56 vectors for 96 dot products, where one block x 8
// loads 72 for 64. Tiles run over a chunk of groups, so that the chunk stays in the first-level cache for all activations.
constexpr int kBlocks = 3, kPanelColumns = 4;
constexpr int kChunk = 8;   // groups: 12 KB of weights
constexpr int kPanel = 32;  // activations whose sums are kept meanwhile

// B blocks of 16 rows, groups first .. first + count - 1, for C activations: added to sums (C, B, 16). In every group the
// lines from `line` to `last_line` of what lies `ahead` are asked for.
template <int B, int C>
void panel_tile(const uint8_t* w, int64_t bytes, const Quantised& q, int64_t b, int64_t batch, int64_t first,
                int64_t count, int64_t ahead, int64_t line, int64_t last_line, float* sums) {
  vf total[C][B];
#pragma GCC unroll 4
  for (int c = 0; c < C; c++)
#pragma GCC unroll 4
    for (int i = 0; i < B; i++) total[c][i] = load(sums + (c * B + i) * 16);
  for (int64_t g = first; g < first + count; g++) {
    const int64_t at = g * batch + b;
    const int8_t* x = q.x + at * kGroup;
    for (int i = 0; i < B; i++)
      for (int64_t l = line; l < last_line; l++) prefetch(w + i * bytes + g * 512 + l * kCacheLine + ahead);
    __m512i s[C][B];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 4
      for (int i = 0; i < B; i++) s[c][i] = _mm512_set1_epi32(q.bias[at + c]);
#pragma GCC unroll 8
    for (int step = 0; step < 8; step++) {
      __m512i v[B];
#pragma GCC unroll 4
      for (int i = 0; i < B; i++) v[i] = _mm512_loadu_si512(w + i * bytes + g * 512 + step * 64);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        int32_t four;
        __builtin_memcpy(&four, x + c * kGroup + step * 4, 4);
        const __m512i xs = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int i = 0; i < B; i++) s[c][i] = _mm512_dpbusd_epi32(s[c][i], v[i], xs);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 4
      for (int i = 0; i < B; i++)  // fused whatever the compiler does, so that block_tile gives the same bits
        total[c][i] = (vf)_mm512_fmadd_ps(_mm512_cvtepi32_ps(s[c][i]), _mm512_set1_ps(q.scale[at + c]), (__m512)total[c][i]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; c++)
#pragma GCC unroll 4
    for (int i = 0; i < B; i++) store(sums + (c * B + i) * 16, total[c][i]);
}

// B blocks of 16 rows for all activations
template <int B>
void panels(const uint8_t* w, const float* row_scale, const Quantised& q, int64_t batch, int64_t groups, int64_t rows,
            float* y, int64_t y_row) {
  const int64_t bytes = block_bytes(false, groups), lines = 512 / kCacheLine;
  const int64_t ahead = round_up(kPrefetch, B * bytes);  // this far lies the same place of later blocks
  alignas(64) float sums[kPanel * B * 16];
  for (int64_t b = 0; b < batch; b += kPanel) {
    const int64_t columns = min<int64_t>(kPanel, batch - b), passes = ceil_div(columns, kPanelColumns);
    __builtin_memset(sums, 0, columns * B * 16 * sizeof(float));
    for (int64_t g = 0; g < groups; g += kChunk) {
      const int64_t count = min<int64_t>(kChunk, groups - g);
      for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t c = columns * pass / passes, line = lines * pass / passes;
        const int64_t last_line = b > 0 ? line : lines * (pass + 1) / passes;
        float* to = sums + c * B * 16;
        switch (columns * (pass + 1) / passes - c) {
          case 1: panel_tile<B, 1>(w, bytes, q, b + c, batch, g, count, ahead, line, last_line, to); break;
          case 2: panel_tile<B, 2>(w, bytes, q, b + c, batch, g, count, ahead, line, last_line, to); break;
          case 3: panel_tile<B, 3>(w, bytes, q, b + c, batch, g, count, ahead, line, last_line, to); break;
          default: panel_tile<B, 4>(w, bytes, q, b + c, batch, g, count, ahead, line, last_line, to); break;
        }
      }
    }
    for (int64_t c = 0; c < columns; c++)
      for (int i = 0; i < B; i++) {
        const int64_t n = min<int64_t>(16, rows - i * 16);
        store_n(y + (b + c) * y_row + i * 16, load(sums + (c * B + i) * 16) * load_n(row_scale + i * 16, n), n);
      }
  }
}
#endif

template <bool kFour, int C>
HYMBA_INLINE void block_columns(const uint8_t* w, const float* row_scale, const Quantised& q, int64_t b, int64_t batch,
                                int64_t groups, int64_t ahead, int64_t line, int64_t last_line, int64_t rows, float* y,
                                int64_t y_row) {
  alignas(64) float out[C][16];
  block_tile<kFour, C>(w, row_scale, q, b, batch, groups, ahead, line, last_line, out);
  for (int c = 0; c < C; c++) __builtin_memcpy(y + c * y_row, out[c], rows * sizeof(float));
}

template <bool kFour>
void blocks(const Matrix& w, const void* input, int64_t batch, int64_t first, int64_t last, float* y, int64_t y_row) {
  const int64_t groups = ceil_div(w.cols, kGroup), bytes = block_bytes(kFour, groups);
  const Quantised q = quantised(const_cast<void*>(input), groups, batch);
  int64_t r = first;
#if defined(__AVX512VNNI__)
  for (; !kFour && batch >= 8 && r < last; r += kBlocks * kRowBlock) {
    const uint8_t* block = static_cast<const uint8_t*>(w.data) + r / kRowBlock * bytes;
    const int64_t rows = min(kBlocks * kRowBlock, last - r);
    float* out = y + r - first;
    switch (ceil_div(rows, kRowBlock)) {
      case 1: panels<1>(block, w.scale + r, q, batch, groups, rows, out, y_row); break;
      case 2: panels<2>(block, w.scale + r, q, batch, groups, rows, out, y_row); break;
      default: panels<kBlocks>(block, w.scale + r, q, batch, groups, rows, out, y_row); break;
    }
  }
#endif
  const int64_t passes = ceil_div(batch, kMaxColumns), lines = (kFour ? 256 : 512) / kCacheLine;
  const int64_t ahead = round_up(kPrefetch, bytes);
  for (; r < last; r += kRowBlock) {
    const uint8_t* block = static_cast<const uint8_t*>(w.data) + r / kRowBlock * bytes;
    const float* scale = kFour ? nullptr : w.scale + r;
    const int64_t rows = min(kRowBlock, last - r);
    int64_t b = 0;
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t columns = batch * (pass + 1) / passes - b;
      const int64_t line = lines * pass / passes, last_line = lines * (pass + 1) / passes;
      float* out = y + b * y_row + r - first;
      switch (columns) {
        case 1: block_columns<kFour, 1>(block, scale, q, b, batch, groups, ahead, line, last_line, rows, out, y_row); break;
        case 2: block_columns<kFour, 2>(block, scale, q, b, batch, groups, ahead, line, last_line, rows, out, y_row); break;
        case 3: block_columns<kFour, 3>(block, scale, q, b, batch, groups, ahead, line, last_line, rows, out, y_row); break;
        case 4: block_columns<kFour, 4>(block, scale, q, b, batch, groups, ahead, line, last_line, rows, out, y_row); break;
        case 5: block_columns<kFour, 5>(block, scale, q, b, batch, groups, ahead, line, last_line, rows, out, y_row); break;
        case 6: block_columns<kFour, 6>(block, scale, q, b, batch, groups, ahead, line, last_line, rows, out, y_row); break;
        case 7: block_columns<kFour, 7>(block, scale, q, b, batch, groups, ahead, line, last_line, rows, out, y_row); break;
        default: block_columns<kFour, 8>(block, scale, q, b, batch, groups, ahead, line, last_line, rows, out, y_row); break;
      }
      b += columns;
    }
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- all formats

int64_t input_bytes(int64_t cols, int64_t batch) {
  return round_up(padded(cols) * batch * (int64_t)sizeof(float), kCacheLine);  // float32 is the largest form
}

void prepare(const Matrix& w, const float* x, int64_t x_row, int64_t batch, void* input) {
  if (w.format == kDenseFloat32)
    prepare_dense(x, x_row, w.cols, batch, static_cast<Dot<float>::Input*>(input));
  else if (w.format == kDenseBFloat16)
    prepare_dense(x, x_row, w.cols, batch, static_cast<Dot<bf16>::Input*>(input));
  else
    quantise(x, x_row, w.cols, batch, 0, batch, input);
}

void multiply(const Matrix& w, const void* input, int64_t batch, int64_t first, int64_t last, float* y, int64_t y_row) {
  if (first >= last) return;
  if (w.format == kInt8) return blocks<false>(w, input, batch, first, last, y, y_row);
  if (w.format == kInt4) return blocks<true>(w, input, batch, first, last, y, y_row);
  if (w.format == kDenseFloat32)
    dense(static_cast<const float*>(w.data) + first * w.cols, w.cols, last - first, static_cast<const Dot<float>::Input*>(input),
          batch, y, y_row);
  else
    dense(static_cast<const bf16*>(w.data) + first * w.cols, w.cols, last - first, static_cast<const Dot<bf16>::Input*>(input),
          batch, y, y_row);
}

void lookup(const Matrix& w, int64_t row, float* out) {
  if (w.format == kDenseFloat32 || w.format == kDenseBFloat16) {
    for (int64_t i = 0; i < w.cols; i++)
      out[i] = w.format == kDenseFloat32 ? static_cast<const float*>(w.data)[row * w.cols + i]
                                         : to_float(static_cast<const bf16*>(w.data)[row * w.cols + i]);
    return;
  }
  const bool four = w.format == kInt4;
  const int64_t groups = ceil_div(w.cols, kGroup), r = row % kRowBlock;
  const uint8_t* block = static_cast<const uint8_t*>(w.data) + row / kRowBlock * block_bytes(four, groups);
  const uint8_t* codes = block + (four ? int4_scale_bytes(groups) : 0);
  for (int64_t i = 0; i < w.cols; i++) {
    const int64_t g = i / kGroup, step = i % kGroup / 4, byte = 4 * r + i % 4;
    if (four) {
      const int nibble = codes[g * 256 + step / 2 * 64 + byte] >> (step % 2 * 4) & 15;
      out[i] = to_float(reinterpret_cast<const bf16*>(block)[g * 16 + r]) * kLevels[nibble];
    } else {
      out[i] = w.scale[row] * (codes[g * 512 + step * 64 + byte] - 128);
    }
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
      quantise(row, w.cols, w.cols, batch, b, b + 1, input);
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
  const int64_t fitting = kChunkBytes / round_up(a->w.cols, kGroup) / kMaxColumns * kMaxColumns;
  const int64_t chunk = min(a->batch, min(max<int64_t>(fitting, 4 * kMaxColumns), kMaxChunk));
  void* input = scratch(0, input_bytes(a->w.cols, chunk));
  parallel_for((int)a->n_threads, [&](int thread, int n_threads) {
    with_type(a->dtype, [&](auto type) { linear<decltype(type)>(*a, thread, n_threads, input, chunk); });
  });
}

}  // namespace HYMBA_ISA
}  // namespace hymba

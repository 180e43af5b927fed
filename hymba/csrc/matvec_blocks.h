// Products of int8 and int4 weights with few activations, which are quantised here; used by matvec.cpp.
//
// Lanes are 16 rows, so that no sum across lanes is needed, the last few inputs are no special case, and a scale for every
// row is one vector. Activations are quantised in groups, of 64 inputs for int8 and 32 for int4, with a float32 scale each:
//       x[i] ~ xs[g] xq[i],  xq in -127 .. 127
//   block of 16 rows, group of inputs: steps of 64 bytes, step j holds bytes (row, i) for i = 4 j .. 4 j + 3
//   int8: byte = q + 128, q in -127 .. 127.   W[r][i] = scale[r] q
//   int4: two steps share 64 bytes: low nibble step 2 h, high nibble step 2 h + 1. A nibble is an index into kLevels, and
//         W[r][i] = scale[r][g] kLevels[nibble]. A block starts with its scales, (groups, 16) bf16, padded to 64 bytes.
//   Levels are not equidistant: they are the least-squares quantiser of a normal distribution whose groups of 32 are
//   scaled by their own best scale (0.9 dB better than 16 equal steps, 1.7 dB on heavier tails), in units of 1/127 so that
//   they fit the integer dot product, and come from the nibbles by one byte shuffle.
//   vpdpbusd multiplies unsigned by signed bytes: weights carry + 128, and the sum starts at -128 sum(xq).
//   Integer sums are exact; groups are added up in float32, in one order everywhere: all paths give the same bits.
//   batch > 1: C <= 8 activations share each load (and shuffle) of weights; int8 for 8 and more: see panels. Matrix tiles,
//   8 and more: see tile_columns.
#pragma once

#include "matvec.h"
#include "tiles.h"

namespace hymba {
namespace HYMBA_ISA {
namespace {

// Inputs that share an activation scale, and in int4 a weight scale; and bytes of 16 rows of them, scales apart.
template <bool kFour>
constexpr int kGroup = kFour ? 32 : 64;
template <bool kFour>
constexpr int kGroupBytes = kFour ? 256 : 1024;
constexpr int kMaxColumns = 8;  // activations in one tile

alignas(64) constexpr int8_t kLevels[16] = {-127, -101, -79, -62, -48, -34, -22, -9, 2, 14, 25, 37, 50, 65, 83, 107};

// Quantised activations: for every group, the batch's values, scales, and -128 times the sum of the values.
struct Quantised {
  int8_t* x;     // (groups, batch, inputs of a group)
  float* scale;  // (groups, batch)
  int32_t* bias;
};

template <bool kFour>
Quantised quantised(void* input, int64_t groups, int64_t batch) {
  Quantised q;
  q.x = static_cast<int8_t*>(input);
  q.scale = reinterpret_cast<float*>(q.x + groups * batch * kGroup<kFour>);
  q.bias = reinterpret_cast<int32_t*>(q.scale + groups * batch);
  return q;
}

typedef int8_t vb __attribute__((vector_size(kW), aligned(1), may_alias));

// rows first .. last - 1 of x: (batch, cols)
template <bool kFour>
void quantise(const float* x, int64_t x_row, int64_t cols, int64_t batch, int64_t first, int64_t last, void* input) {
  constexpr int size = kGroup<kFour>, n = size / kW;
  const int64_t groups = ceil_div(cols, size);
  const Quantised q = quantised<kFour>(input, groups, batch);
  for (int64_t b = first; b < last; b++)
    for (int64_t g = 0; g < groups; g++) {
      const float* p = x + (b - first) * x_row + g * size;
      const int64_t left = cols - g * size;
      vf v[n], top = zero();
      for (int i = 0; i < n; i++) {
        v[i] = left >= (i + 1) * kW ? load(p + i * kW) : load_n(p + i * kW, max<int64_t>(left - i * kW, 0));
        top = vmax(top, vabs(v[i]));
      }
      const float most = largest(top);
      const bool nothing = !(most > 1e-30f);  // the inverse of less is no normal number
      const float inverse = nothing ? 0.0f : 127.0f / most;
      vi total{};
      int8_t* out = q.x + (g * batch + b) * size;
      for (int i = 0; i < n; i++) {
        const vi integer = integers(v[i] * inverse + kToInteger);
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
template <bool kFour>
HYMBA_INLINE int64_t block_bytes(int64_t groups) {
  return (kFour ? int4_scale_bytes(groups) : 0) + groups * kGroupBytes<kFour>;
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
    const int8_t* x = q.x + (g * batch + b) * kGroup<kFour>;
    const int32_t* bias = q.bias + g * batch + b;
    for (int64_t l = line; l < last_line; l++) prefetch(w + g * kGroupBytes<kFour> + l * kCacheLine + ahead);
    if (kFour && line == 0) prefetch(reinterpret_cast<const char*>(scales + g * 16) + ahead);
    const float* scale = q.scale + g * batch + b;
    __m512i s[C], t[C];
    for (int c = 0; c < C; c++) s[c] = _mm512_set1_epi32(bias[c]), t[c] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int h = 0; h < kGroup<kFour> / 8; h++) {
      __m512i first, second;
      if (kFour) {
        const __m512i v = _mm512_loadu_si512(w + g * 256 + h * 64);
        first = _mm512_shuffle_epi8(levels, _mm512_and_si512(v, low));
        second = _mm512_shuffle_epi8(levels, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
      } else {
        first = _mm512_loadu_si512(w + g * 1024 + h * 128);
        second = _mm512_loadu_si512(w + g * 1024 + h * 128 + 64);
      }
      for (int c = 0; c < C; c++) {
        int32_t x0, x1;
        __builtin_memcpy(&x0, x + c * kGroup<kFour> + h * 8, 4);
        __builtin_memcpy(&x1, x + c * kGroup<kFour> + h * 8 + 4, 4);
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
    const int8_t* x = q.x + (g * batch + b) * kGroup<kFour>;
    int32_t s[C][16] = {};
    for (int64_t l = line; l < last_line; l++) prefetch(w + g * kGroupBytes<kFour> + l * kCacheLine + ahead);
    if (kFour && line == 0) prefetch(reinterpret_cast<const char*>(scales + g * 16) + ahead);
    for (int h = 0; h < kGroup<kFour> / 8; h++) {
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
        const uint8_t* p = w + g * 1024 + h * 128;
        for (int i = 0; i < 128; i++) v[i] = static_cast<int8_t>(p[i] ^ 128);
      }
      for (int step = 0; step < 2; step++)
        for (int c = 0; c < C; c++) {
          const int8_t* xc = x + c * kGroup<kFour> + h * 8 + step * 4;
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

#if defined(__AVX512VNNI__) && !defined(HYMBA_AMX)
// int8 for many activations: a tile of 3 blocks x 4 activations loads 56 vectors for 96 dot products, where one block x 8
// loads 72 for 64. Tiles run over a chunk of groups, so that the chunk stays in the first-level cache for all activations.
constexpr int kBlocks = 3, kPanelColumns = 4;
constexpr int kChunk = 4;   // groups: 12 KB of weights
constexpr int kKept = 32;  // activations whose sums are kept meanwhile

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
    const int8_t* x = q.x + at * kGroup<false>;
    for (int i = 0; i < B; i++)
      for (int64_t l = line; l < last_line; l++) prefetch(w + i * bytes + g * 1024 + l * kCacheLine + ahead);
    __m512i s[C][B];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 4
      for (int i = 0; i < B; i++) s[c][i] = _mm512_set1_epi32(q.bias[at + c]);
#pragma GCC unroll 16
    for (int step = 0; step < 16; step++) {
      __m512i v[B];
#pragma GCC unroll 4
      for (int i = 0; i < B; i++) v[i] = _mm512_loadu_si512(w + i * bytes + g * 1024 + step * 64);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        int32_t four;
        __builtin_memcpy(&four, x + c * kGroup<false> + step * 4, 4);
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
  const int64_t bytes = block_bytes<false>(groups), lines = kGroupBytes<false> / kCacheLine;
  const int64_t ahead = round_up(kPrefetch, B * bytes);  // this far lies the same place of later blocks
  alignas(64) float sums[kKept * B * 16];
  for (int64_t b = 0; b < batch; b += kKept) {
    const int64_t columns = min<int64_t>(kKept, batch - b), passes = ceil_div(columns, kPanelColumns);
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

#if defined(HYMBA_AMX)
// Vectors and tiles meet in memory only, and what was just stored cannot be loaded for a while: groups are unpacked some
// turns before they are multiplied, and added up some turns after.
constexpr int kLag = 4;

// 16 rows (or the last few) for activations b .. b + M - 1 of `batch`: for each group one product of the activations (M, inputs)
// and the weights (steps, 16 rows x 4). Levels of int4 stay signed here. The first activations ask for what lies `ahead`.
template <bool kFour, int M>
void tile_columns(const uint8_t* w, const float* row_scale, const Quantised& q, int64_t b, int64_t batch, int64_t groups,
                  int64_t ahead, int64_t rows, float* y, int64_t y_row) {
  constexpr int kBytes = kGroupBytes<kFour>;
  const bf16* scales = reinterpret_cast<const bf16*>(w);
  if (kFour) w += int4_scale_bytes(groups);
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i levels = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kLevels)));
  alignas(64) uint8_t unpacked[2 * kLag][512];
  alignas(64) int32_t dots[2 * kLag][M * 16];
  __m512 total[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();

  const auto unpack = [&](int64_t g) __attribute__((always_inline)) {
    uint8_t* to = unpacked[g % (2 * kLag)];
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) {
      const __m512i v = _mm512_loadu_si512(w + g * 256 + h * 64), high = _mm512_srli_epi16(v, 4);
      _mm512_store_si512(to + h * 128, _mm512_shuffle_epi8(levels, _mm512_and_si512(v, low)));
      _mm512_store_si512(to + h * 128 + 64, _mm512_shuffle_epi8(levels, _mm512_and_si512(high, low)));
    }
    written(to);
  };
  const auto multiply = [&](int64_t g) __attribute__((always_inline)) {
    _tile_zero(0);
    _tile_loadd(4, q.x + (g * batch + b) * kGroup<kFour>, kGroup<kFour>);
    _tile_loadd(5, kFour ? unpacked[g % (2 * kLag)] : w + g * kBytes, 64);
    if (kFour)
      _tile_dpbssd(0, 4, 5);
    else
      _tile_dpbsud(0, 4, 5);
    _tile_stored(0, dots[g % (2 * kLag)], 64);
  };
  const auto add_up = [&](int64_t g) __attribute__((always_inline)) {
    const int32_t *dot = dots[g % (2 * kLag)], *bias = q.bias + g * batch + b;
    const float* xs = q.scale + g * batch + b;
    const __m512 group_scale = kFour ? (__m512)load(scales + g * 16) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      __m512i product = _mm512_load_si512(dot + m * 16);
      if (!kFour) product = _mm512_add_epi32(product, _mm512_set1_epi32(bias[m]));
      const __m512 scale = _mm512_set1_ps(xs[m]);
      total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), kFour ? _mm512_mul_ps(group_scale, scale) : scale, total[m]);
    }
  };

  for (int64_t g = 0; kFour && g < min<int64_t>(kLag, groups); g++) unpack(g);
  for (int64_t g = 0; g < groups; g++) {
    if (b == 0)
      for (int l = 0; l < kBytes; l += kCacheLine) prefetch(w + g * kBytes + l + ahead);
    if (kFour && b == 0) prefetch(reinterpret_cast<const char*>(scales + g * 16) + ahead);
    if (kFour && g + kLag < groups) unpack(g + kLag);
    multiply(g);
    if (g >= kLag) add_up(g - kLag);
  }
  for (int64_t g = max<int64_t>(groups - kLag, 0); g < groups; g++) add_up(g);
  const vf last = kFour ? splat(1.0f) : load_n(row_scale, rows);
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) store_n(y + m * y_row, (vf)total[m] * last, rows);
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
  const int64_t groups = ceil_div(w.cols, kGroup<kFour>), bytes = block_bytes<kFour>(groups);
  const Quantised q = quantised<kFour>(const_cast<void*>(input), groups, batch);
  int64_t r = first;
#if defined(HYMBA_AMX)
  Tiles tiles;
#elif defined(__AVX512VNNI__)
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
  const int64_t lines = kGroupBytes<kFour> / kCacheLine, ahead = round_up(kPrefetch, bytes);
  for (; r < last; r += kRowBlock) {
    const uint8_t* block = static_cast<const uint8_t*>(w.data) + r / kRowBlock * bytes;
    const float* scale = kFour ? nullptr : w.scale + r;
    const int64_t rows = min(kRowBlock, last - r);
    int64_t b = 0;
#if defined(HYMBA_AMX)
    for (; b + 16 <= batch; b += 16) {
      tiles.use(16, kGroup<kFour>);
      tile_columns<kFour, 16>(block, scale, q, b, batch, groups, ahead, rows, y + b * y_row + r - first, y_row);
    }
    for (; b + 8 <= batch; b += 8) {
      tiles.use(8, kGroup<kFour>);
      tile_columns<kFour, 8>(block, scale, q, b, batch, groups, ahead, rows, y + b * y_row + r - first, y_row);
    }
#endif
    // each pass asks for its share of the lines to come, unless tiles did
    const int64_t passes = ceil_div(batch - b, kMaxColumns), begin = b;
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t columns = begin + (batch - begin) * (pass + 1) / passes - b;
      const int64_t line = begin > 0 ? lines : lines * pass / passes;
      const int64_t last_line = begin > 0 ? lines : lines * (pass + 1) / passes;
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
}  // namespace HYMBA_ISA
}  // namespace hymba

// Attention of a few query heads over a stretch of keys, for one new token; used by decode.cpp.
//
//   scores[r][j] = q[r] . k[j]        lanes along the keys where there is vdpbf16ps and 16 keys are there, else along the head;
//                                     matrix tiles where there are any, and below
//   online softmax over a block       float32; what was summed up before is scaled when the largest score grows
//   sums[r] += sum_j p[r][j] v[j]     lanes along the value head, R heads x 64 dimensions in registers
//
// bf16 keys and queries: their products are exact, sums float32. bf16 values: where there is vdpbf16ps, the weights p
// are rounded to bf16 and two keys are summed at a time; the normaliser sums the rounded weights, so what is left of the
// rounding is a random 2^-9 of each weight, as much as rounding the output costs. Elsewhere, and in float32, p stays float32.
//
// int8 keys and values, x = scale q with a scale for each key and each value: key scales multiply the scores, value scales
// the weights, so that q alone meets queries and weights.
//   where there is vpdpwssd  queries are rounded to 15 bits and a sign, and so are the weights of up to kBlock keys, each with
//                            its largest as the scale; sums are exact integers. The kernels for bf16 do it, on 16-bit pairs
//   elsewhere                q is converted to float32
#pragma once

#include "matvec.h"
#include "tiles.h"

namespace hymba {
namespace HYMBA_ISA {

constexpr int64_t kBlock = 256;         // keys per block of the softmax
constexpr int64_t kRow = kBlock + 16;   // a row of scores: kernels write whole vectors
constexpr int64_t kKeysAtOnce = 32;    // even
constexpr int64_t kKeysAhead = 16384;   // bytes; as kPrefetch of matvec.h
constexpr float kLowest = -1e30f;       // stands for no score yet

// n bytes from p on, a while later
HYMBA_INLINE void prefetch_later(const void* p, int64_t n) {
  for (int64_t line = 0; line < n; line += 64) __builtin_prefetch(static_cast<const char*>(p) + line + kKeysAhead, 0, 2);
}

// type of the softmax weights beside values of type T
template <class T>
struct Weight {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Weight<bf16> {
  using type = bf16;
};

// 16-bit pairs: 32 numbers of type T as they meet 32 others, and sums of pairs of products (of int8: int32 in a vf)
template <class T>
struct Pairs;
template <>
struct Pairs<bf16> {
  static __m512i load(__mmask32 which, const bf16* p) { return _mm512_maskz_loadu_epi16(which, p); }
  static vf add(vf sum, __m512i x, __m512i y) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y); }
  static vf floats(vf sum) { return sum; }
};
template <>
struct Pairs<int8_t> {
  static __m512i load(__mmask32 which, const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(which, p));
  }
  static vf add(vf sum, __m512i x, __m512i y) { return (vf)_mm512_dpwssd_epi32((__m512i)sum, x, y); }
  static vf floats(vf sum) { return (vf)_mm512_cvtepi32_ps((__m512i)sum); }
};

template <>
struct Dot<int8_t> {
  using Input = int16_t;
  using Chunk = __m512i;
  static constexpr int kStep = 2 * kW;
  static Chunk input(const Input* p) { return _mm512_loadu_si512(p); }
  static Chunk weight(const int8_t* p) { return Pairs<int8_t>::load(0xffffffffu, p); }
  static Chunk weight_n(const int8_t* p, int64_t n) { return Pairs<int8_t>::load((1u << n) - 1, p); }  // n < 32
  static vf add(vf sum, Chunk w, Chunk x) { return Pairs<int8_t>::add(sum, w, x); }
};
template <>
struct Weight<int8_t> {
  using type = int16_t;
};
#endif

// what the sums of Dot<T> stand for
template <class T>
HYMBA_INLINE vf dot_floats(vf sum) {
#if defined(__AVX512BF16__)
  if (sizeof(T) == 1) return Pairs<int8_t>::floats(sum);
#endif
  return sum;
}

// Scores of n keys; kSteps: vectors of a key head, 0 if that is not known here.
template <class T, int kSteps>
void score_keys(const T* k, int64_t stride, int64_t n, int64_t dk, const typename Dot<T>::Input* q, int64_t heads,
                float* scores) {
  using P = Dot<T>;
  const int64_t ld = padded(dk);
  for (int64_t j = 0; j < n; j += 16) {
    const int m = static_cast<int>(min<int64_t>(16, n - j));
    for (int i = 0; i < m; i++) prefetch_later(k + (j + i) * stride, dk * sizeof(T));
    for (int64_t r = 0; r < heads; r++) {
      const typename P::Input* x = q + r * ld;
      alignas(64) vf part[16];
      const auto dot = [&](int i) {
        const T* row = k + (j + i) * stride;
        vf sums = zero();
        if (kSteps > 0) {
          for (int s = 0; s < kSteps; s++) sums = P::add(sums, P::weight(row + s * P::kStep), P::input(x + s * P::kStep));
        } else {
          int64_t d = 0;
          for (; d + P::kStep <= dk; d += P::kStep) sums = P::add(sums, P::weight(row + d), P::input(x + d));
          if (d < dk) sums = P::add(sums, P::weight_n(row + d, dk - d), P::input(x + d));
        }
        part[i] = dot_floats<T>(sums);
      };
      if (m == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) dot(i);
      } else {
        for (int i = 0; i < m; i++) dot(i);
        for (int i = m; i < 16; i++) part[i] = zero();
      }
      sum_of_each(part, scores + r * kRow + j);
    }
  }
}

#if defined(__AVX512BF16__)
// Scores of 16 keys for H heads, lanes along keys: dimensions are brought together in pairs, one vector of all keys for each,
// by 64 shuffles for 32 dimensions that all heads share; no sums across lanes are left. dk: a multiple of 32.
template <class T, int H>
void score_sixteen(const T* k, int64_t stride, int64_t dk, const typename Dot<T>::Input* q, float* scores) {
  vf sums[H][2];
#pragma GCC unroll 8
  for (int h = 0; h < H; h++) sums[h][0] = sums[h][1] = zero();
  for (int64_t d = 0; d < dk; d += 32) {
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = (__m512)Dot<T>::weight(k + d + i * stride);
    transpose(r);
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++)
#pragma GCC unroll 8
      for (int h = 0; h < H; h++) {
        int32_t pair;
        __builtin_memcpy(&pair, q + h * dk + d + 2 * j, 4);
        sums[h][j % 2] = Pairs<T>::add(sums[h][j % 2], (__m512i)r[j], _mm512_set1_epi32(pair));
      }
  }
#pragma GCC unroll 8
  for (int h = 0; h < H; h++)
    store(scores + h * kRow, Pairs<T>::floats(sums[h][0]) + Pairs<T>::floats(sums[h][1]));
}

template <class T, int H>
void score_sixteens(const T* k, int64_t stride, int64_t n, int64_t dk, const typename Dot<T>::Input* q, float* scores) {
  for (int64_t j = 0; j < n; j += 16) {
    for (int i = 0; i < 16; i++) prefetch_later(k + (j + i) * stride, dk * sizeof(T));
    score_sixteen<T, H>(k + j * stride, stride, dk, q, scores + j);
  }
}
#endif

#if defined(HYMBA_AMX)
// Keys as they lie are the first factor of a tile product, 16 keys x 32 dimensions; queries the second, by pairs of
// dimensions. n: a multiple of 16, dk: of 32, heads: at most 16.
inline void score_by_tiles(const bf16* k, int64_t stride, int64_t n, int64_t dk, const bf16* q, int64_t heads, float* scores) {
  constexpr int64_t kDimensions = 256;  // whose queries are arranged at a time
  alignas(64) int32_t pairs[kDimensions / 2][16] = {};
  alignas(64) float sums[16 * 16], by_head[16 * 16];
  Tiles tiles;
  tiles.use(16, 64);
  for (int64_t begin = 0; begin < dk; begin += kDimensions) {
    const int64_t end = min(begin + kDimensions, dk);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t d = begin; d < end; d += 2) __builtin_memcpy(&pairs[(d - begin) / 2][h], q + h * dk + d, 4);
    written(pairs);
    for (int64_t j = 0; j < n; j += 16) {
      for (int64_t i = 0; i < 16; i++) prefetch_later(k + (j + i) * stride + begin, (end - begin) * sizeof(bf16));
      _tile_zero(0);
      for (int64_t d = begin; d < end; d += 32) {
        _tile_loadd(4, k + j * stride + d, stride * sizeof(bf16));
        _tile_loadd(5, pairs[(d - begin) / 2], 64);
        _tile_dpbf16ps(0, 4, 5);
      }
      _tile_stored(0, sums, 64);
      transpose(by_head, 16, sums, 16);
      for (int64_t h = 0; h < heads; h++) {
        const vf more = load(by_head + h * 16);
        store(scores + h * kRow + j, begin > 0 ? load(scores + h * kRow + j) + more : more);
      }
    }
  }
}
#endif

template <class T>
void score(const T* k, int64_t stride, int64_t n, int64_t dk, const typename Dot<T>::Input* q, int64_t heads, float* scores) {
  constexpr int step = Dot<T>::kStep;
#if defined(HYMBA_AMX)
  if constexpr (sizeof(T) == 2)
    if (dk % 32 == 0) {
      const int64_t whole = n / 16 * 16;
      for (int64_t r = 0; whole > 0 && r < heads; r += 16)
        score_by_tiles(k, stride, whole, dk, q + r * dk, min<int64_t>(16, heads - r), scores + r * kRow);
      k += whole * stride, scores += whole, n -= whole;
    }
#endif
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) <= 2)
    if (dk % 32 == 0 && n >= 16) {
      const int64_t whole = n / 16 * 16, parts = ceil_div(heads, 5);
      for (int64_t part = 0, r = 0; part < parts; part++) {
        const int64_t count = heads * (part + 1) / parts - r;
        const auto* x = q + r * dk;
        float* out = scores + r * kRow;
        switch (count) {
          case 1: score_sixteens<T, 1>(k, stride, whole, dk, x, out); break;
          case 2: score_sixteens<T, 2>(k, stride, whole, dk, x, out); break;
          case 3: score_sixteens<T, 3>(k, stride, whole, dk, x, out); break;
          case 4: score_sixteens<T, 4>(k, stride, whole, dk, x, out); break;
          default: score_sixteens<T, 5>(k, stride, whole, dk, x, out); break;
        }
        r += count;
      }
      k += whole * stride, scores += whole, n -= whole;
    }
#endif
  if (dk == 2 * step)
    score_keys<T, 2>(k, stride, n, dk, q, heads, scores);
  else if (dk == 4 * step)
    score_keys<T, 4>(k, stride, n, dk, q, heads, scores);
  else
    score_keys<T, 0>(k, stride, n, dk, q, heads, scores);
}

// Scores of a block -> weights 2^(scale score - largest). sums: (dv) of the blocks before, then their largest scaled score
// and the sum of their weights. A weight of 0 follows the last: it is multiplied where keys are summed in pairs.
template <class W>
void softmax_block(float* scores, int64_t n, float scale, W* weights, float* sums, int64_t dv) {
  for (int64_t j = n; j < round_up(n + 1, kW); j++) scores[j] = kLowest;
  vf top = splat(kLowest);
  for (int64_t j = 0; j < n; j += kW) top = vmax(top, load(scores + j));
  const float before = sums[dv], now = max(before, largest(top) * scale);
  vf total = zero();
  for (int64_t j = 0; j <= n; j += kW) {
    const vf p = rounded_as(weights, exp2(load(scores + j) * scale - now));
    store(weights + j, p);
    total += p;
  }
  if (before != now) {
    const float keep = before == kLowest ? 0.0f : exp2(splat(before - now))[0];
    int64_t d = 0;
    for (; d + kW <= dv; d += kW) store(sums + d, load(sums + d) * keep);
    for (; d < dv; d++) sums[d] *= keep;
    sums[dv] = now;
    sums[dv + 1] *= keep;
  }
  sums[dv + 1] += sum(total);
}

// sums[r][d] += sum_j p[r][j] v[j][d] for R heads and U vectors of float, of which the last ends at `width`
// (Loops over registers are unrolled by order: left to itself, GCC 12 keeps the sums in memory.)
template <class T, int R, int U>
void weigh_tile(const T* v, int64_t n, int64_t stride, const float* p, const float*, float* sums, int64_t sums_row,
                int64_t width) {
  vf a[R][U];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) a[r][u] = U == 1 ? load_n(sums + r * sums_row, width) : load(sums + r * sums_row + u * kW);
  for (int64_t j = 0; j < n; j++) {
    const T* row = v + j * stride;
    vf x[U];
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) x[u] = U == 1 ? load_n(row, width) : load(row + u * kW);
    prefetch_later(row, U * kW * sizeof(T));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vf weight = splat(p[r * kRow + j]);
#pragma GCC unroll 8
      for (int u = 0; u < U; u++) a[r][u] += weight * x[u];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++)
      U == 1 ? store_n(sums + r * sums_row, a[r][u], width) : store(sums + r * sums_row + u * kW, a[r][u]);
}

#if defined(__AVX512BF16__)
// of two vectors of 16-bit numbers, the first 16 of each side by side
alignas(64) constexpr uint16_t kPairs[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                             8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// The same with two keys at a time: (v[j][d], v[j + 1][d]) side by side meet (p[j], p[j + 1]). p_scale: (R), int8 only
template <class T, int R, int U>
void weigh_tile(const T* v, int64_t n, int64_t stride, const typename Weight<T>::type* p, const float* p_scale,
                float* sums, int64_t sums_row, int64_t width) {
  using P = Pairs<T>;
  constexpr bool whole = sizeof(T) == 1;  // sums of integers are added to the others at the end
  const __m512i low = _mm512_load_si512(kPairs), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  constexpr int C = U == 1 ? 1 : U / 2;  // chunks of 32 values
  const __mmask32 mask = U == 1 ? (1u << width) - 1 : 0xffffffffu;
  vf a[R][2 * C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int u = 0; u < 2 * C; u++) {
      float* from = sums + r * sums_row + u * kW;
      a[r][u] = whole ? zero() : U > 1 ? load(from) : u == 0 ? load_n(from, width) : zero();
    }
  const auto add = [&](int64_t j, __mmask32 there) __attribute__((always_inline)) {  // there: what counts of key j + 1
    const T *first = v + j * stride, *second = first + stride;
    __m512i pair[2 * C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const __m512i x = P::load(mask, first + 32 * c), y = P::load(there, second + 32 * c);
      pair[2 * c] = _mm512_permutex2var_epi16(x, low, y);
      pair[2 * c + 1] = _mm512_permutex2var_epi16(x, high, y);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int32_t both;
      __builtin_memcpy(&both, p + r * kRow + j, 4);
      __m512i weights = _mm512_set1_epi32(both);
      asm("" : "+v"(weights));  // one load, not one in each product
#pragma GCC unroll 8
      for (int u = 0; u < 2 * C; u++) a[r][u] = P::add(a[r][u], pair[u], weights);
    }
  };
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) {
    prefetch_later(v + j * stride, U * kW * sizeof(T));
    prefetch_later(v + (j + 1) * stride, U * kW * sizeof(T));
    add(j, mask);
  }
  if (j < n) add(j, 0);  // the last key alone: paired with zeros, whatever its neighbour's weight, if that is finite
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int u = 0; u < (U == 1 ? 1 : 2 * C); u++) {
      float* to = sums + r * sums_row + u * kW;
      if (whole) a[r][u] = (U == 1 ? load_n(to, width) : load(to)) + P::floats(a[r][u]) * p_scale[r];
      U == 1 ? store_n(to, a[r][u], width) : store(to, a[r][u]);
    }
}
#endif

template <class T, int R>
void weigh_heads(const T* v, int64_t n, int64_t stride, const typename Weight<T>::type* p, const float* p_scale, float* sums,
                 int64_t sums_row, int64_t dv) {
  constexpr int U = kW == 16 ? 4 : 2;
  // few keys at a time, so that all passes over a row find it in the first-level cache, and memory is asked evenly
  for (int64_t j = 0; j < n; j += kKeysAtOnce) {
    const T* part = v + j * stride;
    const int64_t count = min(kKeysAtOnce, n - j);
    int64_t d = 0;
    for (; d + U * kW <= dv; d += U * kW) weigh_tile<T, R, U>(part + d, count, stride, p + j, p_scale, sums + d, sums_row, kW);
    for (; d < dv; d += kW)
      weigh_tile<T, R, 1>(part + d, count, stride, p + j, p_scale, sums + d, sums_row, min<int64_t>(dv - d, kW));
  }
}

#if defined(HYMBA_AMX)
// The weights as they lie are the first factor, heads x 32 keys; values the second, two keys side by side, arranged a turn
// before they are multiplied (matvec_blocks.h says why). 64 dimensions at a time. dv: a multiple of 64, heads: at most 16.
inline void weigh_by_tiles(const bf16* v, int64_t n, int64_t stride, const bf16* p, int64_t heads, float* sums,
                           int64_t sums_row, int64_t dv) {
  const __m512i low = _mm512_load_si512(kPairs), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  alignas(64) __m512i pairs[2][4][16];  // (16 dimensions, pair of keys)
  alignas(64) bf16 rest[16][32];
  const int64_t row = sums_row * sizeof(float);
  const auto arrange = [&](int64_t j, int64_t d) __attribute__((always_inline)) {
    auto* to = pairs[j / 32 % 2];
    for (int64_t i = 0; i < 16; i++) {
      const int64_t left = n - j - 2 * i;  // keys from this pair on
      const bf16 *first = v + (j + 2 * i) * stride + d, *second = first + stride;
      if (left > 1) prefetch_later(first, 128), prefetch_later(second, 128);
#pragma GCC unroll 2
      for (int64_t c = 0; c < 2; c++) {
        const __m512i x = left > 0 ? _mm512_loadu_si512(first + 32 * c) : _mm512_setzero_si512();
        const __m512i y = left > 1 ? _mm512_loadu_si512(second + 32 * c) : _mm512_setzero_si512();
        to[2 * c][i] = _mm512_permutex2var_epi16(x, low, y);
        to[2 * c + 1][i] = _mm512_permutex2var_epi16(x, high, y);
      }
    }
    written(to);
  };
  if (n % 32 > 0) {  // what lies behind the weights may be NaN
    for (int64_t h = 0; h < heads; h++)
      _mm512_store_si512(rest[h], _mm512_maskz_loadu_epi16((1u << n % 32) - 1, p + h * kRow + n / 32 * 32));
    written(rest);
  }
  Tiles tiles;
  tiles.use(static_cast<int>(heads), 64);
  for (int64_t d = 0; d < dv; d += 64) {
    _tile_loadd(0, sums + d, row);
    _tile_loadd(1, sums + d + 16, row);
    _tile_loadd(2, sums + d + 32, row);
    _tile_loadd(3, sums + d + 48, row);
    arrange(0, d);
    for (int64_t j = 0; j < n; j += 32) {
      if (j + 32 < n) arrange(j + 32, d);
      if (j + 32 <= n)
        _tile_loadd(4, p + j, kRow * sizeof(bf16));
      else
        _tile_loadd(4, rest, 64);
      const auto* values = pairs[j / 32 % 2];
      _tile_loadd(5, values[0], 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, values[1], 64);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, values[2], 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, values[3], 64);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, sums + d, row);
    _tile_stored(1, sums + d + 16, row);
    _tile_stored(2, sums + d + 32, row);
    _tile_stored(3, sums + d + 48, row);
  }
}
#endif

// p_scale: (heads) where the weights are integers
template <class T>
void weigh(const T* v, int64_t n, int64_t stride, const typename Weight<T>::type* p, const float* p_scale, int64_t heads,
           float* sums, int64_t sums_row, int64_t dv) {
#if defined(HYMBA_AMX)
  if constexpr (sizeof(T) == 2)
    if (dv % 64 == 0) {
      for (int64_t r = 0; r < heads; r += 16)
        weigh_by_tiles(v, n, stride, p + r * kRow, min<int64_t>(16, heads - r), sums + r * sums_row, sums_row, dv);
      return;
    }
#endif
  const int64_t parts = ceil_div(heads, 5);
  for (int64_t part = 0, r = 0; part < parts; part++) {
    const int64_t count = heads * (part + 1) / parts - r;
    const typename Weight<T>::type* pr = p + r * kRow;
    const float* scale = p_scale + r;
    float* sr = sums + r * sums_row;
    switch (count) {
      case 1: weigh_heads<T, 1>(v, n, stride, pr, scale, sr, sums_row, dv); break;
      case 2: weigh_heads<T, 2>(v, n, stride, pr, scale, sr, sums_row, dv); break;
      case 3: weigh_heads<T, 3>(v, n, stride, pr, scale, sr, sums_row, dv); break;
      case 4: weigh_heads<T, 4>(v, n, stride, pr, scale, sr, sums_row, dv); break;
      default: weigh_heads<T, 5>(v, n, stride, pr, scale, sr, sums_row, dv); break;
    }
    r += count;
  }
}

// ---- keys and values of 8 bits

// x[i] = scale q[i], to nearest; -> scale, 0 of a vector of zeros. Of finite numbers as `quantise` of hymba/model/cache.py, bit
// by bit.
HYMBA_INLINE float quantise_vector(const float* x, int64_t n, int8_t* q) {
  float top = 0;
  for (int64_t i = 0; i < n; i++) top = max(top, __builtin_fabsf(x[i]));
  const float scale = top / 127, divisor = scale > 0 ? scale : 1;
  for (int64_t i = 0; i < n; i += kW) {
    const int64_t m = min<int64_t>(kW, n - i);
    const vf steps = vmin(vmax(load_n(x + i, m) / divisor, splat(-127.0f)), splat(127.0f));
    const vi rounded = integers(steps + kToInteger);
    for (int j = 0; j < m; j++) q[i + j] = static_cast<int8_t>(rounded[j]);
  }
  return scale;
}

// queries x: (heads, dk) -> as score<int8_t> reads them, and what a score is to be multiplied with
HYMBA_INLINE void code_queries(const float* x, int64_t heads, int64_t dk, Dot<int8_t>::Input* q, float* scales) {
  const int64_t ld = padded(dk);
  for (int64_t r = 0; r < heads; r++) {
    float scale = 1;
#if defined(__AVX512BF16__)
    float top = 0;
    for (int64_t i = 0; i < dk; i++) top = max(top, __builtin_fabsf(x[r * dk + i]));
    const float steps = static_cast<float>(min<int64_t>(32767, INT32_MAX / (127 * dk)));  // sums fit 32 bits
    scale = max(top / steps, 1e-30f);
#endif
    for (int64_t i = 0; i < ld; i += kW) {
      const int64_t m = min<int64_t>(kW, max<int64_t>(dk - i, 0));
      const vf v = load_n(x + r * dk + i, m) / scale;
#if defined(__AVX512BF16__)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + r * ld + i), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)v)));
#else
      store(q + r * ld + i, v);
#endif
    }
    scales[r] = scale;
  }
}

// scores[r][j] *= q_scale[r] k_scale[j]. Whole vectors: behind the n scores lie others, or what `score` wrote there.
HYMBA_INLINE void scale_scores(float* scores, int64_t n, const float* k_scale, const float* q_scale, int64_t heads) {
  for (int64_t j = 0; j < n; j += kW) {
    const vf scale = load_n(k_scale + j, min<int64_t>(kW, n - j));
    for (int64_t r = 0; r < heads; r++)
      store(scores + r * kRow + j, load(scores + r * kRow + j) * (scale * q_scale[r]));
  }
}

// weights p[r][j] of n values times their scales -> as weigh<int8_t> reads them, and p_scale
HYMBA_INLINE void code_weights(const float* p, int64_t n, const float* v_scale, int64_t heads, Weight<int8_t>::type* coded,
                               float* p_scale) {
  for (int64_t r = 0; r < heads; r++, p += kRow, coded += kRow) {
    const auto scaled = [&](int64_t j) __attribute__((always_inline)) {
      return load(p + j) * load_n(v_scale + j, min<int64_t>(kW, n - j));
    };
    p_scale[r] = 1;
#if defined(__AVX512BF16__)
    vf top = zero();
    for (int64_t j = 0; j < n; j += kW) top = vmax(top, scaled(j));
    p_scale[r] = max(largest(top) / 32767, 1e-30f);
    const float inverse = 1 / p_scale[r];
    for (int64_t j = 0; j < n; j += kW)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(coded + j),
                          _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)(scaled(j) * inverse))));
#else
    for (int64_t j = 0; j < n; j += kW) store(coded + j, scaled(j));
#endif
  }
}

}  // namespace HYMBA_ISA
}  // namespace hymba

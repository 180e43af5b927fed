// A thin vector layer: `vf` is kW floats, `vi` kW int32. Arithmetic and comparisons are the compiler's vector
// extensions (GCC and Clang), so the generic code compiles to NEON, SSE2 or AVX2; intrinsics stand where it matters.
//
// `a * b + c` contracts to a fused multiply-add (-ffp-contract=fast). A comparison of vf gives a vi mask, 0 or -1.
#pragma once

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hymba {
namespace HYMBA_ISA {

#if defined(__AVX512F__)
constexpr int kW = 16;
#elif defined(__AVX2__)
constexpr int kW = 8;
#else
constexpr int kW = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kW)));
typedef int32_t vi __attribute__((vector_size(4 * kW)));
typedef uint32_t vu __attribute__((vector_size(4 * kW)));
typedef uint16_t vh __attribute__((vector_size(2 * kW)));
typedef float vf_any __attribute__((vector_size(4 * kW), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * kW), aligned(2), may_alias));
typedef int8_t vc_any __attribute__((vector_size(kW), aligned(1), may_alias));

#define HYMBA_INLINE static inline __attribute__((always_inline))

template <class T>
HYMBA_INLINE T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
HYMBA_INLINE T max(T a, T b) {
  return a > b ? a : b;
}
HYMBA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HYMBA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

HYMBA_INLINE vf splat(float x) { return x - vf{}; }
HYMBA_INLINE vf zero() { return vf{}; }

// ---- scalars in memory

HYMBA_INLINE float to_float(float x) { return x; }
HYMBA_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
HYMBA_INLINE void put(float* p, float x) { *p = x; }
HYMBA_INLINE void put(bf16* p, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- loads and stores of kW elements, or of the first n of them (the rest reads as 0)

HYMBA_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
HYMBA_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

HYMBA_INLINE vf from_bf16(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
HYMBA_INLINE vh to_bf16(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x != x ? vu{} + 0x7fc0 : rounded, vh);
#endif
}
HYMBA_INLINE vf load(const bf16* p) { return from_bf16(*reinterpret_cast<const vh_any*>(p)); }
HYMBA_INLINE void store(bf16* p, vf x) { *reinterpret_cast<vh_any*>(p) = to_bf16(x); }
HYMBA_INLINE vf load(const int8_t* p) {  // GCC 12 converts bytes one by one, left to itself
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const vc_any*>(p), vi), vf);
#endif
}

#if defined(__AVX512F__)
HYMBA_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }  // 0 <= n <= 16
#endif

HYMBA_INLINE vf load_n(const float* p, int64_t n) {
  if (n >= kW) return load(p);
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p);
#else
  vf x{};
  for (int i = 0; i < kW; i++)
    if (i < n) x[i] = p[i];
  return x;
#endif
}
HYMBA_INLINE vf load_n(const bf16* p, int64_t n) {
  if (n >= kW) return load(p);
#if defined(__AVX512F__)
  return from_bf16((vh)_mm256_maskz_loadu_epi16(first_lanes(n), p));
#else
  vf x{};
  for (int i = 0; i < kW; i++)
    if (i < n) x[i] = to_float(p[i]);
  return x;
#endif
}
HYMBA_INLINE vf load_n(const int8_t* p, int64_t n) {
  if (n >= kW) return load(p);
  vf x{};
  for (int i = 0; i < kW; i++)
    if (i < n) x[i] = p[i];
  return x;
}
HYMBA_INLINE void store_n(float* p, vf x, int64_t n) {
  if (n >= kW) return store(p, x);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x);
#else
  for (int i = 0; i < kW; i++)
    if (i < n) p[i] = x[i];
#endif
}
HYMBA_INLINE void store_n(bf16* p, vf x, int64_t n) {
  if (n >= kW) return store(p, x);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)to_bf16(x));
#else
  for (int i = 0; i < kW; i++)
    if (i < n) put(p + i, x[i]);
#endif
}

// x as it is after a round trip through memory of type T
HYMBA_INLINE vf rounded_as(const float*, vf x) { return x; }
HYMBA_INLINE vf rounded_as(const bf16*, vf x) { return from_bf16(to_bf16(x)); }

// ---- reductions

HYMBA_INLINE float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float part[kW];
  __builtin_memcpy(part, &x, sizeof x);
  for (int width = kW / 2; width; width /= 2)
    for (int i = 0; i < width; i++) part[i] += part[i + width];
  return part[0];
#endif
}
HYMBA_INLINE float largest(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float part[kW];
  __builtin_memcpy(part, &x, sizeof x);
  for (int width = kW / 2; width; width /= 2)
    for (int i = 0; i < width; i++) part[i] = max(part[i], part[i + width]);
  return part[0];
#endif
}
HYMBA_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
HYMBA_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}
HYMBA_INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7fffffff); }

// ---- kW x kW blocks

#if defined(__AVX512F__)
// rows of a 16 x 16 block -> its columns
HYMBA_INLINE void transpose(__m512 r[16]) {
  __m512 s[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // rows i .. i + 3: columns 0, 1, 2, 3 of each group of four
    r[i] = _mm512_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {  // column c of each group: rows 0-3, 4-7, 8-11, 12-15
    const __m512 even0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), odd0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    s[c] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    s[4 + c] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    s[8 + c] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    s[12 + c] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = s[i];
}
#endif

// to[j * to_step + i] = from[i * from_step + j]
HYMBA_INLINE void transpose(float* to, int64_t to_step, const float* from, int64_t from_step) {
#if defined(__AVX512F__)
  __m512 r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(from + i * from_step);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_storeu_ps(to + i * to_step, r[i]);
#else
  for (int i = 0; i < kW; i++)
    for (int j = 0; j < kW; j++) to[j * to_step + i] = from[i * from_step + j];
#endif
}

// ---- functions; relative errors are those of the polynomial, to which rounding adds about as much

// 2^f for |f| <= 1/2, minimax of degree 5 with value 1 at 0, so that products of many factors near 1 do not drift;
// relative error 9e-8
HYMBA_INLINE vf exp2_fraction(vf f) {
  vf p = f * 1.3264727e-3f + 9.6715130e-3f;
  p = p * f + 5.5507336e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314700e-1f;
  return p * f + 1.0f;
}

constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
// the integers that were rounded so
HYMBA_INLINE vi integers(vf shifted) { return (vi)shifted - 0x4b400000; }

#if !defined(__AVX512F__)
// p 2^n for integers n = shifted - kToInteger from -127 (gives 0) to 127
HYMBA_INLINE vf scale(vf p, vf shifted) { return p * (vf)((integers(shifted) + 127) << 23); }
#endif

// 2^y; 0 below the normal numbers, infinite or at least 1.7e38 above them
HYMBA_INLINE vf exp2(vf y) {
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)y, 0x08);
  return (vf)_mm512_scalef_ps((__m512)exp2_fraction(y - n), (__m512)n);
#else
  y = vmin(vmax(y, splat(-127.0f)), splat(127.49f));
  const vf shifted = y + kToInteger;
  return scale(exp2_fraction(y - (shifted - kToInteger)), shifted);
#endif
}

constexpr float kLog2e = 1.44269504f;

// e^x: the argument is reduced in two steps, so that the error stays at 2e-7 for large |x| too
HYMBA_INLINE vf exp(vf x) {
#if defined(__AVX512F__)
  x = vmin(vmax(x, splat(-150.0f)), splat(150.0f));  // keeps x - n ln 2 finite
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * kLog2e), 0x08);
#else
  x = vmin(vmax(x, splat(-88.0f)), splat(88.37f));
  const vf shifted = x * kLog2e + kToInteger, n = shifted - kToInteger;
#endif
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)exp2_fraction(r * kLog2e), (__m512)n);
#else
  return scale(exp2_fraction(r * kLog2e), shifted);
#endif
}

// from e^-|x|, so that it does not lose the tail below 0
HYMBA_INLINE vf sigmoid(vf x) {
  const vf e = exp(-vabs(x));
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// log(1 + u) for 0 <= u <= 1, as 2 atanh(u / (2 + u)); relative error 1.4e-7
HYMBA_INLINE vf log1p(vf u) {
  const vf s = u / (u + 2.0f), s2 = s * s;
  vf p = s2 * (2.0f / 13) + 2.0f / 11;
  p = p * s2 + 2.0f / 9;
  p = p * s2 + 2.0f / 7;
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  p = p * s2 + 2.0f;
  return p * s;
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), without overflow
HYMBA_INLINE vf softplus(vf x) { return vmax(x, zero()) + log1p(exp(-vabs(x))); }

}  // namespace HYMBA_ISA
}  // namespace hymba

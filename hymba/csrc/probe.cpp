// What the machine can do at most, for `hymba bench`: bytes read from memory and multiply-adds in registers, a second.
//
// read: every thread sums one contiguous stretch with 64-byte loads, the pattern that reads fastest here.
// peak: chains of independent multiply-adds on registers alone, no memory: float32 FMA, bf16 pair dot products
//       (vdpbf16ps), int8 quadruple dot products (vpdpbusd), matrix tiles for both where there are any. Where an
//       instruction set lacks one, the count is 0.
#include <cstring>

#include "isa.h"
#include "threads.h"
#include "tiles.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hymba {
namespace HYMBA_ISA {
namespace {

typedef uint64_t u64x8 __attribute__((vector_size(64), aligned(8)));
typedef float f32x16 __attribute__((vector_size(64)));

struct ReadArgs {
  const char* data;
  int64_t bytes;
  uint64_t* sum;  // so that nothing is optimised away
  int64_t n_threads;
};

struct PeakArgs {
  int64_t kind;  // 0 float32, 1 bf16, 2 int8
  int64_t rounds;
  double* operations;  // multiplications and additions done, 0 if this kind is not there
  int64_t n_threads;
};

constexpr int kChains = 12;  // latency 4 times two units, and some
#if defined(HYMBA_AMX)
constexpr int kTileRounds = 10;  // a round of tiles takes so much longer than one of vectors
#endif

// Keeps a value in a register and tells the compiler that it changed.
template <class V>
inline void touch(V& x) {
#if defined(__x86_64__) && defined(__AVX512F__)
  asm volatile("" : "+v"(x));
#else
  asm volatile("" : "+m"(x));
#endif
}

double peak_f32(int64_t rounds) {
  f32x16 sum[kChains] = {}, a = {}, b = {};
  touch(a), touch(b);
  for (int c = 0; c < kChains; c++) touch(sum[c]);  // else the chains, all alike, are merged into one
  for (int64_t i = 0; i < rounds; i++) {
    for (int c = 0; c < kChains; c++) sum[c] = sum[c] * a + b;
    touch(a);
  }
  for (int c = 0; c < kChains; c++) touch(sum[c]);
  return 2.0 * 16 * kChains * rounds;
}

#if defined(HYMBA_AMX)
template <bool kInt8>
double peak_tiles(int64_t rounds) {
  Tiles tiles;
  tiles.use(16, 64);  // and clears them
  rounds /= kTileRounds;
  for (int64_t i = 0; i < rounds; i++) {
    if constexpr (kInt8) {
      _tile_dpbsud(0, 4, 5);
      _tile_dpbsud(1, 4, 5);
      _tile_dpbsud(2, 4, 5);
      _tile_dpbsud(3, 4, 5);
    } else {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 5);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  return 2.0 * 16 * 16 * (kInt8 ? 64 : 32) * 4 * rounds;
}
#endif

double peak_bf16(int64_t rounds) {
#if defined(HYMBA_AMX)
  return peak_tiles<false>(rounds);
#elif defined(__AVX512BF16__)
  __m512 sum[kChains];
  for (int c = 0; c < kChains; c++) sum[c] = _mm512_setzero_ps();
  __m512i a = _mm512_setzero_si512(), b = a;
  touch(a), touch(b);
  for (int64_t i = 0; i < rounds; i++) {
    for (int c = 0; c < kChains; c++) sum[c] = _mm512_dpbf16_ps(sum[c], (__m512bh)a, (__m512bh)b);
    touch(a);
  }
  for (int c = 0; c < kChains; c++) touch(sum[c]);
  return 2.0 * 32 * kChains * rounds;
#else
  (void)rounds;
  return 0;
#endif
}

double peak_int8(int64_t rounds) {
#if defined(HYMBA_AMX)
  return peak_tiles<true>(rounds);
#elif defined(__AVX512VNNI__)
  __m512i sum[kChains];
  for (int c = 0; c < kChains; c++) sum[c] = _mm512_setzero_si512();
  __m512i a = _mm512_setzero_si512(), b = a;
  touch(a), touch(b);
  for (int64_t i = 0; i < rounds; i++) {
    for (int c = 0; c < kChains; c++) sum[c] = _mm512_dpbusd_epi32(sum[c], a, b);
    touch(a);
  }
  for (int c = 0; c < kChains; c++) touch(sum[c]);
  return 2.0 * 64 * kChains * rounds;
#else
  (void)rounds;
  return 0;
#endif
}

}  // namespace
}  // namespace HYMBA_ISA
}  // namespace hymba

using namespace hymba;
using namespace hymba::HYMBA_ISA;

HYMBA_KERNEL(probe_read)(const ReadArgs* a) {
  parallel_for(static_cast<int>(a->n_threads), [a](int thread, int n) {
    const Range part = split(a->bytes / 256, thread, n);
    u64x8 sum[4] = {};
    for (int64_t i = part.first; i < part.last; i++) {
      const u64x8* p = reinterpret_cast<const u64x8*>(a->data + 256 * i);
      __builtin_prefetch(a->data + 256 * i + 4096);
      for (int k = 0; k < 4; k++) sum[k] += p[k];
    }
    u64x8 all = sum[0] + sum[1] + sum[2] + sum[3];
    uint64_t total = 0;
    for (int k = 0; k < 8; k++) total += all[k];
    __atomic_fetch_add(a->sum, total, __ATOMIC_RELAXED);
  });
}

HYMBA_KERNEL(probe_peak)(const PeakArgs* a) {
  double (*const kinds[])(int64_t) = {peak_f32, peak_bf16, peak_int8};
  double done[64] = {};
  parallel_for(static_cast<int>(a->n_threads < 64 ? a->n_threads : 64),
               [&](int thread, int) { done[thread] = kinds[a->kind](a->rounds); });
  *a->operations = 0;
  for (double operations : done) *a->operations += operations;
}

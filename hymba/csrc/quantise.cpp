// Weights to 4 bits: for every group of 32 the scale and codes with the least squared error. The definition, in PyTorch,
// is _quantise_int4 of hymba/model/quant.py.
//
//   for each anchor a:  s = top / a, with top the weight of largest magnitude
//                       s = sum w q / sum q q rounded to bf16, where q = level nearest to w / s
//                       e = sum (w - s level nearest to w / s)^2;  the s with the least e is kept
//
// Lanes are weights. The nearest of 16 levels is found by comparing with the 15 midpoints. All is float32.
#include "elementwise.h"
#include "matvec.h"

namespace hymba {

struct QuantiseArgs {
  const float* w;       // (rows, groups, 32)
  int64_t groups;       // of all rows
  const float* levels;  // (16,) rising
  const float* anchors;
  int64_t n_anchors;
  uint8_t* codes;  // (groups, 32)
  bf16* scales;    // (groups,)
  int64_t n_threads;
};

namespace HYMBA_ISA {
namespace {

constexpr int kVectors = 32 / kW;

struct Levels {
  float first, midpoint[15], step[15];
};

HYMBA_INLINE vf nearest(vf x, const Levels& l) {
  vf level = splat(l.first);
  for (int t = 0; t < 15; t++) level += x > l.midpoint[t] ? splat(l.step[t]) : zero();
  return level;
}

void quantise_group(const float* w, const QuantiseArgs& a, const Levels& l, uint8_t* codes, bf16* scale) {
  vf x[kVectors];
  float top = 0;
  for (int i = 0; i < kVectors; i++) x[i] = load(w + i * kW);
  for (int i = 0; i < 32; i++) top = __builtin_fabsf(w[i]) > __builtin_fabsf(top) ? w[i] : top;
  float best = 0, least = __builtin_inff();
  if (__builtin_fabsf(top) > 1e-30f)
    for (int64_t k = 0; k < a.n_anchors; k++) {
      vf wq = zero(), qq = zero(), error = zero();
      for (int i = 0; i < kVectors; i++) {
        const vf q = nearest(x[i] * (a.anchors[k] / top), l);
        wq += x[i] * q, qq += q * q;
      }
      bf16 stored;
      put(&stored, sum(wq) / sum(qq));
      const float s = to_float(stored);
      if (__builtin_fabsf(s) < 1e-30f) continue;
      for (int i = 0; i < kVectors; i++) {
        const vf rest = x[i] - nearest(x[i] * (1.0f / s), l) * s;
        error += rest * rest;
      }
      const float e = sum(error);
      if (e < least) least = e, best = s;
    }
  put(scale, best);
  const float inverse = best == 0 ? 0.0f : 1.0f / best;
  for (int i = 0; i < 32; i++) {
    int code = 0;
    for (int t = 0; t < 15; t++) code += w[i] * inverse > l.midpoint[t];
    codes[i] = static_cast<uint8_t>(code);
  }
}

}  // namespace

HYMBA_KERNEL(quantise_int4)(const QuantiseArgs* a) {
  Levels l;
  l.first = a->levels[0];
  for (int t = 0; t < 15; t++) {
    l.midpoint[t] = (a->levels[t] + a->levels[t + 1]) / 2;
    l.step[t] = a->levels[t + 1] - a->levels[t];
  }
  parallel_for((int)a->n_threads, [&](int thread, int n_threads) {
    const Range own = split(a->groups, thread, n_threads);
    for (int64_t g = own.first; g < own.last; g++) quantise_group(a->w + 32 * g, *a, l, a->codes + 32 * g, a->scales + g);
  });
}

}  // namespace HYMBA_ISA
}  // namespace hymba

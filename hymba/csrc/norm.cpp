// Root mean square norm over the last dimension (Zhang and Sennrich, 2019), and the mean of the two branches' norms:
//
//     r = 1 / sqrt(mean(x^2) + eps)      y = w round(x r)
//     dx = r (g w - xhat mean(g w xhat))    dw = sum g xhat,    xhat = x r
//
// `round` is to x's type, as the released implementation does before it multiplies by the weight; the statistics are
// float32. x is up to four-dimensional with a contiguous last dimension, and so is w, with stride 0 where it repeats.
// Work is split over rows. Backward computes r again; every thread sums its own dw.
#include "elementwise.h"

namespace hymba {
namespace HYMBA_ISA {
namespace {

struct Rows {  // (d0, d1, d2, D): where row (i, j, k) begins
  void* data;
  int64_t s0, s1, s2;
  template <class T>
  T* at(int64_t i, int64_t j, int64_t k) const {
    return static_cast<T*>(data) + i * s0 + j * s1 + k * s2;
  }
};

struct NormArgs {
  int64_t x_type, w_type, n_threads, d0, d1, d2, D;
  double eps;
  Rows x, w, y;
};

struct NormBackwardArgs {
  NormArgs f;      // y is not used
  Rows gy, dx;     // in y's and x's type
  float* dw;       // (n_threads, as w in memory), zero before
  int64_t dw_size;
};

struct MeanArgs {
  int64_t type, n_threads, rows, D;
  double eps;
  const void *a, *s;           // two branches, (rows, D)
  int64_t a_step, s_step;
  const void *a_weight, *s_weight;  // (D,) of the same type
  void* y;
};

struct MeanBackwardArgs {
  MeanArgs f;
  const void* gy;
  int64_t gy_step;
  void *da, *ds;
  float* dw;       // (n_threads, 2, D), zero before
};

template <class T>
HYMBA_INLINE float inverse_rms(const T* x, int64_t D, double eps) {
  vf s0 = zero(), s1 = zero();
  int64_t i = 0;
  for (; i + 2 * kW <= D; i += 2 * kW) {
    const vf a = load(x + i), b = load(x + i + kW);
    s0 = a * a + s0;
    s1 = b * b + s1;
  }
  for (; i < D; i += kW) {
    const vf a = load_n(x + i, min<int64_t>(kW, D - i));
    s0 = a * a + s0;
  }
  return 1.0f / __builtin_sqrtf(sum(s0 + s1) / static_cast<float>(D) + static_cast<float>(eps));
}

// f(first element, how many) over a row in vectors
template <class F>
HYMBA_INLINE void over_row(int64_t D, const F& f) {
  for (int64_t i = 0; i < D; i += kW) f(i, min<int64_t>(kW, D - i));
}

template <class X, class W, class Y>
void norm_forward(const NormArgs& a, int thread, int n_threads) {
  const Range mine = split(a.d0 * a.d1 * a.d2, thread, n_threads);
  for (int64_t row = mine.first; row < mine.last; row++) {
    const int64_t k = row % a.d2, j = row / a.d2 % a.d1, i = row / a.d2 / a.d1;
    const X* x = a.x.at<X>(i, j, k);
    const W* w = a.w.at<W>(i, j, k);
    Y* y = a.y.at<Y>(i, j, k);
    const vf r = splat(inverse_rms(x, a.D, a.eps));
    over_row(a.D, [&](int64_t o, int64_t n) {
      store_n(y + o, load_n(w + o, n) * rounded_as(x, load_n(x + o, n) * r), n);
    });
  }
}

// One row: dx and dw (added) from the gradient `half` * gy.
template <class X, class W, class Y>
HYMBA_INLINE void row_backward(const X* x, const W* w, const Y* gy, X* dx, float* dw, int64_t D, double eps, float half) {
  const vf r = splat(inverse_rms(x, D, eps));
  vf dot = zero();
  over_row(D, [&](int64_t o, int64_t n) {
    const vf g = load_n(gy + o, n) * half, xhat = load_n(x + o, n) * r;
    dot = g * load_n(w + o, n) * xhat + dot;
    store_n(dw + o, g * xhat + load_n(dw + o, n), n);
  });
  const vf mean = splat(sum(dot) / static_cast<float>(D));
  over_row(D, [&](int64_t o, int64_t n) {
    const vf g = load_n(gy + o, n) * half, xhat = load_n(x + o, n) * r;
    store_n(dx + o, r * (g * load_n(w + o, n) - xhat * mean), n);
  });
}

template <class X, class W, class Y>
void norm_backward(const NormBackwardArgs& args, int thread, int n_threads) {
  const NormArgs& a = args.f;
  float* dw = args.dw + thread * args.dw_size;
  const Range mine = split(a.d0 * a.d1 * a.d2, thread, n_threads);
  for (int64_t row = mine.first; row < mine.last; row++) {
    const int64_t k = row % a.d2, j = row / a.d2 % a.d1, i = row / a.d2 / a.d1;
    row_backward(a.x.at<X>(i, j, k), a.w.at<W>(i, j, k), args.gy.at<Y>(i, j, k), args.dx.at<X>(i, j, k),
                 dw + i * a.w.s0 + j * a.w.s1 + k * a.w.s2, a.D, a.eps, 1.0f);
  }
}

template <class T>
void mean_forward(const MeanArgs& m, int thread, int n_threads) {
  const Range mine = split(m.rows, thread, n_threads);
  const T *wa = static_cast<const T*>(m.a_weight), *ws = static_cast<const T*>(m.s_weight);
  for (int64_t row = mine.first; row < mine.last; row++) {
    const T *a = static_cast<const T*>(m.a) + row * m.a_step, *s = static_cast<const T*>(m.s) + row * m.s_step;
    T* y = static_cast<T*>(m.y) + row * m.D;
    const vf ra = splat(inverse_rms(a, m.D, m.eps)), rs = splat(inverse_rms(s, m.D, m.eps));
    over_row(m.D, [&](int64_t o, int64_t n) {
      const vf ya = load_n(wa + o, n) * rounded_as(a, load_n(a + o, n) * ra);
      const vf ys = load_n(ws + o, n) * rounded_as(s, load_n(s + o, n) * rs);
      store_n(y + o, (rounded_as(a, ya) + rounded_as(s, ys)) * 0.5f, n);
    });
  }
}

template <class T>
void mean_backward(const MeanBackwardArgs& args, int thread, int n_threads) {
  const MeanArgs& m = args.f;
  float* dw = args.dw + thread * 2 * m.D;
  const Range mine = split(m.rows, thread, n_threads);
  for (int64_t row = mine.first; row < mine.last; row++) {
    const T *a = static_cast<const T*>(m.a) + row * m.a_step, *s = static_cast<const T*>(m.s) + row * m.s_step;
    const T* gy = static_cast<const T*>(args.gy) + row * args.gy_step;
    row_backward(a, static_cast<const T*>(m.a_weight), gy, static_cast<T*>(args.da) + row * m.D, dw, m.D, m.eps, 0.5f);
    row_backward(s, static_cast<const T*>(m.s_weight), gy, static_cast<T*>(args.ds) + row * m.D, dw + m.D, m.D, m.eps,
                 0.5f);
  }
}

// f(X{}, W{}, Y{}) with the types of x, w and the product, which PyTorch's promotion makes float unless both are bf16
template <class F>
HYMBA_INLINE void with_types(const NormArgs& a, const F& f) {
  if (a.x_type == kFloat32 && a.w_type == kFloat32) f(float{}, float{}, float{});
  if (a.x_type == kFloat32 && a.w_type == kBFloat16) f(float{}, bf16{}, float{});
  if (a.x_type == kBFloat16 && a.w_type == kFloat32) f(bf16{}, float{}, float{});
  if (a.x_type == kBFloat16 && a.w_type == kBFloat16) f(bf16{}, bf16{}, bf16{});
}

}  // namespace
}  // namespace HYMBA_ISA
}  // namespace hymba

using namespace hymba;
using namespace hymba::HYMBA_ISA;

HYMBA_KERNEL(norm_forward)(const NormArgs* a) {
  with_types(*a, [&](auto x, auto w, auto y) {
    parallel_for(a->n_threads, [&](int thread, int n) {
      norm_forward<decltype(x), decltype(w), decltype(y)>(*a, thread, n);
    });
  });
}

HYMBA_KERNEL(norm_backward)(const NormBackwardArgs* a) {
  with_types(a->f, [&](auto x, auto w, auto y) {
    parallel_for(a->f.n_threads, [&](int thread, int n) {
      norm_backward<decltype(x), decltype(w), decltype(y)>(*a, thread, n);
    });
  });
}

HYMBA_KERNEL(mean_forward)(const MeanArgs* a) {
  with_type(a->type, [&](auto type) {
    parallel_for(a->n_threads, [&](int thread, int n) { mean_forward<decltype(type)>(*a, thread, n); });
  });
}

HYMBA_KERNEL(mean_backward)(const MeanBackwardArgs* a) {
  with_type(a->f.type, [&](auto type) {
    parallel_for(a->f.n_threads, [&](int thread, int n) { mean_backward<decltype(type)>(*a, thread, n); });
  });
}

// Depthwise causal convolution over time, then SiLU; forward and backward. For channel e, width K:
//
//     z_t = bias + sum_{j < K} weight[K - 1 - j] x_{t-j}           y_t = z_t sigmoid(z_t)
//
// The input j steps ago is x_{t-j}, or one of the K - 1 inputs in `state` where the row or a document began less than
// j steps ago. Work is split over (row, strip of channels); a thread walks its strip through time, so that a channel's
// weight and bias gradients have one writer. Backward computes z again; dx_t is complete K - 1 steps after t, so the last
// K of them wait in a ring. Sums are float32.
#include "elementwise.h"

namespace hymba {
namespace HYMBA_ISA {
namespace {

constexpr int kVectors = 4;            // vectors in a strip: a full strip reads whole cache lines of bf16 too
constexpr int kStrip = kVectors * kW;

struct ConvArgs {
  int64_t type, n_threads, B, T, E, K;
  const void* x;
  int64_t x_row, x_step;
  const float* weight;                  // (K, E), transposed
  const float* bias;                    // (E,)
  const void* state;                    // (B or 1, K - 1, E) in x's type
  int64_t state_row;
  const int64_t* age;                   // (B, T) steps since the document began, or since long ago; or null
  void* y;                              // (B, T, E)
};

struct ConvBackwardArgs {
  ConvArgs f;
  const void* gy;
  int64_t gy_row, gy_step;
  void* dx;                             // (B, T, E)
  float *dweight, *dbias;               // (B, K, E), (B, E)
  float* dstate;                        // (B, K - 1, E)
};

// Which input is `back` steps before t: (true, its time) or (false, its slot in `state`).
struct Source {
  bool inside;
  int64_t index;
};
HYMBA_INLINE Source source(const ConvArgs& a, int64_t b, int64_t t, int64_t back) {
  const int64_t age = a.age ? a.age[b * a.T + t] : a.K;
  if (age < back) return {false, a.K - 1 - back + age};
  if (t < back) return {false, a.K - 1 - back + t};
  return {true, t - back};
}

template <class T>
HYMBA_INLINE const T* locate(const ConvArgs& a, int64_t b, Source s) {
  return s.inside ? static_cast<const T*>(a.x) + b * a.x_row + s.index * a.x_step
                  : static_cast<const T*>(a.state) + b * a.state_row + s.index * a.E;
}

template <class T>
void forward(const ConvArgs& a, int thread, int n_threads) {
  const int64_t strips = ceil_div(a.E, kStrip);
  const Range mine = split(a.B * strips, thread, n_threads);
  for (int64_t item = mine.first; item < mine.last; item++) {
    const int64_t b = item / strips, e0 = item % strips * kStrip, e1 = min<int64_t>(a.E, e0 + kStrip);
    for (int64_t t = 0; t < a.T; t++) {
      T* out = static_cast<T*>(a.y) + (b * a.T + t) * a.E;
      vf z[kVectors];
      for (int i = 0; i < kVectors; i++)
        z[i] = load_n(a.bias + e0 + i * kW, max<int64_t>(0, min<int64_t>(kW, e1 - e0 - i * kW)));
      for (int64_t back = 0; back < a.K; back++) {
        const T* x = locate<T>(a, b, source(a, b, t, back));
        const float* w = a.weight + (a.K - 1 - back) * a.E;
        if (e1 - e0 == kStrip) {
          for (int i = 0; i < kVectors; i++) z[i] = load(x + e0 + i * kW) * load(w + e0 + i * kW) + z[i];
        } else {
          for (int i = 0; e0 + i * kW < e1; i++) {
            const int64_t e = e0 + i * kW, n = min<int64_t>(kW, e1 - e);
            z[i] = load_n(x + e, n) * load_n(w + e, n) + z[i];
          }
        }
      }
      for (int i = 0; e0 + i * kW < e1; i++)
        store_n(out + e0 + i * kW, z[i] * sigmoid(z[i]), min<int64_t>(kW, e1 - e0 - i * kW));
    }
  }
}

template <class T>
void backward(const ConvBackwardArgs& args, int thread, int n_threads) {
  const ConvArgs& a = args.f;
  const int64_t strips = ceil_div(a.E, kW), K = a.K;
  const Range mine = split(a.B * strips, thread, n_threads);
  float* buffer = static_cast<float*>(scratch(0, (3 * K + 1) * kW * 4));
  float *ring = buffer, *dw = ring + K * kW, *dstate = dw + K * kW;  // (K, kW), (K, kW), (K - 1, kW)
  for (int64_t item = mine.first; item < mine.last; item++) {
    const int64_t b = item / strips, e = item % strips * kW, n = min<int64_t>(kW, a.E - e);
    __builtin_memset(buffer, 0, (3 * K + 1) * kW * 4);
    vf dbias = zero();
    for (int64_t t = 0; t < a.T; t++) {
      store(ring + t % K * kW, zero());
      vf z = load_n(a.bias + e, n);
      for (int64_t back = 0; back < K; back++)
        z = load_n(locate<T>(a, b, source(a, b, t, back)) + e, n) * load_n(a.weight + (K - 1 - back) * a.E + e, n) + z;
      const vf s = sigmoid(z);
      const vf dz = load_n(static_cast<const T*>(args.gy) + b * args.gy_row + t * args.gy_step + e, n) * s *
                    (1.0f + z * (1.0f - s));
      dbias = dbias + dz;
      for (int64_t back = 0; back < K; back++) {
        const Source from = source(a, b, t, back);
        float* to = dw + (K - 1 - back) * kW;
        store(to, load_n(locate<T>(a, b, from) + e, n) * dz + load(to));
        to = from.inside ? ring + from.index % K * kW : dstate + from.index * kW;
        store(to, load_n(a.weight + (K - 1 - back) * a.E + e, n) * dz + load(to));
      }
      if (t >= K - 1)
        store_n(static_cast<T*>(args.dx) + (b * a.T + t - K + 1) * a.E + e, load(ring + (t - K + 1) % K * kW), n);
    }
    for (int64_t t = max<int64_t>(0, a.T - K + 1); t < a.T; t++)
      store_n(static_cast<T*>(args.dx) + (b * a.T + t) * a.E + e, load(ring + t % K * kW), n);
    for (int64_t k = 0; k < K; k++) store_n(args.dweight + (b * K + k) * a.E + e, load(dw + k * kW), n);
    for (int64_t k = 0; k < K - 1; k++) store_n(args.dstate + (b * (K - 1) + k) * a.E + e, load(dstate + k * kW), n);
    store_n(args.dbias + b * a.E + e, dbias, n);
  }
}

}  // namespace
}  // namespace HYMBA_ISA
}  // namespace hymba

using namespace hymba;
using namespace hymba::HYMBA_ISA;

HYMBA_KERNEL(conv_forward)(const ConvArgs* a) {
  with_type(a->type, [&](auto type) {
    parallel_for(a->n_threads, [&](int thread, int n) { forward<decltype(type)>(*a, thread, n); });
  });
}

HYMBA_KERNEL(conv_backward)(const ConvBackwardArgs* a) {
  with_type(a->f.type, [&](auto type) {
    parallel_for(a->f.n_threads, [&](int thread, int n) { backward<decltype(type)>(*a, thread, n); });
  });
}

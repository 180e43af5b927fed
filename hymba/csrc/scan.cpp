// Selective scan (Gu and Dao, "Mamba", arXiv 2312.00752), forward and backward. For channel e and state n:
//
//     delta_t = softplus(dt_t + dt_bias)
//     h_t     = exp(delta_t A) h_{t-1} + delta_t u_t B_t          B, C are shared by all channels
//     y_t     = (sum_n C_t h_t + D u_t) silu(gate_t)
//
// Tiling. A vector holds kW channels, a register one state of each. Work is split over (row, block of kW channels); a
// thread walks its blocks tile by tile in time (kTile steps), so that B and C of a tile are converted once for all its
// blocks. What depends on the channel only (delta, delta u) is computed first for a tile, then groups of states run
// through the tile in registers. Tiles are cut where a document starts: there h is `state` again.
//
// Backward. The forward pass keeps h at the start of every tile (1 / kTile of the (B, T, E, N) tensor that is never
// formed). Tiles run last to first: h is computed again for one tile, then with g_t = dL/dh_t,
//
//     g_t = gs_t C_t + exp(delta_{t+1} A) g_{t+1}                 gs = gy silu(gate)
//     dB_t = sum_e g_t delta_t u_t        dC_t = sum_e gs_t h_t    dA = sum_t g_t h_{t-1} exp(delta_t A) delta_t
//     d delta_t = sum_n g_t (h_{t-1} exp(delta_t A) A + u_t B_t)   du_t = delta_t sum_n g_t B_t + gs_t D
//
// Everything is float32 but u, dt, gate, B, C, y and their gradients in memory. exp(delta A) is exp2(delta A log2 e).
#include "elementwise.h"

namespace hymba {
namespace HYMBA_ISA {
namespace {

constexpr int kTile = 32;     // as TILE in ops/native.py
constexpr int kGroup = kW;    // states that run through a tile together: kW of 32 registers (AVX-512), of 16 (others)
static_assert(kGroup == 16 || kGroup == 8 || kGroup == 4, "groups of states are 16, 8, 4, or 1");

struct Strided {  // (B, T, inner), the last contiguous
  void* data;
  int64_t row, step;
  template <class T>
  T* at(int64_t b, int64_t t) const {
    return static_cast<T*>(data) + b * row + t * step;
  }
};

struct ScanArgs {
  int64_t type, n_threads, B, T, E, N;
  Strided u, dt, gate, Bt, Ct;
  const float *dt_bias, *A, *D;         // (E,), (E, N), (E,)
  const float* state;                   // (B or 1, E, N)
  int64_t state_row;                    // 0: the same state for every row
  const uint8_t* starts;                // (B, T) or null
  const int64_t* lengths;               // (B,) or null
  void* y;                              // (B, T, E)
  float* last;                          // (B, E, N)
  float* kept;                          // (B, tiles, blocks, N, kW): h before each tile; or null
};

struct ScanBackwardArgs {
  ScanArgs f;                           // y and last are not used
  Strided gy;
  const float* glast;                   // (B, E, N) gradient of the last state, or null
  void *du, *ddt, *dgate;               // (B, T, E)
  float *dbias, *dD;                    // (B, E)
  float *dA, *dstate;                   // (B, E, N)
  float *dB, *dC;                       // (n_threads, B, T, N), zero before
};

// kW channels x N states between memory (n contiguous) and vectors (channel in the lane)
void load_states(float* to, const float* from, int64_t N, int64_t channels) {
  if (channels < kW)
    for (int64_t i = 0; i < N * kW; i++) to[i] = 0;
  for (int64_t lane = 0; lane < channels; lane++)
    for (int64_t n = 0; n < N; n++) to[n * kW + lane] = from[lane * N + n];
}

// The same for A, times log2 e: exp(delta A) is then a power of two.
void load_rates(float* to, const float* A, int64_t N, int64_t channels) {
  load_states(to, A, N, channels);
  for (int64_t n = 0; n < N; n++) store(to + n * kW, load(to + n * kW) * kLog2e);
}
void store_states(float* to, const float* from, int64_t N, int64_t channels) {
  for (int64_t lane = 0; lane < channels; lane++)
    for (int64_t n = 0; n < N; n++) to[lane * N + n] = from[n * kW + lane];
}

struct Tile {
  int64_t first, last;  // steps
  bool fresh;           // a document starts here
};

// The tile that begins at t: up to the next multiple of kTile, the next start, or T.
Tile tile_at(const ScanArgs& a, int64_t b, int64_t t) {
  const uint8_t* starts = a.starts ? a.starts + b * a.T : nullptr;
  int64_t last = min(a.T, round_up(t + 1, kTile));
  if (starts)
    for (int64_t s = t + 1; s < last; s++)
      if (starts[s]) last = s;
  return {t, last, starts && starts[t]};
}

// What a tile needs of the channels: delta and delta u, (kTile, kW) each.
template <class T>
HYMBA_INLINE void load_channels(const ScanArgs& a, int64_t b, Tile tile, int64_t e, int64_t width, float* delta,
                                float* drive) {
  const vf bias = load_n(a.dt_bias + e, width);
  const int64_t length = a.lengths ? a.lengths[b] : a.T;
  for (int64_t t = tile.first; t < tile.last; t++) {
    const int64_t i = (t - tile.first) * kW;
    vf u, x;
    if (width == kW) {
      u = load(a.u.at<T>(b, t) + e), x = load(a.dt.at<T>(b, t) + e);
    } else {
      u = load_n(a.u.at<T>(b, t) + e, width), x = load_n(a.dt.at<T>(b, t) + e, width);
    }
    const vf d = t < length ? softplus(x + bias) : zero();  // delta = 0 leaves the state alone
    store(delta + i, d);
    store(drive + i, d * u);
  }
}

// G states through a tile: h is updated, sum_n C h is added to y (kTile, kW).
template <int G>
HYMBA_INLINE void scan_group(int64_t steps, int64_t N, const float* A2, const float* B, const float* C,
                             const float* delta, const float* drive, float* h, float* y) {
  vf s[G];
#pragma GCC unroll 16
  for (int n = 0; n < G; n++) s[n] = load(h + n * kW);
  for (int64_t t = 0; t < steps; t++) {
    const vf d = load(delta + t * kW), x = load(drive + t * kW);
    vf y0 = load(y + t * kW), y1 = zero();
#pragma GCC unroll 16
    for (int n = 0; n < G; n++) {
      s[n] = exp2(d * load(A2 + n * kW)) * s[n] + x * B[t * N + n];
      if (n % 2)
        y1 = s[n] * C[t * N + n] + y1;
      else
        y0 = s[n] * C[t * N + n] + y0;
    }
    store(y + t * kW, y0 + y1);
  }
#pragma GCC unroll 16
  for (int n = 0; n < G; n++) store(h + n * kW, s[n]);
}

// Calls f(first state, Integer<G>) for groups of G that cover N states.
template <class F>
HYMBA_INLINE void over_groups(int64_t N, const F& f) {
  int64_t n = 0;
  for (; n + kGroup <= N; n += kGroup) f(n, Integer<kGroup>{});
  if constexpr (kGroup > 8)
    for (; n + 8 <= N; n += 8) f(n, Integer<8>{});
  if constexpr (kGroup > 4)
    for (; n + 4 <= N; n += 4) f(n, Integer<4>{});
  for (; n < N; n++) f(n, Integer<1>{});
}

template <class T>
void forward(const ScanArgs& a, int thread, int n_threads) {
  const int64_t blocks = ceil_div(a.E, kW), tiles = ceil_div(a.T, kTile), size = a.N * kW;
  const Range mine = split(a.B * blocks, thread, n_threads);
  const int64_t most = min(blocks, mine.last - mine.first);
  // of the blocks of one row: A log2 e, the state before, the running state
  float* A2 = static_cast<float*>(scratch(0, most * size * 4));
  float* first = static_cast<float*>(scratch(1, most * size * 4));
  float* state = static_cast<float*>(scratch(2, most * size * 4));
  float* BC = static_cast<float*>(scratch(3, 2 * kTile * a.N * 4));
  float *Bt = BC, *Ct = BC + kTile * a.N;
  alignas(64) float delta[kTile * kW], drive[kTile * kW], y[kTile * kW];

  for (int64_t begin = mine.first; begin < mine.last;) {
    const int64_t b = begin / blocks, block0 = begin % blocks;
    const int64_t count = min(blocks - block0, mine.last - begin);
    begin += count;
    for (int64_t i = 0; i < count; i++) {
      const int64_t e = (block0 + i) * kW, width = min<int64_t>(kW, a.E - e);
      load_rates(A2 + i * size, a.A + e * a.N, a.N, width);
      load_states(first + i * size, a.state + b * a.state_row + e * a.N, a.N, width);
    }
    __builtin_memcpy(state, first, count * size * 4);
    for (int64_t t = 0; t < a.T;) {
      const Tile tile = tile_at(a, b, t);
      const int64_t steps = tile.last - tile.first;
      for (int64_t s = 0; s < steps; s++) {
        to_floats(Bt + s * a.N, a.Bt.at<T>(b, t + s), a.N);
        to_floats(Ct + s * a.N, a.Ct.at<T>(b, t + s), a.N);
      }
      for (int64_t i = 0; i < count; i++) {
        const int64_t e = (block0 + i) * kW, width = min<int64_t>(kW, a.E - e);
        float* h = state + i * size;
        if (tile.fresh) __builtin_memcpy(h, first + i * size, size * 4);
        if (a.kept && t % kTile == 0)
          __builtin_memcpy(a.kept + ((b * tiles + t / kTile) * blocks + block0 + i) * size, h, size * 4);
        load_channels<T>(a, b, tile, e, width, delta, drive);
        for (int64_t s = 0; s < steps; s++) store(y + s * kW, zero());
        over_groups(a.N, [&](int64_t n, auto group) {
          scan_group<decltype(group)::value>(steps, a.N, A2 + i * size + n * kW, Bt + n, Ct + n, delta, drive,
                                             h + n * kW, y);
        });
        const vf D = load_n(a.D + e, width);
        for (int64_t s = 0; s < steps; s++) {
          T* out = static_cast<T*>(a.y) + (b * a.T + t + s) * a.E + e;
          if (width == kW) {
            const vf g = load(a.gate.at<T>(b, t + s) + e);
            store(out, (load(y + s * kW) + D * load(a.u.at<T>(b, t + s) + e)) * (g * sigmoid(g)));
          } else {
            const vf g = load_n(a.gate.at<T>(b, t + s) + e, width);
            const vf u = load_n(a.u.at<T>(b, t + s) + e, width);
            store_n(out, (load(y + s * kW) + D * u) * (g * sigmoid(g)), width);
          }
        }
      }
      t = tile.last;
    }
    for (int64_t i = 0; i < count; i++) {
      const int64_t e = (block0 + i) * kW;
      store_states(a.last + (b * a.E + e) * a.N, state + i * size, a.N, min<int64_t>(kW, a.E - e));
    }
  }
}

// One group of G states of one tile, backwards. h: (G,) before the tile; g: (G,) dL/dh after the tile, carried on;
// sums over states are added to gB (sum g B), gA (sum g h' a A) and, in the pass forward, y (sum C h).
// dB, dC: (steps, N, kW) sums over blocks, lane by lane.
template <int G>
HYMBA_INLINE void backward_group(int64_t steps, int64_t N, const float* A2, const float* B, const float* C,
                                 const float* delta, const float* drive, const float* gs, const float* h, float* g,
                                 float* dA, float* y, float* gB, float* gA, float* dB, float* dC, float* history) {
  vf s[G];
  float *before = history, *decay = history + kTile * G * kW;
#pragma GCC unroll 16
  for (int n = 0; n < G; n++) s[n] = load(h + n * kW);
  for (int64_t t = 0; t < steps; t++) {
    const vf d = load(delta + t * kW), x = load(drive + t * kW), gy = load(gs + t * kW);
    vf sum = load(y + t * kW);
#pragma GCC unroll 16
    for (int n = 0; n < G; n++) {
      const vf a = exp2(d * load(A2 + n * kW));
      store(decay + (t * G + n) * kW, a);
      const vf old = a * s[n];
      store(before + (t * G + n) * kW, old);
      s[n] = old + x * B[t * N + n];
      sum = s[n] * C[t * N + n] + sum;
      float* to = dC + (t * N + n) * kW;
      store(to, gy * s[n] + load(to));
    }
    store(y + t * kW, sum);
  }
#pragma GCC unroll 16
  for (int n = 0; n < G; n++) s[n] = load(g + n * kW);
  for (int64_t t = steps - 1; t >= 0; t--) {
    const vf d = load(delta + t * kW), x = load(drive + t * kW), gy = load(gs + t * kW);
    vf sum_B = load(gB + t * kW), sum_A = load(gA + t * kW);
#pragma GCC unroll 16
    for (int n = 0; n < G; n++) {
      s[n] = gy * C[t * N + n] + s[n];
      sum_B = s[n] * B[t * N + n] + sum_B;
      float* to = dB + (t * N + n) * kW;
      store(to, s[n] * x + load(to));
      const vf q = s[n] * load(before + (t * G + n) * kW);
      sum_A = q * load(A2 + n * kW) + sum_A;
      store(dA + n * kW, q * d + load(dA + n * kW));
      s[n] = s[n] * load(decay + (t * G + n) * kW);
    }
    store(gB + t * kW, sum_B);
    store(gA + t * kW, sum_A);
  }
#pragma GCC unroll 16
  for (int n = 0; n < G; n++) store(g + n * kW, s[n]);
}

template <class T>
void backward(const ScanBackwardArgs& args, int thread, int n_threads) {
  const ScanArgs& a = args.f;
  const int64_t blocks = ceil_div(a.E, kW), tiles = ceil_div(a.T, kTile), size = a.N * kW;
  const Range mine = split(a.B * blocks, thread, n_threads);
  const int64_t most = min(blocks, mine.last - mine.first);
  float* A2 = static_cast<float*>(scratch(0, most * size * 4));
  float* g = static_cast<float*>(scratch(1, most * size * 4));        // dL/dh, running
  float* BC = static_cast<float*>(scratch(2, 2 * kTile * a.N * 4));
  float* dA = static_cast<float*>(scratch(3, most * size * 4));
  float* dfirst = static_cast<float*>(scratch(4, most * size * 4));   // what reaches `state`
  float* history = static_cast<float*>(scratch(5, 2 * kTile * kGroup * kW * 4));
  float* lanes = static_cast<float*>(scratch(6, (2 * kTile + 1) * size * 4 + most * 2 * kW * 4));
  float *dB = lanes, *dC = lanes + kTile * size, *h = lanes + 2 * kTile * size, *sums = h + size;
  float *Bt = BC, *Ct = BC + kTile * a.N;
  alignas(64) float delta[kTile * kW], drive[kTile * kW], y[kTile * kW], gs[kTile * kW], gB[kTile * kW],
      gA[kTile * kW];

  for (int64_t begin = mine.first; begin < mine.last;) {
    const int64_t b = begin / blocks, block0 = begin % blocks;
    const int64_t count = min(blocks - block0, mine.last - begin);
    begin += count;
    for (int64_t i = 0; i < count; i++) {
      const int64_t e = (block0 + i) * kW, width = min<int64_t>(kW, a.E - e);
      load_rates(A2 + i * size, a.A + e * a.N, a.N, width);
      if (args.glast)
        load_states(g + i * size, args.glast + (b * a.E + e) * a.N, a.N, width);
      else
        __builtin_memset(g + i * size, 0, size * 4);
    }
    __builtin_memset(dA, 0, count * size * 4);
    __builtin_memset(dfirst, 0, count * size * 4);
    __builtin_memset(sums, 0, count * 2 * kW * 4);
    float* dB_out = args.dB + (thread * a.B + b) * a.T * a.N;
    float* dC_out = args.dC + (thread * a.B + b) * a.T * a.N;

    for (int64_t t_end = a.T; t_end > 0;) {
      // the last tile that ends at t_end, and the steps from the kept state to it
      const int64_t kept_at = (t_end - 1) / kTile * kTile;
      Tile tile = tile_at(a, b, kept_at);
      while (tile.last < t_end) tile = tile_at(a, b, tile.last);
      const int64_t t = tile.first, steps = tile.last - tile.first;
      for (int64_t s = 0; s < steps; s++) {
        to_floats(Bt + s * a.N, a.Bt.at<T>(b, t + s), a.N);
        to_floats(Ct + s * a.N, a.Ct.at<T>(b, t + s), a.N);
      }
      __builtin_memset(dB, 0, steps * size * 4);
      __builtin_memset(dC, 0, steps * size * 4);
      const int64_t length = a.lengths ? a.lengths[b] : a.T;
      for (int64_t i = 0; i < count; i++) {
        const int64_t e = (block0 + i) * kW, width = min<int64_t>(kW, a.E - e);
        // a tile starts where a state was kept, or at a document, whose state is `state`
        if (tile.fresh)
          load_states(h, a.state + b * a.state_row + e * a.N, a.N, width);
        else
          __builtin_memcpy(h, a.kept + ((b * tiles + t / kTile) * blocks + block0 + i) * size, size * 4);
        load_channels<T>(a, b, tile, e, width, delta, drive);
        for (int64_t s = 0; s < steps; s++) {
          const vf gate = load_n(a.gate.at<T>(b, t + s) + e, width);
          store(gs + s * kW, load_n(args.gy.at<T>(b, t + s) + e, width) * gate * sigmoid(gate));
          store(y + s * kW, zero());
          store(gB + s * kW, zero());
          store(gA + s * kW, zero());
        }
        over_groups(a.N, [&](int64_t n, auto group) {
          const int64_t o = i * size + n * kW;
          backward_group<decltype(group)::value>(steps, a.N, A2 + o, Bt + n, Ct + n, delta, drive, gs, h + n * kW,
                                                 g + o, dA + o, y, gB, gA, dB + n * kW, dC + n * kW, history);
        });
        if (tile.fresh) {  // what came before the document is not reached
          for (int64_t n = 0; n < a.N; n++) {
            float *from = g + i * size + n * kW, *to = dfirst + i * size + n * kW;
            store(to, load(to) + load(from));
            store(from, zero());
          }
        }
        const vf D = load_n(a.D + e, width), bias = load_n(a.dt_bias + e, width);
        vf sum_bias = load(sums + i * 2 * kW), sum_D = load(sums + i * 2 * kW + kW);
        for (int64_t s = 0; s < steps; s++) {
          const vf u = load_n(a.u.at<T>(b, t + s) + e, width), x = load_n(a.dt.at<T>(b, t + s) + e, width) + bias;
          const vf gate = load_n(a.gate.at<T>(b, t + s) + e, width), sig = sigmoid(gate);
          const vf gy = load_n(args.gy.at<T>(b, t + s) + e, width);
          const vf out = load(gs + s * kW), g_drive = load(gB + s * kW);
          const int64_t o = (b * a.T + t + s) * a.E + e;
          store_n(static_cast<T*>(args.du) + o, load(delta + s * kW) * g_drive + out * D, width);
          const vf g_delta = load(gA + s * kW) * (1 / kLog2e) + u * g_drive;
          const vf g_dt = t + s < length ? g_delta * sigmoid(x) : zero();
          store_n(static_cast<T*>(args.ddt) + o, g_dt, width);
          store_n(static_cast<T*>(args.dgate) + o,
                  gy * (load(y + s * kW) + D * u) * sig * (1.0f + gate * (1.0f - sig)), width);
          sum_bias = sum_bias + g_dt;
          sum_D = sum_D + out * u;
        }
        store(sums + i * 2 * kW, sum_bias);
        store(sums + i * 2 * kW + kW, sum_D);
      }
      for (int64_t s = 0; s < steps; s++)
        for (int64_t n = 0; n < a.N; n++) {
          dB_out[(t + s) * a.N + n] = sum(load(dB + (s * a.N + n) * kW));
          dC_out[(t + s) * a.N + n] = sum(load(dC + (s * a.N + n) * kW));
        }
      t_end = t;
    }
    for (int64_t i = 0; i < count; i++) {
      const int64_t e = (block0 + i) * kW, width = min<int64_t>(kW, a.E - e);
      for (int64_t n = 0; n < a.N; n++) {
        float* to = dfirst + i * size + n * kW;
        store(to, load(to) + load(g + i * size + n * kW));
      }
      store_states(args.dA + (b * a.E + e) * a.N, dA + i * size, a.N, width);
      store_states(args.dstate + (b * a.E + e) * a.N, dfirst + i * size, a.N, width);
      store_n(args.dbias + b * a.E + e, load(sums + i * 2 * kW), width);
      store_n(args.dD + b * a.E + e, load(sums + i * 2 * kW + kW), width);
    }
  }
}

}  // namespace
}  // namespace HYMBA_ISA
}  // namespace hymba

using namespace hymba;
using namespace hymba::HYMBA_ISA;

HYMBA_KERNEL(scan_forward)(const ScanArgs* a) {
  with_type(a->type, [&](auto type) {
    parallel_for(a->n_threads, [&](int thread, int n) { forward<decltype(type)>(*a, thread, n); });
  });
}

HYMBA_KERNEL(scan_backward)(const ScanBackwardArgs* a) {
  with_type(a->f.type, [&](auto type) {
    parallel_for(a->f.n_threads, [&](int thread, int n) { backward<decltype(type)>(*a, thread, n); });
  });
}

// kW, which the layout of kept states depends on
HYMBA_KERNEL(vector_width)(int64_t* width) { *width = kW; }

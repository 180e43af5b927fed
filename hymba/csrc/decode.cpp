// One decoding step of the whole model: for every row of the batch one new token, all layers, one parallel region.
//
// The math is that of hymba/model/hymba.py with T = 1 and a cache. A step is a sequence of phases; in each phase every
// thread owns a part of the outputs (rows of a matrix, channels, attention tasks), and a barrier ends it:
//
//   embed      x = embedding[id]
//   per layer
//   1 project  heads_norm(x), in_proj                                  rows of in_proj
//   2 conv     causal convolution of u, SiLU, shift of its state       channels
//     attend   q and k norm, RoPE, keys and values stored, attention   (row, key head, chunk of keys)
//   3 select   x_proj; partial attention results are put together      rows of x_proj; (row, head)
//   4 scan     norms of dt, B, C; dt_proj; recurrence; gate            channels
//   5 mix      mean of the branch norms, out_proj, x += ...            rows of out_proj
//   6 mlp      mlp_norm(x), gate_proj, up_proj, activation             rows of gate_proj and up_proj
//   7 down     down_proj, x += ...                                     rows of down_proj
//   head       norm(x), lm_head                                        rows of lm_head
//
// What precedes a product (a norm, the quantisation of its input) is done by every thread for itself, for all rows: that
// takes less than a barrier more would. Weights are read by contiguous parts, once a step.
//
// Activations are float32 in memory. In a bf16 model they hold bf16 values: they are rounded wherever the modules round
// (after each product, norm, rotation, activation and addition), but for the logits, which stay float32. Sums, the
// softmax, the recurrence and its state are float32.
//
// Attention: keys come in pieces that lie together (meta tokens, the ring up to its end, the ring from its start).
// A row's keys are cut into at most kMaxChunks chunks, by their number only, so that the result depends neither on the
// threads nor on the other rows; each chunk runs an online softmax over blocks of kBlock keys (decode_attention.h),
// and phase 3 adds the chunks up. An int8 cache: blocks end where the meta tokens do, whose keys are of the model's type.
//
// Nothing is allocated here.
#include "decode.h"

#include "decode_attention.h"
#include "elementwise.h"

namespace hymba {
namespace HYMBA_ISA {
namespace {

constexpr int64_t kMaxChunks = 16, kMinChunk = kBlock;

HYMBA_INLINE float root(float x) { return __builtin_sqrtf(x); }

// loads and stores of n elements, where n is kW but for the last of a row
HYMBA_INLINE vf get(const float* p, int64_t n) { return n == kW ? load(p) : load_n(p, n); }
HYMBA_INLINE void set(float* p, vf x, int64_t n) { n == kW ? store(p, x) : store_n(p, x, n); }

// f(i, n) for i = first, first + kW, .. with n = kW, the last time with what is left
template <class F>
HYMBA_INLINE void for_lanes(int64_t first, int64_t last, const F& f) {
  int64_t i = first;
  for (; i + kW <= last; i += kW) f(i, (int64_t)kW);
  if (i < last) f(i, last - i);
}

template <class T>
HYMBA_INLINE vf rounded(vf x) {
  return rounded_as(static_cast<const T*>(nullptr), x);
}

// 1 / root mean square of x
float inverse_rms(const float* x, int64_t n, double eps) {
  vf a = zero(), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * kW <= n; i += 4 * kW) {
    const vf w = load(x + i), v = load(x + i + kW), u = load(x + i + 2 * kW), t = load(x + i + 3 * kW);
    a += w * w, b += v * v, c += u * u, d += t * t;
  }
  for_lanes(i, n, [&](int64_t j, int64_t m) {
    const vf v = get(x + j, m);
    a += v * v;
  });
  return 1.0f / root(sum((a + b) + (c + d)) / static_cast<float>(n) + static_cast<float>(eps));
}

// ops.rms_norm
template <class T>
void rms_norm(const float* x, const float* weight, int64_t n, double eps, float* out) {
  const float inverse = inverse_rms(x, n, eps);
  for_lanes(0, n, [&](int64_t i, int64_t m) {
    set(out + i, rounded<T>(get(weight + i, m) * rounded<T>(get(x + i, m) * inverse)), m);
  });
}

HYMBA_INLINE vf silu(vf x) { return x * sigmoid(x); }

// The buffers of a step. Shared ones are written in parts; `Private` belongs to a thread.
struct Buffers {
  float *x, *projected, *u, *selected, *delta, *ssm, *partial, *attn, *gate, *up;
  int64_t partial_row;
};
struct Private {
  float *rows, *query, *scores, *weights;  // (B, widest), (R, dk), (R, kRow), (R, kRow)
  char *input, *query_input;
  float *query_coded, *query_scale, *weight_scale;  // (R, padded(dk)) and (R): what meets int8 keys, and values
};

struct Bump {
  char* base;
  int64_t used = 0;
  template <class P>
  void take(P*& p, int64_t count) {
    p = reinterpret_cast<P*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(P)), 64) + 64;  // parts do not share a cache line
  }
};

// widest output of in_proj
int64_t projected_width(const ModelArgs& m) {
  int64_t width = 0;
  for (int64_t l = 0; l < m.n_layers; l++) width = max(width, m.layers[l].in_proj.rows);
  return width;
}

int64_t lay_out(const ModelArgs& m, int64_t n_threads, char* base, Buffers& b, Private* mine, int thread) {
  const int64_t B = m.max_batch, R = m.H / m.G, widest = max(max(m.D, m.E), m.F);
  Bump bump{base};
  bump.take(b.x, B * m.D);
  bump.take(b.projected, B * projected_width(m));
  bump.take(b.u, B * m.E);
  bump.take(b.selected, B * (m.rank + 2 * m.N));
  bump.take(b.delta, B * m.E);
  bump.take(b.ssm, B * m.E);
  b.partial_row = round_up(m.dv + 2, 16);
  bump.take(b.partial, B * m.H * kMaxChunks * b.partial_row);
  bump.take(b.attn, B * m.E);
  bump.take(b.gate, B * m.F);
  bump.take(b.up, B * m.F);
  for (int64_t t = 0; t < n_threads; t++) {
    Private p;
    bump.take(p.rows, B * max(widest, m.rank + 2 * m.N));
    bump.take(p.query, R * m.dk);
    bump.take(p.scores, R * kRow);
    bump.take(p.weights, R * kRow);
    bump.take(p.input, input_bytes(max(widest, m.rank), B));
    bump.take(p.query_input, R * padded(m.dk) * static_cast<int64_t>(sizeof(float)));
    bump.take(p.query_coded, R * padded(m.dk));
    bump.take(p.query_scale, R);
    bump.take(p.weight_scale, R);
    if (mine != nullptr && t == thread) *mine = p;
  }
  return bump.used;
}

template <class T>
class Step {
 public:
  Step(const StepArgs& args, int thread, int n_threads)
      : a_(args), m_(*args.model), B_(args.batch), thread_(thread), n_threads_(n_threads) {
    lay_out(m_, args.n_threads, static_cast<char*>(args.workspace), s_, &mine_, thread);
  }

  void run() {
    embed();
    wait();
    for (layer_ = 0; layer_ < m_.n_layers; layer_++) {
      l_ = &m_.layers[layer_];
      project();
      wait();
      convolve();
      attend();
      wait();
      select();
      wait();
      scan();
      wait();
      mix();
      wait();
      mlp();
      wait();
      add_product(l_->down_proj, s_.gate, m_.F);
      wait();
    }
    if (a_.logits != nullptr) head();
  }

 private:
  void wait() { barrier(n_threads_); }

  // this thread's part of `count` rows or channels, in whole blocks
  Range part(int64_t count) const {
    const Range r = split(ceil_div(count, kRowBlock), thread_, n_threads_);
    return {min(r.first * kRowBlock, count), min(r.last * kRowBlock, count)};
  }

  static constexpr bool kRounds = sizeof(T) < sizeof(float);

  void round_rows(float* y, int64_t y_row, int64_t first, int64_t last) const {
    if (kRounds)
      for (int64_t b = 0; b < B_; b++)
        for_lanes(first, last, [&](int64_t i, int64_t n) { set(y + b * y_row + i, rounded<T>(get(y + b * y_row + i, n)), n); });
  }

  // own rows of y = W x, rounded; x was brought into mine_.input
  Range product(const Matrix& w, float* y, int64_t y_row) const {
    const Range own = part(w.rows);
    multiply(w, mine_.input, B_, own.first, own.last, y + own.first, y_row);
    round_rows(y, y_row, own.first, own.last);
    return own;
  }

  void norm_rows(const float* weight) const {
    for (int64_t b = 0; b < B_; b++) rms_norm<T>(s_.x + b * m_.D, weight, m_.D, m_.norm_eps, mine_.rows + b * m_.D);
  }

  void embed() const {
    const Range own = split(B_, thread_, n_threads_);
    for (int64_t b = own.first; b < own.last; b++) {
      float* x = s_.x + b * m_.D;
      lookup(m_.embedding, a_.ids[b], x);
      for_lanes(0, m_.D, [&](int64_t i, int64_t n) { set(x + i, rounded<T>(get(x + i, n)), n); });
    }
  }

  void project() {
    norm_rows(l_->heads_norm);
    prepare(l_->in_proj, mine_.rows, m_.D, B_, mine_.input);
    product(l_->in_proj, s_.projected, l_->in_proj.rows);
  }

  const float* projected(int64_t b, int64_t offset) const { return s_.projected + b * l_->in_proj.rows + offset; }
  int64_t u_offset() const { return l_->in_proj.rows - 2 * m_.E; }
  int64_t gate_offset() const { return l_->in_proj.rows - m_.E; }

  void convolve() const {
    const Range own = part(m_.E);
    const int64_t E = m_.E, K = m_.K;
    for (int64_t b = 0; b < B_; b++) {
      T* state = static_cast<T*>(a_.cache->conv) + layer_ * a_.cache->conv_layer + b * a_.cache->conv_row;
      const float* x = projected(b, u_offset());
      for_lanes(own.first, own.last, [&](int64_t i, int64_t n) {
        const auto past = [&](int64_t k) { return n == kW ? load(state + k * E + i) : load_n(state + k * E + i, n); };
        const auto keep = [&](int64_t k, vf v) {
          n == kW ? store(state + k * E + i, v) : store_n(state + k * E + i, v, n);
        };
        const vf now = get(x + i, n);
        vf y = get(l_->conv_bias + i, n) + now * get(l_->conv_weight + (K - 1) * E + i, n);
        vf newer = now;
        for (int64_t k = K - 2; k >= 0; k--) {
          const vf tap = past(k);
          y += tap * get(l_->conv_weight + k * E + i, n);
          keep(k, newer);
          newer = tap;
        }
        set(s_.u + b * E + i, rounded<T>(silu(y)), n);
      });
    }
  }

  // ---- attention

  struct Keys {
    int64_t first, count, chunk, n_chunks;  // first text token seen; keys in all, in a chunk; chunks
  };
  Keys keys(int64_t b) const {
    Keys k;
    const int64_t now = a_.lengths[b];
    k.first = l_->window < 0 ? 0 : max<int64_t>(0, now - l_->window);
    k.count = m_.n_meta + now - k.first + 1;
    k.chunk = max(kMinChunk, round_up(ceil_div(k.count, kMaxChunks), 64));
    k.n_chunks = ceil_div(k.count, k.chunk);
    return k;
  }
  float* partial(int64_t b, int64_t head, int64_t chunk) const {
    return s_.partial + ((b * m_.H + head) * kMaxChunks + chunk) * s_.partial_row;
  }

  void attend() const {
    int64_t tasks = 0;
    for (int64_t b = 0; b < B_; b++) tasks += m_.G * keys(b).n_chunks;
    const Range own = split(tasks, thread_, n_threads_);
    int64_t before = 0;
    for (int64_t b = 0; b < B_; b++) {
      const Keys k = keys(b);
      for (int64_t g = 0; g < m_.G; g++, before += k.n_chunks) {
        const int64_t first = max<int64_t>(own.first - before, 0), last = min(own.last - before, k.n_chunks);
        if (first < last) prepare_queries(b, g);
        for (int64_t chunk = first; chunk < last; chunk++) attend_chunk(b, g, chunk, k);
      }
    }
  }

  // the query heads of key head g, rotated, into mine_.query_input
  void prepare_queries(int64_t b, int64_t g) const {
    const int64_t R = m_.H / m_.G, dk = m_.dk;
    for (int64_t r = 0; r < R; r++) {
      const int64_t head = g * R + r;
      rotate(projected(b, head * dk), l_->q_norm == nullptr ? nullptr : l_->q_norm + head * dk, b, mine_.query + r * dk);
    }
    dot_rows(mine_.query, dk, dk, R, reinterpret_cast<typename Dot<T>::Input*>(mine_.query_input));
    if (a_.cache->stores[l_->producer].k_scale != nullptr)
      code_queries(mine_.query, R, dk, reinterpret_cast<Dot<int8_t>::Input*>(mine_.query_coded), mine_.query_scale);
  }

  // norm and rotation of one query or key head
  void rotate(const float* x, const float* norm, int64_t b, float* out) const {
    const int64_t half = m_.dk / 2;
    if (norm != nullptr)
      rms_norm<T>(x, norm, m_.dk, m_.qk_norm_eps, out);
    else
      __builtin_memcpy(out, x, m_.dk * sizeof(float));
    if (m_.cos == nullptr) return;
    const int64_t position = m_.n_meta + a_.lengths[b];
    const float *cos = m_.cos + position * half, *sin = m_.sin + position * half;
    for_lanes(0, half, [&](int64_t i, int64_t n) {
      const vf left = get(out + i, n), right = get(out + half + i, n);
      const vf c = rounded<T>(get(cos + i, n)), s = rounded<T>(get(sin + i, n));
      set(out + i, rounded<T>(rounded<T>(left * c) - rounded<T>(right * s)), n);
      set(out + half + i, rounded<T>(rounded<T>(right * c) + rounded<T>(left * s)), n);
    });
  }

  void store_key_value(const StoreArgs& store_to, int64_t b, int64_t g) const {
    const int64_t slot = g * store_to.slots + a_.lengths[b] % store_to.slots;
    const int64_t to_k = b * store_to.k_row + slot * m_.dk, to_v = b * store_to.v_row + slot * m_.dv;
    const float* value = projected(b, m_.D + m_.G * m_.dk + g * m_.dv);
    rotate(projected(b, m_.D + g * m_.dk), l_->k_norm == nullptr ? nullptr : l_->k_norm + g * m_.dk, b, mine_.query);
    if (store_to.k_scale != nullptr) {
      const int64_t scale = b * store_to.scale_row + slot;
      store_to.k_scale[scale] = quantise_vector(mine_.query, m_.dk, static_cast<int8_t*>(store_to.k) + to_k);
      store_to.v_scale[scale] = quantise_vector(value, m_.dv, static_cast<int8_t*>(store_to.v) + to_v);
      return;
    }
    for (int64_t i = 0; i < m_.dk; i++) put(static_cast<T*>(store_to.k) + to_k + i, mine_.query[i]);
    for (int64_t i = 0; i < m_.dv; i++) put(static_cast<T*>(store_to.v) + to_v + i, value[i]);
  }

  void attend_chunk(int64_t b, int64_t g, int64_t chunk, const Keys& keys) const {
    const StoreArgs& kv = a_.cache->stores[l_->producer];
    const int64_t R = m_.H / m_.G, dk = m_.dk, dv = m_.dv;
    const int64_t begin = chunk * keys.chunk, end = min(begin + keys.chunk, keys.count);
    // the chunk with the newest token stores it; no other one looks at that slot
    if (end == keys.count && l_->producer == layer_) store_key_value(kv, b, g);
    float* sums = partial(b, g * R, chunk);
    const int64_t sums_row = kMaxChunks * s_.partial_row;
    const float scale = kLog2e / root(static_cast<float>(dk));  // powers of 2
    for (int64_t r = 0; r < R; r++) {
      __builtin_memset(sums + r * sums_row, 0, dv * sizeof(float));
      sums[r * sums_row + dv] = kLowest;  // largest score so far
      sums[r * sums_row + dv + 1] = 0;     // sum of exp(score - largest)
    }
    for (int64_t block = begin, stop; block < end; block = stop) {
      stop = min(block + kBlock, end);
      if (kv.k_scale != nullptr && block >= m_.n_meta) {
        attend_block<int8_t>(kv, b, g, block, stop, keys.first, sums, scale);
        continue;
      }
      if (kv.k_scale != nullptr) stop = min(stop, m_.n_meta);  // the meta tokens' are not int8
      attend_block<T>(kv, b, g, block, stop, keys.first, sums, scale);
    }
  }

  // Keys block .. stop - 1, whose keys and values are of type S.
  template <class S>
  void attend_block(const StoreArgs& kv, int64_t b, int64_t g, int64_t block, int64_t stop, int64_t first_token,
                    float* sums, float scale) const {
    constexpr bool coded = sizeof(S) == 1;
    const int64_t R = m_.H / m_.G, sums_row = kMaxChunks * s_.partial_row;
    const auto* query =
        reinterpret_cast<const typename Dot<S>::Input*>(coded ? (const void*)mine_.query_coded : mine_.query_input);
    auto* weights = reinterpret_cast<typename Weight<S>::type*>(mine_.weights);
    for_pieces<S>(kv, b, g, block, stop, first_token, [&](const Piece<S>& piece) {
      float* scores = mine_.scores + piece.first - block;
      score(piece.k, piece.k_stride, piece.size, m_.dk, query, R, scores);
      if (coded) scale_scores(scores, piece.size, piece.k_scale, mine_.query_scale, R);
    });
    for (int64_t r = 0; r < R; r++) {
      float* scores = mine_.scores + r * kRow;
      if constexpr (coded)
        softmax_block(scores, stop - block, scale, scores, sums + r * sums_row, m_.dv);
      else
        softmax_block(scores, stop - block, scale, weights + r * kRow, sums + r * sums_row, m_.dv);
    }
    for_pieces<S>(kv, b, g, block, stop, first_token, [&](const Piece<S>& piece) {
      auto* p = weights + piece.first - block;
      if constexpr (coded)
        code_weights(mine_.scores + piece.first - block, piece.size, piece.v_scale, R, p, mine_.weight_scale);
      weigh(piece.v, piece.size, piece.v_stride, p, mine_.weight_scale, R, sums, sums_row, m_.dv);
    });
  }

  // Keys that lie together: the first of them among all that are seen, and how many.
  template <class S>
  struct Piece {
    const S *k, *v;
    int64_t k_stride, v_stride, first, size;
    const float *k_scale, *v_scale;  // of int8
  };

  // f(piece) for the stretches of keys first .. last - 1 that lie together
  template <class S, class F>
  void for_pieces(const StoreArgs& kv, int64_t b, int64_t g, int64_t first, int64_t last, int64_t first_token,
                  const F& f) const {
    const int64_t M = m_.n_meta;
    if (first < M) {
      const int64_t stop = min(last, M);
      f(Piece<S>{static_cast<const S*>(kv.meta_k) + g * kv.meta_k_head + first * kv.meta_k_key,
                 static_cast<const S*>(kv.meta_v) + g * kv.meta_v_head + first * kv.meta_v_key, kv.meta_k_key,
                 kv.meta_v_key, first, stop - first, nullptr, nullptr});
      first = stop;
    }
    while (first < last) {
      const int64_t slot = (first_token + first - M) % kv.slots, place = g * kv.slots + slot;
      const int64_t size = min(last - first, kv.slots - slot);
      const int64_t scale = b * kv.scale_row + place;
      f(Piece<S>{static_cast<const S*>(kv.k) + b * kv.k_row + place * m_.dk,
                 static_cast<const S*>(kv.v) + b * kv.v_row + place * m_.dv, m_.dk, m_.dv, first, size,
                 sizeof(S) == 1 ? kv.k_scale + scale : nullptr, sizeof(S) == 1 ? kv.v_scale + scale : nullptr});
      first += size;
    }
  }

  // chunks of one head -> its output
  void combine(int64_t b, int64_t head, int64_t n_chunks) const {
    const int64_t dv = m_.dv;
    float top = kLowest, weight[kMaxChunks], total = 0;
    for (int64_t c = 0; c < n_chunks; c++) top = max(top, partial(b, head, c)[dv]);
    for (int64_t c = 0; c < n_chunks; c++) {
      weight[c] = exp2(splat(partial(b, head, c)[dv] - top))[0];
      total += weight[c] * partial(b, head, c)[dv + 1];
    }
    const float inverse = 1.0f / total;
    for_lanes(0, dv, [&](int64_t i, int64_t n) {
      vf y = zero();
      for (int64_t c = 0; c < n_chunks; c++) y += get(partial(b, head, c) + i, n) * weight[c];
      set(s_.attn + b * m_.E + head * dv + i, rounded<T>(y * inverse), n);
    });
  }

  // ---- Mamba

  void select() const {
    prepare(l_->x_proj, s_.u, m_.E, B_, mine_.input);
    product(l_->x_proj, s_.selected, m_.rank + 2 * m_.N);
    const Range own = split(B_ * m_.H, thread_, n_threads_);
    for (int64_t i = own.first; i < own.last; i++) combine(i / m_.H, i % m_.H, keys(i / m_.H).n_chunks);
  }

  void scan() const {
    const int64_t E = m_.E, N = m_.N, rank = m_.rank, width = rank + 2 * N;
    for (int64_t b = 0; b < B_; b++) {
      const float* from = s_.selected + b * width;
      float* to = mine_.rows + b * width;
      rms_norm<T>(from, l_->dt_norm, rank, m_.norm_eps, to);
      rms_norm<T>(from + rank, l_->B_norm, N, m_.norm_eps, to + rank);
      rms_norm<T>(from + rank + N, l_->C_norm, N, m_.norm_eps, to + rank + N);
    }
    prepare(l_->dt_proj, mine_.rows, width, B_, mine_.input);
    const Range own = product(l_->dt_proj, s_.delta, E);
    for (int64_t b = 0; b < B_; b++) {
      const float *Bt = mine_.rows + b * width + rank, *Ct = Bt + N;
      float* state = a_.cache->ssm + layer_ * a_.cache->ssm_layer + b * a_.cache->ssm_row;
      for (int64_t e = own.first; e < own.last; e += 16) scan_channels(b, e, min<int64_t>(16, own.last - e), Bt, Ct, state);
    }
  }

  // up to 16 channels; lanes are the states of one
  void scan_channels(int64_t b, int64_t first, int64_t n, const float* Bt, const float* Ct, float* state) const {
    const int64_t N = m_.N, offset = b * m_.E + first;
    alignas(64) float delta[16], drive[16], y[16];
    alignas(64) vf part[16];
    for_lanes(0, n, [&](int64_t i, int64_t m) {
      const vf d = softplus(get(s_.delta + offset + i, m) + get(l_->dt_bias + first + i, m));
      store(delta + i, d);
      store(drive + i, d * get(s_.u + offset + i, m));
    });
    for (int64_t i = 0; i < n; i++) {
      float* h = state + (first + i) * N;
      const float* A = l_->A + (first + i) * N;
      vf sums = zero();
      for_lanes(0, N, [&](int64_t k, int64_t m) {
        const vf next = exp2(get(A + k, m) * delta[i]) * get(h + k, m) + get(Bt + k, m) * drive[i];
        set(h + k, next, m);
        sums += next * get(Ct + k, m);
      });
      part[i] = sums;
    }
    for (int64_t i = n; i < 16; i++) part[i] = zero();
    sum_of_each(part, y);
    for_lanes(0, n, [&](int64_t i, int64_t m) {
      const vf out = load(y + i) + get(s_.u + offset + i, m) * get(l_->D + first + i, m);
      set(s_.ssm + offset + i, rounded<T>(out * silu(get(projected(b, gate_offset()) + first + i, m))), m);
    });
  }

  // ---- output

  // x += W y, own columns of x
  void add_product(const Matrix& w, const float* y, int64_t y_row) const {
    prepare(w, y, y_row, B_, mine_.input);
    const Range own = product(w, mine_.rows, m_.D);
    for (int64_t b = 0; b < B_; b++) {
      float *x = s_.x + b * m_.D, *add = mine_.rows + b * m_.D;
      for_lanes(own.first, own.last, [&](int64_t i, int64_t n) { set(x + i, rounded<T>(get(x + i, n) + get(add + i, n)), n); });
    }
  }

  void mix() const {
    const int64_t E = m_.E;
    for (int64_t b = 0; b < B_; b++) {
      const float *attn = s_.attn + b * E, *ssm = s_.ssm + b * E;
      const float p = inverse_rms(attn, E, m_.norm_eps), q = inverse_rms(ssm, E, m_.norm_eps);
      for_lanes(0, E, [&](int64_t i, int64_t n) {
        const vf left = rounded<T>(get(l_->attn_norm + i, n) * rounded<T>(get(attn + i, n) * p));
        const vf right = rounded<T>(get(l_->ssm_norm + i, n) * rounded<T>(get(ssm + i, n) * q));
        set(mine_.rows + b * E + i, rounded<T>(rounded<T>(left + right) * 0.5f), n);
      });
    }
    add_product(l_->out_proj, mine_.rows, E);
  }

  void mlp() const {
    norm_rows(l_->mlp_norm);
    prepare(l_->up_proj, mine_.rows, m_.D, B_, mine_.input);
    const bool gated = l_->gate_proj.data != nullptr;
    if (gated) product(l_->gate_proj, s_.gate, m_.F);
    const Range own = product(l_->up_proj, s_.up, m_.F);
    for (int64_t b = 0; b < B_; b++)
      for_lanes(own.first, own.last, [&](int64_t i, int64_t n) {
        float* gate = s_.gate + b * m_.F + i;
        const vf up = get(s_.up + b * m_.F + i, n);
        const vf positive = vmax(up, zero());
        set(gate, rounded<T>(gated ? rounded<T>(silu(get(gate, n))) * up : positive * positive), n);
      });
  }

  void head() const {
    norm_rows(m_.norm);
    prepare(m_.lm_head, mine_.rows, m_.D, B_, mine_.input);
    const Range own = part(m_.vocabulary);
    multiply(m_.lm_head, mine_.input, B_, own.first, own.last, a_.logits + own.first, m_.vocabulary);
  }

  const StepArgs& a_;
  const ModelArgs& m_;
  const int64_t B_;
  const int thread_, n_threads_;
  int64_t layer_ = 0;
  const LayerArgs* l_ = nullptr;
  Buffers s_;
  Private mine_;
};

}  // namespace

HYMBA_KERNEL(decode_workspace)(const WorkspaceArgs* a) {
  Buffers buffers;
  *a->bytes = lay_out(*a->model, a->n_threads, nullptr, buffers, nullptr, 0);
}

HYMBA_KERNEL(decode_step)(const StepArgs* a) {
  parallel_for((int)a->n_threads, [&](int thread, int n_threads) {
    if (a->model->dtype == kFloat32)
      Step<float>(*a, thread, n_threads).run();
    else
      Step<bf16>(*a, thread, n_threads).run();
  });
}

}  // namespace HYMBA_ISA
}  // namespace hymba

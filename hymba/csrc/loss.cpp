// Cross entropy and its gradient, in the memory of the logits. For a row x of V logits with target t:
//
//     loss = log sum_i exp(x_i) - x_t          d loss / d x_i = exp(x_i - log sum exp) - [i = t]
//
// A row is read three times while it is in a near cache: largest logit, sum, gradient. Sums are float32. Rows without a
// target have no loss and a gradient of zero. Work is split over rows.
#include "elementwise.h"

namespace hymba {

struct LossArgs {
  int64_t type, n_threads, rows, V;
  void* logits;  // (rows, V), becomes the gradient
  int64_t step;
  const int64_t* targets;  // (rows,)
  int64_t ignored;
  float* losses;  // (rows,)
};

namespace HYMBA_ISA {
namespace {

template <class T>
float row_loss(T* x, int64_t V, int64_t target) {
  vf high = splat(-__builtin_inff());
  const int64_t whole = V / kW * kW;
  for (int64_t i = 0; i < whole; i += kW) high = vmax(high, load(x + i));
  float most = largest(high);
  for (int64_t i = whole; i < V; i++) most = max(most, to_float(x[i]));
  const vf shift = splat(most);
  vf total = zero(), more = zero();
  int64_t i = 0;
  for (; i + 2 * kW <= V; i += 2 * kW) {
    total += exp(load(x + i) - shift);
    more += exp(load(x + i + kW) - shift);
  }
  float rest = 0;
  for (; i < V; i += kW) {
    const vf e = exp(load_n(x + i, min<int64_t>(kW, V - i)) - shift);
    for (int64_t k = 0; k < min<int64_t>(kW, V - i); k++) rest += e[k];
  }
  const float sums = sum(total + more) + rest, loss = (most - to_float(x[target])) + __builtin_logf(sums);
  const vf inverse = splat(1 / sums);
  const float at_target = exp(splat(to_float(x[target]) - most))[0] / sums - 1;
  for (i = 0; i < whole; i += kW) store(x + i, exp(load(x + i) - shift) * inverse);
  if (i < V) store_n(x + i, exp(load_n(x + i, V - i) - shift) * inverse, V - i);
  put(x + target, at_target);
  return loss;
}

template <class T>
void losses(const LossArgs& a, int thread, int n_threads) {
  const Range mine = split(a.rows, thread, n_threads);
  for (int64_t r = mine.first; r < mine.last; r++) {
    T* x = static_cast<T*>(a.logits) + r * a.step;
    if (a.targets[r] == a.ignored) {
      __builtin_memset(x, 0, a.V * sizeof(T));
      a.losses[r] = 0;
    } else {
      a.losses[r] = row_loss(x, a.V, a.targets[r]);
    }
  }
}

}  // namespace
}  // namespace HYMBA_ISA
}  // namespace hymba

using namespace hymba;
using namespace hymba::HYMBA_ISA;

HYMBA_KERNEL(cross_entropy)(const LossArgs* a) {
  with_type(a->type, [&](auto type) {
    parallel_for((int)a->n_threads, [&](int thread, int n) { losses<decltype(type)>(*a, thread, n); });
  });
}

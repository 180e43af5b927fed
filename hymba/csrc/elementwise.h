// Helpers that several kernels share: loads by element type and dispatch over it.
#pragma once

#include "simd.h"
#include "threads.h"

namespace hymba {
namespace HYMBA_ISA {

template <int V>
struct Integer {
  static constexpr int value = V;
};

template <bool First, class A, class B>
struct Select {
  using type = A;
};
template <class A, class B>
struct Select<false, A, B> {
  using type = B;
};

// Calls f(T{}) with the element type `type` names.
template <class F>
HYMBA_INLINE void with_type(int64_t type, const F& f) {
  if (type == kFloat32)
    f(float{});
  else
    f(bf16{});
}

// Copies n elements to float.
template <class T>
inline void to_floats(float* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + kW <= n; i += kW) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, n - i), n - i);
}

}  // namespace HYMBA_ISA
}  // namespace hymba

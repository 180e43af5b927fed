// Threads and scratch memory for kernels.
//
// Work is split by thread number, never by who comes first, so results are bit-equal from run to run.
//
// The library links no OpenMP: PyTorch brings its own copy, and two in one process get in each other's way. But PyTorch's
// idle threads spin for milliseconds after each of its operations, and other threads would have to wait until they get a
// core (measured on 2 cores: 0.1 to 9 ms for the first parallel call after a matrix product). So where PyTorch's runtime
// is GNU's, its team is borrowed (`hymba_use_openmp`, called by the loader); elsewhere there is a small pool.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hymba {

using Task = void (*)(void* context, int thread, int n_threads);

// Calls task(context, i, n) for i = 0 .. n - 1 and returns when all are done; n is n_threads (the runtime may grant
// fewer). The caller does part 0. Calls from several threads take turns. Must not be called from within a task.
void run_parallel(int n_threads, Task task, void* context);

// parallel_for(n, [&](int thread, int n_threads) { ... })
template <class F>
inline void parallel_for(int n_threads, const F& f) {
  if (n_threads <= 1) {
    f(0, 1);
  } else {
    run_parallel(
        n_threads, [](void* context, int thread, int n) { (*static_cast<const F*>(context))(thread, n); }, (void*)&f);
  }
}

// Waits until all n_threads parts (as the task was told) of the running call have arrived; may be used repeatedly.
void barrier(int n_threads);

// The part [first, last) of `count` items that falls to `thread`; parts differ by one item at most.
struct Range {
  int64_t first, last;
};
inline Range split(int64_t count, int thread, int n_threads) {
  return {count * thread / n_threads, count * (thread + 1) / n_threads};
}

// Memory of the calling thread that lives until its next call with the same slot: 64-byte aligned, not cleared, grows
// and is never given back. Slots keep a kernel's buffers apart.
constexpr int kScratchSlots = 8;
void* scratch(int slot, size_t bytes);

}  // namespace hymba

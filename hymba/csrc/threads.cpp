// Thread pool and scratch memory; see threads.h. Compiled once, for the baseline instruction set.
//
// A worker of the pool spins for a short while after its last task, because kernels come in quick succession, then sleeps
// on a condition variable. After fork() only the forking thread exists in the child: a fresh pool is made there.
#include "threads.h"

#include <pthread.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace hymba {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `done()`, for `kSpin` at most -> whether it came true.
template <class F>
bool spin_until(F done) {
  for (int i = 0; i < 64; i++) {
    if (done()) return true;
    pause();
  }
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; i++) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

class Pool {
 public:
  void run(int n_threads, Task task, void* context) {
    while (static_cast<int>(workers_.size()) < n_threads - 1) start_worker();
    task_ = task, context_ = context, n_threads_ = n_threads;
    pending_.store(n_threads - 1, std::memory_order_relaxed);
    for (int i = 0; i < n_threads - 1; i++) workers_[i]->start();
    task(context, 0, n_threads);
    while (!spin_until([&] { return pending_.load(std::memory_order_acquire) == 0; })) std::this_thread::yield();
  }

 private:
  struct Worker {
    alignas(64) std::atomic<uint32_t> round{0};
    std::atomic<bool> sleeping{false};
    std::mutex mutex;
    std::condition_variable wake;

    // Sequentially consistent on both sides: either the worker sees the new round, or we see that it sleeps.
    void start() {
      round.fetch_add(1);
      if (sleeping.load()) {
        std::lock_guard<std::mutex> lock(mutex);
        wake.notify_one();
      }
    }

    void wait_for_round_after(uint32_t seen) {
      const auto started = [&] { return round.load() != seen; };
      if (spin_until(started)) return;
      std::unique_lock<std::mutex> lock(mutex);
      sleeping.store(true);
      wake.wait(lock, started);
      sleeping.store(false);
    }
  };

  void start_worker() {
    Worker* worker = new Worker;
    workers_.push_back(worker);
    std::thread([this, worker, thread = static_cast<int>(workers_.size())] {
      for (uint32_t seen = 0;; seen++) {
        worker->wait_for_round_after(seen);
        task_(context_, thread, n_threads_);
        pending_.fetch_sub(1, std::memory_order_acq_rel);
      }
    }).detach();
  }

  std::vector<Worker*> workers_;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int n_threads_ = 0;
  alignas(64) std::atomic<int> pending_{0};
};

// What PyTorch's OpenMP runtime offers; null without it, and in a forked child, where GNU's runtime has lost its threads.
using GompParallel = void (*)(void (*)(void*), void*, unsigned n_threads, unsigned flags);
using OmpQuery = int (*)();
std::atomic<GompParallel> gomp_parallel{nullptr};
OmpQuery omp_thread, omp_threads;

struct Job {
  Task task;
  void* context;
};

// Everything that a fork leaves in an unknown state. Never destroyed: workers may wait on it while the process ends.
struct Shared {
  Pool pool;
  std::mutex turn;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<uint32_t> phase{0};
};
std::atomic<Shared*> the_shared{nullptr};

Shared& shared() {
  Shared* mine = the_shared.load(std::memory_order_acquire);
  if (mine == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
      the_shared.store(nullptr);
      gomp_parallel.store(nullptr);
    });
    (void)registered;
    Shared* fresh = new Shared;
    if (the_shared.compare_exchange_strong(mine, fresh)) return *fresh;
    delete fresh;  // another thread was first; nothing has used this one
  }
  return *mine;
}

struct Scratch {
  void* data[kScratchSlots] = {};
  size_t size[kScratchSlots] = {};
  ~Scratch() {
    for (void* p : data) std::free(p);
  }
};

#if defined(__x86_64__)
// Whether there are matrix tiles for bf16 and int8 (AMX), and the system lets this process use them: it must be asked.
bool tiles_allowed() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

void run_parallel(int n_threads, Task task, void* context) {
  if (n_threads <= 1) return task(context, 0, 1);
  Shared& mine = shared();
  std::lock_guard<std::mutex> turn(mine.turn);
  if (const GompParallel parallel = gomp_parallel.load(std::memory_order_acquire)) {
    Job job{task, context};
    parallel(
        [](void* data) {
          const Job* job = static_cast<const Job*>(data);
          job->task(job->context, omp_thread(), omp_threads());
        },
        &job, static_cast<unsigned>(n_threads), 0);
  } else {
    mine.pool.run(n_threads, task, context);
  }
}

void barrier(int n_threads) {
  if (n_threads <= 1) return;
  Shared& mine = shared();
  const uint32_t phase = mine.phase.load(std::memory_order_acquire);
  if (mine.arrived.fetch_add(1, std::memory_order_acq_rel) == n_threads - 1) {
    mine.arrived.store(0, std::memory_order_relaxed);
    mine.phase.fetch_add(1, std::memory_order_release);
  } else {
    while (!spin_until([&] { return mine.phase.load(std::memory_order_acquire) != phase; })) std::this_thread::yield();
  }
}

void* scratch(int slot, size_t bytes) {
  static thread_local Scratch mine;
#if defined(__SANITIZE_ADDRESS__)
  const size_t size = bytes > 0 ? bytes : 1;  // exactly, so that the sanitizer sees what lies beyond
  mine.size[slot] = 0;
#else
  const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
#endif
  if (mine.data[slot] == nullptr || mine.size[slot] < bytes) {
    std::free(mine.data[slot]);
    mine.size[slot] = 0;
    mine.data[slot] = nullptr;
    if (posix_memalign(&mine.data[slot], 64, size) != 0) std::abort();
    mine.size[slot] = size;
  }
  return mine.data[slot];
}

}  // namespace hymba

// The instruction sets that this processor runs, best first, separated by blanks.
extern "C" __attribute__((visibility("default"))) const char* hymba_isas() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
      return hymba::tiles_allowed() ? "amx avx512_bf16 avx512 avx2 baseline" : "avx512_bf16 avx512 avx2 baseline";
    return "avx512 avx2 baseline";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2 baseline";
#endif
  return "baseline";
}

// Takes threads from an OpenMP runtime with GNU's interface: the addresses of GOMP_parallel, omp_get_thread_num and
// omp_get_num_threads. Three nulls: the library's own pool again.
extern "C" __attribute__((visibility("default"))) void hymba_use_openmp(void* parallel, void* thread, void* threads) {
  hymba::shared();  // so that a fork resets what is set here
  hymba::omp_thread = reinterpret_cast<hymba::OmpQuery>(thread);
  hymba::omp_threads = reinterpret_cast<hymba::OmpQuery>(threads);
  hymba::gomp_parallel.store(reinterpret_cast<hymba::GompParallel>(parallel), std::memory_order_release);
}

// Runs an empty task on n_threads; tests and benchmarks measure what a parallel call costs.
extern "C" __attribute__((visibility("default"))) void hymba_noop(int n_threads) {
  hymba::parallel_for(n_threads, [](int, int) {});
}

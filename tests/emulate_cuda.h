// Runs the CUDA C++ of a kernel on a CPU, a fiber for each thread of a block: for tests without a GPU. What threads
// of a warp do together is done here when the last of them has arrived; memory is simply shared. Blocks run one after
// the other, so a kernel must be one in which a block waits for earlier ones only.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static
#define DYNAMIC_SHARED(name) static float4 name[16384]
#define ALL 0xffffffffu
using std::max;
using std::min;

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { int x; };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
};
static std::vector<Fiber> fibers;
static ucontext_t home;
static int current;
static Index threadIdx, blockIdx;

static void pause() {  // the next thread's turn
    int me = current;
    for (int next = (me + 1) % fibers.size();; next = (next + 1) % fibers.size()) {
        if (fibers[next].done) continue;
        if (next == me) return;
        current = threadIdx.x = next;
        swapcontext(&fibers[me].context, &fibers[next].context);
        return;
    }
}

struct Barrier { int arrived = 0, generation = 0; };
static Barrier of_block, of_warp[32];
static void wait(Barrier& barrier, int threads) {
    int generation = barrier.generation;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        barrier.generation++;
    }
    while (barrier.generation == generation) pause();
}
static void __syncwarp() { wait(of_warp[threadIdx.x / 32], 32); }
static void __syncthreads() { wait(of_block, fibers.size()); }

// what every lane gives, seen by all of them
template <class V> static std::vector<V> gathered(V mine) {
    static V board[32][32];
    V* row = board[threadIdx.x / 32];
    row[threadIdx.x % 32] = mine;
    __syncwarp();
    std::vector<V> all(row, row + 32);
    __syncwarp();
    return all;
}
template <class V> static V __shfl_sync(uint32_t, V x, int from) { return gathered(x)[from]; }
template <class V> static V __shfl_xor_sync(uint32_t, V x, int far) { return gathered(x)[threadIdx.x % 32 ^ far]; }
static uint32_t __ballot_sync(uint32_t, bool x) {
    auto all = gathered<int>(x);
    uint32_t found = 0;
    for (int i = 0; i < 32; i++) found |= (uint32_t)all[i] << i;
    return found;
}

static float real(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static uint32_t bits(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
template <class X> static void keep(X&) {}
static float ex2(float x) { return std::exp2(x); }
static float rcp(float x) { return 1.0f / x; }
static float inverse_root(float x) { return 1.0f / std::sqrt(x); }
static float tanh_(float x) { return std::tanh(x); }
static uint16_t bf16(float x) { uint32_t b = bits(x); return (b + 0x7fff + (b >> 16 & 1)) >> 16; }
static uint32_t bf16_pair(float low, float high) { return bf16(low) | (uint32_t)bf16(high) << 16; }
static float half_of(uint32_t x, int which) { return real(which ? x & 0xffff0000u : x << 16); }
static void pack(uint32_t* to, const float (*s)[4]) {
    for (int j = 0; j < 2; j++)
        for (int c = 0; c < 2; c++) to[2 * j + c] = bf16_pair(s[j][2 * c], s[j][2 * c + 1]);
}
static float tf32_of(uint32_t x) { return real(x & 0xffffe000u); }

// the layouts of "Warp-level matrix fragments" in the PTX manual
template <class F> static void each_of_mine(float* d, F product) {
    int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) d[i] += product(lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2);
}
static void mma4(float* d, uint32_t a0, uint32_t a1, uint32_t b0) {
    auto a = gathered(std::make_pair(a0, a1));
    auto b = gathered(b0);
    each_of_mine(d, [&](int row, int column) {
        float sum = 0;
        for (int k = 0; k < 4; k++) {
            auto& pair = a[row % 8 * 4 + k];
            sum += tf32_of(row < 8 ? pair.first : pair.second) * tf32_of(b[column * 4 + k]);
        }
        return sum;
    });
}
struct Quad { uint32_t x[4]; };
static void mma16(float* d, const uint32_t* a, const uint32_t* b) {
    auto as = gathered(Quad{{a[0], a[1], a[2], a[3]}});
    auto bs = gathered(std::make_pair(b[0], b[1]));
    each_of_mine(d, [&](int row, int column) {
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            float left = half_of(as[row % 8 * 4 + k % 8 / 2].x[row / 8 + 2 * (k / 8)], k % 2);
            auto& pair = bs[column * 4 + k % 8 / 2];
            sum += left * half_of(k < 8 ? pair.first : pair.second, k % 2);
        }
        return sum;
    });
}
static void first_mma16(float* d, const uint32_t* a, const uint32_t* b) {
    for (int i = 0; i < 4; i++) d[i] = 0;
    mma16(d, a, b);
}
static uint32_t transposed(uint32_t x) {
    auto all = gathered(x);
    int lane = threadIdx.x % 32, row = lane / 4;
    auto at = [&](int r, int c) { return all[r * 4 + c / 2] >> 16 * (c % 2) & 0xffff; };
    return at(lane % 4 * 2, row) | at(lane % 4 * 2 + 1, row) << 16;
}

static int read_flag(const int* flag) { return *flag; }
static void write_flag(int* flag, int value) { *flag = value; }
static float4 read_far(const float4* x) { return *x; }
static void copy16(void* to, const char* from, bool real) {
    if (real) memcpy(to, from, 16);
    else memset(to, 0, 16);
}
static void copies_end() {}
template <int N> static void copies_wait() {}
static void next_may_begin() {}
static void inputs_ready() {}
static void copies_expected(void*, uint32_t) {}
static void copy_begins(void* to, const void* from, uint32_t bytes, void*) { memcpy(to, from, bytes); }
static void copies_arrived(void*) {}

static std::function<void()> body;
static void enter() {
    body();
    fibers[current].done = true;
    for (size_t next = 0; next < fibers.size(); next++)
        if (!fibers[next].done) {
            current = threadIdx.x = next;
            setcontext(&fibers[next].context);
        }
    setcontext(&home);
}

// run kernel(arguments...) with `blocks` of `threads`
template <class... P, size_t... I>
static void run(void (*kernel)(P...), void** arguments, int blocks, int threads, std::index_sequence<I...>) {
    body = [=] { kernel(*(P*)arguments[I]...); };
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        fibers = std::vector<Fiber>(threads);
        for (auto& fiber : fibers) {
            fiber.stack.resize(1 << 18);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            makecontext(&fiber.context, enter, 0);
        }
        current = threadIdx.x = 0;
        swapcontext(&home, &fibers[0].context);
    }
}
template <class... P> static void run(void (*kernel)(P...), void** arguments, int blocks, int threads) {
    run(kernel, arguments, blocks, threads, std::index_sequence_for<P...>());
}

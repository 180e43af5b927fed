// y = W x for one vector x, with what stands before and after it: `step.gemv` has the forms, gemv_cuda.py calls this.
//
// A batch of one reads each weight once, and lasts as long as that if memory never waits. The kernels of a step overlap
// ("Programmatic Dependent Launch", CUDA C++ Programming Guide): once all blocks of a kernel have said `next_may_begin`,
// the next one's come onto the card as room allows, and stay at `inputs_ready` until the kernel before is done. So a
// block asks for its rows first, and waits for x afterwards. Room limits how far ahead that reaches: registers hold
// little more than the next product's weights, the shared memory of an H100 holds 30 MB, which are read in 10 us. So
// rows come by bulk copies to shared memory ("Asynchronous Data Copies", ibid.), which take no registers, and leave them
// to the kernels between the products.
//
// A block owns ROWS rows, and all of its threads share each row: x is then read, normed and widened once in a block.
// Sums over threads are taken in a fixed order. float32: everything between load and store.
//
// Compiled when it is first needed (cuda.py), with these macros:
//     TYPE    of x, weights and residual: 0 float32, 1 bfloat16; OUT of y: 0 float32, 1 as TYPE
//     K, ROWS, WARPS of a block; a row is a multiple of 16 bytes, ROWS a power of two
//     NORM    x is normed; MEAN numbers of `squares`, if x is the mean of two normed branches, else 0
//     ACTIVATION  0 none, 1 SiLU(W x) (W2 x), 2 relu(W x)^2; RESIDUAL is added

#define LOG2E 1.4426950408889634f

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#ifndef EMULATED
#define ALL 0xffffffffu
#define DYNAMIC_SHARED(name) extern __shared__ float4 name[]
__device__ inline float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ inline u32 bits(float x) { return __float_as_uint(x); }
__device__ inline float real(u32 x) { return __uint_as_float(x); }
__device__ inline u16 bf16(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ inline float inverse_root(float x) { return rsqrtf(x); }
__device__ inline float4 read_far(const float4* x) { return __ldcg(x); }  // past the first cache: read once
__device__ inline void next_may_begin() { asm volatile("griddepcontrol.launch_dependents;" : : : "memory"); }
__device__ inline void inputs_ready() { asm volatile("griddepcontrol.wait;" : : : "memory"); }
__device__ inline u32 in_shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// `full` counts the bytes that bulk copies have brought
__device__ inline void copies_expected(u64* full, u32 bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n"
                 "fence.mbarrier_init.release.cluster;\n"
                 "fence.proxy.async.shared::cta;\n"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 : : "r"(in_shared(full)), "r"(bytes) : "memory");
}
// what is read once is the first to leave the second cache
__device__ inline void copy_begins(void* to, const void* from, u32 bytes, u64* full) {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;"
                 : : "r"(in_shared(to)), "l"(from), "r"(bytes), "r"(in_shared(full)), "l"(policy) : "memory");
}
__device__ inline void copies_arrived(u64* full) {
    asm volatile("{ .reg .pred done;\n"
                 "again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
                 "@!done bra again%=; }" : : "r"(in_shared(full)) : "memory");
}
#endif

#if TYPE == 0
typedef float element;
#else
typedef u16 element;
#endif
#if OUT == 0
typedef float output;
#else
typedef element output;
#endif

__device__ inline float value(float x) { return x; }
__device__ inline float value(u16 x) { return real((u32)x << 16); }
__device__ inline void put(float* to, float x) { *to = x; }
__device__ inline void put(u16* to, float x) { *to = bf16(x); }

constexpr int WARP = 32, THREADS = WARP * WARPS;
constexpr int WIDE = 16 / sizeof(element);  // numbers of a piece: a thread's load
constexpr int PIECES = K / WIDE, STEPS = (PIECES + THREADS - 1) / THREADS;
constexpr int MATRICES = ACTIVATION == 1 ? 2 : 1, SUMS = MATRICES * ROWS;

__device__ inline void widen(float4 piece, float* x) {
    const u32 words[4] = {bits(piece.x), bits(piece.y), bits(piece.z), bits(piece.w)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (WIDE == 8) x[2 * i] = real(words[i] << 16), x[2 * i + 1] = real(words[i] & 0xffff0000u);
        else x[i] = real(words[i]);
    }
}

__device__ inline float over_warp(float x) {
    for (int far = WARP / 2; far; far /= 2) x += __shfl_xor_sync(ALL, x, far);
    return x;
}

// Sums over a warp of SUMS numbers (a power of two), of which lane l < SUMS gets the one that is returned in `which`:
// lanes exchange halves, so that a number takes one exchange or two, and not five.
__device__ inline float sums_over_warp(float* x, int lane, int* which) {
    int far = 1;
    *which = 0;
#pragma unroll
    for (int n = SUMS / 2; n; n /= 2, far *= 2) {
        const bool upper = lane & far;
        *which += upper ? n : 0;
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float kept = upper ? x[n + i] : x[i], given = upper ? x[i] : x[n + i];
            x[i] = kept + __shfl_xor_sync(ALL, given, far);
        }
    }
#pragma unroll
    for (; far < WARP; far *= 2) x[0] += __shfl_xor_sync(ALL, x[0], far);
    return x[0];
}

extern "C" __global__ void __launch_bounds__(THREADS) gemv(
    const element* x, const element* x_norm, const element* x2, const float* squares, int heads, const element* w,
    const element* w2, const element* residual, output* y, int rows, float eps) {
    DYNAMIC_SHARED(tile);  // (MATRICES, ROWS, PIECES)
    __shared__ u64 full;
    __shared__ float parts[WARPS][SUMS + 1];
    next_may_begin();
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int first = blockIdx.x * ROWS, count = min(ROWS, rows - first);
    if (thread == 0) {
        const u32 bytes = count * K * (u32)sizeof(element);
        copies_expected(&full, MATRICES * bytes);
        copy_begins(tile, w + (u64)first * K, bytes, &full);
        if (MATRICES == 2) copy_begins(tile + ROWS * PIECES, w2 + (u64)first * K, bytes, &full);
    }
    const float4 nothing = make_float4(0, 0, 0, 0);
    float4 norms[STEPS], inputs[STEPS], others[STEPS];
    if (NORM) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int p = i * THREADS + thread;
            norms[i] = p < PIECES ? ((const float4*)x_norm)[p] : nothing;
        }
    }
    __syncthreads();  // everybody may look at `full`
    inputs_ready();
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int p = i * THREADS + thread;
        inputs[i] = p < PIECES ? read_far((const float4*)x + p) : nothing;
        if (MEAN) others[i] = p < PIECES ? read_far((const float4*)x2 + p) : nothing;
    }
    float added = 0, share = 0, share2 = 0;
    if (RESIDUAL && thread < count) added = value(residual[first + thread]);
    if (MEAN) {
#pragma unroll
        for (int i = 0; i < (MEAN + WARP - 1) / WARP; i++) {
            const int at = i * WARP + lane;
            const float square = at < MEAN ? squares[at] : 0;
            share += at < heads ? square : 0, share2 += at < heads ? 0 : square;
        }
        share = 0.5f * inverse_root(over_warp(share) * (1.0f / K) + eps);
        share2 = 0.5f * inverse_root(over_warp(share2) * (1.0f / K) + eps);
    }
    float sums[SUMS], square = 0;
#pragma unroll
    for (int r = 0; r < SUMS; r++) sums[r] = 0;
    copies_arrived(&full);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int p = i * THREADS + thread;
        if (p >= PIECES) break;
        float in[WIDE], other[WIDE];
        widen(inputs[i], in);
        if (NORM || MEAN) widen(NORM ? norms[i] : others[i], other);
#pragma unroll
        for (int j = 0; j < WIDE; j++) {
            if (NORM) square += in[j] * in[j], in[j] *= other[j];
            if (MEAN) in[j] = in[j] * share + other[j] * share2;
        }
#pragma unroll
        for (int r = 0; r < SUMS; r++) {
            float weights[WIDE];
            widen(tile[r * PIECES + p], weights);
#pragma unroll
            for (int j = 0; j < WIDE; j++) sums[r] += weights[j] * in[j];
        }
    }
    int which;
    const float sum = sums_over_warp(sums, lane, &which);
    if (lane < SUMS) parts[warp][which] = sum;
    if (NORM) {
        square = over_warp(square);
        if (lane == 0) parts[warp][SUMS] = square;
    }
    __syncthreads();
    if (thread >= count) return;
    float out = 0, up = 0;
    square = 0;
    for (int i = 0; i < WARPS; i++) {
        out += parts[i][thread];
        if (MATRICES == 2) up += parts[i][ROWS + thread];
        if (NORM) square += parts[i][SUMS];
    }
    const float scale = NORM ? inverse_root(square * (1.0f / K) + eps) : 1;
    out *= scale;
    if (ACTIVATION == 1) out = out / (1 + ex2(-LOG2E * out)) * up * scale;
    if (ACTIVATION == 2) out = max(out, 0.0f), out *= out;
    put(y + first + thread, out + added);
}

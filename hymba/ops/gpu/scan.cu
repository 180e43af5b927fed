// Selective scan for N = 16 states, forward and backward, in CUDA C++; scan.py has the mathematics and calls this.
//
// Compiled when it is first needed (cuda.py), with these macros:
//     TYPE     of u, dt, gate, B, C, y and their gradients: 0 float32 (forward only), 1 bfloat16
//     PARAM    of dt_bias and D: 0 float32, 1 as TYPE
//     STARTS   rows hold documents, KEEP the forward pass leaves the state in front of every group
//
// Tiling. A warp owns 16 channels of a row, all states of them in registers, as the matrix unit lays out its
// accumulators: lane 4 g + q has channels 2 g and 2 g + 1 (rows g and g + 8 of a 16 x 8 tile) and states 2 q, 2 q + 1,
// 8 + 2 q, 9 + 2 q (columns of two tiles). So the outer product B_t (delta_t u_t) is added, and sums over states are
// taken, by the matrix unit, and a state costs two multiplications and an exponential. Steps go in groups of 8; what
// is done per channel and step alone, lane (g, q) does for steps 2 q and 2 q + 1 of its two channels. The matrix unit
// multiplies in TF32 what is added to a state, and in bfloat16 what is summed for an output; for float32 inputs
// multiply-adds and shuffles take its place.
//
// A block of 4 warps walks along chains, 64 channels of a row each. Inputs come to shared memory by asynchronous copies
// of 16 bytes, whole lines of 128 bytes together, some groups ahead.
//
// Balance. 8 rows of 3200 channels are 400 chains, and an H100 has room for 396 blocks: one each would leave it nearly
// idle half of the time. So chains lie end to end and are cut into equal stretches, one for each block (`Parts`).
//
// The exponential unit takes 8 cycles for a warp, as long as 8 other instructions. POLYNOMIAL of a lane's 8
// exponentials are computed by multiply-adds instead.

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define GROUP 8
#define WARPS 4   // of a block
#define THREADS (32 * WARPS)
#ifndef POLYNOMIAL
#define POLYNOMIAL 1
#endif

typedef unsigned int u32;
typedef unsigned short u16;

#ifndef EMULATED
__device__ inline float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ inline float rcp(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ inline float tanh_(float x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ inline u32 bits(float x) { return __float_as_uint(x); }
__device__ inline float real(u32 x) { return __uint_as_float(x); }
// d (16 x 8) += a (16 x 4) b (4 x 8)
__device__ inline void mma4(float* d, u32 a0, u32 a1, u32 b0) {
    asm volatile("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
}
// d (16 x 8) += a (16 x 16) b (16 x 8) in bfloat16
__device__ inline void mma16(float* d, const u32* a, const u32* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d (16 x 8) = a (16 x 16) b (16 x 8)
__device__ inline void first_mma16(float* d, const u32* a, const u32* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}
__device__ inline u32 bf16_pair(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
// two tiles of an accumulator as the first factor of a product in bfloat16
__device__ inline void pack(u32* to, const float (*s)[4]) {
    for (int j = 0; j < 2; j++)
        for (int c = 0; c < 2; c++) to[2 * j + c] = bf16_pair(s[j][2 * c], s[j][2 * c + 1]);
}
// an 8 x 8 matrix of 16-bit numbers, a pair of a row in each lane, transposed
__device__ inline u32 transposed(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ inline int read_flag(const int* flag) {
    int y;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(y) : "l"(flag) : "memory");
    return y;
}
__device__ inline void write_flag(int* flag, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(flag), "r"(value) : "memory");
}
__device__ inline float4 read_far(const float4* x) { return __ldcg(x); }  // another multiprocessor may have written it
__device__ inline void pause() {}
// computed once: the compiler would rather do it again in every group
__device__ inline void keep(u32& x) { asm volatile("" : "+r"(x)); }
__device__ inline void keep(int& x) { asm volatile("" : "+r"(x)); }
__device__ inline void keep(const char*& x) { asm volatile("" : "+l"(x)); }
// 16 bytes to shared memory, zeros unless `real`
__device__ inline void copy16(void* to, const char* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 : : "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ inline void copies_end() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int N> __device__ inline void copies_wait() { asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"); }
#define ALL 0xffffffffu
#define DYNAMIC_SHARED(name) extern __shared__ float4 name[]
#endif

#if TYPE == 0
typedef float element;
typedef float2 pair;
#else
typedef u16 element;
typedef u32 pair;
#endif
#if PARAM
typedef element parameter;
#else
typedef float parameter;
#endif

__device__ inline float value(float x) { return x; }
__device__ inline float value(u16 x) { return real((u32)x << 16); }
__device__ inline float low(float2 x) { return x.x; }
__device__ inline float high(float2 x) { return x.y; }
__device__ inline float low(u32 x) { return real(x << 16); }
__device__ inline float high(u32 x) { return real(x & 0xffff0000u); }
#if TYPE == 0
__device__ inline pair packed(float a, float b) { return make_float2(a, b); }
#else
__device__ inline pair packed(float a, float b) { return bf16_pair(a, b); }
#endif

__device__ inline float4 packed4(const float* x) { return make_float4(x[0], x[1], x[2], x[3]); }
__device__ inline void unpacked(float* to, float4 x) { to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w; }

// rounded to what the matrix unit takes, which cuts off the rest
__device__ inline u32 tf32(float x) { return bits(x) + 0x1000; }

// element `at` of x; 32 bits are enough for what tensors have, and save an instruction
template <class V, class X> __device__ inline V get(const X* x, u32 at) {
    return *(const V*)((const char*)x + at * (u32)sizeof(X));
}
template <class V, class X> __device__ inline void put(X* x, u32 at, V value) {
    *(V*)((char*)x + at * (u32)sizeof(X)) = value;
}

__device__ inline float sigmoid(float x) {
#if TYPE == 0
    return rcp(1.0f + ex2(-LOG2E * x));
#else
    return 0.5f * tanh_(0.5f * x) + 0.5f;
#endif
}

// log(1 + exp(x))
__device__ inline float softplus(float x) {
    float e = ex2(-LOG2E * fabsf(x));
#if TYPE == 0
    // 2 atanh(z): the unit's logarithm has an absolute error, which near 1, where small steps live, is a large relative one
    float z = e * rcp(2.0f + e), s = z * z;
    float p = 2.0f / 15;
    p = p * s + 2.0f / 13;
    p = p * s + 2.0f / 11;
    p = p * s + 2.0f / 9;
    p = p * s + 2.0f / 7;
    p = p * s + 2.0f / 5;
    p = p * s + 2.0f / 3;
    p = p * s + 2.0f;
    float y = p * z;
#else
    float y = (((0.041347f * e - 0.157427f) * e + 0.306301f) * e - 0.496978f) * e + 0.999943f;
    y *= e;  // log(1 + e) to 6e-5
#endif
    return fmaxf(x, 0.0f) + y;
}

// 2^(delta rate) <= 1 by multiply-adds; the slope at 0 is exact to 4e-4, as 16-bit inputs are
__device__ inline float power(float delta, float rate) {
    float x = fmaxf(delta * rate, -126.0f);
    float shifted = x + 12582912.0f;  // 1.5 2^23: the whole part is in the low bits now
    float f = x - (shifted - 12582912.0f);
    float p = (0.055504f * f + 0.242029f) * f + 0.693178f;
    p = p * f + 1.0f;
    return real(bits(p) + (bits(shifted) << 23));
}

// what one lane knows of its two channels and eight states
struct Lane {
    int g, q, e;
    bool real;  // false in lanes beyond the last channel, which work on the last one and write nothing
    float rate[2][4], bias[2], skip[2];

    __device__ Lane(int lane, int tile, int E, const float* A, const parameter* dt_bias, const parameter* D) {
        g = lane >> 2, q = lane & 3, e = tile * 16 + 2 * g;
        real = e < E;
        e = min(e, E - 2);
        for (int c = 0; c < 2; c++) bias[c] = value(dt_bias[e + c]), skip[c] = value(D[e + c]);
        read(rate, A, 0);
        for (int j = 0; j < 2; j++)
            for (int k = 0; k < 4; k++) rate[j][k] *= LOG2E;
    }
    // of a tensor (.., E, 16) whose channels begin at `base`
    __device__ void read(float (*h)[4], const float* x, u32 base) const {
        for (int j = 0; j < 2; j++)
            for (int c = 0; c < 2; c++) {
                float2 v = get<float2>(x, base + (e + c) * 16 + 8 * j + 2 * q);
                h[j][2 * c] = v.x, h[j][2 * c + 1] = v.y;
            }
    }
    __device__ void write(float* x, u32 base, const float (*h)[4]) const {
        if (!real) return;
        for (int j = 0; j < 2; j++)
            for (int c = 0; c < 2; c++)
                put(x, base + (e + c) * 16 + 8 * j + 2 * q, make_float2(h[j][2 * c], h[j][2 * c + 1]));
    }
    // h of one step: decayed by a, which is left there if wanted: backward, where the exponential unit has time for all
    __device__ void decay(float (*h)[4], float2 delta, float (*a)[4]) const {
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float d = k < 2 ? delta.x : delta.y;
                float factor = TYPE != 0 && !a && j * 4 + k < POLYNOMIAL ? power(d, rate[j][k]) : ex2(d * rate[j][k]);
                h[j][k] *= factor;
                if (a) a[j][k] = factor;
            }
    }
};

// A mask instead of a choice: with a choice before a product of matrices, the compiler may put the product into both of
// its branches, where lanes of a warp wait for each other for ever.
__device__ inline u32 only(bool chosen) {
    u32 mask = 0u - (u32)chosen;
    keep(mask);
    return mask;
}
__device__ inline float choice(u32 mask, float a, float b) { return real((bits(a) & mask) | (bits(b) & ~mask)); }
// delta where a step counts, 0 where it does not, whatever stands there
__device__ inline float kept_if(bool counts, float delta) { return real(bits(delta) & only(counts)); }

// Parts of chains that a block walks, one after the other. Chains, `length` steps each, lie end to end, and a block has a
// stretch of them, no shorter than one. It starts with the beginning of the chain in which its stretch ends, and leaves
// the state there behind a flag; last comes the rest of the chain in which its stretch begins, whose beginning the block
// before has walked first of all, and long ago. So hardly anybody waits, and nobody for a block that comes later.
struct Parts {
    int length, first, offset, stop, rest, number;
    int chain, begin, end;                  // the part at hand, in steps from where walks along its chain begin

    __device__ Parts(int chains, int length, int stretch) : length(length) {
        int from = min((int)blockIdx.x * stretch, chains * length), to = min(from + stretch, chains * length);
        first = from / length, offset = from % length, stop = to / length, rest = to % length;
        number = rest ? -1 : 0;
    }
    __device__ bool next() {
        int whole = first + (offset > 0), n = number++;
        begin = 0, end = length;
        if (n < 0) {
            chain = stop, end = rest;
            return true;
        }
        chain = whole + n;
        if (chain < stop) return true;
        // the rest of the first chain, once
        begin = offset, offset = 0;
        chain = first;
        return begin > 0;
    }
    // until the block before has left what is carried along the chain
    __device__ void wait(const int* flags) const {
        if (threadIdx.x == 0)
            while (read_flag(flags + chain) == 0) pause();
        __syncthreads();
    }
    __device__ void leave(int* flags) const {
        __syncthreads();
        if (threadIdx.x == 0) write_flag(flags + chain, 1);
    }
};

// Inputs of a group of steps, of a block's channels: a row for each step, even steps first. Whole rows come by one copy;
// pieces of 32 bytes stand in another order in each pair of steps, so that lanes read different banks.
enum Input { DT, U, GATE, DY };
enum States { B_, C_ };
template <int INPUTS> struct alignas(128) Stage {
    element x[INPUTS][GROUP][16 * WARPS], states_of[2][GROUP][16];

    static __device__ int slot(int step) { return (step & 1) * 4 + step / 2; }
    // where byte `at` of a step's row is
    static __device__ int place(int step, int at) { return at ^ step / 2 * 32; }
};

// where a lane looks in a stage
template <int INPUTS> struct View {
    static const int ROW = 16 * WARPS * sizeof(element), STATES = INPUTS * GROUP * ROW;
    u32 mine, state_at, states_at;  // bytes

    __device__ View(int warp, int g, int q) {
        mine = q * ROW + Stage<INPUTS>::place(2 * q, (warp * 16 + 2 * g) * sizeof(element));
        state_at = STATES + (q * 16 + g) * sizeof(element);
        states_at = STATES + 2 * q * sizeof(element);
    }
    // of step 2 q + half, channels 2 g and 2 g + 1
    __device__ pair channels(const Stage<INPUTS>& in, Input which, int half) const {
        return *(const pair*)((const char*)&in + mine + (which * GROUP + half * 4) * ROW);
    }
    // of step 2 q + half, state 8 j + g
    __device__ float state(const Stage<INPUTS>& in, States which, int half, int j) const {
        return value(*(const element*)((const char*)&in + state_at + ((which * GROUP + half * 4) * 16 + 8 * j) * sizeof(element)));
    }
    // of any step, states 2 q + n and 2 q + n + 1
    __device__ pair states(const Stage<INPUTS>& in, States which, int step, int n) const {
        return *(const pair*)((const char*)&in + states_at + ((which * GROUP + Stage<INPUTS>::slot(step)) * 16 + n) * sizeof(element));
    }
};

// an index into registers would put them into memory
template <class X> __device__ inline X pick(const X (&x)[4], int i) {
    return i < 2 ? i == 0 ? x[0] : x[1] : i == 2 ? x[2] : x[3];
}

// Copies inputs to a stage, 16 bytes a lane: a warp each input, and the last warp B and C.
template <int INPUTS> struct Loader {
    static const int SIZE = 16 / sizeof(element), ROW = 16 * WARPS / SIZE, STATE_ROW = 16 / SIZE;  // pieces of a step
    static const int STEPS = 32 / ROW, COPIES = GROUP / STEPS;  // steps of a copy
    static const int STATE_COPIES = 2 * GROUP * STATE_ROW / 32;
    const char *from, *from_states[STATE_COPIES];
    u32 step, to, to_states;  // bytes
    int last, last_states;    // how far t0 may go

    // x, from where the row begins, and its step: of the warp's input; channel: the block's first of E
    __device__ Loader(const element* x, u32 x_step, u32 channel, u32 E, const element* B, const element* C, int end) {
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, at = lane % ROW * SIZE, r = lane / ROW;
        from = (const char*)(x + channel + at) + (unsigned long long)r * x_step * sizeof(element);
        step = x_step * (u32)sizeof(element);
        to = (warp * GROUP + Stage<INPUTS>::slot(r)) * View<INPUTS>::ROW + Stage<INPUTS>::place(r, at * sizeof(element));
        // zeros for channels that do not exist
        last = channel + at < E ? end - r : -(1 << 30);
        r = lane / STATE_ROW % GROUP, at = lane % STATE_ROW * SIZE;
        bool of_C = lane >= GROUP * STATE_ROW;
        for (int k = 0; k < STATE_COPIES; k++) from_states[k] = (const char*)((of_C || k ? C : B) + r * 16 + at);
        to_states = View<INPUTS>::STATES + ((of_C * GROUP + Stage<INPUTS>::slot(r)) * 16 + at) * sizeof(element);
        last_states = end - r;
    }
    __device__ void kept() {
        keep(from), keep(step), keep(to), keep(to_states), keep(last), keep(last_states);
        for (int k = 0; k < STATE_COPIES; k++) keep(from_states[k]);
    }
    // whole: the group's steps all exist, which spares the asking
    __device__ void load(Stage<INPUTS>* stage, int t0, bool whole = false) const {
        if (INPUTS == WARPS || threadIdx.x < INPUTS * 32)
            for (int k = 0; k < COPIES; k++) {
                bool inside = whole ? last > 0 : t0 + k * STEPS < last;
                copy16((char*)stage + Stage<INPUTS>::place(k * STEPS, to) + k * STEPS / 2 * View<INPUTS>::ROW,
                       from + (unsigned long long)(u32)(inside || whole ? t0 + k * STEPS : 0) * step, inside);
            }
        if (threadIdx.x >= THREADS - 32)
            for (int k = 0; k < STATE_COPIES; k++) {
                bool inside = whole || t0 < last_states;
                copy16((char*)stage + to_states + k * GROUP * 16 * sizeof(element),
                       from_states[k] + (u32)(inside ? t0 : 0) * (u32)(16 * sizeof(element)), inside);
            }
    }
};

// which of the group's steps begin a document, bit by bit
__device__ inline u32 document_starts(const unsigned char* starts, u32 row, int t0, int T, int lane) {
    bool begins = lane < GROUP && t0 + lane < T && starts[row * T + t0 + lane];
    return __ballot_sync(ALL, begins);
}

// kept: (rows, chains of a row, groups, 2, threads) and carry: (chains, 2, threads), as threads hold them
extern "C" __global__ void __launch_bounds__(THREADS, 3) scan_forward(
    const element* u, const element* dt, const element* gate, const element* B, const element* C,
    const parameter* dt_bias, const float* A, const parameter* D, const float* state, const unsigned char* starts,
    const long long* lengths, element* y, float* last, float4* kept, float4* carry, int* flags, int rows, int T, int E,
    u32 u_row, u32 u_step, u32 dt_row, u32 dt_step, u32 gate_row, u32 gate_step, u32 state_row, int per_row,
    int stretch) {
    const int STAGES = 3;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, groups = (T + GROUP - 1) / GROUP;
    __shared__ Stage<3> stages[STAGES];
    // of each warp: delta of the channels of g, and what else a step needs of all its lanes
#if TYPE == 0
    __shared__ float4 shared[WARPS][GROUP][8];
#else
    __shared__ float2 shared[WARPS][GROUP][8];
#endif
    for (Parts part(rows * per_row, groups * GROUP, stretch); part.next();) {
        int block = part.chain % per_row, begin = part.begin, end = min(part.end, T);
        u32 row = part.chain / per_row;
        Lane my(lane, block * WARPS + warp, E, A, dt_bias, D);
        int g = my.g, q = my.q;
        int limit = lengths ? (int)min((long long)T, lengths[row]) : T;
        const element* inputs[4] = {dt + row * dt_row, u + row * u_row, gate + row * gate_row, dt};
        const u32 steps[4] = {dt_step, u_step, gate_step, 0};
        Loader<3> loader(pick(inputs, warp), pick(steps, warp), block * 16 * WARPS, E, B + row * T * 16, C + row * T * 16,
                         end);
        View<3> view(warp, g, q);
        loader.kept();
        keep(view.mine), keep(view.state_at), keep(view.states_at);
        copies_wait<0>();  // those beyond the last part's end, which must not come after the new ones
        __syncthreads();   // the stages are free
        for (int k = 0; k < STAGES - 1; k++) {
            loader.load(&stages[k], begin + k * GROUP);
            copies_end();
        }
        float h[2][4];
        float4* left = carry + (u32)part.chain * 2 * THREADS + threadIdx.x;
        if (begin == 0) {
            my.read(h, state, row * state_row);
        } else {
            part.wait(flags);
            for (int j = 0; j < 2; j++) unpacked(h[j], read_far(left + j * THREADS));
        }
        int number = 0;
        u32 out_at = (row * T + begin + 2 * q) * E + my.e;
        for (int t0 = begin; t0 < end; t0 += GROUP, out_at += GROUP * E) {
            copies_wait<STAGES - 2>();
            __syncthreads();  // all threads' copies are there, and all are done with the stage before
            const Stage<3>& in = stages[number];
            loader.load(&stages[number == 0 ? STAGES - 1 : number - 1], t0 + (STAGES - 1) * GROUP);
            copies_end();
            number = number == STAGES - 1 ? 0 : number + 1;
#if KEEP
            for (int j = 0; j < 2; j++)
                kept[(((u32)part.chain * groups + t0 / GROUP) * 2 + j) * THREADS + threadIdx.x] = packed4(h[j]);
#endif
            float x[2][2];
#if TYPE != 0
            u32 drive[2][2], b[2][2], c[2];
#endif
#pragma unroll
            for (int half = 0; half < 2; half++) {
                pair v = view.channels(in, DT, half), w = view.channels(in, U, half);
                x[half][0] = low(w), x[half][1] = high(w);
                float delta[2] = {low(v), high(v)};
                bool counts = t0 + 2 * q + half < limit;
                for (int k = 0; k < 2; k++) delta[k] = kept_if(counts, softplus(delta[k] + my.bias[k]));
#if TYPE == 0
                shared[warp][2 * q + half][g] =
                    make_float4(delta[0], delta[1], delta[0] * x[half][0], delta[1] * x[half][1]);
#else
                shared[warp][2 * q + half][g] = make_float2(delta[0], delta[1]);
                c[half] = view.states(in, C_, g, 8 * half);
                for (int k = 0; k < 2; k++) {
                    drive[half][k] = tf32(delta[k] * x[half][k]);
                    b[half][k] = bits(view.state(in, B_, half, k));
                }
#endif
            }
            u32 begins = STARTS ? document_starts(starts, row, t0, T, lane) : 0;
            __syncwarp();
            float out[2][2] = {};  // steps 2 q and 2 q + 1, two channels
#if TYPE == 0
            float parts[GROUP][2];
#endif
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                if (STARTS && (begins >> i & 1)) my.read(h, state, row * state_row);
#if TYPE == 0
                float4 s = shared[warp][i][g];
                my.decay(h, make_float2(s.x, s.y), nullptr);
                parts[i][0] = parts[i][1] = 0.0f;
                for (int j = 0; j < 2; j++) {
                    float2 b = view.states(in, B_, i, 8 * j), c = view.states(in, C_, i, 8 * j);
                    for (int k = 0; k < 4; k++) {
                        h[j][k] += (k < 2 ? s.z : s.w) * (k & 1 ? b.y : b.x);
                        parts[i][k >> 1] += h[j][k] * (k & 1 ? c.y : c.x);
                    }
                }
#else
                bool mine = q == i / 2;
                my.decay(h, shared[warp][i][g], nullptr);
                for (int j = 0; j < 2; j++) mma4(h[j], drive[i & 1][0], drive[i & 1][1], b[i & 1][j] & only(mine));
                // of these channels, with C of every step of the group; that of this one is wanted
                u32 rounded[4];
                float d[4];
                pack(rounded, h);
                first_mma16(d, rounded, c);
                for (int k = 0; k < 2; k++) out[i & 1][k] = mine ? d[2 * k + (i & 1)] : out[i & 1][k];
#endif
            }
#if TYPE == 0
            // sums over the four lanes of a channel, of which each keeps two steps
            u32 far = only(q & 2), near = only(q & 1);
            float half_sums[4][2];
            for (int i = 0; i < 4; i++)
                for (int k = 0; k < 2; k++)
                    half_sums[i][k] = choice(far, parts[4 + i][k], parts[i][k]) +
                                      __shfl_xor_sync(ALL, choice(far, parts[i][k], parts[4 + i][k]), 2);
            for (int i = 0; i < 2; i++)
                for (int k = 0; k < 2; k++)
                    out[i][k] = choice(near, half_sums[2 + i][k], half_sums[i][k]) +
                                __shfl_xor_sync(ALL, choice(near, half_sums[i][k], half_sums[2 + i][k]), 1);
#endif
#pragma unroll
            for (int half = 0; half < 2; half++) {
                pair v = view.channels(in, GATE, half);
                float z[2] = {low(v), high(v)}, o[2];
                for (int k = 0; k < 2; k++) o[k] = (out[half][k] + x[half][k] * my.skip[k]) * (z[k] * sigmoid(z[k]));
                if (my.real && t0 + 2 * q + half < end) put(y, out_at + half * E, packed(o[0], o[1]));
            }
        }
        if (part.end == part.length) {
            my.write(last, row * E * 16, h);
        } else {
            for (int j = 0; j < 2; j++) left[j * THREADS] = packed4(h[j]);
            part.leave(flags);
        }
    }
}

#if TYPE != 0
struct Shared {
    Stage<4> stages[2];  // of this group and the next
    float4 decays[GROUP][2][THREADS], kept[2][2][THREADS];  // the latter: states in front of this group and the next
    // of steps 2 q and 2 q + 1, at g ^ 2 q, so that lanes use different banks; deltas: of two channels in the first step and
    // in the second; parts of the gradients of B and C: of state g in both steps, and of state g + 8
    float4 deltas[WARPS][GROUP / 2][8], parts[2][WARPS][2][GROUP / 2][8];
};

// Walks backwards. dBC: (chains of a row, 2, rows, T, 16), parts of the gradients of B and C; carry: (chains, 5, threads)
extern "C" __global__ void __launch_bounds__(THREADS, 3) scan_backward(
    const element* u, const element* dt, const element* gate, const element* B, const element* C,
    const parameter* dt_bias, const float* A, const parameter* D, const float* state, const unsigned char* starts,
    const long long* lengths, const float4* kept, const element* dy, const float* dlast, element* du, element* ddt,
    element* dgate, float* dBC, float* dbias, float* dA, float* dD, float* dstate, float4* carry, int* flags, int rows,
    int T, int E, u32 u_row, u32 u_step, u32 dt_row, u32 dt_step, u32 gate_row, u32 gate_step, u32 dy_row, u32 dy_step,
    u32 dgate_row, u32 dgate_step, u32 state_row, int per_row, int stretch) {
    DYNAMIC_SHARED(memory);
    Shared& shared = *(Shared*)memory;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, groups = (T + GROUP - 1) / GROUP;
    int buffer = 0;
    for (Parts part(rows * per_row, groups * GROUP, stretch); part.next();) {
        int block = part.chain % per_row, begin = part.length - part.end, end = min(part.length - part.begin, T);
        u32 row = part.chain / per_row;
        Lane my(lane, block * WARPS + warp, E, A, dt_bias, D);
        int g = my.g, q = my.q;
        int limit = lengths ? (int)min((long long)T, lengths[row]) : T;
        const element* inputs[4] = {dt + row * dt_row, u + row * u_row, gate + row * gate_row, dy + row * dy_row};
        const u32 steps[4] = {dt_step, u_step, gate_step, dy_step};
        Loader<4> loader(pick(inputs, warp), pick(steps, warp), block * 16 * WARPS, E, B + row * T * 16, C + row * T * 16,
                         end);
        View<4> view(warp, g, q);
        loader.kept();
        // of second factors: the column of a step, and the row of steps 2 p and 2 p + 1
        u32 columns[GROUP];
        for (int i = 0; i < GROUP; i++) columns[i] = only(g == i);
        const u32 rows_of[4] = {only(q == 0), only(q == 1), only(q == 2), only(q == 3)};
        auto load = [&](int t0, bool whole) {
            u32 number = (u32)t0 / GROUP;
            loader.load(&shared.stages[number & 1], t0, whole);
            for (int j = 0; j < 2; j++)
                copy16(&shared.kept[number & 1][j][threadIdx.x],
                       (const char*)&kept[(((u32)part.chain * groups + number) * 2 + j) * THREADS + threadIdx.x], true);
            copies_end();
        };
        int last_group = (end - 1) / GROUP * GROUP;
        u32 out_at = (row * T + last_group + 2 * q) * E + my.e;
        u32 dgate_at = row * dgate_row + (last_group + 2 * q) * dgate_step + my.e;
        load(last_group, false);
        float back[2][4], dA_sum[2][4] = {}, dD_sum[2] = {}, dbias_sum[2] = {};
        float4* left = carry + (u32)part.chain * 5 * THREADS + threadIdx.x;
        if (part.begin == 0) {
            my.read(back, dlast, row * E * 16);
            if (!my.real)
                for (int j = 0; j < 2; j++)
                    for (int k = 0; k < 4; k++) back[j][k] = 0.0f;
        } else {
            part.wait(flags);
            for (int j = 0; j < 2; j++) {
                unpacked(back[j], read_far(left + j * THREADS));
                unpacked(dA_sum[j], read_far(left + (2 + j) * THREADS));
            }
            float4 v = read_far(left + 4 * THREADS);
            dD_sum[0] = v.x, dD_sum[1] = v.y, dbias_sum[0] = v.z, dbias_sum[1] = v.w;
        }
        copies_wait<0>();
        __syncthreads();
        for (int t0 = last_group; t0 >= begin;
             t0 -= GROUP, buffer ^= 1, out_at -= GROUP * E, dgate_at -= GROUP * dgate_step) {
            if (t0 > begin) load(t0 - GROUP, true);
            const Stage<4>& in = shared.stages[(u32)t0 / GROUP & 1];
            float h[2][4];
            for (int j = 0; j < 2; j++) unpacked(h[j], shared.kept[(u32)t0 / GROUP & 1][j][threadIdx.x]);
            // of two steps and two channels: u, delta, dy times the gate's SiLU, and dy times its slope
            float x[2][2], delta[2][2], gradient[2][2], of_gate[2][2];
            u32 drive[2][2], b[2][2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                pair v = view.channels(in, DT, half), w = view.channels(in, U, half);
                pair z_pair = view.channels(in, GATE, half), dy_pair = view.channels(in, DY, half);
                x[half][0] = low(w), x[half][1] = high(w);
                delta[half][0] = low(v), delta[half][1] = high(v);
                bool counts = t0 + 2 * q + half < limit;
                for (int k = 0; k < 2; k++) {
                    delta[half][k] = kept_if(counts, softplus(delta[half][k] + my.bias[k]));
                    drive[half][k] = tf32(delta[half][k] * x[half][k]);
                    b[half][k] = bits(view.state(in, B_, half, k));
                    float z = k ? high(z_pair) : low(z_pair), s = sigmoid(z), dout = s * (k ? high(dy_pair) : low(dy_pair));
                    gradient[half][k] = dout * z;
                    of_gate[half][k] = dout + gradient[half][k] * (1.0f - s);
                }
            }
            shared.deltas[warp][q][g ^ 2 * q] = make_float4(delta[0][0], delta[0][1], delta[1][0], delta[1][1]);
            // Sums over states or channels, of a step in its column. All steps are added up, each with zeros in the others'
            // columns, so that lane (g, q) ends with the sums of steps 2 q and 2 q + 1, and nothing passes through memory.
            auto over_states = [&](float* d, const u32* s, const u32* with, int i) {
                u32 column[2] = {with[0] & columns[i], with[1] & columns[i]};
                mma16(d, s, column);
            };
            auto over_channels = [&](float* d, const u32* s, const u32* with, int i) {
                u32 m[4] = {transposed(s[0]), transposed(s[2]), transposed(s[1]), transposed(s[3])};
                over_states(d, m, with, i);
            };
            u32 with_c[2] = {view.states(in, C_, g, 0), view.states(in, C_, g, 8)};
            __syncwarp();
            u32 begins = STARTS ? document_starts(starts, row, t0, T, lane) : 0;
            u32 states[GROUP + 1][4];  // in front of each step, and behind the last
            float4 deltas, ahead = shared.deltas[warp][0][g];  // stores to memory keep the compiler from asking for it earlier
            float ungated[4] = {};
            pack(states[0], h);
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const int half = i & 1;
                if (STARTS && (begins >> i & 1)) my.read(h, state, row * state_row);
                if (!half) {
                    deltas = ahead;
                    if (i < GROUP - 2) ahead = shared.deltas[warp][i / 2 + 1][g ^ (i + 2)];
                }
                float a[2][4];
                my.decay(h, half ? make_float2(deltas.z, deltas.w) : make_float2(deltas.x, deltas.y), a);
                for (int j = 0; j < 2; j++) {
                    mma4(h[j], drive[half][0], drive[half][1], b[half][j] & rows_of[i / 2]);
                    shared.decays[i][j][threadIdx.x] = packed4(a[j]);
                }
                pack(states[i + 1], h);
                over_states(ungated, states[i + 1], with_c, i);
            }
            u32 c[2][2], with_b[2], with_drive[2], with_gradient[2];
            for (int k = 0; k < 2; k++) {
                with_b[k] = view.states(in, B_, g, 8 * k);
                with_drive[k] = transposed(bf16_pair(delta[0][k] * x[0][k], delta[1][k] * x[1][k]));
                with_gradient[k] = transposed(bf16_pair(gradient[0][k], gradient[1][k]));
                for (int half = 0; half < 2; half++) c[half][k] = bits(view.state(in, C_, half, k));
            }
            float a_ahead[2][4];
            for (int j = 0; j < 2; j++) unpacked(a_ahead[j], shared.decays[GROUP - 1][j][threadIdx.x]);
            deltas = shared.deltas[warp][GROUP / 2 - 1][g ^ (GROUP - 2)];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float dz[2];
                for (int k = 0; k < 2; k++) dz[k] = of_gate[half][k] * (ungated[2 * k + half] + x[half][k] * my.skip[k]);
                int t = t0 + 2 * q + half;
                if (my.real && t < T) put(dgate, dgate_at + half * dgate_step, packed(dz[0], dz[1]));
            }
            float ddrive[4] = {}, ddelta[4] = {}, dB_sum[4] = {}, dC_sum[4] = {};
#pragma unroll
            for (int i = GROUP - 1; i >= 0; i--) {
                const int half = i & 1;
                float a[2][4];
                for (int j = 0; j < 2; j++)
                    for (int k = 0; k < 4; k++) a[j][k] = a_ahead[j][k];
                float2 step_delta = half ? make_float2(deltas.z, deltas.w) : make_float2(deltas.x, deltas.y);
                if (i > 0) {  // in time for the next turn
                    for (int j = 0; j < 2; j++) unpacked(a_ahead[j], shared.decays[i - 1][j][threadIdx.x]);
                    if (!half) deltas = shared.deltas[warp][i / 2 - 1][g ^ (i - 2)];
                }
                for (int j = 0; j < 2; j++)
                    mma4(back[j], tf32(gradient[half][0]), tf32(gradient[half][1]), c[half][j] & rows_of[i / 2]);
                over_channels(dC_sum, states[i + 1], with_gradient, i);
                u32 rounded[4];
                pack(rounded, back);
                over_states(ddrive, rounded, with_b, i);
                over_channels(dB_sum, rounded, with_drive, i);
                float from[2][4];  // the state that this step began with
                for (int j = 0; j < 2; j++)
                    for (int k = 0; k < 4; k++)
                        from[j][k] = k & 1 ? high(states[i][2 * j + k / 2]) : low(states[i][2 * j + k / 2]);
                bool begins_here = STARTS && (begins >> i & 1);
                if (begins_here) my.read(from, state, row * state_row);
                float of_rates[2] = {};
                for (int j = 0; j < 2; j++) {
                    for (int k = 0; k < 4; k++) {
                        back[j][k] *= a[j][k];
                        float dlog = back[j][k] * from[j][k];
                        dA_sum[j][k] += dlog * (k < 2 ? step_delta.x : step_delta.y);
                        of_rates[k >> 1] += dlog * my.rate[j][k];
                    }
                }
                mma4(ddelta, bits(of_rates[0]), bits(of_rates[1]), bits(1.0f) & columns[i]);
                if (begins_here) {  // this chain alone adds here, in one order
                    float sums[2][4];
                    my.read(sums, dstate, row * E * 16);
                    for (int j = 0; j < 2; j++)
                        for (int k = 0; k < 4; k++) sums[j][k] += back[j][k], back[j][k] = 0.0f;
                    my.write(dstate, row * E * 16, sums);
                }
            }
            shared.parts[buffer][warp][0][q][g ^ 2 * q] = packed4(dB_sum);
            shared.parts[buffer][warp][1][q][g ^ 2 * q] = packed4(dC_sum);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int t = t0 + 2 * q + half;
                float du_[2], ddt_[2];
                for (int k = 0; k < 2; k++) {
                    float slope = 1.0f - ex2(-LOG2E * delta[half][k]);  // of softplus; 0 where a step does not count
                    du_[k] = delta[half][k] * ddrive[2 * k + half] + gradient[half][k] * my.skip[k];
                    ddt_[k] = (ddelta[2 * k + half] * LN2 + ddrive[2 * k + half] * x[half][k]) * slope;
                    dD_sum[k] += gradient[half][k] * x[half][k];
                    dbias_sum[k] += ddt_[k];
                }
                if (my.real && t < T) {
                    u32 at = out_at + half * E;
                    put(du, at, packed(du_[0], du_[1]));
                    put(ddt, at, packed(ddt_[0], ddt_[1]));
                }
            }
            // All copies of the next group are there then, and all are done with this one; one barrier is enough, since
            // the next group writes the other half of `parts`.
            copies_wait<0>();
            __syncthreads();
            int which = threadIdx.x / 64, p = threadIdx.x / 16 % 4, n = threadIdx.x % 16, t = t0 + 2 * p;
            auto part_of = [&](int w) {  // of a state, in two steps
                return ((const float2*)&shared.parts[buffer][w][which][p][n % 8 ^ 2 * p])[n / 8];
            };
            float2 total = part_of(0);
            for (int w = 1; w < WARPS; w++) {
                float2 v = part_of(w);
                total.x += v.x, total.y += v.y;
            }
            u32 at = (((u32)block * 2 + which) * rows * T + row * T + t) * 16 + n;
            if (t < T) put(dBC, at, total.x);
            if (t + 1 < T) put(dBC, at + 16, total.y);
        }
        if (part.end == part.length) {
            if (STARTS) {
                float sums[2][4];
                my.read(sums, dstate, row * E * 16);
                for (int j = 0; j < 2; j++)
                    for (int k = 0; k < 4; k++) back[j][k] += sums[j][k];
            }
            my.write(dstate, row * E * 16, back);
            my.write(dA, row * E * 16, dA_sum);
            for (int k = 0; k < 2; k++)
                for (int far = 1; far < 4; far *= 2) {
                    dD_sum[k] += __shfl_xor_sync(ALL, dD_sum[k], far);
                    dbias_sum[k] += __shfl_xor_sync(ALL, dbias_sum[k], far);
                }
            if (my.real && q == 0) {
                put(dD, row * E + my.e, make_float2(dD_sum[0], dD_sum[1]));
                put(dbias, row * E + my.e, make_float2(dbias_sum[0], dbias_sum[1]));
            }
        } else {
            for (int j = 0; j < 2; j++) {
                left[j * THREADS] = packed4(back[j]);
                left[(2 + j) * THREADS] = packed4(dA_sum[j]);
            }
            left[4 * THREADS] = make_float4(dD_sum[0], dD_sum[1], dbias_sum[0], dbias_sum[1]);
            part.leave(flags);
        }
    }
}
#endif

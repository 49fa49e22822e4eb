// selective_scan on a GPU: what its kernels share. Built at first use through NVRTC; needs no header.
//
// Time is spread over lanes, since batch x channels x states are too few threads. A warp holds 8 runs of RUN
// consecutive steps (lane / 4) of 4 pairs of channels (lane % 4); a lane keeps the step sizes, inputs and outputs of its
// run and pair in registers and goes through the states one by one: decays once, the state at the end of its run from
// zero, a scan over the 8 runs by shuffles, then the states themselves. A block has 4 warps, 32 channels, and walks
// through its part of time in tiles of 8 runs; the state between tiles is in shared memory, beside A.
//
// Longer sequences are cut into chunks, anchored at each sequence's start, whose length does not depend on the batch:
// `chunk_ends` finds the state at the end of each chunk from zero, and every later kernel starts a chunk from them.
//
// b batch, t time step, s step of a sequence (time run forwards), d channel, n state, g group.
// DATA 0 float32, 1 bfloat16, 2 float16.  A is scaled by log2 e where it is loaded, since ex2 is what the chip has.

typedef long long i64;
#if DATA == 0
typedef float T;
#else
typedef unsigned short T;
#endif

#define THREADS 128
#define LANES_T 8                     // lanes along time
#define LANES_C 4                     // lanes along pairs of channels
#define TILE (LANES_T * RUN)          // steps of a tile
#define WIDTH 32                      // channels of a block
#define PAIRS (WIDTH / 2)
#define VEC (16 / (int)sizeof(T))     // elements of a 16-byte access
#define BUFFER (TILE * WIDTH + LANES_T * 8)  // elements of a tile in shared memory; 8 more a run keep banks apart
#define LOG2E 1.4426950408889634f
#define FULL 0xffffffffu
#define FORGOTTEN (-127.0f)           // ex2 of less is exactly 0

struct Rows { T* at; i64 batch, time; };            // (b, t, d), channels adjacent
struct Groups { T* at; i64 batch, time, group; };   // (b, t, g, n), states adjacent

// Filled by gpu.py in this order; every field has eight bytes.
struct Call {
    i64 b, t, d, g, n, chunk, chunks, sequences, softplus, reverse, aligned, aligned_bc;
    Rows u, dt, z, y, dy;
    Groups B, C;
    const float *A, *D, *bias, *initial;
    const i64* table;
    float *state, *ends, *sums, *marks;
    const float* dstate;
    Rows du, ddt, dz;
    float *adjoint_ends, *adjoint_sums, *dinitial, *dA, *dD, *dbias, *parts;
    T *dB, *dC;
};

// Where a block works.
struct Place {
    i64 row, start, length, first, last;  // of the sequence: batch row, time of its first step; steps [first, last)
    i64 chunk_row, tile_row;              // rows of this sequence in `ends` and in `marks`
    int seq, chunk, group, block, c0, c1; // channels [c0, c1)
};

__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float rcp(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float sigmoid(float x) { return rcp(1.0f + ex2(-x * LOG2E)); }

__device__ __forceinline__ float softplus(float x) {
    // log1p(e)/e on [0, 1] by least squares at Chebyshev points, relative error 2e-7: no cancellation for small e.
    float e = ex2(-fabsf(x) * LOG2E), p = 0.00525345793f;
    p = fmaf(p, e, -0.0295885075f);
    p = fmaf(p, e, 0.0783616677f);
    p = fmaf(p, e, -0.136747703f);
    p = fmaf(p, e, 0.191114306f);
    p = fmaf(p, e, -0.248443693f);
    p = fmaf(p, e, 0.333192706f);
    p = fmaf(p, e, -0.499995023f);
    p = fmaf(p, e, 1.0f);
    float r; asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(x));
    return fmaf(p, e, r);
}

__device__ __forceinline__ float wide(T x) {
#if DATA == 0
    return x;
#elif DATA == 1
    return __uint_as_float((unsigned)x << 16);
#else
    float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y;
#endif
}
__device__ __forceinline__ T narrow(float x) {
#if DATA == 0
    return x;
#elif DATA == 1
    T y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;
#else
    T y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;
#endif
}
__device__ __forceinline__ float2 get2(const T* p) {
#if DATA == 0
    return *(const float2*)p;
#elif DATA == 1
    unsigned w = *(const unsigned*)p;
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
#else
    unsigned w = *(const unsigned*)p;
    return make_float2(wide((T)(w & 0xffffu)), wide((T)(w >> 16)));
#endif
}
__device__ __forceinline__ void put2(T* p, float x, float y) {
#if DATA == 0
    *(float2*)p = make_float2(x, y);
#else
    *(unsigned*)p = (unsigned)narrow(x) | ((unsigned)narrow(y) << 16);
#endif
}

__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
    unsigned at = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(bytes) : "memory");
}
// A value the compiler must keep, not compute again.
__device__ __forceinline__ void keep(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ int thread() { int x; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x)); return x; }
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ i64 first_channel(const Call& k, i64 group) { return (group * k.d + k.g - 1) / k.g; }

// False if this block has nothing to do. Blocks: channels fastest, then chunks, then sequences. In shared memory, found
// by one thread.
__device__ __forceinline__ bool locate(const Call& k, Place& p) {
    if (threadIdx.x == 0) {
        int a_group = (int)(((k.d + k.g - 1) / k.g + WIDTH - 1) / WIDTH), across = a_group * (int)k.g;
        i64 bid = blockIdx.x;
        p.block = (int)(bid % across);
        p.chunk = (int)(bid / across % k.chunks);
        p.seq = (int)(bid / across / k.chunks);
        p.group = p.block / a_group;
        i64 c = first_channel(k, p.group) + (p.block % a_group) * WIDTH, end = first_channel(k, p.group + 1);
        p.c0 = (int)c;
        p.c1 = (int)(c + WIDTH < end ? c + WIDTH : end);
        if (k.table) {
            p.row = k.table[3 * p.seq], p.start = k.table[3 * p.seq + 1];
            p.length = k.table[3 * p.seq + 2] - p.start;
        } else {
            p.row = p.seq, p.start = 0, p.length = k.t;
        }
        i64 linear = p.row * k.t + p.start;  // rows of shorter sequences follow one another
        p.chunk_row = linear / k.chunk + p.seq;
        p.tile_row = linear / TILE + p.seq;
        p.first = p.chunk * k.chunk;
        p.last = p.first + k.chunk < p.length ? p.first + k.chunk : p.length;
    }
    __syncthreads();
    return p.c0 < p.c1 && (p.chunk == 0 || p.first < p.length);
}

__device__ __forceinline__ i64 time_of(const Call& k, const Place& p, i64 s) {
    return k.reverse ? p.start + p.length - 1 - s : p.start + s;
}

// Element of (step, channel) in a tile in shared memory.
__device__ __forceinline__ int at(int step, int channel) { return step * WIDTH + step / RUN * 8 + channel; }
// Position of a step among the TILE of one state: 16-byte reads of neighbouring lanes are neighbours.
__device__ __forceinline__ int position(int step) {
    return step % RUN / 4 * (LANES_T * 4) + step / RUN * 4 + step % 4;
}

// Steps [s, s + TILE) of 32 channels into shared memory, zeros past the end. Asynchronous where all is aligned.
__device__ __forceinline__ void load_rows(T* tile, const Call& k, const Place& p, const Rows& x, i64 s) {
    const T* base = x.at + p.row * x.batch + p.c0;
    int width = p.c1 - p.c0;
    if (k.aligned && p.c0 % VEC == 0) {
#pragma unroll
        for (int i = thread(); i < TILE * WIDTH / VEC; i += THREADS) {
            int step = i / (WIDTH / VEC), c = i % (WIDTH / VEC) * VEC;
            int left = s + step < p.last ? width - c : 0;
            left = left < 0 ? 0 : left > VEC ? VEC : left;
            const T* from = left ? base + time_of(k, p, s + step) * x.time + c : base;
            copy_async(tile + at(step, c), from, left * (int)sizeof(T));
        }
        return;
    }
#pragma unroll 1
    for (int i = thread(); i < TILE * WIDTH; i += THREADS) {
        int step = i / WIDTH, c = i % WIDTH;
        bool inside = s + step < p.last && c < width;
        tile[at(step, c)] = inside ? base[time_of(k, p, s + step) * x.time + c] : (T)0;
    }
}

// The reverse way; what lies past the end or past the channels stays where it is.
__device__ __forceinline__ void store_rows(const T* tile, const Call& k, const Place& p, const Rows& x, i64 s) {
    T* base = x.at + p.row * x.batch + p.c0;
    int width = p.c1 - p.c0;
    if (k.aligned && p.c0 % VEC == 0 && width % VEC == 0) {
#pragma unroll
        for (int i = thread(); i < TILE * WIDTH / VEC; i += THREADS) {
            int step = i / (WIDTH / VEC), c = i % (WIDTH / VEC) * VEC;
            if (s + step < p.last && c < width)
                *(uint4*)(base + time_of(k, p, s + step) * x.time + c) = *(const uint4*)(tile + at(step, c));
        }
        return;
    }
#pragma unroll 1
    for (int i = thread(); i < TILE * WIDTH; i += THREADS) {
        int step = i / WIDTH, c = i % WIDTH;
        if (s + step < p.last && c < width) base[time_of(k, p, s + step) * x.time + c] = tile[at(step, c)];
    }
}

__device__ __forceinline__ int padded(const Call& k) { return ((int)k.n + VEC - 1) / VEC * VEC; }

// TILE rows of B or C as they are, (step, state), zeros past the end.
__device__ __forceinline__ void load_groups(T* raw, const Call& k, const Place& p, const Groups& x, i64 s) {
    const T* base = x.at + p.row * x.batch + p.group * x.group;
    int n = (int)k.n, pitch = padded(k);
    if (k.aligned_bc) {
    #pragma unroll 1
    for (int i = thread(); i < TILE * (pitch / VEC); i += THREADS) {
            int step = i / (pitch / VEC), c = i % (pitch / VEC) * VEC;
            int left = s + step < p.last ? n - c : 0;
            left = left > VEC ? VEC : left;
            const T* from = left ? base + time_of(k, p, s + step) * x.time + c : base;
            copy_async(raw + step * pitch + c, from, left * (int)sizeof(T));
        }
        return;
    }
#pragma unroll 1
    for (int i = thread(); i < TILE * pitch; i += THREADS) {
        int step = i / pitch, c = i % pitch;
        bool inside = s + step < p.last && c < n;
        raw[i] = inside ? base[time_of(k, p, s + step) * x.time + c] : (T)0;
    }
}

// To float32, state by state. The cost is shared by the block's channels.
__device__ __forceinline__ void spread(float* to, const T* raw, const Call& k) {
    int n = (int)k.n, pitch = padded(k);
#pragma unroll 1
    for (int i = thread(); i < TILE * (pitch / VEC); i += THREADS) {
        int step = i % TILE, c = i / TILE * VEC, where = position(step);
        uint4 words = *(const uint4*)(raw + step * pitch + c);
        const T* x = (const T*)&words;
#pragma unroll
        for (int j = 0; j < VEC; ++j)
            if (c + j < n) to[(c + j) * TILE + where] = wide(x[j]);
    }
}

// The lane's run of one state: 16-byte reads.
__device__ __forceinline__ void load_run(float (&x)[RUN], const float* from) {
#pragma unroll
    for (int q = 0; q < RUN / 4; ++q) {
        float4 v = *(const float4*)(from + q * (LANES_T * 4));
        x[4 * q] = v.x, x[4 * q + 1] = v.y, x[4 * q + 2] = v.z, x[4 * q + 3] = v.w;
    }
}

// A and what lies between tiles, for two channels of one state: {A0, A1, h0, h1}, A times log2 e.
__device__ __forceinline__ void load_system(float4* system, const Call& k, const Place& p) {
    int n = (int)k.n;
#pragma unroll 1
    for (int i = thread(); i < PAIRS * n; i += THREADS) {
        int pair = i / n, j = i % n, c = p.c0 + 2 * pair;
        float a0 = c < p.c1 ? k.A[(i64)c * n + j] * LOG2E : 0.0f;
        float a1 = c + 1 < p.c1 ? k.A[(i64)(c + 1) * n + j] * LOG2E : 0.0f;
        system[j * PAIRS + pair] = make_float4(a0, a1, 0.0f, 0.0f);
    }
}

// The state that enters this chunk: the sequence's, carried through the chunks before it.
__device__ __forceinline__ float entering(const Call& k, const Place& p, float a, int c, int j) {
    i64 across = k.d * k.n, in_state = (i64)c * k.n + j;
    float h = k.initial ? k.initial[p.seq * across + in_state] : 0.0f;
#pragma unroll 1
    for (int q = 0; q < p.chunk; ++q) {
        i64 row = p.chunk_row + q;
        h = fmaf(ex2(a * k.sums[row * k.d + c]), h, k.ends[row * across + in_state]);
    }
    return h;
}
__device__ __forceinline__ void enter(float4* system, const Call& k, const Place& p) {
    int n = (int)k.n;
#pragma unroll 1
    for (int i = thread(); i < PAIRS * n; i += THREADS) {
        int pair = i / n, j = i % n, c = p.c0 + 2 * pair;
        float4& x = system[j * PAIRS + pair];
        if (c < p.c1) x.z = entering(k, p, x.x, c, j);
        if (c + 1 < p.c1) x.w = entering(k, p, x.y, c + 1, j);
    }
}

// The last (HIGH) or first two of each four, to (d, n) rows in memory.
template <bool HIGH> __device__ __forceinline__ void save(float* to, const float4* system, const Call& k, const Place& p) {
    int n = (int)k.n;
#pragma unroll 1
    for (int i = thread(); i < WIDTH * n; i += THREADS) {
        int c = i / n, j = i % n;
        if (p.c0 + c >= p.c1) continue;
        const float4& x = system[j * PAIRS + c / 2];
        float even = HIGH ? x.z : x.x, odd = HIGH ? x.w : x.y;
        to[(i64)(p.c0 + c) * n + j] = c % 2 ? odd : even;
    }
}

// Where a thread works. Found anew in each phase: registers are what limits these kernels.
struct Lane { int run, pair, channel; };  // channel: the first of the pair, in the block
__device__ __forceinline__ Lane lane_of() {
    int t = thread();
    Lane x;
    x.run = t % 32 / LANES_C;
    x.pair = t / 32 * LANES_C + t % LANES_C;
    x.channel = 2 * x.pair;
    return x;
}
// A parameter (d) of the lane's two channels, zeros if there is none.
__device__ __forceinline__ float2 parameter(const float* x, const Place& p, const Lane& me) {
    int c = p.c0 + me.channel;
    return make_float2(x && c < p.c1 ? x[c] : 0.0f, x && c + 1 < p.c1 ? x[c + 1] : 0.0f);
}

// Step sizes of the lane's run; 0 past the end, so that the state passes unchanged.
__device__ __forceinline__ float2 step_size(const T* tile, const Call& k, const Lane& me, float2 bias, int r, int left) {
    float2 v = get2(tile + at(me.run * RUN + r, me.channel));
    v.x += bias.x, v.y += bias.y;
    if (k.softplus) v.x = softplus(v.x), v.y = softplus(v.y);
    if (me.run * RUN + r >= left) v.x = v.y = 0.0f;
    return v;
}
// Steps from s to the end of the chunk, at most a tile.
__device__ __forceinline__ int left_of(const Place& p, i64 s) { return (int)(p.last - s < TILE ? p.last - s : TILE); }

// One step of the scan over lanes: predicated, so that no select or move is needed.
template <bool UP, int BY> __device__ __forceinline__ void join(float& h, float& decay) {
    if (UP)
        asm("{.reg .pred p; .reg .f32 v, w; shfl.sync.up.b32 v|p, %0, %2, 0, -1; shfl.sync.up.b32 w, %1, %2, 0, -1;"
            "@p fma.rn.f32 %0, %1, v, %0; @p mul.f32 %1, %1, w;}" : "+f"(h), "+f"(decay) : "n"(BY));
    else
        asm("{.reg .pred p; .reg .f32 v, w; shfl.sync.down.b32 v|p, %0, %2, 31, -1; shfl.sync.down.b32 w, %1, %2, 31, -1;"
            "@p fma.rn.f32 %0, %1, v, %0; @p mul.f32 %1, %1, w;}" : "+f"(h), "+f"(decay) : "n"(BY));
}
template <bool UP, int BY> __device__ __forceinline__ void join_last(float& h, float decay) {
    if (UP)
        asm("{.reg .pred p; .reg .f32 v; shfl.sync.up.b32 v|p, %0, %2, 0, -1; @p fma.rn.f32 %0, %1, v, %0;}"
            : "+f"(h) : "f"(decay), "n"(BY));
    else
        asm("{.reg .pred p; .reg .f32 v; shfl.sync.down.b32 v|p, %0, %2, 31, -1; @p fma.rn.f32 %0, %1, v, %0;}"
            : "+f"(h) : "f"(decay), "n"(BY));
}
// x of the run before (UP) or after this one, `edge` where there is none.
template <bool UP> __device__ __forceinline__ float beside(float x, float edge) {
    float v;
    if (UP)
        asm("{.reg .pred p; shfl.sync.up.b32 %0|p, %1, %3, 0, -1; selp.f32 %0, %0, %2, p;}"
            : "=f"(v) : "f"(x), "f"(edge), "n"(LANES_C));
    else
        asm("{.reg .pred p; shfl.sync.down.b32 %0|p, %1, %3, 31, -1; selp.f32 %0, %0, %2, p;}"
            : "=f"(v) : "f"(x), "f"(edge), "n"(LANES_C));
    return v;
}
// The state that enters each lane's run. `end`: the run's own, from zero; `decay`: of the run before (UP) or after.
template <bool UP> __device__ __forceinline__ float scan_lanes(float end, float decay, float carry) {
    float h = beside<UP>(end, carry);
    join<UP, LANES_C>(h, decay);
    join<UP, 2 * LANES_C>(h, decay);
    join_last<UP, 4 * LANES_C>(h, decay);
    return h;
}

// Sum over the lanes of a pair that come before (UP) or after this one.
template <bool UP> __device__ __forceinline__ float others(float x) { return scan_lanes<UP>(x, 1.0f, 0.0f); }

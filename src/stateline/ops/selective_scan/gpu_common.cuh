// selective_scan on a GPU: what its kernels share. Built at first use through NVRTC; needs no header.
//
// A block has 4 warps and 32 channels and walks through its part of time in tiles of 8 runs of RUN steps. The forward pass
// goes step by step (gpu.cu). The gradient and the sums that chunks start from spread time over lanes: a warp holds the 8
// runs (lane / 4) of 4 pairs of channels (lane % 4); a lane keeps the step sizes, inputs and outputs of its run and pair in
// registers and goes through the states one by one: decays once, the state at the end of its run from zero, a scan over
// the 8 runs by shuffles, then the states themselves. The state between tiles is in shared memory, beside A.
//
// Longer sequences are cut into chunks, anchored at each sequence's start, whose length does not depend on the batch:
// `chunk_ends` finds the state at the end of each chunk from zero, and the forward pass starts a chunk from them. It keeps
// the state every MARK steps for the gradient.
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
#define FORGOTTEN (-64.0f)            // what an earlier chunk keeps less of than 2^-64 is left out

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
    float *adjoint_ends, *adjoint_sums, *dinitial, *dA_rows, *dD_rows, *dbias_rows, *parts, *dA, *dD, *dbias;
    T *dB, *dC;
};

// A tensor as a block sees it: its first step, group or channel, and the bytes to the next step.
struct Track { char* at; int stride; };
__device__ __forceinline__ T* step_of(const Track& x, int step) { return (T*)(x.at + (i64)step * x.stride); }

// Where a block works.
struct Place {
    Track u, dt, z, y, dy, du, ddt, dz, B, C;
    i64 row;                              // batch row of the sequence
    int start, length, first, last;       // time of its first step; steps [first, last) of it
    i64 chunk_row;                        // row of this sequence in `ends`
    float* marks;                         // the block's states before its steps, (n, 32), every MARK steps ...
    i64 mark_stride;                      // ... so many floats apart
    int seq, chunk, group, block, c0, c1; // channels [c0, c1)
    __align__(8) float D[WIDTH], bias[WIDTH];       // of the block's channels, zeros if there is none
    int vectors, whole;                   // whether rows are read 16 bytes at a time; whether all 32 channels are there
};

__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float rcp(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float sigmoid(float x) { return rcp(1.0f + ex2(-x * LOG2E)); }

__device__ __forceinline__ float softplus(float x) {
    // log1p(e)/e on [0, 1] by least squares at Chebyshev points, relative error 3e-7: no cancellation for small e.
    float e = ex2(-fabsf(x) * LOG2E), p = -0.00857467577f;
    p = fmaf(p, e, 0.0442141928f);
    p = fmaf(p, e, -0.107853681f);
    p = fmaf(p, e, 0.177570239f);
    p = fmaf(p, e, -0.244996116f);
    p = fmaf(p, e, 0.332761765f);
    p = fmaf(p, e, -0.499974489f);
    p = fmaf(p, e, 0.999999821f);
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
#if DATA != 0
__device__ __forceinline__ void unpack(unsigned w, float& x, float& y) {
#if DATA == 1
    x = __uint_as_float(w << 16), y = __uint_as_float(w & 0xffff0000u);
#else
    x = wide((T)(w & 0xffffu)), y = wide((T)(w >> 16));
#endif
}
#endif
__device__ __forceinline__ float2 get2(const T* p) {
#if DATA == 0
    return *(const float2*)p;
#else
    float2 v;
    unpack(*(const unsigned*)p, v.x, v.y);
    return v;
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
// Read anew where it is used: registers are what limits these kernels.
__device__ __forceinline__ int thread() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    __builtin_assume(x >= 0 && x < THREADS);  // no sign to look at in divisions
    return x;
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ i64 first_channel(const Call& k, i64 group) { return (group * k.d + k.g - 1) / k.g; }

__device__ __forceinline__ i64 time_of(const Call& k, const Place& p, int s) {
    return k.reverse ? p.start + p.length - 1 - s : p.start + s;
}

__device__ __forceinline__ int stride_of(const Call& k, i64 time) {
    return (int)(k.reverse ? -time : time) * (int)sizeof(T);
}
__device__ __forceinline__ Track track(const Call& k, const Place& p, const Rows& x) {
    return {(char*)(x.at + p.row * x.batch + time_of(k, p, 0) * x.time + p.c0), stride_of(k, x.time)};
}
__device__ __forceinline__ Track track(const Call& k, const Place& p, const Groups& x) {
    return {(char*)(x.at + p.row * x.batch + time_of(k, p, 0) * x.time + p.group * x.group), stride_of(k, x.time)};
}

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
            p.row = k.table[3 * p.seq], p.start = (int)k.table[3 * p.seq + 1];
            p.length = (int)k.table[3 * p.seq + 2] - p.start;
        } else {
            p.row = p.seq, p.start = 0, p.length = (int)k.t;
        }
        i64 linear = p.row * k.t + p.start;  // rows of shorter sequences follow one another
        p.chunk_row = linear / k.chunk + p.seq;
        p.mark_stride = across * k.n * WIDTH;
        p.marks = k.marks + (linear / MARK + p.seq) * p.mark_stride + p.block * k.n * WIDTH;
        const i64 first = p.chunk * k.chunk;
        p.first = (int)(first < p.length ? first : p.length);
        p.last = (int)(first + k.chunk < p.length ? first + k.chunk : p.length);
        p.vectors = k.aligned && p.c0 % VEC == 0;
        p.whole = p.vectors && p.c1 - p.c0 == WIDTH;
        p.u = track(k, p, k.u), p.dt = track(k, p, k.dt), p.z = track(k, p, k.z), p.y = track(k, p, k.y);
        p.dy = track(k, p, k.dy), p.du = track(k, p, k.du), p.ddt = track(k, p, k.ddt), p.dz = track(k, p, k.dz);
        p.B = track(k, p, k.B), p.C = track(k, p, k.C);
    }
    __syncthreads();
    const int t = threadIdx.x;
    if (t < WIDTH) {
        const bool here = p.c0 + t < p.c1;
        p.D[t] = k.D && here ? k.D[p.c0 + t] : 0.0f;
        p.bias[t] = k.bias && here ? k.bias[p.c0 + t] : 0.0f;
    }
    return p.c0 < p.c1 && (p.chunk == 0 || p.first < p.length);
}

// Element of (step, channel) in a tile in shared memory.
__device__ __forceinline__ int at(int step, int channel) { return step * WIDTH + step / RUN * 8 + channel; }
// Position of a step among the TILE of one state: quarter q of all runs together, odd quarters turned by half a line,
// so that neither 16-byte reads of neighbouring runs nor writes of neighbouring steps meet in a bank.
__device__ __forceinline__ int quarter(int run, int q) { return q * (LANES_T * 4) + ((run * 4) ^ (q % 2 * 16)); }
__device__ __forceinline__ int position(int step) { return quarter(step / RUN, step % RUN / 4) + step % 4; }

#define ROWS (THREADS / (WIDTH / VEC))  // steps that the block reads at once

// Steps [s, s + TILE) of 32 channels into shared memory, zeros past the end. Asynchronous where all is aligned.
__device__ __forceinline__ void load_rows(T* tile, const Place& p, const Track& x, int s) {
    const int t = thread(), step = t / (WIDTH / VEC), c = t % (WIDTH / VEC) * VEC;
    T* to = tile + at(step, c);
    if (p.whole && s + TILE <= p.last) {
#pragma unroll
        for (int v = 0; v < TILE / ROWS; ++v)
            copy_async(to + v * (ROWS * WIDTH + ROWS / RUN * 8), step_of(x, s + step + v * ROWS) + c, 16);
        return;
    }
    const int width = p.c1 - p.c0, left = p.last - s;
    if (p.vectors) {
        const int bytes = min(max(width - c, 0), VEC) * (int)sizeof(T);
#pragma unroll 1
        for (int v = 0; v < TILE / ROWS; ++v) {
            const bool inside = step + v * ROWS < left && bytes;
            const T* from = inside ? step_of(x, s + step + v * ROWS) + c : (const T*)x.at;
            copy_async(to + v * (ROWS * WIDTH + ROWS / RUN * 8), from, inside ? bytes : 0);
        }
        return;
    }
#pragma unroll 1
    for (int i = t; i < TILE * WIDTH; i += THREADS) {
        int step = i / WIDTH, c = i % WIDTH;
        tile[at(step, c)] = step < left && c < width ? step_of(x, s + step)[c] : (T)0;
    }
}

// The reverse way; what lies past the end or past the channels stays where it is.
__device__ __forceinline__ void store_rows(const T* tile, const Place& p, const Track& x, int s) {
    const int t = thread(), step = t / (WIDTH / VEC), c = t % (WIDTH / VEC) * VEC;
    const T* from = tile + at(step, c);
    if (p.whole && s + TILE <= p.last) {
#pragma unroll
        for (int v = 0; v < TILE / ROWS; ++v)
            *(uint4*)(step_of(x, s + step + v * ROWS) + c) = *(const uint4*)(from + v * (ROWS * WIDTH + ROWS / RUN * 8));
        return;
    }
    const int width = p.c1 - p.c0, left = p.last - s;
    if (p.vectors && width % VEC == 0) {
#pragma unroll 1
        for (int v = 0; v < TILE / ROWS; ++v)
            if (step + v * ROWS < left && c < width)
                *(uint4*)(step_of(x, s + step + v * ROWS) + c) =
                    *(const uint4*)(from + v * (ROWS * WIDTH + ROWS / RUN * 8));
        return;
    }
#pragma unroll 1
    for (int i = t; i < TILE * WIDTH; i += THREADS) {
        int step = i / WIDTH, c = i % WIDTH;
        if (step < left && c < width) step_of(x, s + step)[c] = tile[at(step, c)];
    }
}

__device__ __forceinline__ int padded(const Call& k) { return ((int)k.n + VEC - 1) / VEC * VEC; }

// TILE rows of B or C as they are, zeros past the end: VEC states of all steps, then the next VEC.
__device__ __forceinline__ void load_groups(T* raw, const Call& k, const Place& p, const Track& x, int s) {
    const int n = (int)k.n, left = p.last - s, t = thread();
    if (k.aligned_bc && n == 2 * VEC && TILE * 2 == THREADS && left >= TILE) {  // 16 states of 2 bytes
        copy_async(raw + t * VEC, step_of(x, s + t % TILE) + t / TILE * VEC, 16);
        return;
    }
    if (k.aligned_bc) {
        const int step = t % TILE;
        const T* from = step < left ? step_of(x, s + step) : (const T*)x.at;
#pragma unroll 1
        for (int i = t; i < TILE * padded(k) / VEC; i += THREADS) {
            const int c = i / TILE * VEC, bytes = step < left ? min(n - c, VEC) * (int)sizeof(T) : 0;
            copy_async(raw + i * VEC, from + c, bytes);
        }
        return;
    }
#pragma unroll 1
    for (int i = t; i < TILE * padded(k); i += THREADS) {
        const int step = i / VEC % TILE, c = i / VEC / TILE * VEC + i % VEC;
        raw[i] = step < left && c < n ? step_of(x, s + step)[c] : (T)0;
    }
}

__device__ __forceinline__ void spread_vector(float* line, const T* raw, int states) {
    const uint4 words = *(const uint4*)raw;
    float x[VEC];
#if DATA == 0
    x[0] = __uint_as_float(words.x), x[1] = __uint_as_float(words.y);
    x[2] = __uint_as_float(words.z), x[3] = __uint_as_float(words.w);
#else
    unpack(words.x, x[0], x[1]), unpack(words.y, x[2], x[3]);
    unpack(words.z, x[4], x[5]), unpack(words.w, x[6], x[7]);
#endif
    if (states >= VEC) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) line[j * TILE] = x[j];
    } else {
#pragma unroll
        for (int j = 0; j < VEC; ++j)
            if (j < states) line[j * TILE] = x[j];
    }
}
// To float32, state by state. The cost is shared by the block's channels.
__device__ __forceinline__ void spread(float* to, const T* raw, const Call& k) {
    const int n = (int)k.n, t = thread();
    to += position(t % TILE);
    if (n == 2 * VEC && TILE * 2 == THREADS) {
        spread_vector(to + t / TILE * VEC * TILE, raw + t * VEC, VEC);
        return;
    }
#pragma unroll 1
    for (int i = t; i < TILE * padded(k) / VEC; i += THREADS)
        spread_vector(to + i / TILE * VEC * TILE, raw + i * VEC, n - i / TILE * VEC);
}

// The lane's run of one state: 16-byte reads. `from` points to its first quarter.
__device__ __forceinline__ void load_run(float (&x)[RUN], const float* from, int turn) {
#pragma unroll
    for (int q = 0; q < RUN / 4; ++q) {
        float4 v = *(const float4*)(from + q * (LANES_T * 4) + (q % 2 ? turn : 0));
        x[4 * q] = v.x, x[4 * q + 1] = v.y, x[4 * q + 2] = v.z, x[4 * q + 3] = v.w;
    }
}
__device__ __forceinline__ int turn_of(int run) { return ((run * 4) ^ 16) - run * 4; }

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

__device__ __forceinline__ float* mark_of(const Place& p, int s) { return p.marks + (s / MARK) * p.mark_stride; }

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
// A parameter of the lane's two channels.
__device__ __forceinline__ float2 parameter(const float* x, const Lane& me) { return *(const float2*)(x + me.channel); }

// Step sizes of the lane's run, each [channel][step]; 0 past the end, so that the state passes unchanged.
__device__ __forceinline__ void step_sizes(float (&dt)[2][RUN], const T* tile, const Call& k, const Place& p,
                                           const Lane& me, int s) {
    const float2 bias = parameter(p.bias, me);
    const T* from = tile + at(me.run * RUN, me.channel);
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
        float2 v = get2(from + r * WIDTH);
        dt[0][r] = v.x + bias.x, dt[1][r] = v.y + bias.y;
    }
    if (k.softplus) {
#pragma unroll
        for (int r = 0; r < RUN; ++r) dt[0][r] = softplus(dt[0][r]), dt[1][r] = softplus(dt[1][r]);
    }
    if (s + TILE > p.last) {
        const int left = p.last - s - me.run * RUN;
#pragma unroll
        for (int r = 0; r < RUN; ++r)
            if (r >= left) dt[0][r] = dt[1][r] = 0.0f;
    }
}

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

// selective_scan on a GPU: the forward pass. See gpu_common.cuh for what is shared.
//
// Time is walked through step by step, since that takes the fewest instructions an update. A block has 32 channels, one a
// lane, and its four warps share the states: a lane keeps STATES of them. What is common to all states is done once for a
// tile of 32 steps, by all threads: step sizes and inputs before the walk, the sum over warps, skip and gate after it.

#define NEAR (4 * STATES)             // states of a block, n or a few more
#define PITCH (NEAR + 4)              // floats of a step of B or C; 4 more keep banks apart
#define SLOTS 36                      // 16-byte slots of a line of 32 channels: even ones, then odd ones, in other banks
#define ODD 20
// ex2.approx of numbers just below 0 is 6e-9 too small on average (measured): thousands of steps would show it.
#define NUDGE 9e-9f
#define WARPS (THREADS / 32)
constexpr int FOURS = WALK;           // unrolled: four steps each

extern __shared__ __align__(16) unsigned char shared[];

__device__ __forceinline__ int slot(int channel) { return channel % 2 * ODD + channel / 2; }

// A tile of B and one of C, next to each other, to float32, step by step.
__device__ __forceinline__ void spread_vectors(float* to, const T* raw, int i, int vectors) {
    const bool second = i >= vectors;
    const int v = second ? i - vectors : i;
    const uint4 words = *(const uint4*)(raw + i * VEC);
    float4* out = (float4*)(to + (second ? TILE * PITCH : 0) + v % TILE * PITCH + v / TILE * VEC);
#if DATA == 0
    out[0] = *(const float4*)&words;
#else
    float4 low, high;
    unpack(words.x, low.x, low.y), unpack(words.y, low.z, low.w);
    unpack(words.z, high.x, high.y), unpack(words.w, high.z, high.w);
    out[0] = low, out[1] = high;
#endif
}
__device__ __forceinline__ void spread_steps(float* to, const T* raw, const Call& k) {
    const int vectors = TILE * padded(k) / VEC;
    if (2 * vectors == THREADS) {
        spread_vectors(to, raw, thread(), THREADS / 2);
        return;
    }
#pragma unroll 1
    for (int i = thread(); i < 2 * vectors; i += THREADS) spread_vectors(to, raw, i, vectors);
}

// {dt, x, dt, x} of two steps for each channel; dt = 0 past the end, so that the state passes unchanged.
__device__ __forceinline__ void prepare(
    float4* to, const T* dt_tile, const T* u_tile, const Call& k, const Place& p, int s) {
    const int t = thread(), pair = t % 16;
    const float2 bias = *(const float2*)(p.bias + 2 * pair);
#pragma unroll
    for (int v = 0; v < TILE / 16; ++v) {
        const int two = t / 32 + WARPS * v + t % 32 / 16 * (TILE / 4);  // half a warp is half a tile away: other banks
        float dt[2][2], x[2][2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int where = at(2 * two + r, 2 * pair);
            const float2 size = get2(dt_tile + where), in = get2(u_tile + where);
            dt[0][r] = size.x + bias.x, dt[1][r] = size.y + bias.y;
            x[0][r] = in.x, x[1][r] = in.y;
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (k.softplus) dt[c][r] = softplus(dt[c][r]);
                if (s + 2 * two + r >= p.last) dt[c][r] = 0.0f;
                x[c][r] *= dt[c][r];
            }
            to[two * SLOTS + c * ODD + pair] = make_float4(dt[c][0], x[c][0], dt[c][1], x[c][1]);
        }
    }
}

// Outputs of four steps of two channels a thread, from the warps' sums.
__device__ __forceinline__ void finish(
    const float4* sums, const T* u_tile, const T* z_tile, const Call& k, const Place& p, int s) {
    const int t = thread(), c = t % 16 * 2, four = t / 32 + t % 32 / 16 * WARPS;
    float y[2][4];
#pragma unroll
    for (int o = 0; o < 2; ++o) {
        const float4* from = sums + four * SLOTS + o * ODD + c / 2;
        float4 sum = from[0];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) {
            const float4 v = from[w * (TILE / 4) * SLOTS];
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        y[o][0] = sum.x, y[o][1] = sum.y, y[o][2] = sum.z, y[o][3] = sum.w;
    }
    const float2 D = *(const float2*)(p.D + c);
    const int where = at(4 * four, c);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const float2 u = get2(u_tile + where + r * WIDTH);
        y[0][r] = fmaf(D.x, u.x, y[0][r]), y[1][r] = fmaf(D.y, u.y, y[1][r]);
    }
    if (k.z.at) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float2 z = get2(z_tile + where + r * WIDTH);
            y[0][r] *= z.x * sigmoid(z.x), y[1][r] *= z.y * sigmoid(z.y);
        }
    }
    char* out = (char*)(step_of(p.y, s + 4 * four) + c);
    if (p.whole && s + TILE <= p.last) {
#pragma unroll
        for (int r = 0; r < 4; ++r, out += p.y.stride) put2((T*)out, y[0][r], y[1][r]);
        return;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r, out += p.y.stride) {
        if (s + 4 * four + r >= p.last) break;
        if (p.c0 + c < p.c1) ((T*)out)[0] = narrow(y[0][r]);
        if (p.c0 + c + 1 < p.c1) ((T*)out)[1] = narrow(y[1][r]);
    }
}

// Where a thread reads whole tiles, kept in registers: 16 bytes of u, dt and z, and of B or C if one pass covers both.
struct Feed {
    const char *u, *dt, *z, *group;
    int u_step, dt_step, z_step, group_step;  // bytes to the next tile
    bool whole, whole_groups;
};
__device__ __forceinline__ Feed feed_of(const Call& k, const Place& p) {
    const int t = thread(), step = p.first + t / (WIDTH / VEC), c = t % (WIDTH / VEC) * VEC, half = t % (THREADS / 2);
    const Track& g = t < THREADS / 2 ? p.B : p.C;
    Feed f;
    f.u = (const char*)(step_of(p.u, step) + c), f.u_step = p.u.stride * TILE;
    f.dt = (const char*)(step_of(p.dt, step) + c), f.dt_step = p.dt.stride * TILE;
    f.z = (const char*)(step_of(p.z, step) + c), f.z_step = p.z.stride * TILE;
    f.group = (const char*)(step_of(g, p.first + half % TILE) + half / TILE * VEC), f.group_step = g.stride * TILE;
    f.whole = p.whole && ROWS >= TILE;
    f.whole_groups = k.aligned_bc && k.n * TILE == THREADS / 2 * VEC;
    return f;
}

// A tile of the lane's states; leaves the warp's sums over them.
__device__ __forceinline__ void walk(
    float (&h)[STATES], const float (&A)[STATES], const float4* from, const float* B, const float* C, float4* to) {
#pragma unroll (FOURS)
    for (int four = 0; four < TILE / 4; ++four) {
        float y[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float4 two = from[(2 * four + r / 2) * SLOTS];
            const float dt = r % 2 ? two.z : two.x, x = r % 2 ? two.w : two.y;
            const int line = (4 * four + r) * PITCH;
#pragma unroll
            for (int i = 0; i < STATES; i += 4) {
                const float4 b = *(const float4*)(B + line + i), c = *(const float4*)(C + line + i);
                h[i] = fmaf(ex2(fmaf(dt, A[i], NUDGE)), h[i], x * b.x);
                h[i + 1] = fmaf(ex2(fmaf(dt, A[i + 1], NUDGE)), h[i + 1], x * b.y);
                h[i + 2] = fmaf(ex2(fmaf(dt, A[i + 2], NUDGE)), h[i + 2], x * b.z);
                h[i + 3] = fmaf(ex2(fmaf(dt, A[i + 3], NUDGE)), h[i + 3], x * b.w);
                y[r] = i ? fmaf(c.x, h[i], y[r]) : c.x * h[i];
                y[r] = fmaf(c.y, h[i + 1], y[r]);
                y[r] = fmaf(c.z, h[i + 2], y[r]);
                y[r] = fmaf(c.w, h[i + 3], y[r]);
            }
        }
        to[four * SLOTS] = make_float4(y[0], y[1], y[2], y[3]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) scan_forward(const __grid_constant__ Call k) {
    __shared__ Place p;
    if (!locate(k, p)) return;
    const int raw_size = TILE * padded(k);
    T *u_tile = (T*)shared, *z_tile = u_tile + 2 * BUFFER, *dt_tile = z_tile + 2 * BUFFER;  // u and z twice
    T *b_raw = dt_tile + BUFFER, *c_raw = b_raw + raw_size;
    float *B = (float*)(c_raw + raw_size), *C = B + TILE * PITCH;
    float4 *steps = (float4*)(C + TILE * PITCH), *sums = steps + TILE / 2 * SLOTS;
    Feed f = feed_of(k, p);
    T* const to = dt_tile + at(thread() / (WIDTH / VEC), thread() % (WIDTH / VEC) * VEC);
    const bool gated = k.z.at && k.y.at;
    auto fetch = [&](int stage, int s) {
        const bool full = s + TILE <= p.last;
        if (full && f.whole) {
            copy_async(to, f.dt, 16);
            copy_async(to + (stage - 4) * BUFFER, f.u, 16);
            if (gated) copy_async(to + (stage - 2) * BUFFER, f.z, 16);
            f.u += f.u_step, f.dt += f.dt_step, f.z += f.z_step;
        } else if (s < p.last) {
            load_rows(dt_tile, p, p.dt, s);
            load_rows(u_tile + stage * BUFFER, p, p.u, s);
            if (gated) load_rows(z_tile + stage * BUFFER, p, p.z, s);
        }
        if (full && f.whole_groups) {
            copy_async(b_raw + thread() * VEC, f.group, 16);
            f.group += f.group_step;
        } else if (s < p.last) {
            load_groups(b_raw, k, p, p.B, s);
            load_groups(c_raw, k, p, p.C, s);
        }
        commit();
    };
    fetch(0, p.first);
    for (int i = thread(); i < 2 * TILE * PITCH; i += THREADS) B[i] = 0.0f;  // states from n on
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = p.c0 + lane, j0 = warp * STATES, n = (int)k.n;
    float A[STATES], h[STATES];
#pragma unroll
    for (int i = 0; i < STATES; ++i) {
        const bool here = c < p.c1 && j0 + i < n;
        A[i] = here ? k.A[(i64)c * n + j0 + i] * LOG2E : 0.0f;
        h[i] = here ? entering(k, p, A[i], c, j0 + i) : 0.0f;
    }
    int stage = 0, s = p.first;
    wait<0>();
    __syncthreads();
    if (s < p.last) {
        spread_steps(B, b_raw, k);
        prepare(steps, dt_tile, u_tile, k, p, s);
    }
#pragma unroll 1
    for (; s < p.last; s += TILE) {
        if (k.marks && s % MARK == 0) {
            float* mark = mark_of(p, s) + j0 * WIDTH + lane;
#pragma unroll
            for (int i = 0; i < STATES; ++i)
                if (j0 + i < n) mark[i * WIDTH] = h[i];
        }
        __syncthreads();
        fetch(stage ^ 1, s + TILE);
        walk(h, A, steps + slot(lane), B + j0, C + j0, sums + warp * (TILE / 4) * SLOTS + slot(lane));
        wait<0>();
        __syncthreads();
        if (k.y.at) finish(sums, u_tile + stage * BUFFER, z_tile + stage * BUFFER, k, p, s);
        stage ^= 1;
        if (s + TILE < p.last) {
            spread_steps(B, b_raw, k);
            prepare(steps, dt_tile, u_tile + stage * BUFFER, k, p, s + TILE);
        }
    }
    if (k.state && p.last == p.length && c < p.c1) {
        float* to = k.state + (p.seq * k.d + c) * n + j0;
#pragma unroll
        for (int i = 0; i < STATES; ++i)
            if (j0 + i < n) to[i] = h[i];
    }
}

// What only Mamba-2 has between in_proj and out_proj; behind gpu.cu when compiled.
//   heads   step sizes, the recurrence, D and the gate;   gates   a norm in groups, or behind the gate, and the unit beside
// One norm over all channels, in front of the gate, needs no `gates`: rows of out_proj's vectors are multiplied by its weight here, and
// out_proj's sums by 1/rms (SCALED).
//
// Compiled for HEADS of WIDTH channels, NGROUPS, BLOCKS of a sequence, DIRECT (no `gates`), GATE_LAST, NORMALISE, BESIDE channels of
// the unit, and WIDE or not: whether states are float32 or bfloat16.

constexpr int VECTOR = WIDE ? 4 : 8;                            // states of a load, 16 bytes
constexpr int VECTORS = STATES / VECTOR;                        // of a channel
constexpr int LANES = VECTORS > 16 ? 32 : VECTORS > 8 ? 16 : VECTORS > 4 ? 8 : VECTORS > 2 ? 4 : VECTORS;  // that share a channel
constexpr int DEEP = (VECTORS + 31) / 32;                       // loads of a channel by a lane
constexpr int AT_ONCE = DEEP > 4 ? 1 : DEEP > 2 ? 2 : DEEP > 1 ? 4 : 8;
constexpr int STEPS = AT_ONCE < LANES ? AT_ONCE : LANES;    // channels of a lane, one after another
constexpr int ABREAST = 32 / LANES;                             // channels side by side
constexpr int ROWS = STEPS * ABREAST;                           // channels of a warp, all of one head
constexpr int TILES = (WIDTH + ROWS - 1) / ROWS;                // warps of a head
constexpr int CREW = 4;                                         // warps of a block
static_assert(BLOCKS == (HEADS * TILES + CREW - 1) / CREW, "");

__device__ __forceinline__ uint4 stream_in(const void* p) { return __ldcs((const uint4*)p); }

__device__ __forceinline__ void widen(float (&to)[VECTOR], uint4 v) {
    const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
        to[i] = WIDE ? __uint_as_float(word[i % 4]) : __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
}
__device__ __forceinline__ uint4 narrow(const float (&from)[VECTOR]) {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (WIDE) word[i] = __float_as_uint(from[i]);
        else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word[i]) : "f"(from[(2 * i + 1) % VECTOR]), "f"(from[2 * i % VECTOR]));
    return make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(__expf(-fabsf(x))); }

// Sums over the lanes of a channel: of all steps at once, so that each shuffle halves what is left. A lane gets that of step
// lane % LANES / (LANES / STEPS).
__device__ __forceinline__ float sum_of_lanes(float (&y)[STEPS], int lane) {
    int left = STEPS;
#pragma unroll
    for (int w = LANES / 2; w; w /= 2) {
        if (left > 1) {
            left /= 2;
            const bool high = lane & w;
#pragma unroll
            for (int i = 0; i < STEPS / 2; i++)
                if (i < left) y[i] = (high ? y[i + left] : y[i]) + __shfl_xor_sync(~0u, high ? y[i] : y[i + left], w);
        } else {
            y[0] += __shfl_xor_sync(~0u, y[0], w);
        }
    }
    return y[0];
}

// Block x of a sequence y: a warp takes ROWS channels of a head, whose states come while in_proj ends; then each lane finishes one.
extern "C" __global__ void __launch_bounds__(128) heads(const __grid_constant__ Args a) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, c = blockIdx.y, e = (int)a.e, channels = (int)a.channels;
    const int task = blockIdx.x * CREW + warp, head = task / TILES, first = task % TILES * ROWS;
    const bool working = head < HEADS;
    const int at = lane % LANES, within = lane / LANES, own = first + lane;
    constexpr int BYTES = WIDE ? 4 : 2;
    char* state = (char*)a.ssm + (((i64)c * HEADS + head) * WIDTH + first + within) * (STATES * BYTES) + 16 * at;
    auto some = [&](int s, int j) { return working && first + s * ABREAST + within < WIDTH && at + 32 * j < VECTORS; };
    uint4 held[STEPS][DEEP];
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int j = 0; j < DEEP; j++) {
            held[s][j] = make_uint4(0, 0, 0, 0);
            if (some(s, j)) held[s][j] = stream_in(state + (s * ABREAST * STATES * BYTES + 512 * j));
        }
    const bool mine = working && lane < ROWS && own < WIDTH;
    const int channel = head * WIDTH + own;
    const float bias = working ? __ldg(a.l.dt_bias + head) : 0.0f, rate = working ? __ldg(a.l.A + head) : 0.0f;
    const float skip = mine ? __ldg(a.l.D + channel) : 0.0f;
#if DIRECT
    const float scale = mine ? __ldg(a.l.scale + channel) : 0.0f;
#endif
    let_next_start();
    wait_for_last();
    const float *u = a.u + (i64)c * channels, *rest = a.z + (i64)c * a.rest;
    const float* select = u + e + (working ? head / (HEADS / NGROUPS) : 0) * STATES;
    const float raw = working ? __ldcg(rest + 2 * BESIDE + e + head) : 0.0f;
    const float x = mine ? __ldcg(u + channel) : 0.0f, z = mine && !GATE_LAST ? __ldcg(rest + 2 * BESIDE + channel) : 0.0f;
    float B[DEEP][VECTOR], C[DEEP][VECTOR];
#pragma unroll
    for (int j = 0; j < DEEP; j++)
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4) {
            float4 v = make_float4(0, 0, 0, 0), w = v;
            if (at + 32 * j < VECTORS) {
                const float4* from = (const float4*)(select + (at + 32 * j) * VECTOR + i);
                v = __ldcg(from), w = __ldcg(from + NGROUPS * STATES / 4);
            }
            B[j][i] = v.x, B[j][i + 1] = v.y, B[j][i + 2] = v.z, B[j][i + 3] = v.w;
            C[j][i] = w.x, C[j][i + 1] = w.y, C[j][i + 2] = w.z, C[j][i + 3] = w.w;
        }
    float dt = softplus(raw + bias);
    dt = dt < (float)a.low ? (float)a.low : dt;
    dt = dt > (float)a.high ? (float)a.high : dt;
    const float decay = ex2(dt * rate * 1.4426950408889634f), drive = dt * x;
    float y[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const float in = __shfl_sync(~0u, drive, s * ABREAST + within);
        y[s] = 0;
#pragma unroll
        for (int j = 0; j < DEEP; j++) {
            float h[VECTOR];
            widen(h, held[s][j]);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) h[i] = decay * h[i] + in * B[j][i], y[s] += h[i] * C[j][i];
            if (some(s, j)) __stcs((uint4*)(state + (s * ABREAST * STATES * BYTES + 512 * j)), narrow(h));
        }
    }
    const float sum = __shfl_sync(~0u, sum_of_lanes(y, lane), lane % ABREAST * LANES + lane / ABREAST * (LANES / STEPS) & 31);
    float out = sum + skip * x;
    if (!GATE_LAST) out *= silu(z);
#if DIRECT
    if (mine) a.yf[place<OUT>(channel, c)] = bf16(out * scale);
#else
    if (mine) a.y[(i64)c * e + channel] = out;
#endif
#if SCALED
    __shared__ float squares[CREW];
    float square = mine ? out * out : 0.0f;
#pragma unroll
    for (int w = 16; w; w /= 2) square += __shfl_xor_sync(~0u, square, w);
    if (lane == 0) squares[warp] = square;
    __syncthreads();
    if (threadIdx.x == 0) a.parts[c * PARTS_ACROSS + blockIdx.x] = (squares[0] + squares[1]) + (squares[2] + squares[3]);
#endif
}

#if !DIRECT
// Block x of a sequence y: the channels of a group, normalised, or, behind all groups, the unit beside.
extern "C" __global__ void __launch_bounds__(256) gates(const __grid_constant__ Args a) {
    __shared__ float squares[8];
    const int c = blockIdx.y, e = (int)a.e, each = e / NGROUPS, from = blockIdx.x * each;
    let_next_start();
    wait_for_last();
    const float *y = a.y + (i64)c * e, *rest = a.z + (i64)c * a.rest;
    if (blockIdx.x == NGROUPS) {
        for (int k = threadIdx.x; k < BESIDE; k += 256) a.yf[place<OUT>(k, c)] = bf16(silu(__ldcg(rest + k)) * __ldcg(rest + BESIDE + k));
        return;
    }
    float by = 1;
    if (NORMALISE) {
        float square = 0;
        for (int k = from + threadIdx.x; k < from + each; k += 256) {
            const float v = __ldcg(y + k);
            square += v * v;
        }
#pragma unroll
        for (int w = 16; w; w /= 2) square += __shfl_xor_sync(~0u, square, w);
        if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
        __syncthreads();
        float sum = 0;
        for (int i = 0; i < 8; i++) sum += squares[i];
        by = rsqrtf(sum / (float)each + (float)a.gate_eps);
    }
    for (int k = from + threadIdx.x; k < from + each; k += 256) {
        float out = __ldcg(y + k) * by * __ldg(a.l.scale + k);
        if (GATE_LAST) out *= silu(__ldcg(rest + 2 * BESIDE + k));
        a.yf[place<OUT>(BESIDE + k, c)] = bf16(out);
    }
}
#endif

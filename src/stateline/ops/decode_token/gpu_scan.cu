// What only Mamba-1 has between in_proj and out_proj; behind gpu.cu when compiled.

extern "C" __global__ void __launch_bounds__(288, 2 - A_X) x_proj(const __grid_constant__ Args a) {
    const int r = (int)a.r, n = (int)a.n;
    product<X, T_X, S_X, A_X, W_X>(
        a, a.l.x, a.uf, [](int, int, int, int) {}, [](int, int) {}, [](int, int) { return Nothing(); },
        [&](int first, int c, float4 sums, Nothing) {
            const float sum[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = first + i;
                if (row < r) a.rf[place<BF16>(row, c)] = bf16(sum[i]);
                else if (row < r + 2 * n) a.bc[c * 2 * n + row - r] = sum[i];
            }
        });
}

// h = exp2(dt rate) h + in B; adds C h to y.
__device__ __forceinline__ float4 advance(float4 h, float4 rate, float4 B, float4 C, float dt, float in, float& y) {
    h.x = ex2(dt * rate.x) * h.x + in * B.x, y += h.x * C.x;
    h.y = ex2(dt * rate.y) * h.y + in * B.y, y += h.y * C.y;
    h.z = ex2(dt * rate.z) * h.z + in * B.z, y += h.z * C.z;
    h.w = ex2(dt * rate.w) * h.w + in * B.w, y += h.w * C.w;
    return h;
}

// Sixteen channels of sixteen sequences, whose states come while x_proj ends. A warp takes eight channels of four sequences, four lanes a
// channel, four states a lane at a time; then each lane finishes one of the sequences.
extern "C" __global__ void __launch_bounds__(256) scan(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) char shared[];
    constexpr int N = STATES, MANY = 16, QUAD = 4;
    const int tile = blockIdx.x, c0 = blockIdx.y * MANY, b = min(MANY, (int)a.b - c0), e = (int)a.e;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, lines = lanes_of<BF16>(a.l.dt);
    float* bc = (float*)shared;                       // (sequence, B and C)
    char* rows = (char*)(bc + MANY * 2 * N);           // of dt_proj; what is read behind them, for a whole piece, does not count
    float2* moves = (float2*)(rows + lines * 64);      // (sequence, channel) of dt and dt u
    float2* gates = moves + MANY * 16;                 // of D u and silu(z)
    float* sums = (float*)(gates + MANY * 16);         // of four shares of dt_proj's columns
    const int q = lane & 3, within = (warp & 1) * 8 + (lane >> 2), from = (warp >> 1) * QUAD, channel = tile * 16 + within;
    const bool some = channel < e && q < N / 4;
    float* state = a.ssm + ((i64)(c0 + from) * e + channel) * N + 4 * q;
    const i64 stride = (i64)e * N;
    float4 h[QUAD];
#pragma unroll
    for (int i = 0; i < QUAD; i++)
        if (some && from + i < b) h[i] = __ldcs((const float4*)(state + i * stride));
    for (int i = threadIdx.x; i < lines * 4; i += 256) copy_in((float*)(rows + 16 * i), (const float*)(a.l.dt.data + (i64)tile * lines * 64 + 16 * i));
    const float* rates = a.l.A + (i64)channel * N;
    const float4 rate = some ? four(rates + 4 * q) : make_float4(0, 0, 0, 0);
    const int own = tile * 16 + (threadIdx.x & 15), mine = threadIdx.x >> 4;  // the element whose step size the thread finds
    const bool there = own < e && mine < b;
    const float bias = own < e ? __ldg(a.l.dt_bias + own) : 0.0f, skip = own < e ? __ldg(a.l.D + own) : 0.0f;
    let_next_start();
    wait_for_last();
    for (int i = threadIdx.x; i < b * N / 2; i += 256) copy_in(bc + 4 * i, a.bc + c0 * 2 * N + 4 * i);
    asm volatile("cp.async.commit_group;" ::: "memory");
    const float u = there ? __ldcg(a.u + (i64)(c0 + mine) * e + own) : 0.0f, z = there ? __ldcg(a.z + (i64)(c0 + mine) * e + own) : 0.0f;
    const int eight = warp & 1, g = lane >> 2, t = lane & 3, pieces = (lines + 15) / 16;
    const u16* vectors = a.rf + (c0 + eight * 8) * 32 + lane * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (warp >> 1 < pieces && eight * 8 < b) v = __ldcg((const uint4*)(vectors + (warp >> 1) * COLS * 32));
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    float c[1][4] = {{0, 0, 0, 0}};
#pragma unroll 1
    for (int piece = warp >> 1; piece < pieces; piece += 4) {
        const u32 x[1][4] = {{v.x, v.y, v.z, v.w}};
        if (piece + 4 < pieces && eight * 8 < b) v = __ldcg((const uint4*)(vectors + (piece + 4) * COLS * 32));
        u32 w[2][4];
        load_rows<BF16>(w, rows, piece * 16, lines, lane);
        add_products<BF16>(c, w, x, 1, 1);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[((warp >> 1) * MANY + eight * 8 + 2 * t + i % 2) * PAD + 2 * g + i / 2] = c[0][i];
    __syncthreads();
    const float* parts = sums + mine * PAD + (threadIdx.x & 15);
    const float raw = bias + ((parts[0] + parts[MANY * PAD]) + (parts[2 * MANY * PAD] + parts[3 * MANY * PAD]));
    const float dt = fmaxf(raw, 0.0f) + log1pf(__expf(-fabsf(raw)));
    moves[threadIdx.x] = make_float2(dt, dt * u);
    gates[threadIdx.x] = make_float2(skip * u, silu(z));
    __syncthreads();
    float y[QUAD] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        if (from + i >= b) break;
        const float2 move = moves[(from + i) * 16 + within];
        const float* both = bc + (from + i) * 2 * N;
        if (some)
            __stcs((float4*)(state + i * stride),
                   advance(h[i], rate, ((const float4*)both)[q], ((const float4*)(both + N))[q], move.x, move.y, y[i]));
#pragma unroll 1
        for (int j = q + 4; j < N / 4; j += 4) {
            if (channel >= e) break;
            float4* more = (float4*)(state + i * stride) + (j - q);
            __stcs(more, advance(__ldcs(more), four(rates + 4 * j), ((const float4*)both)[j], ((const float4*)(both + N))[j], move.x, move.y, y[i]));
        }
    }
    // Each lane's sequence: sums of four sequences over four lanes by three shuffles.
    const bool odd = q & 1, high = q & 2;
    const float low = (odd ? y[1] : y[0]) + __shfl_xor_sync(~0u, odd ? y[0] : y[1], 1);
    const float up = (odd ? y[3] : y[2]) + __shfl_xor_sync(~0u, odd ? y[2] : y[3], 1);
    const float sum = (high ? up : low) + __shfl_xor_sync(~0u, high ? low : up, 2);
    if (channel >= e || from + q >= b) return;
    const float2 gate = gates[(from + q) * 16 + within];
    a.yf[place<OUT>(channel, c0 + from + q)] = bf16((sum + gate.x) * gate.y);
}

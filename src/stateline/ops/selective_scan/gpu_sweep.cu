// selective_scan on a GPU: what chunks start from. See gpu_common.cuh for how work is laid out.

extern __shared__ __align__(16) unsigned char shared[];

// States from sums: a lane adds up what its steps leave in the state at the end of the chunk, from zero, without passing
// through the states between. The last tile comes first, so that what is forgotten is left out (a factor below 2^-64:
// less than float32 resolves, unless all that came later is that much smaller). ADJOINT: for the gradient, which runs
// backwards.
template <bool ADJOINT> __device__ __forceinline__ void sweep(const Call& k) {
    __shared__ Place p;
    if (!locate(k, p)) return;
    if (!ADJOINT && (p.chunk == k.chunks - 1 || p.last >= p.length)) return;  // nobody follows
    if (ADJOINT && p.chunk == 0) return;
    const int n = (int)k.n;
    T *u_tile = (T*)shared, *dt_tile = u_tile + BUFFER, *z_tile = dt_tile + BUFFER, *raw = z_tile + BUFFER;
    float* B = (float*)(raw + TILE * padded(k));
    float4* system = (float4*)(B + n * TILE);
    const Lane me = lane_of();
    auto fetch = [&](int s) {
        if (s >= p.first && s < p.last) {
            load_rows(u_tile, p, ADJOINT ? p.dy : p.u, s);
            load_rows(dt_tile, p, p.dt, s);
            if (ADJOINT && k.z.at) load_rows(z_tile, p, p.z, s);
            load_groups(raw, k, p, ADJOINT ? p.C : p.B, s);
        }
        commit();
    };
    const int tiles = (p.last - p.first + TILE - 1) / TILE;
    int s = ADJOINT ? p.first : p.first + (tiles - 1) * TILE;
    const int stride = ADJOINT ? TILE : -TILE;
    float far[2] = {0.0f, 0.0f};  // step sizes between this tile and where the state is wanted
    fetch(s);
    load_system(system, k, p);
    for (int tile = 0; tile < tiles; ++tile, s += stride) {
        wait<0>();
        __syncthreads();
        float dt[2][RUN], path[2][RUN], x[2][RUN], sum[2] = {0.0f, 0.0f};
        spread(B, raw, k);
        step_sizes(dt, dt_tile, k, p, me, s);
        const int here = at(me.run * RUN, me.channel);
#pragma unroll
        for (int q = 0; q < RUN; ++q) {
            const int r = ADJOINT ? q : RUN - 1 - q;
            float2 in = get2(u_tile + here + r * WIDTH);
            if (ADJOINT) {
                if (k.z.at) {
                    float2 z = get2(z_tile + here + r * WIDTH);
                    in.x *= z.x * sigmoid(z.x), in.y *= z.y * sigmoid(z.y);
                }
                sum[0] += dt[0][r], sum[1] += dt[1][r];
            } else {
                in.x *= dt[0][r], in.y *= dt[1][r];
            }
            path[0][r] = sum[0], path[1][r] = sum[1];
            x[0][r] = in.x, x[1][r] = in.y;
            if (!ADJOINT) sum[0] += dt[0][r], sum[1] += dt[1][r];
        }
        float total[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float rest = others<ADJOINT>(sum[c]);
            total[c] = __shfl_sync(FULL, rest + sum[c], threadIdx.x % LANES_C + (ADJOINT ? 32 - LANES_C : 0));
            rest += far[c];
#pragma unroll
            for (int r = 0; r < RUN; ++r) {
                path[c][r] += rest;
                keep(path[c][r]), keep(x[c][r]);
            }
        }
        __syncthreads();
        fetch(s + stride);
        const int turn = turn_of(me.run);
        bool all_gone = k.softplus;  // steps are positive then: what is forgotten stays so
        // Two states at once: their chains overlap, and the eight lanes of a pair add up four sums by four shuffles.
        const bool upper = me.run & 4, odd = me.run & 2;
#pragma unroll 1
        for (int j = 0; j < n; j += 2) {
            const int other = j + 1 < n ? 1 : 0;
            float4* system_j = system + j * PAIRS + me.pair;
            const float4 sys = system_j[0], sys1 = system_j[other * PAIRS];
            bool gone = sys.x * far[0] < FORGOTTEN && sys.y * far[1] < FORGOTTEN;
            gone = gone && sys1.x * far[0] < FORGOTTEN && sys1.y * far[1] < FORGOTTEN;
            if (__all_sync(FULL, gone)) continue;
            all_gone = false;
            float line[2][RUN], sums[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
            load_run(line[0], B + me.run * 4 + j * TILE, turn);
            load_run(line[1], B + me.run * 4 + (j + other) * TILE, turn);
#pragma unroll
            for (int r = 0; r < RUN; ++r)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    sums[0][c] = fmaf(ex2(path[c][r] * (c ? sys.y : sys.x)), x[c][r] * line[0][r], sums[0][c]);
                    sums[1][c] = fmaf(ex2(path[c][r] * (c ? sys1.y : sys1.x)), x[c][r] * line[1][r], sums[1][c]);
                }
            float both[2];
#pragma unroll
            for (int c = 0; c < 2; ++c)
                both[c] = (upper ? sums[1][c] : sums[0][c]) +
                          __shfl_xor_sync(FULL, upper ? sums[0][c] : sums[1][c], 16);
            float sum = (odd ? both[1] : both[0]) + __shfl_xor_sync(FULL, odd ? both[0] : both[1], 8);
            sum += __shfl_xor_sync(FULL, sum, 4);
            __syncwarp();  // all lanes have read what is replaced
            if (me.run % 2 == 0 && (!upper || other)) {
                const float4 mine = upper ? sys1 : sys;
                ((float*)(system_j + (upper ? PAIRS : 0)))[2 + odd] = (odd ? mine.w : mine.z) + sum;
            }
        }
        far[0] += total[0], far[1] += total[1];
        if (__syncthreads_and(all_gone)) break;  // nothing before matters, nor does the rest of the sum
    }
    wait<0>();
    __syncthreads();
    i64 row = p.chunk_row + p.chunk;
    save<true>((ADJOINT ? k.adjoint_ends : k.ends) + row * k.d * n, system, k, p);
    float* sums = (ADJOINT ? k.adjoint_sums : k.sums) + row * k.d + p.c0 + me.channel;
    if (me.run == 0) {
        if (p.c0 + me.channel < p.c1) sums[0] = far[0];
        if (p.c0 + me.channel + 1 < p.c1) sums[1] = far[1];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) chunk_ends(const __grid_constant__ Call k) { sweep<false>(k); }
extern "C" __global__ void __launch_bounds__(THREADS, 4) adjoint_ends(const __grid_constant__ Call k) { sweep<true>(k); }

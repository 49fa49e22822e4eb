// selective_scan on a GPU: the forward pass, and one token.
// See gpu_common.cuh for how work is laid out.

extern __shared__ __align__(16) unsigned char shared[];

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) scan_forward(const __grid_constant__ Call k) {
    __shared__ Place p;
    if (!locate(k, p)) return;
    const int n = (int)k.n, raw_size = TILE * padded(k);
    T *u_tile = (T*)shared, *dt_tile = u_tile + BUFFER, *z_tile = dt_tile + BUFFER;
    T *b_raw = z_tile + BUFFER, *c_raw = b_raw + raw_size;
    float *B = (float*)(c_raw + raw_size), *C = B + n * TILE;
    float4* system = (float4*)(C + n * TILE);
    auto fetch = [&](int s) {
        if (s < p.last) {
            load_rows(u_tile, p, p.u, s);
            load_rows(dt_tile, p, p.dt, s);
            load_groups(b_raw, k, p, p.B, s);
            load_groups(c_raw, k, p, p.C, s);
        }
        commit();
    };
    auto fetch_gate = [&](int s) {
        if (k.z.at && s < p.last) load_rows(z_tile, p, p.z, s);
        commit();
    };
    fetch(p.first);
    fetch_gate(p.first);
    load_system(system, k, p);  // enter() reads what the same thread writes here
    enter(system, k, p);
#pragma unroll 1
    for (int s = p.first; s < p.last; s += TILE) {
        wait<1>();
        __syncthreads();
        float dt[2][RUN], x[2][RUN], y[2][RUN], before[2] = {0.0f, 0.0f};
        spread(B, b_raw, k);
        spread(C, c_raw, k);
        {
            const Lane me = lane_of();
            const float2 D = parameter(p.D, me);
            const T* from = u_tile + at(me.run * RUN, me.channel);
            step_sizes(dt, dt_tile, k, p, me, s);
#pragma unroll
            for (int r = 0; r < RUN; ++r) {
                float2 in = get2(from + r * WIDTH);
                x[0][r] = dt[0][r] * in.x, x[1][r] = dt[1][r] * in.y;
                y[0][r] = D.x * in.x, y[1][r] = D.y * in.y;
                before[0] += dt[0][r], before[1] += dt[1][r];
                keep(x[0][r]), keep(x[1][r]), keep(dt[0][r]), keep(dt[1][r]);
            }
            before[0] = beside<true>(before[0], 0.0f), before[1] = beside<true>(before[1], 0.0f);
        }
        __syncthreads();
        fetch(s + TILE);
        {
            const Lane me = lane_of();
            const float* line_at = B + me.run * 4;
            float4* system_j = system + me.pair;
            const bool last_run = me.run == LANES_T - 1;
            const int turn = turn_of(me.run);
            float line[RUN];
            float4 sys = *system_j;
            load_run(line, line_at, turn);
#pragma unroll 1
            for (int j = 0; j < n; ++j, system_j += PAIRS) {
                float a[2][RUN], drive[2][RUN], end[2], C_line[RUN], h[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float A = c ? sys.y : sys.x;
#pragma unroll
                    for (int r = 0; r < RUN; ++r) {
                        a[c][r] = ex2(dt[c][r] * A);
                        drive[c][r] = x[c][r] * line[r];
                        end[c] = r ? fmaf(a[c][r], end[c], drive[c][r]) : drive[c][r];
                    }
                    h[c] = scan_lanes<true>(end[c], ex2(before[c] * A), c ? sys.w : sys.z);
                }
                load_run(C_line, line_at + n * TILE, turn);
                if (j + 1 < n) {  // early, for the next state
                    line_at += TILE;
                    load_run(line, line_at, turn);
                    sys = system_j[PAIRS];
                }
#pragma unroll
                for (int c = 0; c < 2; ++c)
#pragma unroll
                    for (int r = 0; r < RUN; ++r) {
                        h[c] = fmaf(a[c][r], h[c], drive[c][r]);
                        y[c][r] = fmaf(C_line[r], h[c], y[c][r]);
                    }
                __syncwarp();  // all lanes have read what is replaced
                if (last_run) *(float2*)&system_j->z = make_float2(h[0], h[1]);
            }
        }
        wait<1>();
        __syncthreads();
        {
            const Lane me = lane_of();
            T* out = z_tile + at(me.run * RUN, me.channel);
            if (k.z.at) {
#pragma unroll
                for (int r = 0; r < RUN; ++r) {
                    float2 z = get2(out + r * WIDTH);
                    y[0][r] *= z.x * sigmoid(z.x), y[1][r] *= z.y * sigmoid(z.y);
                }
            }
#pragma unroll
            for (int r = 0; r < RUN; ++r) put2(out + r * WIDTH, y[0][r], y[1][r]);
        }
        __syncthreads();
        store_rows(z_tile, p, p.y, s);
        if (!p.vectors || (p.c1 - p.c0) % VEC) __syncthreads();
        fetch_gate(s + TILE);  // where aligned, a thread loads what it has stored itself
    }
    __syncthreads();
    if (p.last == p.length) save<true>(k.state + p.seq * k.d * n, system, k, p);
}

// One token, in place: 4 lanes a channel, each every fourth quarter of the states.
struct Step {
    i64 b, d, g, n, slots, slot_stride, softplus;
    const T* u; i64 u_b;
    const T* dt; i64 dt_b;
    const T* z; i64 z_b;
    const T* B; i64 B_b, B_g;
    const T* C; i64 C_b, C_g;
    const float *A, *D, *bias;
    float* state;
    T* y;
    const void* index;
    i64 index_wide;
};

extern "C" __global__ void __launch_bounds__(256) scan_step(const __grid_constant__ Step k) {
    i64 item = ((i64)blockIdx.x * 256 + threadIdx.x) / 4;
    const int lane = threadIdx.x % 4, n = (int)k.n;
    const bool mine = item < k.b * k.d;
    if (!mine) item = 0;
    const i64 row = item / k.d, c = item % k.d, group = c * k.g / k.d;
    i64 slot = !k.index ? row : k.index_wide ? ((const i64*)k.index)[row] : ((const int*)k.index)[row];
    const bool live = mine && slot >= 0 && slot < k.slots;
    float y = 0.0f, u = 0.0f;
    if (live) {
        u = wide(k.u[row * k.u_b + c]);
        float dt = wide(k.dt[row * k.dt_b + c]) + (k.bias ? k.bias[c] : 0.0f);
        if (k.softplus) dt = softplus(dt);
        float* h = k.state + slot * k.slot_stride + c * n;
        const float* A = k.A + c * n;
        const T *B = k.B + row * k.B_b + group * k.B_g, *C = k.C + row * k.C_b + group * k.C_g;
        const float scale = dt * LOG2E, x = dt * u;
        if (n % 4 == 0 && (((i64)k.state | (i64)k.A) & 15) == 0) {
            for (int j = 4 * lane; j < n; j += 16) {
                float4 v = *(const float4*)(h + j), a = *(const float4*)(A + j);
                v.x = fmaf(ex2(scale * a.x), v.x, x * wide(B[j]));
                v.y = fmaf(ex2(scale * a.y), v.y, x * wide(B[j + 1]));
                v.z = fmaf(ex2(scale * a.z), v.z, x * wide(B[j + 2]));
                v.w = fmaf(ex2(scale * a.w), v.w, x * wide(B[j + 3]));
                *(float4*)(h + j) = v;
                y += v.x * wide(C[j]) + v.y * wide(C[j + 1]) + v.z * wide(C[j + 2]) + v.w * wide(C[j + 3]);
            }
        } else {
            for (int j = lane; j < n; j += 4) {
                h[j] = fmaf(ex2(scale * A[j]), h[j], x * wide(B[j]));
                y = fmaf(h[j], wide(C[j]), y);
            }
        }
    }
    y += __shfl_xor_sync(FULL, y, 1);
    y += __shfl_xor_sync(FULL, y, 2);
    if (mine && lane == 0) {
        if (live) {
            if (k.D) y = fmaf(k.D[c], u, y);
            if (k.z) {
                float z = wide(k.z[row * k.z_b + c]);
                y *= z * sigmoid(z);
            }
        }
        k.y[row * k.d + c] = narrow(y);
    }
}

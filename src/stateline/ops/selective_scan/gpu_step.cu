// selective_scan on a GPU: one token, in place. See gpu_common.cuh for what is shared.

#define QUAD 4                        // lanes of a channel, each every fourth quarter of the states; rows of a lane

// Filled by gpu.py in this order; every field has eight bytes. across: blocks across channels.
struct Step {
    i64 b, d, g, n, across, slots, slot_stride, softplus, vectors;
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

__device__ __forceinline__ float4 get4(const T* p) {
#if DATA == 0
    return *(const float4*)p;
#else
    const uint2 words = *(const uint2*)p;
    float4 v;
    unpack(words.x, v.x, v.y), unpack(words.y, v.z, v.w);
    return v;
#endif
}

// The state of a row, null where there is none.
__device__ __forceinline__ float* state_of(const Step& k, i64 row, i64 c) {
    if (row >= k.b || c >= k.d) return nullptr;
    const i64 slot = !k.index ? row : k.index_wide ? ((const i64*)k.index)[row] : ((const int*)k.index)[row];
    return slot >= 0 && slot < k.slots ? k.state + slot * k.slot_stride + c * k.n : nullptr;
}

// Four rows of eight channels a warp: a lane owns one row's scalars and shares them with the other lanes of its channel,
// which own the other rows'. All loads of states are under way before the first is used.
extern "C" __global__ void __launch_bounds__(THREADS) scan_step(const __grid_constant__ Step k) {
    const int lane = threadIdx.x % QUAD, n = (int)k.n, across = (int)k.across;
    const i64 c = (i64)(blockIdx.x % across) * (THREADS / QUAD) + threadIdx.x / QUAD;
    const i64 first = (i64)(blockIdx.x / across) * QUAD, mine = first + lane;
    const i64 group = k.g == 1 || c >= k.d ? 0 : c * k.g / k.d;
    float* h[QUAD];
#pragma unroll
    for (int r = 0; r < QUAD; ++r) h[r] = state_of(k, first + r, c);
    float4 v[QUAD];
    int j = 4 * lane;
    if (k.vectors && j < n) {
#pragma unroll
        for (int r = 0; r < QUAD; ++r)
            if (h[r]) v[r] = *(const float4*)(h[r] + j);
    }
    const bool live = lane == 0 ? h[0] : lane == 1 ? h[1] : lane == 2 ? h[2] : h[3];
    float u = 0.0f, dt = 0.0f, z = 0.0f;
    if (live) {
        u = wide(k.u[mine * k.u_b + c]);
        dt = wide(k.dt[mine * k.dt_b + c]) + (k.bias ? k.bias[c] : 0.0f);
        if (k.z) z = wide(k.z[mine * k.z_b + c]);
        if (k.softplus) dt = softplus(dt);
    }
    float y[QUAD] = {0.0f, 0.0f, 0.0f, 0.0f}, scale[QUAD], x[QUAD];
#pragma unroll
    for (int r = 0; r < QUAD; ++r) {
        scale[r] = __shfl_sync(FULL, dt * LOG2E, r, QUAD);
        x[r] = __shfl_sync(FULL, dt * u, r, QUAD);
    }
    const T *B = k.B + first * k.B_b + group * k.B_g, *C = k.C + first * k.C_b + group * k.C_g;
    const float* A = k.A + c * n;
    if (k.vectors) {
#pragma unroll 1
        while (j < n) {
            const float4 a = h[0] || h[1] || h[2] || h[3] ? *(const float4*)(A + j) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int r = 0; r < QUAD; ++r)
                if (h[r]) {
                    const float4 in = get4(B + r * k.B_b + j), out = get4(C + r * k.C_b + j);
                    v[r].x = fmaf(ex2(scale[r] * a.x), v[r].x, x[r] * in.x);
                    v[r].y = fmaf(ex2(scale[r] * a.y), v[r].y, x[r] * in.y);
                    v[r].z = fmaf(ex2(scale[r] * a.z), v[r].z, x[r] * in.z);
                    v[r].w = fmaf(ex2(scale[r] * a.w), v[r].w, x[r] * in.w);
                    *(float4*)(h[r] + j) = v[r];
                    y[r] = fmaf(v[r].x, out.x, fmaf(v[r].y, out.y, fmaf(v[r].z, out.z, fmaf(v[r].w, out.w, y[r]))));
                }
            j += 4 * QUAD;
            if (j < n) {
#pragma unroll
                for (int r = 0; r < QUAD; ++r)
                    if (h[r]) v[r] = *(const float4*)(h[r] + j);
            }
        }
    } else {
#pragma unroll
        for (int r = 0; r < QUAD; ++r) {
            if (!h[r]) continue;
#pragma unroll 1
            for (int i = lane; i < n; i += QUAD) {
                const float state = fmaf(ex2(scale[r] * A[i]), h[r][i], x[r] * wide(B[r * k.B_b + i]));
                h[r][i] = state;
                y[r] = fmaf(state, wide(C[r * k.C_b + i]), y[r]);
            }
        }
    }
    // Each lane's row: sums of four rows over four lanes by three shuffles.
    const bool odd = lane & 1, high = lane & 2;
    const float low = (odd ? y[1] : y[0]) + __shfl_xor_sync(FULL, odd ? y[0] : y[1], 1);
    const float up = (odd ? y[3] : y[2]) + __shfl_xor_sync(FULL, odd ? y[2] : y[3], 1);
    float sum = (high ? up : low) + __shfl_xor_sync(FULL, high ? low : up, 2);
    if (mine >= k.b || c >= k.d) return;
    if (live) {
        if (k.D) sum = fmaf(k.D[c], u, sum);
        if (k.z) sum *= z * sigmoid(z);
    } else {
        sum = 0.0f;
    }
    k.y[mine * k.d + c] = narrow(sum);
}

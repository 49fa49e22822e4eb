// selective_scan on a GPU: one token, in place. See gpu_common.cuh for what is shared.

#define QUAD 4                        // lanes of a channel, each every fourth quarter of the states; rows of a lane

// Filled by gpu.py in this order; every field has eight bytes. across: blocks across channels.
struct Step {
    i64 b, d, g, n, across, slots, slot_stride, softplus, vectors, log_rates;
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

// Four states of B or C as they are in memory, and as numbers.
#if DATA == 0
typedef float4 Four;
__device__ __forceinline__ float4 numbers(const Four& x) { return x; }
#else
typedef uint2 Four;
__device__ __forceinline__ float4 numbers(const Four& x) {
    float4 v;
    unpack(x.x, v.x, v.y), unpack(x.y, v.z, v.w);
    return v;
}
#endif

// The state of a row, null where there is none.
__device__ __forceinline__ float* state_of(const Step& k, i64 row, i64 c) {
    if (row >= k.b || c >= k.d) return nullptr;
    const i64 slot = !k.index ? row : k.index_wide ? ((const i64*)k.index)[row] : ((const int*)k.index)[row];
    return slot >= 0 && slot < k.slots ? k.state + slot * k.slot_stride + c * k.n : nullptr;
}

// What a lane reads of four states of its rows, all of it under way before the first is used.
struct Reads {
    float4 A, h[QUAD];
    Four B[QUAD], C[QUAD];
};
__device__ __forceinline__ void read(
    Reads& x, const Step& k, float* const (&h)[QUAD], const float* A, const T* B, const T* C, int j) {
    if (j >= (int)k.n) return;
#pragma unroll
    for (int r = 0; r < QUAD; ++r)
        if (h[r]) x.h[r] = __ldcs((const float4*)(h[r] + j));
    if (h[0] || h[1] || h[2] || h[3]) x.A = *(const float4*)(A + j);
#pragma unroll
    for (int r = 0; r < QUAD; ++r)
        if (h[r]) x.B[r] = *(const Four*)(B + r * k.B_b + j), x.C[r] = *(const Four*)(C + r * k.C_b + j);
}

// Four rows of eight channels a warp: enough loads under way for the rate of copying. States are not kept in caches. A lane
// owns one row's scalars and shares them with the other lanes of its channel, which own the other rows'.
extern "C" __global__ void __launch_bounds__(THREADS, 4) scan_step(const __grid_constant__ Step k) {
    const int lane = threadIdx.x % QUAD, n = (int)k.n, across = (int)k.across;
    const i64 c = (i64)(blockIdx.x % across) * (THREADS / QUAD) + threadIdx.x / QUAD;
    const i64 first = (i64)(blockIdx.x / across) * QUAD, mine = first + lane;
    const i64 group = k.g == 1 || c >= k.d ? 0 : c * k.g / k.d;
    const T *B = k.B + first * k.B_b + group * k.B_g, *C = k.C + first * k.C_b + group * k.C_g;
    const float* A = k.A + c * n;
    float* h[QUAD];
#pragma unroll
    for (int r = 0; r < QUAD; ++r) h[r] = state_of(k, first + r, c);
    const bool live = lane == 0 ? h[0] : lane == 1 ? h[1] : lane == 2 ? h[2] : h[3];
    T u_raw = (T)0, dt_raw = (T)0, z_raw = (T)0;
    float bias = 0.0f, D = 0.0f;
    if (live) {
        u_raw = k.u[mine * k.u_b + c], dt_raw = k.dt[mine * k.dt_b + c];
        if (k.z) z_raw = k.z[mine * k.z_b + c];
        if (k.bias) bias = k.bias[c];
        if (k.D) D = k.D[c];
    }
    Reads x;
    if (k.vectors) read(x, k, h, A, B, C, 4 * lane);
    const float u = wide(u_raw), raw = wide(dt_raw) + bias, size = live ? (k.softplus ? softplus(raw) : raw) : 0.0f;
    float y[QUAD] = {0.0f, 0.0f, 0.0f, 0.0f}, dt[QUAD], in[QUAD];
#pragma unroll
    for (int r = 0; r < QUAD; ++r) {
        dt[r] = __shfl_sync(FULL, size * LOG2E, r, QUAD);
        in[r] = __shfl_sync(FULL, size * u, r, QUAD);
    }
    if (k.vectors) {
#pragma unroll 1
        for (int j = 4 * lane; j < n; j += 4 * QUAD) {
            if (k.log_rates) x.A.x = -expf(x.A.x), x.A.y = -expf(x.A.y), x.A.z = -expf(x.A.z), x.A.w = -expf(x.A.w);
#pragma unroll
            for (int r = 0; r < QUAD; ++r) {
                if (!h[r]) continue;
                const float4 b = numbers(x.B[r]), g = numbers(x.C[r]);
                float4 v = x.h[r];
                v.x = fmaf(ex2(dt[r] * x.A.x), v.x, in[r] * b.x);
                v.y = fmaf(ex2(dt[r] * x.A.y), v.y, in[r] * b.y);
                v.z = fmaf(ex2(dt[r] * x.A.z), v.z, in[r] * b.z);
                v.w = fmaf(ex2(dt[r] * x.A.w), v.w, in[r] * b.w);
                __stcs((float4*)(h[r] + j), v);
                y[r] = fmaf(v.x, g.x, fmaf(v.y, g.y, fmaf(v.z, g.z, fmaf(v.w, g.w, y[r]))));
            }
            read(x, k, h, A, B, C, j + 4 * QUAD);
        }
    } else {
#pragma unroll
        for (int r = 0; r < QUAD; ++r) {
            if (!h[r]) continue;
#pragma unroll 1
            for (int j = lane; j < n; j += QUAD) {
                const float rate = k.log_rates ? -expf(A[j]) : A[j];
                const float state = fmaf(ex2(dt[r] * rate), h[r][j], in[r] * wide(B[r * k.B_b + j]));
                h[r][j] = state;
                y[r] = fmaf(state, wide(C[r * k.C_b + j]), y[r]);
            }
        }
    }
    // Each lane's row: sums of four rows over four lanes by three shuffles.
    const bool odd = lane & 1, high = lane & 2;
    const float low = (odd ? y[1] : y[0]) + __shfl_xor_sync(FULL, odd ? y[0] : y[1], 1);
    const float up = (odd ? y[3] : y[2]) + __shfl_xor_sync(FULL, odd ? y[2] : y[3], 1);
    float sum = (high ? up : low) + __shfl_xor_sync(FULL, high ? low : up, 2);
    if (mine >= k.b || c >= k.d) return;
    const float z = wide(z_raw);
    sum = fmaf(D, u, sum);
    if (k.z) sum *= z * sigmoid(z);
    k.y[mine * k.d + c] = narrow(live ? sum : 0.0f);
}

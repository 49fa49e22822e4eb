// What the forward kernels of the Kalman filter are told. Follows gpu_stage.cuh.

// What a step of covariances that are the same for all series makes of their means. seen: Σ 2^i over the entries that are there.
// entries: log 2π for each of them.
struct alignas(16) Gain {
    T K[N][M];
    Factors S;
    T logdet, entries;
    int seen;
};
// Such a step, as it lies in memory: its filtered and its predicted covariance too.
struct alignas(16) Common {
    Gain gain;
    T filtered[N][N], P[N][N];
};

// Filled by gpu.py in this order; every field has eight bytes. Results lie step by step: (steps, series, …).
struct Filter {
    i64 series, steps;
    View y, A, C, Q, R, b, d, mean0, cov0;
    const void* index; // rows of the state, negative to skip a series
    i64 index_wide, shared, times;
    T *mean, *cov, *before, *before_cov, *loglik, *mean_next, *cov_next;
    i64* failed; // of each warp, step·series + series of its first failure, by step, then series; or steps·series
    // Where series may share covariances (gpu_common.cu), else null.
    Common* common; // steps + 1 of them; of the last P alone
    i64* reached;   // of each warp, the step up to which it followed
    i64* lost;      // the step from which on S is not positive definite, or steps; and after how many steps all comes back, or 0
    i64* followed;  // of each part of the steps, whether any warp got to its end
    i64 begin, end, part; // steps [begin, end)
};

__device__ __forceinline__ i64 slot_of(const Filter& k, i64 s) {
    return !k.index ? s : k.index_wide ? ((const i64*)k.index)[s] : ((const int*)k.index)[s];
}

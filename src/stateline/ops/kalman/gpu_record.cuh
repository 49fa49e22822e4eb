// What the forward kernels of the Kalman filter are told, a thread a series or several lanes. Follows what defines T and View.

// Filled by gpu.py in this order; every field has eight bytes. Results lie step by step: (steps, series, …).
struct Record {
    i64 series, steps;
    View y, A, C, Q, R, b, d, mean0, cov0;
    const void* index; // rows of the state, negative to skip a series
    i64 index_wide, shared, times;
    T *mean, *cov, *before, *before_cov, *loglik, *mean_next, *cov_next;
    i64* failed; // of each block, step·series + series of its first failure, by step, then series; or steps·series
};

__device__ __forceinline__ i64 slot_of(const Record& k, i64 s) {
    return !k.index ? s : k.index_wide ? ((const i64*)k.index)[s] : ((const int*)k.index)[s];
}

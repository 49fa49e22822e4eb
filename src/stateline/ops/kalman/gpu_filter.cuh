// What kernels of a thread a series are told besides: where covariances that series share lie. Follows gpu_record.cuh.

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

// As in Record; null where no series may share covariances (gpu_common.cu).
struct Filter : Record {
    Common* common; // steps + 1 of them; of the last P alone
    i64* reached;   // of each warp, the step up to which it followed
    i64* lost;      // the step from which on S is not positive definite, or steps; and after how many steps all comes back, or 0
    i64* followed;  // of each part of the steps, whether any warp got to its end
    i64 begin, end, part; // steps [begin, end)
};

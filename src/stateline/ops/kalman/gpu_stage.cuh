// How the Kalman filter's numbers reach a warp of 32 series, a lane each, and leave it, so that neighbouring lanes read and write
// neighbouring bytes. Moments lie step by step, one series beside the other: what a warp writes at a step is one piece of memory.
// What lies series by series, as observations do, is moved several steps at a time. Follows gpu_matrix.cuh.
//
// LINE: bytes of a run at least.   OWN: whether anything of the system belongs to a series alone.
// What a lane keeps is an array over WIDTH, of one on a GPU. `EACH_LANE` is then no loop; where a compiler of C++ stands in for
// a GPU, in tests, it is one over all 32, from one meeting of the warp (`MEET`) to the next.

#ifndef WIDTH
#define WIDTH 1
#define MEET() __syncwarp()
#define ANY(x) __any_sync(0xffffffffu, x[0]) // whether an array over WIDTH is true in any lane
#define HERE(x) asm volatile("" : "+l"(x)) // nothing made of x is made ahead of a loop, and kept in registers through it
extern __shared__ __align__(16) unsigned char shared_bytes[];
__device__ __forceinline__ void* shared_memory() { return shared_bytes; }
#endif
#define EACH_LANE for (int own = 0, lane = threadIdx.x; own < WIDTH; ++own, ++lane)

constexpr int LANES = 32;

// An operand: adjacent numbers at p + series·s + step·t; null if there is none.
struct View {
    const T* p;
    i64 s, t;
};
// The series of a warp: `count` from `first` on.
struct Group {
    i64 first;
    int count;
};
__device__ __forceinline__ Group group_of(i64 series, i64 warp = blockIdx.x) {
    const i64 first = warp * LANES, left = series - first;
    return {first, left < LANES ? (int)left : LANES};
}

// Steps of a run of `bytes` a step.
__device__ constexpr int depth(int bytes) { return bytes >= LINE ? 1 : 2 * depth(2 * bytes); }

// act(row, i, row·apart) for every i < COUNT of 32 rows, neighbouring lanes at neighbouring i. Where rows divide a warp, a lane's
// offsets are sums.
template <int COUNT, class Do> __device__ __forceinline__ void for_each(i64 apart, Do act) {
    HERE(apart);
    EACH_LANE {
        if constexpr (LANES % COUNT == 0) {
            i64 along = lane / COUNT * apart;
#pragma unroll
            for (int k = 0; k < COUNT; ++k, along += LANES / COUNT * apart) act(lane / COUNT + k * (LANES / COUNT), lane % COUNT, along);
        } else {
#pragma unroll 4
            for (int k = 0; k < COUNT; ++k) {
                const int q = lane + k * LANES;
                act(q / COUNT, q % COUNT, q / COUNT * apart);
            }
        }
    }
}

// The largest piece that rows of COUNT numbers are read and written in.
template <int COUNT> struct Row {
    static constexpr int BYTES = COUNT * sizeof(T) % 16 == 0 ? 16 : COUNT * sizeof(T) % 8 == 0 ? 8 : sizeof(T);
    static constexpr int EACH = BYTES / sizeof(T), PIECES = COUNT / EACH;
    struct alignas(BYTES) Piece {
        T x[EACH];
    };
    static __device__ __forceinline__ void put(Piece* to, const T* x) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            Piece v;
#pragma unroll
            for (int j = 0; j < EACH; ++j) v.x[j] = x[i * EACH + j];
            to[i] = v;
        }
    }
    static __device__ __forceinline__ void get(const Piece* from, T* x) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const Piece v = from[i];
#pragma unroll
            for (int j = 0; j < EACH; ++j) x[i * EACH + j] = v.x[j];
        }
    }
};

// COUNT numbers of a lane to its row of a result (steps, series, COUNT): neighbours lie side by side.
template <int COUNT> __device__ __forceinline__ void store(T* out, Group g, int lane, i64 t, i64 series, const T* x) {
    typedef Row<COUNT> Row;
    if (lane < g.count) Row::put((typename Row::Piece*)out + (t * series + g.first + lane) * Row::PIECES, x);
}

// COUNT numbers a step of each of 32 series, for so many steps that a run of one series has LINE bytes. Rows are an odd number of
// pieces apart, so that lanes meet different banks.
template <int COUNT> struct Stage {
    typedef typename Row<COUNT>::Piece Piece;
    static constexpr int STEPS = depth(COUNT * sizeof(T)), EACH = Row<COUNT>::EACH;
    static constexpr int A_STEP = Row<COUNT>::PIECES, PIECES = STEPS * A_STEP, PITCH = PIECES | 1;
    Piece rows[LANES * PITCH];

    static __device__ __forceinline__ int place(i64 t) { return (int)t & (STEPS - 1); }
    __device__ __forceinline__ void put(int lane, i64 t, const T* x) { Row<COUNT>::put(rows + lane * PITCH + place(t) * A_STEP, x); }
    __device__ __forceinline__ void get(int lane, i64 t, T* x) const { Row<COUNT>::get(rows + lane * PITCH + place(t) * A_STEP, x); }

    // The run that holds step t, from an operand with any strides; of WHOLE ones, pieces lie as they should.
    template <bool WHOLE = false> __device__ __forceinline__ void fetch(const View& v, Group g, i64 t, i64 steps) {
        constexpr int SIZE = WHOLE ? A_STEP : COUNT, STRIDE = WHOLE ? EACH : 1;
        const i64 start = t - place(t);
        const T* from = v.p + g.first * v.s + start * v.t;
        for_each<STEPS * SIZE>(v.s, [&](int row, int i, i64 along) {
            const int step = i / SIZE;
            if (row < g.count && start + step < steps) {
                const T* number = from + along + step * v.t + i % SIZE * STRIDE;
                if constexpr (WHOLE) rows[row * PITCH + i] = *(const Piece*)number;
                else rows[row * PITCH].x[i] = *number;
            }
        });
    }
    // The run that holds step t, to a result (series, steps, COUNT).
    __device__ __forceinline__ void flush(T* out, Group g, i64 t, i64 steps) const {
        const i64 start = t - place(t), left = steps - start;
        const int used = (left < STEPS ? (int)left : STEPS) * A_STEP;
        Piece* to = (Piece*)(out + (g.first * steps + start) * COUNT);
        for_each<PIECES>(steps * A_STEP, [&](int row, int i, i64 along) {
            if (row < g.count && i < used) to[along + i] = rows[row * PITCH + i];
        });
    }
    // Whether step t is the last of its run, or the first.
    static __device__ __forceinline__ bool full(i64 t, i64 steps) { return place(t) == STEPS - 1 || t == steps - 1; }
    static __device__ __forceinline__ bool begins(i64 t) { return place(t) == 0; }
};

// A covariance a lane, on its way to a result.
struct Covariances {
    typedef Row<N * N> Row_;
    static constexpr int PITCH = Row_::PIECES | 1;
    typename Row_::Piece rows[LANES * PITCH];

    __device__ __forceinline__ void put(int lane, const T (&P)[N][N]) { Row_::put(rows + lane * PITCH, (const T*)P); }
    // Those of the warp's first `count` series, to step t of a result (steps, series, N, N).
    __device__ __forceinline__ void flush(T* out, Group g, int count, i64 t, i64 series) const {
        typename Row_::Piece* to = (typename Row_::Piece*)out + (t * series + g.first) * Row_::PIECES;
        for_each<Row_::PIECES>(Row_::PIECES, [&](int row, int i, i64 along) {
            if (row < count) to[along + i] = rows[row * PITCH + i];
        });
    }
};

// A matrix of the system as it is now, of each lane (EACH) or of all.
template <int R, int K, bool EACH = OWN> struct Part {
    static constexpr int APART = EACH ? LANES : 1;
    alignas(16) T x[R * K * APART];

    // From an operand, for step t; the symmetric part of it if FOLD.
    template <bool FOLD> __device__ __forceinline__ void fetch(const View& v, Group g, i64 t) {
        EACH_LANE {
            const T* from = v.p + t * v.t + (EACH ? (g.first + (lane < g.count ? lane : g.count - 1)) * v.s : 0);
#pragma unroll(EACH ? 8 : 1)
            for (int i = EACH ? 0 : lane; i < R * K; i += EACH ? 1 : LANES) {
                T value = v.p ? from[i] : (T)0;
                if (FOLD) value = (value + from[i % K * K + i / K]) * (T)0.5;
                x[i * APART + (EACH ? lane : 0)] = value;
            }
        }
    }
    __device__ __forceinline__ void get(int lane, T (&X)[R][K]) const {
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < K; ++j) X[i][j] = x[(i * K + j) * APART + (EACH ? lane : 0)];
    }
    __device__ __forceinline__ void get(int lane, T (&v)[R]) const {
#pragma unroll
        for (int i = 0; i < R; ++i) v[i] = x[i * APART + (EACH ? lane : 0)];
    }
    // That of all.
    __device__ __forceinline__ const T (&all() const)[R][K] { return *(const T(*)[R][K])x; }
};

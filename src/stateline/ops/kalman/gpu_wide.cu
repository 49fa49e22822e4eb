// The Kalman filter on a GPU, several lanes a series. See gpu_wide.cuh for the arithmetic.

typedef Record Filter;

struct Series : Correction {
    Vector<M> logs; // of pivots

    __device__ __forceinline__ Matrix<N, N>& filtered() { return P; }
    __device__ __forceinline__ void start_solving(const Lane&) {}
    __device__ __forceinline__ void solve_all(const Lane& l) {
        for (int j = l.lane; j < N; j += G) solve(K_turned, j, [](int, T) {});
    }
    __device__ __forceinline__ void keep(const Lane& l, const Tile<N, N>&) {
        for (int i = l.lane; i < M; i += G) logs[i] = log(pivot[i]);
    }
    // log N(e; 0, S) of the entries that are seen.
    __device__ __forceinline__ T loglik() const {
        T square = (T)0, logdet = (T)0;
        int count = 0;
#pragma unroll 4
        for (int i = 0; i < M; ++i) {
            square = madd(S(M, i), divided(S(M, i), pivot[i], inverse[i]), square);
            logdet += logs[i], count += seen(y[i]);
        }
        return (T)-0.5 * (square + logdet + (T)count * (T)1.8378770664093453);
    }
};
struct System {
    Matrix<N, N> A_turned, Q;
};
typedef Room<Series, System> Whole;
#ifdef ROOM
static_assert(sizeof(Whole) == ROOM, "gpu_plan.py and gpu_wide.cu lay shared memory out alike");
#endif

__device__ __forceinline__ void fetch(Whole& room, const Filter& k, i64 first, int count, i64 t) {
    EACH_LANE(OWN ? count : SERIES) {
        System& to = room.systems[OWN ? x.series : 0];
        const T *A = k.A.at(first + x.series, t), *Q = k.Q.at(first + x.series, t);
        for (int q = OWN ? x.lane : x.at; q < N * N; q += OWN ? G : THREADS) {
            to.A_turned(q % N, q / N) = A[q];
            to.Q(q / N, q % N) = (Q[q] + Q[q % N * N + q / N]) * (T)0.5;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) kalman_forward(const __grid_constant__ Filter k) {
    Whole& room = *(Whole*)shared_memory();
    const i64 first = (i64)blockIdx.x * SERIES;
    const int count = k.series - first < SERIES ? (int)(k.series - first) : SERIES;
    i64 slot[WIDTH], when[WIDTH];
    u64 missed[WIDTH];
    fetch(room, k, first, count, 0);
    EACH_LANE(count) {
        Series& s = room.of(x);
        slot[own] = slot_of(k, first + x.series), when[own] = k.steps;
        const i64 row = slot[own] < 0 ? 0 : slot[own];
        const T *mean = k.mean0.at(row, 0), *cov = k.cov0.at(row, 0);
        for (int i = x.lane; i < N; i += G) s.m[i] = mean[i];
        for (int q = x.lane; q < N * N; q += G) s.P(q / N, q % N) = (cov[q] + cov[q % N * N + q / N]) * (T)0.5;
    }
    for (i64 t = 0; t < k.steps; ++t) {
        if (t > 0 && k.times & 5) fetch(room, k, first, count, t);
        look(room, k, first, count, t);
        MEET();
        mask(room, k, first, count, t, t == 0 || k.times & 10, missed);
        EACH_LANE(count) {
            const i64 s = first + x.series, row = t * k.series + s;
            if (x.lane == 0 && t + 1 < k.steps) SOON(k.y.at(s, t + 1));
            if (!k.before) continue;
            room.of(x).m.write(x, k.before + row * N);
            if (!k.shared || s == 0) room.of(x).P.write(x, k.before_cov + (k.shared ? t : row) * (N * N));
        }
        correct(room, k, first, count, t);
        if (k.index) {
            EACH_LANE(count) {
                if (slot[own] >= 0) continue;
                for (int i = x.lane; i < N; i += G) room.of(x).filtered_m[i] = (T)0;
                for (int q = x.lane; q < N * N; q += G) room.of(x).P(q / N, q % N) = (T)0;
            }
            MEET();
        }
        EACH_LANE(count) {
            Series& s = room.of(x);
            const i64 row = t * k.series + first + x.series;
            if (x.lane == 0) {
                const T loglik = slot[own] < 0 ? (T)0 : s.loglik();
                bool lost = false;
#pragma unroll 4
                for (int i = 0; i < M; ++i) lost |= !seen(s.pivot[i]);
                if (lost && when[own] == k.steps) when[own] = t;
                k.loglik[row] = loglik;
            }
            if (k.mean) {
                s.filtered_m.write(x, k.mean + row * N);
                if (!k.shared || first + x.series == 0) s.P.write(x, k.cov + (k.shared ? t : row) * (N * N));
            }
            const System& now = room.system(x);
            Tile<N, N> FA;
            FA.clear(), FA.add(x, s.P, now.A_turned), FA.store(x, s.rest_turned);
            const T* b = k.b.p ? k.b.at(first + x.series, t) : nullptr;
            for (int i = x.lane; i < N; i += G) s.m[i] = dot(b ? b[i] : (T)0, now.A_turned, i, s.filtered_m);
        }
        MEET();
        EACH_LANE(count) {
            Series& s = room.of(x);
            const System& now = room.system(x);
            Tile<N, N> P;
            P.clear(), P.add(x, now.Q), P.add(x, s.rest_turned, now.A_turned), P.store_symmetric(x, s.P);
        }
        MEET();
    }
    EACH_LANE(count) {
        const i64 s = first + x.series;
        if (x.lane == 0) room.failed[x.series] = slot[own] < 0 ? k.steps * k.series : when[own] * k.series + s;
        if (slot[own] < 0) continue;
        room.of(x).m.write(x, k.mean_next + slot[own] * N);
        if (!k.shared || s == 0) room.of(x).P.write(x, k.cov_next + slot[own] * (N * N));
    }
    MEET();
    EACH_LANE(count) {
        if (x.at) continue;
        i64 least = k.steps * k.series;
        for (int i = 0; i < count; ++i) least = room.failed[i] < least ? room.failed[i] : least;
        k.failed[blockIdx.x] = least;
    }
}

// info (2): series and step of the first failure of all, or (−1, −1). One block.
extern "C" __global__ void __launch_bounds__(THREADS) first_failure(const __grid_constant__ Filter k) {
    i64* least = (i64*)shared_memory();
    const i64 none = k.steps * k.series, count = (k.series + SERIES - 1) / SERIES;
    EACH_LANE(SERIES) {
        i64 first = none;
#pragma unroll 8
        for (i64 i = x.at; i < count; i += THREADS) first = k.failed[i] < first ? k.failed[i] : first;
        least[x.at] = first;
    }
    MEET();
    EACH_LANE(SERIES) {
        if (x.at) continue;
        i64 first = none;
        for (int i = 0; i < THREADS; ++i) first = least[i] < first ? least[i] : first;
        k.failed[count] = first < none ? first % k.series : -1;
        k.failed[count + 1] = first < none ? first / k.series : -1;
        k.failed[count + 2] = 0; // not looked for
    }
}

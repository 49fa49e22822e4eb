// The gradient of the Kalman filter, several lanes a series: that of `step_backward` in reference.py, under the same names.
// See gpu_wide.cuh for the arithmetic.

// Filled by gpu.py in this order; every field has eight bytes. times, rows: bits of A, C, Q, R, b, d (1, 2, 4 …) that vary in
// time, and that each series has of its own. Gradients of moments are contiguous, null for zero. Of what all series share,
// results hold a row for each block.
struct Gradient {
    i64 series, steps;
    View y, A, C, R, d, before, before_cov, loglik;
    const T *mean, *cov, *predicted_mean, *predicted_cov, *mean_next, *cov_next;
    T *dy, *dA, *dC, *dQ, *dR, *db, *dd, *dmean0, *dcov0;
    i64 shared, times, rows;
};

// dP, dm: gradients of the moments at the step after.   W, g: of the filtered moments.   db, dd: what has come together so far.
// dS: S⁻¹ before. What is not needed any more makes room for what comes.
struct Series : Correction {
    Matrix<N, N> dP, rest, F;
    Matrix<N, M> K;
    Matrix<M, M> dS;
    Vector<N> dm, g, half_g, Pg, Cw, db;
    Vector<M> w, z, minus_dy, dd;

    __device__ __forceinline__ Matrix<N, N>& filtered() { return F; }
    __device__ __forceinline__ Matrix<N, N>& W() { return F; }
    __device__ __forceinline__ Matrix<N, N>& dP_A() { return rest_turned; }
    __device__ __forceinline__ Matrix<N, N>& dP_A_turned() { return P_rest_turned; }
    __device__ __forceinline__ Matrix<N, N>& W_rest() { return rest_turned; }
    __device__ __forceinline__ Matrix<N, M>& WK() { return Z_turned; }
    __device__ __forceinline__ Matrix<N, M>& half_dZ() { return Z_turned; }
    __device__ __forceinline__ Matrix<M, N>& dS_C() { return RK_turned; }

    __device__ __forceinline__ void start_solving(const Lane& l) {
        for (int q = l.lane; q < M * M; q += G) dS(q / M, q % M) = (T)(q / M == q % M);
    }
    __device__ __forceinline__ void solve_all(const Lane& l) {
        for (int j = l.lane; j < N; j += G) solve(K_turned, j, [&](int i, T v) { K(j, i) = v; });
        for (int j = l.lane; j < M; j += G) solve(dS, j, [](int, T) {});
    }
    __device__ __forceinline__ void keep(const Lane& l, const Tile<N, N>& made) {
        made.store(l, rest);
        for (int i = l.lane; i < M; i += G) w[i] = dot((T)0, dS, i, e);
    }
};
struct System {
    Matrix<N, N> A;
};
typedef Room<Series, System> Whole;
#ifdef ROOM
static_assert(sizeof(Whole) == ROOM, "gpu_plan.py and gpu_wide_backward.cu lay shared memory out alike");
#endif

// What has come together of the gradients of matrices.
struct Sums {
    Tile<N, N> A, Q;
    Tile<M, N> C;
    Tile<M, M> R;
};

// I × J numbers of each series, in its room at `place`, to row `t` of `steps` of each series (apart), or their sum to that of the
// block.
template <int I, int J, class Of>
__device__ __forceinline__ void give(Whole& room, T* out, i64 first, int count, i64 t, i64 steps, bool apart, Of place) {
    MEET();
    EACH_LANE(count) {
        if (apart) place(room.of(x)).write(x, out + ((first + x.series) * steps + t) * (I * J));
    }
    EACH_LANE(SERIES) {
        if (apart) continue;
        for (int q = x.at; q < I * J; q += THREADS) {
            T sum = (T)0;
#pragma unroll 1
            for (int series = 0; series < count; ++series) sum += place(room.of(Lane(series * G)))(q / J, q % J);
            out[(blockIdx.x * steps + t) * (I * J) + q] = sum;
        }
    }
    MEET();
}

// The gradients of the system that `which` names (bits as of `times`), and 0 in their place.
__device__ __forceinline__ void give_all(Whole& room, const Gradient& k, i64 first, int count, i64 t, i64 which, Sums (&sums)[WIDTH]) {
    if (!which) return;
    const i64 steps = k.times & which ? k.steps : 1; // all of `which` vary in time, or none
    EACH_LANE(count) {
        Series& s = room.of(x);
        Sums& of = sums[own];
        if (which & 1) of.A.store(x, s.rest_turned), of.A.clear();
        if (which & 2) of.C.store(x, s.RK_turned), of.C.clear();
        if (which & 4) of.Q.store(x, s.P_rest_turned), of.Q.clear();
        if (which & 8) of.R.store_symmetric(x, s.dS), of.R.clear();
    }
    if (which & 1) give<N, N>(room, k.dA, first, count, t, steps, k.rows & 1, [](Series& s) -> Matrix<N, N>& { return s.rest_turned; });
    if (which & 2) give<M, N>(room, k.dC, first, count, t, steps, k.rows & 2, [](Series& s) -> Matrix<M, N>& { return s.RK_turned; });
    if (which & 4) give<N, N>(room, k.dQ, first, count, t, steps, k.rows & 4, [](Series& s) -> Matrix<N, N>& { return s.P_rest_turned; });
    if (which & 8) give<M, M>(room, k.dR, first, count, t, steps, k.rows & 8, [](Series& s) -> Matrix<M, M>& { return s.dS; });
    if (which & 16) give<1, N>(room, k.db, first, count, t, steps, k.rows & 16, [](Series& s) -> Vector<N>& { return s.db; });
    if (which & 32) give<1, M>(room, k.dd, first, count, t, steps, k.rows & 32, [](Series& s) -> Vector<M>& { return s.dd; });
    EACH_LANE(count) {
        Series& s = room.of(x);
        for (int i = x.lane; which & 16 && i < N; i += G) s.db[i] = (T)0;
        for (int i = x.lane; which & 32 && i < M; i += G) s.dd[i] = (T)0;
    }
}

// Gradients of a result's covariances, where they are given and this series' own, added to those lanes hold.
__device__ __forceinline__ void receive(const Lane& l, Tile<N, N>& W, const T* cov) {
    if (cov) W.each(l, [cov](int i, int j, T& v) { v += (cov[i * N + j] + cov[j * N + i]) * (T)0.5; });
}
// One of (steps of a series, N × N), or null.
__device__ __forceinline__ const T* cov_of(const Gradient& k, const T* covs, i64 series, i64 step, i64 steps) {
    return !covs || k.shared && series ? nullptr : covs + (series * steps + step) * (N * N);
}
__device__ __forceinline__ T mean_of(const T* means, i64 row, int i) { return means ? means[row * N + i] : (T)0; }

__device__ __forceinline__ void fetch(Whole& room, const Gradient& k, i64 first, int count, i64 t) {
    EACH_LANE(OWN ? count : SERIES) {
        const T* A = k.A.at(first + x.series, t);
        for (int q = OWN ? x.lane : x.at; q < N * N; q += OWN ? G : THREADS) room.systems[OWN ? x.series : 0].A(q / N, q % N) = A[q];
    }
}

// Back through the prediction, to g and W, of which W stays with the lanes.
__device__ __forceinline__ void through_prediction(
    Whole& room, const Gradient& k, i64 first, int count, i64 t, Sums (&sums)[WIDTH], Tile<N, N> (&W)[WIDTH]) {
    EACH_LANE(count) {
        Series& s = room.of(x);
        const Matrix<N, N>& A = room.system(x).A;
        Tile<N, N> A_dP;
        A_dP.clear(), A_dP.add(x, A, s.dP), A_dP.store(x, s.dP_A_turned()), A_dP.store_turned(x, s.dP_A());
        sums[own].Q.add(x, s.dP);
        for (int i = x.lane; i < N; i += G) {
            s.db[i] += s.dm[i];
            s.g[i] = dot(mean_of(k.mean, (first + x.series) * k.steps + t, i), A, i, s.dm);
            s.half_g[i] = (T)0.5 * s.g[i];
        }
    }
    MEET();
    EACH_LANE(count) {
        Series& s = room.of(x);
        Tile<N, N> dA;
        dA.clear(), dA.add(x, s.dP_A_turned(), s.F), dA.scale((T)2), dA.add(x, s.dm, s.filtered_m);
        sums[own].A.add(dA);
        W[own].clear(), W[own].add(x, room.system(x).A, s.dP_A());
        receive(x, W[own], cov_of(k, k.cov, first + x.series, t, k.steps));
    }
}

// Back through the correction, from g, W and `slope` of the log-likelihood to this step's predicted moments.
__device__ __forceinline__ void through_correction(
    Whole& room, const Gradient& k, i64 first, int count, i64 t, Sums (&sums)[WIDTH], Tile<N, N> (&W)[WIDTH]) {
    EACH_LANE(count) {
        Series& s = room.of(x);
        const i64 series = first + x.series;
        const T slope = k.loglik.p ? *k.loglik.at(series, t) : (T)0;
        for (int i = x.lane; i < M; i += G) {
            s.z[i] = dot((T)0, s.K, i, s.g);
            const T dy = madd(-slope, s.w[i], s.z[i]);
            s.minus_dy[i] = -dy, s.dd[i] -= dy;
            k.dy[(series * k.steps + t) * M + i] = dy;
        }
        for (int i = x.lane; i < N; i += G) s.Pg[i] = dot((T)0, s.P, i, s.g), s.Cw[i] = dot((T)0, s.C, i, s.w);
    }
    MEET();
    EACH_LANE(count) {
        Series& s = room.of(x);
        const T slope = k.loglik.p ? *k.loglik.at(first + x.series, t) : (T)0;
        W[own].store_symmetric(x, s.W());
        for (int q = x.lane; q < M * M; q += G) {
            const int i = q / M, j = q % M;
            if (j > i) continue;
            const T through_mean = madd(s.z[i], s.w[j], s.w[i] * s.z[j]);
            const T dS = (T)0.5 * madd(slope, madd(s.w[i], s.w[j], -s.dS(i, j)), -through_mean);
            s.dS(i, j) = s.dS(j, i) = seen(s.y[i]) && seen(s.y[j]) ? dS : (T)0; // other rows of C are 0
        }
    }
    MEET();
    EACH_LANE(count) {
        Series& s = room.of(x);
        Tile<N, M> WK;
        WK.clear(), WK.add(x, s.W(), s.K), WK.store(x, s.WK());
        Tile<N, N> W_rest;
        W_rest.clear(), W_rest.add(x, s.W(), s.rest), W_rest.store(x, s.W_rest());
    }
    MEET();
    Tile<M, N> half_dZ[WIDTH]; // of C P: dS C − Kᵀ W rest
    EACH_LANE(count) {
        Series& s = room.of(x);
        Tile<M, M> dR;
        dR.clear(), dR.add(x, s.dS), dR.add(x, s.WK(), s.K);
        sums[own].R.add(dR);
        half_dZ[own].clear(), half_dZ[own].add(x, s.dS, s.C), half_dZ[own].store(x, s.dS_C());
        half_dZ[own].template add<true>(x, s.K, s.W_rest());
    }
    MEET();
    EACH_LANE(count) {
        Series& s = room.of(x);
        const i64 series = first + x.series;
        half_dZ[own].store_turned(x, s.half_dZ());
        Tile<N, N> dP;
        dP.clear(), dP.add(x, s.rest, s.W_rest()), dP.add(x, s.C, s.dS_C());
        dP.add(x, s.half_g, s.Cw), dP.add(x, s.Cw, s.half_g);
        receive(x, dP, cov_of(k, k.predicted_cov, series, t, k.steps));
        dP.store_symmetric(x, s.dP);
        for (int i = x.lane; i < N; i += G)
            s.dm[i] = dot(s.g[i], s.C, i, s.minus_dy) + mean_of(k.predicted_mean, series * k.steps + t, i);
    }
    MEET();
    EACH_LANE(count) {
        Series& s = room.of(x);
        Tile<M, N> dC;
        dC.clear(), dC.add(x, s.half_dZ(), s.P), dC.scale((T)2), dC.add(x, s.w, s.Pg), dC.add(x, s.minus_dy, s.m);
        sums[own].C.add(dC);
    }
    MEET();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) kalman_backward(const __grid_constant__ Gradient k) {
    Whole& room = *(Whole*)shared_memory();
    const i64 first = (i64)blockIdx.x * SERIES;
    const int count = k.series - first < SERIES ? (int)(k.series - first) : SERIES;
    Sums sums[WIDTH];
    Tile<N, N> W[WIDTH];
    u64 missed[WIDTH];
    fetch(room, k, first, count, k.steps - 1);
    EACH_LANE(count) {
        Series& s = room.of(x);
        sums[own].A.clear(), sums[own].C.clear(), sums[own].Q.clear(), sums[own].R.clear();
        W[own].clear(), receive(x, W[own], cov_of(k, k.cov_next, first + x.series, 0, 1)), W[own].store_symmetric(x, s.dP);
        for (int i = x.lane; i < N; i += G) s.dm[i] = mean_of(k.mean_next, first + x.series, i), s.db[i] = (T)0;
        for (int i = x.lane; i < M; i += G) s.dd[i] = (T)0;
    }
    for (i64 t = k.steps - 1; t >= 0; --t) {
        const bool last = t == k.steps - 1;
        if (!last && k.times & 1) fetch(room, k, first, count, t);
        look(room, k, first, count, t);
        EACH_LANE(count) {
            Series& s = room.of(x);
            const i64 series = first + x.series;
            s.P.read(x, k.before_cov.at(series, t)), s.m.read(x, k.before.at(series, t));
            if (!t) continue;
            for (int i = x.lane * 32; i < N * N * (int)sizeof(T); i += G * 32) SOON((const char*)k.before_cov.at(series, t - 1) + i);
            if (x.lane == 0) {
                SOON(k.before.at(series, t - 1));
                SOON(k.y.at(series, t - 1));
            }
        }
        MEET();
        mask(room, k, first, count, t, last || k.times & 10, missed);
        correct(room, k, first, count, t);
        through_prediction(room, k, first, count, t, sums, W);
        through_correction(room, k, first, count, t, sums, W);
        give_all(room, k, first, count, t, k.times, sums);
    }
    give_all(room, k, first, count, 0, ~k.times & (15 | (k.db ? 16 : 0) | (k.dd ? 32 : 0)), sums);
    EACH_LANE(count) {
        const i64 series = first + x.series;
        room.of(x).dm.write(x, k.dmean0 + series * N);
        room.of(x).dP.write(x, k.dcov0 + series * (N * N));
    }
}

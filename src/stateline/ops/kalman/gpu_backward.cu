// The gradient of the Kalman filter, a thread a series: that of `step_backward` in reference.py, under the same names.

// Filled by gpu.py in this order; every field has eight bytes. times, rows: bits of A, C, Q, R, b, d (1, 2, 4 …) that vary in
// time, and that each series has of its own. Gradients of moments are contiguous, null for zero. Of what all series share,
// results hold a row for each warp.
struct Gradient {
    i64 series, steps;
    View y, A, C, R, d, before, before_cov, loglik;
    const T *mean, *cov, *predicted_mean, *predicted_cov, *mean_next, *cov_next;
    T *dy, *dA, *dC, *dQ, *dR, *db, *dd, *dmean0, *dcov0;
    i64 shared, times, rows;
};

constexpr int WIDEST = N > M ? N : M;

// Numbers of each lane on their way to a result.
struct Sums {
    static constexpr int PITCH = WIDEST * WIDEST | 1;
    T rows[LANES * PITCH];

    // COUNT numbers a lane to row `t` of `steps` of each series (apart), or their sum to that of the warp.
    template <int COUNT, class Of> __device__ __forceinline__ void give(T* out, Group g, i64 t, i64 steps, bool apart, Of numbers) {
        EACH_LANE {
            const T* x = numbers(own);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) rows[lane * PITCH + i] = x[i];
        }
        MEET();
        if (apart) {
            T* to = out + (g.first * steps + t) * COUNT;
            for_each<COUNT>(steps * COUNT, [&](int row, int i, i64 along) {
                if (row < g.count) to[along + i] = rows[row * PITCH + i];
            });
        } else {
            EACH_LANE {
                for (int i = lane; i < COUNT; i += LANES) {
                    T sum = (T)0;
#pragma unroll 8
                    for (int row = 0; row < g.count; ++row) sum += rows[row * PITCH + i];
                    out[(blockIdx.x * steps + t) * COUNT + i] = sum;
                }
            }
        }
        MEET();
    }
};

// What a warp has in shared memory.
struct Room {
    Part<N, N> A;
    Part<M, N> C;
    Part<M, M> R;
    Part<M, 1> d;
    Stage<M> y, dy;
    Stage<1> loglik;
    Stage<N> before;
    Stage<N * N> before_cov;
    Sums sums;
};
#ifdef ROOM
static_assert(sizeof(Room) == ROOM, "gpu.py and gpu_backward.cu lay shared memory out alike");
#endif

// Of one series: gradients of the moments at the step after, and what has come together of those of the system.
struct Adjoint {
    T m[N], P[N][N], A[N][N], C[M][N], Q[N][N], R[M][M], b[N], d[M], y[M];

    // The gradients of results added: of means at `mean`, of covariances at `cov`; null for zero.
    static __device__ __forceinline__ void receive(T (&g)[N], T (&W)[N][N], const T* mean, const T* cov) {
        if (mean) {
#pragma unroll
            for (int i = 0; i < N; ++i) g[i] += mean[i];
        }
        if (cov) {
#pragma unroll
            for (int i = 0; i < N; ++i)
#pragma unroll
                for (int j = 0; j < N; ++j) W[i][j] += (cov[i * N + j] + cov[j * N + i]) * (T)0.5;
        }
    }
    // Back through the prediction from mf, F: to the filtered moments, g and W.
    __device__ __forceinline__ void through_prediction(
        T (&g)[N], T (&W)[N][N], const T (&A_now)[N][N], const T (&mf)[N], const T (&F)[N][N]) {
        T AF[N][N], PAF[N][N], PA[N][N], none[N];
        times(AF, A_now, F), times(PAF, P, AF);
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j) A[i][j] += madd(m[i], mf[j], (T)2 * PAF[i][j]);
        add(Q, P), add(b, m);
        clear(none), clear(W);
        apply_turned(g, none, A_now, m);
        times(PA, P, A_now), symmetric_turned(W, A_now, PA);
    }
    // Back through the correction of m0, P0 from g, W, and `slope` of the log-likelihood, to this step's predicted moments.
    __device__ __forceinline__ void through_correction(
        const Correction& now, const T (&e)[M], const T (&y_now)[M], const T (&C_now)[M][N], const T (&m0)[N],
        const T (&P0)[N][N], const T (&g)[N], const T (&W)[N][N], T slope) {
        T w[M], z[M], Pg[N], Cw[N], dS[M][M], KW[M][N], SZ[M][N], KWP[M][N], Wr[N][N];
        clear(z), clear(Pg), clear(Cw);
#pragma unroll
        for (int i = 0; i < M; ++i) w[i] = e[i];
        now.S.solve(w);
        apply_turned(z, z, now.K, g), apply(Pg, Pg, P0, g), apply_turned(Cw, Cw, C_now, w);
#pragma unroll
        for (int i = 0; i < M; ++i) y[i] = madd(-slope, w[i], z[i]), d[i] -= y[i];
#pragma unroll
        for (int i = 0; i < M; ++i) {
            T inverse[M];
#pragma unroll
            for (int j = 0; j < M; ++j) inverse[j] = (T)(i == j);
            now.S.solve(inverse);
#pragma unroll
            for (int j = 0; j < M; ++j)
                if (j <= i) {
                    const T through_mean = madd(z[i], w[j], w[i] * z[j]);
                    dS[i][j] = dS[j][i] = (T)0.5 * madd(slope, madd(w[i], w[j], -inverse[j]), -through_mean);
                }
        }
        turned_times(KW, now.K, W), times(SZ, dS, now.Z), times(KWP, KW, now.rest_P);
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
            for (int j = 0; j < M; ++j)
                if (j <= i) {
                    T v = seen(y_now[i]) && seen(y_now[j]) ? dS[i][j] : (T)0;
#pragma unroll
                    for (int k = 0; k < N; ++k) v = madd(KW[i][k], now.K[k][j], v);
                    R[i][j] = R[j][i] = R[i][j] + v;
                }
#pragma unroll
            for (int k = 0; k < N; ++k)
                C[i][k] += madd(w[i], Pg[k], madd(-y[i], m0[k], (T)2 * (SZ[i][k] - KWP[i][k])));
        }
        times(Wr, W, now.rest), times(SZ, dS, C_now);
        clear(P), symmetric_turned(P, now.rest, Wr), symmetric_turned(P, C_now, SZ);
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j) P[i][j] = madd((T)0.5, madd(g[i], Cw[j], Cw[i] * g[j]), P[i][j]);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            T v = g[i];
#pragma unroll
            for (int k = 0; k < M; ++k) v = madd(-C_now[k][i], y[k], v);
            m[i] = v;
        }
    }
};

extern "C" __global__ void __launch_bounds__(LANES, WARPS) kalman_backward(const __grid_constant__ Gradient k) {
    Room& room = *(Room*)shared_memory();
    const Group g = group_of(k.series);
    Adjoint lanes[WIDTH];
    i64 place[WIDTH], cov_place[WIDTH]; // of the first step of a series among means and covariances
    bool weight[WIDTH];                 // whether gradients of covariances are this series'
    room.A.template fetch<false>(k.A, g, k.steps - 1), room.C.template fetch<false>(k.C, g, k.steps - 1);
    room.R.template fetch<true>(k.R, g, k.steps - 1), room.d.template fetch<false>(k.d, g, k.steps - 1);
    EACH_LANE {
        Adjoint& x = lanes[own];
        const i64 s = g.first + (lane < g.count ? lane : g.count - 1), cov = k.shared ? 0 : s;
        place[own] = s * k.steps, cov_place[own] = cov * k.steps, weight[own] = !k.shared || s == 0;
        clear(x.m), clear(x.P), clear(x.A), clear(x.C), clear(x.Q), clear(x.R), clear(x.b), clear(x.d);
        x.receive(x.m, x.P, k.mean_next ? k.mean_next + s * N : nullptr,
                  k.cov_next && weight[own] ? k.cov_next + cov * (N * N) : nullptr);
    }
    for (i64 t = k.steps - 1; t >= 0; --t) {
        if (room.y.full(t, k.steps)) room.y.fetch(k.y, g, t, k.steps);
        if (room.before.full(t, k.steps)) room.before.template fetch<true>(k.before, g, t, k.steps);
        if (room.before_cov.full(t, k.steps)) room.before_cov.template fetch<true>(k.before_cov, g, t, k.steps);
        if (k.loglik.p && room.loglik.full(t, k.steps)) room.loglik.fetch(k.loglik, g, t, k.steps);
        if (t < k.steps - 1) {
            if (k.times & 1) room.A.template fetch<false>(k.A, g, t);
            if (k.times & 2) room.C.template fetch<false>(k.C, g, t);
            if (k.times & 8) room.R.template fetch<true>(k.R, g, t);
            if (k.times & 32) room.d.template fetch<false>(k.d, g, t);
        }
        MEET();
        EACH_LANE {
            Adjoint& x = lanes[own];
            T y[M], d[M], e[M], C[M][N], R[M][M], A[N][N], before[N], P[N][N], m[N], F[N][N], to_m[N], to_F[N][N];
            T slope = (T)0;
            room.y.get(lane, t, y), room.d.get(lane, d), room.C.get(lane, C), room.R.get(lane, R);
            room.before.get(lane, t, before), room.before_cov.get(lane, t, (T*)P), room.A.get(lane, A);
            if (k.loglik.p) room.loglik.get(lane, t, &slope);
            look(e, C, R, y, d, before);
            Correction now;
            now.of(F, P, C, R);
            apply(m, before, now.K, e);
            x.through_prediction(to_m, to_F, A, m, F);
            const i64 token = (place[own] + t) * N, cov_token = (cov_place[own] + t) * (N * N);
            x.receive(to_m, to_F, k.mean ? k.mean + token : nullptr, k.cov && weight[own] ? k.cov + cov_token : nullptr);
            x.through_correction(now, e, y, C, before, P, to_m, to_F, slope);
            x.receive(x.m, x.P, k.predicted_mean ? k.predicted_mean + token : nullptr,
                      k.predicted_cov && weight[own] ? k.predicted_cov + cov_token : nullptr);
            room.dy.put(lane, t, x.y);
        }
        MEET();
        if (room.dy.begins(t)) room.dy.flush(k.dy, g, t, k.steps);
        if (k.times & 1) room.sums.template give<N * N>(k.dA, g, t, k.steps, k.rows & 1, [&](int own) { return (const T*)lanes[own].A; });
        if (k.times & 2) room.sums.template give<M * N>(k.dC, g, t, k.steps, k.rows & 2, [&](int own) { return (const T*)lanes[own].C; });
        if (k.times & 4) room.sums.template give<N * N>(k.dQ, g, t, k.steps, k.rows & 4, [&](int own) { return (const T*)lanes[own].Q; });
        if (k.times & 8) room.sums.template give<M * M>(k.dR, g, t, k.steps, k.rows & 8, [&](int own) { return (const T*)lanes[own].R; });
        if (k.times & 16) room.sums.template give<N>(k.db, g, t, k.steps, k.rows & 16, [&](int own) { return lanes[own].b; });
        if (k.times & 32) room.sums.template give<M>(k.dd, g, t, k.steps, k.rows & 32, [&](int own) { return lanes[own].d; });
        EACH_LANE {
            Adjoint& x = lanes[own];
            if (k.times & 1) clear(x.A);
            if (k.times & 2) clear(x.C);
            if (k.times & 4) clear(x.Q);
            if (k.times & 8) clear(x.R);
            if (k.times & 16) clear(x.b);
            if (k.times & 32) clear(x.d);
        }
    }
    if (!(k.times & 1)) room.sums.template give<N * N>(k.dA, g, 0, 1, k.rows & 1, [&](int own) { return (const T*)lanes[own].A; });
    if (!(k.times & 2)) room.sums.template give<M * N>(k.dC, g, 0, 1, k.rows & 2, [&](int own) { return (const T*)lanes[own].C; });
    if (!(k.times & 4)) room.sums.template give<N * N>(k.dQ, g, 0, 1, k.rows & 4, [&](int own) { return (const T*)lanes[own].Q; });
    if (!(k.times & 8)) room.sums.template give<M * M>(k.dR, g, 0, 1, k.rows & 8, [&](int own) { return (const T*)lanes[own].R; });
    if (k.db && !(k.times & 16)) room.sums.template give<N>(k.db, g, 0, 1, k.rows & 16, [&](int own) { return lanes[own].b; });
    if (k.dd && !(k.times & 32)) room.sums.template give<M>(k.dd, g, 0, 1, k.rows & 32, [&](int own) { return lanes[own].d; });
    room.sums.template give<N>(k.dmean0, g, 0, 1, true, [&](int own) { return lanes[own].m; });
    room.sums.template give<N * N>(k.dcov0, g, 0, 1, true, [&](int own) { return (const T*)lanes[own].P; });
}

// The Kalman filter on a GPU, a thread a series. Follows gpu_filter.cuh.

// What a warp has in shared memory; of its end only as much as is kept (gpu.py knows these sizes).
struct Room {
    Part<N, N> A, Q;
    Part<M, N> C;
    Part<M, M> R;
    Part<N, 1> b;
    Part<M, 1> d;
    i64 failed[LANES];
    Stage<M> y;
    Covariances cov, before_cov; // cov: the state's too, at the end
};
#ifdef ROOM
static_assert(sizeof(Room) == ROOM, "gpu.py and gpu.cu lay shared memory out alike");
#endif

extern "C" __global__ void __launch_bounds__(LANES, WARPS) kalman_forward(const __grid_constant__ Filter k) {
    Room& room = *(Room*)shared_memory();
    const Group g = group_of(k.series);
    const int covs = !k.shared ? g.count : g.first == 0; // series whose covariances are wanted
    const i64 start = k.reached ? k.reached[blockIdx.x] : 0; // up to which its covariances were those of all (gpu_common.cu)
    if (start == k.steps) return;
    T m[WIDTH][N], P[WIDTH][N][N];
    i64 slot[WIDTH], when[WIDTH];
    room.A.template fetch<false>(k.A, g, 0), room.Q.template fetch<true>(k.Q, g, 0);
    room.C.template fetch<false>(k.C, g, 0), room.R.template fetch<true>(k.R, g, 0);
    room.b.template fetch<false>(k.b, g, 0), room.d.template fetch<false>(k.d, g, 0);
    EACH_LANE {
        slot[own] = slot_of(k, g.first + (lane < g.count ? lane : g.count - 1));
        when[own] = start && *k.lost < start ? *k.lost : k.steps;
        const i64 row = slot[own] < 0 ? 0 : slot[own];
        const T* mean = start ? k.mean_next + row * N : k.mean0.p + row * k.mean0.s;
        const T* cov = start ? &k.common[start].P[0][0] : k.cov0.p + row * k.cov0.s;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            m[own][i] = mean[i];
#pragma unroll
            for (int j = 0; j <= i; ++j)
                P[own][i][j] = P[own][j][i] = start ? cov[i * N + j] : (cov[i * N + j] + cov[j * N + i]) * (T)0.5;
        }
    }
    for (i64 t = start; t < k.steps; ++t) {
        if (room.y.begins(t)) room.y.fetch(k.y, g, t, k.steps);
        if (t > 0 && k.times) {
            if (k.times & 1) room.A.template fetch<false>(k.A, g, t);
            if (k.times & 2) room.C.template fetch<false>(k.C, g, t);
            if (k.times & 4) room.Q.template fetch<true>(k.Q, g, t);
            if (k.times & 8) room.R.template fetch<true>(k.R, g, t);
            if (k.times & 16) room.b.template fetch<false>(k.b, g, t);
            if (k.times & 32) room.d.template fetch<false>(k.d, g, t);
        }
        MEET();
        EACH_LANE {
            T y[M], d[M], e[M], w[M], C[M][N], R[M][M];
            room.y.get(lane, t, y), room.d.get(lane, d), room.C.get(lane, C), room.R.get(lane, R);
            if (k.before) store<N>(k.before, g, lane, t, k.series, m[own]), room.before_cov.put(lane, P[own]);
            look(e, C, R, y, d, m[own]);
            Correction now;
            now.of(P[own], P[own], C, R);
            if (now.logdet != now.logdet && when[own] == k.steps) when[own] = t;
            int count = 0;
#pragma unroll
            for (int i = 0; i < M; ++i) w[i] = e[i], count += seen(y[i]);
            now.S.solve(w);
            T loglik = log_normal(e, w, now.logdet, log_entries(count));
            apply(m[own], m[own], now.K, e);
            if (slot[own] < 0) loglik = (T)0, clear(m[own]), clear(P[own]);
            store<1>(k.loglik, g, lane, t, k.series, &loglik);
            if (k.mean) store<N>(k.mean, g, lane, t, k.series, m[own]), room.cov.put(lane, P[own]);
        }
        MEET();
        if (k.before) room.before_cov.flush(k.before_cov, g, covs, t, k.shared ? 1 : k.series);
        if (k.mean) room.cov.flush(k.cov, g, covs, t, k.shared ? 1 : k.series);
        EACH_LANE {
            T A[N][N], Q[N][N], b[N];
            room.A.get(lane, A), room.Q.get(lane, Q), room.b.get(lane, b);
            predict(m[own], P[own], A, Q, b);
        }
        MEET();
    }
    EACH_LANE {
        const bool live = lane < g.count && slot[own] >= 0;
        room.failed[lane] = live ? when[own] * k.series + g.first + lane : k.steps * k.series;
        if (live) {
#pragma unroll
            for (int i = 0; i < N; ++i) k.mean_next[slot[own] * N + i] = m[own][i];
        }
        room.cov.put(lane, P[own]);
    }
    MEET();
    EACH_LANE {
        if (lane == 0) {
            i64 first = k.steps * k.series;
            for (int i = 0; i < LANES; ++i) first = room.failed[i] < first ? room.failed[i] : first;
            k.failed[blockIdx.x] = first;
        }
    }
    for_each<Row<N * N>::PIECES>(0, [&](int row, int i, i64) {
        const i64 to = row < covs ? slot_of(k, g.first + row) : -1;
        if (to >= 0) ((Row<N * N>::Piece*)k.cov_next)[to * Row<N * N>::PIECES + i] = room.cov.rows[row * Covariances::PITCH + i];
    });
}

// info (2): series and step of the first failure of all, or (−1, −1). One block.
extern "C" __global__ void __launch_bounds__(LANES) first_failure(const __grid_constant__ Filter k) {
    i64* least = (i64*)shared_memory();
    const i64 none = k.steps * k.series, count = (k.series + LANES - 1) / LANES;
    EACH_LANE {
        i64 first = none;
#pragma unroll 8
        for (i64 i = lane; i < count; i += LANES) first = k.failed[i] < first ? k.failed[i] : first;
        least[lane] = first;
    }
    MEET();
    EACH_LANE {
        if (lane) continue;
        i64 first = none;
        for (int i = 0; i < LANES; ++i) first = least[i] < first ? least[i] : first;
        k.failed[count] = first < none ? first % k.series : -1;
        k.failed[count + 1] = first < none ? first / k.series : -1;
        k.failed[count + 2] = 0; // not looked for
    }
}

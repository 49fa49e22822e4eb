// The Kalman filter of series that share matrices and start, and miss the same entries as far as they do. One warp leads: it
// computes the covariances of all, a row a lane. The others follow a launch behind with means and likelihoods, a thread a
// series, until a series of theirs misses something else than the first one; kalman_forward goes on from there. Whoever
// computes a number does the same products in the same order: its bits do not tell which. Follows gpu_filter.cuh.

// What the leading warp has in shared memory.
struct Lead {
    Part<N, N, false> A, Q;
    Part<M, N, false> C;
    Part<M, M, false> R;
    alignas(16) T P[N][N], filtered[N][N], rest[N][N], K[N][M];
    alignas(16) T Z[M][N], seen_C[M][N], seen_R[M][M]; // of C and R: as they are where entries are missing
    alignas(16) int seen[LANES];                       // of so many steps, as in Common
};

// What a following warp has.
struct Follow {
    typedef Stage<M> Observations;
    Part<N, N, false> A;
    Part<M, N, false> C;
    Part<N, 1> b;
    Part<M, 1> d;
    Common steps[Observations::STEPS];
    Observations y;
};
#ifdef ROOM
static_assert((sizeof(Lead) > sizeof(Follow) ? sizeof(Lead) : sizeof(Follow)) == ROOM, "gpu.py lays shared memory out alike");
#endif

// out = x Y.
template <int K, int J> __device__ __forceinline__ void row_times(T (&out)[J], const T (&x)[K], const T (&Y)[K][J]) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
        T v = x[0] * Y[0][j];
#pragma unroll
        for (int k = 1; k < K; ++k) v = madd(x[k], Y[k][j], v);
        out[j] = v;
    }
}
// Row i of a symmetric matrix, as far as the diagonal, and its column.
__device__ __forceinline__ void put_row(T (&P)[N][N], int i, const T (&row)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j)
        if (j <= i) P[i][j] = P[j][i] = row[j];
}
__device__ __forceinline__ void copy(T (&to)[N], const T (&from)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = from[j];
}

// Row `lane` of the gain K and of what the filtered covariance is made of, rest P and K R; returns log det S.
__device__ __forceinline__ T correct(Lead& room, Common& now, int lane, T (&rest_P)[N], T (&KR)[M]) {
    T whole[M][M], K[M], rest[N];
    Factors S;
    symmetric(whole, room.seen_R, room.Z, room.seen_C);
    const T logdet = S.of(whole);
#pragma unroll
    for (int j = 0; j < M; ++j) K[j] = room.Z[j][lane];
    S.solve(K);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        T v = (T)(lane == j);
#pragma unroll
        for (int k = 0; k < M; ++k) v = madd(-K[k], room.seen_C[k][j], v);
        room.rest[lane][j] = rest[j] = v;
    }
    row_times(rest_P, rest, room.P), row_times(KR, K, room.seen_R);
#pragma unroll
    for (int j = 0; j < M; ++j) room.K[lane][j] = now.K[lane][j] = K[j];
    if (lane > 0) return logdet;
    now.logdet = logdet;
#pragma unroll
    for (int i = 0; i < M; ++i) {
        now.S.pivot[i] = S.pivot[i], now.S.inverse[i] = S.inverse[i];
#pragma unroll
        for (int j = 0; j < i; ++j) now.S.L[i][j] = S.L[i][j];
    }
    return logdet;
}

// Steps [middle, end) of the covariances.
__device__ __forceinline__ void lead(const Filter& k) {
    Lead& room = *(Lead*)shared_memory();
    const Group first = {0, 1};
    const bool alone = k.launch > 1 && !k.followed[k.launch - 1];
    T rest_P[WIDTH][N], KR[WIDTH][M];
    i64 lost = k.middle ? *k.lost : k.steps;
    int seen_before = -1;
    EACH_LANE {
        if (lane == 0) k.followed[k.launch + 1] = 0;
    }
    if (alone) return;
    room.A.template fetch<false>(k.A, first, k.middle), room.Q.template fetch<true>(k.Q, first, k.middle);
    room.C.template fetch<false>(k.C, first, k.middle), room.R.template fetch<true>(k.R, first, k.middle);
    EACH_LANE {
        if (lane < N) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const T symmetric = (k.cov0.p[lane * N + j] + k.cov0.p[j * N + lane]) * (T)0.5;
                room.P[lane][j] = k.middle ? k.common[k.middle].P[lane][j] : symmetric;
            }
        }
    }
    for (i64 t = k.middle; t < k.end; ++t) {
        if ((t & LANES - 1) == 0) {
            EACH_LANE {
                int seen_now = 0;
                if (t + lane < k.end) {
                    for (int i = 0; i < M; ++i) seen_now |= seen(k.y.p[(t + lane) * k.y.t + i]) << i;
                }
                room.seen[lane] = seen_now;
            }
            MEET();
        }
        const int seen_now = room.seen[(t & LANES - 1)];
        if (seen_now != seen_before || k.times & 15) {
            if (t > k.middle) {
                if (k.times & 1) room.A.template fetch<false>(k.A, first, t);
                if (k.times & 2) room.C.template fetch<false>(k.C, first, t);
                if (k.times & 4) room.Q.template fetch<true>(k.Q, first, t);
                if (k.times & 8) room.R.template fetch<true>(k.R, first, t);
            }
            MEET();
            EACH_LANE {
                if (lane < M) {
                    const bool here = seen_now >> lane & 1;
#pragma unroll
                    for (int j = 0; j < N; ++j) room.seen_C[lane][j] = here ? room.C.all()[lane][j] : (T)0;
#pragma unroll
                    for (int j = 0; j < M; ++j)
                        room.seen_R[lane][j] = here && seen_now >> j & 1 ? room.R.all()[lane][j] : (T)(lane == j);
                }
            }
            MEET();
            seen_before = seen_now;
        }
        Common& now = k.common[t];
        EACH_LANE {
            if (lane < N) {
                T column[N];
#pragma unroll
                for (int j = 0; j < N; ++j) column[j] = room.P[j][lane];
                copy(now.P[lane], room.P[lane]);
#pragma unroll
                for (int i = 0; i < M; ++i) {
                    T v = room.seen_C[i][0] * column[0];
#pragma unroll
                    for (int j = 1; j < N; ++j) v = madd(room.seen_C[i][j], column[j], v);
                    room.Z[i][lane] = v;
                }
            }
        }
        MEET();
        EACH_LANE {
            if (lane < N) {
                const T logdet = correct(room, now, lane, rest_P[own], KR[own]);
                if (lane == 0) now.seen = (T)seen_now;
                if (logdet != logdet && lost == k.steps) lost = t;
            }
        }
        MEET();
        EACH_LANE {
            if (lane < N) {
                T row[N], none[N];
                clear(none);
                apply(row, none, room.rest, rest_P[own]), apply(row, row, room.K, KR[own]);
                put_row(room.filtered, lane, row);
            }
        }
        MEET();
        EACH_LANE {
            if (lane < N) {
                T row[N], AF[N];
                copy(now.filtered[lane], room.filtered[lane]);
                row_times(AF, room.A.all()[lane], room.filtered);
                apply(row, room.Q.all()[lane], room.A.all(), AF);
                put_row(room.P, lane, row);
            }
        }
        MEET();
    }
    EACH_LANE {
        if (lane < N) copy(k.common[k.end].P[lane], room.P[lane]);
        if (lane == 0) *k.lost = lost;
    }
}

// The same covariance to a row of each of `count` series of a result (steps, series, N, N).
__device__ __forceinline__ void spread(T* out, Group g, int count, i64 t, i64 series, const T (&P)[N][N]) {
    typedef Row<N * N> Row;
    typename Row::Piece* to = (typename Row::Piece*)out + (t * series + g.first) * Row::PIECES;
    const typename Row::Piece* from = (const typename Row::Piece*)P;
    for_each<Row::PIECES>(Row::PIECES, [&](int row, int i, i64 along) {
        if (row < count) to[along + i] = from[i];
    });
}

// Whether two covariances have the same bits.
__device__ __forceinline__ bool same(const T* a, const T* b) {
    const unsigned *x = (const unsigned*)a, *y = (const unsigned*)b;
    bool found = true;
    for (int i = 0; i < (int)(N * N * sizeof(T) / sizeof(unsigned)); ++i) found = found && x[i] == y[i];
    return found;
}

// Steps [begin, middle) of a warp's series, or as far as they miss what the first one does.
__device__ __forceinline__ void follow(const Filter& k, i64 warp) {
    Follow& room = *(Follow*)shared_memory();
    constexpr int STEPS = Follow::Observations::STEPS;
    const Group g = group_of(k.series, warp);
    const int covs = !k.shared ? g.count : g.first == 0; // series whose covariances are wanted
    const i64 rows = k.shared ? 1 : k.series;
    if (k.begin && k.reached[warp] != k.begin) return;
    T m[WIDTH][N];
    bool apart[WIDTH];
    room.A.template fetch<false>(k.A, g, k.begin), room.C.template fetch<false>(k.C, g, k.begin);
    room.b.template fetch<false>(k.b, g, k.begin), room.d.template fetch<false>(k.d, g, k.begin);
    EACH_LANE {
        const i64 s = g.first + (lane < g.count ? lane : g.count - 1);
        const T* mean = k.begin ? k.mean_next + s * N : k.mean0.p + s * k.mean0.s;
#pragma unroll
        for (int i = 0; i < N; ++i) m[own][i] = mean[i];
        apart[own] = !k.begin && k.cov0.s && !same(k.cov0.p, k.cov0.p + s * k.cov0.s);
    }
    i64 t = k.begin;
    for (; t < k.middle; ++t) {
        const int place = room.y.place(t);
        if (room.y.begins(t)) {
            const int left = k.middle - t < STEPS ? (int)(k.middle - t) : STEPS;
            room.y.fetch(k.y, g, t, k.steps);
            EACH_LANE {
                typedef typename Row<16 / sizeof(T)>::Piece Piece;
                for (int i = lane; i < left * (int)(sizeof(Common) / sizeof(Piece)); i += LANES)
                    ((Piece*)room.steps)[i] = ((const Piece*)(k.common + t))[i];
            }
            MEET();
            EACH_LANE {
                for (int i = 0; i < left && lane < g.count; ++i) {
                    T y[M];
                    int seen_now = 0;
                    room.y.get(lane, t + i, y);
#pragma unroll
                    for (int j = 0; j < M; ++j) seen_now |= seen(y[j]) << j;
                    apart[own] |= seen_now != (int)room.steps[i].seen;
                }
            }
            if (ANY(apart)) break;
        }
        if (t > k.begin && k.times & 51) {
            MEET();
            if (k.times & 1) room.A.template fetch<false>(k.A, g, t);
            if (k.times & 2) room.C.template fetch<false>(k.C, g, t);
            if (k.times & 16) room.b.template fetch<false>(k.b, g, t);
            if (k.times & 32) room.d.template fetch<false>(k.d, g, t);
            MEET();
        }
        const Common& now = room.steps[place];
        EACH_LANE {
            T y[M], d[M], e[M], w[M], C[M][N], A[N][N], b[N];
            room.y.get(lane, t, y), room.d.get(lane, d), room.C.get(lane, C);
            if (k.before) store<N>(k.before, g, lane, t, k.series, m[own]);
            residual(e, C, y, d, m[own]);
            int count = 0;
#pragma unroll
            for (int i = 0; i < M; ++i) w[i] = e[i], count += seen(y[i]);
            now.S.solve(w);
            const T loglik = log_normal(e, w, now.logdet, count);
            apply(m[own], m[own], now.K, e);
            store<1>(k.loglik, g, lane, t, k.series, &loglik);
            if (k.mean) store<N>(k.mean, g, lane, t, k.series, m[own]);
            room.A.get(lane, A), room.b.get(lane, b);
            T next[N];
            apply(next, b, A, m[own]);
#pragma unroll
            for (int i = 0; i < N; ++i) m[own][i] = next[i];
        }
        if (k.before) spread(k.before_cov, g, covs, t, rows, now.P);
        if (k.mean) spread(k.cov, g, covs, t, rows, now.filtered);
        if (room.y.full(t, k.steps)) MEET();
    }
    EACH_LANE {
        if (lane < g.count && t) {
#pragma unroll
            for (int i = 0; i < N; ++i) k.mean_next[(g.first + lane) * N + i] = m[own][i];
        }
        if (lane) continue;
        k.reached[warp] = t;
        if (t == k.steps) k.failed[warp] = (*k.lost) * k.series + (*k.lost < k.steps ? g.first : 0);
        else if (t == k.middle) k.followed[k.launch] = 1;
    }
    if (t == k.steps) spread(k.cov_next, g, covs, 0, rows, k.common[t].P);
}

extern "C" __global__ void __launch_bounds__(LANES, WARPS) kalman_common(const __grid_constant__ Filter k) {
    if (blockIdx.x) follow(k, blockIdx.x - 1);
    else if (k.middle < k.end) lead(k);
}

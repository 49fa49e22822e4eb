// The Kalman filter of series that share matrices and start, and miss the same entries as far as they do. One warp leads: it
// computes the covariances of all. The others follow with means and likelihoods, a thread a series, until a series of theirs
// misses something else than the first one; kalman_forward goes on from there. Whoever computes a number does the same
// products in the same order: its bits do not tell which. Follows gpu_filter.cuh.

constexpr int MATRIX = N * N;

// 16 bytes, of which steps are made.
struct alignas(16) Piece {
    unsigned x[4];
};
constexpr int PIECES = sizeof(Common) / sizeof(Piece), GAIN = sizeof(Gain) / sizeof(Piece), AT_ONCE = 8;
// Whether a lane keeps the system in registers as it follows.
constexpr bool HELD = (N * N + M * N + N + M) * sizeof(T) <= 128;

// Whether each lane of the leading warp computes all there is, in registers; else a row.
constexpr bool ALONE = N <= 4 && M <= 4;

// What the leading warp has in shared memory.
struct Lead {
    Part<N, N, false> A, Q;
    Part<M, N, false> C;
    Part<M, M, false> R;
    alignas(16) int seen[LANES]; // of so many steps, as in Gain
    alignas(16) T P[N][N], filtered[N][N], rest[N][N], K[N][M];
    alignas(16) T Z[M][N], seen_C[M][N], seen_R[M][M]; // of C and R: as they are where entries are missing
    alignas(16) T known[N][N];                         // an earlier P, to see whether it comes back
};

// What a following warp has.
struct Follow {
    Part<N, N, false> A;
    Part<M, N, false> C;
    Part<N, 1> b;
    Part<M, 1> d;
    Gain gains[Stage<M>::STEPS];
    Stage<M> y;
};
// What a warp has that hands the covariances of a step to LANES warps of series.
struct Spread {
    alignas(16) T filtered[N][N];
    T P[N][N];
    i64 reached[LANES];
};
#ifdef ROOM
static_assert(sizeof(Lead) == LEAD && sizeof(Follow) == ROOM, "gpu.py lays shared memory out alike");
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
// Whether any of COUNT numbers have other bits.
template <int COUNT> __device__ __forceinline__ bool differ(const T* a, const T* b) {
    union Bits {
        T x;
        unsigned words[sizeof(T) / 4];
    };
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const Bits one = {a[i]}, other = {b[i]};
        found |= one.words[0] ^ other.words[0] | one.words[sizeof(Bits) / 4 - 1] ^ other.words[sizeof(Bits) / 4 - 1];
    }
    return found;
}

// store(i, load(i)) of every i < count, a lane each, with several loads under way.
template <class What, class Load, class Store> __device__ __forceinline__ void move(int count, Load load, Store store) {
    EACH_LANE {
        for (int first = lane; first < count; first += AT_ONCE * LANES) {
            What some[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
                if (first + j * LANES < count) some[j] = load(first + j * LANES);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
                if (first + j * LANES < count) store(first + j * LANES, some[j]);
        }
    }
}

// ---- covariances, once -----------------------------------------------------------------------------------------------

// Everything in registers of each lane, alike.
struct Alone {
    T A[N][N], Q[N][N], C[M][N], R[M][M], P[N][N], known[N][N]; // C, R: as they are where entries are missing

    static __device__ __forceinline__ void put(T (&to)[N][N], const T (&from)[N][N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) copy(to[i], from[i]);
    }
    // From a covariance; from its symmetric part if `fold`.
    __device__ __forceinline__ void start(Lead&, const T* from, bool fold) {
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j) P[i][j] = fold ? (from[i * N + j] + from[j * N + i]) * (T)0.5 : from[i * N + j];
    }
    __device__ __forceinline__ void remember(Lead&) { put(known, P); }
    // Whether P is what was remembered.
    __device__ __forceinline__ bool back(const Lead&) const { return !differ<MATRIX>(&P[0][0], &known[0][0]); }
    __device__ __forceinline__ void last(const Lead&, Common& now) const { put(now.P, P); }
    // The system as it is where `seen_now` tells what is there.
    __device__ __forceinline__ void look(const Lead& room, int seen_now) {
        room.A.get(0, A), room.Q.get(0, Q), room.C.get(0, C), room.R.get(0, R);
#pragma unroll
        for (int i = 0; i < M; ++i) {
            const bool here = seen_now >> i & 1;
#pragma unroll
            for (int k = 0; k < N; ++k) C[i][k] = here ? C[i][k] : (T)0;
#pragma unroll
            for (int j = 0; j < M; ++j) R[i][j] = here && seen_now >> j & 1 ? R[i][j] : (T)(i == j);
        }
    }
    // A step, from P to P. Returns log det S.
    __device__ __forceinline__ T step(Lead&, Common& now) {
        T F[N][N], m[N], none[N];
        Correction found;
        put(now.P, P);
        found.of(F, P, C, R);
        put(now.filtered, F);
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < M; ++j) now.gain.K[i][j] = found.K[i][j];
        now.gain.S = found.S, now.gain.logdet = found.logdet;
        clear(m), clear(none);
        predict(m, F, A, Q, none);
        put(P, F);
        return found.logdet;
    }
};

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
    for (int j = 0; j < M; ++j) room.K[lane][j] = now.gain.K[lane][j] = K[j];
    if (lane > 0) return logdet;
    now.gain.logdet = logdet;
#pragma unroll
    for (int i = 0; i < M; ++i) {
        now.gain.S.pivot[i] = S.pivot[i], now.gain.S.inverse[i] = S.inverse[i];
#pragma unroll
        for (int j = 0; j < i; ++j) now.gain.S.L[i][j] = S.L[i][j];
    }
    return logdet;
}

// A row a lane, in shared memory.
struct Rows {
    __device__ __forceinline__ void start(Lead& room, const T* from, bool fold) {
        EACH_LANE {
            for (int i = lane; i < MATRIX; i += LANES)
                room.P[i / N][i % N] = fold ? (from[i] + from[i % N * N + i / N]) * (T)0.5 : from[i];
        }
        MEET();
    }
    __device__ __forceinline__ void remember(Lead& room) {
        EACH_LANE {
            if (lane < N) copy(room.known[lane], room.P[lane]);
        }
        MEET();
    }
    __device__ __forceinline__ bool back(const Lead& room) const {
        bool other[WIDTH];
        EACH_LANE other[own] = lane < N && differ<N>(room.P[lane], room.known[lane]);
        return !ANY(other);
    }
    __device__ __forceinline__ void last(const Lead& room, Common& now) const {
        EACH_LANE {
            if (lane < N) copy(now.P[lane], room.P[lane]);
        }
    }
    __device__ __forceinline__ void look(Lead& room, int seen_now) {
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
    }
    __device__ __forceinline__ T step(Lead& room, Common& now) {
        T rest_P[WIDTH][N], KR[WIDTH][M], logdet = (T)0;
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
            if (lane < N) logdet = correct(room, now, lane, rest_P[own], KR[own]);
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
        return logdet;
    }
};

template <bool> struct Leader { typedef Alone Type; };
template <> struct Leader<false> { typedef Rows Type; };

// Steps [begin, end) of the covariances. Those of a constant system settle: as soon as one has the bits of an earlier one
// (found as Brent 1980 does), with nothing else missing since, all that follows has been computed before.
extern "C" __global__ void __launch_bounds__(LANES) kalman_lead(const __grid_constant__ Filter k) {
    Lead& room = *(Lead*)shared_memory();
    const Group first = {0, 1};
    const int times = (int)k.times & 15; // of A, C, Q, R
    const bool wanted = !k.part || k.followed[k.part - 1];
    i64 lost = k.begin ? k.lost[0] : k.steps, known = 0, most = 1;
    int period = k.begin ? (int)k.lost[1] : 0, seen_before = period ? k.common[k.begin - 1].gain.seen : -1;
    bool other[WIDTH], ready = false; // ready: the system is here
    k.followed[k.part] = 0;
    if (!wanted) return;
    Leader<ALONE>::Type leader;
    leader.start(room, k.begin ? &k.common[k.begin].P[0][0] : k.cov0.p, !k.begin);
    for (i64 t = k.begin; t < k.end; ++t) {
        const int place = (int)t & (LANES - 1);
        if (place == 0) {
            MEET();
            EACH_LANE {
                int seen_now = 0;
                if (t + lane < k.end) {
                    for (int i = 0; i < M; ++i) seen_now |= seen(k.y.p[(t + lane) * k.y.t + i]) << i;
                }
                room.seen[lane] = seen_now;
            }
            MEET();
        }
        const int seen_now = room.seen[place];
        if (period && seen_now == seen_before) {
            const int left = k.end - t < LANES - place ? (int)(k.end - t) : LANES - place;
            EACH_LANE other[own] = lane < left && room.seen[(place + lane) & (LANES - 1)] != seen_now;
            const int count = ANY(other) ? 1 : left;
            const Piece* from = (const Piece*)(k.common + (t - period));
            Piece* to = (Piece*)(k.common + t);
            move<Piece>(
                count * PIECES, [&](int i) { return from[i / PIECES % period * PIECES + i % PIECES]; },
                [&](int i, const Piece& x) { to[i] = x; });
            MEET();
            t += count - 1;
            continue;
        }
        if (period) leader.start(room, &k.common[t - period].P[0][0], false);
        const int fetch = ready ? times : 15;
        if (fetch) {
            MEET();
            if (fetch & 1) room.A.template fetch<false>(k.A, first, t);
            if (fetch & 2) room.C.template fetch<false>(k.C, first, t);
            if (fetch & 4) room.Q.template fetch<true>(k.Q, first, t);
            if (fetch & 8) room.R.template fetch<true>(k.R, first, t);
            MEET();
        }
        if (seen_now != seen_before) leader.remember(room), known = t, most = 1;
        if (seen_now != seen_before || fetch) leader.look(room, seen_now);
        seen_before = seen_now, period = 0, ready = true;
        const T logdet = leader.step(room, k.common[t]);
        EACH_LANE {
            int count = 0;
#pragma unroll
            for (int i = 0; i < M; ++i) count += seen_now >> i & 1;
            if (lane == 0) k.common[t].gain.seen = seen_now, k.common[t].gain.entries = log_entries(count);
        }
        if (logdet != logdet && lost == k.steps) lost = t;
        if (times) continue;
        if (leader.back(room)) period = (int)(t + 1 - known);
        else if (t + 1 - known == most) leader.remember(room), known = t + 1, most *= 2;
    }
    if (period) leader.start(room, &k.common[k.end - period].P[0][0], false);
    leader.last(room, k.common[k.end]);
    if (threadIdx.x == 0) k.lost[0] = lost, k.lost[1] = period; // others may not know log det S
}

// ---- means and likelihoods of each series ----------------------------------------------------------------------------

// The system as it is now, for a lane.
struct Held {
    T A[N][N], C[M][N], b[N], d[M];

    __device__ __forceinline__ void get(const Follow& room, int lane) {
        room.A.get(lane, A), room.C.get(lane, C), room.b.get(lane, b), room.d.get(lane, d);
    }
};

// `left` steps of observations from t on, of each series; some rows at a time, with several loads under way.
__device__ __forceinline__ void fetch_run(Stage<M>& y, const View& v, Group g, i64 t, int left) {
    typedef Stage<M> Run;
    typedef typename Run::Piece Piece;
    constexpr int WIDE = LANES % Run::PIECES ? LANES : Run::PIECES, ROWS = LANES / WIDE; // lanes of a row, rows at a time
    constexpr int EACH = (Run::PIECES + WIDE - 1) / WIDE, BATCH = EACH < AT_ONCE ? AT_ONCE / EACH : 1; // loads of a lane in a row
    static_assert(LANES % (ROWS * BATCH) == 0, "whole batches of rows");
    EACH_LANE {
        const int row = lane / WIDE;
        i64 along[EACH];
        bool here[EACH];
        const T* from = v.p + (g.first + row) * v.s + t * v.t;
        Piece* to = y.rows + row * Run::PITCH + lane % WIDE;
#pragma unroll
        for (int p = 0; p < EACH; ++p) {
            const int i = lane % WIDE + p * WIDE, step = i / Run::A_STEP;
            along[p] = step * v.t + i % Run::A_STEP * Run::EACH, here[p] = i < Run::PIECES && step < left;
        }
#pragma unroll 1
        for (int first = row; first < g.count; first += ROWS * BATCH) {
            Piece some[BATCH][EACH];
#pragma unroll
            for (int r = 0; r < BATCH; ++r, from += ROWS * v.s)
#pragma unroll
                for (int p = 0; p < EACH; ++p)
                    if (here[p] && first + r * ROWS < g.count) some[r][p] = *(const Piece*)(from + along[p]);
#pragma unroll
            for (int r = 0; r < BATCH; ++r, to += ROWS * Run::PITCH)
#pragma unroll
                for (int p = 0; p < EACH; ++p)
                    if (here[p] && first + r * ROWS < g.count) to[p * WIDE] = some[r][p];
        }
    }
}

// Steps [begin, end) of a warp's series, or as far as they miss what the first one does, in whole runs.
extern "C" __global__ void __launch_bounds__(LANES, WARPS) kalman_follow(const __grid_constant__ Filter k) {
    typedef Stage<M> Run;
    Follow& room = *(Follow*)shared_memory();
    const i64 warp = blockIdx.x;
    const Group g = group_of(k.series);
    if (k.begin && k.reached[warp] != k.begin) return;
    Held held[WIDTH];
    T m[WIDTH][N], kept[WIDTH][N];
    i64 at[WIDTH]; // of a step of a series among those of all
    bool other[WIDTH];
    EACH_LANE {
        const i64 s = g.first + (lane < g.count ? lane : g.count - 1);
        const T* mean = k.begin ? k.mean_next + s * N : k.mean0.p + s * k.mean0.s;
        copy(m[own], *(const T(*)[N])mean);
        at[own] = k.begin * k.series + s;
        other[own] = !k.begin && k.cov0.s && differ<MATRIX>(k.cov0.p, k.cov0.p + s * k.cov0.s);
    }
    i64 t = k.begin;
    bool apart = ANY(other);
    while (!apart && t < k.end) {
        const int left = k.end - t < Run::STEPS ? (int)(k.end - t) : Run::STEPS;
        fetch_run(room.y, k.y, g, t, left);
        move<Piece>(
            left * GAIN, [&](int i) { return ((const Piece*)(k.common + t + i / GAIN))[i % GAIN]; },
            [&](int i, const Piece& x) { ((Piece*)room.gains)[i] = x; });
        EACH_LANE copy(kept[own], m[own]);
        MEET();
        for (int i = 0; i < left; ++i) {
            const int fetch = t + i == k.begin ? 51 : (int)k.times & 51; // of A, C, b, d
            if (fetch) {
                MEET();
                if (fetch & 1) room.A.template fetch<false>(k.A, g, t + i);
                if (fetch & 2) room.C.template fetch<false>(k.C, g, t + i);
                if (fetch & 16) room.b.template fetch<false>(k.b, g, t + i);
                if (fetch & 32) room.d.template fetch<false>(k.d, g, t + i);
                MEET();
                EACH_LANE {
                    if (HELD) held[own].get(room, lane);
                }
            }
            const Gain& now = room.gains[i];
            EACH_LANE {
                Held& x = held[own];
                T y[M], e[M], w[M], next[N];
                int seen_now = 0;
                const bool live = lane < g.count;
                room.y.get(lane, i, y);
                if (!HELD) x.get(room, lane);
                residual(e, x.C, y, x.d, m[own]);
#pragma unroll
                for (int j = 0; j < M; ++j) w[j] = e[j], seen_now |= seen(y[j]) << j;
                other[own] |= seen_now != now.seen;
                now.S.solve(w);
                if (k.before && live) Row<N>::put((typename Row<N>::Piece*)k.before + at[own] * Row<N>::PIECES, m[own]);
                if (live) k.loglik[at[own]] = log_normal(e, w, now.logdet, now.entries);
                apply(m[own], m[own], now.K, e);
                if (k.mean && live) Row<N>::put((typename Row<N>::Piece*)k.mean + at[own] * Row<N>::PIECES, m[own]);
                apply(next, x.b, x.A, m[own]), copy(m[own], next);
                at[own] += k.series;
            }
        }
        EACH_LANE other[own] = other[own] && lane < g.count;
        MEET();
        apart = ANY(other);
        if (!apart) t += left;
    }
    EACH_LANE {
        if (lane < g.count && t) {
#pragma unroll
            for (int i = 0; i < N; ++i) k.mean_next[(g.first + lane) * N + i] = apart ? kept[own][i] : m[own][i];
        }
        if (lane) continue;
        k.reached[warp] = t;
        if (t == k.steps) k.failed[warp] = *k.lost * k.series + (*k.lost < k.steps ? g.first : 0);
        else if (t == k.end) k.followed[k.part] = 1;
    }
}

// ---- covariances, to every series ------------------------------------------------------------------------------------

__device__ __forceinline__ void spread(T* out, Group g, int count, i64 t, i64 series, const T (&P)[N][N]) {
    typedef Row<MATRIX> Row;
    typename Row::Piece* to = (typename Row::Piece*)out + (t * series + g.first) * Row::PIECES;
    const typename Row::Piece* from = (const typename Row::Piece*)P;
    for_each<Row::PIECES>(Row::PIECES, [&](int row, int i, i64 along) {
        if (row < count) to[along + i] = from[i];
    });
}

// A block for each LANES warps of series and step, from `begin` on; one behind the last is that of the returned states.
extern "C" __global__ void __launch_bounds__(LANES) kalman_spread(const __grid_constant__ Filter k) {
    Spread& room = *(Spread*)shared_memory();
    const i64 warps = k.shared ? 1 : (k.series + LANES - 1) / LANES, rows = k.shared ? 1 : k.series;
    const unsigned blocks = (unsigned)((warps + LANES - 1) / LANES), block = (unsigned)blockIdx.x;
    const i64 t = k.begin + block / blocks, first = (i64)(block % blocks) * LANES;
    EACH_LANE {
        room.reached[lane] = first + lane < warps ? k.reached[first + lane] : 0;
        for (int i = lane; i < MATRIX; i += LANES) {
            room.filtered[i / N][i % N] = k.common[t].filtered[i / N][i % N];
            room.P[i / N][i % N] = k.common[t].P[i / N][i % N];
        }
    }
    MEET();
    for (int i = 0; i < LANES && first + i < warps; ++i) {
        const Group g = group_of(k.series, first + i);
        const int count = k.shared ? 1 : g.count;
        if (t == k.steps) {
            if (room.reached[i] == t) spread(k.cov_next, g, count, 0, rows, room.P);
        } else if (room.reached[i] > t) {
            if (k.mean) spread(k.cov, g, count, t, rows, room.filtered);
            if (k.before) spread(k.before_cov, g, count, t, rows, room.P);
        }
    }
}

// The Kalman filter's arithmetic where several lanes share a series: matrices lie in shared memory, a lane computes tiles of
// them. Every product is Xᵀ Y, which both factors' rows give in pieces of 16 bytes; results are stored as they are or turned,
// as the product that comes next reads them. The definition is in reference.py. Products are fused by hand and by nobody else,
// and a lane's part depends on the system's sizes alone, so that a series has the same bits in any batch.
//
// STATES, OBSERVED: sizes of the system.   NUMBER: float or double.   OWN: whether anything of the system is one series' alone.
// ROWS, COLUMNS: of a series' lanes, which take its tiles in turn. A block is a warp of such groups, or one larger group.
// Where a compiler of C++ stands in for a GPU, in tests, `EACH_LANE` is a loop over the block from one `MEET` to the next, and
// what lanes keep is an array over WIDTH.

typedef long long i64;
typedef unsigned long long u64;
typedef NUMBER T;

constexpr int N = STATES, M = OBSERVED, G = ROWS * COLUMNS, SERIES = G < 32 ? 32 / G : 1, THREADS = G * SERIES;

#ifndef WIDTH
#define WIDTH 1
#define MEET() (G <= 32 ? __syncwarp() : __syncthreads())
#define SOON(address) asm volatile("prefetch.global.L2 [%0];" ::"l"(address)) // is read at the next step
extern __shared__ __align__(16) unsigned char shared_bytes[];
__device__ __forceinline__ void* shared_memory() { return shared_bytes; }
#endif
static_assert(WIDTH == 1 || WIDTH == THREADS, "a lane, or all of them");

__device__ __forceinline__ float madd(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double madd(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ bool seen(T y) { return y == y; }

// An operand: adjacent numbers at p + series·s + step·t; null if there is none.
struct View {
    const T* p;
    i64 s, t;
    __device__ __forceinline__ const T* at(i64 series, i64 step) const { return p + series * s + step * t; }
};

// A thread: its series of the block, its place among the lanes of that, in rows and columns.
struct Lane {
    int at, series, lane, i, j;
    __device__ __forceinline__ Lane(int at) : at(at), series(at / G), lane(at % G), i(lane / COLUMNS), j(lane % COLUMNS) {}
};
// The lanes of the block's first `count` series.
#ifndef EACH_LANE
#define EACH_LANE(count) for (int own = 0; own < WIDTH; ++own) if (const Lane x(threadIdx.x + own); x.series < (count))
#endif

constexpr int V = 16 / sizeof(T);
struct alignas(16) Piece {
    T x[V];
};
__device__ constexpr int pieces(int numbers) { return (numbers + V - 1) / V; }

// R × K numbers in shared memory, in rows of whole pieces. What lies behind the K-th number of a row means nothing.
template <int R, int K> struct Matrix {
    static constexpr int PITCH = pieces(K);
    Piece p[R * PITCH];

    __device__ __forceinline__ T& operator()(int i, int j) { return p[i * PITCH].x[j]; }
    __device__ __forceinline__ T operator()(int i, int j) const { return p[i * PITCH].x[j]; }
    __device__ __forceinline__ T& operator[](int j) { return p[0].x[j]; }
    __device__ __forceinline__ T operator[](int j) const { return p[0].x[j]; }

    // To or from R·K adjacent numbers, by the lanes of a series. Where rows are whole pieces, they are aligned.
    __device__ __forceinline__ void write(const Lane& l, T* to) const {
        if constexpr (K % V == 0)
            for (int q = l.lane; q < R * PITCH; q += G) ((Piece*)to)[q] = p[q];
        else
            for (int q = l.lane; q < R * K; q += G) to[q] = (*this)(q / K, q % K);
    }
    __device__ __forceinline__ void read(const Lane& l, const T* from) {
        if constexpr (K % V == 0)
            for (int q = l.lane; q < R * PITCH; q += G) p[q] = ((const Piece*)from)[q];
        else
            for (int q = l.lane; q < R * K; q += G) (*this)(q / K, q % K) = from[q];
    }
};
template <int K> using Vector = Matrix<1, K>;

// What a lane computes of an I × J matrix: every ROWS-th row of pieces from its own on, and every COLUMNS-th column. Where a
// lane's part ends outside, it computes something and stores nothing.
template <int I, int J> struct Tile {
    static constexpr int IV = pieces(I), JV = pieces(J), R = (IV + ROWS - 1) / ROWS, C = (JV + COLUMNS - 1) / COLUMNS;
    T x[R][V][C][V];

    static __device__ __forceinline__ int row(const Lane& l, int r) { return l.i + r * ROWS; }
    static __device__ __forceinline__ int column(const Lane& l, int c) { return l.j + c * COLUMNS; }
    static __device__ __forceinline__ int within(int i, int end) { return i < end ? i : end - 1; }

    // act(row, column, number) for every number that is there.
    template <class Do> __device__ __forceinline__ void each(const Lane& l, Do act) {
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int v = 0; v < V; ++v)
#pragma unroll
                for (int c = 0; c < C; ++c)
#pragma unroll
                    for (int w = 0; w < V; ++w) {
                        const int i = row(l, r) * V + v, j = column(l, c) * V + w;
                        if (i < I && j < J) act(i, j, x[r][v][c][w]);
                    }
    }
    // act(number) for every number.
    template <class Do> __device__ __forceinline__ void all(Do act) {
#pragma unroll
        for (int q = 0; q < R * V * C * V; ++q) act(x[q / (V * C * V)][q / (C * V) % V][q / V % C][q % V]);
    }
    __device__ __forceinline__ void clear() {
        all([](T& v) { v = (T)0; });
    }
    __device__ __forceinline__ void scale(T by) {
        all([by](T& v) { v *= by; });
    }
    __device__ __forceinline__ void one(const Lane& l) {
        clear();
        each(l, [](int i, int j, T& v) { v = (T)(i == j); });
    }
    __device__ __forceinline__ void add(const Tile& other) {
#pragma unroll
        for (int q = 0; q < R * V * C * V; ++q)
            x[q / (V * C * V)][q / (C * V) % V][q / V % C][q % V] += other.x[q / (V * C * V)][q / (C * V) % V][q / V % C][q % V];
    }
    __device__ __forceinline__ void add(const Lane& l, const Matrix<I, J>& X) {
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int v = 0; v < V; ++v)
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    const Piece from = X.p[within(row(l, r) * V + v, I) * JV + within(column(l, c), JV)];
#pragma unroll
                    for (int w = 0; w < V; ++w) x[r][v][c][w] += from.x[w];
                }
    }
    // += Xᵀ Y, or −= Xᵀ Y.
    template <bool MINUS = false, int K>
    __device__ __forceinline__ void add(const Lane& l, const Matrix<K, I>& X, const Matrix<K, J>& Y) {
        constexpr int AT_ONCE = K <= 8 ? K : N + M > 48 && R * C > 1 ? 2 : 4; // more take more than 5 seconds to compile
        const Piece *from_x[R], *from_y[C];
#pragma unroll
        for (int r = 0; r < R; ++r) from_x[r] = X.p + within(row(l, r), IV);
#pragma unroll
        for (int c = 0; c < C; ++c) from_y[c] = Y.p + within(column(l, c), JV);
#pragma unroll AT_ONCE
        for (int k = 0; k < K; ++k) {
            Piece a[R], b[C];
#pragma unroll
            for (int r = 0; r < R; ++r) a[r] = from_x[r][k * IV];
#pragma unroll
            for (int c = 0; c < C; ++c) b[c] = from_y[c][k * JV];
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
                for (int v = 0; v < V; ++v)
#pragma unroll
                    for (int c = 0; c < C; ++c)
#pragma unroll
                        for (int w = 0; w < V; ++w)
                            x[r][v][c][w] = madd(MINUS ? -a[r].x[v] : a[r].x[v], b[c].x[w], x[r][v][c][w]);
        }
    }
    template <int L> __device__ __forceinline__ void store(const Lane& l, Matrix<L, J>& X) const {
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int v = 0; v < V; ++v)
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    const int i = row(l, r) * V + v, j = column(l, c);
                    if (i < I && j < JV) X.p[i * JV + j] = along(r, v, c);
                }
    }
    __device__ __forceinline__ void store_turned(const Lane& l, Matrix<J, I>& X) const {
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int w = 0; w < V; ++w)
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    const int i = row(l, r), j = column(l, c) * V + w;
                    if (i < IV && j < J) X.p[j * IV + i] = across(r, c, w);
                }
    }
    // Of a matrix known to be symmetric: what is below the diagonal, on both sides.
    template <int L> __device__ __forceinline__ void store_symmetric(const Lane& l, Matrix<L, J>& X) {
        static_assert(I == J, "square");
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const int i = row(l, r), j = column(l, c);
                if (i < j || i >= IV) continue;
                if (i == j) {
#pragma unroll
                    for (int v = 0; v < V; ++v)
#pragma unroll
                        for (int w = v + 1; w < V; ++w) x[r][v][c][w] = x[r][w][c][v];
                }
#pragma unroll
                for (int v = 0; v < V; ++v)
                    if (i * V + v < I) X.p[(i * V + v) * JV + j] = along(r, v, c);
                if (i == j) continue;
#pragma unroll
                for (int w = 0; w < V; ++w) X.p[(j * V + w) * IV + i] = across(r, c, w);
            }
    }
    __device__ __forceinline__ Piece along(int r, int v, int c) const {
        Piece p;
#pragma unroll
        for (int w = 0; w < V; ++w) p.x[w] = x[r][v][c][w];
        return p;
    }
    __device__ __forceinline__ Piece across(int r, int c, int w) const {
        Piece p;
#pragma unroll
        for (int v = 0; v < V; ++v) p.x[v] = x[r][v][c][w];
        return p;
    }
};

// base + Σ X[k][i] v[k], an entry of Xᵀ v.
template <int K, int I> __device__ __forceinline__ T dot(T base, const Matrix<K, I>& X, int i, const Vector<K>& v) {
#pragma unroll 8
    for (int k = 0; k < K; ++k) base = madd(X(k, i), v[k], base);
    return base;
}
// x / pivot, as exact as a division: where one precise sensor sees a state, 1 − K C then vanishes as it should.
__device__ __forceinline__ T divided(T x, T pivot, T inverse) {
    const T v = x * inverse;
    return madd(madd(-v, pivot, x), inverse, v);
}

// A series at a step, in shared memory. `turned`: transposed.   S: C P Cᵀ + R, below it e; afterwards L D, and below it L⁻¹ e.
// L: of S = L D Lᵀ, what is below its diagonal of ones.   variance: the diagonal of S.   pivot, inverse: D, and its reciprocals.
// C, R: as they are where entries of y are missing: rows of C are 0 there, those of R but for a unit diagonal.   K_turned: C P before it
// is Kᵀ.
struct Correction {
    Matrix<N, N> P, rest_turned, P_rest_turned;
    Matrix<M, N> C, K_turned, RK_turned;
    Matrix<N, M> C_turned, Z_turned;
    Matrix<M, M> R, L;
    Matrix<M + 1, M> S;
    Vector<N> m, filtered_m;
    Vector<M> y, e, variance, pivot, inverse;

    // S⁻¹ X over column j of X, some rows at a time in registers. put(i, number): of what comes out.
    template <int J, class Put>
    __device__ __forceinline__ void solve(Matrix<M, J>& X, int j, Put put) const {
        constexpr int B = M < 8 ? M : 8, BV = pieces(B), LAST = (M - 1) / B * B;
        constexpr bool WHOLE = M % B == 0;
        constexpr int MV = pieces(M);
        Piece rows[B][BV]; // of L, where rows and columns are those at hand
#pragma unroll 1
        for (int base = 0; base < M; base += B) {
            T x[B];
#pragma unroll
            for (int r = 0; r < B; ++r) x[r] = WHOLE || base + r < M ? X(base + r, j) : (T)0;
#pragma unroll 2
            for (int k = 0; k < base / V; ++k) {
                Piece l[B];
#pragma unroll
                for (int r = 0; r < B; ++r) l[r] = L.p[(WHOLE || base + r < M ? base + r : 0) * MV + k];
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const T known = X(k * V + v, j);
#pragma unroll
                    for (int r = 0; r < B; ++r) x[r] = madd(-l[r].x[v], known, x[r]);
                }
            }
            diagonal<B>(rows, base);
#pragma unroll
            for (int r = 1; r < B; ++r)
#pragma unroll
                for (int k = 0; k < r; ++k) x[r] = madd(-rows[r][k / V].x[k % V], x[k], x[r]);
#pragma unroll
            for (int r = 0; r < B; ++r)
                if (WHOLE || base + r < M) X(base + r, j) = x[r];
        }
#pragma unroll 1
        for (int base = LAST; base >= 0; base -= B) {
            T x[B];
#pragma unroll
            for (int r = 0; r < B; ++r)
                x[r] = WHOLE || base + r < M ? divided(X(base + r, j), pivot[base + r], inverse[base + r]) : (T)0;
#pragma unroll 4
            for (int k = base + B; k < M; ++k) {
                const T known = X(k, j);
#pragma unroll
                for (int b = 0; b < BV; ++b) {
                    const Piece l = L.p[k * MV + base / V + b];
#pragma unroll
                    for (int v = 0; v < V; ++v)
                        if (b * V + v < B) x[b * V + v] = madd(-l.x[v], known, x[b * V + v]);
                }
            }
            if (LAST > 0) diagonal<B>(rows, base);
#pragma unroll
            for (int r = B - 2; r >= 0; --r)
#pragma unroll
                for (int k = r + 1; k < B; ++k)
                    if (WHOLE || base + k < M) x[r] = madd(-rows[k][r / V].x[r % V], x[k], x[r]);
#pragma unroll
            for (int r = 0; r < B; ++r)
                if (WHOLE || base + r < M) X(base + r, j) = x[r], put(base + r, x[r]);
        }
    }
    template <int B> __device__ __forceinline__ void diagonal(Piece (&rows)[B][pieces(B)], int base) const {
#pragma unroll
        for (int r = 1; r < B; ++r)
#pragma unroll
            for (int k = 0; k * V < r; ++k) rows[r][k] = L.p[(M % B == 0 || base + r < M ? base + r : 0) * pieces(M) + base / V + k];
    }
};

// What the series of a block have in shared memory. Of eight lanes, which read 128 bytes at once, those of one series meet other
// banks than those of the next: so far beyond a multiple of 128 bytes lies it.
template <class Series, class System> struct Room {
    static constexpr int BEYOND = G <= 4 ? 48 : G * 4 % 128, APART = (sizeof(Series) + 127 - BEYOND) / 128 * 128 + BEYOND;
    System systems[OWN ? SERIES : 1];
    alignas(16) unsigned char series[SERIES * APART];
    alignas(16) i64 failed[SERIES + SERIES % 2];

    __device__ __forceinline__ Series& of(const Lane& l) { return *(Series*)(series + l.series * APART); }
    __device__ __forceinline__ const System& system(const Lane& l) const { return systems[OWN ? l.series : 0]; }
};

// y of step t; a meeting has to follow.
template <class Room, class Record> __device__ __forceinline__ void look(Room& room, const Record& k, i64 first, int count, i64 t) {
    EACH_LANE(count) {
        const T* from = k.y.at(first + x.series, t);
        for (int i = x.lane; i < M; i += G) room.of(x).y[i] = from[i];
    }
}
// C and R of step t, where what is missing (`missed`, of each lane) has changed, or the system is not the same as at the step computed
// before (`moved`).
template <class Room, class Record>
__device__ __forceinline__ void mask(Room& room, const Record& k, i64 first, int count, i64 t, bool moved, u64 (&missed)[WIDTH]) {
    EACH_LANE(count) {
        auto& s = room.of(x);
        u64 now = 0;
#pragma unroll 8
        for (int i = 0; i < M; ++i) now |= (u64)!seen(s.y[i]) << i;
        if (!moved && now == missed[own]) continue;
        missed[own] = now;
        const T *C = k.C.at(first + x.series, t), *R = k.R.at(first + x.series, t);
        for (int q = x.lane; q < M * N; q += G) {
            const int i = q / N, j = q % N;
            s.C(i, j) = s.C_turned(j, i) = now >> i & 1 ? (T)0 : C[q];
        }
        for (int q = x.lane; q < M * M; q += G) {
            const int i = q / M, j = q % M;
            s.R(i, j) = (now >> i | now >> j) & 1 ? (T)(i == j) : (R[q] + R[j * M + i]) * (T)0.5;
        }
    }
    MEET();
}

// S = L D Lᵀ, column by column; a lane has its part of S and e in registers, from which the next column comes each time. NaN from
// the first pivot that is not above 0, or no more than rounding of what it is left from.
template <class Room> __device__ __forceinline__ void factorise(Room& room, int count) {
    constexpr int R = M / ROWS + 1, C = (M + COLUMNS - 1) / COLUMNS;
    T part[WIDTH][R][C];
    EACH_LANE(count) {
        auto& s = room.of(x);
        for (int i = x.lane; i < M; i += G) s.variance[i] = s.S(i, i);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const int i = x.i + r * ROWS, k = x.j + c * COLUMNS;
                part[own][r][c] = s.S(i < M ? i : M, k < M ? k : M - 1);
            }
    }
#pragma unroll 1
    for (int j = 0; j < M; ++j) {
        EACH_LANE(count) {
            auto& s = room.of(x);
            const T last = s.S(j, j), least = j ? (T)M * (sizeof(T) == 8 ? (T)0x1p-52 : (T)0x1p-23f) * s.variance[j] : (T)0;
            const T pivot = last > least ? last : (T)nanf(""), inverse = (T)1 / pivot;
            if (x.lane == 0) s.pivot[j] = pivot, s.inverse[j] = inverse;
            T l[C];
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const int k = x.j + c * COLUMNS;
                l[c] = divided(s.S(k < M ? k : M - 1, j), pivot, inverse);
                if (x.i == 0 && k > j && k < M) s.L(k, j) = l[c];
            }
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const int i = x.i + r * ROWS;
                const T v = s.S(i < M ? i : M, j);
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    part[own][r][c] = madd(-v, l[c], part[own][r][c]);
                    if (x.j + c * COLUMNS == j + 1 && j + 1 < M && i > j && i <= M) s.S(i, j + 1) = part[own][r][c];
                }
            }
        }
        MEET();
    }
}

// Z = C P, S = Z Cᵀ + R, K = Zᵀ S⁻¹, rest = I − K C; the mean m + K e, and the covariance rest P restᵀ + K R Kᵀ to `filtered`.
// What else of it the way back takes, `Series` asks for.
template <class Room, class Record>
__device__ __forceinline__ void correct(Room& room, const Record& k, i64 first, int count, i64 t) {
    EACH_LANE(count) {
        auto& s = room.of(x);
        Tile<M, N> Z;
        Z.clear(), Z.add(x, s.C_turned, s.P), Z.store(x, s.K_turned), Z.store_turned(x, s.Z_turned);
        const T* d = k.d.p ? k.d.at(first + x.series, t) : nullptr;
        for (int i = x.lane; i < M; i += G) {
            const T v = s.y[i] - (d ? d[i] : (T)0) - dot((T)0, s.C_turned, i, s.m);
            s.e[i] = s.S(M, i) = seen(s.y[i]) ? v : (T)0;
        }
    }
    MEET();
    EACH_LANE(count) {
        auto& s = room.of(x);
        Tile<M, M> S;
        S.clear(), S.add(x, s.R), S.add(x, s.Z_turned, s.C_turned), S.store_symmetric(x, s.S);
        s.start_solving(x);
    }
    MEET();
    factorise(room, count);
    EACH_LANE(count) room.of(x).solve_all(x);
    MEET();
    EACH_LANE(count) {
        auto& s = room.of(x);
        Tile<N, N> rest;
        rest.one(x), rest.template add<true>(x, s.K_turned, s.C), rest.store_turned(x, s.rest_turned);
        s.keep(x, rest);
        Tile<M, N> RK;
        RK.clear(), RK.add(x, s.R, s.K_turned), RK.store(x, s.RK_turned);
        for (int i = x.lane; i < N; i += G) s.filtered_m[i] = dot(s.m[i], s.K_turned, i, s.e);
    }
    MEET();
    EACH_LANE(count) {
        auto& s = room.of(x);
        Tile<N, N> P_rest;
        P_rest.clear(), P_rest.add(x, s.P, s.rest_turned), P_rest.store(x, s.P_rest_turned);
    }
    MEET();
    EACH_LANE(count) {
        auto& s = room.of(x);
        Tile<N, N> F;
        F.clear(), F.add(x, s.P_rest_turned, s.rest_turned), F.add(x, s.RK_turned, s.K_turned), F.store_symmetric(x, s.filtered());
    }
    MEET();
}

// The Kalman filter's arithmetic for one series, in plain C++: the kernels of gpu.cu and gpu_backward.cu are made of it. The
// definition is in reference.py. Every product is fused by hand and by nobody else, so that a series has the same bits however
// the kernel around it is compiled.
//
// STATES, OBSERVED: sizes of the system.   NUMBER: float or double.   Every loop is unrolled, and matrices are registers.

typedef long long i64;
typedef NUMBER T;

constexpr int N = STATES, M = OBSERVED;

__device__ __forceinline__ float madd(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double madd(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ bool seen(T y) { return y == y; }

template <int R, int K> __device__ __forceinline__ void clear(T (&X)[R][K]) {
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < K; ++j) X[i][j] = (T)0;
}
template <int R> __device__ __forceinline__ void clear(T (&x)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = (T)0;
}
template <int R, int K> __device__ __forceinline__ void add(T (&sum)[R][K], const T (&X)[R][K]) {
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < K; ++j) sum[i][j] += X[i][j];
}
template <int R> __device__ __forceinline__ void add(T (&sum)[R], const T (&x)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) sum[i] += x[i];
}

// out = X Y, or Xᵀ Y.
template <int I, int K, int J> __device__ __forceinline__ void times(T (&out)[I][J], const T (&X)[I][K], const T (&Y)[K][J]) {
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
        for (int j = 0; j < J; ++j) {
            T v = X[i][0] * Y[0][j];
#pragma unroll
            for (int k = 1; k < K; ++k) v = madd(X[i][k], Y[k][j], v);
            out[i][j] = v;
        }
}
template <int I, int K, int J>
__device__ __forceinline__ void turned_times(T (&out)[I][J], const T (&X)[K][I], const T (&Y)[K][J]) {
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
        for (int j = 0; j < J; ++j) {
            T v = X[0][i] * Y[0][j];
#pragma unroll
            for (int k = 1; k < K; ++k) v = madd(X[k][i], Y[k][j], v);
            out[i][j] = v;
        }
}
// out = base + X Yᵀ, known to be symmetric; or, in place, out += Xᵀ Y.
template <int I, int K>
__device__ __forceinline__ void symmetric(T (&out)[I][I], const T (&base)[I][I], const T (&X)[I][K], const T (&Y)[I][K]) {
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
        for (int j = 0; j < I; ++j)
            if (j <= i) {
                T v = base[i][j];
#pragma unroll
                for (int k = 0; k < K; ++k) v = madd(X[i][k], Y[j][k], v);
                out[i][j] = out[j][i] = v;
            }
}
template <int I, int K> __device__ __forceinline__ void symmetric_turned(T (&out)[I][I], const T (&X)[K][I], const T (&Y)[K][I]) {
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
        for (int j = 0; j < I; ++j)
            if (j <= i) {
                T v = out[i][j];
#pragma unroll
                for (int k = 0; k < K; ++k) v = madd(X[k][i], Y[k][j], v);
                out[i][j] = out[j][i] = v;
            }
}
// out = base + X x, or base + Xᵀ x.
template <int I, int K>
__device__ __forceinline__ void apply(T (&out)[I], const T (&base)[I], const T (&X)[I][K], const T (&x)[K]) {
#pragma unroll
    for (int i = 0; i < I; ++i) {
        T v = base[i];
#pragma unroll
        for (int k = 0; k < K; ++k) v = madd(X[i][k], x[k], v);
        out[i] = v;
    }
}
template <int I, int K>
__device__ __forceinline__ void apply_turned(T (&out)[I], const T (&base)[I], const T (&X)[K][I], const T (&x)[K]) {
#pragma unroll
    for (int i = 0; i < I; ++i) {
        T v = base[i];
#pragma unroll
        for (int k = 0; k < K; ++k) v = madd(X[k][i], x[k], v);
        out[i] = v;
    }
}

// e = y − C m − d, 0 where an entry of y is missing.
__device__ __forceinline__ void residual(T (&e)[M], const T (&C)[M][N], const T (&y)[M], const T (&d)[M], const T (&m)[N]) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
        T v = y[i] - d[i];
#pragma unroll
        for (int k = 0; k < N; ++k) v = madd(-C[i][k], m[k], v);
        e[i] = seen(y[i]) ? v : (T)0;
    }
}
// The same, and C and R as they are where entries are missing: rows of C are 0 there, those of R but for a unit diagonal.
__device__ __forceinline__ void look(
    T (&e)[M], T (&C)[M][N], T (&R)[M][M], const T (&y)[M], const T (&d)[M], const T (&m)[N]) {
    residual(e, C, y, d, m);
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int k = 0; k < N; ++k) C[i][k] = seen(y[i]) ? C[i][k] : (T)0;
#pragma unroll
        for (int j = 0; j < M; ++j) R[i][j] = seen(y[i]) && seen(y[j]) ? R[i][j] : (T)(i == j);
    }
}
// log 2π for each of `count` entries.
__device__ __forceinline__ T log_entries(int count) { return (T)count * (T)1.8378770664093453; }
// log N(e; 0, S) of the entries seen; w = S⁻¹ e, logdet = log det S.
__device__ __forceinline__ T log_normal(const T (&e)[M], const T (&w)[M], T logdet, T entries) {
    T square = (T)0;
#pragma unroll
    for (int i = 0; i < M; ++i) square = madd(w[i], e[i], square);
    return (T)-0.5 * (square + logdet + entries);
}

// S = L D Lᵀ: ones on the diagonal of L, of which only what is below is kept; D, and its reciprocals.
struct Factors {
    T L[M][M], pivot[M], inverse[M];

    // NaN from the first pivot that is not above 0, or no more than rounding of what it is left from. Returns log det S.
    __device__ __forceinline__ T of(const T (&S)[M][M]) {
        T logdet = (T)0;
#pragma unroll
        for (int i = 0; i < M; ++i) {
            T row[M], last = S[i][i];
#pragma unroll
            for (int j = 0; j < i; ++j) {
                T v = S[i][j];
#pragma unroll
                for (int k = 0; k < j; ++k) v = madd(-row[k], L[j][k], v);
                row[j] = v;
                L[i][j] = divided(v, j);
                last = madd(-v, L[i][j], last);
            }
            const T least = i ? (T)M * (sizeof(T) == 8 ? (T)0x1p-52 : (T)0x1p-23f) * S[i][i] : (T)0;
            pivot[i] = last > least ? last : (T)nanf("");
            inverse[i] = (T)1 / pivot[i];
            logdet += log(pivot[i]);
        }
        return logdet;
    }
    // x / pivot, as exact as a division: where one precise sensor sees a state, 1 − K C then vanishes as it should.
    __device__ __forceinline__ T divided(T x, int i) const {
        const T v = x * inverse[i];
        return madd(madd(-v, pivot[i], x), inverse[i], v);
    }
    // S⁻¹ x over x.
    __device__ __forceinline__ void solve(T (&x)[M]) const {
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
            for (int k = 0; k < i; ++k) x[i] = madd(-L[i][k], x[k], x[i]);
#pragma unroll
        for (int i = M - 1; i >= 0; --i) {
            x[i] = divided(x[i], i);
#pragma unroll
            for (int k = i + 1; k < M; ++k) x[i] = madd(-L[k][i], x[k], x[i]);
        }
    }
};

// What a step makes of its predicted covariance P: Z = C P, S = Z Cᵀ + R, K = P Cᵀ S⁻¹, rest = I − K C, rest P, and the filtered
// covariance rest P restᵀ + K R Kᵀ. C, R: as they are where entries are missing.
struct Correction {
    Factors S;
    T logdet, Z[M][N], K[N][M], rest[N][N], rest_P[N][N];

    __device__ __forceinline__ void of(T (&filtered)[N][N], const T (&P)[N][N], const T (&C)[M][N], const T (&R)[M][M]) {
        T whole[M][M], KR[N][M], none[N][N];
        times(Z, C, P);
        symmetric(whole, R, Z, C);
        logdet = S.of(whole);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            T x[M];
#pragma unroll
            for (int j = 0; j < M; ++j) x[j] = Z[j][i];
            S.solve(x);
#pragma unroll
            for (int j = 0; j < M; ++j) K[i][j] = x[j];
        }
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j) {
                T v = (T)(i == j);
#pragma unroll
                for (int k = 0; k < M; ++k) v = madd(-K[i][k], C[k][j], v);
                rest[i][j] = v;
            }
        times(rest_P, rest, P);
        times(KR, K, R);
        clear(none);
        symmetric(filtered, none, rest_P, rest);
        symmetric(filtered, filtered, KR, K);
    }
};

// P = A P Aᵀ + Q, m = A m + b.
__device__ __forceinline__ void predict(T (&m)[N], T (&P)[N][N], const T (&A)[N][N], const T (&Q)[N][N], const T (&b)[N]) {
    T next[N], AP[N][N];
    apply(next, b, A, m);
    times(AP, A, P);
    symmetric(P, Q, AP, A);
#pragma unroll
    for (int i = 0; i < N; ++i) m[i] = next[i];
}

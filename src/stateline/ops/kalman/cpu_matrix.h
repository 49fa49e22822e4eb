// Small matrices for the Kalman filter, written once for two ways of lying in memory:
//   Lanes   an element is a vector of numbers, one of each of W series
//   Row     one series, CW columns side by side in a vector; rows are padded with whole vectors
// Every element of every result is computed by the same operations in the same order either way, so that a series has the same
// bits alone and in any batch. ES: numbers an element takes. CW: columns in a vector. `ld`: elements from row to row.
#pragma once
#include "tile.h"

namespace {

// a·b + c on vectors of 16, 32 or 64 bytes and on numbers, fused exactly where `fma` of simd.h is.
template <class V>
SL_INLINE V madd(V a, V b, V c) {
#if defined(__FMA__)
    if constexpr (sizeof(V) == 8) return __builtin_fma(a, b, c);
    else if constexpr (sizeof(V) == 4) return __builtin_fmaf(a, b, c);
    else {
        constexpr bool wide = sizeof(a[0]) == 8;
        if constexpr (sizeof(V) == 16 && wide) return (V)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
        else if constexpr (sizeof(V) == 16) return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
        else if constexpr (sizeof(V) == 32 && wide) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
        else if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
        else return fma(a, b, c);
    }
#elif defined(__ARM_NEON)
    if constexpr (sizeof(V) == 8) return __builtin_fma(a, b, c);
    else if constexpr (sizeof(V) == 4) return __builtin_fmaf(a, b, c);
    else return fma(a, b, c);
#else
    return a * b + c;
#endif
}

SL_INLINE double root(double x) { return __builtin_sqrt(x); }
SL_INLINE float root(float x) { return __builtin_sqrtf(x); }
SL_INLINE VD root(VD x) {
#if SL_BYTES == 64
    return (VD)_mm512_sqrt_pd((__m512d)x);
#elif SL_BYTES == 32
    return (VD)_mm256_sqrt_pd((__m256d)x);
#else
    for (int i = 0; i < Simd<double>::W; i++) x[i] = __builtin_sqrt(x[i]);
    return x;
#endif
}
SL_INLINE VF root(VF x) {
#if SL_BYTES == 64
    return (VF)_mm512_sqrt_ps((__m512)x);
#elif SL_BYTES == 32
    return (VF)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < Simd<float>::W; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// A number in every place of a vector. (GCC makes a masked move a place of a loop over them.)
template <class V, class R>
SL_INLINE V broadcast(R x) {
#if defined(__AVX__)
    constexpr bool wide = sizeof(R) == 8;
    if constexpr (sizeof(V) == 16 && wide) return (V)_mm_set1_pd(x);
    else if constexpr (sizeof(V) == 16) return (V)_mm_set1_ps(x);
    else if constexpr (sizeof(V) == 32 && wide) return (V)_mm256_set1_pd(x);
    else if constexpr (sizeof(V) == 32) return (V)_mm256_set1_ps(x);
    else return splat(x);
#else
    return splat(x);
#endif
}

template <class R_>
struct Lanes {
    typedef R_ R;
    typedef typename Simd<R>::V E;
    typedef E C;
    static constexpr int ES = Simd<R>::W, CW = 1, SERIES = Simd<R>::W;
    SL_INLINE C get(const R* p) { return load(p); }
    SL_INLINE void put(R* p, C x) { store(p, x); }
    SL_INLINE C all(const R* p) { return load(p); }
    SL_INLINE E one(const R* p) { return load(p); }
    SL_INLINE void set(R* p, E x) { store(p, x); }
    SL_INLINE C spread(E x) { return x; }
    SL_INLINE E number(R x) { return splat(x); }
};
template <class R_, int BYTES>
struct Row {
    typedef R_ R;
    typedef R E;
    typedef typename Vector<R, BYTES / int(sizeof(R))>::V C;
    static constexpr int ES = 1, CW = BYTES / int(sizeof(R)), SERIES = 1;
    SL_INLINE C get(const R* p) { return load_as<C>(p); }
    SL_INLINE void put(R* p, C x) { store(p, x); }
    SL_INLINE C spread(R x) { return broadcast<C>(x); }
    SL_INLINE C all(const R* p) { return spread(*p); }
    SL_INLINE E one(const R* p) { return *p; }
    SL_INLINE void set(R* p, E x) { *p = x; }
    SL_INLINE E number(R x) { return x; }
};
// Numbers that all series of Lanes share: the right-hand factor of a product.
template <class R_>
struct Shared {
    typedef R_ R;
    static constexpr int ES = 1;
    SL_INLINE typename Simd<R>::V get(const R* p) { return splat(*p); }
    SL_INLINE typename Simd<R>::V one(const R* p) { return splat(*p); }
};

template <class R>
struct Matrix {
    R* p;
    int ld;
};
// A left-hand factor: element (i, k) at i·row + k·column, so that a transpose needs no copy.
template <class R>
struct Left {
    const R* p;
    int row, column;
};
template <class R>
Left<R> plain(Matrix<R> m) {
    return {m.p, m.ld, 1};
}
template <class R>
Left<R> turned(Matrix<R> m) {
    return {m.p, 1, m.ld};
}

template <class L, class Y, int RB, int CB, bool MINUS>
SL_INLINE void block(Matrix<typename L::R> out, Matrix<typename L::R> base, Left<typename L::R> x, Matrix<typename L::R> y, int depth) {
    typedef typename L::C C;
    constexpr int ES = L::ES, CW = L::CW;
    C sum[RB][CB];
#pragma GCC unroll 4
    for (int r = 0; r < RB; r++)
#pragma GCC unroll 4
        for (int c = 0; c < CB; c++) sum[r][c] = base.p ? L::get(base.p + (r * base.ld + c * CW) * ES) : C{};
    for (int k = 0; k < depth; k++) {
        C right[CB];
#pragma GCC unroll 4
        for (int c = 0; c < CB; c++) right[c] = Y::get(y.p + (k * y.ld + c * CW) * Y::ES);
#pragma GCC unroll 4
        for (int r = 0; r < RB; r++) {
            C left = L::all(x.p + (r * x.row + k * x.column) * ES);
            if (MINUS) left = -left;
#pragma GCC unroll 4
            for (int c = 0; c < CB; c++) sum[r][c] = madd(left, right[c], sum[r][c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RB; r++)
#pragma GCC unroll 4
        for (int c = 0; c < CB; c++) L::put(out.p + (r * out.ld + c * CW) * ES, sum[r][c]);
}

template <class L, class Y, int RB, bool MINUS>
SL_INLINE void row_block(Matrix<typename L::R> out, Matrix<typename L::R> base, Left<typename L::R> x, Matrix<typename L::R> y, int depth,
                         int first, int chunks, int r) {
    constexpr int WIDE = SL_BYTES == 64 ? 4 : 2, S = L::CW * L::ES;
    out.p += r * out.ld * L::ES, x.p += r * x.row * L::ES;
    if (base.p) base.p += r * base.ld * L::ES;
    const auto at = [&](Matrix<typename L::R> m, int c, int step) { return Matrix<typename L::R>{m.p ? m.p + c * step : m.p, m.ld}; };
    int c = first;
    for (; c + WIDE <= chunks; c += WIDE)
        block<L, Y, RB, WIDE, MINUS>(at(out, c, S), at(base, c, S), x, at(y, c, L::CW * Y::ES), depth);
    for (; c < chunks; c++) block<L, Y, RB, 1, MINUS>(at(out, c, S), at(base, c, S), x, at(y, c, L::CW * Y::ES), depth);
}

// out = base ± x·y (rows × columns; base.p null: zero). UPPER: only what lies in or above the diagonal's vectors.
template <class L, class Y, bool MINUS, bool UPPER>
__attribute__((noinline)) void multiply_rows(Matrix<typename L::R> out, int rows, int columns, Matrix<typename L::R> base, Left<typename L::R> x,
                             Matrix<typename L::R> y, int depth) {
    const int chunks = (columns + L::CW - 1) / L::CW;
    int r = 0;
    for (; r + 4 <= rows; r += 4) row_block<L, Y, 4, MINUS>(out, base, x, y, depth, UPPER ? r / L::CW : 0, chunks, r);
    for (; r < rows; r++) row_block<L, Y, 1, MINUS>(out, base, x, y, depth, UPPER ? r / L::CW : 0, chunks, r);
}
// Mantissas multiplied and exponents added, so that a product of many numbers > 0 neither overflows nor costs a logarithm each.
template <class E, class R>
struct LogProduct {
    E mantissa, exponent;
    SL_INLINE void split(E x, E& m, E& e) {
        if constexpr (sizeof(R) == 8) {
            typedef decltype([] { if constexpr (sizeof(E) == 8) return int64_t{}; else return ID{}; }()) I;
            const I i = bits<I>(x);
            if constexpr (sizeof(E) == 8) e = double(((i >> 52) & 0x7ff) - 1023);
            else e = __builtin_convertvector(((i >> 52) & 0x7ff) - 1023, E);
            m = bits<E>((i & 0xfffffffffffff) | 0x3ff0000000000000);
        } else {
            typedef decltype([] { if constexpr (sizeof(E) == 4) return int32_t{}; else return IF{}; }()) I;
            const I i = bits<I>(x);
            if constexpr (sizeof(E) == 4) e = float(((i >> 23) & 0xff) - 127);
            else e = __builtin_convertvector(((i >> 23) & 0xff) - 127, E);
            m = bits<E>((i & 0x7fffff) | 0x3f800000);
        }
    }
    void times(E x) {
        E m, e, more;
        split(x, m, e);
        split(mantissa * m, mantissa, more);
        exponent = exponent + (e + more);
    }
    E log() const {
        if constexpr (sizeof(E) == sizeof(R)) {
            return log1p01(splat(mantissa - R(1)))[0] + exponent * R(0.6931471805599453);
        } else {
            return log1p01(mantissa - splat(R(1))) + exponent * splat(R(0.6931471805599453));
        }
    }
};

template <class E>
SL_INLINE E where(E condition_left, E condition_right, E yes, E no) {  // left > right ? yes : no
    return condition_left > condition_right ? yes : no;
}

// The algebra of one layout.
template <class L>
struct Algebra {
    typedef typename L::R R;
    typedef typename L::E E;
    typedef typename L::C C;
    typedef Matrix<R> M;
    static constexpr int ES = L::ES, CW = L::CW;

    SL_INLINE R* at(M m, int i, int j) { return m.p + (i * m.ld + j) * ES; }
    SL_INLINE int chunks(int columns) { return (columns + CW - 1) / CW; }

    template <bool MINUS = false, bool UPPER = false, class Y = L>
    SL_INLINE void multiply(M out, int rows, int columns, M base, Left<R> x, M y, int depth) {
        multiply_rows<L, Y, MINUS, UPPER>(out, rows, columns, base, x, y, depth);
    }
    // The upper triangle over the lower one.
    SL_INLINE void mirror(M m, int n) {
        for (int i = 1; i < n; i++)
            for (int j = 0; j < i; j++) L::set(at(m, i, j), L::one(at(m, j, i)));
    }
    SL_INLINE void transpose(M to, M from, int rows, int columns) {  // to (columns, rows)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) L::set(at(to, j, i), L::one(at(from, i, j)));
    }
    SL_INLINE void copy(M to, M from, int rows, int columns) {
        for (int i = 0; i < rows; i++)
            for (int c = 0; c < chunks(columns); c++) L::put(at(to, i, c * CW), L::get(at(from, i, c * CW)));
    }
    // row `to` of m minus by · row `from`, from column `first` on (down to the start of its vector).
    SL_INLINE void subtract(M m, int to, int from, E by, int first, int columns) {
        const C factor = -L::spread(by);
        for (int c = first / CW; c < chunks(columns); c++)
            L::put(at(m, to, c * CW), madd(factor, L::get(at(m, from, c * CW)), L::get(at(m, to, c * CW))));
    }

    // U over S = Uᵀ D U, with ones on the diagonal and zeros below; D to `pivots`, its reciprocals to `inverse`. One precise
    // sensor's gain is then one division, so that 1 − K C is exact where it vanishes: no square root, which would round twice.
    // least: the least pivot less the rounding of what it was subtracted from, not above zero where S is not positive definite as
    // far as its digits tell.
    __attribute__((noinline)) static LogProduct<E, R> factorise(M S, R* pivots, R* inverse, int m, E& least) {
        const E zero = L::number(R(0)), one = L::number(R(1));
        LogProduct<E, R> determinant = {one, zero};
        for (int j = 0; j < m; j++) L::set(pivots + j * ES, L::one(at(S, j, j)));
        for (int j = 0; j < m; j++) {
            const E pivot = L::one(at(S, j, j));
            const E above = j ? madd(L::number(-R(m) * (sizeof(R) == 8 ? R(0x1p-52) : R(0x1p-23))), L::one(pivots + j * ES), pivot) : pivot;
            least = where(above, least, least, above);  // a NaN stays: it is above nothing
            determinant.times(pivot);
            L::set(pivots + j * ES, pivot);
            L::set(inverse + j * ES, one / pivot);
            for (int i = j + 1; i < m; i++) subtract(S, i, j, L::one(at(S, j, i)) / pivot, i, m);
            for (int c = j / CW; c < chunks(m); c++) L::put(at(S, j, c * CW), L::get(at(S, j, c * CW)) / L::spread(pivot));
            for (int i = 0; i < j; i++) L::set(at(S, j, i), zero);
            L::set(at(S, j, j), one);
        }
        return determinant;
    }
    // S⁻¹ X over X (m, columns), in two halves: D⁻¹ U⁻ᵀ X, then U⁻¹ of that.
    __attribute__((noinline)) static void solve(M U, const R* pivots, int m, M X, int columns) {
        for (int first = 0; first < m; first += 4) {
            const int here = m - first < 4 ? m - first : 4;
            const M rows = {at(X, first, 0), X.ld};
            if (first) multiply<true>(rows, here, columns, rows, {at(U, 0, first), 1, U.ld}, X, first);
            for (int j = first; j < first + here; j++)
                for (int k = first; k < j; k++) subtract(X, j, k, L::one(at(U, k, j)), 0, columns);
        }
        for (int j = 0; j < m; j++)
            for (int c = 0; c < chunks(columns); c++)
                L::put(at(X, j, c * CW), L::get(at(X, j, c * CW)) / L::all(pivots + j * ES));
        for (int first = (m - 1) / 4 * 4; first >= 0; first -= 4) {
            const int here = m - first < 4 ? m - first : 4, after = first + here;
            const M rows = {at(X, first, 0), X.ld};
            if (after < m) multiply<true>(rows, here, columns, rows, {at(U, first, after), U.ld, 1}, {at(X, after, 0), X.ld}, m - after);
            for (int j = after - 1; j >= first; j--)
                for (int k = j + 1; k < after; k++) subtract(X, j, k, L::one(at(U, j, k)), 0, columns);
        }
    }
    // Upper triangular U (columns, columns) over the first rows of B (rows, columns), Uᵀ U = Bᵀ B, diagonal ≥ 0, by Householder's
    // reflections; what lies below the diagonal is spoiled. `sums`: a row of scratch.
    __attribute__((noinline)) static void triangle(M B, int rows, int columns, R* sums) {
        for (int k = 0; k < columns && k < rows; k++) {
            E below = L::number(R(0));
            for (int i = k + 1; i < rows; i++) below = madd(L::one(at(B, i, k)), L::one(at(B, i, k)), below);
            const E zero = L::number(R(0)), top = L::one(at(B, k, k)), size = root(madd(top, top, below));
            const E far = size + where(top, zero, top, -top), head = where(zero, top, -far, far);
            const E scaled = size * far, factor = where(scaled, zero, L::number(R(1)) / scaled, zero);
            const M row = {sums, 0};
            const int start = k / CW;
            for (int c = start; c < chunks(columns); c++) {
                C sum = L::spread(head) * L::get(at(B, k, c * CW));
                for (int i = k + 1; i < rows; i++) sum = madd(L::all(at(B, i, k)), L::get(at(B, i, c * CW)), sum);
                L::put(at(row, 0, c * CW), sum * L::spread(-factor));
            }
            const E sign = where(zero, top, L::number(R(1)), L::number(R(-1)));
            for (int c = start; c < chunks(columns); c++)
                L::put(at(B, k, c * CW), madd(L::spread(head), L::get(at(row, 0, c * CW)), L::get(at(B, k, c * CW))) * L::spread(sign));
            for (int i = k + 1; i < rows; i++) {
                const C by = L::all(at(B, i, k));
                for (int c = start; c < chunks(columns); c++)
                    L::put(at(B, i, c * CW), madd(by, L::get(at(row, 0, c * CW)), L::get(at(B, i, c * CW))));
            }
            L::set(at(B, k, k), size);
        }
    }
};

}  // namespace

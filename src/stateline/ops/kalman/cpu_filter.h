// One step of the Kalman filter for a group of series in one layout of cpu_matrix.h. The definition is in reference.py.
// A matrix named Xt is kept transposed. "Seen" entries are those that are not missing.
#pragma once
#include <math.h>

#include "cpu_matrix.h"

namespace {

// A tensor (·, ·, …) whose last dimensions are adjacent; strides in numbers, 0 where all series or steps share it. Null: absent.
struct Operand {
    const char* data;
    int64_t batch, time;
    explicit operator bool() const { return data; }
};

// Laid out as Python packs it: every field is eight bytes. Pointers that do not apply are null.
struct Args {
    // factors: Q, R and covariances are square roots. A step may have 2 more: Q and R are, of which the lower triangles count.
    int64_t series, steps, n, m, threads, is_double, factors, shared;
    Operand y, A, C, Q, R, b, d, mean0, cov0;
    char *mean, *cov, *predicted_mean, *predicted_cov, *loglik, *mean_next, *cov_next;
    // Three: series and step of the first failure, or −1 (meanwhile their rank in the first); whether a state is not finite.
    int64_t* info;
    const int64_t *place, *slot;  // the step: rows of y and of the state of each series; at first, of each row of y
    int64_t slots;
    // gradients: of the seven results, then of y, A, C, Q, R, b, d, mean0, cov0
    Operand gmean, gcov, gpredicted_mean, gpredicted_cov, gloglik, gmean_next, gcov_next;
    char *dy, *dA, *dC, *dQ, *dR, *db, *dd, *dmean0, *dcov0;

    int64_t at(int64_t s) const { return place ? place[s] : s; }
    int64_t row(int64_t s) const { return slot ? slot[s] : s; }
    // Of failures, the first step's, then the first series'.
    void fail(int64_t s, int64_t t) const {
        const int64_t mine = t * series + s;
        int64_t seen = __atomic_load_n(info, __ATOMIC_RELAXED);
        while ((seen < 0 || mine < seen) && !__atomic_compare_exchange_n(info, &seen, mine, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    }
};

constexpr int LITERAL = 8;           // states up to which Joseph's form is computed as it is written
constexpr int WIDEST_IN_LANES = 16;  // states or observations up to which series lie side by side

template <class L>
struct Filter : Algebra<L> {
    typedef Algebra<L> Base;
    typedef typename Base::M M;
    typedef typename Base::R R;
    typedef typename Base::E E;
    using Base::at, Base::multiply, Base::mirror, Base::copy, Base::chunks, Base::transpose;
    static constexpr int ES = L::ES, CW = L::CW, SERIES = L::SERIES;

    const Args& a;
    const int n_, m_;
    int64_t first = 0;
    int count = 0;
    // The system now; C, Ct, R with missing entries masked are `masked`, and `now` is what holds.
    struct Observed {
        M C, Ct, R;
    } given, masked, now;
    M At, Q, P, Pf, Zt, U, gain, F, Ft, T, KR, I, stack;
    M mean, filtered, e, w, seen, sums;
    R *pivots, *inverse;
    E entries, logdet, quadratic, least;

    int n() const { return n_; }
    int m() const { return m_; }

    static int padded(int columns) { return (columns + CW - 1) / CW * CW; }
    M take(Arena& arena, int rows, int columns) { return {arena.take<R>(size_t(rows) * padded(columns) * ES), padded(columns)}; }

    Filter(const Args& args, Arena& arena) : a(args), n_(int(args.n)), m_(int(args.m)) {
        const int n = this->n(), m = this->m();
        M* const squares[] = {&At, &Q, &P, &Pf, &F, &Ft, &T, &I};
        for (M* x : squares) *x = take(arena, n, n);
        M *const flat[] = {&given.C, &masked.C, &Zt, &gain}, *const states[] = {&mean, &filtered}, *const outputs[] = {&e, &w, &seen};
        for (M* x : flat) *x = take(arena, m, n);
        for (M* x : states) *x = take(arena, 1, n);
        for (M* x : outputs) *x = take(arena, 1, m);
        given.Ct = take(arena, n, m), masked.Ct = take(arena, n, m);
        given.R = take(arena, m, m), masked.R = take(arena, m, m);
        U = take(arena, m, m), KR = take(arena, n, m), sums = take(arena, 1, n + m);
        const bool one = 2 * n > 2 * m + n;
        stack = args.factors ? take(arena, one ? 2 * n : 2 * m + n, n + m) : M{nullptr, 0};
        pivots = arena.take<R>(size_t(m) * ES), inverse = arena.take<R>(size_t(m) * ES);
        now = given;
    }
    void begin(int64_t first_series, int series) {
        first = first_series, count = series;
        for (int i = 0; i < n(); i++) L::set(at(I, i, i), L::number(R(1)));
    }

    // ---- between memory and the layout

    int64_t lane(int i) const { return first + (i < count ? i : count - 1); }
    static void move_rows(R* to, int to_row, const R* from, int from_row, int rows, int columns) {
        if (to_row == from_row) columns *= rows, rows = 1;
        for (int r = 0; r < rows; r++) __builtin_memcpy(to + r * to_row, from + r * from_row, sizeof(R) * columns);
    }
    void load(M to, int rows, int columns, const Operand& o, int64_t t, bool state = false) const {
        const R* from[SERIES];
        for (int i = 0; i < SERIES; i++) from[i] = (const R*)o.data + (state ? a.row(lane(i)) : a.at(lane(i))) * o.batch + t * o.time;
        if constexpr (SERIES == 1) return move_rows(to.p, to.ld, from[0], columns, rows, columns);
        const bool same = from[0] == from[SERIES - 1];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++) {
                R* p = at(to, r, c);
                if (same)
                    store(p, splat(from[0][r * columns + c]));
                else
                    for (int i = 0; i < SERIES; i++) p[i] = from[i][r * columns + c];
            }
    }
    void save(M from, int rows, int columns, char* data, int64_t batch, int64_t offset, bool state = false) const {
        if (!data) return;
        for (int i = 0; i < count; i++) {
            R* to = (R*)data + (state ? a.row(first + i) : a.at(first + i)) * batch + offset;
            if constexpr (SERIES == 1)
                move_rows(to, columns, from.p, from.ld, rows, columns);
            else
                for (int r = 0; r < rows; r++)
                    for (int c = 0; c < columns; c++) to[r * columns + c] = at(from, r, c)[i];
        }
    }
    void save_cov(M from, char* data, int64_t steps, int64_t t, bool state = false) const {
        if (!data) return;
        if (a.factors) {
            transpose(Ft, from, n(), n());
            from = Ft;
        }
        save(from, n(), n(), data, steps * n() * n(), t * n() * n(), state);
    }
    // What changes with time, or at the first step all of it.
    void load_system(int64_t t) {
        const int n = this->n(), m = this->m();
        if (!t || a.A.time) {
            load(T, n, n, a.A, t);
            transpose(At, T, n, n);
        }
        if (!t || a.C.time) {
            load(given.C, m, n, a.C, t);
            transpose(given.Ct, given.C, m, n);
        }
        if (!t || a.Q.time) load_symmetric(Q, n, a.Q, t);
        if (!t || a.R.time) load_symmetric(given.R, m, a.R, t);
    }
    // Of a covariance only the symmetric part counts; factors are taken as they are.
    void load_symmetric(M to, int k, const Operand& o, int64_t t) const {
        load(to, k, k, o, t);
        if (a.factors) return;
        for (int i = 0; i < k; i++)
            for (int j = i + 1; j < k; j++) {
                const E both = (L::one(at(to, i, j)) + L::one(at(to, j, i))) * L::number(R(0.5));
                L::set(at(to, i, j), both);
                L::set(at(to, j, i), both);
            }
    }
    void load_start() {
        const int n = this->n();
        load(mean, 1, n, a.mean0, 0, true);
        load(T, n, n, a.cov0, 0, true);
        transpose(P, T, n, n);
        if (a.factors) return;
        for (int i = 0; i < n; i++)
            for (int j = i + 1; j < n; j++) L::set(at(P, i, j), (L::one(at(P, i, j)) + L::one(at(T, i, j))) * L::number(R(0.5)));
        mirror(P, n);
    }
    // e ← y − d, 0 where y is missing; whether nothing is.
    bool read_observation(int64_t t) {
        const int m = this->m();
        load(w, 1, m, a.y, t);
        bool all = true;
        entries = L::number(R(0));
        for (int j = 0; j < m; j++) {
            const E y = L::one(at(w, 0, j)), here = equal(y, y);
            L::set(at(seen, 0, j), here);
            entries = entries + here;
            all &= every(here);
        }
        if (a.d) load(e, 1, m, a.d, t);
        for (int j = 0; j < m; j++) {
            const E y = L::one(at(w, 0, j)), zero = L::number(R(0));
            const E rest = a.d ? y - L::one(at(e, 0, j)) : y;
            L::set(at(e, 0, j), all ? rest : where(L::one(at(seen, 0, j)), zero, rest, zero));
        }
        return all;
    }
    // The same, and what holds with the entries that are missing.
    void observe(int64_t t) {
        const bool all = read_observation(t);
        now = all ? given : masked;
        if (!all) mask();
    }
    void mask() {
        const int n = this->n(), m = this->m();
        const E zero = L::number(R(0)), one = L::number(R(1));
        for (int i = 0; i < m; i++) {
            const E here = L::one(at(seen, 0, i));
            for (int k = 0; k < n; k++) {
                const E c = where(here, zero, L::one(at(given.C, i, k)), zero);
                L::set(at(masked.C, i, k), c);
                L::set(at(masked.Ct, k, i), c);
            }
            for (int j = 0; j < m; j++) {
                const E both = a.factors ? here : here * L::one(at(seen, 0, j));
                L::set(at(masked.R, i, j), where(both, zero, L::one(at(given.R, i, j)), i == j && !a.factors ? one : zero));
            }
        }
    }
    SL_INLINE E equal(E x, E y) {
        if constexpr (SERIES == 1)
            return x == y ? R(1) : R(0);
        else
            return x == y ? splat(R(1)) : splat(R(0));
    }
    SL_INLINE bool every(E x) {
        if constexpr (SERIES == 1) {
            return x > 0;
        } else {
            R lanes[SERIES];
            store(lanes, x);
            R least = lanes[0];
            for (R v : lanes) least = v < least ? v : least;
            return least > 0;
        }
    }

    // ---- the equations

    // From P, C, R: U, pivots, inverse, gain, Pf, logdet; least ≤ 0 or NaN where there is no filtered covariance.
    void correct_cov() {
        least = L::number(R(INFINITY));
        a.factors ? correct_factor() : correct_joseph();
    }
    void correct_joseph() {
        const int n = this->n(), m = this->m();
        multiply(Zt, m, n, {}, turned(now.Ct), P, n);
        this->template multiply<false, true>(U, m, m, now.R, plain(Zt), now.Ct, n);
        logdet = Base::factorise(U, pivots, inverse, m, least).log();
        copy(gain, Zt, m, n);
        Base::solve(U, pivots, m, gain, n);
        filtered_cov();
    }
    // (I − K C) P (I − K C)ᵀ + K R Kᵀ. For more states M − (M Cᵀ − K R) Kᵀ with M = P − K C P: the same with fewer operations.
    void filtered_cov() {
        const int n = this->n(), m = this->m();
        if (n <= LITERAL) {
            this->template multiply<true>(F, n, n, I, turned(gain), now.C, m);
            this->template multiply<true>(Ft, n, n, I, turned(now.C), gain, m);
            multiply(T, n, n, {}, plain(F), P, n);
            multiply(KR, n, m, {}, turned(gain), now.R, m);
            this->template multiply<false, true>(Pf, n, n, {}, plain(KR), gain, m);
            this->template multiply<false, true>(Pf, n, n, Pf, plain(T), Ft, n);
        } else {
            this->template multiply<true>(T, n, n, P, turned(gain), Zt, m);
            multiply(KR, n, m, {}, plain(T), now.Ct, n);
            this->template multiply<true>(KR, n, m, KR, turned(gain), now.R, m);
            this->template multiply<true, true>(Pf, n, n, T, plain(KR), gain, m);
        }
        mirror(Pf, n);
    }
    // P holds Gᵀ, R its factor. [GᵀCᵀ Gᵀ; Fᵀ 0; holes 0], made triangular, is [U  S^-½ C P; 0 G'ᵀ]. Rows that may be large come
    // first: a reflection's rounding is that of the row it is in, but for the first, which takes up what is below.
    void correct_factor() {
        const int n = this->n(), m = this->m(), rows = 2 * m + n;
        const E zero = L::number(R(0)), one = L::number(R(1));
        multiply(KR, n, m, {}, plain(P), now.Ct, n);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < n + m; j++) {
                E x = zero;
                if (i < n)
                    x = j < m ? L::one(at(KR, i, j)) : L::one(at(P, i, j - m));
                else if (i < n + m && j < m)
                    x = L::one(at(now.R, j, i - n));
                else if (j == i - n - m)
                    x = one - L::one(at(seen, 0, j));
                L::set(at(stack, i, j), x);
            }
        Base::triangle(stack, rows, n + m, sums.p);
        LogProduct<E, R> determinant = {one, zero};
        for (int i = 0; i < m; i++) {
            const E pivot = L::one(at(stack, i, i));
            least = where(pivot, least, least, pivot);
            determinant.times(pivot * pivot);
            L::set(inverse + i * ES, one / (pivot * pivot));
            for (int j = 0; j < m; j++) L::set(at(U, i, j), j < i ? zero : L::one(at(stack, i, j)) / pivot);
            for (int j = 0; j < n; j++) L::set(at(gain, i, j), L::one(at(stack, i, m + j)) / pivot);
        }
        logdet = determinant.log();
        take_triangle(Pf, m);
    }
    void take_triangle(M to, int offset) {
        for (int i = 0; i < n(); i++)
            for (int j = 0; j < n(); j++) L::set(at(to, i, j), j < i ? L::number(R(0)) : L::one(at(stack, offset + i, offset + j)));
    }
    // The covariance one step on.
    void predict_cov() {
        const int n = this->n();
        if (a.factors) {
            multiply(T, n, n, {}, plain(Pf), At, n);
            for (int i = 0; i < n; i++)
                for (int j = 0; j < n; j++) {
                    L::set(at(stack, i, j), L::one(at(T, i, j)));
                    L::set(at(stack, n + i, j), L::one(at(Q, j, i)));
                }
            Base::triangle(stack, 2 * n, n, sums.p);
            take_triangle(P, 0);
            return;
        }
        multiply(T, n, n, {}, turned(At), Pf, n);
        this->template multiply<false, true>(P, n, n, Q, plain(T), At, n);
        mirror(P, n);
    }

    // What the means need of a step, in this layout or as numbers that all series share.
    struct Gains {
        M Ct, U, gain, At;
        const R* inverse;
    };
    Gains gains() const { return {now.Ct, U, gain, At, inverse}; }

    // e ← e − C mean, w ← U⁻ᵀ e, filtered ← mean + K e (in square roots: + w times its gain), quadratic = wᵀ D⁻¹ w.
    template <class Y>
    void correct_mean(const Gains& g) {
        const int n = this->n(), m = this->m();
        this->template multiply<true, false, Y>(e, 1, m, e, plain(mean), g.Ct, n);
        copy(w, e, 1, m);
        quadratic = L::number(R(0));
        for (int j = 0; j < m; j++) {
            const E mine = L::one(at(w, 0, j));
            const auto minus = -L::spread(mine);
            for (int c = (j + 1) / CW; c < chunks(m); c++)
                L::put(at(w, 0, c * CW), madd(minus, Y::get(g.U.p + (j * g.U.ld + c * CW) * Y::ES), L::get(at(w, 0, c * CW))));
            L::set(at(w, 0, j), mine);
            quadratic = madd(mine * Y::one(g.inverse + j * Y::ES), mine, quadratic);
        }
        this->template multiply<false, false, Y>(filtered, 1, n, mean, plain(a.factors ? w : e), g.gain, m);
    }
    template <class Y>
    void predict_mean(const Gains& g, int64_t t) {
        const int n = this->n();
        if (a.b) load(mean, 1, n, a.b, t);
        this->template multiply<false, false, Y>(mean, 1, n, a.b ? mean : M{}, plain(filtered), g.At, n);
    }
    void save_loglik(E log_of_det, E seen_entries, int64_t t) const {
        if (!a.loglik) return;
        const E all = (quadratic + log_of_det) + seen_entries * L::number(R(1.8378770664093453));
        R lanes[SERIES];
        L::set(lanes, all * L::number(R(-0.5)));
        for (int i = 0; i < count; i++) ((R*)a.loglik)[a.at(first + i) * a.steps + t] = lanes[i];
    }
    // Whether the mean, and P if asked, are finite: what is not never leaves them, so that the last step's tell of all. Reports it.
    bool finite(bool cov) const {
        const E zero = L::number(R(0));
        E odd = zero, more = zero;  // 0, or NaN; above the diagonal is all of P, or of its factor
        for (int i = 0; i < n(); i++) {
            odd = madd(L::one(at(mean, 0, i)), zero, odd);
            for (int j = i; cov && j < n(); j++) more = madd(L::one(at(P, i, j)), zero, more);
        }
        odd = odd + more;
        const bool fine = every(equal(odd, odd));
        if (!fine) __atomic_store_n(a.info + 2, 1, __ATOMIC_RELAXED);
        return fine;
    }
    // Whether every series of the group has a filtered covariance; reports the first that has none.
    bool check(int64_t t) const {
        R lanes[SERIES];
        L::set(lanes, least);
        for (int i = 0; i < count; i++)
            if (!(lanes[i] > 0)) {
                a.fail(first + i, t);
                return false;
            }
        return true;
    }
};

// run.operator()<Layout>(), in the layout that suits the sizes: series side by side where there are several, `together`
// allows it and they are small; else one series with its columns in lanes.
template <class R, class Run>
int in_layout(const Args& a, bool together, Run run) {
    const int64_t most = a.n > a.m ? a.n : a.m;
    if (most <= WIDEST_IN_LANES && a.series > 2 && together) return run.template operator()<Lanes<R>>();
    if (SL_BYTES > 32 && most * int64_t(sizeof(R)) <= 32) return run.template operator()<Row<R, SL_BYTES < 32 ? SL_BYTES : 32>>();
    return run.template operator()<Row<R, SL_BYTES>>();
}
template <class Run>
int in_layout(const Args& a, bool together, Run run) {
    return a.is_double ? in_layout<double>(a, together, run) : in_layout<float>(a, together, run);
}

}  // namespace

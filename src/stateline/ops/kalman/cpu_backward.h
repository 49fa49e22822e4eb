// Gradients of the Kalman filter on CPUs, from the last step to the first, and what the smoother shares with them. What a step
// computed is computed again from its predicted moments; the gradient is that of the covariance form, which every form equals as
// a function of its inputs.
//
// With G, g the gradients of the filtered covariance and mean, l that of the log-likelihood, F = I − K C, v = S⁻¹ e, u = Kᵀ g:
//   K minimises the filtered covariance, so that  d Pf = F dP Fᵀ + K dR Kᵀ − K dC Pf − (K dC Pf)ᵀ
//   d mean = F (dm + dP Cᵀ v − K…)  and  d loglik  meet in  e, S = C P Cᵀ + R:  de ← u − l v,  H = l (v vᵀ − S⁻¹)/2
//   dP = Fᵀ G F + sym(Fᵀg (Cᵀv)ᵀ) + Cᵀ H C        dR = Kᵀ G K − sym(u vᵀ) + H
//   dC = v (Pf g)ᵀ − u (K e)ᵀ − 2 Kᵀ G Pf + 2 H C P − de mᵀ        dm = g − Cᵀ de
#pragma once
#include <stdlib.h>

#include "cpu_filter.h"
#include "pool.h"

namespace {

// Sums over series: group g adds to sum g modulo MOST_SUMS, in order, so that they take no memory for every group. At most so
// many threads are of use.
constexpr int64_t MOST_SUMS = 64;

// A gradient's place: per series or summed over the series of some groups, per step or summed over steps.
struct Sum {
    char* data;
    int64_t batch, time;  // strides in numbers
    bool shared;
};

struct Plan {
    const Args& a;
    int64_t width, groups, sums, failed;
    Sum A, C, Q, R, b, d, cov0;
};

// A step that was taken before, from its predicted moments: mean0 and cov0 are here those of every step.
template <class L>
struct Replay : Filter<L> {
    typedef Filter<L> F0;
    typedef typename F0::M M;
    typedef typename F0::R R;
    typedef typename F0::E E;
    using F0::a, F0::at;

    M A, v;

    Replay(const Args& args, Arena& arena) : F0(args, arena) {
        A = this->take(arena, this->n(), this->n()), v = this->take(arena, 1, this->m());
    }

    // The filtered moments, F = I − K C and v = S⁻¹ e; `once`: also what does not change with time.
    void replay(int64_t t, bool once) {
        const int n = this->n(), m = this->m();
        if (once || a.A.time) {
            this->load(A, n, n, a.A, t);
            this->transpose(this->At, A, n, n);
        }
        if (once || a.C.time) {
            this->load(this->given.C, m, n, a.C, t);
            this->transpose(this->given.Ct, this->given.C, m, n);
        }
        if (once || a.R.time) this->load_symmetric(this->given.R, m, a.R, t);
        this->load(this->mean, 1, n, a.mean0, t);
        this->load(this->P, n, n, a.cov0, t);
        this->observe(t);
        this->correct_cov();
        this->template correct_mean<L>(this->gains());
        if (n > LITERAL) this->template multiply<true>(this->F, n, n, this->I, turned(this->gain), this->now.C, m);
        for (int j = m - 1; j >= 0; j--) {  // U⁻¹ D⁻¹ w
            E sum = L::one(at(this->w, 0, j)) * L::one(this->inverse + j * L::ES);
            for (int k = j + 1; k < m; k++) sum = madd(-L::one(at(this->U, j, k)), L::one(at(v, 0, k)), sum);
            L::set(at(v, 0, j), sum);
        }
    }
};

template <class L>
struct Adjoint : Replay<L> {
    typedef Replay<L> F0;
    typedef typename F0::M M;
    typedef typename F0::R R;
    typedef typename F0::E E;
    using F0::a, F0::at, F0::multiply, F0::mirror, F0::copy, F0::transpose, F0::count, F0::first, F0::n, F0::m, F0::now, F0::I, F0::A, F0::v;
    static constexpr int ES = L::ES, SERIES = L::SERIES;

    const Plan& plan;
    int64_t group = 0, last = 0;  // last: the step that comes last, on which sums over steps are given
    M nudge = {};                 // where there is one: what the gradient of e is besides
    M K, G, T2, T3, gP, dA, dQ, dC, dR, KG, Zm, H, Sinv, g, gn, u, de, less, row, half, other, db, dd;

    Adjoint(const Plan& p, Arena& arena) : Replay<L>(p.a, arena), plan(p) {
        const int n = this->n(), m = this->m();
        M *const squares[] = {&G, &T2, &T3, &gP, &dA, &dQ}, *const flat[] = {&dC, &KG, &Zm}, *const outputs[] = {&u, &de, &less, &dd},
                 *const small[] = {&dR, &H, &Sinv}, *const states[] = {&g, &gn, &row, &half, &other, &db};
        for (M* x : squares) *x = this->take(arena, n, n);
        for (M* x : flat) *x = this->take(arena, m, n);
        for (M* x : small) *x = this->take(arena, m, m);
        for (M* x : outputs) *x = this->take(arena, 1, m);
        for (M* x : states) *x = this->take(arena, 1, n);
        K = this->take(arena, n, m);
    }

    void scaled(M to, M from, int rows, int columns, E by) {
        for (int i = 0; i < rows; i++)
            for (int c = 0; c < this->chunks(columns); c++)
                L::put(at(to, i, c * L::CW), L::get(at(from, i, c * L::CW)) * L::spread(by));
    }
    void clear(M to, int rows, int columns) { scaled(to, to, rows, columns, L::number(R(0))); }
    void add(M to, M more, int rows, int columns) {
        for (int i = 0; i < rows; i++)
            for (int c = 0; c < this->chunks(columns); c++)
                L::put(at(to, i, c * L::CW), L::get(at(to, i, c * L::CW)) + L::get(at(more, i, c * L::CW)));
    }
    // to += by · (x as a column) (y as a row)
    template <bool MINUS = false>
    void outer(M to, int rows, int columns, M x, M y) {
        this->template multiply<MINUS>(to, rows, columns, to, {x.p, 1, 0}, y, 1);
    }
    // A gradient of a result at step t, added to `to`; absent: nothing. Shared covariances belong to the first series.
    void receive(M to, int rows, int columns, const Operand& o, int64_t t, M scratch) {
        if (!o) return;
        this->load(scratch, rows, columns, o, t);
        add(to, scratch, rows, columns);
    }
    void receive_cov(M to, const Operand& o, int64_t t) {
        if (!o || (a.shared && first > 0)) return;
        const int n = this->n();
        this->load(T3, n, n, o, t);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < n; j++) {
                const E both = (L::one(at(T3, i, j)) + L::one(at(T3, j, i))) * L::number(R(0.5));
                L::set(at(T2, i, j), a.shared ? only_first(both) : both);
            }
        add(to, T2, n, n);
    }
    SL_INLINE E only_first(E x) {
        if constexpr (SERIES > 1)
            for (int i = 1; i < SERIES; i++) x[i] = 0;
        return x;
    }
    // Out of the layout: a series' own, or the sum over the group's series in their order, added to that of groups before.
    void give(M from, int rows, int columns, const Sum& to, int64_t t) {
        if (!to.data) return;
        if (!to.shared) return this->save(from, rows, columns, to.data, to.batch, t * to.time);
        R* out = (R*)to.data + group % plan.sums * to.batch + t * to.time;
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++) {
                R sum = 0;
                for (int i = 0; i < count; i++) sum += at(from, r, c)[SERIES > 1 ? i : 0];
                out[r * columns + c] += sum;
            }
    }
    // The same of what was summed over steps so far, if steps are apart; then it starts anew.
    void give_step(M from, int rows, int columns, const Sum& to, int64_t t) {
        if (!to.time && t != last) return;
        give(from, rows, columns, to, t);
        clear(from, rows, columns);
    }

    void run(int64_t number, int64_t first_series, int series) {
        const int n = this->n();
        group = number;
        this->begin(first_series, series);
        receive(g, 1, n, a.gmean_next, 0, row);
        receive_cov(G, a.gcov_next, 0);
        for (int64_t t = a.steps - 1; t >= 0; t--) step(t);
        this->save(g, 1, n, a.dmean0, n, 0);
        give(G, n, n, plan.cov0, 0);
    }
    void step(int64_t t) {
        this->replay(t, t == a.steps - 1);
        this->check(t);  // what factors tell apart, covariances may not
        back_predict(t);
        receive(gn, 1, n(), a.gmean, t, row);
        receive_cov(gP, a.gcov, t);
        copy(g, gn, 1, n());
        copy(G, gP, n(), n());
        back_correct(t);
        receive(g, 1, n(), a.gpredicted_mean, t, row);
        receive_cov(G, a.gpredicted_cov, t);
    }
    // From g, G after the step to those of the filtered moments, in gn, gP.
    void back_predict(int64_t t) {
        const int n = this->n();
        multiply(T2, n, n, {}, turned(A), G, n);
        this->template multiply<false, true>(gP, n, n, {}, plain(T2), A, n);
        mirror(gP, n);
        multiply(gn, 1, n, {}, plain(g), A, n);
        multiply(T3, n, n, {}, plain(A), this->Pf, n);
        scaled(T2, G, n, n, L::number(R(2)));
        multiply(dA, n, n, dA, plain(T2), T3, n);
        outer(dA, n, n, g, this->filtered);
        add(dQ, G, n, n);
        add(db, g, 1, n);
        give_step(dA, n, n, plan.A, t), give_step(dQ, n, n, plan.Q, t), give_step(db, 1, n, plan.b, t);
    }
    // From g, G of the filtered moments to those of the predicted ones.
    void back_correct(int64_t t) {
        const int n = this->n(), m = this->m();
        const bool likely = bool(a.gloglik);
        transpose(K, this->gain, m, n);
        multiply(u, 1, m, {}, plain(g), K, n);
        scaled(de, u, 1, m, L::number(R(1)));
        if (likely) {
            const E l = loglik_gradient(t);
            scaled(less, v, 1, m, -l);
            add(de, less, 1, m);
            innovation(l);
        }
        if (nudge.p) add(de, nudge, 1, m);
        this->save(de, 1, m, a.dy, a.steps * m, t * m);
        // dC
        multiply(KG, m, n, {}, turned(K), G, n);
        scaled(Zm, KG, m, n, L::number(R(2)));
        this->template multiply<true>(dC, m, n, dC, plain(Zm), this->Pf, n);
        multiply(row, 1, n, {}, plain(g), this->Pf, n);
        outer(dC, m, n, v, row);
        scaled(row, this->mean, 1, n, L::number(R(-1)));
        add(row, this->filtered, 1, n);
        outer<true>(dC, m, n, u, row);
        outer<true>(dC, m, n, de, this->mean);
        if (likely) {
            scaled(Sinv, H, m, m, L::number(R(2)));
            multiply(dC, m, n, dC, plain(Sinv), this->Zt, m);
        }
        // dR
        multiply(dR, m, m, dR, plain(KG), K, n);
        if (likely) add(dR, H, m, m);
        scaled(less, v, 1, m, L::number(R(-0.5)));
        outer(dR, m, m, u, less), outer(dR, m, m, less, u);
        // dd
        scaled(less, de, 1, m, L::number(R(-1)));
        add(dd, less, 1, m);
        give_step(dC, m, n, plan.C, t), give_step(dR, m, m, plan.R, t), give_step(dd, 1, m, plan.d, t);
        // P and m
        multiply(T2, n, n, {}, plain(G), this->F, n);
        multiply(gP, n, n, {}, turned(this->F), T2, n);
        if (likely) {
            multiply(this->KR, n, m, {}, turned(now.C), H, m);
            multiply(gP, n, n, gP, plain(this->KR), now.C, m);
        }
        this->template multiply<true>(row, 1, n, g, plain(u), now.C, m);
        multiply(half, 1, n, {}, plain(v), now.C, m);
        scaled(other, half, 1, n, L::number(R(0.5)));
        outer(gP, n, n, row, other), outer(gP, n, n, other, row);
        mirror(gP, n);
        copy(G, gP, n, n);
        this->template multiply<true>(g, 1, n, g, plain(de), now.C, m);
    }
    // H = l (v vᵀ − S⁻¹)/2, 0 at missing entries.
    void innovation(E l) {
        const int m = this->m();
        for (int i = 0; i < m; i++)
            for (int j = 0; j < m; j++) L::set(at(Sinv, i, j), L::number(R(i == j ? 1 : 0)));
        this->solve(this->U, this->pivots, m, Sinv, m);
        const E by = l * L::number(R(0.5)), zero = L::number(R(0));
        for (int i = 0; i < m; i++)
            for (int j = 0; j < m; j++) {
                const E both = L::one(at(this->seen, 0, i)) * L::one(at(this->seen, 0, j));
                const E x = by * (L::one(at(v, 0, i)) * L::one(at(v, 0, j)) - L::one(at(Sinv, i, j)));
                L::set(at(H, i, j), where(both, zero, x, zero));
            }
    }
    E loglik_gradient(int64_t t) {
        R lanes[SERIES];
        for (int i = 0; i < SERIES; i++) {
            const Operand& o = a.gloglik;
            lanes[i] = o ? ((const R*)o.data)[this->lane(i) * o.batch + t * o.time] : R(0);
        }
        return L::one(lanes);
    }
};

template <class A>
void back_task(void* context, int64_t number) {
    Plan& plan = *(Plan*)context;
    Arena measure = {nullptr};
    A sizes(plan, measure);
    Arena arena = {(char*)sl_scratch(measure.used + 64)};
    if (!arena.memory) {
        plan.failed = SL_NO_MEMORY;
        return;
    }
    for (int64_t group = number; group < plan.groups; group += plan.sums) {
        arena.used = 0;
        __builtin_memset(arena.memory, 0, measure.used + 64);
        A adjoint(plan, arena);
        const int64_t first = group * plan.width, rest = plan.a.series - first;
        adjoint.run(group, first, int(rest < plan.width ? rest : plan.width));
    }
}

// Sums, in their order, to where the gradient belongs.
template <class R>
void add_up(const Sum& sum, char* to, int64_t sums, int64_t numbers) {
    R* out = (R*)to;
    for (int64_t i = 0; i < numbers; i++) out[i] = 0;
    for (int64_t g = 0; g < sums; g++) {
        const R* from = (const R*)sum.data + g * sum.batch;
        for (int64_t i = 0; i < numbers; i++) out[i] += from[i];
    }
}

// Gradients by A, groups of series side by side, and their sums. EACH: cov0 has a gradient at each step, not one.
template <class A, bool EACH>
int run_back(const Args& a, double flops) {
    typedef typename A::R R;
    const int64_t width = A::SERIES, groups = (a.series + width - 1) / width, sums = groups < MOST_SUMS ? groups : MOST_SUMS;
    const int64_t n = a.n, m = a.m;
    Plan plan = {a, width, groups, sums, SL_OK, {}, {}, {}, {}, {}, {}, {}};
    struct Item {
        Sum* sum;
        const Operand operand;
        char* to;
        int64_t size;
    } const items[] = {{&plan.A, a.A, a.dA, n * n}, {&plan.C, a.C, a.dC, m * n}, {&plan.Q, a.Q, a.dQ, n * n},
                       {&plan.R, a.R, a.dR, m * m}, {&plan.b, a.b, a.db, n},     {&plan.d, a.d, a.dd, m},
                       {&plan.cov0, {nullptr, a.shared ? 0 : n * n, EACH ? n * n : 0}, a.dcov0, n * n}};
    int64_t total = 0;
    const auto steps = [&](const Item& i) { return i.operand.time ? a.steps : 1; };
    const auto shared = [&](const Item& i) { return i.to && !i.operand.batch; };
    for (const Item& i : items) total += shared(i) ? sums * i.size * steps(i) : 0;
    R* memory = (R*)calloc(total + 1, sizeof(R));
    if (!memory) return SL_NO_MEMORY;
    R* next = memory;
    for (const Item& i : items) {
        *i.sum = {shared(i) ? (char*)next : i.to, i.size * steps(i), i.operand.time ? i.size : 0, shared(i)};
        next += shared(i) ? sums * i.size * steps(i) : 0;
    }
    sl_parallel(sums, a.threads, 2e-4 * double(a.series) * double(a.steps) * flops, back_task<A>, &plan);
    for (const Item& i : items)
        if (shared(i)) add_up<R>(*i.sum, i.to, sums, i.size * steps(i));
    free(memory);
    return int(plan.failed);
}

}  // namespace

// Gradients of the Kalman filter on CPUs, from the last step to the first. What a step computed is computed again from its
// predicted moments; the gradient is that of the covariance form, which every form equals as a function of its inputs.
//
// With G, g the gradients of the filtered covariance and mean, l that of the log-likelihood, F = I − K C, v = S⁻¹ e, u = Kᵀ g:
//   K minimises the filtered covariance, so that  d Pf = F dP Fᵀ + K dR Kᵀ − K dC Pf − (K dC Pf)ᵀ
//   d mean = F (dm + dP Cᵀ v − K…)  and  d loglik  meet in  e, S = C P Cᵀ + R:  de ← u − l v,  H = l (v vᵀ − S⁻¹)/2
//   dP = Fᵀ G F + sym(Fᵀg (Cᵀv)ᵀ) + Cᵀ H C        dR = Kᵀ G K − sym(u vᵀ) + H
//   dC = v (Pf g)ᵀ − u (K e)ᵀ − 2 Kᵀ G Pf + 2 H C P − de mᵀ        dm = g − Cᵀ de
#include <stdlib.h>

#include "cpu_filter.h"
#include "pool.h"

namespace {

// A gradient's place: per series or summed over the series of a group, per step or summed over steps.
struct Sum {
    char* data;
    int64_t batch, time;  // strides in numbers
    bool shared;
};

struct Plan {
    const Args& a;
    int64_t width, groups, failed;
    Sum A, C, Q, R, b, d, cov0;
};

template <class L>
struct Adjoint : Filter<L> {
    typedef Filter<L> F0;
    typedef typename F0::M M;
    typedef typename F0::R R;
    typedef typename F0::E E;
    using F0::a, F0::at, F0::multiply, F0::mirror, F0::copy, F0::transpose, F0::count, F0::first, F0::n, F0::m, F0::now, F0::I;
    static constexpr int ES = L::ES, SERIES = L::SERIES;

    const Plan& plan;
    int64_t group = 0;
    M A, K, G, T2, W, gP, dA, dQ, dC, dR, KG, Zm, H, Sinv, g, gn, v, u, de, less, row, half, other, db, dd;

    Adjoint(const Plan& p, Arena& arena) : F0(p.a, arena), plan(p) {
        const int n = this->n(), m = this->m();
        M *const squares[] = {&A, &G, &T2, &W, &gP, &dA, &dQ}, *const flat[] = {&dC, &KG, &Zm}, *const outputs[] = {&v, &u, &de, &less, &dd},
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
        this->load(W, n, n, o, t);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < n; j++) {
                const E both = (L::one(at(W, i, j)) + L::one(at(W, j, i))) * L::number(R(0.5));
                L::set(at(T2, i, j), a.shared ? only_first(both) : both);
            }
        add(to, T2, n, n);
    }
    SL_INLINE E only_first(E x) {
        if constexpr (SERIES > 1)
            for (int i = 1; i < SERIES; i++) x[i] = 0;
        return x;
    }
    // Out of the layout: a series' own, or the sum over the group's series in their order.
    void give(M from, int rows, int columns, const Sum& to, int64_t t) {
        if (!to.data) return;
        if (!to.shared) return this->save(from, rows, columns, to.data, to.batch, t * to.time);
        R* out = (R*)to.data + group * to.batch + t * to.time;
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++) {
                R sum = 0;
                for (int i = 0; i < count; i++) sum += at(from, r, c)[SERIES > 1 ? i : 0];
                out[r * columns + c] = sum;
            }
    }
    // The same of what was summed over steps so far, if steps are apart; then it starts anew.
    void give_step(M from, int rows, int columns, const Sum& to, int64_t t) {
        if (!to.time && t) return;
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
    // What the forward pass had.
    void recompute(int64_t t) {
        const int n = this->n(), m = this->m();
        const bool once = t == a.steps - 1;
        if (once || a.A.time) {
            this->load(A, n, n, a.A, t);
            transpose(this->At, A, n, n);
        }
        if (once || a.C.time) {
            this->load(this->given.C, m, n, a.C, t);
            transpose(this->given.Ct, this->given.C, m, n);
        }
        if (once || a.R.time) this->load_symmetric(this->given.R, m, a.R, t);
        this->load(this->mean, 1, n, a.mean0, t);
        this->load(this->P, n, n, a.cov0, t);
        this->observe(t);
        this->correct_cov();
        this->check(t);  // what factors tell apart, covariances may not
        transpose(K, this->gain, m, n);
        this->template correct_mean<L>(this->gains());
        if (n > LITERAL) {
            this->template multiply<true>(this->F, n, n, I, plain(K), now.C, m);
        }
        // v = U⁻¹ D⁻¹ w
        for (int j = m - 1; j >= 0; j--) {
            E sum = L::one(at(this->w, 0, j)) * L::one(this->inverse + j * ES);
            for (int k = j + 1; k < m; k++) sum = madd(-L::one(at(this->U, j, k)), L::one(at(v, 0, k)), sum);
            L::set(at(v, 0, j), sum);
        }
    }
    void step(int64_t t) {
        recompute(t);
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
        multiply(W, n, n, {}, plain(A), this->Pf, n);
        scaled(T2, G, n, n, L::number(R(2)));
        multiply(dA, n, n, dA, plain(T2), W, n);
        outer(dA, n, n, g, this->filtered);
        add(dQ, G, n, n);
        add(db, g, 1, n);
        give_step(dA, n, n, plan.A, t), give_step(dQ, n, n, plan.Q, t), give_step(db, 1, n, plan.b, t);
    }
    // From g, G of the filtered moments to those of the predicted ones.
    void back_correct(int64_t t) {
        const int n = this->n(), m = this->m();
        const E l = loglik_gradient(t);
        multiply(u, 1, m, {}, plain(g), K, n);
        scaled(de, u, 1, m, L::number(R(1)));
        scaled(less, v, 1, m, -l);
        add(de, less, 1, m);
        this->save(de, 1, m, a.dy, a.steps * m, t * m);
        innovation(l);
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
        scaled(Sinv, H, m, m, L::number(R(2)));
        multiply(dC, m, n, dC, plain(Sinv), this->Zt, m);
        // dR
        multiply(dR, m, m, dR, plain(KG), K, n);
        add(dR, H, m, m);
        scaled(less, v, 1, m, L::number(R(-0.5)));
        outer(dR, m, m, u, less), outer(dR, m, m, less, u);
        // dd
        scaled(less, de, 1, m, L::number(R(-1)));
        add(dd, less, 1, m);
        give_step(dC, m, n, plan.C, t), give_step(dR, m, m, plan.R, t), give_step(dd, 1, m, plan.d, t);
        // P and m
        multiply(T2, n, n, {}, plain(G), this->F, n);
        multiply(gP, n, n, {}, turned(this->F), T2, n);
        multiply(this->KR, n, m, {}, turned(now.C), H, m);
        multiply(gP, n, n, gP, plain(this->KR), now.C, m);
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

template <class L>
void task(void* context, int64_t number) {
    Plan& plan = *(Plan*)context;
    Arena measure = {nullptr};
    Adjoint<L> sizes(plan, measure);
    Arena arena = {(char*)sl_scratch(measure.used + 64)};
    if (!arena.memory) {
        plan.failed = SL_NO_MEMORY;
        return;
    }
    __builtin_memset(arena.memory, 0, measure.used + 64);
    Adjoint<L> adjoint(plan, arena);
    const int64_t first = number * plan.width, rest = plan.a.series - first;
    adjoint.run(number, first, int(rest < plan.width ? rest : plan.width));
}

// Sums of groups, in their order, to where the gradient belongs.
template <class R>
void add_up(const Sum& sum, char* to, int64_t groups, int64_t numbers) {
    R* out = (R*)to;
    for (int64_t i = 0; i < numbers; i++) out[i] = 0;
    for (int64_t g = 0; g < groups; g++) {
        const R* from = (const R*)sum.data + g * sum.batch;
        for (int64_t i = 0; i < numbers; i++) out[i] += from[i];
    }
}

template <class L>
int run_all(const Args& a) {
    typedef typename L::R R;
    const int64_t width = L::SERIES, groups = (a.series + width - 1) / width, n = a.n, m = a.m;
    Plan plan = {a, width, groups, SL_OK, {}, {}, {}, {}, {}, {}, {}};
    struct Item {
        Sum* sum;
        const Operand operand;
        char* to;
        int64_t size;
    } const items[] = {{&plan.A, a.A, a.dA, n * n}, {&plan.C, a.C, a.dC, m * n}, {&plan.Q, a.Q, a.dQ, n * n},
                       {&plan.R, a.R, a.dR, m * m}, {&plan.b, a.b, a.db, n},     {&plan.d, a.d, a.dd, m},
                       {&plan.cov0, {nullptr, a.shared ? 0 : n * n, 0}, a.dcov0, n * n}};
    int64_t total = 0;
    const auto steps = [&](const Item& i) { return i.operand.time ? a.steps : 1; };
    const auto shared = [&](const Item& i) { return i.to && !i.operand.batch; };
    for (const Item& i : items) total += shared(i) ? groups * i.size * steps(i) : 0;
    R* memory = (R*)malloc((total + 1) * sizeof(R));
    if (!memory) return SL_NO_MEMORY;
    R* next = memory;
    for (const Item& i : items) {
        *i.sum = {shared(i) ? (char*)next : i.to, i.size * steps(i), i.operand.time ? i.size : 0, shared(i)};
        next += shared(i) ? groups * i.size * steps(i) : 0;
    }
    const double flops = 15.0 * double(n + m) * double(n + m) * double(n);
    sl_parallel(groups, a.threads, 2e-4 * double(a.series) * double(a.steps) * flops, task<L>, &plan);
    for (const Item& i : items)
        if (shared(i)) add_up<R>(*i.sum, i.to, groups, i.size * steps(i));
    free(memory);
    return int(plan.failed);
}

}  // namespace

// There is a step at least. mean0 and cov0 are here the predicted moments of every step.
SL_KERNEL(kalman_backward) {
    const Args& a = *(const Args*)args;
    return in_layout(a, true, [&]<class L>() { return run_all<L>(a); });
}

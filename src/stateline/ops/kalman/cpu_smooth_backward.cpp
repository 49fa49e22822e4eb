// Gradients of the smoother on CPUs, from the first step to the last: what r[t−1] and W[t−1] (cpu_smooth.cpp) are worth, the step
// that made them hands on to r[t] and W[t]. The definition is `smooth_backward` in reference.py, where the equations are; what
// is left of a step when r and W are taken care of is the gradient of its filtered moments, which Adjoint has.
#include "cpu_backward.h"

namespace {

// mean0 and cov0 are here the predicted moments of every step, b and Q are r and W; gcov_next is the gradient of Cov(h[t], h[t+1]).
template <class L>
struct SmootherAdjoint : Adjoint<L> {
    typedef Adjoint<L> F0;
    typedef typename F0::M M;
    typedef typename F0::R R;
    typedef typename F0::E E;
    using F0::a, F0::at, F0::multiply, F0::copy, F0::transpose, F0::now, F0::n, F0::m, F0::plan, F0::scaled, F0::clear, F0::add, F0::receive,
        F0::A, F0::v, F0::K, F0::G, F0::T2, F0::T3, F0::dA, F0::dC, F0::dR, F0::KG, F0::Zm, F0::g, F0::row, F0::other, F0::I, F0::F, F0::Ft, F0::Pf;

    // B = Aᵀ W A, z = Aᵀ r; a name with a 0 is of the step before; gr, gW: the gradients of r0, W0, and then of r, W.
    M W, W0, WA, B, FO, gB, PG, gW, both, extra, carry, ahead, lag, r, r0, z, gr, gz, Fp, Cs, D, E_, Dt, theta, x, s;

    SmootherAdjoint(const Plan& p, Arena& arena) : Adjoint<L>(p, arena) {
        const int n = this->n(), m = this->m();
        M *const squares[] = {&W, &W0, &WA, &B, &FO, &gB, &PG, &gW, &both, &extra, &carry, &ahead, &lag, &theta},
                 *const states[] = {&r, &r0, &z, &gr, &gz, &Fp, &Cs}, *const flat[] = {&D, &E_}, *const outputs[] = {&x, &s};
        for (M* y : squares) *y = this->take(arena, n, n);
        for (M* y : states) *y = this->take(arena, 1, n);
        for (M* y : flat) *y = this->take(arena, m, n);
        for (M* y : outputs) *y = this->take(arena, 1, m);
        Dt = this->take(arena, n, m);
        this->last = a.steps - 1, this->nudge = s;
    }

    // to −= (X + Xᵀ)/2, or with PLUS: to += X + Xᵀ
    template <bool PLUS = false>
    void symmetrically(M to, M X) {
        const int n = this->n();
        const E by = L::number(R(PLUS ? 1 : -0.5));
        for (int i = 0; i < n; i++)
            for (int j = 0; j < n; j++) L::set(at(to, i, j), madd(by, L::one(at(X, i, j)) + L::one(at(X, j, i)), L::one(at(to, i, j))));
    }

    void run(int64_t number, int64_t first_series, int series) {
        this->group = number;
        this->begin(first_series, series);
        for (int64_t t = 0; t < a.steps; t++) step(t);
    }
    void step(int64_t t) {
        const int n = this->n();
        this->replay(t, !t);
        this->check(t);
        if (n > LITERAL) transpose(Ft, F, n, n);
        this->load(r, 1, n, a.b, t), this->load(W, n, n, a.Q, t);
        multiply(z, 1, n, {}, plain(r), A, n);
        multiply(WA, n, n, {}, plain(W), A, n);
        multiply(B, n, n, {}, turned(A), WA, n);
        clear(g, 1, n), clear(G, n, n);
        receive(g, 1, n, a.gmean, t, row), this->receive_cov(G, a.gcov, t);
        multiply(Fp, 1, n, {}, plain(gr), Ft, n);
        multiply(gz, 1, n, Fp, plain(g), Pf, n);
        multiply(FO, n, n, {}, plain(F), gW, n);
        multiply(gB, n, n, {}, plain(FO), Ft, n);
        multiply(PG, n, n, {}, plain(Pf), G, n);
        this->template multiply<true>(gB, n, n, gB, plain(PG), Pf, n);
        if (t) observed();
        moved(t);
        symmetrically<true>(G, both);
        this->back_correct(t);
        add(G, extra, n, n);
        this->save(g, 1, n, a.dmean0, a.steps * n, t * n);
        this->give(G, n, n, plan.cov0, t);
        copy(extra, carry, n, n), copy(r0, r, 1, n), copy(W0, W, n, n);
    }
    // What r0 and W0 tell of C, R, e and the predicted covariance.
    void observed() {
        const int n = this->n(), m = this->m();
        transpose(K, this->gain, m, n);
        this->template multiply<true>(x, 1, m, v, plain(z), K, n);
        copy(D, now.C, m, n);
        this->solve(this->U, this->pivots, m, D, n);
        transpose(Dt, D, m, n);
        multiply(s, 1, m, {}, plain(gr), Dt, n);
        multiply(T2, n, n, {}, plain(B), F, n);
        this->template multiply<true>(E_, m, n, D, turned(K), T2, n);
        // C; the smoothed mean without the predicted one, which the gradient of e brings
        this->outer(dC, m, n, x, Fp);
        scaled(other, this->mean, 1, n, L::number(R(-1)));
        add(other, this->filtered, 1, n);
        multiply(row, 1, n, other, plain(z), Pf, n);
        this->template outer<true>(dC, m, n, s, row);
        transpose(T2, FO, n, n);
        scaled(T2, T2, n, n, L::number(R(2)));
        multiply(dC, m, n, dC, plain(E_), T2, n);
        multiply(T3, n, n, {}, plain(B), Pf, n);
        multiply(theta, n, n, {}, plain(T2), T3, n);
        this->template multiply<true>(dC, m, n, dC, plain(D), theta, n);
        // R
        this->template outer<true>(dR, m, m, x, s);
        scaled(Zm, E_, m, n, L::number(R(2)));
        scaled(KG, D, m, n, L::number(R(-1)));
        add(Zm, KG, m, n);
        multiply(KG, m, n, {}, plain(Zm), gW, n);
        this->template multiply<true>(dR, m, m, dR, plain(KG), Dt, n);
        // the predicted covariance
        multiply(theta, n, n, {}, turned(now.C), D, m);
        multiply(Cs, 1, n, {}, plain(s), now.C, m);
        scaled(T2, W0, n, n, L::number(R(2)));
        this->template multiply<true>(T2, n, n, T2, turned(now.C), D, m);
        multiply(T3, n, n, {}, plain(T2), gW, n);
        multiply(T2, n, n, {}, plain(T3), theta, n);
        this->outer(T2, n, n, r0, Cs);
        symmetrically(extra, T2);
    }
    // On to r and W; the gradients of A and, as half of a symmetric one, of the filtered covariance.
    void moved(int64_t t) {
        const int n = this->n();
        this->outer(dA, n, n, r, gz);
        scaled(T2, gB, n, n, L::number(R(2)));
        multiply(dA, n, n, dA, plain(WA), T2, n);
        this->template multiply<true>(both, n, n, {}, turned(PG), B, n);
        scaled(row, g, 1, n, L::number(R(0.5)));
        this->outer(both, n, n, row, z);
        multiply(gr, 1, n, {}, plain(gz), this->At, n);
        multiply(T2, n, n, {}, plain(A), gB, n);
        multiply(gW, n, n, {}, plain(T2), this->At, n);
        clear(carry, n, n);
        if (t + 1 < a.steps && a.gcov_next && !(a.shared && this->first)) later(t);
        this->give_step(dA, n, n, plan.A, t);
    }
    // What Cov(h[t], h[t+1]) = P Aᵀ (I − W P'), P' predicted for the next step, tells besides.
    void later(int64_t t) {
        const int n = this->n();
        this->load(ahead, n, n, a.cov0, t + 1);
        this->load(lag, n, n, a.gcov_next, t);
        if (a.shared)
            for (int i = 0; i < n; i++)
                for (int j = 0; j < n; j++) L::set(at(lag, i, j), this->only_first(L::one(at(lag, i, j))));
        multiply(gB, n, n, {}, plain(A), Pf, n);
        multiply(T2, n, n, {}, plain(gB), lag, n);
        multiply(T3, n, n, {}, plain(T2), ahead, n);
        symmetrically(gW, T3);
        multiply(T3, n, n, {}, plain(W), T2, n);
        symmetrically(carry, T3);
        this->template multiply<true>(T2, n, n, I, plain(W), ahead, n);
        transpose(T3, lag, n, n);
        multiply(gB, n, n, {}, plain(T2), T3, n);
        multiply(dA, n, n, dA, plain(gB), Pf, n);
        scaled(gB, gB, n, n, L::number(R(0.5)));
        multiply(both, n, n, both, turned(A), gB, n);
    }
};

}  // namespace

// There is a step at least.
SL_KERNEL(kalman_smooth_backward) {
    const Args& a = *(const Args*)args;
    const double flops = 25.0 * double(a.n + a.m) * double(a.n + a.m) * double(a.n);
    return in_layout(a, true, [&]<class L>() { return run_back<SmootherAdjoint<L>, true>(a, flops); });
}

// The smoother of Bryson and Frazier on CPUs, from the last step to the first: moments given all observations, from the
// filter's predicted moments. The definition is `smooth` in reference.py. What a step computed is computed again.
#include "cpu_backward.h"

namespace {

struct Job {
    const Args& a;
    int64_t width, failed;  // width: series of a group
};

// mean0 and cov0 are here the predicted moments of every step; predicted_cov is where Cov(h[t], h[t+1]) goes, predicted_mean and
// cov_next where r[t] and W[t] go, of which series that share covariances have one W.
template <class L>
struct Smoother : Replay<L> {
    typedef Replay<L> F0;
    typedef typename F0::M M;
    using F0::a, F0::at, F0::multiply, F0::mirror, F0::copy, F0::transpose, F0::now, F0::n, F0::m, F0::v;

    M W, AP, WAP, AF, next, lag, more, SC, r, fresh;

    Smoother(const Args& args, Arena& arena) : Replay<L>(args, arena) {
        M *const squares[] = {&W, &AP, &WAP, &AF, &next, &lag, &more}, *const states[] = {&r, &fresh};
        for (M* x : squares) *x = this->take(arena, n(), n());
        for (M* x : states) *x = this->take(arena, 1, n());
        SC = this->take(arena, m(), n());
    }

    void run(int64_t first, int series) {
        const int64_t n = this->n(), apart = a.shared ? 0 : a.steps * n * n;
        this->begin(first, series);
        for (int64_t t = a.steps - 1; t >= 0; t--) {
            this->replay(t, t == a.steps - 1);
            this->save(r, 1, n, a.predicted_mean, a.steps * n, t * n);
            if (apart || !first) this->save(W, n, n, a.cov_next, apart, t * n * n);
            if (a.mean) moments(t);
            if (t) back();
        }
    }
    // mean + P Aᵀ r,  P − P Aᵀ W A P,  and P Aᵀ (I − W P'), P' predicted for the next step.
    void moments(int64_t t) {
        const int n = this->n();
        multiply(AP, n, n, {}, turned(this->At), this->Pf, n);
        multiply(WAP, n, n, {}, plain(W), AP, n);
        multiply(fresh, 1, n, this->filtered, plain(r), AP, n);
        this->save(fresh, 1, n, a.mean, a.steps * n, t * n);
        this->template multiply<true, true>(lag, n, n, this->Pf, turned(AP), WAP, n);
        mirror(lag, n);
        this->save(lag, n, n, a.cov, a.steps * n * n, t * n * n);
        if (t + 1 < a.steps) {
            transpose(more, AP, n, n);
            this->template multiply<true>(lag, n, n, more, turned(WAP), next, n);
            this->save(lag, n, n, a.predicted_cov, (a.steps - 1) * n * n, t * n * n);
        }
        copy(next, this->P, n, n);
    }
    // r ← Cᵀ v + (A F)ᵀ r,  W ← Cᵀ S⁻¹ C + (A F)ᵀ W A F.
    void back() {
        const int n = this->n(), m = this->m();
        multiply(AF, n, n, {}, turned(this->At), this->F, n);
        multiply(fresh, 1, n, {}, plain(v), now.C, m);
        multiply(fresh, 1, n, fresh, plain(r), AF, n);
        copy(r, fresh, 1, n);
        multiply(WAP, n, n, {}, plain(W), AF, n);
        copy(SC, now.C, m, n);
        this->solve(this->U, this->pivots, m, SC, n);
        multiply(more, n, n, {}, turned(now.C), SC, m);
        this->template multiply<false, true>(W, n, n, more, turned(AF), WAP, n);
        mirror(W, n);
    }
};

template <class L>
void task(void* context, int64_t number) {
    Job& job = *(Job*)context;
    Arena measure = {nullptr};
    Smoother<L> sizes(job.a, measure);
    Arena arena = {(char*)sl_scratch(measure.used + 64)};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    __builtin_memset(arena.memory, 0, measure.used + 64);
    Smoother<L> smoother(job.a, arena);
    const int64_t first = number * job.width, rest = job.a.series - first;
    smoother.run(first, int(rest < job.width ? rest : job.width));
}

template <class L>
int run_all(const Args& a) {
    Job job = {a, L::SERIES, SL_OK};
    const double flops = 10.0 * double(a.n + a.m) * double(a.n + a.m) * double(a.n);
    sl_parallel((a.series + job.width - 1) / job.width, a.threads, 2e-4 * double(a.series) * double(a.steps) * flops,
                task<L>, &job);
    return int(job.failed);
}

}  // namespace

// There is a step at least. With no place for means, r and W alone.
SL_KERNEL(kalman_smooth) {
    const Args& a = *(const Args*)args;
    return in_layout(a, true, [&]<class L>() { return run_all<L>(a); });
}

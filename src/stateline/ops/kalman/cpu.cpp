// The Kalman filter on CPUs: covariances and means of many series, of one, and of a system that many series share.
#include <stdlib.h>

#include "cpu_filter.h"
#include "pool.h"

namespace {

struct Job {
    const Args& a;
    int64_t width;  // series in a group
    int64_t failed;
};

// One group from the first step to the last.
template <class L>
void run_group(const Args& a, int64_t first, int count, Arena arena) {
    Filter<L> f(a, arena);
    f.begin(first, count);
    f.load_start();
    for (int64_t t = 0; t < a.steps; t++) {
        f.load_system(t);
        f.observe(t);
        f.save(f.mean, 1, f.n(), a.predicted_mean, a.steps * f.n(), t * f.n());
        f.save_cov(f.P, a.predicted_cov, a.steps, t);
        f.correct_cov();
        if (!f.check(t)) return;
        f.template correct_mean<L>(f.gains());
        f.save_loglik(f.logdet, f.entries, t);
        f.save(f.filtered, 1, f.n(), a.mean, a.steps * f.n(), t * f.n());
        f.save_cov(f.Pf, a.cov, a.steps, t);
        f.template predict_mean<L>(f.gains(), t);
        f.predict_cov();
    }
    if (!f.finite(true) && a.slot) return;  // a step in place leaves the state as it was
    f.save(f.mean, 1, f.n(), a.mean_next, f.n(), 0, true);
    f.save_cov(f.P, a.cov_next, 1, 0, true);
}

template <class L>
size_t bytes(const Args& a) {
    Arena arena = {nullptr};
    Filter<L> f(a, arena);
    return arena.used + 64;
}

template <class L>
void task(void* context, int64_t number) {
    Job& job = *(Job*)context;
    const size_t needed = bytes<L>(job.a);
    Arena arena = {(char*)sl_scratch(needed)};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    __builtin_memset(arena.memory, 0, needed);
    const int64_t first = number * job.width, rest = job.a.series - first;
    run_group<L>(job.a, first, int(rest < job.width ? rest : job.width), arena);
}

// ---- one covariance recursion for all series

// What the means need of one step, as numbers: row after row without padding.
template <class R>
struct Record {
    R *Ct, *U, *gain, *At, *inverse, *rest;  // rest: log determinant, entries seen
    static size_t size(const Args& a) { return a.n * a.m * 2 + a.m * a.m + a.m + 2 + (a.A.time ? a.n * a.n : 0); }
    Record(const Args& a, R* memory, R* constant) {
        Ct = memory, gain = Ct + a.n * a.m, U = gain + a.n * a.m, inverse = U + a.m * a.m, rest = inverse + a.m;
        At = a.A.time ? rest + 2 : constant;
    }
};

template <class R>
struct SharedJob {
    const Args& a;
    R *records, *constant, *means;  // constant: Aᵀ where it is; means (series, n) between stretches of time
    int64_t from, to, failed;
};

// The filter's covariances of one series, with a record of each step in [from, to).
template <class L>
struct SharedCovariance {
    typedef typename L::R R;
    Filter<L> f;
    const SharedJob<R>* job = nullptr;
    bool fine = true;
    SharedCovariance(const Args& a, Arena& arena) : f(a, arena) {
        f.begin(0, 1);
        f.load_start();
    }
    static void flat(R* to, Matrix<R> m, int rows, int columns) {
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) to[i * columns + j] = m.p[i * m.ld + j];
    }
    static void task(void* context, int64_t) {
        SharedCovariance& mine = *(SharedCovariance*)context;
        mine.fine = mine.run(*mine.job);
    }
    bool run(const SharedJob<R>& job) {
        const Args& a = f.a;
        for (int64_t t = job.from; t < job.to; t++) {
            f.load_system(t);
            f.observe(t);
            f.save_cov(f.P, a.predicted_cov, a.steps, t);
            f.correct_cov();
            if (!f.check(t)) return false;
            f.save_cov(f.Pf, a.cov, a.steps, t);
            Record<R> r(a, job.records + (t - job.from) * Record<R>::size(a), job.constant);
            flat(r.Ct, f.now.Ct, f.n(), f.m()), flat(r.gain, f.gain, f.m(), f.n()), flat(r.U, f.U, f.m(), f.m());
            if (a.A.time || !t) flat(r.At, f.At, f.n(), f.n());
            for (int j = 0; j < f.m(); j++) r.inverse[j] = f.inverse[j];
            r.rest[0] = f.logdet, r.rest[1] = f.entries;
            f.predict_cov();
        }
        if (job.to < a.steps) return true;
        f.finite(true);
        f.save_cov(f.P, a.cov_next, 1, 0, true);
        return true;
    }
};

template <class R>
void shared_means(void* context, int64_t number) {
    typedef Lanes<R> L;
    SharedJob<R>& job = *(SharedJob<R>*)context;
    const Args& a = job.a;
    const size_t needed = bytes<L>(a);
    Arena arena = {(char*)sl_scratch(needed)};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    Filter<L> f(a, arena);
    const int64_t first = number * L::SERIES, rest = a.series - first;
    f.begin(first, int(rest < L::SERIES ? rest : L::SERIES));
    const int n = f.n(), m = f.m();
    const Operand start = {job.from ? (const char*)job.means : a.mean0.data, job.from ? n : a.mean0.batch, 0};
    f.load(f.mean, 1, n, start, 0);
    for (int64_t t = job.from; t < job.to; t++) {
        const Record<R> r(a, job.records + (t - job.from) * Record<R>::size(a), job.constant);
        const typename Filter<L>::Gains gains = {{r.Ct, m}, {r.U, m}, {r.gain, n}, {r.At, n}, r.inverse};
        f.read_observation(t);
        f.save(f.mean, 1, n, a.predicted_mean, a.steps * n, t * n);
        f.template correct_mean<Shared<R>>(gains);
        f.save_loglik(splat(r.rest[0]), splat(r.rest[1]), t);
        f.save(f.filtered, 1, n, a.mean, a.steps * n, t * n);
        f.template predict_mean<Shared<R>>(gains, t);
    }
    if (job.to == a.steps) f.finite(false);
    f.save(f.mean, 1, n, job.to == a.steps ? a.mean_next : (char*)job.means, n, 0);
}

template <class L>
int run_shared(const Args& a) {
    typedef typename L::R R;
    const size_t size = Record<R>::size(a), stretch = 1 + (size_t(1) << 18) / size;
    const int64_t block = int64_t(stretch) < a.steps ? int64_t(stretch) : a.steps;
    const size_t needed = bytes<L>(a), numbers = size * block + a.n * a.n + a.series * a.n;
    char* memory = (char*)aligned_alloc(64, (needed + numbers * sizeof(R) + 127) / 64 * 64);
    if (!memory) return SL_NO_MEMORY;
    __builtin_memset(memory, 0, needed);
    Arena arena = {memory};
    SharedCovariance<L> covariance(a, arena);
    R* records = (R*)(memory + (needed + 63) / 64 * 64);
    SharedJob<R> job = {a, records, records + size * block, records + size * block + a.n * a.n, 0, 0, SL_OK};
    const int64_t groups = (a.series + Simd<R>::W - 1) / Simd<R>::W;
    covariance.job = &job;
    do {
        job.to = job.from + block < a.steps ? job.from + block : a.steps;
        sl_parallel(1, 1, 0, SharedCovariance<L>::task, &covariance);
        const double work = 1e-3 * double(job.to - job.from) * double(groups) * double(2 * a.n * a.m + a.n * a.n + 20);
        if (covariance.fine) sl_parallel(groups, a.threads, work, shared_means<R>, &job);
        job.from = job.to;
    } while (covariance.fine && job.from < a.steps && job.failed == SL_OK);
    free(memory);
    return int(job.failed);
}

// ---- which layout

template <class L>
int run_all(const Args& a) {
    if (a.shared && a.series > 1) {
        if constexpr (L::SERIES == 1) return run_shared<L>(a);
    }
    Job job = {a, L::SERIES, SL_OK};
    const double flops = 5.0 * double(a.n + a.m) * double(a.n + a.m) * double(a.n);
    sl_parallel((a.series + job.width - 1) / job.width, a.threads, 2e-4 * double(a.series) * double(a.steps) * flops,
                task<L>, &job);
    return int(job.failed);
}

int filter(const Args& a) {
    a.info[0] = a.info[1] = -1, a.info[2] = 0;
    const int status = in_layout(a, !a.shared, [&]<class L>() { return run_all<L>(a); });
    if (a.info[0] >= 0) a.info[1] = a.info[0] / a.series, a.info[0] = a.at(a.info[0] % a.series);
    return status;
}

}  // namespace

namespace {

// The lower triangle of F (k, k) in `to`, or its product with its transpose.
template <class R>
void triangle_of(R* to, const R* F, int64_t k, bool product) {
    for (int64_t i = 0; i < k * k; i++) to[i] = 0;
    if (!product) {
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j <= i; j++) to[i * k + j] = F[i * k + j];
        return;
    }
    R* column = to + k * k;  // column by column, so that rows of `to` are added side by side
    for (int64_t c = 0; c < k; c++) {
        for (int64_t i = c; i < k; i++) column[i] = F[i * k + c];
        for (int64_t i = c; i < k; i++)
            for (int64_t j = c; j <= i; j++) to[i * k + j] += column[i] * column[j];
    }
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = i + 1; j < k; j++) to[i * k + j] = to[j * k + i];
}
template <class R>
void take_triangles(Args& a, char* memory) {
    const bool product = !a.factors;
    R *Q = (R*)memory, *S = Q + a.n * a.n + a.n;
    triangle_of(Q, (const R*)a.Q.data, a.n, product);
    triangle_of(S, (const R*)a.R.data, a.m, product);
    a.Q.data = (char*)Q, a.R.data = (char*)S;
}

// Whether the rows of an operand at `place` are finite, or where `gaps` may be, finite or NaN.
template <class R>
bool finite_rows(const Operand& o, const int64_t* place, int64_t rows, int64_t numbers, bool gaps) {
    if (!o.batch && rows > 1) rows = 1;
    for (int64_t r = 0; o && r < rows; r++) {
        const R* p = (const R*)o.data + place[r] * o.batch;
        R odd = 0;
        for (int64_t i = 0; i < numbers; i++) odd += gaps && p[i] != p[i] ? R(0) : p[i] * R(0);
        if (odd != odd) return false;
    }
    return true;
}
template <class R>
bool finite_step(const Args& a) {
    const struct {
        const Operand& o;
        int64_t numbers;
    } system[] = {{a.A, a.n * a.n}, {a.C, a.m * a.n}, {a.Q, a.n * a.n}, {a.R, a.m * a.m}, {a.b, a.n}, {a.d, a.m}};
    bool fine = finite_rows<R>(a.y, a.place, a.series, a.m, true);
    for (const auto& part : system) fine &= finite_rows<R>(part.o, a.place, a.series, part.numbers, false);
    return fine;
}

}  // namespace

// One observation of each row of y; index picks rows of the state, a negative one skips.
static int one_step(const Args& given) {
    Args a = given;
    a.factors = given.factors & 1;
    const bool triangles = given.factors & 2;
    const size_t rows = 2 * sizeof(int64_t) * (given.series + 1), numbers = (a.n + 1) * a.n + (a.m + 1) * a.m;
    int64_t* memory = (int64_t*)malloc(rows + triangles * numbers * sizeof(double));
    if (!memory) return SL_NO_MEMORY;
    if (triangles) (a.is_double ? take_triangles<double> : take_triangles<float>)(a, (char*)memory + rows);
    int64_t *place = memory, *slot = memory + given.series + 1, count = 0;
    for (int64_t i = 0; i < given.series; i++) {
        const int64_t row = given.slot ? given.slot[i] : i;
        if (row >= given.slots) {
            free(memory);
            return SL_BAD_INDEX;
        }
        place[count] = i, slot[count] = row;
        count += row >= 0;
    }
    a.place = place, a.slot = slot, a.series = count;
    int status = SL_OK;
    if (a.is_double ? finite_step<double>(a) : finite_step<float>(a))
        status = filter(a);
    else
        a.info[0] = a.info[1] = -1, a.info[2] = 1;  // before any state is touched
    free(memory);
    return status;
}

SL_KERNEL(kalman_step) { return one_step(*(const Args*)args); }
SL_KERNEL(kalman_forward) { return filter(*(const Args*)args); }

// h[t] = a[t] h[t-1] + b[t] on CPUs: forward, gradient, one step. The definition is in reference.py.
// A task walks one sequence for a strip of channels whose states stay in registers, so that any split has the same bits. Time is not
// cut for more threads: a step takes four cycles (nine if complex) and moves 12 bytes a number, so one strip nearly fills a core's
// share of memory, and cutting would read everything twice.
// Suffixes: b batch, t time step, d number: a channel, or one part of a complex one, real and imaginary part being neighbours.
#include <stdlib.h>

#include "pool.h"
#include "tile.h"

namespace {

constexpr int WIDE = 16;     // vectors in a strip, if all threads have some: rows of wide layers lie on different pages
constexpr int N = 4;         // in a narrow one
constexpr int AHEAD = 8;     // steps between asking for a row and using it
constexpr int PARTIAL = 64;  // steps whose products are added up before they join a long sum

struct Output {
    char* data;
    int64_t dtype;
};

// Laid out as Python packs it: every field is eight bytes. Pointers that do not apply are null.
struct Args {
    int64_t b, t, d;
    const int64_t* table;
    int64_t count, reverse, threads, is_double, is_complex, constant;
    Rows a, x;      // a: (b, t, d), or (d) if constant
    char* initial;  // (count, d); the step: the slots, changed in place
    Output h;
    char* state;
    // step
    const int64_t* index;
    int64_t slots;
    // gradients
    Rows dh, past;
    const char* dstate;
    Output da, db;
    char* dinitial;

    Rows rows(Output o) const { return {o.data, o.dtype, t * d, d}; }
    Segments segments() const { return {table, count, b, t, reverse}; }
    double cost_us() const { return 1e-3 * double(count) * double(t) * double(d); }
};

struct Job {
    const Args& a;
    char* sums;      // (count, d): gradients of constant decays, a sequence each
    int64_t vectors;  // in a strip; results do not depend on it
};

template <class P>
SL_INLINE void ask_for(const P* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)row + i);
}

// Swaps, or doubles one of, the two parts of complex numbers.
template <class R, int EVEN, int ODD>
SL_INLINE typename Simd<R>::V parts(typename Simd<R>::V x) {
    constexpr int W = Simd<R>::W, E = EVEN, O = ODD;
    if constexpr (W == 2)
        return __builtin_shufflevector(x, x, E, O);
    else if constexpr (W == 4)
        return __builtin_shufflevector(x, x, E, O, E + 2, O + 2);
    else if constexpr (W == 8)
        return __builtin_shufflevector(x, x, E, O, E + 2, O + 2, E + 4, O + 4, E + 6, O + 6);
    else
        return __builtin_shufflevector(x, x, E, O, E + 2, O + 2, E + 4, O + 4, E + 6, O + 6, E + 8, O + 8, E + 10, O + 10, E + 12,
                                       O + 12, E + 14, O + 14);
}

// a·x + y; with CONJ that of a's conjugate.
template <class R, bool C, bool CONJ>
SL_INLINE typename Simd<R>::V multiply_add(typename Simd<R>::V a, typename Simd<R>::V x, typename Simd<R>::V y) {
    if constexpr (!C) {
        return fma(a, x, y);
    } else {
        typename Simd<R>::V sign;
        for (int i = 0; i < Simd<R>::W; i++) sign[i] = (i % 2 == 0) != CONJ ? R(-1) : R(1);
        return fma(parts<R, 0, 0>(a), x, fma(parts<R, 1, 1>(a) * sign, parts<R, 1, 0>(x), y));
    }
}

// Vectors from and to memory; `lanes`: how many numbers of the last one exist, 0 if all.
template <class R, class S, int M>
SL_INLINE void get(typename Simd<R>::V (&to)[M], const S* from, int lanes) {
    for (int v = 0; v < M; v++) to[v] = lanes && v == M - 1 ? load_some<R>(from + v * Simd<R>::W, lanes) : load_from<R>(from + v * Simd<R>::W);
}
template <class R, class S, int M>
SL_INLINE void put(S* to, const typename Simd<R>::V (&from)[M], int lanes) {
    for (int v = 0; v < M; v++) {
        if (lanes && v == M - 1)
            store_some<R>(to + v * Simd<R>::W, from[v], lanes);
        else
            store_to<R>(to + v * Simd<R>::W, from[v]);
    }
}

// One sequence, M vectors from number `first` on. A, B: how a and b lie in memory.
template <class R, class A, class B, bool C, int M>
void walk(const Args& args, int64_t sequence, int64_t first, int lanes) {
    typedef typename Simd<R>::V V;
    const Segment segment = args.segments()[sequence];
    const int64_t length = segment.stop - segment.start, at = sequence * args.d + first;
    const Span from = span(segment, args.reverse, 0);
    const Rows out = args.rows(args.h);
    V h[M] = {}, a[M], x[M];
    if (args.initial) get<R>(h, (const R*)args.initial + at, lanes);
    if (args.constant) get<R>(a, (const R*)args.a.data + first, lanes);
    const A* pa = args.constant ? nullptr : (const A*)args.a.at(segment.row, from.token, first);
    const B* px = (const B*)args.x.at(segment.row, from.token, first);
    B* ph = (B*)out.at(segment.row, from.token, first);
    const int64_t step_a = args.constant ? 0 : args.a.time * from.direction, step_x = args.x.time * from.direction;
    for (int64_t s = 0; s < length; s++, px += step_x, ph += out.time * from.direction) {
        if (pa) {
            ask_for(pa + AHEAD * step_a, sizeof(A) * Simd<R>::W * M);
            get<R>(a, pa, lanes);
            pa += step_a;
        }
        ask_for(px + AHEAD * step_x, sizeof(B) * Simd<R>::W * M);
        get<R>(x, px, lanes);
        for (int v = 0; v < M; v++) h[v] = multiply_add<R, C, false>(a[v], h[v], x[v]);
        put<R>(ph, h, lanes);
    }
    put<R>((R*)args.state + at, h, lanes);
}

// The gradient, from the last step to the first: what reaches h[t] reaches b[t], and h[t-1] times a[t].
template <class R, class A, class B, bool C, int M>
void walk_back(const Job& job, int64_t sequence, int64_t first, int lanes) {
    typedef typename Simd<R>::V V;
    const Args& args = job.a;
    const Segment segment = args.segments()[sequence];
    const int64_t length = segment.stop - segment.start, at = sequence * args.d + first;
    const Rows da = args.rows(args.da), db = args.rows(args.db);
    V g[M], a[M], before[M] = {}, start[M] = {}, sum[M] = {}, partial[M] = {};
    get<R>(g, (const R*)args.dstate + at, lanes);
    if (args.initial) get<R>(start, (const R*)args.initial + at, lanes);
    if (args.constant) get<R>(a, (const R*)args.a.data + first, lanes);
    for (int64_t s = length - 1; s >= 0; s--) {
        const Span to = span(segment, args.reverse, s);
        V slope[M];
        const B* pd = (const B*)args.dh.at(segment.row, to.token, first);
        const B* pp = (const B*)args.past.at(segment.row, to.token - to.direction, first);
        ask_for(pd - AHEAD * to.direction * args.dh.time, sizeof(B) * Simd<R>::W * M);
        get<R>(slope, pd, lanes);
        for (int v = 0; v < M; v++) g[v] += slope[v];
        put<R>((B*)db.at(segment.row, to.token, first), g, lanes);
        if (s) {
            ask_for(pp - AHEAD * to.direction * args.past.time, sizeof(B) * Simd<R>::W * M);
            get<R>(before, pp, lanes);
        } else {
            for (int v = 0; v < M; v++) before[v] = start[v];
        }
        if (!args.constant) {
            const A* pa = (const A*)args.a.at(segment.row, to.token, first);
            ask_for(pa - AHEAD * to.direction * args.a.time, sizeof(A) * Simd<R>::W * M);
            get<R>(a, pa, lanes);
            for (int v = 0; v < M; v++) slope[v] = multiply_add<R, C, true>(before[v], g[v], V{});
            put<R>((A*)da.at(segment.row, to.token, first), slope, lanes);
        } else {
            for (int v = 0; v < M; v++) partial[v] = multiply_add<R, C, true>(before[v], g[v], partial[v]);
            if (s % PARTIAL == 0)
                for (int v = 0; v < M; v++) sum[v] += partial[v], partial[v] = V{};
        }
        for (int v = 0; v < M; v++) g[v] = multiply_add<R, C, true>(a[v], g[v], V{});
    }
    if (args.constant) put<R>((R*)job.sums + at, sum, lanes);
    if (args.dinitial) put<R>((R*)args.dinitial + at, g, lanes);
}

template <class R, class A, class B, bool C, int M>
SL_INLINE void strip(const Job& job, int64_t sequence, int64_t first, int lanes) {
    if (job.a.dstate)
        walk_back<R, A, B, C, M>(job, sequence, first, lanes);
    else
        walk<R, A, B, C, M>(job.a, sequence, first, lanes);
}

template <class R, class A, class B, bool C>
void task(void* context, int64_t number) {
    const Job& job = *(const Job*)context;
    constexpr int W = Simd<R>::W;
    const int64_t width = job.vectors * W, strips = (job.a.d + width - 1) / width, sequence = number / strips;
    int64_t first = number % strips * width;
    const int64_t last = first + width < job.a.d ? first + width : job.a.d;
    if (last - first == WIDE * W) {
        strip<R, A, B, C, WIDE>(job, sequence, first, 0);
        return;
    }
    for (; last - first >= N * W; first += N * W) strip<R, A, B, C, N>(job, sequence, first, 0);
    for (; last - first >= W; first += W) strip<R, A, B, C, 1>(job, sequence, first, 0);
    if (last > first) strip<R, A, B, C, 1>(job, sequence, first, int(last - first));
}

template <class R, class A, class B, bool C>
void run(Job job) {
    constexpr int W = Simd<R>::W;
    job.vectors = job.a.count * (job.a.d / (WIDE * W)) >= job.a.threads ? WIDE : N;
    const int64_t width = job.vectors * W, strips = (job.a.d + width - 1) / width;
    sl_parallel(strips * job.a.count, job.a.threads, (job.a.dstate ? 2 : 1) * job.a.cost_us(), task<R, A, B, C>, (void*)&job);
}

void dispatch(const Job& job) {
    const Args& a = job.a;
    if (a.is_double)
        a.is_complex ? run<double, double, double, true>(job) : run<double, double, double, false>(job);
    else if (a.is_complex)
        run<float, float, float, true>(job);
    else if (a.a.dtype == BF16)
        a.x.dtype == BF16 ? run<float, Bf16, Bf16, false>(job) : run<float, Bf16, float, false>(job);
    else
        a.x.dtype == BF16 ? run<float, float, Bf16, false>(job) : run<float, float, float, false>(job);
}

template <class R>
void add_up(const Job& job) {
    for (int64_t i = 0; i < job.a.d; i++) {
        R sum = 0;
        for (int64_t s = 0; s < job.a.count; s++) sum += ((const R*)job.sums)[s * job.a.d + i];
        ((R*)job.a.da.data)[i] = sum;
    }
}

template <class R, bool C>
void step(const Args& a) {
    constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;
    for (int64_t row = 0; row < a.b; row++) {
        const int64_t slot = a.index ? a.index[row] : row;
        if (slot < 0) continue;
        for (int64_t i = 0; i < a.d; i += W) {
            const int lanes = int(a.d - i < W ? a.d - i : W);
            R* state = (R*)a.initial + slot * a.d + i;
            V decay, input;
            with_dtype(a.a.dtype, [&](auto* type) {
                decay = load_some<R>((decltype(type))(a.constant ? a.a.at(0, 0, i) : a.a.at(row, 0, i)), lanes);
            });
            with_dtype(a.x.dtype, [&](auto* type) { input = load_some<R>((decltype(type))a.x.at(row, 0, i), lanes); });
            const V h = multiply_add<R, C, false>(decay, load_some<R>(state, lanes), input);
            store_some<R>(state, h, lanes);
            with_dtype(a.h.dtype, [&](auto* type) { store_some<R>((decltype(type))a.rows(a.h).at(row, 0, i), h, lanes); });
        }
    }
}

}  // namespace

SL_KERNEL(linear_scan_forward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    dispatch({a, nullptr, N});
    return SL_OK;
}

SL_KERNEL(linear_scan_backward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    Job job = {a, nullptr, N};
    if (a.constant) {
        job.sums = (char*)malloc(size_t(a.count) * a.d * (a.is_double ? 8 : 4) + 64);
        if (!job.sums) return SL_NO_MEMORY;
    }
    dispatch(job);
    if (a.constant) a.is_double ? add_up<double>(job) : add_up<float>(job);
    free(job.sums);
    return SL_OK;
}

SL_KERNEL(linear_scan_step) {
    const Args& a = *(const Args*)args;
    for (int64_t row = 0; row < a.b; row++)
        if ((a.index ? a.index[row] : row) >= a.slots) return SL_BAD_INDEX;
    if (a.is_double)
        a.is_complex ? step<double, true>(a) : step<double, false>(a);
    else
        a.is_complex ? step<float, true>(a) : step<float, false>(a);
    return SL_OK;
}

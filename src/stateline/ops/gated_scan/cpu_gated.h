// What the forward pass and the gradient of gated_scan share. The definition is in reference.py.
// A dense A is a matrix M laid out for rows times M: out[i] += Σ_j M[j·pitch + i] x[j], lanes over i, so that nothing is summed over
// lanes; the forward pass has M = Aᵀ, the gradient A. Every sum runs over j in order, one product at a time: a row has the same bits
// whichever rows are computed beside it.
// Suffixes: b batch, t time step, n state.
#pragma once
#include "pool.h"
#include "tile.h"

namespace {

constexpr int SLOTS = 8;   // sequences that a task advances together
constexpr int ROWS = 4;    // rows in one product
constexpr int TILE = 16;   // steps whose activations the gradient recomputes at once
constexpr int NV = SL_BYTES == 64 ? 4 : 2;  // vectors of a row in one product: all sums stay in registers
constexpr int BLOCK = 4;   // vectors of a diagonal system in one task

enum Activation : int64_t { IDENTITY = 0, RELU = 1, TANH = 2, SIGMOID = 3 };

// Laid out as Python packs it: every field is eight bytes. Pointers that do not apply are null.
struct Args {
    int64_t b, t, n;
    const int64_t* table;
    int64_t count, reverse, threads, is_double, dense, activation;
    Rows v, g;            // of one dtype
    const void *A, *At;   // (n), null; dense: A and its transpose, (n, pitch), zero beyond n
    int64_t pitch;
    const void* initial;  // (count, n)
    void *h, *state;      // (b, t, n), (count, n)
    // gradients
    const void *dh, *dstate;            // (b, t, n), (count, n)
    void *dv, *dg, *dA, *dinitial;      // (b, t, n) twice; (count, n), diagonal only; (count, n)

    Segments segments() const { return {table, count, b, t, reverse}; }
    int64_t vectors(int width) const { return (n + width - 1) / width; }
    // Sequences are dealt out in runs: enough for every thread, and for a full product where there are many.
    int64_t tasks() const {
        const int64_t full = (count + ROWS - 1) / ROWS;
        return count <= threads ? count : full > threads ? full : threads;
    }
    double cost_us() const { return double(b) * double(t) * double(n) * (dense ? 2e-3 + 3e-5 * double(n) : 1e-3); }
    template <class R>
    R* row(const void* base, const Segment& s, int64_t step) const {
        return (R*)base + (s.row * t + span(s, reverse, step).token) * n;
    }
};

// tanh, accurate to about two units in the last place also where it is small: there by its continued fraction.
template <class R, class V>
SL_INLINE V tanh_of(V x) {
    const V one = splat(R(1)), a = absolute(x), e = exp(a * splat(R(-2)));
    const V large = (one - e) / (one + e), q = x * x;
    const V above = fma(fma(fma(q, one, splat(R(378))), q, splat(R(17325))), q, splat(R(135135)));
    const V below = fma(fma(fma(q, splat(R(28)), splat(R(3150))), q, splat(R(62370))), q, splat(R(135135)));
    const V small = x * above / below;
    return a < splat(R(0.5)) ? small : (x < V{} ? -large : large);
}

template <class R, class V>
SL_INLINE V activate(V x, int64_t f) {
    switch (f) {
        case RELU: return x > V{} ? x : (x != x ? x : V{});
        case TANH: return tanh_of<R>(x);
        case SIGMOID: return sigmoid<R>(x);
        default: return x;
    }
}
// f'(x) from y = f(x).
template <class R, class V>
SL_INLINE V slope(V y, int64_t f) {
    const V one = splat(R(1));
    switch (f) {
        case RELU: return y > V{} ? one : V{};
        case TANH: return fma(-y, y, one);
        case SIGMOID: return y * (one - y);
        default: return one;
    }
}

// out[q] += M x[q] for Q rows; K vectors from v0 on.
template <class R, int K, int Q>
SL_INLINE void product_block(const R* M, int64_t pitch, int64_t n, const R* const* x, R* const* out, int64_t v0) {
    constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;
    V sum[Q][K];
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) sum[q][k] = load(out[q] + (v0 + k) * W);
    const R* m = M + v0 * W;
    for (int64_t j = 0; j < n; j++, m += pitch) {
        V column[K];
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) column[k] = load(m + k * W);
#pragma GCC unroll 8
        for (int q = 0; q < Q; q++) {
            const V factor = splat(x[q][j]);
#pragma GCC unroll 8
            for (int k = 0; k < K; k++) sum[q][k] = fma(column[k], factor, sum[q][k]);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) store(out[q] + (v0 + k) * W, sum[q][k]);
}

template <class R, int Q>
void product_rows(const R* M, int64_t pitch, int64_t n, const R* const* x, R* const* out) {
    const int64_t vectors = (n + Simd<R>::W - 1) / Simd<R>::W;
    int64_t v = 0;
    for (; v + NV <= vectors; v += NV) product_block<R, NV, Q>(M, pitch, n, x, out, v);
    for (; v < vectors; v++) product_block<R, 1, Q>(M, pitch, n, x, out, v);
}

// Any number of rows.
template <class R>
void product(const R* M, int64_t pitch, int64_t n, const R* const* x, R* const* out, int rows) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS, out += ROWS) product_rows<R, ROWS>(M, pitch, n, x, out);
    if (rows == 3) product_rows<R, 3>(M, pitch, n, x, out);
    if (rows == 2) product_rows<R, 2>(M, pitch, n, x, out);
    if (rows == 1) product_rows<R, 1>(M, pitch, n, x, out);
}

template <class R>
void read_row(R* to, const Args& a, const Rows& from, const Segment& s, int64_t step) {
    read_numbers(to, a.n, from.dtype, from.at(s.row, span(s, a.reverse, step).token, 0));
}

struct Job {
    const Args& a;
    int failed;
};

// The sequences of a task, of which up to SLOTS are under way. S needs `begin(sequence)`, which says whether there are steps.
template <class S>
struct Queue {
    S slots[SLOTS];
    int used = 0;
    int64_t next, end;

    Queue(const Args& a, int64_t task) {
        const int64_t tasks = a.tasks();
        next = task * a.count / tasks, end = (task + 1) * a.count / tasks;
    }
    void fill() {
        while (used < SLOTS && next < end)
            if (slots[used].begin(next++)) used++;
    }
    // The place of a finished sequence goes to the last one; memory stays with the place.
    void drop(int i) {
        if (i != --used) slots[i].swap(slots[used]);
    }
};

}  // namespace

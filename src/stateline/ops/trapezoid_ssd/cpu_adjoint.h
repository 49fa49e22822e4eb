// The part of trapezoid_ssd's gradient that touches the state: the state up a tile, its adjoint back down.
//
// Written for the state before a step with both ends of the last token's trapezoid in it,
//     P[t+1] = decay[t] P[t] + weight[t] Σ_r v_r[t]⊗k_r[t]      weight[t] = newer[t] + older[t+1], newer[t] at the end,
// which is the definition's state at the end, and of which y[t] reads decay[t] P[t] q[t] besides the token's own
// newer[t] (q[t]·k[t]) v[t]: no more work on the state than ssd has.
#pragma once
#include "cpu_trapezoid.h"

namespace {

template <class R>
struct Adjoint : Head<R> {
    typedef Head<R> Base;
    using typename Base::V;
    using Base::a, Base::n, Base::ranks, Base::tile, Base::tiles, Base::vectors, Base::W, Base::x;
    // Lanes [v][n][W]: gradient of the state after the step. Tiles [r][v][PITCH][W]: v, weight·v, dy, what reaches v, and y
    // where it is gated.
    R *G, *values, *drive, *dy, *dvalues, *y;
    // Per step [T][W]: d loss / d log decay. One block: the states [T][NT][NV][W]; sums for k and q [T][2r][NT][W], and the
    // numbers they come to. Gradients of k and q, [T][r][n].
    R *dlog, *past, *sums, *flat, *dK, *dQ;

    static size_t scratch_bytes(const Args& a) {
        const size_t width = (a.p + W - 1) / W * W;
        return Base::scratch_bytes(a) + sizeof(R) * (width * (a.n + 5 * PITCH * a.r) + T * W + T * WIDE * NV * W +
                                                     T * 2 * a.r * WIDE * (W + 1) + W + 2 * (T * a.r * a.n + W)) + 64 * 13;
    }
    Adjoint(const Args& args, Arena& arena) : Base(args, arena) {
        G = arena.take<R>(size_t(vectors) * W * n);
        R** const all[] = {&values, &drive, &dy, &dvalues, &y};
        for (R** p : all) *p = arena.take<R>(tiles * ranks);
        dlog = arena.take<R>(T * W);
        past = arena.take<R>(T * WIDE * NV * W);
        sums = arena.take<R>(T * 2 * ranks * WIDE * W);
        flat = arena.take<R>(T * 2 * ranks * WIDE + W);
        dK = arena.take<R>(T * ranks * n + W);
        dQ = arena.take<R>(T * ranks * n + W);
    }

    // Loads a tile and makes v and weight·v of it.
    void load(const Segment& segment, int64_t index, int count) {
        const Span at = span(segment, a.reverse, index * T);
        this->load_all(segment.row, at, count, index * T + count < segment.stop - segment.start);
        for (int64_t k = 0; k < ranks; k++)
            for (int v = 0; v < vectors; v++)
                for (int r = 0; r < count; r++) {
                    const int64_t i = v * tile + r * W;
                    const V value = this->mixed(k, v) * ::load(x + i);
                    store(values + k * tiles + i, value);
                    store(drive + k * tiles + i, splat(this->newer[r] + this->older[r + 1]) * value);
                }
    }

    // P over a block of channels and states; with PAST, past[(r·NT + s)·NV + v] is the state before step r; with OUT, y
    // accumulates P q, of which decay is still missing.
    template <int NV, int NT, bool PAST, bool OUT>
    __attribute__((noinline)) void advance(int v0, int64_t s0, int count) const {
        V S_[NT][NV];
        R* const state = this->S + (v0 * n + s0) * W;
#pragma GCC unroll 8
        for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) S_[s][v] = ::load(state + (v * n + s) * W);
        for (int r = 0; r < count; r++) {
            const V shrink = splat(this->decay[r]);
            const R *b = this->K + (r + 1) * ranks * n + s0, *c = this->Q + r * ranks * n + s0;
            for (int64_t k = 0; OUT && k < ranks; k++, c += n) {
                R* const out = y + k * tiles + v0 * tile + r * W;
                V out_[NV];
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) out_[v] = s0 ? ::load(out + v * tile) : V{};
#pragma GCC unroll 8
                for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
                    for (int v = 0; v < NV; v++) out_[v] = fma(S_[s][v], splat(c[s]), out_[v]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) store(out + v * tile, out_[v]);
            }
#pragma GCC unroll 8
            for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) {
                    if (PAST) store(past + ((r * NT + s) * NV + v) * W, S_[s][v]);
                    S_[s][v] = S_[s][v] * shrink;
                }
            for (int64_t k = 0; k < ranks; k++, b += n) {
                V in[NV];
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) in[v] = ::load(drive + k * tiles + (v0 + v) * tile + r * W);
#pragma GCC unroll 8
                for (int s = 0; s < NT; s++) {
                    const V bs = splat(b[s]);
#pragma GCC unroll 8
                    for (int v = 0; v < NV; v++) S_[s][v] = fma(in[v], bs, S_[s][v]);
                }
            }
        }
        if (PAST) return;
#pragma GCC unroll 8
        for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) store(state + (v * n + s) * W, S_[s][v]);
    }

    void run(int count) {
        __builtin_memset(dlog, 0, sizeof(R) * T * W);
        R* const empty[] = {dvalues, y};
        for (R* p : empty)
            if (!n) __builtin_memset(p, 0, sizeof(R) * tiles * ranks);
        int64_t s = 0;
        for (; s + WIDE <= n; s += WIDE) run_of_states<WIDE>(s, count);
        for (; s < n; s++) run_of_states<1>(s, count);
    }
    template <int NT>
    void run_of_states(int64_t s, int count) {
        const int64_t rows = 2 * ranks * NT, total = count * rows;
        __builtin_memset(sums, 0, sizeof(R) * total * W);
        for_blocks<NT>(vectors, NT, [&]<int NV, int N>(int v, int64_t) {
            if (a.z.data)
                advance<NV, NT, true, true>(v, s, count);
            else
                advance<NV, NT, true, false>(v, s, count);
            adjoint<NV, NT>(v, s, count);
        });
        if constexpr (sizeof(R) == 4) {
            for (int64_t i = 0; i < total; i += W) {
                V lanes[W];
                for (int j = 0; j < W; j++) lanes[j] = i + j < total ? ::load(sums + (i + j) * W) : V{};
                store(flat + i, sums_of_lanes(lanes));
            }
        } else {
            for (int64_t i = 0; i < total; i++) flat[i] = sum_lanes<R>(::load(sums + i * W));
        }
        for (int r = 0; r < count; r++)
            for (int64_t k = 0; k < ranks; k++)
                for (int i = 0; i < NT; i++) {
                    dK[(r * ranks + k) * n + s + i] = flat[r * rows + 2 * k * NT + i];
                    dQ[(r * ranks + k) * n + s + i] = flat[r * rows + (2 * k + 1) * NT + i];
                }
    }
    // From the last step to the first, over NV vectors of channels and NT states. Leaves in dvalues what the state sends to v
    // before weight, in the sums G v weighted, and P dy before decay.
    template <int NV, int NT>
    __attribute__((noinline)) void adjoint(int v0, int64_t s0, int count) {
        V g[NT][NV];
        R* const reach = G + (v0 * n + s0) * W;
#pragma GCC unroll 8
        for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) g[s][v] = ::load(reach + (v * n + s) * W);
        for (int r = count - 1; r >= 0; r--) {
            const R *b = this->K + (r + 1) * ranks * n + s0, *c = this->Q + r * ranks * n + s0;
            const R* const before = past + r * NT * NV * W;
            R* sum = sums + r * 2 * ranks * NT * W;
            for (int64_t k = 0; k < ranks; k++, b += n, sum += 2 * NT * W) {
                const int64_t i = k * tiles + v0 * tile + r * W;
                V in[NV], to[NV];
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) in[v] = ::load(drive + i + v * tile), to[v] = s0 ? ::load(dvalues + i + v * tile) : V{};
#pragma GCC unroll 8
                for (int s = 0; s < NT; s++) {
                    const V bs = splat(b[s]);
                    V db = ::load(sum + s * W);
#pragma GCC unroll 8
                    for (int v = 0; v < NV; v++) {
                        db = fma(g[s][v], in[v], db);
                        to[v] = fma(g[s][v], bs, to[v]);
                    }
                    store(sum + s * W, db);
                }
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) store(dvalues + i + v * tile, to[v]);
            }
            sum = sums + r * 2 * ranks * NT * W + NT * W;
            for (int64_t k = 0; k < ranks; k++, c += n, sum += 2 * NT * W) {
                V out[NV];
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) out[v] = ::load(dy + k * tiles + (v0 + v) * tile + r * W);
#pragma GCC unroll 8
                for (int s = 0; s < NT; s++) {
                    const V cs = splat(c[s]);
                    V dc = ::load(sum + s * W);
#pragma GCC unroll 8
                    for (int v = 0; v < NV; v++) {
                        dc = fma(out[v], ::load(before + (s * NV + v) * W), dc);
                        g[s][v] = fma(out[v], cs, g[s][v]);
                    }
                    store(sum + s * W, dc);
                }
            }
            const V shrink = splat(this->decay[r]);
            V pull[NV] = {};  // a sum each, since one would wait for itself
#pragma GCC unroll 8
            for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) {
                    g[s][v] = g[s][v] * shrink;
                    pull[v] = fma(g[s][v], ::load(before + (s * NV + v) * W), pull[v]);
                }
            V total = ::load(dlog + r * W);
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) total = total + pull[v];
            store(dlog + r * W, total);
        }
#pragma GCC unroll 8
        for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) store(reach + (v * n + s) * W, g[s][v]);
    }
};

}  // namespace

// What the forward scan, its gradient and the decode step share: arguments, blocks of channels, tiles of steps.
//
// Work is cut into blocks of channels of one group, and segments into tiles of T steps. Within a tile everything that
// does not touch the state (dtype conversion, softplus, gate) is done first, for whole rows; the recurrence then runs one vector of
// channels at a time over a few states that fit the registers. All arithmetic of a token is the same wherever it falls in a tile.
// Suffixes: b batch, t time step, d channel, n state, g group.
#pragma once
#include "pool.h"
#include "tile.h"

namespace {

constexpr int T = 32;  // steps in a tile: a tile of every array stays in the second-level cache
constexpr int PITCH = pitch_of(T);

// B or C: per token (b, t, g, n) or, complex, (b, t, g, n, 2), the last dimensions adjacent; constant (d, n), contiguous.
struct Projection {
    char* data;
    int64_t dtype, batch, time, group;
};
struct Output {
    char* data;
    int64_t dtype;
};

// Laid out as Python packs it: every field is eight bytes. Pointers that do not apply are null.
struct Args {
    int64_t b, t, d, g, n;
    const int64_t* table;
    int64_t count, reverse, threads;
    int64_t is_double, is_complex, softplus, constant_b, constant_c;
    Rows u, dt, z;
    Projection B, C;
    const void *A, *D, *bias;
    char* initial;  // (count, d, n); the step: the slots, changed in place
    Output y;       // (b, t, d)
    char* state;    // (count, d, n)
    // step
    const int64_t* index;
    int64_t slots, slot_stride;
    // gradients
    Rows dy;
    const char* dstate;
    Output du, ddt, dz, dB, dC;
    void *dA, *dD, *dbias, *dinitial;

    Rows rows(Output o) const { return {o.data, o.dtype, t * d, d}; }
    Segments segments() const { return {table, count, b, t, reverse}; }
    double cost_us() const {  // at about half a nanosecond an update
        return 5e-4 * double(b) * double(t) * double(d) * double(n) * (is_double ? 2 : 1) * (is_complex ? 5 : 1);
    }
};

// Channels [first, first + count) of one group.
struct Block {
    int64_t group, first;
    int count, width;  // width: what a full block has
};
inline int64_t group_start(const Args& a, int64_t group) { return (group * a.d + a.g - 1) / a.g; }
inline int64_t blocks_in_group(const Args& a, int64_t group, int width) {
    return (group_start(a, group + 1) - group_start(a, group) + width - 1) / width;
}
inline int64_t block_count(const Args& a, int width) {
    int64_t total = 0;
    for (int64_t k = 0; k < a.g; k++) total += blocks_in_group(a, k, width);
    return total;
}
inline Block block_at(const Args& a, int64_t index, int width) {
    int64_t group = 0;
    while (index >= blocks_in_group(a, group, width)) index -= blocks_in_group(a, group++, width);
    const int64_t first = group_start(a, group) + index * width, end = group_start(a, group + 1);
    return {group, first, int(end - first < width ? end - first : width), width};
}

// Calls f.operator()<NT>(s) for runs of NT states starting at s that cover all n. Wide runs save passes over the tile and need
// registers: 16 on 32 registers of AVX-512, 4 on the 16 of AVX2 and SSE.
constexpr int WIDEST = SL_BYTES == 64 ? 16 : 4;
template <int WIDE, class F>
SL_INLINE void for_states(int64_t n, F&& f) {
    int64_t s = 0;
    for (; s + WIDE <= n; s += WIDE) f.template operator()<WIDE>(s);
    if constexpr (WIDE > 4)
        for (; s + 4 <= n; s += 4) f.template operator()<4>(s);
    for (; s < n; s++) f.template operator()<1>(s);
}

template <class R, bool CX>
struct Scan {
    static constexpr int W = Simd<R>::W;
    static constexpr int PARTS = CX ? 2 : 1;
    typedef typename Simd<R>::V V;
    static constexpr R LOG2E = R(1.4426950408889634074), LN2 = R(0.69314718055994530942);

    const Args& a;
    Block block;
    int vectors;
    int64_t n;
    // Parameters of the block in lanes, [v][n][W] or [v][W]. A2 is A in units of powers of two.
    R *A2, *A2_im, *D, *bias, *Bk[2], *Ck[2];
    double* turns;  // Im A in turns
    // State of the block [v][n][W], and a tile of each input [v][PITCH][W].
    R *h[2], *dt, *du, *u, *y, *slope, *gate;
    // A tile of B and C per token, [T][n]; C of a complex system already doubled (y = 2 Re).
    R *Bt[2], *Ct[2];

    static size_t scratch_bytes(const Args& a, int width) {
        const size_t block = size_t(a.n) * width;
        return sizeof(R) * (10 * block + 6 * PITCH * width + 4 * T * (a.n + W) + 2 * width) + 8 * block + 64 * 32;
    }

    Scan(const Args& args, const Block& blk, Arena& arena) : a(args), block(blk), vectors((blk.count + W - 1) / W), n(args.n) {
        const size_t size = size_t(n) * blk.width;
        A2 = arena.take<R>(size);
        A2_im = arena.take<R>(CX ? size : 0);
        turns = arena.take<double>(CX ? size : 0);
        D = arena.take<R>(blk.width);
        bias = arena.take<R>(blk.width);
        for (int p = 0; p < PARTS; p++) {
            Bk[p] = arena.take<R>(a.constant_b ? size : 0);
            Ck[p] = arena.take<R>(a.constant_c ? size : 0);
            h[p] = arena.take<R>(size);
            Bt[p] = arena.take<R>(a.constant_b ? 0 : T * n + W);
            Ct[p] = arena.take<R>(a.constant_c ? 0 : T * n + W);
        }
        R** const tiles[] = {&dt, &du, &u, &y, &slope, &gate};
        for (R** tile : tiles) *tile = arena.take<R>(PITCH * blk.width);
        load_parameters();
    }

    void load_parameters() {
        const R* source = (const R*)a.A + block.first * n * PARTS;
        load_lanes(A2, source, block.count, n, PARTS);
        if constexpr (CX) {
            load_lanes(A2_im, source + 1, block.count, n, PARTS);
            load_lanes(turns, source + 1, block.count, n, PARTS);
        }
        for (int64_t i = 0; i < vectors * n * W; i += W) {
            store(A2 + i, load(A2 + i) * splat(LOG2E));
            if constexpr (CX) {
                store(A2_im + i, load(A2_im + i) * splat(LOG2E));
                for (int k = 0; k < W; k++) turns[i + k] *= 0.15915494309189533577;
            }
        }
        for (int p = 0; p < PARTS; p++) {
            if (a.constant_b) load_lanes(Bk[p], (const R*)a.B.data + block.first * n * PARTS + p, block.count, n, PARTS);
            if (a.constant_c) load_lanes(Ck[p], (const R*)a.C.data + block.first * n * PARTS + p, block.count, n, PARTS);
        }
        if (CX && a.constant_c)
            for (int p = 0; p < PARTS; p++)
                for (int64_t i = 0; i < vectors * n * W; i += W) store(Ck[p] + i, load(Ck[p] + i) + load(Ck[p] + i));
        if (a.D) load_lanes(D, (const R*)a.D + block.first, block.count, 1);
        if (a.bias) load_lanes(bias, (const R*)a.bias + block.first, block.count, 1);
    }

    // State from and to (channels, n) in memory at p; zeros where there is none.
    void load_state(R* const* to, const char* p) const {
        for (int part = 0; part < PARTS; part++) {
            if (p)
                load_lanes(to[part], (const R*)p + part, block.count, n, PARTS);
            else
                __builtin_memset(to[part], 0, sizeof(R) * vectors * n * W);
        }
    }
    // exp2 may lose a NaN of A: where there is one, the first step makes the state NaN.
    void spoil_state() const {
        for (int64_t i = 0; i < vectors * n * W; i += W) {
            V wrong = load(A2 + i);
            if (CX) wrong += load(A2_im + i);
            store(h[0] + i, wrong == wrong ? load(h[0] + i) : wrong);
        }
    }
    void store_state(R* const* from, char* p) const {
        for (int part = 0; part < PARTS; part++) store_lanes(from[part], (R*)p + part, block.count, n, PARTS);
    }
    int64_t state_bytes() const { return int64_t(sizeof(R)) * PARTS * a.d * n; }
    int64_t state_offset(int64_t row) const { return row * state_bytes() + int64_t(sizeof(R)) * PARTS * block.first * n; }

    void load_rows_of(R* tile, const Rows& x, int64_t row, Span at, int count) const {
        load_tile(tile, PITCH, 0, count, block.count, x.dtype, x.at(row, at.token, block.first), at.direction * x.time);
    }
    void store_rows_of(const R* tile, const Rows& x, int64_t row, Span at, int count) const {
        store_tile(tile, PITCH, 0, count, block.count, x.dtype, x.at(row, at.token, block.first), at.direction * x.time);
    }

    template <class S>
    V load_vector(int v, const S* p) const {
        const int lanes = block.count - v * W;
        return lanes >= W ? load_from<R>(p + v * W) : load_some<R>(p + v * W, lanes);
    }

    // dt after bias and softplus (and its slope, if wanted), u and dt·u of `count` steps, in one pass over rows.
    template <bool SLOPE, class S>
    void prepare_rows(int64_t row, Span at, int count) const {
        const S *p = (const S*)a.dt.at(row, at.token, block.first), *q = (const S*)a.u.at(row, at.token, block.first);
        const bool keep_u = SLOPE || a.D;
        for (int r = 0; r < count; r++, p += at.direction * a.dt.time, q += at.direction * a.u.time)
            for (int v = 0; v < vectors; v++) {
                const int i = (v * PITCH + r) * W;
                V x = load_vector(v, p);
                const V in = load_vector(v, q);
                if (a.bias) x += load(bias + v * W);
                V size = x, steep = splat(R(1));
                if (a.softplus) ::softplus<R>(x, size, steep);
                store(dt + i, size);
                store(du + i, size * in);
                if (keep_u) store(u + i, in);
                if (SLOPE) store(slope + i, steep);
            }
    }
    template <bool SLOPE>
    void prepare(int64_t row, Span at, int count) const {
        if (a.dt.dtype == a.u.dtype)
            return with_dtype(a.u.dtype, [&](auto* type) { prepare_rows<SLOPE, Pointee<decltype(type)>>(row, at, count); });
        // Mixed dtypes are rare: convert both to R first, then do the same on the copies.
        load_rows_of(dt, a.dt, row, at, count);
        load_rows_of(u, a.u, row, at, count);
        for (int v = 0; v < vectors; v++)
            for (int i = v * PITCH * W; i < (v * PITCH + count) * W; i += W) {
                V x = load(dt + i), steep = splat(R(1));
                if (a.bias) x += load(bias + v * W);
                V size = x;
                if (a.softplus) ::softplus<R>(x, size, steep);
                store(dt + i, size);
                store(du + i, size * load(u + i));
                if (SLOPE) store(slope + i, steep);
            }
    }

    void load_projection(R* const* to, const Projection& x, int64_t row, Span at, int count, bool twice) const {
        const int64_t size = dtype_size(x.dtype);
        for (int r = 0; r < count; r++) {
            const char* p = x.data + size * (row * x.batch + (at.token + at.direction * r) * x.time + block.group * x.group);
            if constexpr (CX) {
                with_dtype(x.dtype, [&](auto* type) {
                    const auto* pair = (decltype(type))p;
                    for (int64_t s = 0; s < n; s++)
                        for (int part = 0; part < 2; part++) {
                            R value;
                            if constexpr (sizeof(*pair) == 2)
                                value = bits<float>(uint32_t(pair[2 * s + part].bits) << 16);
                            else
                                value = R(pair[2 * s + part]);
                            to[part][r * n + s] = twice ? value + value : value;
                        }
                });
            } else {
                read_numbers(to[0] + r * n, n, x.dtype, p);
            }
        }
    }
    void load_projections(int64_t row, Span at, int count, bool with_c) const {
        if (!a.constant_b) load_projection(Bt, a.B, row, at, count, false);
        if (!a.constant_c && with_c) load_projection(Ct, a.C, row, at, count, true);
    }

    // Pointers of one vector of channels and a run of states, for the loops over a tile.
    struct Lanes {
        const R *dt, *du, *A2, *A2_im, *B[2], *C[2];
        const double* turns;
        R *h[2], *y;
        int64_t n;
    };
    Lanes lanes(int v, int64_t s) const {
        Lanes l = {};
        const int64_t tile = int64_t(v) * PITCH * W, at = (v * n + s) * W;
        l.dt = dt + tile, l.du = du + tile, l.y = y + tile;
        l.A2 = A2 + at, l.A2_im = A2_im + at, l.turns = turns + at, l.n = n;
        for (int p = 0; p < PARTS; p++) {
            l.h[p] = h[p] + at;
            l.B[p] = a.constant_b ? Bk[p] + at : Bt[p] + s;
            l.C[p] = a.constant_c ? Ck[p] + at : Ct[p] + s;
        }
        return l;
    }

    // B or C of state s at step r: a vector of channels if constant, else one number for all channels.
    template <bool CONSTANT>
    SL_INLINE V factor(const R* p, int64_t r, int64_t n, int s) {
        if constexpr (CONSTANT)
            return load(p + s * W);
        else
            return splat(p[r * n + s]);
    }

    SL_INLINE void decay(V step, const Lanes& l, int s, V& re, V& im) {
        re = exp2(step * load(l.A2 + s * W));
        if constexpr (CX) {
            V c, d;
            unit_circle<R>(fraction(step, l.turns + s * W), c, d);
            im = re * d;
            re = re * c;
        }
    }

    // h ← exp(dt A) h + dt u B over `count` steps for NT states; with OUT, y accumulates C·h.
    template <int NT, bool KB, bool KC, bool OUT>
    static __attribute__((noinline)) void advance(const Lanes& lanes, int count, bool first) {
        const Lanes l = lanes;
        V hr[NT], hi[NT];
#pragma GCC unroll 16
        for (int s = 0; s < NT; s++) {
            hr[s] = load(l.h[0] + s * W);
            if (CX) hi[s] = load(l.h[1] + s * W);
        }
        for (int r = 0; r < count; r++) {
            const V step = load(l.dt + r * W), drive = load(l.du + r * W);
            V out = !OUT || first ? V{} : load(l.y + r * W);
#pragma GCC unroll 16
            for (int s = 0; s < NT; s++) {
                V ar, ai;
                decay(step, l, s, ar, ai);
                const V br = drive * factor<KB>(l.B[0], r, l.n, s);
                if constexpr (CX) {
                    const V bi = drive * factor<KB>(l.B[1], r, l.n, s);
                    const V re = fma(ar, hr[s], fnma(ai, hi[s], br));
                    hi[s] = fma(ar, hi[s], fma(ai, hr[s], bi));
                    hr[s] = re;
                    if (OUT) out = fnma(hi[s], factor<KC>(l.C[1], r, l.n, s), out);
                } else {
                    hr[s] = fma(ar, hr[s], br);
                }
                if (OUT) out = fma(hr[s], factor<KC>(l.C[0], r, l.n, s), out);
            }
            if (OUT) store(l.y + r * W, out);
        }
#pragma GCC unroll 16
        for (int s = 0; s < NT; s++) {
            store(l.h[0] + s * W, hr[s]);
            if (CX) store(l.h[1] + s * W, hi[s]);
        }
    }

    // Asks for rows of the next tile while this one computes: rows lie whole pages apart, where hardware does not look ahead.
    struct Ahead {
        const Rows* arrays[4];
        int64_t row;
        Span at;
        int count;
    };
    void prefetch(const Ahead& next, int v) const {
        for (const Rows* x : next.arrays) {
            if (!x || !x->data) continue;
            const int64_t bytes = block.count * dtype_size(x->dtype);
            for (int r = v * next.count / vectors; r < (v + 1) * next.count / vectors; r++) {
                const char* p = x->at(next.row, next.at.token + next.at.direction * r, block.first);
                for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
            }
        }
    }

    template <bool OUT>
    void advance_all(int count, const Ahead& next) const {
        for (int v = 0; v < vectors; v++) {
            prefetch(next, v);
            for_states<CX ? 4 : WIDEST>(n, [&]<int NT>(int64_t s) {
                const Lanes l = lanes(v, s);
                if (a.constant_b)
                    a.constant_c ? advance<NT, true, true, OUT>(l, count, s == 0) : advance<NT, true, false, OUT>(l, count, s == 0);
                else
                    a.constant_c ? advance<NT, false, true, OUT>(l, count, s == 0) : advance<NT, false, false, OUT>(l, count, s == 0);
            });
        }
    }

    // (y + D u) · silu(z), straight to memory.
    template <class S>
    void finish_rows(int64_t row, Span at, int count) const {
        const Rows to = a.rows(a.y);
        S* p = (S*)to.at(row, at.token, block.first);
        const S* q = a.z.data ? (const S*)a.z.at(row, at.token, block.first) : nullptr;
        for (int r = 0; r < count; r++, p += at.direction * to.time)
            for (int v = 0; v < vectors; v++) {
                const int i = (v * PITCH + r) * W;
                V out = n ? load(y + i) : V{};
                if (a.D) out = fma(load(D + v * W), load(u + i), out);
                if (q) out = out * silu<R>(load_vector(v, q + r * at.direction * a.z.time));
                const int lanes = block.count - v * W;
                lanes >= W ? store_to<R>(p + v * W, out) : store_some<R>(p + v * W, out, lanes);
            }
    }
    void finish(int64_t row, Span at, int count) const {
        if (!a.z.data || a.z.dtype == a.y.dtype)
            return with_dtype(a.y.dtype, [&](auto* type) { finish_rows<Pointee<decltype(type)>>(row, at, count); });
        load_rows_of(gate, a.z, row, at, count);
        for (int v = 0; v < vectors; v++)
            for (int i = v * PITCH * W; i < (v * PITCH + count) * W; i += W) {
                V out = n ? load(y + i) : V{};
                if (a.D) out = fma(load(D + v * W), load(u + i), out);
                store(y + i, out * silu<R>(load(gate + i)));
            }
        store_rows_of(y, a.rows(a.y), row, at, count);
    }
};

}  // namespace

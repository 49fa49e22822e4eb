// What trapezoid_ssd's forward pass, its gradient and the decode step share: arguments, one head's parameters, tiles of steps.
//
// As in ssd, a head's state is p channels wide, in lanes, and n deep, and segments are cut into tiles of T steps. Within a tile
// everything that does not touch the state is done first, angles, biases and turning included, so that no turned B or C of a head
// ever reaches memory; the recurrence then runs over a few vectors of channels and a few states, which stay in registers.
// Suffixes: b batch, t time step, h head, r rank, p head width, n state, g group, s pairs that turn.
#pragma once
#include "pool.h"
#include "tile.h"

namespace {

constexpr int T = 32;  // steps in a tile
constexpr int PITCH = pitch_of(T);

// Vectors of channels that go through the recurrence together: what the registers hold.
constexpr int NV = SL_BYTES == 64 ? 4 : 2;
constexpr int WIDE = 4;  // states that do

// (b, t, h, p), the last dimension adjacent. Strides in elements.
struct Heads {
    char* data;
    int64_t dtype, batch, time, head;
    char* at(int64_t b, int64_t t, int64_t h) const { return data + dtype_size(dtype) * (b * batch + t * time + h * head); }
};
// (b, t, r, g, n)
struct Ranked {
    char* data;
    int64_t dtype, batch, time, rank, group;
    char* at(int64_t b, int64_t t, int64_t r, int64_t g) const {
        return data + dtype_size(dtype) * (b * batch + t * time + r * rank + g * group);
    }
};
struct Output {
    char* data;
    int64_t dtype;
};
// (count, h, s), (count, h, p, n), (count, h, r, n), (count, h, p)
struct State {
    char *angle, *ssm, *k, *v;
};

// Laid out as Python packs it: every field is eight bytes. Pointers that do not apply are null.
struct Args {
    int64_t b, t, h, p, g, n, r, s;
    const int64_t* table;
    int64_t count, reverse, threads;
    int64_t is_double, interleaved;
    Heads x;
    const void *dt, *A, *blend;  // (b, t, h)
    Ranked B, C;
    const void* rates;                      // (b, t, s)
    const void *B_bias, *C_bias, *mix, *D;  // (h, r, n), (h, r, n), (h, r, p), (h)
    Heads z;
    const void *z_mix, *y_mix;  // (h, r, p)
    State initial;              // the step: the slots, changed in place
    Output y;                   // (b, t, h, outputs, p)
    State end;
    // step
    const int64_t* index;
    int64_t slots;
    // gradients
    Heads dy;  // (b, t, h·outputs, p)
    State dend, dinitial;
    Output dx, dz;
    void *ddt, *dA, *dblend;              // (b, t, h)
    int64_t parts;                        // of a group's heads
    void *dB, *dC, *drates;               // (parts, b, t, r, g, n) twice, (g·parts, b, t, s)
    void *dB_bias, *dC_bias;              // (count, h, r, n)
    void *dmix, *dz_mix, *dy_mix, *dD;    // (count, h, r, p) three times, (count, h)

    int64_t outputs() const { return z.data ? 1 : r; }  // a gate sums over ranks
    Segments segments() const { return {table, count, b, t, reverse}; }
    int64_t group_of(int64_t head) const { return head * g / h; }
    int64_t group_start(int64_t group) const { return (group * h + g - 1) / g; }
    double cost_us(double of_element) const {
        return of_element * 1e-5 * double(b) * double(t) * double(h) * double(p) * double(n) * double(r);
    }
};

template <class R>
struct Head {
    static constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;

    const Args& a;
    int64_t head, n, ranks, pairs, padded;  // padded: pairs rounded up to whole vectors
    int vectors, channels;
    int64_t tile, tiles;  // numbers in a tile, and in the tiles of all ranks
    // State [v][n][W]; tiles x and z [v][PITCH][W] and the x before them [v][W]; mixes [r][v][W]; angle and the circle's
    // points [T][padded]; k (the token before the tile first) and q, [T + 1][r][n]; biases (r, n).
    R *S, *x, *z, *before, *mix, *z_mix, *y_mix, *angle, *cosine, *sine, *K, *Q;
    const R *B_bias, *C_bias;
    R D;
    R step[T], decay[T], newer[T], older[T + 1];

    static size_t scratch_bytes(const Args& a) {
        const size_t width = (a.p + W - 1) / W * W, padded = (a.s + W - 1) / W * W;
        return sizeof(R) * (width * (a.n + 2 * PITCH + 1 + 3 * a.r) + padded * (2 * T + 1) + 2 * ((T + 1) * a.r * a.n + W)) + 64 * 13;
    }
    Head(const Args& args, Arena& arena)
        : a(args), head(0), n(args.n), ranks(args.r), pairs(args.s), padded((args.s + W - 1) / W * W), vectors(int((args.p + W - 1) / W)),
          channels(int(args.p)), tile(int64_t(PITCH) * W), tiles(tile * vectors), B_bias(nullptr), C_bias(nullptr), D(0) {
        const size_t width = size_t(vectors) * W;
        S = arena.take<R>(width * n);
        x = arena.take<R>(PITCH * width);
        z = arena.take<R>(PITCH * width);
        before = arena.take<R>(width);
        R** const mixes[] = {&mix, &z_mix, &y_mix};
        for (R** p : mixes) *p = arena.take<R>(width * ranks);
        angle = arena.take<R>(padded);
        cosine = arena.take<R>(T * padded);
        sine = arena.take<R>(T * padded);
        K = arena.take<R>((T + 1) * ranks * n + W);
        Q = arena.take<R>((T + 1) * ranks * n + W);
    }
    void select(int64_t index) {
        head = index;
        B_bias = a.B_bias ? (const R*)a.B_bias + head * ranks * n : nullptr;
        C_bias = a.C_bias ? (const R*)a.C_bias + head * ranks * n : nullptr;
        D = a.D ? ((const R*)a.D)[head] : R(0);
        select_mix(mix, (const R*)a.mix);
        select_mix(z_mix, (const R*)a.z_mix);
        select_mix(y_mix, (const R*)a.y_mix);
    }
    void select_mix(R* to, const R* from) const {
        const int64_t width = int64_t(vectors) * W;
        for (int64_t k = 0; k < ranks; k++)
            for (int64_t c = 0; c < width; c++)
                to[k * width + c] = c >= channels ? R(0) : from ? from[(head * ranks + k) * channels + c] : R(1);
    }
    // Of the tensors of a state, where this head of a row lies.
    R* of(char* p, int64_t row, int64_t size) const { return (R*)p + (row * a.h + head) * size; }
    const R* tokens(const void* p, int64_t row, int64_t token) const { return (const R*)p + (row * a.t + token) * a.h + head; }
    V mixed(int64_t rank, int v) const { return of_mix(mix, rank, v); }
    V of_mix(const R* which, int64_t rank, int v) const { return load(which + (rank * vectors + v) * W); }

    // The state that a row starts from.
    void load_state(const State& from, int64_t row) {
        const int64_t width = int64_t(vectors) * W;
        __builtin_memset(angle, 0, sizeof(R) * padded);
        __builtin_memset(before, 0, sizeof(R) * width);
        if (!from.ssm) {
            __builtin_memset(S, 0, sizeof(R) * width * n);
            __builtin_memset(K, 0, sizeof(R) * ranks * n);
            return;
        }
        load_lanes(S, of(from.ssm, row, a.p * n), channels, n);
        __builtin_memcpy(K, of(from.k, row, ranks * n), sizeof(R) * ranks * n);
        if (pairs) __builtin_memcpy(angle, of(from.angle, row, pairs), sizeof(R) * pairs);
        __builtin_memcpy(before, of(from.v, row, channels), sizeof(R) * channels);
    }
    void store_state(const State& to, int64_t row) const {
        store_lanes(S, of(to.ssm, row, a.p * n), channels, n);
        __builtin_memcpy(of(to.k, row, ranks * n), K, sizeof(R) * ranks * n);
        if (pairs) __builtin_memcpy(of(to.angle, row, pairs), angle, sizeof(R) * pairs);
        __builtin_memcpy(of(to.v, row, channels), before, sizeof(R) * channels);
    }

    // Decays and the trapezoid's two weights of `count` steps, and the older end of the one after them if there is one; steps
    // beyond change nothing.
    void load_steps(int64_t row, Span at, int count, bool more) {
        for (int r = 0; r < T; r++) step[r] = decay[r] = newer[r] = older[r] = 0;
        older[T] = 0;
        for (int r = 0; r < count + more; r++) {
            const int64_t token = at.token + at.direction * r;
            const R size = *tokens(a.dt, row, token), share = *tokens(a.blend, row, token);
            older[r] = (R(1) - share) * size;
            if (r == count) break;
            newer[r] = share * size;
            step[r] = size;
            decay[r] = size * *tokens(a.A, row, token);
        }
        for (int r = 0; r < T; r += W) store(decay + r, exp(load(decay + r)));
    }
    void load_inputs(int64_t row, Span at, int count) const {
        load_tile(x, PITCH, 0, count, channels, a.x.dtype, a.x.at(row, at.token, head), at.direction * a.x.time);
    }
    void load_gate(int64_t row, Span at, int count) const {
        if (a.z.data) load_tile(z, PITCH, 0, count, channels, a.z.dtype, a.z.at(row, at.token, head), at.direction * a.z.time);
    }
    // What each step turns by, and the points of the circle.
    void load_angles(int64_t row, Span at, int count) const {
        for (int r = 0; r < count; r++) {
            const R* const rates = (const R*)a.rates + (row * a.t + at.token + at.direction * r) * pairs;
            for (int64_t i = 0; i < pairs; i += W) {
                const V rate = i + W <= pairs ? load(rates + i) : load_some<R>(rates + i, int(pairs - i));
                V turns = fma(splat(step[r]), rate, load(angle + i));
                turns = turns - nearest(turns);
                V c, s;
                unit_circle<R>(turns, c, s);
                store(angle + i, turns);
                store(cosine + r * padded + i, c);
                store(sine + r * padded + i, s);
            }
        }
    }
    // B or C of `count` steps, biased and turned.
    void load_rows(R* to, const Ranked& from, const R* bias, int64_t row, Span at, int count) const {
        for (int r = 0; r < count; r++)
            for (int64_t k = 0; k < ranks; k++) {
                R* const p = to + (r * ranks + k) * n;
                read_numbers(p, n, from.dtype, from.at(row, at.token + at.direction * r, k, a.group_of(head)));
                if (bias)
                    for (int64_t i = 0; i < n; i++) p[i] += bias[k * n + i];
                turn(p, cosine + r * padded, sine + r * padded, R(1));
            }
    }
    // Pairs of a row by an angle, or back with direction −1.
    void turn(R* __restrict p, const R* __restrict c, const R* __restrict s, R direction) const {
        const int64_t half = n / 2;
        if (a.interleaved)
            for (int64_t i = 0; i < pairs; i++) {
                const R first = p[2 * i], second = p[2 * i + 1], sine = direction * s[i];
                p[2 * i] = first * c[i] - second * sine;
                p[2 * i + 1] = first * sine + second * c[i];
            }
        else
            for (int64_t i = 0; i < pairs; i++) {
                const R first = p[i], second = p[half + i], sine = direction * s[i];
                p[i] = first * c[i] - second * sine;
                p[half + i] = first * sine + second * c[i];
            }
    }
    // Everything of a tile that does not touch the state; k of its steps from row 1 on.
    void load_all(int64_t row, Span at, int count, bool more) {
        load_steps(row, at, count, more);
        load_inputs(row, at, count);
        load_angles(row, at, count);
        load_rows(K + ranks * n, a.B, B_bias, row, at, count);
    }
    // The tile's last token becomes the one before the next.
    void pass_on(int count) const {
        __builtin_memcpy(K, K + count * ranks * n, sizeof(R) * ranks * n);
        for (int v = 0; v < vectors; v++) store(before + v * W, load(x + v * tile + (count - 1) * W));
    }
};

// Calls f.operator()<NV, NT>(v, s) for blocks of vectors and states that cover a head.
template <int NT_, class F>
SL_INLINE void for_blocks(int vectors, int64_t n, F&& f) {
    int64_t s = 0;
    const auto over_vectors = [&]<int NT>(int64_t s) {
        int v = 0;
        for (; v + NV <= vectors; v += NV) f.template operator()<NV, NT>(v, s);
        for (; v < vectors; v++) f.template operator()<1, NT>(v, s);
    };
    for (; s + NT_ <= n; s += NT_) over_vectors.template operator()<NT_>(s);
    for (; s < n; s++) over_vectors.template operator()<1>(s);
}

}  // namespace

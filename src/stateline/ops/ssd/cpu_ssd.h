// What ssd's forward pass, its gradient and the decode step share: arguments, one head's parameters, tiles of steps.
//
// A head's state is p channels wide, in lanes, and n deep. Segments are cut into tiles of T steps. Within a tile everything
// that does not touch the state (dtype conversion, softplus, decays, gate) is done first; the recurrence then runs over a few vectors
// of channels and a few states at a time, which stay in registers for the whole tile: three vector instructions an element and step.
// Matrix products over chunks of 64 steps would need 2.3, and could not be cut anywhere with the same bits.
// Suffixes: b batch, t time step, h head, p head width, n state, g group.
#pragma once
#include "pool.h"
#include "tile.h"

namespace {

constexpr int T = 32;  // steps in a tile
constexpr int PITCH = pitch_of(T);

// (b, t, h, p), the last dimension adjacent; B and C: (b, t, g, n); dt: (b, t, h), with p = 1. Strides in elements.
struct Heads {
    char* data;
    int64_t dtype, batch, time, head;
    char* at(int64_t b, int64_t t, int64_t h) const { return data + dtype_size(dtype) * (b * batch + t * time + h * head); }
};
struct Output {
    char* data;
    int64_t dtype;
};

// Laid out as Python packs it: every field is eight bytes. Pointers that do not apply are null.
struct Args {
    int64_t b, t, h, p, g, n;
    const int64_t* table;
    int64_t count, reverse, threads;
    int64_t is_double, softplus;
    double low, high;  // of dt
    Heads x, dt, z, B, C;
    const void *A, *D, *bias;  // (h), (h, p), (h)
    char* initial;             // (count, h, p, n); the step: the slots, changed in place
    Output y;                  // (b, t, h, p)
    char* state;               // (count, h, p, n)
    void* decay;               // (count, h)
    // step
    const int64_t* index;
    int64_t slots, slot_stride;
    // gradients
    Heads dy;
    const char* dstate;
    const void* ddecay;
    Output dx, ddt, dz;
    int64_t parts;   // of a group's heads
    void *dB, *dC;   // (parts, b, t, g, n)
    void *dA, *dD, *dbias;  // (count, h), (count, h, p), (count, h)
    void* dinitial;

    Heads heads(Output o) const { return {o.data, o.dtype, t * h * p, h * p, p}; }
    Segments segments() const { return {table, count, b, t, reverse}; }
    int64_t group_of(int64_t head) const { return head * g / h; }
    int64_t group_start(int64_t group) const { return (group * h + g - 1) / g; }
    double cost_us(double of_element) const { return of_element * 1e-5 * double(b) * double(t) * double(h) * double(p) * double(n); }
};

inline double number(const char* p, int64_t dtype) {
    if (dtype == F32) return *(const float*)p;
    if (dtype == F64) return *(const double*)p;
    return bits<float>(uint32_t(*(const uint16_t*)p) << 16);
}

template <class R>
struct Head {
    static constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;

    const Args& a;
    int64_t head, n;
    int vectors, channels;
    R rate;  // A
    // State [v][n][W]; tiles [v][PITCH][W]: x, dt·x, y, gate. D [v][W]. B and C of a tile, [T][n].
    R *S, *x, *u, *y, *gate, *D, *Bt, *Ct;
    R step[T], decay[T], slope[T];

    static size_t scratch_bytes(const Args& a) {
        const size_t width = (a.p + W - 1) / W * W;
        return sizeof(R) * (width * (a.n + 1 + 4 * PITCH) + 2 * (T * a.n + W)) + 64 * 10;
    }
    Head(const Args& args, Arena& arena) : a(args), head(0), n(args.n), vectors(int((args.p + W - 1) / W)), channels(int(args.p)) {
        const size_t width = size_t(vectors) * W;
        S = arena.take<R>(width * n);
        D = arena.take<R>(width);
        R** const tiles[] = {&x, &u, &y, &gate};
        for (R** tile : tiles) *tile = arena.take<R>(PITCH * width);
        Bt = arena.take<R>(T * n + W);
        Ct = arena.take<R>(T * n + W);
    }
    void select(int64_t index) {
        head = index;
        rate = ((const R*)a.A)[head];
        if (a.D) load_lanes(D, (const R*)a.D + head * a.p, channels, 1);
    }
    int64_t state_offset(int64_t row) const { return int64_t(sizeof(R)) * (row * a.h + head) * a.p * n; }
    void load_state(R* to, const char* p) const {
        if (p)
            load_lanes(to, (const R*)p, channels, n);
        else
            __builtin_memset(to, 0, sizeof(R) * vectors * n * W);
    }

    // dt after bias, softplus and limits, its slope, and the decays of `count` steps; steps beyond change nothing.
    void load_steps(int64_t row, Span at, int count) {
        const R bias = a.bias ? ((const R*)a.bias)[head] : R(0);
        for (int r = 0; r < T; r++)
            step[r] = r < count ? R(number(a.dt.at(row, at.token + at.direction * r, head), a.dt.dtype)) + bias : R(0);
        const V low = splat(R(a.low)), high = splat(R(a.high));
        for (int r = 0; r < T; r += W) {
            V size = load(step + r), steep = splat(R(1));
            if (a.softplus) ::softplus<R>(load(step + r), size, steep);
            steep = size < low || size > high ? V{} : steep;
            size = size < low ? low : size;
            size = size > high ? high : size;
            store(step + r, size);
            store(slope + r, steep);
            store(decay + r, exp(size * splat(rate)));
        }
        for (int r = count; r < T; r++) step[r] = 0, decay[r] = 1;
    }
    // x, and dt·x.
    void load_inputs(int64_t row, Span at, int count) const {
        load_tile(x, PITCH, 0, count, channels, a.x.dtype, a.x.at(row, at.token, head), at.direction * a.x.time);
        for (int v = 0; v < vectors; v++)
            for (int r = 0; r < count; r++) {
                const int64_t i = (int64_t(v) * PITCH + r) * W;
                store(u + i, splat(step[r]) * load(x + i));
            }
    }
    void load_projection(R* to, const Heads& from, int64_t row, Span at, int count) const {
        for (int r = 0; r < count; r++)
            read_numbers(to + r * n, n, from.dtype, from.at(row, at.token + at.direction * r, a.group_of(head)));
    }
    void load_gate(int64_t row, Span at, int count) const {
        load_tile(gate, PITCH, 0, count, channels, a.z.dtype, a.z.at(row, at.token, head), at.direction * a.z.time);
    }

    // S ← decay S + u⊗B over `count` steps for NV vectors of channels and NT states; with OUT, y accumulates S C.
    // With PAST, past[(r·NT + s)·NV + v] is the state before step r, and that of r = count the last.
    template <int NV, int NT, bool OUT, bool PAST>
    __attribute__((noinline)) void advance(int v0, int64_t s0, int count, R* past) const {
        V S_[NT][NV];
        const int64_t tile = int64_t(PITCH) * W;
        R* const state = S + (v0 * n + s0) * W;
        const R* const in = u + v0 * tile;
        R* const out = y + v0 * tile;
#pragma GCC unroll 8
        for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) S_[s][v] = load(state + (v * n + s) * W);
        for (int r = 0; r < count; r++) {
            V in_[NV], out_[NV];
            const V shrink = splat(decay[r]);
            const R *b = Bt + r * n + s0, *c = Ct + r * n + s0;
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) {
                in_[v] = load(in + v * tile + r * W);
                if (OUT) out_[v] = s0 ? load(out + v * tile + r * W) : V{};
            }
#pragma GCC unroll 8
            for (int s = 0; s < NT; s++) {
                const V bs = splat(b[s]);
                const V cs = OUT ? splat(c[s]) : V{};
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) {
                    if (PAST) store(past + ((r * NT + s) * NV + v) * W, S_[s][v]);
                    S_[s][v] = fma(shrink, S_[s][v], in_[v] * bs);
                    if (OUT) out_[v] = fma(S_[s][v], cs, out_[v]);
                }
            }
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++)
                if (OUT) store(out + v * tile + r * W, out_[v]);
        }
#pragma GCC unroll 8
        for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) {
                if (PAST) store(past + ((count * NT + s) * NV + v) * W, S_[s][v]);
                else store(state + (v * n + s) * W, S_[s][v]);
            }
    }
};

// Vectors of channels that go through the recurrence together: what the registers hold.
constexpr int NV = SL_BYTES == 64 ? 4 : 2;

// Calls f.operator()<NV, NT>(v, s) for blocks of vectors and states that cover a head.
template <int WIDE, class F>
SL_INLINE void for_blocks(int vectors, int64_t n, F&& f) {
    int64_t s = 0;
    const auto over_vectors = [&]<int NT>(int64_t s) {
        int v = 0;
        for (; v + NV <= vectors; v += NV) f.template operator()<NV, NT>(v, s);
        for (; v < vectors; v++) f.template operator()<1, NT>(v, s);
    };
    for (; s + WIDE <= n; s += WIDE) over_vectors.template operator()<WIDE>(s);
    for (; s < n; s++) over_vectors.template operator()<1>(s);
}

}  // namespace

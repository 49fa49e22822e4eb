// The gradient of ssd on CPUs. Nothing is kept from the forward pass: states are marked tile by tile on the way up; then, from the
// last tile to the first, the tile's states are computed again, kept in cache, and the adjoint runs backwards over them. Sequences of
// many tiles are marked coarsely first, so that memory grows with the square root of their length.
//
// Sums over heads (B and C): heads of a part in order, parts by the caller. Sums over time (A, D, dt_bias): time within a sequence,
// sequences by the caller. Parts depend on h and g alone, so the bits do not depend on threads.
#include <stdlib.h>

#include "cpu_ssd.h"

namespace {

constexpr int HEADS_IN_PART = 4;
constexpr int WIDE = 4;              // states that the adjoint takes together
constexpr int64_t MANY_TILES = 256;  // beyond, marks are coarse

struct Job {
    const Args& a;
    int failed;
};

template <class R>
struct Gradient : Head<R> {
    typedef Head<R> Base;
    using typename Base::V;
    using Base::a, Base::channels, Base::head, Base::n, Base::vectors, Base::W;
    // Lanes [v][n][W]: gradient that reaches the state from later steps. Tiles [v][PITCH][W]: d loss / d y before the gate, what dz
    // needs, d loss / d (dt·x). Per step [T][W]: d loss / d log decay.
    R *G, *dy, *dgate, *ddrive, *dlog;
    // One block: the states [T + 1][NT][NV][W]; sums for B and C [T][2][NT][W], and the numbers they come to.
    R *past, *sums, *flat;
    R *dBt, *dCt, *dD;  // [T][n], [T][n], [v][W]
    double dA, dbias;
    bool first_of_part = true;
    int64_t part = 0;

    static size_t scratch_bytes(const Args& a) {
        const size_t width = (a.p + W - 1) / W * W;
        return Base::scratch_bytes(a) +
               sizeof(R) * (width * (a.n + 1 + 3 * PITCH) + T * W + (T + 1) * WIDE * NV * W + T * 2 * WIDE * (W + 1) + 2 * (T * a.n + W)) + 64 * 12;
    }
    Gradient(const Args& args, Arena& arena) : Base(args, arena) {
        const size_t width = size_t(vectors) * W;
        G = arena.take<R>(width * n);
        dD = arena.take<R>(width);
        R** const tiles[] = {&dy, &dgate, &ddrive};
        for (R** tile : tiles) *tile = arena.take<R>(PITCH * width);
        dlog = arena.take<R>(T * W);
        past = arena.take<R>((T + 1) * WIDE * NV * W);
        sums = arena.take<R>(T * 2 * WIDE * W);
        flat = arena.take<R>(T * 2 * WIDE);
        dBt = arena.take<R>(T * n + W);
        dCt = arena.take<R>(T * n + W);
    }

    // The state over tiles [from, to), each one's beginning marked if there is a place for it.
    void sweep(const Segment& segment, int64_t from, int64_t to, R* marks) {
        const int64_t size = vectors * n * W;
        for (int64_t k = from; k < to; k++) {
            if (marks) __builtin_memcpy(marks + (k - from) * size, this->S, sizeof(R) * size);
            if (marks && k == to - 1) break;
            const Span at = span(segment, a.reverse, k * T);
            this->load_steps(segment.row, at, T);
            this->load_inputs(segment.row, at, T);
            this->load_projection(this->Bt, a.B, segment.row, at, T);
            for_blocks<4>(vectors, n, [&]<int NV, int NT>(int v, int64_t s) { this->template advance<NV, NT, false, false>(v, s, T, nullptr); });
        }
    }

    bool sequence(int64_t index) {
        const Segment segment = a.segments()[index];
        const int64_t length = segment.stop - segment.start, tiles = (length + T - 1) / T, size = vectors * n * W;
        int64_t group = tiles;
        if (tiles > MANY_TILES)
            for (group = 1; group * group < tiles;) group++;
        const int64_t groups = group ? (tiles + group - 1) / group : 0;
        R* const marks = (R*)aligned_alloc(64, (sizeof(R) * size * (group + groups) + 64) / 64 * 64);
        if (!marks) return false;
        R* const coarse = marks + group * size;
        this->load_state(this->S, a.initial ? a.initial + this->state_offset(index) : nullptr);
        for (int64_t j = 0; j < groups; j++) {
            __builtin_memcpy(coarse + j * size, this->S, sizeof(R) * size);
            if (j < groups - 1) sweep(segment, j * group, (j + 1) * group, nullptr);
        }
        this->load_state(G, a.dstate + this->state_offset(index));
        __builtin_memset(dD, 0, sizeof(R) * vectors * W);
        dA = dbias = 0;
        const double through_decay = of_total_decay(segment, index);
        for (int64_t j = groups - 1; j >= 0; j--) {
            const int64_t from = j * group, to = from + group < tiles ? from + group : tiles;
            __builtin_memcpy(this->S, coarse + j * size, sizeof(R) * size);
            sweep(segment, from, to, marks);
            for (int64_t k = to - 1; k >= from; k--) {
                __builtin_memcpy(this->S, marks + (k - from) * size, sizeof(R) * size);
                const int64_t left = length - k * T;
                tile(segment, span(segment, a.reverse, k * T), int(left < T ? left : T), through_decay);
            }
        }
        free(marks);
        const int64_t i = index * a.h + head;
        ((R*)a.dA)[i] = R(dA);
        if (a.dbias) ((R*)a.dbias)[i] = R(dbias);
        if (a.dD) store_lanes(dD, (R*)a.dD + i * a.p, channels, 1);
        if (a.dinitial) store_lanes(G, (R*)((char*)a.dinitial + this->state_offset(index)), channels, n);
        return true;
    }

    // What exp(A·Σ dt) sends back to dt·A of every step.
    double of_total_decay(const Segment& segment, int64_t index) {
        const double given = ((const R*)a.ddecay)[index * a.h + head];
        if (given == 0) return 0;
        double elapsed = 0;
        for (int64_t first = 0; first < segment.stop - segment.start; first += T) {
            const int64_t left = segment.stop - segment.start - first;
            this->load_steps(segment.row, span(segment, a.reverse, first), int(left < T ? left : T));
            for (int r = 0; r < T; r++) elapsed += this->step[r];
        }
        R total[W];
        store(total, exp(splat(R(elapsed * this->rate))));
        return given * total[0];
    }

    void tile(const Segment& segment, Span at, int count, double through_decay) {
        this->load_steps(segment.row, at, count);
        this->load_inputs(segment.row, at, count);
        this->load_projection(this->Bt, a.B, segment.row, at, count);
        this->load_projection(this->Ct, a.C, segment.row, at, count);
        through_gate(segment.row, at, count);
        __builtin_memset(dlog, 0, sizeof(R) * T * W);
        for_states(count);
        finish(segment.row, at, count, through_decay);
    }

    // dy ← d loss / d (y before the gate); dgate ← dy · slope of silu.
    void through_gate(int64_t row, Span at, int count) {
        load_tile(dy, PITCH, 0, count, channels, a.dy.dtype, a.dy.at(row, at.token, head), at.direction * a.dy.time);
        if (!a.z.data) return;
        this->load_gate(row, at, count);
        for (int v = 0; v < vectors; v++)
            for (int r = 0; r < count; r++) {
                const int64_t i = (int64_t(v) * PITCH + r) * W;
                V value, steep;
                silu<R>(load(this->gate + i), value, steep);
                const V given = load(dy + i);
                store(dgate + i, given * steep);
                store(dy + i, given * value);
            }
    }

    void for_states(int count) {
        int64_t s = 0;
        for (; s + WIDE <= n; s += WIDE) run_of_states<WIDE>(s, count);
        for (; s < n; s++) run_of_states<1>(s, count);
    }
    template <int NT>
    void run_of_states(int64_t s, int count) {
        __builtin_memset(sums, 0, sizeof(R) * T * 2 * NT * W);
        for_blocks<NT>(vectors, NT, [&]<int NV, int N>(int v, int64_t) {
            if (a.z.data)
                this->template advance<NV, NT, true, true>(v, s, count, past);
            else
                this->template advance<NV, NT, false, true>(v, s, count, past);
            adjoint<NV, NT>(v, s, count);
        });
        const int total = count * 2 * NT;
        if constexpr (sizeof(R) == 4) {
            for (int i = 0; i < total; i += W) {
                V rows[W];
                for (int j = 0; j < W; j++) rows[j] = load(sums + (i + j) * W);
                store(flat + i, sums_of_lanes(rows));
            }
        } else {
            for (int i = 0; i < total; i++) flat[i] = sum_lanes<R>(load(sums + i * W));
        }
        for (int r = 0; r < count; r++)
            for (int i = 0; i < NT; i++) {
                dBt[r * n + s + i] = flat[(2 * r) * NT + i];
                dCt[r * n + s + i] = flat[(2 * r + 1) * NT + i];
            }
    }

    // From the last step to the first, over NV vectors of channels and NT states.
    template <int NV, int NT>
    __attribute__((noinline)) void adjoint(int v0, int64_t s0, int count) {
        V g[NT][NV];
        const int64_t tile = int64_t(PITCH) * W;
        R* const reach = G + (v0 * n + s0) * W;
#pragma GCC unroll 8
        for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) g[s][v] = load(reach + (v * n + s) * W);
        for (int r = count - 1; r >= 0; r--) {
            const R *b = this->Bt + r * n + s0, *c = this->Ct + r * n + s0;
            const R *before = past + r * NT * NV * W, *after = before + NT * NV * W;
            const V shrink = splat(this->decay[r]);
            V in[NV], out[NV], drive[NV], pull = V{};
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) {
                const int64_t i = (v0 + v) * tile + r * W;
                in[v] = load(this->u + i), out[v] = load(dy + i);
                drive[v] = s0 ? load(ddrive + i) : V{};
            }
#pragma GCC unroll 8
            for (int s = 0; s < NT; s++) {
                const V bs = splat(b[s]), cs = splat(c[s]);
                R* const sum = sums + (2 * r * NT + s) * W;
                V db = load(sum), dc = load(sum + NT * W);
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) {
                    const V now = fma(out[v], cs, g[s][v]);
                    dc = fma(out[v], load(after + (s * NV + v) * W), dc);
                    db = fma(now, in[v], db);
                    drive[v] = fma(now, bs, drive[v]);
                    g[s][v] = now * shrink;
                    pull = fma(g[s][v], load(before + (s * NV + v) * W), pull);
                }
                store(sum, db);
                store(sum + NT * W, dc);
            }
            store(dlog + r * W, load(dlog + r * W) + pull);
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) store(ddrive + (v0 + v) * tile + r * W, drive[v]);
        }
#pragma GCC unroll 8
        for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) store(reach + (v * n + s) * W, g[s][v]);
    }

    void finish(int64_t row, Span at, int count, double through_decay) {
        if (a.z.data) write_gate(row, at, count);
        const Heads to_dt = {a.ddt.data, a.ddt.dtype, a.t * a.h, a.h, 1};
        for (int r = 0; r < count; r++) {
            V sum = {};
            for (int v = 0; v < vectors; v++) {
                const int64_t i = (int64_t(v) * PITCH + r) * W;
                const V drive = n ? load(ddrive + i) : V{}, in = load(this->x + i), out = load(dy + i);
                sum = fma(drive, in, sum);
                V dx = drive * splat(this->step[r]);
                if (a.D) {
                    dx = fma(load(this->D + v * W), out, dx);
                    store(dD + v * W, fma(out, in, load(dD + v * W)));
                }
                store(ddrive + i, dx);
            }
            const double exponent = double(sum_lanes<R>(load(dlog + r * W))) + through_decay;
            dA += exponent * this->step[r];
            const R ddt = R((double(sum_lanes<R>(sum)) + exponent * this->rate) * this->slope[r]);
            dbias += ddt;
            write_numbers(&ddt, 1, to_dt.dtype, to_dt.at(row, at.token + at.direction * r, head));
        }
        write(a.dx, ddrive, row, at, count);
        write_projection((R*)a.dB, dBt, row, at, count);
        write_projection((R*)a.dC, dCt, row, at, count);
    }
    void write_gate(int64_t row, Span at, int count) {
        for (int v = 0; v < vectors; v++)
            for (int r = 0; r < count; r++) {
                const int64_t i = (int64_t(v) * PITCH + r) * W;
                V out = n ? load(this->y + i) : V{};
                if (a.D) out = fma(load(this->D + v * W), load(this->x + i), out);
                store(dgate + i, load(dgate + i) * out);
            }
        write(a.dz, dgate, row, at, count);
    }
    void write(Output o, const R* from, int64_t row, Span at, int count) const {
        const Heads to = a.heads(o);
        store_tile(from, PITCH, 0, count, channels, to.dtype, to.at(row, at.token, head), at.direction * to.time);
    }
    void write_projection(R* to, const R* from, int64_t row, Span at, int count) const {
        for (int r = 0; r < count; r++) {
            const int64_t token = at.token + at.direction * r;
            R* p = to + (((part * a.b + row) * a.t + token) * a.g + a.group_of(head)) * n;
            const R* q = from + r * n;
            for (int64_t s = 0; s < n; s++) p[s] = first_of_part ? q[s] : p[s] + q[s];
        }
    }
};

template <class R>
void backward_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    const int64_t part = task % a.parts, group = task / a.parts % a.g, sequence = task / a.parts / a.g;
    const int64_t first = a.group_start(group) + part * HEADS_IN_PART, end = a.group_start(group + 1);
    if (first >= end) return;
    Arena arena = {(char*)sl_scratch(Gradient<R>::scratch_bytes(a))};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    Gradient<R> k(a, arena);
    k.part = part;
    for (int64_t head = first; head < end && head < first + HEADS_IN_PART; head++) {
        k.first_of_part = head == first;
        k.select(head);
        if (!k.sequence(sequence)) job.failed = SL_NO_MEMORY;
    }
}

}  // namespace

SL_KERNEL(ssd_backward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    Job job = {a, SL_OK};
    sl_parallel(a.count * a.g * a.parts, a.threads, a.cost_us(a.is_double ? 40 : 20),
                a.is_double ? backward_task<double> : backward_task<float>, &job);
    return job.failed;
}

// The gradient of trapezoid_ssd on CPUs; cpu_adjoint.h has what touches the state.
//
// Nothing is kept from the forward pass: as in ssd, states are marked tile by tile on the way up, coarsely first for sequences
// of many tiles, and the adjoint runs back over them.
// Sums over heads (B, C, rates): heads of a part in order, parts by the caller. Sums over time (biases, mixes, D): time within a
// sequence, sequences by the caller. Parts depend on h and g alone, so the bits do not depend on threads.
#include <stdlib.h>

#include "cpu_adjoint.h"

namespace {

constexpr int HEADS_IN_PART = 4;
constexpr int64_t MANY_TILES = 256;  // beyond, marks are coarse
constexpr double RADIANS = 6.283185307179586476925;  // in a turn

struct Job {
    const Args& a;
    int failed;
};

template <class R>
struct Gradient : Adjoint<R> {
    typedef Adjoint<R> Base;
    using typename Base::V;
    using Base::a, Base::channels, Base::head, Base::n, Base::padded, Base::pairs, Base::ranks, Base::tile, Base::tiles, Base::vectors,
        Base::W, Base::x;
    using Base::dK, Base::dlog, Base::dQ, Base::dvalues, Base::dy, Base::G, Base::values, Base::y;
    // What reaches the gated y, [v][PITCH][W]; what a later token sends back to k and x of the last of this tile, (r, n), [v][W].
    R *given, *dk_later, *dx_later;
    R *dangle, *dB_bias, *dC_bias, *products;  // (padded), (r, n), (r, n), (r, r) twice
    R *dmix, *dz_mix, *dy_mix;                 // [r][v][W]
    double dD;
    bool first_of_part = true;
    int64_t part = 0;

    static size_t scratch_bytes(const Args& a) {
        const size_t width = (a.p + W - 1) / W * W, padded = (a.s + W - 1) / W * W;
        return Base::scratch_bytes(a) + sizeof(R) * (width * (PITCH + 1 + 3 * a.r) + 3 * a.r * a.n + padded + 2 * a.r * a.r) + 64 * 10;
    }
    Gradient(const Args& args, Arena& arena) : Base(args, arena) {
        const size_t width = size_t(vectors) * W, rows = size_t(ranks) * n;
        given = arena.take<R>(tiles);
        dk_later = arena.take<R>(rows);
        dx_later = arena.take<R>(width);
        dangle = arena.take<R>(padded);
        dB_bias = arena.take<R>(rows);
        dC_bias = arena.take<R>(rows);
        R** const mixes[] = {&dmix, &dz_mix, &dy_mix};
        for (R** p : mixes) *p = arena.take<R>(width * ranks);
        products = arena.take<R>(2 * ranks * ranks);
    }

    // P over tiles [from, to), each one's beginning marked if there is a place for it: the state, then the angles.
    void sweep(const Segment& segment, int64_t from, int64_t to, R* marks) {
        for (int64_t k = from; k < to; k++) {
            if (marks) mark(marks + (k - from) * mark_size());
            if (marks && k == to - 1) break;
            this->load(segment, k, T);
            for_blocks<WIDE>(vectors, n, [&]<int NV, int NT>(int v, int64_t s) { this->template advance<NV, NT, false, false>(v, s, T); });
        }
    }
    int64_t mark_size() const { return int64_t(vectors) * n * W + padded; }
    void mark(R* to) const {
        __builtin_memcpy(to, this->S, sizeof(R) * vectors * n * W);
        if (padded) __builtin_memcpy(to + vectors * n * W, this->angle, sizeof(R) * padded);
    }
    void recall(const R* from) const {
        __builtin_memcpy(this->S, from, sizeof(R) * vectors * n * W);
        if (padded) __builtin_memcpy(this->angle, from + vectors * n * W, sizeof(R) * padded);
    }

    bool sequence(int64_t index) {
        const Segment segment = a.segments()[index];
        const int64_t length = segment.stop - segment.start, tiles_ = (length + T - 1) / T, size = mark_size();
        int64_t group = tiles_;
        if (tiles_ > MANY_TILES)
            for (group = 1; group * group < tiles_;) group++;
        const int64_t groups = group ? (tiles_ + group - 1) / group : 0;
        R* const marks = (R*)aligned_alloc(64, (sizeof(R) * size * (group + groups) + 127) / 64 * 64);
        if (!marks) return false;
        R* const coarse = marks + group * size;
        this->load_state(a.initial, index);
        if (length) add_older_end(segment);
        for (int64_t j = 0; j < groups; j++) {
            mark(coarse + j * size);
            if (j < groups - 1) sweep(segment, j * group, (j + 1) * group, nullptr);
        }
        start(index);
        for (int64_t j = groups - 1; j >= 0; j--) {
            const int64_t from = j * group, to = from + group < tiles_ ? from + group : tiles_;
            recall(coarse + j * size);
            sweep(segment, from, to, marks);
            for (int64_t k = to - 1; k >= from; k--) {
                recall(marks + (k - from) * size);
                const int64_t left = length - k * T;
                back(segment, k, int(left < T ? left : T));
            }
        }
        free(marks);
        finish_sequence(segment, index);
        return true;
    }
    // The first token's older end, which weighs what the state brought along: P[0] = S + older[0] Σ_r v_r⊗k_r.
    void add_older_end(const Segment& segment) {
        this->load_steps(segment.row, span(segment, a.reverse, 0), 1, false);
        for (int64_t k = 0; k < ranks; k++)
            for (int v = 0; v < vectors; v++) {
                const V in = splat(this->older[0]) * (this->mixed(k, v) * ::load(this->before + v * W));
                for (int64_t s = 0; s < n; s++) {
                    R* const to = this->S + (v * n + s) * W;
                    store(to, fma(in, splat(this->K[k * n + s]), ::load(to)));
                }
            }
    }
    void start(int64_t index) {
        const int64_t width = int64_t(vectors) * W;
        load_lanes(G, this->of(a.dend.ssm, index, channels * n), channels, n);
        __builtin_memcpy(dk_later, this->of(a.dend.k, index, ranks * n), sizeof(R) * ranks * n);
        __builtin_memset(dx_later, 0, sizeof(R) * width);
        __builtin_memcpy(dx_later, this->of(a.dend.v, index, channels), sizeof(R) * channels);
        __builtin_memset(dangle, 0, sizeof(R) * padded);
        // In radians here.
        for (int64_t i = 0; i < pairs; i++) dangle[i] = R(this->of(a.dend.angle, index, pairs)[i] / RADIANS);
        __builtin_memset(dB_bias, 0, sizeof(R) * ranks * n);
        __builtin_memset(dC_bias, 0, sizeof(R) * ranks * n);
        R* const mixes[] = {dmix, dz_mix, dy_mix};
        for (R* p : mixes) __builtin_memset(p, 0, sizeof(R) * width * ranks);
        dD = 0;
    }

    void back(const Segment& segment, int64_t index, int count) {
        const Span at = span(segment, a.reverse, index * T);
        this->load(segment, index, count);
        this->load_rows(this->Q, a.C, this->C_bias, segment.row, at, count);
        for (int64_t k = 0; k < a.outputs(); k++)
            load_tile(a.z.data ? given : dy + k * tiles, PITCH, 0, count, channels, a.dy.dtype,
                      a.dy.at(segment.row, at.token, head * a.outputs() + k), at.direction * a.dy.time);
        if (a.z.data) through_gate(segment.row, at, count);
        this->run(count);
        for (int r = count - 1; r >= 0; r--) token(segment.row, at.token + at.direction * r, r);
        write_inputs(segment.row, at, count);
    }
    // What reaches each rank's y.
    void through_gate(int64_t row, Span at, int count) const {
        this->load_gate(row, at, count);
        for (int64_t k = 0; k < ranks; k++)
            for (int v = 0; v < vectors; v++)
                for (int r = 0; r < count; r++) {
                    const int64_t i = v * tile + r * W;
                    const V gate = silu<R>(::load(this->z + i) * this->of_mix(this->z_mix, k, v));
                    store(dy + k * tiles + i, ::load(given + i) * this->of_mix(this->y_mix, k, v) * gate);
                }
    }
    // What does not touch the state: a token's own part of y, its weights, biases, turning. dvalues becomes d loss / d v.
    void token(int64_t row, int64_t token, int r) {
        const R newer = this->newer[r], weight = newer + this->older[r + 1];
        R *const match = products, *const pull = products + ranks * ranks;  // q·k and dy·v, [rank of y][rank of v]
        const R *const k = this->K + (r + 1) * ranks * n, *const q = this->Q + r * ranks * n;
        R dweight = 0, dnewer = 0;
        for (int64_t i = 0; i < ranks; i++)
            for (int64_t j = 0; j < ranks; j++) {
                match[i * ranks + j] = dot(q + i * n, k + j * n);
                pull[i * ranks + j] = dot_of_tiles(dy + i * tiles, values + j * tiles, r);
                dnewer += match[i * ranks + j] * pull[i * ranks + j];
            }
        for (int64_t j = 0; j < ranks; j++) {
            dweight += dot_of_tiles(dvalues + j * tiles, values + j * tiles, r);
            dD += pull[j * ranks + j];
            if (a.z.data) output_of_rank(j, newer, match, r);
            value_of_rank(j, weight, newer, match, r);
            R *const dk = dK + (r * ranks + j) * n, *const dq = dQ + (r * ranks + j) * n;
            for (int64_t i = 0; i < n; i++) dq[i] *= this->decay[r];
            for (int64_t o = 0; o < ranks; o++) {
                const R to_k = newer * pull[o * ranks + j], to_q = newer * pull[j * ranks + o];
                for (int64_t i = 0; i < n; i++) dk[i] += to_k * q[o * n + i];
                for (int64_t i = 0; i < n; i++) dq[i] += to_q * k[o * n + i];
            }
            for (int64_t i = 0; i < n; i++) dk[i] += dk_later[j * n + i];
        }
        __builtin_memset(dk_later, 0, sizeof(R) * ranks * n);
        const int64_t at = (row * a.t + token) * a.h + head;
        const R exponent = sum_lanes<R>(::load(dlog + r * W)), share = ((const R*)a.blend)[at];
        dnewer += dweight;
        ((R*)a.dA)[at] = this->step[r] * exponent;
        ((R*)a.dblend)[at] = this->step[r] * dnewer;
        ((R*)a.ddt)[at] = share * dnewer + ((const R*)a.A)[at] * exponent + turn_back(row, token, r);
        add_older(dweight);
        later = at;
        add_rows(a.dB, dK, dB_bias, row, token, r);
        add_rows(a.dC, dQ, dC_bias, row, token, r);
    }
    // Of the token processed before, which comes after in time: its older end weighs the token at hand.
    int64_t later = -1;
    void add_older(R dolder) const {
        if (later < 0) return;
        ((R*)a.dblend)[later] -= ((const R*)a.dt)[later] * dolder;
        ((R*)a.ddt)[later] += (R(1) - ((const R*)a.blend)[later]) * dolder;
    }

    void output_of_rank(int64_t j, R newer, const R* match, int r) const {
        for (int v = 0; v < vectors; v++) {
            const int64_t i = v * tile + r * W;
            V sum = splat(this->decay[r]) * ::load(y + j * tiles + i);
            for (int64_t o = 0; o < ranks; o++)
                sum = fma(splat(newer * match[j * ranks + o] + (o == j ? this->D : R(0))), ::load(values + o * tiles + i), sum);
            store(y + j * tiles + i, sum);
        }
    }
    void value_of_rank(int64_t j, R weight, R newer, const R* match, int r) const {
        for (int v = 0; v < vectors; v++) {
            const int64_t i = v * tile + r * W;
            V sum = splat(weight) * ::load(dvalues + j * tiles + i);
            for (int64_t o = 0; o < ranks; o++)
                sum = fma(splat(newer * match[o * ranks + j] + (o == j ? this->D : R(0))), ::load(dy + o * tiles + i), sum);
            store(dvalues + j * tiles + i, sum);
        }
    }
    R dot(const R* p, const R* q) const {
        V sum = {};
        int64_t i = 0;
        for (; i + W <= n; i += W) sum = fma(::load(p + i), ::load(q + i), sum);
        R total = sum_lanes<R>(sum);
        for (; i < n; i++) total += p[i] * q[i];
        return total;
    }
    R dot_of_tiles(const R* p, const R* q, int r) const {
        V sum = {};
        for (int v = 0; v < vectors; v++) sum = fma(::load(p + v * tile + r * W), ::load(q + v * tile + r * W), sum);
        return sum_lanes<R>(sum);
    }

    // k and q back to what was turned; the angles' gradients gather on the way, and go to rates and, returned, to dt.
    R turn_back(int64_t row, int64_t token, int r) {
        if (!pairs) return 0;
        const R *const c = this->cosine + r * padded, *const s = this->sine + r * padded;
        const int64_t apart = a.interleaved ? 1 : n / 2, each = a.interleaved ? 2 : 1;
        for (int64_t k = 0; k < ranks; k++) {
            const R* const turned[] = {this->K + ((r + 1) * ranks + k) * n, this->Q + (r * ranks + k) * n};
            R* const grads[] = {dK + (r * ranks + k) * n, dQ + (r * ranks + k) * n};
            for (int of = 0; of < 2; of++) {
                const R *const p = turned[of], *const d = grads[of];
                for (int64_t i = 0; i < pairs; i++)
                    dangle[i] += d[each * i + apart] * p[each * i] - d[each * i] * p[each * i + apart];
                this->turn(grads[of], c, s, R(-1));
            }
        }
        const R* const rates = (const R*)a.rates + (row * a.t + token) * pairs;
        R* const drates = (R*)a.drates + ((part_of_all * a.b + row) * a.t + token) * pairs;
        R to_step = 0;
        for (int64_t i = 0; i < pairs; i++) {
            const R turns = R(RADIANS) * dangle[i], mine = this->step[r] * turns;
            to_step += turns * rates[i];
            drates[i] = first_of_part ? mine : drates[i] + mine;
        }
        return to_step;
    }
    int64_t part_of_all = 0;

    void add_rows(void* total, const R* from, R* bias, int64_t row, int64_t token, int r) const {
        for (int64_t k = 0; k < ranks; k++) {
            R* const to = (R*)total + ((((part * a.b + row) * a.t + token) * ranks + k) * a.g + a.group_of(head)) * n;
            const R* const d = from + (r * ranks + k) * n;
            for (int64_t i = 0; i < n; i++) to[i] = first_of_part ? d[i] : to[i] + d[i];
            for (int64_t i = 0; i < n; i++) bias[k * n + i] += d[i];
        }
    }

    // x, z and mixes of a tile, and what the state at the end sends to the last x.
    void write_inputs(int64_t row, Span at, int count) {
        if (a.z.data) write_gate(row, at, count);
        for (int v = 0; v < vectors; v++)
            for (int r = 0; r < count; r++) {
                const int64_t i = v * tile + r * W;
                const V in = ::load(x + i);
                V dx = r == count - 1 ? ::load(dx_later + v * W) : V{};
                for (int64_t k = 0; k < ranks; k++) {
                    const V d = ::load(dvalues + k * tiles + i);
                    add_to(dmix, k, v, d * in);
                    dx = fma(d, this->mixed(k, v), dx);
                }
                store(x + i, dx);
            }
        __builtin_memset(dx_later, 0, sizeof(R) * vectors * W);
        write(a.dx, x, row, at, count);
    }
    void write_gate(int64_t row, Span at, int count) const {
        for (int v = 0; v < vectors; v++)
            for (int r = 0; r < count; r++) {
                const int64_t i = v * tile + r * W;
                const V z = ::load(this->z + i), reach = ::load(given + i);
                V dz = {};
                for (int64_t k = 0; k < ranks; k++) {
                    const V mix = this->of_mix(this->z_mix, k, v), out = reach * ::load(y + k * tiles + i);
                    V value, steep;
                    silu<R>(z * mix, value, steep);
                    const V d = out * this->of_mix(this->y_mix, k, v) * steep;
                    add_to(dz_mix, k, v, d * z);
                    add_to(dy_mix, k, v, out * value);
                    dz = fma(d, mix, dz);
                }
                store(this->z + i, dz);
            }
        write(a.dz, this->z, row, at, count);
    }
    void add_to(R* total, int64_t k, int v, V more) const {
        R* const sum = total + (k * vectors + v) * W;
        store(sum, ::load(sum) + more);
    }
    void write(Output o, const R* from, int64_t row, Span at, int count) const {
        char* const to = o.data + dtype_size(o.dtype) * (((row * a.t + at.token) * a.h + head) * channels);
        store_tile(from, PITCH, 0, count, channels, o.dtype, to, at.direction * a.h * channels);
    }

    void finish_sequence(const Segment& segment, int64_t index) {
        const int64_t i = index * a.h + head, width = int64_t(vectors) * W;
        this->load_state(a.initial, index);  // S, of no use here, and the token before
        if (segment.stop > segment.start) {
            this->load_steps(segment.row, span(segment, a.reverse, 0), 1, false);
            add_older(of_older_end(this->older[0]));
        }
        later = -1;
        R *const mixes[] = {dmix, dz_mix, dy_mix}, *const to[] = {(R*)a.dmix, (R*)a.dz_mix, (R*)a.dy_mix};
        for (int which = 0; which < 3; which++)
            for (int64_t k = 0; k < ranks; k++)
                store_lanes(mixes[which] + k * width, to[which] + (i * ranks + k) * channels, channels, 1);
        __builtin_memcpy((R*)a.dB_bias + i * ranks * n, dB_bias, sizeof(R) * ranks * n);
        __builtin_memcpy((R*)a.dC_bias + i * ranks * n, dC_bias, sizeof(R) * ranks * n);
        ((R*)a.dD)[i] = R(dD);
        if (!a.dinitial.ssm) return;
        store_lanes(G, this->of(a.dinitial.ssm, index, channels * n), channels, n);
        __builtin_memcpy(this->of(a.dinitial.k, index, ranks * n), dk_later, sizeof(R) * ranks * n);
        __builtin_memcpy(this->of(a.dinitial.v, index, channels), dx_later, sizeof(R) * channels);
        for (int64_t j = 0; j < pairs; j++) this->of(a.dinitial.angle, index, pairs)[j] = R(RADIANS * dangle[j]);
    }
    // The adjoint of add_older_end; fills dk_later and dx_later with gradients of the token before the first.
    R of_older_end(R older) {
        R total = 0;
        for (int64_t k = 0; k < ranks; k++)
            for (int v = 0; v < vectors; v++) {
                const V mix = this->mixed(k, v), past = ::load(this->before + v * W), in = mix * past;
                V reach = {};
                for (int64_t s = 0; s < n; s++) {
                    const V g = ::load(G + (v * n + s) * W);
                    reach = fma(g, splat(this->K[k * n + s]), reach);
                    dk_later[k * n + s] += older * sum_lanes<R>(g * in);
                }
                total += sum_lanes<R>(reach * in);
                const V d = splat(older) * reach;
                add_to(dmix, k, v, d * past);
                store(dx_later + v * W, fma(d, mix, ::load(dx_later + v * W)));
            }
        return total;
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
    k.part_of_all = group * a.parts + part;
    for (int64_t head = first; head < end && head < first + HEADS_IN_PART; head++) {
        k.first_of_part = head == first;
        k.select(head);
        if (!k.sequence(sequence)) job.failed = SL_NO_MEMORY;
    }
}

}  // namespace

SL_KERNEL(trapezoid_ssd_backward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    Job job = {a, SL_OK};
    sl_parallel(a.count * a.g * a.parts, a.threads, a.cost_us(a.is_double ? 40 : 20),
                a.is_double ? backward_task<double> : backward_task<float>, &job);
    return job.failed;
}

// The gradient of the selective scan on CPUs. Nothing is kept from the forward pass: a first pass over each block of channels
// records the state before every tile; then, from the last tile to the first, the tile's states and decays are computed again,
// kept in cache, and the adjoint runs backwards over them.
//
// Sums over channels (B and C per token): lanes within a block, then blocks in order, through a buffer with one row a block.
// Sums over time and sequences (A, D, dt_bias, constant B and C): time within a sequence, sequences within a part, parts in order.
// Blocks and parts depend on d, g and the number of sequences alone, so the bits do not depend on threads.
#include <stdlib.h>

#include "cpu_scan.h"

namespace {

constexpr int64_t PARTS_OF_SEQUENCES = 32;

// Channels in a block. A function of d alone, because it orders the sums over channels; wide ones read long rows.
inline int block_width(const Args& a) { return a.d < 1024 ? 64 : a.d < 4096 ? 128 : 256; }

struct Job {
    const Args& a;
    int64_t blocks, parts;
    // Per part: (d, n) or (d) in compute type. Per block: (b·t, n) in compute type.
    char *dA, *dD, *dbias, *dBk, *dCk, *dBt, *dCt;
    int failed;
};

template <class R, bool CX>
struct Gradient : Scan<R, CX> {
    typedef Scan<R, CX> Base;
    using typename Base::V;
    using Base::a, Base::block, Base::n, Base::vectors, Base::W, Base::PARTS;
    Job& job;
    int64_t number = 0;  // of the block
    // Lanes [v][n][W]: gradient that reaches the state from later steps; sums over time.
    R *g[2], *dA[2], *dBk[2], *dCk[2], *dD, *dbias;
    // Tiles [v][PITCH][W]: d loss / d (y before the gate), what dz needs, and the sums over states.
    R *dy, *dgate, *ddrive, *dstep;
    // One run of states of one vector: [T][NT][W]; sums over the block's vectors of the same shape.
    R *past[2], *decays[2], *sum_b[2], *sum_c[2];

    static constexpr int WIDE = 4;  // the longest run of states: what it keeps fits the first-level cache
    static size_t scratch_bytes(const Args& a) {
        const int width = block_width(a);
        const size_t size = size_t(a.n) * width, runs = size_t(T + 1) * WIDE * W;
        return Base::scratch_bytes(a, width) + sizeof(R) * (8 * size + 2 * width + 4 * PITCH * width + 8 * runs) + 64 * 32;
    }

    Gradient(const Args& args, const Block& blk, Arena& arena, Job& j) : Base(args, blk, arena), job(j) {
        const size_t size = size_t(n) * blk.width, runs = size_t(T + 1) * WIDE * W;
        for (int p = 0; p < PARTS; p++) {
            R **const lanes[] = {&g[p], &dA[p], &dBk[p], &dCk[p]}, **const of_run[] = {&past[p], &decays[p], &sum_b[p], &sum_c[p]};
            for (R** x : lanes) *x = zeros(arena, size);
            for (R** x : of_run) *x = arena.take<R>(runs);
        }
        dD = zeros(arena, blk.width), dbias = zeros(arena, blk.width);
        R** const tiles[] = {&dy, &dgate, &ddrive, &dstep};
        for (R** x : tiles) *x = arena.take<R>(PITCH * blk.width);
    }
    static R* zeros(Arena& arena, size_t count) {
        R* p = arena.take<R>(count);
        __builtin_memset(p, 0, sizeof(R) * count);
        return p;
    }

    void sequence(int64_t index, R* checkpoints) {
        const Segment segment = a.segments()[index];
        const int64_t length = segment.stop - segment.start, tiles = (length + T - 1) / T, size = vectors * n * W;
        this->load_state(this->h, a.initial ? a.initial + this->state_offset(index) : nullptr);
        this->spoil_state();
        for (int64_t k = 0; k < tiles; k++) {
            for (int p = 0; p < PARTS; p++)
                __builtin_memcpy(checkpoints + (k * PARTS + p) * size, this->h[p], sizeof(R) * size);
            if (k == tiles - 1) break;
            const Span at = span(segment, a.reverse, k * T);
            this->template prepare<false>(segment.row, at, T);
            this->load_projections(segment.row, at, T, false);
            const int64_t left = length - (k + 1) * T;
            this->template advance_all<false>(
                T, {{&a.u, &a.dt}, segment.row, span(segment, a.reverse, (k + 1) * T), left < T ? int(left) : T});
        }
        this->load_state(g, a.dstate + this->state_offset(index));
        for (int64_t k = tiles - 1; k >= 0; k--) {
            for (int p = 0; p < PARTS; p++)
                __builtin_memcpy(this->h[p], checkpoints + (k * PARTS + p) * size, sizeof(R) * size);
            const int64_t left = length - k * T;
            tile(segment, span(segment, a.reverse, k * T), int(left < T ? left : T));
        }
        if (a.dinitial) this->store_state(g, (char*)a.dinitial + this->state_offset(index));
    }

    void tile(const Segment& segment, Span at, int count) {
        this->template prepare<true>(segment.row, at, count);
        this->load_projections(segment.row, at, count, true);
        through_gate(segment.row, at, count);
        for_states<WIDE>(n, [&]<int NT>(int64_t s) {
            if (a.constant_b)
                a.constant_c ? run_of_states<NT, true, true>(segment, at, count, s) : run_of_states<NT, true, false>(segment, at, count, s);
            else
                a.constant_c ? run_of_states<NT, false, true>(segment, at, count, s) : run_of_states<NT, false, false>(segment, at, count, s);
        });
        finish(segment.row, at, count);
    }

    // dy ← d loss / d (y before the gate); dgate ← dy · slope of silu.
    void through_gate(int64_t row, Span at, int count) {
        this->load_rows_of(dy, a.dy, row, at, count);
        if (!a.z.data) return;
        this->load_rows_of(this->gate, a.z, row, at, count);
        for (int v = 0; v < vectors; v++)
            for (int i = v * PITCH * W; i < (v * PITCH + count) * W; i += W) {
                V value, slope;
                silu<R>(load(this->gate + i), value, slope);
                const V x = load(dy + i);
                store(dgate + i, x * slope);
                store(dy + i, x * value);
            }
    }

    template <int NT, bool KB, bool KC>
    void run_of_states(const Segment& segment, Span at, int count, int64_t s) {
        for (int p = 0; p < PARTS; p++) {
            if (!KB) __builtin_memset(sum_b[p], 0, sizeof(R) * count * NT * W);
            if (!KC) __builtin_memset(sum_c[p], 0, sizeof(R) * count * NT * W);
        }
        for (int v = 0; v < vectors; v++) {
            const typename Base::Lanes l = this->lanes(v, s);
            recompute<NT, KB, KC>(l, count, s == 0);
            adjoint<NT, KB, KC>(l, v, s, count);
        }
        if (!KB) add_lanes<NT>(sum_b, job.dBt, segment, at, count, s);
        if (!KC) add_lanes<NT>(sum_c, job.dCt, segment, at, count, s);
    }

    // past[r] ← state before step r, decays[r] ← exp(dt A); y as in the forward pass where dz needs it.
    template <int NT, bool KB, bool KC>
    void recompute(const typename Base::Lanes& l, int count, bool first) {
        const bool out_wanted = a.z.data != nullptr;
        V hr[NT], hi[NT];
        for (int s = 0; s < NT; s++) {
            hr[s] = load(l.h[0] + s * W);
            if (CX) hi[s] = load(l.h[1] + s * W);
        }
        for (int r = 0; r < count; r++) {
            const V step = load(l.dt + r * W), drive = load(l.du + r * W);
            V out = first ? V{} : load(l.y + r * W);
#pragma GCC unroll 16
            for (int s = 0; s < NT; s++) {
                const int at = (r * NT + s) * W;
                V ar, ai;
                Base::decay(step, l, s, ar, ai);
                store(past[0] + at, hr[s]);
                store(decays[0] + at, ar);
                const V br = drive * Base::template factor<KB>(l.B[0], r, l.n, s);
                if constexpr (CX) {
                    store(past[1] + at, hi[s]);
                    store(decays[1] + at, ai);
                    const V bi = drive * Base::template factor<KB>(l.B[1], r, l.n, s);
                    const V re = fma(ar, hr[s], fnma(ai, hi[s], br));
                    hi[s] = fma(ar, hi[s], fma(ai, hr[s], bi));
                    hr[s] = re;
                    out = fnma(hi[s], Base::template factor<KC>(l.C[1], r, l.n, s), out);
                } else {
                    hr[s] = fma(ar, hr[s], br);
                }
                out = fma(hr[s], Base::template factor<KC>(l.C[0], r, l.n, s), out);
            }
            if (out_wanted) store(l.y + r * W, out);
        }
        for (int s = 0; s < NT; s++) {
            store(past[0] + (count * NT + s) * W, hr[s]);
            if (CX) store(past[1] + (count * NT + s) * W, hi[s]);
        }
    }

    SL_INLINE void add(R* p, V x) { store(p, load(p) + x); }

    // One step of one state: with G = d loss / d h[t] (real and imaginary part), the chain rule as the comments say.
    template <int NT, bool KB, bool KC>
    void adjoint(const typename Base::Lanes& l, int v, int64_t s0, int count) {
        const int64_t at_state = (v * n + s0) * W, at_tile = int64_t(v) * PITCH * W;
        V gr[NT], gi[NT];
        for (int s = 0; s < NT; s++) {
            gr[s] = load(g[0] + at_state + s * W);
            if (CX) gi[s] = load(g[1] + at_state + s * W);
        }
        V ar_sum[NT] = {}, ai_sum[NT] = {};
        for (int r = count - 1; r >= 0; r--) {
            const V step = load(l.dt + r * W), drive = load(l.du + r * W), out = load(dy + at_tile + r * W);
            V to_drive = s0 ? load(ddrive + at_tile + r * W) : V{}, to_step = s0 ? load(dstep + at_tile + r * W) : V{};
#pragma GCC unroll 16
            for (int s = 0; s < NT; s++) {
                const int at = (r * NT + s) * W, next = at + NT * W;
                const int64_t k = at_state + s * W;
                const V cr = Base::template factor<KC>(l.C[0], r, l.n, s), br = Base::template factor<KB>(l.B[0], r, l.n, s);
                gr[s] = fma(out, cr, gr[s]);
                to_drive = fma(gr[s], br, to_drive);
                R* to_b = KB ? dBk[0] + k : sum_b[0] + at;
                R* to_c = KC ? dCk[0] + k : sum_c[0] + at;
                const V hr = load(past[0] + at), ar = load(decays[0] + at);
                if constexpr (CX) {
                    // C is doubled already: dC = 2 dy conj(h), G += 2 dy conj(C); dh[t-1] = conj(a) G.
                    const V ci = Base::template factor<KC>(l.C[1], r, l.n, s), bi = Base::template factor<KB>(l.B[1], r, l.n, s);
                    const V hi = load(past[1] + at), ai = load(decays[1] + at), twice = out + out;
                    gi[s] = fnma(out, ci, gi[s]);
                    to_drive = fma(gi[s], bi, to_drive);
                    R* to_bi = KB ? dBk[1] + k : sum_b[1] + at;
                    R* to_ci = KC ? dCk[1] + k : sum_c[1] + at;
                    store(to_b, fma(gr[s], drive, load(to_b)));
                    store(to_bi, fma(gi[s], drive, load(to_bi)));
                    store(to_c, fma(twice, load(past[0] + next), load(to_c)));
                    store(to_ci, fnma(twice, load(past[1] + next), load(to_ci)));
                    const V re = fma(ar, gr[s], ai * gi[s]), im = fnma(ai, gr[s], ar * gi[s]);
                    gr[s] = re, gi[s] = im;
                    const V qr = fma(re, hr, im * hi), qi = fnma(re, hi, im * hr);  // d exponent = conj(a) G conj(h[t-1])
                    ar_sum[s] = fma(qr, step, ar_sum[s]);
                    ai_sum[s] = fma(qi, step, ai_sum[s]);
                    to_step = fma(qr, load(l.A2 + s * W), fma(qi, load(l.A2_im + s * W), to_step));
                } else {
                    store(to_b, fma(gr[s], drive, load(to_b)));
                    store(to_c, fma(out, load(past[0] + next), load(to_c)));
                    gr[s] = gr[s] * ar;
                    const V q = gr[s] * hr;  // d loss / d exponent
                    ar_sum[s] = fma(q, step, ar_sum[s]);
                    to_step = fma(q, load(l.A2 + s * W), to_step);
                }
            }
            store(ddrive + at_tile + r * W, to_drive);
            store(dstep + at_tile + r * W, to_step);
        }
        for (int s = 0; s < NT; s++) {
            store(g[0] + at_state + s * W, gr[s]);
            add(dA[0] + at_state + s * W, ar_sum[s]);
            if (CX) store(g[1] + at_state + s * W, gi[s]);
            if (CX) add(dA[1] + at_state + s * W, ai_sum[s]);
        }
    }

    // The block's row of the buffer (block, b·t, n): lanes of [T][NT][W] added up.
    template <int NT>
    void add_lanes(R* const* sums, char* buffer, const Segment& segment, Span at, int count, int64_t s0) {
        for (int r = 0; r < count; r++) {
            const int64_t token = segment.row * a.t + at.token + at.direction * r;
            R* to = (R*)buffer + ((number * a.b * a.t + token) * n + s0) * PARTS;
            for (int s = 0; s < NT; s++)
                for (int p = 0; p < PARTS; p++) to[s * PARTS + p] = sum_lanes<R>(load(sums[p] + (r * NT + s) * W));
        }
    }

    void finish(int64_t row, Span at, int count) {
        for (int v = 0; v < vectors; v++) {
            const V skip = a.D ? load(this->D + v * W) : V{};
            V d_sum = V{}, bias_sum = V{};
            for (int r = 0; r < count; r++) {
                const int i = (v * PITCH + r) * W;
                const V in = load(this->u + i), out = load(dy + i);
                const V drive = n ? load(ddrive + i) : V{}, exponent = n ? load(dstep + i) : V{};
                const V to_dt = fma(drive, in, exponent * splat(Base::LN2)) * load(this->slope + i);
                V to_u = drive * load(this->dt + i);
                V y = n ? load(this->y + i) : V{};
                if (a.D) {
                    to_u = fma(skip, out, to_u);
                    y = fma(skip, in, y);
                    d_sum = fma(out, in, d_sum);
                }
                bias_sum += to_dt;
                store(ddrive + i, to_u);
                store(dstep + i, to_dt);
                if (a.z.data) store(dgate + i, load(dgate + i) * y);
            }
            add(dD + v * W, d_sum);
            add(dbias + v * W, bias_sum);
        }
        this->store_rows_of(ddrive, a.rows(a.du), row, at, count);
        this->store_rows_of(dstep, a.rows(a.ddt), row, at, count);
        if (a.z.data) this->store_rows_of(dgate, a.rows(a.dz), row, at, count);
    }

    void store_sums(int64_t part) {
        const int64_t wide = (part * a.d + block.first) * n * PARTS, narrow = part * a.d + block.first;
        for (int p = 0; p < PARTS; p++) {
            store_lanes(dA[p], (R*)job.dA + wide + p, block.count, n, PARTS);
            if (a.constant_b) store_lanes(dBk[p], (R*)job.dBk + wide + p, block.count, n, PARTS);
            if (a.constant_c) store_lanes(dCk[p], (R*)job.dCk + wide + p, block.count, n, PARTS);
        }
        if (a.D) store_lanes(dD, (R*)job.dD + narrow, block.count, 1);
        if (a.bias) store_lanes(dbias, (R*)job.dbias + narrow, block.count, 1);
    }
};

template <class R, bool CX>
void backward_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    const int64_t part = task / job.blocks, first = part * a.count / job.parts, last = (part + 1) * a.count / job.parts;
    int64_t longest = 0;
    for (int64_t i = first; i < last; i++) {
        const Segment s = a.segments()[i];
        longest = s.stop - s.start > longest ? s.stop - s.start : longest;
    }
    typedef Gradient<R, CX> G;
    const size_t checkpoints = size_t((longest + T - 1) / T) * a.n * block_width(a) * G::PARTS;
    Arena arena = {(char*)sl_scratch(G::scratch_bytes(a) + sizeof(R) * checkpoints)};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    G gradient(a, block_at(a, task % job.blocks, block_width(a)), arena, job);
    gradient.number = task % job.blocks;
    R* saved = arena.take<R>(checkpoints);
    for (int64_t i = first; i < last; i++) gradient.sequence(i, saved);
    gradient.store_sums(part);
}

// Adds the blocks of each group for one sequence, 64 tokens a task.
constexpr int64_t TOKENS = 64;

template <class R>
void add_blocks(Job& job, const char* buffer, const Output& out, int64_t sequence, int64_t chunk) {
    const Args& a = job.a;
    const Segment segment = a.segments()[sequence];
    const int64_t width = a.n * (a.is_complex ? 2 : 1), tokens = a.b * a.t;
    const int64_t start = segment.start + chunk * TOKENS, stop = start + TOKENS < segment.stop ? start + TOKENS : segment.stop;
    R* sum = (R*)sl_scratch(sizeof(R) * width);
    if (!sum) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    for (int64_t t = start; t < stop; t++) {
        const int64_t token = segment.row * a.t + t;
        int64_t block = 0;
        for (int64_t group = 0; group < a.g; group++) {
            for (int64_t i = 0; i < width; i++) sum[i] = 0;
            for (const int64_t end = block + blocks_in_group(a, group, block_width(a)); block < end; block++) {
                const R* row = (const R*)buffer + (block * tokens + token) * width;
                for (int64_t i = 0; i < width; i++) sum[i] += row[i];
            }
            write_numbers(sum, width, out.dtype, out.data + dtype_size(out.dtype) * (token * a.g + group) * width);
        }
    }
}
template <class R>
void reduce_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const int64_t chunks = (job.a.t + TOKENS - 1) / TOKENS;
    if (job.dBt) add_blocks<R>(job, job.dBt, job.a.dB, task / chunks, task % chunks);
    if (job.dCt) add_blocks<R>(job, job.dCt, job.a.dC, task / chunks, task % chunks);
}

template <class R>
void add_parts(const char* from, void* to, int64_t parts, int64_t count) {
    if (!from) return;
    for (int64_t i = 0; i < count; i++) {
        R sum = 0;
        for (int64_t p = 0; p < parts; p++) sum += ((const R*)from)[p * count + i];
        ((R*)to)[i] = sum;
    }
}

template <class R, bool CX>
int backward(const Args& a) {
    Job job = {a, block_count(a, block_width(a)), a.count < PARTS_OF_SEQUENCES ? a.count : PARTS_OF_SEQUENCES};
    if (job.parts < 1) job.parts = 1;
    const int64_t wide = a.d * a.n * (CX ? 2 : 1);
    const size_t token_sums = sizeof(R) * job.blocks * a.b * a.t * a.n * (CX ? 2 : 1);
    const size_t sizes[] = {sizeof(R) * job.parts * wide,
                            a.D ? sizeof(R) * job.parts * a.d : 0,
                            a.bias ? sizeof(R) * job.parts * a.d : 0,
                            a.constant_b ? sizeof(R) * job.parts * wide : 0,
                            a.constant_c ? sizeof(R) * job.parts * wide : 0,
                            a.constant_b ? 0 : token_sums,
                            a.constant_c ? 0 : token_sums};
    char** const fields[] = {&job.dA, &job.dD, &job.dbias, &job.dBk, &job.dCk, &job.dBt, &job.dCt};
    size_t total = 0;
    for (size_t size : sizes) total += (size + 63) / 64 * 64;
    Arena arena = {(char*)malloc(total + 64)};
    if (!arena.memory) return SL_NO_MEMORY;
    for (int i = 0; i < 7; i++) *fields[i] = sizes[i] ? arena.take<char>(sizes[i]) : nullptr;
    sl_parallel(job.blocks * job.parts, a.threads, 3 * a.cost_us(), backward_task<R, CX>, &job);
    if (!job.failed && (job.dBt || job.dCt)) {
        const int64_t chunks = (a.t + TOKENS - 1) / TOKENS;
        sl_parallel(a.count * chunks, a.threads, 1e-9 * double(token_sums) * 200, reduce_task<R>, &job);
    }
    add_parts<R>(job.dA, a.dA, job.parts, wide);
    add_parts<R>(job.dD, a.dD, job.parts, a.d);
    add_parts<R>(job.dbias, a.dbias, job.parts, a.d);
    add_parts<R>(job.dBk, a.dB.data, job.parts, wide);
    add_parts<R>(job.dCk, a.dC.data, job.parts, wide);
    free(arena.memory);
    return job.failed;
}

}  // namespace

SL_KERNEL(selective_scan_backward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    if (a.is_double) return a.is_complex ? backward<double, true>(a) : backward<double, false>(a);
    return a.is_complex ? backward<float, true>(a) : backward<float, false>(a);
}

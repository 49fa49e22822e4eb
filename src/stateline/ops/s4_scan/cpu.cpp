// s4_scan on CPUs: a linear time-invariant system in chunks of q steps, and its gradient. What the tables mean is told in chunked.py.
// Lanes are channels, so that inputs and outputs are read where they lie. All work is products of 4 table rows with 4 chunks, whose
// sixteen sums stay in registers: from inputs to states, from states and inputs to outputs, and the same turned round.
// Suffixes: c read-out, h channel, n complex state, s real number of a state, l, j step in a chunk, row: a chunk of a sequence.
#include <stdlib.h>

#include "pool.h"
#include "tile.h"

namespace {

constexpr int GROUP = 64;  // chunks whose states are held at once; for gradients, those of one sequence if it has more

// Laid out as Python packs it: every field is eight bytes. Pointers that do not apply are null.
struct Args {
    int64_t b, t, h, n, c, q;
    const int64_t* table;
    int64_t count, reverse, threads, is_double;
    Rows u;
    const char *taps, *read, *write, *powers;  // (c, h, q), (c, h, q, s), (h, q, s), (q + 1, h, n, 2)
    const char* initial;                       // (count, h, s)
    Rows y;                                    // (b, t, c·h): written, or its gradient read
    char* state;                               // (count, h, s): written, or its gradient read
    // gradients
    Rows du;
    char *dtaps, *dread, *dwrite, *dpowers, *dinitial;
    char* prepared;  // null, or the tables of every block as a forward pass arranges them
    Segments segments() const { return {table, count, b, t, 0}; }
};

struct Row {
    int64_t sequence, first;
    int count;
    bool last;
};

struct Job {
    const Args& a;
    int failed;
};

template <class R>
struct Chunks {
    static constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;

    const Args& a;
    int64_t first;  // channel
    int lanes, q, s, sp, c;
    R *write, *read, *taps;            // [sp/4][q][4][W], [c][q/4][sp][4][W], [c][q + 8][W] with four zeros before
    R *turned_read, *turned_write, *turned_taps;  // [c][sp/4][q][4][W], [q/4][sp][4][W], [c][q + 8][W]: backwards, zeros after
    R *dread, *dwrite, *dtaps, *dpowers;          // as read, as turned_write, [c][q][W], [q + 1][s][W]
    R *full, *part, *now;                         // [s][W]: powers of a whole chunk and of another; a state
    R *u, *aligned, *y, *more;                    // [4][q + 4][W] with four zeros before; [4][q][W]; [4][c][q][W]; [4][q][W]
    Row* rows;
    R *states, *forces;                           // [row][sp][W]: before a chunk; what the chunk adds, or the gradient of that

    static int64_t most_rows(const Args& a, bool gradient) {
        int64_t longest = 0;
        if (!gradient) {  // no more than there are: short calls should not walk through much memory
            const int64_t most = a.b * (a.t / a.q) + a.count;
            return (most < GROUP ? most : GROUP) + 4;
        }
        for (int64_t i = 0; i < a.count; i++) {
            const Segment g = a.segments()[i];
            const int64_t chunks = g.stop - g.start > a.q ? (g.stop - g.start + a.q - 1) / a.q : 1;
            longest = chunks > longest ? chunks : longest;
        }
        return GROUP + longest + 4;
    }
    static size_t bytes(const Args& a, bool gradient) {
        const size_t q = a.q, s = 2 * a.n, sp = (s + 3) / 4 * 4, c = a.c, rows = most_rows(a, gradient);
        size_t vectors = q * sp * (1 + c) + c * (q + 8) + 3 * sp + 4 * (2 * q + 4 + c * q + q) + rows * sp * 2;
        if (gradient) vectors += 2 * q * sp * (1 + c) + c * (2 * q + 8) + (q + 1) * s;
        return vectors * W * sizeof(R) + rows * sizeof(Row) + 64 * 32;
    }

    Chunks(const Args& args, int64_t block, Arena& arena, bool gradient) : a(args), first(block * W) {
        lanes = int(a.h - first < W ? a.h - first : W);
        q = int(a.q), s = int(2 * a.n), sp = (s + 3) / 4 * 4, c = int(a.c);
        const size_t table = size_t(q) * sp * W;
        const bool ready = !gradient && a.prepared;
        if (ready) {
            write = (R*)(a.prepared + block * prepared_bytes(a)), read = write + table, taps = read + table * c;
            full = taps + size_t(c) * (q + 8) * W;
        } else {
            write = zeros(arena, table), read = zeros(arena, table * c), taps = zeros(arena, size_t(c) * (q + 8) * W);
            full = zeros(arena, size_t(sp) * W);
        }
        part = zeros(arena, size_t(sp) * W), now = zeros(arena, size_t(sp) * W);
        u = zeros(arena, size_t(4) * (q + 4) * W), aligned = arena.take<R>(size_t(4) * q * W);
        y = arena.take<R>(size_t(4) * c * q * W), more = arena.take<R>(size_t(4) * q * W);
        const size_t most = size_t(most_rows(a, gradient));
        rows = (Row*)arena.take<char>(most * sizeof(Row));
        states = arena.take<R>(most * sp * W), forces = arena.take<R>(most * sp * W);
        if (gradient) {
            __builtin_memset(states, 0, sizeof(R) * most * sp * W), __builtin_memset(forces, 0, sizeof(R) * most * sp * W);
            turned_read = zeros(arena, table * c), turned_write = zeros(arena, table), turned_taps = zeros(arena, size_t(c) * (q + 8) * W);
            dread = zeros(arena, table * c), dwrite = zeros(arena, table), dtaps = zeros(arena, size_t(c) * q * W);
            dpowers = zeros(arena, size_t(q + 1) * s * W);
        }
        if (!ready) load_tables(gradient), load_powers(full, q);
    }
    // Of a block's tables. Python sets aside as much for blocks of 16 channels, which is no less for narrower ones.
    static int64_t prepared_bytes(const Args& a) {
        const int64_t sp = (2 * a.n + 3) / 4 * 4;
        return (a.q * sp * (1 + a.c) + a.c * (a.q + 8) + sp) * int64_t(W * sizeof(R));
    }
    void prepare(int64_t block) const {
        R* to = (R*)(a.prepared + block * prepared_bytes(a));
        const size_t table = size_t(q) * sp * W;
        __builtin_memcpy(to, write, sizeof(R) * table);
        __builtin_memcpy(to + table, read, sizeof(R) * table * c);
        __builtin_memcpy(to + table * (1 + c), taps, sizeof(R) * c * (q + 8) * W);
        __builtin_memcpy(to + table * (1 + c) + size_t(c) * (q + 8) * W, full, sizeof(R) * sp * W);
    }
    static R* zeros(Arena& arena, size_t count) {
        R* p = arena.take<R>(count);
        __builtin_memset(p, 0, count * sizeof(R));
        return p;
    }
    // Places in the tables' two arrangements: sums over steps, sums over states.
    int64_t by_state(int l, int x) const { return (int64_t(x / 4) * q + l) * 4 + x % 4; }
    int64_t by_step(int l, int x) const { return (int64_t(l / 4) * sp + x) * 4 + l % 4; }

    void load_tables(bool gradient) {
        for (int i = 0; i < lanes; i++) {
            const R* w = (const R*)a.write + (first + i) * q * s;
            for (int l = 0; l < q; l++)
                for (int x = 0; x < s; x++) {
                    write[by_state(l, x) * W + i] = w[l * s + x];
                    if (gradient) turned_write[by_step(l, x) * W + i] = w[l * s + x];
                }
            for (int k = 0; k < c; k++) {
                const R* r = (const R*)a.read + (k * a.h + first + i) * q * s;
                const R* p = (const R*)a.taps + (k * a.h + first + i) * q;
                R *to = read + int64_t(k) * q * sp * W, *back = turned_read + int64_t(k) * q * sp * W;
                for (int l = 0; l < q; l++) {
                    taps[(k * (q + 8) + 4 + l) * W + i] = p[l];
                    if (gradient) turned_taps[(k * (q + 8) + l) * W + i] = p[q - 1 - l];
                    for (int x = 0; x < s; x++) {
                        to[by_step(l, x) * W + i] = r[l * s + x];
                        if (gradient) back[by_state(l, x) * W + i] = r[l * s + x];
                    }
                }
            }
        }
    }
    void load_powers(R* to, int count) const {
        const R* p = (const R*)a.powers + (int64_t(count) * a.h + first) * s;
        for (int i = 0; i < lanes; i++)
            for (int x = 0; x < s; x++) to[x * W + i] = p[i * s + x];
    }
    const R* powers_of(int count) const {
        if (count == q) return full;
        load_powers(part, count);
        return part;
    }

    // sum[i][r] += Σ_k a[k·step + i] · b[r][k], i and r from 0 to 3
    SL_INLINE void product(V (&sum)[4][4], const R* x, int64_t step, const R* b0, const R* b1, const R* b2, const R* b3, int count) {
        for (int k = 0; k < count; k++, x += step, b0 += W, b1 += W, b2 += W, b3 += W) {
            const V r0 = load(b0), r1 = load(b1), r2 = load(b2), r3 = load(b3);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const V m = load(x + i * W);
                sum[i][0] = fma(m, r0, sum[i][0]), sum[i][1] = fma(m, r1, sum[i][1]);
                sum[i][2] = fma(m, r2, sum[i][2]), sum[i][3] = fma(m, r3, sum[i][3]);
            }
        }
    }
    static void keep(V (&sum)[4][4], R* to, int64_t apart, bool add) {
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < 4; i++) {
                R* p = to + r * apart + i * W;
                store(p, add ? load(p) + sum[i][r] : sum[i][r]);
            }
    }

    // The next rows from token `at` of `sequence` on, which move: until there are GROUP, and then to a sequence's end if `whole`.
    int gather(int64_t& sequence, int64_t& at, bool whole) {
        int count = 0;
        while (sequence < a.count && (count < GROUP || (whole && at > 0))) {
            const Segment g = a.segments()[sequence];
            const int64_t left = g.stop - g.start - at;
            rows[count++] = {sequence, at, int(left < q ? left : q), left <= q};
            at += q;
            if (left <= q) sequence++, at = 0;
        }
        for (int i = 0; i < 4; i++) {  // fills the last four up
            rows[count + i] = {-1, 0, 0, false};
            __builtin_memset(states + int64_t(count + i) * sp * W, 0, sizeof(R) * sp * W);
        }
        return count;
    }
    // The tokens of a chunk to steps `at`… of a tile of q; the others are zero.
    void load_steps(R* tile, const Row& row, const Rows& from, int64_t channel, int at) const {
        if (row.count < q) __builtin_memset(tile, 0, sizeof(R) * q * W);
        if (row.sequence < 0 || !row.count) return;
        const Segment g = a.segments()[row.sequence];
        const Span w = span(g, a.reverse, row.first);
        load_tile(tile, q, at, row.count, lanes, from.dtype, from.at(g.row, w.token, channel), w.direction * from.time);
    }
    void store_steps(const R* tile, const Row& row, const Rows& to, int64_t channel) const {
        if (row.sequence < 0 || !row.count) return;
        const Segment g = a.segments()[row.sequence];
        const Span w = span(g, a.reverse, row.first);
        store_tile(tile, q, 0, row.count, lanes, to.dtype, to.at(g.row, w.token, channel), w.direction * to.time);
    }
    void load_state(R* to, const char* from, int64_t sequence) const {
        const R* p = (const R*)from + (sequence * a.h + first) * s;
        for (int i = 0; i < lanes; i++)
            for (int x = 0; x < s; x++) to[x * W + i] = p[i * s + x];
    }
    void store_state(const R* from, char* to, int64_t sequence) const {
        R* p = (R*)to + (sequence * a.h + first) * s;
        for (int i = 0; i < lanes; i++)
            for (int x = 0; x < s; x++) p[i * s + x] = from[x * W + i];
    }

    // What the inputs of every row add to the state after it.
    void forced(int count) {
        for (int i = 0; i < count; i += 4) {
            for (int r = 0; r < 4; r++) load_steps(aligned + r * q * W, rows[i + r], a.u, first, q - rows[i + r].count);
            for (int x = 0; x < sp; x += 4) {
                V sum[4][4] = {};
                product(sum, write + int64_t(x) * q * W, 4 * W, aligned, aligned + q * W, aligned + 2 * q * W, aligned + 3 * q * W, q);
                keep(sum, forces + (int64_t(i) * sp + x) * W, int64_t(sp) * W, false);
            }
        }
    }
    // The states before every row.
    void run(int count, bool finish) {
        for (int i = 0; i < count; i++) {
            const Row& row = rows[i];
            if (row.first == 0) {
                if (a.initial)
                    load_state(now, a.initial, row.sequence);
                else
                    __builtin_memset(now, 0, sizeof(R) * sp * W);
            }
            R *before = states + int64_t(i) * sp * W, *force = forces + int64_t(i) * sp * W;
            const R* p = powers_of(row.count);
            for (int x = 0; x < s; x += 2) {
                const V re = load(now + x * W), im = load(now + (x + 1) * W), pr = load(p + x * W), pi = load(p + (x + 1) * W);
                store(before + x * W, re), store(before + (x + 1) * W, im);
                store(now + x * W, fma(pr, re, fnma(pi, im, load(force + x * W))));
                store(now + (x + 1) * W, fma(pr, im, fma(pi, re, load(force + (x + 1) * W))));
            }
            if (row.last && finish) store_state(now, a.state, row.sequence);
        }
    }
    void outputs(int count) {
        const int64_t apart = int64_t(q + 4) * W;
        for (int i = 0; i < count; i += 4) {
            for (int r = 0; r < 4; r++) load_steps(u + r * apart + 4 * W, rows[i + r], a.u, first, 0);
            const R *in = u + 4 * W, *x = states + int64_t(i) * sp * W;
            for (int k = 0; k < c; k++) {
                for (int l = 0; l < q; l += 4) {
                    V sum[4][4] = {};
                    const R* from = read + (int64_t(k) * q + l) * sp * W;
                    product(sum, from, 4 * W, x, x + sp * W, x + 2 * sp * W, x + 3 * sp * W, s);
                    product(sum, taps + (int64_t(k) * (q + 8) + 4 + l) * W, -W, in, in + apart, in + 2 * apart, in + 3 * apart, l + 4);
                    keep(sum, y + l * W, int64_t(q) * W, false);
                }
                for (int r = 0; r < 4; r++) store_steps(y + r * q * W, rows[i + r], a.y, k * a.h + first);
            }
        }
    }
    void forward() {
        for (int64_t sequence = 0, at = 0; sequence < a.count;) {
            const int count = gather(sequence, at, false);
            forced(count), run(count, true), outputs(count);
        }
    }

    // ---- gradients

    // From those of outputs to those of the states before (in `forces`), the inputs and the tables of outputs.
    void outputs_back(int i) {
        const int64_t apart = int64_t(q + 4) * W, whole = int64_t(c) * q * W;
        for (int r = 0; r < 4; r++) {
            load_steps(u + r * apart + 4 * W, rows[i + r], a.u, first, 0);
            for (int k = 0; k < c; k++) load_steps(y + r * whole + k * q * W, rows[i + r], a.y, k * a.h + first, 0);
        }
        for (int k = 0; k < c; k++) {
            const R *g = y + k * q * W, *x = states + int64_t(i) * sp * W;
            for (int o = 0; o < sp; o += 4) {
                V sum[4][4] = {};
                product(sum, turned_read + (int64_t(k) * sp + o) * q * W, 4 * W, g, g + whole, g + 2 * whole, g + 3 * whole, q);
                keep(sum, forces + (int64_t(i) * sp + o) * W, int64_t(sp) * W, k > 0);
            }
            outer(dread + int64_t(k) * q * sp * W, g, whole, x);
            for (int o = 0; o < q; o += 4) taps_back(k, o, g, whole);
        }
    }
    // table[l][x] += Σ_r g[r][l] · x[r][x], arranged by step
    void outer(R* table, const R* g, int64_t apart, const R* x) const {
        for (int l = 0; l < q; l += 4)
            for (int o = 0; o < s; o += 2) {
                R* to = table + (int64_t(l) * sp + o * 4) * W;
                V sum[2][4];
                for (int i = 0; i < 8; i++) sum[i / 4][i % 4] = load(to + i * W);
                for (int r = 0; r < 4; r++) {
                    const V x0 = load(x + (int64_t(r) * sp + o) * W), x1 = load(x + (int64_t(r) * sp + o + 1) * W);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        const V m = load(g + r * apart + (l + i) * W);
                        sum[0][i] = fma(m, x0, sum[0][i]), sum[1][i] = fma(m, x1, sum[1][i]);
                    }
                }
                for (int i = 0; i < 8; i++) store(to + i * W, sum[i / 4][i % 4]);
            }
    }
    // dtaps[o…o+3] += Σ_l g[l] u[l − o]
    void taps_back(int k, int o, const R* g, int64_t apart) {
        V sum[4] = {};
        for (int r = 0; r < 4; r++)
            for (int l = o; l < q; l += 4) {
                const R* in = u + (int64_t(r) * (q + 4) + 4 + l - o - 3) * W;
                V w[7];
#pragma GCC unroll 7
                for (int i = 0; i < 7; i++) w[i] = load(in + i * W);
#pragma GCC unroll 4
                for (int d = 0; d < 4; d++) {
                    const V m = load(g + r * apart + (l + d) * W);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) sum[i] = fma(m, w[d - i + 3], sum[i]);
                }
            }
        for (int i = 0; i < 4; i++) {
            R* to = dtaps + (k * q + o + i) * W;
            store(to, load(to) + sum[i]);
        }
    }
    // Backwards from row to row: `forces` holds gradients of the states before, and then those of what the inputs add.
    void run_back(int count) {
        for (int i = count - 1; i >= 0; i--) {
            const Row& row = rows[i];
            if (row.last) load_state(now, a.state, row.sequence);
            const R *p = powers_of(row.count), *before = states + int64_t(i) * sp * W;
            R *g = forces + int64_t(i) * sp * W, *dp = dpowers + int64_t(row.count) * s * W;
            for (int x = 0; x < s; x += 2) {
                const V re = load(now + x * W), im = load(now + (x + 1) * W), pr = load(p + x * W), pi = load(p + (x + 1) * W);
                const V br = load(before + x * W), bi = load(before + (x + 1) * W);
                store(dp + x * W, fma(re, br, fma(im, bi, load(dp + x * W))));
                store(dp + (x + 1) * W, fma(im, br, fnma(re, bi, load(dp + (x + 1) * W))));
                store(now + x * W, fma(pr, re, fma(pi, im, load(g + x * W))));
                store(now + (x + 1) * W, fma(pr, im, fnma(pi, re, load(g + (x + 1) * W))));
                store(g + x * W, re), store(g + (x + 1) * W, im);
            }
            if (row.first == 0 && a.dinitial) store_state(now, a.dinitial, row.sequence);
        }
    }
    void inputs_back(int i) {
        const int64_t whole = int64_t(c) * q * W;
        const R* x = forces + int64_t(i) * sp * W;
        for (int r = 0; r < 4; r++) {
            load_steps(aligned + r * q * W, rows[i + r], a.u, first, q - rows[i + r].count);
            for (int k = 0; k < c; k++) load_steps(y + r * whole + k * q * W, rows[i + r], a.y, k * a.h + first, 0);
        }
        outer(dwrite, aligned, int64_t(q) * W, x);
        for (int l = 0; l < q; l += 4) {  // what the states say, at the end of the tile as the inputs were
            V sum[4][4] = {};
            product(sum, turned_write + int64_t(l) * sp * W, 4 * W, x, x + sp * W, x + 2 * sp * W, x + 3 * sp * W, s);
            keep(sum, more + l * W, int64_t(q) * W, false);
        }
        for (int j = 0; j < q; j += 4) {
            V sum[4][4] = {};
            for (int k = 0; k < c; k++) {
                const R* g = y + (k * q + j) * W;
                product(sum, turned_taps + (int64_t(k) * (q + 8) + q - 1) * W, -W, g, g + whole, g + 2 * whole, g + 3 * whole, q - j);
            }
            keep(sum, aligned + j * W, int64_t(q) * W, false);
        }
        for (int r = 0; r < 4; r++) {
            R *to = aligned + r * q * W, *from = more + (r * q + q - rows[i + r].count) * W;
            for (int l = 0; l < rows[i + r].count; l++) store(to + l * W, load(to + l * W) + load(from + l * W));
            store_steps(to, rows[i + r], a.du, first);
        }
    }
    void backward() {
        for (int64_t sequence = 0, at = 0; sequence < a.count;) {
            const int count = gather(sequence, at, true);
            forced(count), run(count, false);
            for (int r = count; r < count + 4; r++) __builtin_memset(states + int64_t(r) * sp * W, 0, sizeof(R) * sp * W);
            for (int i = 0; i < count; i += 4) outputs_back(i);
            run_back(count);
            for (int r = count; r < count + 4; r++) __builtin_memset(forces + int64_t(r) * sp * W, 0, sizeof(R) * sp * W);
            for (int i = 0; i < count; i += 4) inputs_back(i);
        }
        store_tables();
    }
    void store_tables() const {
        for (int i = 0; i < lanes; i++) {
            R* w = (R*)a.dwrite + (first + i) * q * s;
            for (int l = 0; l < q; l++)
                for (int x = 0; x < s; x++) w[l * s + x] = dwrite[by_step(l, x) * W + i];
            for (int k = 0; k < c; k++) {
                R *r = (R*)a.dread + (k * a.h + first + i) * q * s, *p = (R*)a.dtaps + (k * a.h + first + i) * q;
                for (int l = 0; l < q; l++) {
                    p[l] = dtaps[(k * q + l) * W + i];
                    for (int x = 0; x < s; x++) r[l * s + x] = dread[(int64_t(k) * q * sp + by_step(l, x)) * W + i];
                }
            }
            for (int l = 0; l <= q; l++)
                for (int x = 0; x < s; x++) ((R*)a.dpowers)[(int64_t(l) * a.h + first + i) * s + x] = dpowers[(int64_t(l) * s + x) * W + i];
        }
    }
};

enum Pass { FORWARD, BACKWARD, PREPARE };

template <class R, Pass PASS>
void task(void* context, int64_t block) {
    Job& job = *(Job*)context;
    Args a = job.a;
    if (PASS == PREPARE) a.prepared = nullptr;
    Arena arena = {(char*)sl_scratch(Chunks<R>::bytes(a, PASS == BACKWARD))};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    Chunks<R> chunks(a, block, arena, PASS == BACKWARD);
    if (PASS == PREPARE)
        a.prepared = job.a.prepared, chunks.prepare(block);
    else
        PASS == BACKWARD ? chunks.backward() : chunks.forward();
}

template <Pass PASS>
int all(const Args& a) {
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    Job job = {a, 0};
    const double tokens = double(a.b) * double(a.t) + double(a.q), work = double(a.q) / 2 + 4 * double(a.n);
    const int64_t blocks = a.is_double ? (a.h + Simd<double>::W - 1) / Simd<double>::W : (a.h + Simd<float>::W - 1) / Simd<float>::W;
    const double cost = (PASS == BACKWARD ? 1.5e-4 : 5e-5) * tokens * double(a.h) * work * double(a.c);
    sl_parallel(blocks, a.threads, cost, a.is_double ? task<double, PASS> : task<float, PASS>, &job);
    return job.failed;
}

}  // namespace

SL_KERNEL(s4_scan_forward) { return all<FORWARD>(*(const Args*)args); }
SL_KERNEL(s4_scan_backward) { return all<BACKWARD>(*(const Args*)args); }
SL_KERNEL(s4_scan_prepare) { return all<PREPARE>(*(const Args*)args); }

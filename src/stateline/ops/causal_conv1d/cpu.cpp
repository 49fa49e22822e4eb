// The causal depthwise convolution on CPUs: forward, gradient, one step. The definition is in reference.py.
// A tile holds the inputs of T steps and the k-1 before them, so that the state, short sequences and direction are all one case.
// Suffixes: b batch, t time step, d channel, k taps.
#include <stdlib.h>

#include "pool.h"
#include "tile.h"

namespace {

constexpr int T = 32;       // steps in a tile
constexpr int PITCH = pitch_of(T);
constexpr int CB = 64;      // channels in a block
constexpr int CHUNK = 256;  // steps in a task of the forward pass
constexpr int64_t PARTS_OF_SEQUENCES = 32;

struct Output {
    char* data;
    int64_t dtype;
};

// Laid out as Python packs it: every field is eight bytes. Pointers that do not apply are null.
struct Args {
    int64_t b, t, d, k;
    const int64_t* table;
    int64_t count, reverse, threads, is_double, silu;
    Rows x;
    const void *weight, *bias;  // (d, k), (d)
    char* initial;              // (count, k-1, d); the step: the slots, changed in place
    Output y;
    char* state;
    // step
    const int64_t* index;
    int64_t slots, slot_stride;
    // gradients
    Rows dy;
    const char* dstate;
    Output dx;
    void *dweight, *dbias, *dinitial;

    Rows rows(Output o) const { return {o.data, o.dtype, t * d, d}; }
    Segments segments() const { return {table, count, b, t, reverse}; }
    int64_t blocks() const { return (d + CB - 1) / CB; }
    double cost_us() const { return 2e-4 * double(b) * double(t) * double(d) * (4 + double(k)); }
};

struct Job {
    const Args& a;
    int64_t parts;
    char *dweight, *dbias;  // per part: (d, k), (d)
    int failed;
};

template <class R>
struct Conv {
    static constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;

    const Args& a;
    int64_t first;  // channel
    int channels, vectors, k, wide;
    R *weight, *bias;  // [v][k][W], [v][W]
    R *x, *y;          // [v][T + k-1][W], [v][PITCH][W]

    static size_t scratch_bytes(const Args& a) { return sizeof(R) * CB * size_t(2 * a.k + 1 + T + a.k + 2 + PITCH) + 64 * 8; }

    Conv(const Args& args, int64_t block, Arena& arena) : a(args), first(block * CB) {
        channels = int(a.d - first < CB ? a.d - first : CB);
        vectors = (channels + W - 1) / W;
        k = int(a.k), wide = T + k - 1;
        weight = arena.take<R>(size_t(k) * CB), bias = arena.take<R>(CB);
        x = arena.take<R>(size_t(wide) * CB), y = arena.take<R>(PITCH * CB);
        load_lanes(weight, (const R*)a.weight + first * k, channels, k);
        if (a.bias) load_lanes(bias, (const R*)a.bias + first, channels, 1);
    }
    const R* state_row(const char* state, int64_t sequence, int64_t j) const {
        return (const R*)state + (sequence * (k - 1) + j) * a.d + first;
    }

    // Rows [from, from + count) of the inputs, the state being rows -(k-1) … -1, to steps `to`… of the tile.
    void load_inputs(R* tile, int steps, const Segment& segment, int64_t sequence, int64_t from, int count) const {
        int done = 0;
        for (; done < count && from + done < 0; done++) {
            if (a.initial)
                load_rows(tile, steps, done, 1, channels, state_row(a.initial, sequence, from + done + k - 1), 0);
            else
                for (int v = 0; v < vectors; v++) store(tile + (v * steps + done) * W, V{});
        }
        if (done == count) return;
        const Span at = span(segment, a.reverse, from + done);
        load_tile(tile, steps, done, count - done, channels, a.x.dtype, a.x.at(segment.row, at.token, first), at.direction * a.x.time);
    }

    template <int K>
    void convolve(int count) const {
        const int taps = K ? K : k;
        for (int v = 0; v < vectors; v++) {
            const V start = a.bias ? load(bias + v * W) : V{};
            const R *in = x + v * wide * W, *w = weight + v * k * W;
            for (int r = 0; r < count; r++) {
                V sum = start;
                for (int j = 0; j < taps; j++) sum = fma(load(w + j * W), load(in + (r + j) * W), sum);
                store(y + (v * PITCH + r) * W, sum);
            }
        }
    }
    void convolve_any(int count) const {
        k == 4 ? convolve<4>(count) : k == 3 ? convolve<3>(count) : k == 2 ? convolve<2>(count) : convolve<0>(count);
    }
    void activate(int count) const {
        if (!a.silu) return;
        for (int v = 0; v < vectors; v++)
            for (int i = v * PITCH * W; i < (v * PITCH + count) * W; i += W) store(y + i, silu<R>(load(y + i)));
    }

    // The last k-1 inputs, one at a time: they may lie partly in the initial state.
    void final_state(const Segment& segment, int64_t sequence) const {
        for (int j = 0; j < k - 1; j++) {
            load_inputs(x, wide, segment, sequence, segment.stop - segment.start - (k - 1) + j, 1);
            store_rows(x, wide, 0, 1, channels, (R*)state_row(a.state, sequence, j), 0);
        }
    }
};

template <class R>
void forward_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    const int64_t chunks = a.t > CHUNK ? (a.t + CHUNK - 1) / CHUNK : 1;
    const int64_t block = task % a.blocks(), chunk = task / a.blocks() % chunks, sequence = task / a.blocks() / chunks;
    const Segment segment = a.segments()[sequence];
    const int64_t length = segment.stop - segment.start;
    if (chunk && chunk * CHUNK >= length) return;
    Arena arena = {(char*)sl_scratch(Conv<R>::scratch_bytes(a))};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    const Conv<R> conv(a, block, arena);
    const int64_t end = (chunk + 1) * CHUNK < length ? (chunk + 1) * CHUNK : length;
    for (int64_t first = chunk * CHUNK; first < end; first += T) {
        const int count = int(end - first < T ? end - first : T);
        conv.load_inputs(conv.x, conv.wide, segment, sequence, first - (conv.k - 1), count + conv.k - 1);
        conv.convolve_any(count);
        conv.activate(count);
        const Rows y = a.rows(a.y);
        const Span at = span(segment, a.reverse, first);
        store_tile(conv.y, PITCH, 0, count, conv.channels, y.dtype, y.at(segment.row, at.token, conv.first), at.direction * y.time);
    }
    if (chunk == 0) conv.final_state(segment, sequence);
}

template <class R>
struct Gradient : Conv<R> {
    typedef Conv<R> Base;
    using typename Base::V;
    using Base::a, Base::k, Base::vectors, Base::channels, Base::first, Base::W, Base::wide, Base::x, Base::y, Base::weight;
    R *g, *dx;              // [v][T + k-1][W]: d loss / d (before silu), then that of the k-1 steps after the tile; [v][PITCH][W]
    R *dweight, *dbias;     // [v][k][W], [v][W]

    static size_t scratch_bytes(const Args& a) { return Base::scratch_bytes(a) + sizeof(R) * CB * size_t(T + PITCH + 3 * a.k) + 64 * 8; }

    Gradient(const Args& args, int64_t block, Arena& arena) : Base(args, block, arena) {
        g = arena.take<R>(size_t(wide) * CB), dx = arena.take<R>(PITCH * CB);
        dweight = arena.take<R>(size_t(k) * CB), dbias = arena.take<R>(CB);
        __builtin_memset(dweight, 0, sizeof(R) * k * CB);
        __builtin_memset(dbias, 0, sizeof(R) * CB);
    }

    void sequence(int64_t index) {
        const Segment segment = a.segments()[index];
        const int64_t length = segment.stop - segment.start, tiles = (length + T - 1) / T;
        __builtin_memset(g, 0, sizeof(R) * wide * CB);
        for (int64_t i = tiles - 1; i >= 0; i--) {
            const int count = int(length - i * T < T ? length - i * T : T);
            tile(segment, index, i * T, count, length);
            // The first k-1 rows become those after the next, earlier tile, which is full.
            for (int v = 0; v < vectors; v++)
                __builtin_memmove(g + (v * wide + T) * W, g + v * wide * W, sizeof(R) * (k - 1) * W);
        }
        if (a.dinitial) into_initial(index, length);
    }

    // Gradient of the final state's row that input `e` became, or null.
    const R* from_state(int64_t index, int64_t length, int64_t e) const {
        const int64_t j = e - (length - (k - 1));
        return j < 0 ? nullptr : this->state_row(a.dstate, index, j);
    }

    void tile(const Segment& segment, int64_t index, int64_t start, int count, int64_t length) {
        this->load_inputs(x, wide, segment, index, start - (k - 1), count + k - 1);
        const Span at = span(segment, a.reverse, start);
        load_tile(g, wide, 0, count, channels, a.dy.dtype, a.dy.at(segment.row, at.token, first), at.direction * a.dy.time);
        if (a.silu) this->convolve_any(count);
        for (int v = 0; v < vectors; v++) {
            R *gv = g + v * wide * W, *bias_sum = dbias + v * W;
            const R *in = x + v * wide * W, *w = weight + v * k * W;
            V sum = load(bias_sum);
            for (int r = 0; r < count; r++) {
                V out = load(gv + r * W);
                if (a.silu) {
                    V value, slope;
                    silu<R>(load(y + (v * PITCH + r) * W), value, slope);
                    out = out * slope;
                    store(gv + r * W, out);
                }
                sum += out;
            }
            store(bias_sum, sum);
            for (int j = 0; j < k; j++) {
                V total = load(dweight + (v * k + j) * W);
                for (int r = 0; r < count; r++) total = fma(load(gv + r * W), load(in + (r + j) * W), total);
                store(dweight + (v * k + j) * W, total);
            }
            for (int r = 0; r < count; r++) {
                V total = V{};
                for (int j = 0; j < k; j++) total = fma(load(w + j * W), load(gv + (r + k - 1 - j) * W), total);
                store(dx + (v * PITCH + r) * W, total);
            }
        }
        for (int r = 0; r < count; r++)
            if (const R* extra = from_state(index, length, start + r)) add_row(r, extra);
        const Rows to = a.rows(a.dx);
        store_tile(dx, PITCH, 0, count, channels, to.dtype, to.at(segment.row, at.token, first), at.direction * to.time);
    }

    void add_row(int r, const R* extra) {
        for (int v = 0; v < vectors; v++) {
            R* to = dx + (v * PITCH + r) * W;
            const int lanes = channels - v * W < W ? channels - v * W : W;
            store(to, load(to) + load_some<R>(extra + v * W, lanes));
        }
    }

    // After the last tile, the k-1 rows at T of g are those of the first steps.
    void into_initial(int64_t index, int64_t length) {
        for (int i = 0; i < k - 1; i++) {
            for (int v = 0; v < vectors; v++) {
                V total = V{};
                for (int j = 0; j <= i; j++)
                    total = fma(load(weight + (v * k + j) * W), load(g + (v * wide + T + i - j) * W), total);
                store(dx + v * PITCH * W, total);
            }
            if (const R* extra = from_state(index, length, i - (k - 1))) add_row(0, extra);
            store_rows(dx, PITCH, 0, 1, channels, (R*)this->state_row((const char*)a.dinitial, index, i), 0);
        }
    }
};

template <class R>
void backward_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    Arena arena = {(char*)sl_scratch(Gradient<R>::scratch_bytes(a))};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    Gradient<R> gradient(a, task % a.blocks(), arena);
    const int64_t part = task / a.blocks();
    for (int64_t i = part * a.count / job.parts; i < (part + 1) * a.count / job.parts; i++) gradient.sequence(i);
    const int64_t at = part * a.d + gradient.first;
    store_lanes(gradient.dweight, (R*)job.dweight + at * a.k, gradient.channels, a.k);
    store_lanes(gradient.dbias, (R*)job.dbias + at, gradient.channels, 1);
}

template <class R>
void add_parts(const char* from, void* to, int64_t parts, int64_t count) {
    if (!to) return;
    for (int64_t i = 0; i < count; i++) {
        R sum = 0;
        for (int64_t p = 0; p < parts; p++) sum += ((const R*)from)[p * count + i];
        ((R*)to)[i] = sum;
    }
}

template <class R>
int backward(const Args& a) {
    Job job = {a, a.count < PARTS_OF_SEQUENCES ? a.count : PARTS_OF_SEQUENCES};
    if (job.parts < 1) job.parts = 1;
    job.dweight = (char*)malloc(sizeof(R) * job.parts * a.d * (a.k + 1) + 64);
    if (!job.dweight) return SL_NO_MEMORY;
    job.dbias = job.dweight + sizeof(R) * job.parts * a.d * a.k;
    sl_parallel(a.blocks() * job.parts, a.threads, 3 * a.cost_us(), backward_task<R>, &job);
    add_parts<R>(job.dweight, a.dweight, job.parts, a.d * a.k);
    add_parts<R>(job.dbias, a.dbias, job.parts, a.d);
    free(job.dweight);
    return job.failed;
}

// One token: x (b, d) against slots (slots, k-1, d), which move up by one row.
template <class R>
void step_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    Arena arena = {(char*)sl_scratch(Conv<R>::scratch_bytes(a))};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    const Conv<R> conv(a, task, arena);
    const int last = conv.k - 1;
    for (int64_t row = 0; row < a.b; row++) {
        const int64_t slot = a.index ? a.index[row] : row;
        if (slot < 0) continue;
        R* state = (R*)a.initial + slot * a.slot_stride + conv.first;
        load_rows(conv.x, conv.wide, 0, last, conv.channels, state, a.d);
        load_tile(conv.x, conv.wide, last, 1, conv.channels, a.x.dtype, a.x.at(row, 0, conv.first), 0);
        conv.convolve_any(1);
        conv.activate(1);
        store_tile(conv.y, PITCH, 0, 1, conv.channels, a.y.dtype, a.rows(a.y).at(row, 0, conv.first), 0);
        store_rows(conv.x, conv.wide, 1, last, conv.channels, state, a.d);
    }
}

}  // namespace

SL_KERNEL(causal_conv1d_forward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    Job job = {a, 1};
    const int64_t chunks = a.t > CHUNK ? (a.t + CHUNK - 1) / CHUNK : 1;
    sl_parallel(a.blocks() * a.count * chunks, a.threads, a.cost_us(), a.is_double ? forward_task<double> : forward_task<float>, &job);
    return job.failed;
}

SL_KERNEL(causal_conv1d_backward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    return a.is_double ? backward<double>(a) : backward<float>(a);
}

SL_KERNEL(causal_conv1d_step) {
    const Args& a = *(const Args*)args;
    for (int64_t row = 0; row < a.b; row++)
        if ((a.index ? a.index[row] : row) >= a.slots) return SL_BAD_INDEX;
    Job job = {a, 1};
    sl_parallel(a.blocks(), a.threads, a.cost_us(), a.is_double ? step_task<double> : step_task<float>, &job);
    return job.failed;
}

// The gradient of gated_scan on CPUs. What went into f is recomputed from the stored states, with the bits it had: for a dense system
// a tile of steps at a time, whose products do not wait for each other.
//     y = f(A h + v)     dv = G ⊙ g ⊙ f'     dg = G ⊙ y     G of the step before = Aᵀ dv + dh
// dA of a dense system is one matrix product of dv and h, left to the caller.
#include "cpu_gated.h"

namespace {

// One sequence under way, from its last step to its first.
template <class R>
struct Stream {
    const Args* a;
    R *grad, *gate, *sums;  // G of the state after the step (pitch); (pitch); a tile of steps (TILE, pitch)
    Segment segment;
    int64_t sequence, step;  // the step to come

    bool begin(int64_t index) {
        sequence = index, segment = a->segments()[index], step = segment.stop - segment.start - 1;
        __builtin_memcpy(grad, (const R*)a->dstate + index * a->n, sizeof(R) * a->n);
        if (step < 0) finish();
        else tile();
        return step >= 0;
    }
    void finish() { __builtin_memcpy((R*)a->dinitial + sequence * a->n, grad, sizeof(R) * a->n); }

    R* sum() const { return sums + step % TILE * a->pitch; }
    // What goes into f for the steps of the tile that `step` ends.
    void tile() {
        const R* x[TILE];
        R* out[TILE];
        const int count = int(step % TILE) + 1;
        for (int i = 0; i < count; i++) {
            const int64_t at = step - step % TILE + i;
            x[i] = a->row<R>(a->h, segment, at), out[i] = sums + i * a->pitch;
            read_row(out[i], *a, a->v, segment, at);
        }
        product((const R*)a->At, a->pitch, a->n, x, out, count);
    }
    // dv and dg of the step.
    void give() {
        constexpr int W = Simd<R>::W;
        read_row(gate, *a, a->g, segment, step);
        R *dv = a->row<R>(a->dv, segment, step), *dg = a->row<R>(a->dg, segment, step);
        for (int64_t i = 0; i < a->n; i += W) {
            const auto y = activate<R>(load(sum() + i), a->activation), G = load(grad + i);
            const auto for_v = G * load(gate + i) * slope<R>(y, a->activation), for_g = G * y;
            if (i + W <= a->n) {
                store(dv + i, for_v);
                store(dg + i, for_g);
            } else {
                store_some<R>(dv + i, for_v, int(a->n - i));
                store_some<R>(dg + i, for_g, int(a->n - i));
            }
        }
        __builtin_memcpy(grad, a->row<R>(a->dh, segment, step), sizeof(R) * a->n);
    }
    // After Aᵀ dv was added to G. Whether there are steps left.
    bool advance() {
        if (step-- == 0) finish();
        else if (step % TILE == TILE - 1) tile();
        return step >= 0;
    }
    void swap(Stream& other) {
        const Stream kept = *this;
        *this = other;
        other = kept;
    }
};

template <class R>
void dense_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    Arena arena = {(char*)sl_scratch(sizeof(R) * SLOTS * ((TILE + 2) * a.pitch + 48) + 64)};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    Queue<Stream<R>> queue(a, task);
    for (auto& s : queue.slots) {
        s.a = &a, s.grad = arena.take<R>(a.pitch), s.gate = arena.take<R>(a.pitch), s.sums = arena.take<R>(TILE * a.pitch);
        __builtin_memset(s.grad, 0, sizeof(R) * a.pitch);
        __builtin_memset(s.gate, 0, sizeof(R) * a.pitch);
        __builtin_memset(s.sums, 0, sizeof(R) * TILE * a.pitch);
    }
    for (queue.fill(); queue.used; queue.fill()) {
        const R* x[SLOTS];
        R* out[SLOTS];
        for (int i = 0; i < queue.used; i++) {
            Stream<R>& s = queue.slots[i];
            s.give();
            x[i] = a.row<R>(a.dv, s.segment, s.step), out[i] = s.grad;
        }
        product((const R*)a.A, a.pitch, a.n, x, out, queue.used);
        for (int i = queue.used - 1; i >= 0; i--)
            if (!queue.slots[i].advance()) queue.drop(i);
    }
}

template <class R, class S, int K>
SL_INLINE void diagonal_block(const Args& a, const Segment& segment, int64_t sequence, int64_t first, int lanes) {
    constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;
    const int last = lanes - (K - 1) * W;
    const auto get = [&](const auto* p, int k) { return k < K - 1 || last == W ? load_from<R>(p + k * W) : load_some<R>(p + k * W, last); };
    const auto put = [&](R* p, int k, V x) { k < K - 1 || last == W ? store(p + k * W, x) : store_some<R>(p + k * W, x, last); };
    V A[K], G[K], dA[K];
    for (int k = 0; k < K; k++) {
        A[k] = get((const R*)a.A + first, k);
        G[k] = get((const R*)a.dstate + sequence * a.n + first, k);
        dA[k] = V{};
    }
    const int64_t length = segment.stop - segment.start;
    const Span at = span(segment, a.reverse, length ? length - 1 : 0);
    const S *v = (const S*)a.v.at(segment.row, at.token, first), *g = (const S*)a.g.at(segment.row, at.token, first);
    int64_t row = (segment.row * a.t + at.token) * a.n + first;
    for (int64_t r = length; r > 0; r--) {
        for (int k = 0; k < K; k++) {
            const V h = get((const R*)a.h + row, k), y = activate<R>(fma(A[k], h, get(v, k)), a.activation);
            const V dv = G[k] * get(g, k) * slope<R>(y, a.activation);
            put((R*)a.dv + row, k, dv);
            put((R*)a.dg + row, k, G[k] * y);
            dA[k] = fma(dv, h, dA[k]);
            G[k] = fma(A[k], dv, get((const R*)a.dh + row, k));
        }
        v -= at.direction * a.v.time, g -= at.direction * a.g.time, row -= at.direction * a.n;
    }
    for (int k = 0; k < K; k++) {
        put((R*)a.dinitial + sequence * a.n + first, k, G[k]);
        put((R*)a.dA + sequence * a.n + first, k, dA[k]);
    }
}

template <class R>
void diagonal_task(void* context, int64_t task) {
    const Args& a = ((Job*)context)->a;
    constexpr int W = Simd<R>::W;
    const int64_t blocks = a.vectors(BLOCK * W), sequence = task / blocks, first = task % blocks * BLOCK * W;
    const Segment segment = a.segments()[sequence];
    const int lanes = int(a.n - first < BLOCK * W ? a.n - first : BLOCK * W);
    with_dtype(a.v.dtype, [&](auto* type) {
        typedef Pointee<decltype(type)> S;
        switch ((lanes + W - 1) / W) {
            case 1: return diagonal_block<R, S, 1>(a, segment, sequence, first, lanes);
            case 2: return diagonal_block<R, S, 2>(a, segment, sequence, first, lanes);
            case 3: return diagonal_block<R, S, 3>(a, segment, sequence, first, lanes);
            default: return diagonal_block<R, S, 4>(a, segment, sequence, first, lanes);
        }
    });
}

template <class R>
int backward(const Args& a) {
    Job job = {a, SL_OK};
    if (a.dense)
        sl_parallel(a.tasks(), a.threads, 2 * a.cost_us(), dense_task<R>, &job);
    else
        sl_parallel(a.count * a.vectors(BLOCK * Simd<R>::W), a.threads, 2 * a.cost_us(), diagonal_task<R>, &job);
    return job.failed;
}

}  // namespace

SL_KERNEL(gated_scan_backward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    if (!a.n || !a.count) return SL_OK;
    return a.is_double ? backward<double>(a) : backward<float>(a);
}

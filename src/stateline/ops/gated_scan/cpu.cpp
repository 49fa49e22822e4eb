// gated_scan on CPUs, forward; cpu_backward.cpp has the gradient. The definition is in reference.py.
#include "cpu_gated.h"

namespace {

// One sequence of a dense system under way: the states themselves are rows of the result.
template <class R>
struct Stream {
    const Args* a;
    R *sum, *gate;  // (pitch)
    Segment segment;
    int64_t sequence, step;

    const R* now() const { return a->row<R>(a->h, segment, step); }
    bool begin(int64_t index) {
        sequence = index, segment = a->segments()[index], step = 0;
        const bool any = segment.stop > segment.start;
        R* first = any ? a->row<R>(a->h, segment, 0) : (R*)a->state + sequence * a->n;
        if (a->initial)
            __builtin_memcpy(first, (const R*)a->initial + sequence * a->n, sizeof(R) * a->n);
        else
            __builtin_memset(first, 0, sizeof(R) * a->n);
        return any;
    }
    // f(sum) ⊙ gate becomes the next state. Whether there are steps left.
    bool advance() {
        constexpr int W = Simd<R>::W;
        const bool last = ++step == segment.stop - segment.start;
        R* next = last ? (R*)a->state + sequence * a->n : a->row<R>(a->h, segment, step);
        int64_t i = 0;
        for (; i + W <= a->n; i += W) store(next + i, activate<R>(load(sum + i), a->activation) * load(gate + i));
        if (i < a->n) store_some<R>(next + i, activate<R>(load(sum + i), a->activation) * load(gate + i), int(a->n - i));
        return !last;
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
    Arena arena = {(char*)sl_scratch(sizeof(R) * 2 * SLOTS * (a.pitch + 16) + 64)};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    Queue<Stream<R>> queue(a, task);
    for (auto& s : queue.slots) {
        s.a = &a, s.sum = arena.take<R>(a.pitch), s.gate = arena.take<R>(a.pitch);
        __builtin_memset(s.sum, 0, sizeof(R) * a.pitch);
        __builtin_memset(s.gate, 0, sizeof(R) * a.pitch);
    }
    for (queue.fill(); queue.used; queue.fill()) {
        const R* x[SLOTS];
        R* sums[SLOTS];
        for (int i = 0; i < queue.used; i++) {
            Stream<R>& s = queue.slots[i];
            read_row(s.sum, a, a.v, s.segment, s.step);
            read_row(s.gate, a, a.g, s.segment, s.step);
            x[i] = s.now(), sums[i] = s.sum;
        }
        product((const R*)a.At, a.pitch, a.n, x, sums, queue.used);
        for (int i = queue.used - 1; i >= 0; i--)
            if (!queue.slots[i].advance()) queue.drop(i);
    }
}

// A diagonal system falls into single numbers: a task has a block of them of one sequence, which stay in registers.
template <class R, class S, int K>
SL_INLINE void diagonal_block(const Args& a, const Segment& segment, int64_t sequence, int64_t first, int lanes) {
    constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;
    const int last = lanes - (K - 1) * W;  // lanes of the last vector
    const auto get = [&](const auto* p, int k) { return k < K - 1 || last == W ? load_from<R>(p + k * W) : load_some<R>(p + k * W, last); };
    const auto put = [&](R* p, int k, V x) { k < K - 1 || last == W ? store(p + k * W, x) : store_some<R>(p + k * W, x, last); };
    V A[K], h[K];
    for (int k = 0; k < K; k++) {
        A[k] = get((const R*)a.A + first, k);
        h[k] = a.initial ? get((const R*)a.initial + sequence * a.n + first, k) : V{};
    }
    const Span at = span(segment, a.reverse, 0);
    const S *v = (const S*)a.v.at(segment.row, at.token, first), *g = (const S*)a.g.at(segment.row, at.token, first);
    R* to = (R*)a.h + (segment.row * a.t + at.token) * a.n + first;
    for (int64_t r = segment.stop - segment.start; r > 0; r--) {
        for (int k = 0; k < K; k++) {
            put(to, k, h[k]);
            h[k] = activate<R>(fma(A[k], h[k], get(v, k)), a.activation) * get(g, k);
        }
        v += at.direction * a.v.time, g += at.direction * a.g.time, to += at.direction * a.n;
    }
    for (int k = 0; k < K; k++) put((R*)a.state + sequence * a.n + first, k, h[k]);
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
int forward(const Args& a) {
    Job job = {a, SL_OK};
    if (a.dense)
        sl_parallel(a.tasks(), a.threads, a.cost_us(), dense_task<R>, &job);
    else
        sl_parallel(a.count * a.vectors(BLOCK * Simd<R>::W), a.threads, a.cost_us(), diagonal_task<R>, &job);
    return job.failed;
}

}  // namespace

SL_KERNEL(gated_scan_forward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    if (!a.n || !a.count) return SL_OK;
    return a.is_double ? forward<double>(a) : forward<float>(a);
}

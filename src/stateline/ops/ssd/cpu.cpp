// ssd on CPUs, forward and one step; cpu_backward.cpp has the gradient. The definition is in reference.py.
#include "cpu_ssd.h"
#include "head_step.h"

namespace {

struct Job {
    const Args& a;
    int failed;
};

// (y + D·x) · silu(z), to memory.
template <class R>
void finish(const Head<R>& k, int64_t row, Span at, int count) {
    typedef typename Simd<R>::V V;
    constexpr int W = Simd<R>::W;
    const Args& a = k.a;
    if (a.z.data) k.load_gate(row, at, count);
    for (int v = 0; v < k.vectors; v++)
        for (int r = 0; r < count; r++) {
            const int64_t i = (int64_t(v) * PITCH + r) * W;
            V out = k.n ? load(k.y + i) : V{};
            if (a.D) out = fma(load(k.D + v * W), load(k.x + i), out);
            if (a.z.data) out = out * silu<R>(load(k.gate + i));
            store(k.y + i, out);
        }
    const Heads to = a.heads(a.y);
    store_tile(k.y, PITCH, 0, count, k.channels, to.dtype, to.at(row, at.token, k.head), at.direction * to.time);
}

template <class R>
void forward_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    Arena arena = {(char*)sl_scratch(Head<R>::scratch_bytes(a))};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    Head<R> k(a, arena);
    k.select(task % a.h);
    const int64_t sequence = task / a.h;
    const Segment segment = a.segments()[sequence];
    k.load_state(k.S, a.initial ? a.initial + k.state_offset(sequence) : nullptr);
    double elapsed = 0;
    for (int64_t first = 0; first < segment.stop - segment.start; first += T) {
        const int64_t left = segment.stop - segment.start - first;
        const int count = int(left < T ? left : T);
        const Span at = span(segment, a.reverse, first);
        k.load_steps(segment.row, at, count);
        for (int r = 0; r < count; r++) elapsed += k.step[r];
        k.load_inputs(segment.row, at, count);
        k.load_projection(k.Bt, a.B, segment.row, at, count);
        k.load_projection(k.Ct, a.C, segment.row, at, count);
        for_blocks<4>(k.vectors, k.n, [&]<int NV, int NT>(int v, int64_t s) { k.template advance<NV, NT, true, false>(v, s, count, nullptr); });
        finish(k, segment.row, at, count);
    }
    store_lanes(k.S, (R*)(a.state + k.state_offset(sequence)), k.channels, k.n);
    R total[Simd<R>::W];
    store(total, exp(splat(R(elapsed * k.rate))));
    ((R*)a.decay)[sequence * a.h + k.head] = total[0];
}

// One token of one head in place.
template <class R>
void step_head(Head<R>& k, int64_t row, R* state) {
    typedef typename Simd<R>::V V;
    constexpr int W = Simd<R>::W;
    const Args& a = k.a;
    const Span at = {0, 1};
    k.load_steps(row, at, 1);
    k.load_projection(k.Bt, a.B, row, at, 1);
    k.load_projection(k.Ct, a.C, row, at, 1);
    read_numbers(k.x, k.channels, a.x.dtype, a.x.at(row, 0, k.head));
    advance_channels(k.decay[0], k.step[0], k.x, k.channels, k.Bt, k.Ct, k.n, state, k.y);
    if (a.z.data) read_numbers(k.gate, k.channels, a.z.dtype, a.z.at(row, 0, k.head));
    for (int i = 0; i < k.vectors * W; i += W) {
        V out = load(k.y + i);
        if (a.D) out = fma(load(k.D + i), load(k.x + i), out);
        if (a.z.data) out = out * silu<R>(load(k.gate + i));
        store(k.y + i, out);
    }
    const Heads to = a.heads(a.y);
    write_numbers(k.y, k.channels, to.dtype, to.at(row, 0, k.head));
}

template <class R>
void step_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    const int64_t row = task / a.h, slot = a.index ? a.index[row] : row;
    if (slot < 0) return;
    Arena arena = {(char*)sl_scratch(Head<R>::scratch_bytes(a))};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    Head<R> k(a, arena);
    k.select(task % a.h);
    step_head(k, row, (R*)a.initial + slot * a.slot_stride + k.head * a.p * a.n);
}

}  // namespace

SL_KERNEL(ssd_forward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    Job job = {a, SL_OK};
    sl_parallel(a.count * a.h, a.threads, a.cost_us(a.is_double ? 10 : 5), a.is_double ? forward_task<double> : forward_task<float>, &job);
    return job.failed;
}

SL_KERNEL(ssd_step) {
    const Args& a = *(const Args*)args;
    for (int64_t row = 0; row < a.b; row++)
        if ((a.index ? a.index[row] : row) >= a.slots) return SL_BAD_INDEX;
    Job job = {a, SL_OK};
    sl_parallel(a.b * a.h, a.threads, a.cost_us(a.is_double ? 20 : 10), a.is_double ? step_task<double> : step_task<float>, &job);
    return job.failed;
}

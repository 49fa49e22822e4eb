// The selective scan on CPUs, forward and one step; cpu_backward.cpp has the gradient. The definition is in reference.py.
#include "cpu_scan.h"

namespace {

struct Job {
    const Args& a;
    int width;  // channels in a block
    int64_t blocks;
    int failed;
};

template <class R, bool CX>
void forward_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    Arena arena = {(char*)sl_scratch(Scan<R, CX>::scratch_bytes(a, job.width))};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    const Scan<R, CX> scan(a, block_at(a, task % job.blocks, job.width), arena);
    const int64_t sequence = task / job.blocks;
    const Segment segment = a.segments()[sequence];
    scan.load_state(scan.h, a.initial ? a.initial + scan.state_offset(sequence) : nullptr);
    const int64_t length = segment.stop - segment.start;
    if (length) scan.spoil_state();
    for (int64_t first = 0; first < length; first += T) {
        const int count = int(length - first < T ? length - first : T);
        const Span at = span(segment, a.reverse, first);
        scan.template prepare<false>(segment.row, at, count);
        scan.load_projections(segment.row, at, count, true);
        const int64_t left = length - first - T;
        scan.template advance_all<true>(count, {{&a.u, &a.dt, &a.z}, segment.row, span(segment, a.reverse, first + T),
                                                left < 0 ? 0 : left < T ? int(left) : T});
        scan.finish(segment.row, at, count);
    }
    scan.store_state(scan.h, a.state + scan.state_offset(sequence));
}

// One token for every row of the batch: each block of channels loads its parameters once.
template <class R, bool CX>
void step_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    Arena arena = {(char*)sl_scratch(Scan<R, CX>::scratch_bytes(a, job.width))};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    const Scan<R, CX> scan(a, block_at(a, task, job.width), arena);
    const Span at = {0, 1};
    for (int64_t row = 0; row < a.b; row++) {
        const int64_t slot = a.index ? a.index[row] : row;
        if (slot < 0) continue;
        char* state = a.initial + sizeof(R) * Scan<R, CX>::PARTS * (slot * a.slot_stride + scan.block.first * a.n);
        scan.load_state(scan.h, state);
        scan.spoil_state();
        scan.template prepare<false>(row, at, 1);
        scan.load_projections(row, at, 1, true);
        scan.template advance_all<true>(1, {});
        scan.finish(row, at, 1);
        scan.store_state(scan.h, state);
    }
}

typedef void (*Task)(void*, int64_t);

// Wide blocks read long rows, each of which lies in a page of its own; narrow ones keep all threads busy. Results are the same.
int best_width(const Args& a, int64_t tasks_per_block) {
    int best = 64;
    double least = 0;
    for (int width = 64; width <= 512; width += 64) {
        const int64_t tasks = block_count(a, width) * tasks_per_block, threads = a.threads < 1 ? 1 : a.threads;
        const double cost = double((tasks + threads - 1) / threads) * (width + 32);  // 32: what a row costs, in channels
        if (width == 64 || cost < least) best = width, least = cost;
    }
    return best;
}

int run(const Args& a, int64_t tasks_per_block, const Task (&tasks)[4]) {
    const int width = best_width(a, tasks_per_block);
    Job job = {a, width, block_count(a, width), SL_OK};
    sl_parallel(job.blocks * tasks_per_block, a.threads, a.cost_us(), tasks[2 * a.is_double + a.is_complex], &job);
    return job.failed;
}

}  // namespace

SL_KERNEL(selective_scan_forward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    return run(a, a.count,
               {forward_task<float, false>, forward_task<float, true>, forward_task<double, false>, forward_task<double, true>});
}

SL_KERNEL(selective_scan_step) {
    const Args& a = *(const Args*)args;
    for (int64_t row = 0; row < a.b; row++)
        if ((a.index ? a.index[row] : row) >= a.slots) return SL_BAD_INDEX;
    return run(a, 1, {step_task<float, false>, step_task<float, true>, step_task<double, false>, step_task<double, true>});
}

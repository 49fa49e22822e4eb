// Cross-entropy of rows of logits on CPUs, and its gradient. The definition is in reference.py.
// A piece of a row is brought to compute precision in scratch memory; sums run over lanes and pieces in a fixed order.
#include <math.h>

#include "pool.h"
#include "tile.h"

namespace {

constexpr int64_t PIECE = 4096;  // columns in scratch memory
constexpr int64_t ROWS = 4;      // rows in a task

// Laid out as Python packs it: every field is eight bytes.
struct Args {
    int64_t rows, threads;
    const char* logits;  // (rows, width), adjacent columns
    int64_t dtype, stride, classes, width;
    const int64_t* targets;
    int64_t ignore;
    void *loss, *log_sum;  // outputs of the forward pass; the gradient reads dloss and log_sum
    char* dlogits;
    int64_t out_dtype;

    const char* at(int64_t row, int64_t column) const { return logits + dtype_size(dtype) * (row * stride + column); }
    double cost_us() const { return 1e-3 * double(rows) * double(classes); }
};

struct Job {
    const Args& a;
    int failed;
};

template <class R>
R infinity() {
    return R(__builtin_inf());
}

// A piece of a row from `first`; lanes beyond its end hold -inf, so that they add nothing.
template <class R>
int64_t read_piece(const Args& a, int64_t row, int64_t first, R* x) {
    constexpr int W = Simd<R>::W;
    const int64_t count = a.classes - first < PIECE ? a.classes - first : PIECE;
    read_numbers(x, count, a.dtype, a.at(row, first));
    for (int64_t i = count; i < (count + W - 1) / W * W; i++) x[i] = -infinity<R>();
    return count;
}

template <class R>
R highest(const R* x, int64_t count, R top) {
    constexpr int W = Simd<R>::W;
    auto best = splat(top);
    for (int64_t i = 0; i < count; i += W) {
        const auto v = load(x + i);
        best = v > best ? v : best;
    }
    R lane[W];
    store(lane, best);
    for (int i = 0; i < W; i++) top = lane[i] > top ? lane[i] : top;
    return top;
}

// Σ exp(x - top); four running sums, so that additions overlap. NaN stays NaN.
template <class R>
R sum_exp(const R* x, int64_t count, R top) {
    constexpr int W = Simd<R>::W;
    const auto shift = splat(top);
    typename Simd<R>::V sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
        for (int j = 0; j < 4; j++) sum[j] = sum[j] + exp(load(x + i + j * W) - shift);
    for (int j = 0; i < count; i += W, j++) sum[j] = sum[j] + exp(load(x + i) - shift);
    return sum_lanes<R>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class R>
void forward_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    R* x = (R*)sl_scratch(sizeof(R) * (PIECE + Simd<R>::W));
    if (!x) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    const int64_t last = (task + 1) * ROWS < a.rows ? (task + 1) * ROWS : a.rows;
    for (int64_t row = task * ROWS; row < last; row++) {
        R loss = 0, result = 0;
        if (a.targets[row] != a.ignore) {
            R top = -infinity<R>(), total = 0;
            for (int64_t first = 0; first < a.classes; first += PIECE) {
                const int64_t count = read_piece(a, row, first, x);
                const R next = highest(x, count, top);
                const R shift = next == -infinity<R>() ? R(0) : next;
                total = total * (top == next ? R(1) : R(::exp(double(top - shift)))) + sum_exp(x, count, shift);
                top = next;
            }
            R own;
            read_numbers(&own, 1, a.dtype, a.at(row, a.targets[row]));
            result = (top == -infinity<R>() ? R(0) : top) + R(::log(double(total)));
            loss = result - own;
        }
        ((R*)a.loss)[row] = loss;
        ((R*)a.log_sum)[row] = result;
    }
}

template <class R>
void backward_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    constexpr int W = Simd<R>::W;
    R* x = (R*)sl_scratch(sizeof(R) * (PIECE + W));
    if (!x) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    const int64_t size = dtype_size(a.out_dtype);
    const int64_t last = (task + 1) * ROWS < a.rows ? (task + 1) * ROWS : a.rows;
    for (int64_t row = task * ROWS; row < last; row++) {
        char* out = a.dlogits + size * row * a.width;
        if (a.targets[row] == a.ignore) {
            __builtin_memset(out, 0, size * a.width);
            continue;
        }
        const R given = ((const R*)a.loss)[row];
        const auto scale = splat(given), shift = splat(((const R*)a.log_sum)[row]);
        for (int64_t first = 0; first < a.classes; first += PIECE) {
            const int64_t count = read_piece(a, row, first, x), own = a.targets[row] - first;
            for (int64_t i = 0; i < count; i += W) store(x + i, exp(load(x + i) - shift) * scale);
            if (own >= 0 && own < count) x[own] -= given;
            write_numbers(x, count, a.out_dtype, out + size * first);
        }
        __builtin_memset(out + size * a.classes, 0, size * (a.width - a.classes));
    }
}

template <class R>
int run(const Args& a, void (*task)(void*, int64_t)) {
    Job job = {a, 0};
    sl_parallel((a.rows + ROWS - 1) / ROWS, a.threads, a.cost_us(), task, &job);
    return job.failed;
}

}  // namespace

SL_KERNEL(cross_entropy_forward) {
    const Args& a = *(const Args*)args;
    return a.dtype == F64 ? run<double>(a, forward_task<double>) : run<float>(a, forward_task<float>);
}

SL_KERNEL(cross_entropy_backward) {
    const Args& a = *(const Args*)args;
    return a.dtype == F64 ? run<double>(a, backward_task<double>) : run<float>(a, backward_task<float>);
}

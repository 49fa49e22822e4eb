// Addition and RMS normalisation of rows on CPUs, and the gradient. The definition is in reference.py.
// A row is read once into scratch memory in compute precision; its sum of squares runs over lanes in a fixed order.
#include <stdlib.h>

#include "pool.h"
#include "tile.h"

namespace {

constexpr int64_t ROWS = 16;   // rows in a task of the forward pass
constexpr int64_t PARTS = 64;  // most parts into which rows are cut for the gradient of weight, summed in order

struct Array {
    char* data;
    int64_t dtype;
    char* row(int64_t i, int64_t d) const { return data + dtype_size(dtype) * i * d; }
};

// Laid out as Python packs it: every field is eight bytes; all arrays (rows, d), contiguous. Null where absent.
struct Args {
    int64_t rows, d, threads, is_double;
    double eps;
    Array x, residual;
    const void* weight;  // (d)
    Array y, h;          // outputs; the gradient reads h
    Array dy, dh, dx, dresidual;
    void* dweight;

    double cost_us() const { return 6e-4 * double(rows) * double(d); }
    // At least 16 rows a part; a function of the number of rows alone.
    int64_t parts() const { return rows < 16 * PARTS ? (rows + 15) / 16 : PARTS; }
};

struct Job {
    const Args& a;
    char* dweight;  // per part: (d)
    int failed;
};

int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }

// Calls f(i) for every vector of a row; rows in scratch memory are padded with zeros.
template <class R, class F>
SL_INLINE void over_row(int64_t d, F&& f) {
    for (int64_t i = 0; i < d; i += Simd<R>::W) f(i);
}

// Σ f over the vectors of a row: four running sums, so that additions overlap.
template <class R, class F>
SL_INLINE R sum_row(int64_t d, F&& f) {
    constexpr int W = Simd<R>::W;
    typename Simd<R>::V sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= d; i += 4 * W)
        for (int j = 0; j < 4; j++) sum[j] = f(i + j * W, sum[j]);
    for (int j = 0; i < d; i += W, j++) sum[j] = f(i, sum[j]);
    return sum_lanes<R>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class R>
R inverse_rms(const R* h, int64_t d, double eps) {
    const R squares = sum_row<R>(d, [&](int64_t i, auto sum) { return fma(load(h + i), load(h + i), sum); });
    const R mean = squares / R(d) + R(eps);
    return R(1) / (sizeof(R) == 4 ? R(__builtin_sqrtf(float(mean))) : R(__builtin_sqrt(double(mean))));
}

template <class R>
R* scratch_rows(const Args& a, int64_t count, Job& job) {
    const size_t bytes = sizeof(R) * count * padded(a.d);
    R* p = (R*)sl_scratch(bytes);
    if (p)
        __builtin_memset(p, 0, bytes);
    else
        job.failed = SL_NO_MEMORY;
    return p;
}

template <class R>
void forward_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    R* h = scratch_rows<R>(a, 4, job);
    if (!h) return;
    R *other = h + padded(a.d), *y = other + padded(a.d), *weight = y + padded(a.d);
    __builtin_memcpy(weight, a.weight, sizeof(R) * a.d);
    const int64_t last = (task + 1) * ROWS < a.rows ? (task + 1) * ROWS : a.rows;
    for (int64_t row = task * ROWS; row < last; row++) {
        read_numbers(h, a.d, a.x.dtype, a.x.row(row, a.d));
        if (a.residual.data) {
            read_numbers(other, a.d, a.residual.dtype, a.residual.row(row, a.d));
            over_row<R>(a.d, [&](int64_t i) { store(h + i, load(h + i) + load(other + i)); });
        }
        const auto scale = splat(inverse_rms(h, a.d, a.eps));
        over_row<R>(a.d, [&](int64_t i) { store(y + i, load(h + i) * scale * load(weight + i)); });
        write_numbers(y, a.d, a.y.dtype, a.y.row(row, a.d));
        write_numbers(h, a.d, a.h.dtype, a.h.row(row, a.d));
    }
}

template <class R>
void backward_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    R* h = scratch_rows<R>(a, 5, job);
    if (!h) return;
    R *g = h + padded(a.d), *from_h = g + padded(a.d), *weight = from_h + padded(a.d), *dweight = weight + padded(a.d);
    __builtin_memcpy(weight, a.weight, sizeof(R) * a.d);
    const int64_t parts = a.parts();
    for (int64_t row = task * a.rows / parts; row < (task + 1) * a.rows / parts; row++) {
        read_numbers(h, a.d, a.h.dtype, a.h.row(row, a.d));
        read_numbers(g, a.d, a.dy.dtype, a.dy.row(row, a.d));
        read_numbers(from_h, a.d, a.dh.dtype, a.dh.row(row, a.d));
        const R r = inverse_rms(h, a.d, a.eps);
        const R dot = sum_row<R>(a.d, [&](int64_t i, auto sum) { return fma(load(g + i) * load(weight + i), load(h + i), sum); });
        const auto scale = splat(r), pull = splat(r * r * r * (dot / R(a.d)));
        over_row<R>(a.d, [&](int64_t i) {
            const auto x = load(h + i), out = load(g + i);
            store(dweight + i, fma(out * x, scale, load(dweight + i)));
            store(g + i, fnma(x, pull, fma(out * load(weight + i), scale, load(from_h + i))));
        });
        write_numbers(g, a.d, a.dx.dtype, a.dx.row(row, a.d));
        if (a.dresidual.data) write_numbers(g, a.d, a.dresidual.dtype, a.dresidual.row(row, a.d));
    }
    __builtin_memcpy((R*)job.dweight + task * a.d, dweight, sizeof(R) * a.d);
}

template <class R>
int backward(const Args& a) {
    Job job = {a};
    const int64_t parts = a.parts();
    job.dweight = (char*)malloc(sizeof(R) * parts * a.d + 64);
    if (!job.dweight) return SL_NO_MEMORY;
    sl_parallel(parts, a.threads, 2 * a.cost_us(), backward_task<R>, &job);
    for (int64_t i = 0; i < a.d; i++) {
        R sum = 0;
        for (int64_t p = 0; p < parts; p++) sum += ((const R*)job.dweight)[p * a.d + i];
        ((R*)a.dweight)[i] = sum;
    }
    free(job.dweight);
    return job.failed;
}

}  // namespace

SL_KERNEL(rms_norm_forward) {
    const Args& a = *(const Args*)args;
    Job job = {a};
    sl_parallel((a.rows + ROWS - 1) / ROWS, a.threads, a.cost_us(), a.is_double ? forward_task<double> : forward_task<float>, &job);
    return job.failed;
}

SL_KERNEL(rms_norm_backward) {
    const Args& a = *(const Args*)args;
    return a.is_double ? backward<double>(a) : backward<float>(a);
}

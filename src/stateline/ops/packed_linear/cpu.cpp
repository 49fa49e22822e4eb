// y = x Wᵀ + bias for a packed W (native/packed.h says how), any number of rows of x. The definition is in reference.py.
#include <stdlib.h>

#include "packed.h"
#include "pool.h"

namespace {

// Laid out as Python packs it: every field is eight bytes. x (m, columns) and y (m, rows), adjacent along the last dimension.
struct Args {
    Packed w;
    int64_t m, threads;
    const char* x;
    int64_t x_dtype, x_stride;
    char* y;
    int64_t y_dtype, y_stride;
};

constexpr int64_t PREPARED = 32;      // rows of x prepared by one task
constexpr int64_t TOKENS = 240;       // rows of x in a task of the product: a multiple of every tile

struct Job {
    const Args& a;
    char* x;  // prepared rows
    int64_t blocks, panels;
    int failed;
};

void prepare_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    float* row = (float*)sl_scratch(sizeof(float) * (a.w.columns + 16));
    if (!row) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    const int64_t end = (task + 1) * PREPARED < a.m ? (task + 1) * PREPARED : a.m;
    for (int64_t i = task * PREPARED; i < end; i++) {
        read_numbers(row, a.w.columns, a.x_dtype, a.x + dtype_size(a.x_dtype) * i * a.x_stride);
        prepare(a.w, row, job.x + i * a.w.x_bytes());
    }
}

void product_task(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    const int64_t first = task % job.panels * job.blocks, tokens = task / job.panels * TOKENS;
    const int64_t last = first + job.blocks < a.w.blocks() ? first + job.blocks : a.w.blocks();
    const int64_t count = a.m - tokens < TOKENS ? a.m - tokens : TOKENS;
    product(a.w, first, last, job.x + tokens * a.w.x_bytes(), a.w.x_bytes(), count, [&](int64_t m, int64_t block, float* sums) {
        const int64_t row = block * LANES, rows = a.w.rows - row < LANES ? a.w.rows - row : LANES;
        if (a.w.bias)
            for (int64_t i = 0; i < rows; i++) sums[i] += a.w.bias[row + i];
        write_numbers(sums, rows, a.y_dtype, a.y + dtype_size(a.y_dtype) * ((tokens + m) * a.y_stride + row));
    });
}

}  // namespace

SL_KERNEL(packed_linear) {
    const Args& a = *(const Args*)args;
    if (!a.m || !a.w.rows) return SL_OK;
    Job job = {a, nullptr, 0, 0, SL_OK};
    if (posix_memalign((void**)&job.x, 64, a.m * a.w.x_bytes())) return SL_NO_MEMORY;
    const double work = double(a.m) * double(a.w.rows) * double(a.w.columns);
    sl_parallel((a.m + PREPARED - 1) / PREPARED, a.threads, 1e-3 * double(a.m) * double(a.w.columns), prepare_task, &job);
    job.blocks = (a.w.blocks() + a.threads * 4 - 1) / (a.threads * 4);
    job.blocks = (job.blocks + MOST_R - 1) / MOST_R * MOST_R;
    job.panels = (a.w.blocks() + job.blocks - 1) / job.blocks;
    if (!job.failed) sl_parallel(job.panels * ((a.m + TOKENS - 1) / TOKENS), a.threads, 5e-5 * work, product_task, &job);
    free(job.x);
    return job.failed;
}

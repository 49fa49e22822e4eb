// Turns rows of channels into rows of time and back, with conversion: transforms want time adjacent, layers channels. Copies by
// PyTorch take longer than the transforms (benchmarks/NOTES.md).
#include "pool.h"
#include "tile.h"

namespace {

constexpr int SIDE = 16;     // of a square that is turned at once: a cache line of floats
constexpr int64_t TASK = 64;  // rows of a task

// Laid out as Python packs it: every field is eight bytes. (b, rows, columns) -> (b, columns, rows), the last of each adjacent.
struct Args {
    int64_t b, rows, columns, add, threads;
    char* from;
    int64_t from_dtype, from_batch, from_row;
    char* to;
    int64_t to_dtype, to_batch, to_row;
    double cost_us() const { return 4e-4 * double(b) * double(rows) * double(columns); }
};

template <class T>
SL_INLINE auto number(T x) {
    if constexpr (sizeof(T) == 2)
        return bits<float>(uint32_t(x.bits) << 16);
    else
        return x;
}

// A square, or what there is of one at the edge, number by number.
template <class S, class T>
void turn_some(const S* from, int64_t from_row, T* to, int64_t to_row, int64_t rows, int64_t columns, bool add) {
    typedef decltype(number(T{})) R;
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = 0; r < rows; r++) {
            T* place = to + c * to_row + r;
            R value = R(number(from[r * from_row + c]));
            if (add) value += number(*place);
            if constexpr (sizeof(T) == 2) {
                typename Simd<float>::V lanes = splat(value);
                store_some<float>(place, lanes, 1);
            } else {
                *place = value;
            }
        }
}

// A whole square by way of 4×4 blocks; 16-bit numbers are converted a row at a time on the way in or out.
template <class S, class T>
SL_INLINE void turn_square(const S* from, int64_t from_row, T* to, int64_t to_row, bool add) {
    if constexpr (sizeof(S) == 8 || sizeof(T) == 8) {
        turn_some(from, from_row, to, to_row, SIDE, SIDE, add);
    } else {
        constexpr int W = Simd<float>::W;
        alignas(64) float in[SIDE * SIDE], out[SIDE * SIDE];
        const float* source = in;
        int64_t source_row = SIDE;
        if constexpr (sizeof(S) == 4) {
            source = from, source_row = from_row;
        } else {
            for (int r = 0; r < SIDE; r++)
                for (int c = 0; c < SIDE; c += W) store(in + r * SIDE + c, load_from<float>(from + r * from_row + c));
        }
        for (int r = 0; r < SIDE; r += 4)
            for (int c = 0; c < SIDE; c += 4) transpose4(source + r * source_row + c, source_row, out + c * SIDE + r, SIDE);
        for (int c = 0; c < SIDE; c++)
            for (int r = 0; r < SIDE; r += W) {
                typename Simd<float>::V value = load(out + c * SIDE + r);
                if (add) value += load_from<float>(to + c * to_row + r);
                store_to<float>(to + c * to_row + r, value);
            }
    }
}

template <class S, class T>
void turn(const Args& a, int64_t batch, int64_t first, int64_t last) {
    const S* from = (const S*)a.from + batch * a.from_batch;
    T* to = (T*)a.to + batch * a.to_batch;
    for (int64_t c = 0; c < a.columns; c += SIDE)
        for (int64_t r = first; r < last; r += SIDE) {
            const int64_t rows = last - r < SIDE ? last - r : SIDE, columns = a.columns - c < SIDE ? a.columns - c : SIDE;
            const S* source = from + r * a.from_row + c;
            T* target = to + c * a.to_row + r;
            if (rows == SIDE && columns == SIDE)
                turn_square(source, a.from_row, target, a.to_row, a.add);
            else
                turn_some(source, a.from_row, target, a.to_row, rows, columns, a.add);
        }
}

void task(void* context, int64_t number) {
    const Args& a = *(const Args*)context;
    const int64_t parts = (a.rows + TASK - 1) / TASK, batch = number / parts, first = number % parts * TASK;
    const int64_t last = first + TASK < a.rows ? first + TASK : a.rows;
    if (a.from_dtype == F64)
        turn<double, double>(a, batch, first, last);
    else if (a.from_dtype == BF16)
        turn<Bf16, float>(a, batch, first, last);
    else if (a.to_dtype == BF16)
        turn<float, Bf16>(a, batch, first, last);
    else
        turn<float, float>(a, batch, first, last);
}

}  // namespace

SL_KERNEL(long_conv_turn) {
    const Args& a = *(const Args*)args;
    sl_parallel(a.b * ((a.rows + TASK - 1) / TASK), a.threads, a.cost_us(), task, (void*)&a);
    return SL_OK;
}

// Matrices packed for products with few or many vectors, and those products.
//
// Rows (outputs) go in blocks of 16, one row a lane of 32 bits, so that a product needs no sum over lanes and one number of x is
// broadcast to 16 rows. A block is read from front to back, once:
//   bf16   lane = 2 columns of bfloat16                           x: bfloat16
//   int8   lane = 4 columns, each q + 128 in a byte; a float32 scale a row       x: 16-bit integers
//   int4   lane = 8 columns, each q + 8 in four bits (byte j: columns j and 4 + j); a bfloat16 scale for 32 columns of a row
// Columns are padded with zeros to a whole lane (int4: to a group of 32). Integers multiply x rounded to 16 bits by its row's
// largest magnitude, cut into a high and a low byte, whose sums are exact; so a result depends neither on how many vectors go
// together nor on the instruction set, beyond the last rounding. Every row of x is summed in the order of the columns.
#pragma once
#include "tile.h"

namespace {

enum Format : int64_t { PACKED_BF16 = 0, PACKED_INT8 = 1, PACKED_INT4 = 2 };

constexpr int LANES = 16;             // rows of a block
constexpr int GROUP = 32;             // columns of an int4 scale
constexpr int VECTORS = LANES * 4 / SL_BYTES;  // vectors that a block's lanes take
constexpr float LARGEST = 32639.0f;   // 127 · 256 + 127: both bytes of x stay within -128 … 127

// Laid out as Python packs it: every field is eight bytes. bias: (rows) float32 or null.
struct Packed {
    const char* data;
    const char* scales;
    const float* bias;
    int64_t format, rows, columns;

    int64_t blocks() const { return (rows + LANES - 1) / LANES; }
    int64_t padded() const { return (columns + GROUP - 1) / GROUP * GROUP; }  // of x, in every format
    int64_t lanes() const {  // 64-byte steps of a block
        return format == PACKED_BF16 ? (columns + 1) / 2 : format == PACKED_INT8 ? (columns + 3) / 4 : padded() / 8;
    }
    // Bytes of one row of x as `prepare` lays it out. bf16: numbers. Integers: high bytes, low bytes, sum of each group, Sums.
    int64_t x_bytes() const {
        return (format == PACKED_BF16 ? 2 * padded() : 2 * padded() + 4 * (padded() / GROUP) + 64) / 64 * 64 + 64;
    }
};

// The tail of an integer row of x.
struct Sums {
    float scale;
    int32_t high, low;
};

inline Sums* sums_of(char* x, int64_t padded) { return (Sums*)(x + 2 * padded + 4 * (padded / GROUP)); }

SL_INLINE uint16_t to_bf16(float f) {
    const uint32_t u = bits<uint32_t>(f);
    return f != f ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

SL_INLINE int32_t total(IF x) {
    int32_t lane[Simd<float>::W], sum = 0;
    store(lane, x);
    for (int32_t i : lane) sum += i;
    return sum;
}

// A row of x (columns) as products with `m` read it.
static void prepare(const Packed& m, const float* x, char* to) {
    const int64_t padded = m.padded(), n = m.columns;
    if (m.format == PACKED_BF16) {
        write_numbers(x, n, BF16, to);
        __builtin_memset(to + 2 * n, 0, 2 * (padded - n));
        return;
    }
    constexpr int W = Simd<float>::W;
    VF most = {};
    for (int64_t i = 0; i < n; i += W) {
        const VF v = absolute(i + W <= n ? load(x + i) : load_some<float>(x + i, int(n - i)));
        most = v > most || v != v ? v : most;  // a NaN stays
    }
    float lanes[W], largest = 0;
    store(lanes, most);
    for (int i = 0; i < W; i++) largest = lanes[i] > largest || lanes[i] != lanes[i] ? lanes[i] : largest;
    int8_t *high = (int8_t*)to, *low = high + padded;
    int32_t* groups = (int32_t*)(low + padded);
    const VF factor = splat(largest > 0 ? LARGEST / largest : 0.0f), half = splat(0.5f);
    typedef Vector<int8_t, W>::V Bytes;
    Sums sums = {largest - largest == 0 ? largest / LARGEST : __builtin_nanf(""), 0, 0};  // a row with an infinity is lost
    IF all_high = {}, all_low = {};
    for (int64_t g = 0; g < padded / GROUP; g++) {
        IF both = {};
        for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += W) {
            const VF v = i + W <= n ? load(x + i) : load_some<float>(x + i, i < n ? int(n - i) : 0);
            const VF scaled = v * factor;
            const IF q = __builtin_convertvector(scaled + (scaled < VF{} ? -half : half), IF);
            const IF h = (q + 128) >> 8, l = q - (h << 8);
            store(high + i, __builtin_convertvector(h, Bytes));
            store(low + i, __builtin_convertvector(l, Bytes));
            both += q, all_high += h, all_low += l;
        }
        groups[g] = total(both);
    }
    sums.high = total(all_high), sums.low = total(all_low);
    *sums_of(to, padded) = sums;
}

SL_INLINE IF splat_int(int32_t x) {
#if SL_BYTES == 64
    return (IF)_mm512_set1_epi32(x);
#elif SL_BYTES == 32
    return (IF)_mm256_set1_epi32(x);
#else
    return IF{x, x, x, x};
#endif
}

// sum + w₀ x₀ + w₁ x₁ for lanes of two bfloat16.
SL_INLINE VF dot_bf16(VF sum, UF w, int32_t x) {
#if defined(__AVX512BF16__)
    return (VF)_mm512_dpbf16_ps((__m512)sum, bits<__m512bh>(w), bits<__m512bh>(splat_int(x)));
#else
    sum = fma(bits<VF>(w << 16), splat(bits<float>(x << 16)), sum);
    return fma(bits<VF>(w & 0xffff0000u), splat(bits<float>(x & int32_t(0xffff0000u))), sum);
#endif
}

// sum + Σ w x for lanes of four unsigned bytes w and a quadruple of signed bytes x.
SL_INLINE IF dot_bytes(IF sum, UF w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (IF)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)splat_int(x));
#elif defined(__SSE2__)
    // In 16 bits: columns 0 and 2, then 1 and 3. (Products of bytes as they are would saturate.)
    const int32_t even = int32_t(uint32_t(uint16_t(int8_t(x))) | uint32_t(uint16_t(int8_t(x >> 16))) << 16);
    const int32_t odd = int32_t(uint32_t(uint16_t(int8_t(x >> 8))) | uint32_t(uint16_t(int8_t(x >> 24))) << 16);
    const UF we = w & 0x00ff00ffu, wo = (w >> 8) & 0x00ff00ffu;
#if SL_BYTES == 64
    sum += (IF)_mm512_madd_epi16((__m512i)we, (__m512i)splat_int(even));
    return sum + (IF)_mm512_madd_epi16((__m512i)wo, (__m512i)splat_int(odd));
#elif SL_BYTES == 32
    sum += (IF)_mm256_madd_epi16((__m256i)we, (__m256i)splat_int(even));
    return sum + (IF)_mm256_madd_epi16((__m256i)wo, (__m256i)splat_int(odd));
#else
    sum += (IF)_mm_madd_epi16((__m128i)we, (__m128i)splat_int(even));
    return sum + (IF)_mm_madd_epi16((__m128i)wo, (__m128i)splat_int(odd));
#endif
#else
    for (int j = 0; j < 4; j++) sum += (IF)((w >> (8 * j)) & 255u) * int32_t(int8_t(x >> (8 * j)));
    return sum;
#endif
}

SL_INLINE int32_t word(const char* p) { return load_as<int32_t>(p); }

// Rows of R blocks from `block` on, times M rows of x, to out[m · LANES · R + …]; scales are applied, biases are not.
template <int R, int M>
static void tile_bf16(const Packed& w, int64_t block, const char* x, int64_t x_stride, float* out) {
    constexpr int W = Simd<float>::W;
    const int64_t steps = w.lanes();
    const char* p = w.data + block * steps * 64;
    VF sum[R][M][VECTORS] = {};
    for (int64_t k = 0; k < steps; k++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                const UF q = load_as<UF>(p + (r * steps + k) * 64 + v * SL_BYTES);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) sum[r][m][v] = dot_bf16(sum[r][m][v], q, word(x + m * x_stride + 4 * k));
            }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) store(out + (m * R + r) * LANES + v * W, sum[r][m][v]);
}

template <int R, int M>
static void tile_int8(const Packed& w, int64_t block, const char* x, int64_t x_stride, float* out) {
    constexpr int W = Simd<float>::W;
    const int64_t steps = w.lanes(), padded = w.padded();
    const char* p = w.data + block * steps * 64;
    IF high[R][M][VECTORS] = {}, low[R][M][VECTORS] = {};
    for (int64_t k = 0; k < steps; k++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                const UF q = load_as<UF>(p + (r * steps + k) * 64 + v * SL_BYTES);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    high[r][m][v] = dot_bytes(high[r][m][v], q, word(x + m * x_stride + 4 * k));
                    low[r][m][v] = dot_bytes(low[r][m][v], q, word(x + m * x_stride + padded + 4 * k));
                }
            }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const Sums s = *sums_of((char*)x + m * x_stride, padded);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                const VF h = __builtin_convertvector(high[r][m][v] - 128 * s.high, VF);
                const VF l = __builtin_convertvector(low[r][m][v] - 128 * s.low, VF);
                const VF scale = load((const float*)w.scales + (block + r) * LANES + v * W) * splat(s.scale);
                store(out + (m * R + r) * LANES + v * W, fma(h, splat(256.0f), l) * scale);
            }
    }
}

template <int R, int M>
static void tile_int4(const Packed& w, int64_t block, const char* x, int64_t x_stride, float* out) {
    constexpr int W = Simd<float>::W;
    const int64_t steps = w.lanes(), padded = w.padded(), groups = padded / GROUP;
    const char* p = w.data + block * steps * 64;
    const Bf16* scales = (const Bf16*)w.scales + block * groups * LANES;
    VF sum[R][M][VECTORS] = {};
    for (int64_t g = 0; g < groups; g++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                IF high[M], low[M];
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    high[m] = IF{};
                    low[m] = splat_int(-8 * word(x + m * x_stride + 2 * padded + 4 * g));
                }
#pragma GCC unroll 4
                for (int k = 0; k < GROUP / 8; k++) {
                    const UF q = load_as<UF>(p + (r * steps + g * (GROUP / 8) + k) * 64 + v * SL_BYTES);
                    const UF a = q & 0x0f0f0f0fu, b = (q >> 4) & 0x0f0f0f0fu;
#pragma GCC unroll 8
                    for (int m = 0; m < M; m++) {
                        const char* xm = x + m * x_stride + g * GROUP + 8 * k;
                        high[m] = dot_bytes(high[m], a, word(xm));
                        low[m] = dot_bytes(low[m], a, word(xm + padded));
                        high[m] = dot_bytes(high[m], b, word(xm + 4));
                        low[m] = dot_bytes(low[m], b, word(xm + padded + 4));
                    }
                }
                const VF scale = load_from<float>(scales + (r * groups + g) * LANES + v * W);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++)
                    sum[r][m][v] = fma(__builtin_convertvector((high[m] << 8) + low[m], VF), scale, sum[r][m][v]);
            }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const VF scale = splat(sums_of((char*)x + m * x_stride, padded)->scale);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) store(out + (m * R + r) * LANES + v * W, sum[r][m][v] * scale);
    }
}

// Blocks and rows of x that one tile takes: sums fill the registers, and some are left for weights and x.
constexpr int MOST_R = 4, MOST_M = 6;
template <int FORMAT>
struct Shape {
    static constexpr int R = SL_BYTES < 64 ? 1 : FORMAT == PACKED_BF16 ? 4 : FORMAT == PACKED_INT8 ? 2 : 1;
    static constexpr int M = SL_BYTES < 64 ? (FORMAT == PACKED_BF16 ? 4 : 2) : 6;
};

template <int FORMAT, int R, int M>
SL_INLINE void tile(const Packed& w, int64_t block, const char* x, int64_t x_stride, float* out) {
    if constexpr (FORMAT == PACKED_BF16)
        tile_bf16<R, M>(w, block, x, x_stride, out);
    else if constexpr (FORMAT == PACKED_INT8)
        tile_int8<R, M>(w, block, x, x_stride, out);
    else
        tile_int4<R, M>(w, block, x, x_stride, out);
}

// Calls sink(m, block, 16 sums) for blocks [first, last) and `count` rows of x. Weights come from memory once: as many blocks as
// stay in the second-level cache meet all rows of x before the next ones are read.
constexpr int64_t PANEL = 192 << 10;
template <int FORMAT, class F>
static void product_of(const Packed& w, int64_t first, int64_t last, const char* x, int64_t x_stride, int64_t count, F&& sink) {
    constexpr int R = Shape<FORMAT>::R, M = Shape<FORMAT>::M;
    alignas(64) float out[R * M * LANES];
    int64_t from, to;
    auto rows = [&]<int MM>(int64_t m) {
        const char* at = x + m * x_stride;
        int64_t block = from;
        for (; block + R <= to; block += R) {
            tile<FORMAT, R, MM>(w, block, at, x_stride, out);
            for (int i = 0; i < MM; i++)
                for (int r = 0; r < R; r++) sink(m + i, block + r, out + (i * R + r) * LANES);
        }
        if constexpr (R > 1)
            for (; block < to; block++) {
                tile<FORMAT, 1, MM>(w, block, at, x_stride, out);
                for (int i = 0; i < MM; i++) sink(m + i, block, out + i * LANES);
            }
    };
    const int64_t fit = PANEL / (w.lanes() * 64 + 1) / R * R, panel = fit < R ? R : fit;
    for (from = first; from < last; from = to) {
        to = from + panel < last ? from + panel : last;
        int64_t m = 0;
        for (; m + M <= count; m += M) rows.template operator()<M>(m);
        if constexpr (M > 4)
            for (; m + 4 <= count; m += 4) rows.template operator()<4>(m);
        if constexpr (M > 2)
            for (; m + 2 <= count; m += 2) rows.template operator()<2>(m);
        for (; m < count; m++) rows.template operator()<1>(m);
    }
}
template <class F>
static void product(const Packed& w, int64_t first, int64_t last, const char* x, int64_t x_stride, int64_t count, F&& sink) {
    if (w.format == PACKED_BF16)
        product_of<PACKED_BF16>(w, first, last, x, x_stride, count, sink);
    else if (w.format == PACKED_INT8)
        product_of<PACKED_INT8>(w, first, last, x, x_stride, count, sink);
    else
        product_of<PACKED_INT4>(w, first, last, x, x_stride, count, sink);
}

}  // namespace

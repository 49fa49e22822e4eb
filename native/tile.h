// Moving rows between tensors of any dtype and tiles of float or double.
// A tile holds steps of a block of channels, vector by vector: element (vector v, step r, lane i) at (v·pitch + r)·W + i. Channels
// beyond the block's last are zero when loaded and dropped when stored. The pitch is a cache line more than a power of two: a row
// is spread over all vectors, whose places would else share a few sets of the cache.
#pragma once
#include "simd.h"

namespace {

// Steps from one vector to the next in a tile of `steps`.
constexpr int pitch_of(int steps) { return steps + 64 / SL_BYTES; }

enum Dtype : int64_t { F32 = 0, BF16 = 1, F64 = 2 };

struct Bf16 {
    uint16_t bits;
};

inline int64_t dtype_size(int64_t dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

// One vector of R from memory holding S.
template <class R, class S>
SL_INLINE typename Simd<R>::V load_from(const S* p) {
    constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;
    if constexpr (sizeof(S) == 2) {
        typedef typename Vector<uint16_t, W>::V H;
        typedef typename Vector<uint32_t, W>::V U;
        typedef typename Vector<float, W>::V F;
        return __builtin_convertvector(bits<F>(__builtin_convertvector(load_as<H>(p), U) << 16), V);
    } else {
        typedef typename Vector<S, W>::V T;
        return __builtin_convertvector(load_as<T>(p), V);
    }
}

// Rounds to nearest even; NaN stays NaN.
template <class R, class S>
SL_INLINE void store_to(S* p, typename Simd<R>::V x) {
    constexpr int W = Simd<R>::W;
    if constexpr (sizeof(S) == 2) {
        typedef typename Vector<uint16_t, W>::V H;
        typedef typename Vector<uint32_t, W>::V U;
        typedef typename Vector<float, W>::V F;
        const F f = __builtin_convertvector(x, F);
        const U u = bits<U>(f);
        const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        const U nan = (u >> 16) | 0x40u;
        store(p, __builtin_convertvector((U)(f != f) ? nan : rounded, H));
    } else {
        typedef typename Vector<S, W>::V T;
        store(p, __builtin_convertvector(x, T));
    }
}

template <class R, class S>
SL_INLINE typename Simd<R>::V load_some(const S* p, int lanes) {
    S full[Simd<R>::W] = {};
    __builtin_memcpy(full, p, sizeof(S) * lanes);
    return load_from<R>(full);
}
template <class R, class S>
SL_INLINE void store_some(S* p, typename Simd<R>::V x, int lanes) {
    S full[Simd<R>::W];
    store_to<R>(full, x);
    __builtin_memcpy(p, full, sizeof(S) * lanes);
}

// Calls f with a null pointer of the C++ type for `dtype`.
template <class F>
SL_INLINE void with_dtype(int64_t dtype, F&& f) {
    if (dtype == F32)
        f((float*)nullptr);
    else if (dtype == BF16)
        f((Bf16*)nullptr);
    else
        f((double*)nullptr);
}

template <class P>
struct PointeeOf;
template <class T>
struct PointeeOf<T*> {
    typedef T type;
};
template <class P>
using Pointee = typename PointeeOf<P>::type;

// A tensor (b, t, d) whose channels are adjacent; strides in elements.
struct Rows {
    char* data;
    int64_t dtype, batch, time;
    char* at(int64_t b, int64_t t, int64_t d) const { return data + dtype_size(dtype) * (b * batch + t * time + d); }
};

// `count` rows of `channels` from p, rows `stride` elements apart, to steps `first`… of a tile.
template <class R, class S>
static void load_rows(R* tile, int pitch, int first, int count, int channels, const S* p, int64_t stride) {
    constexpr int W = Simd<R>::W;
    const int full = channels / W, rest = channels % W;
    for (int r = 0; r < count; r++, p += stride) {
        R* to = tile + (first + r) * W;
        for (int v = 0; v < full; v++) store(to + v * pitch * W, load_from<R>(p + v * W));
        if (rest) store(to + full * pitch * W, load_some<R>(p + full * W, rest));
    }
}
template <class R>
static void load_tile(R* tile, int pitch, int first, int count, int channels, int64_t dtype, const char* p, int64_t stride) {
    with_dtype(dtype, [&](auto* type) { load_rows(tile, pitch, first, count, channels, (decltype(type))p, stride); });
}

// The other way round.
template <class R, class S>
static void store_rows(const R* tile, int pitch, int first, int count, int channels, S* p, int64_t stride) {
    constexpr int W = Simd<R>::W;
    const int full = channels / W, rest = channels % W;
    for (int r = 0; r < count; r++, p += stride) {
        const R* from = tile + (first + r) * W;
        for (int v = 0; v < full; v++) store_to<R>(p + v * W, load(from + v * pitch * W));
        if (rest) store_some<R>(p + full * W, load(from + full * pitch * W), rest);
    }
}
template <class R>
static void store_tile(const R* tile, int pitch, int first, int count, int channels, int64_t dtype, char* p, int64_t stride) {
    with_dtype(dtype, [&](auto* type) { store_rows(tile, pitch, first, count, channels, (decltype(type))p, stride); });
}

// Plain copies of `count` numbers, with conversion.
template <class R>
static void read_numbers(R* to, int64_t count, int64_t dtype, const char* p) {
    constexpr int W = Simd<R>::W;
    with_dtype(dtype, [&](auto* type) {
        const auto* from = (decltype(type))p;
        int64_t i = 0;
        for (; i + W <= count; i += W) store(to + i, load_from<R>(from + i));
        if (i < count) {
            R last[W];
            store(last, load_some<R>(from + i, int(count - i)));
            __builtin_memcpy(to + i, last, sizeof(R) * (count - i));
        }
    });
}
template <class R>
static void write_numbers(const R* from, int64_t count, int64_t dtype, char* p) {
    constexpr int W = Simd<R>::W;
    with_dtype(dtype, [&](auto* type) {
        auto* to = (decltype(type))p;
        int64_t i = 0;
        for (; i + W <= count; i += W) store_to<R>(to + i, load(from + i));
        if (i < count) {
            R last[W] = {};
            __builtin_memcpy(last, from + i, sizeof(R) * (count - i));
            store_some<R>(to + i, load(last), int(count - i));
        }
    });
}

// Four rows of four floats, turned: to[j·to_stride + i] = from[i·from_stride + j].
SL_INLINE void transpose4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    typedef Vector<float, 4>::V Q;
    const Q a = load_as<Q>(from), b = load_as<Q>(from + from_stride);
    const Q c = load_as<Q>(from + 2 * from_stride), d = load_as<Q>(from + 3 * from_stride);
    const Q ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Q cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store(to, (Q)__builtin_shufflevector(ab0, cd0, 0, 1, 4, 5));
    store(to + to_stride, (Q)__builtin_shufflevector(ab0, cd0, 2, 3, 6, 7));
    store(to + 2 * to_stride, (Q)__builtin_shufflevector(ab1, cd1, 0, 1, 4, 5));
    store(to + 3 * to_stride, (Q)__builtin_shufflevector(ab1, cd1, 2, 3, 6, 7));
}

// (channels, n) in memory, `step` numbers apart, to lanes: to[(v·n + s)·W + i] = from[((v·W + i)·n + s)·step], zero beyond the last.
template <class R, class To>
static void load_lanes(To* to, const R* from, int channels, int64_t n, int step = 1) {
    constexpr int W = Simd<R>::W;
    for (int c = 0; c < (channels + W - 1) / W * W; c++) {
        To* lane = to + c / W * n * W + c % W;
        const R* row = from + c * n * step;
        int64_t s = 0;
        if constexpr (sizeof(R) == 4 && sizeof(To) == 4)
            if (step == 1 && c % 4 == 0 && c + 4 <= channels && n >= 4) {
                for (; s + 4 <= n; s += 4) transpose4(row + s, n, lane + s * W, W);
                for (; s < n; s++)
                    for (int i = 0; i < 4; i++) lane[s * W + i] = row[i * n + s];
                c += 3;
                continue;
            }
        for (; s < n; s++) lane[s * W] = c < channels ? To(row[s * step]) : To(0);
    }
}
template <class R>
static void store_lanes(const R* from, R* to, int channels, int64_t n, int step = 1) {
    constexpr int W = Simd<R>::W;
    for (int c = 0; c < channels; c++) {
        const R* lane = from + c / W * n * W + c % W;
        R* row = to + c * n * step;
        int64_t s = 0;
        if constexpr (sizeof(R) == 4)
            if (step == 1 && c % 4 == 0 && c + 4 <= channels && n >= 4) {
                for (; s + 4 <= n; s += 4) transpose4(lane + s * W, W, row + s, n);
                for (; s < n; s++)
                    for (int i = 0; i < 4; i++) row[i * n + s] = lane[s * W + i];
                c += 3;
                continue;
            }
        for (; s < n; s++) row[s * step] = lane[s * W];
    }
}

// Where sequences lie: rows [batch row, start, stop], or every batch row whole.
struct Segment {
    int64_t row, start, stop;
};
struct Segments {
    const int64_t* table;
    int64_t count, b, t, reverse;
    Segment operator[](int64_t i) const {
        if (!table) return {i, 0, t};
        return {table[3 * i], table[3 * i + 1], table[3 * i + 2]};
    }
    bool valid() const {
        for (int64_t i = 0; i < count; i++) {
            const Segment s = (*this)[i];
            if (s.row < 0 || s.row >= b || s.start < 0 || s.start > s.stop || s.stop > t) return false;
        }
        return true;
    }
};

// Steps [first, first + count) of a segment in processing order: their first token in memory, and the direction of the next.
struct Span {
    int64_t token, direction;
};
inline Span span(const Segment& s, int64_t reverse, int64_t first) {
    return reverse ? Span{s.stop - 1 - first, -1} : Span{s.start + first, 1};
}

// Carves arrays out of one block of scratch memory, each aligned to 64 bytes.
struct Arena {
    char* memory;
    size_t used = 0;
    template <class T>
    T* take(size_t count) {
        T* p = (T*)(memory + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

}  // namespace

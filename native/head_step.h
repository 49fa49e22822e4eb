// One token of one head, channel after channel, states in lanes: the state is read and written once, as it lies.
#pragma once
#include "tile.h"

namespace {

// S ← decay S + (dt x)⊗B for M channels from `first` on; sums: S C of each, to be summed over lanes.
template <class R, int M>
SL_INLINE void advance_some(R decay, R dt, const R* x, const R* B, const R* C, int64_t n, R* state, typename Simd<R>::V* sums) {
    typedef typename Simd<R>::V V;
    constexpr int W = Simd<R>::W;
    const V shrink = splat(decay);
    V in[M], sum[M] = {};
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) in[m] = splat(dt * x[m]);
    int64_t s = 0;
    for (; s + W <= n; s += W) {
        const V b = load(B + s), c = load(C + s);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const V next = fma(shrink, load(state + m * n + s), in[m] * b);
            store(state + m * n + s, next);
            sum[m] = fma(next, c, sum[m]);
        }
    }
    if (s < n) {
        const int rest = int(n - s);
        const V b = load_some<R>(B + s, rest), c = load_some<R>(C + s, rest);
        for (int m = 0; m < M; m++) {
            const V next = fma(shrink, load_some<R>(state + m * n + s, rest), in[m] * b);
            store_some<R>(state + m * n + s, next, rest);
            sum[m] = fma(next, c, sum[m]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) sums[m] = sum[m];
}

// S ← decay S + (dt x)⊗B for `count` channels of a head, x (count), B, C (n), state (count, n); S C to y (count).
template <class R>
void advance_channels(R decay, R dt, const R* x, int count, const R* B, const R* C, int64_t n, R* state, R* y) {
    typedef typename Simd<R>::V V;
    constexpr int W = Simd<R>::W, M = W < 4 ? W : 4;
    for (int first = 0; first < count; first += W) {
        const int here = count - first < W ? count - first : W;
        V sums[W] = {};
        int i = 0;
        for (; i + M <= here; i += M) advance_some<R, M>(decay, dt, x + first + i, B, C, n, state + (first + i) * n, sums + i);
        for (; i < here; i++) advance_some<R, 1>(decay, dt, x + first + i, B, C, n, state + (first + i) * n, sums + i);
        V out;
        if constexpr (sizeof(R) == 4)
            out = sums_of_lanes(sums);
        else
            for (int j = 0; j < W; j++) out[j] = sum_lanes<R>(sums[j]);
        here == W ? store(y + first, out) : store_some<R>(y + first, out, here);
    }
}

}  // namespace

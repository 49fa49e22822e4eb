// The vector functions themselves, for tests of their accuracy.
#include "tile.h"

namespace {

struct Args {
    int64_t function, is_double, count;
    const void* in;
    void* out;
};

template <class R>
void apply(const Args& a) {
    constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;
    for (int64_t i = 0; i < a.count; i += W) {
        const int lanes = int(a.count - i < W ? a.count - i : W);
        const V x = load_some<R>((const R*)a.in + i, lanes);
        V y = x, other;
        uint16_t half[W];
        switch (a.function) {
            case 0: y = exp2(x); break;
            case 1: y = exp(x); break;
            case 2: softplus<R>(x, y, other); break;
            case 3: softplus<R>(x, other, y); break;
            case 4: y = sigmoid<R>(x); break;
            case 5: silu<R>(x, y, other); break;
            case 6: silu<R>(x, other, y); break;
            case 7: unit_circle<R>(x, y, other); break;
            case 8: unit_circle<R>(x, other, y); break;
            case 9: y = log1p01(x); break;
            case 10: store_to<R>((Bf16*)half, x), y = load_from<R>((const Bf16*)half); break;
        }
        store_some<R>((R*)a.out + i, y, lanes);
    }
}

}  // namespace

SL_KERNEL(probe) {
    const Args& a = *(const Args*)args;
    a.is_double ? apply<double>(a) : apply<float>(a);
    return SL_OK;
}

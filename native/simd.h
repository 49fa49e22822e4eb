// Vectors of the instruction set being compiled, and the functions that kernels need on them, accurate to about one unit in the
// last place. Written with the vector extensions of GCC and Clang; intrinsics only where those have no word (fused multiply-add).
// Never compile this with -ffast-math: rounding by adding and subtracting a large constant would be optimised away.
#pragma once
#include "isa.h"

namespace {

template <class R>
struct Simd;
template <>
struct Simd<float> {
    static constexpr int W = SL_BYTES / 4;
    typedef float V __attribute__((vector_size(SL_BYTES)));
    typedef int32_t I __attribute__((vector_size(SL_BYTES)));
    typedef uint32_t U __attribute__((vector_size(SL_BYTES)));
};
template <>
struct Simd<double> {
    static constexpr int W = SL_BYTES / 8;
    typedef double V __attribute__((vector_size(SL_BYTES)));
    typedef int64_t I __attribute__((vector_size(SL_BYTES)));
    typedef uint64_t U __attribute__((vector_size(SL_BYTES)));
};
// Vectors of N elements of any type, for conversions. (GCC drops a vector_size that depends on a template's argument.)
template <class E, int N>
struct Vector;
#define SL_VECTOR(E, N)                                     \
    template <>                                             \
    struct Vector<E, N> {                                   \
        typedef E V __attribute__((vector_size(sizeof(E) * N))); \
    };
#define SL_VECTORS(N) SL_VECTOR(int8_t, N) SL_VECTOR(uint16_t, N) SL_VECTOR(uint32_t, N) SL_VECTOR(float, N) SL_VECTOR(double, N)
SL_VECTORS(2) SL_VECTORS(4) SL_VECTORS(8) SL_VECTORS(16)

typedef Simd<float>::V VF;
typedef Simd<double>::V VD;
typedef Simd<float>::I IF;
typedef Simd<double>::I ID;
typedef Simd<float>::U UF;
typedef Simd<double>::U UD;

template <class T, class P>
SL_INLINE T load_as(const P* p) {
    T x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
SL_INLINE VF load(const float* p) { return load_as<VF>(p); }
SL_INLINE VD load(const double* p) { return load_as<VD>(p); }
template <class V, class P>
SL_INLINE void store(P* p, V x) {
    __builtin_memcpy(p, &x, sizeof x);
}

// The same bits under another type.
template <class T, class S>
SL_INLINE T bits(S x) {
    static_assert(sizeof(T) == sizeof(S));
    T y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}

SL_INLINE VF splat(float x) {
#if SL_BYTES == 64
    return (VF)_mm512_set1_ps(x);
#elif SL_BYTES == 32
    return (VF)_mm256_set1_ps(x);
#elif defined(__ARM_NEON)
    return (VF)vdupq_n_f32(x);
#else
    return VF{x, x, x, x};
#endif
}
SL_INLINE VD splat(double x) {
#if SL_BYTES == 64
    return (VD)_mm512_set1_pd(x);
#elif SL_BYTES == 32
    return (VD)_mm256_set1_pd(x);
#else
    return VD{x, x};
#endif
}

// a·b + c, rounded once where the machine can. The compiler itself never fuses (-ffp-contract=off), so that an expression has the
// same bits wherever it is compiled.
SL_INLINE VF fma(VF a, VF b, VF c) {
#if SL_BYTES == 64
    return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SL_BYTES == 32
    return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
SL_INLINE VD fma(VD a, VD b, VD c) {
#if SL_BYTES == 64
    return (VD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif SL_BYTES == 32
    return (VD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_NEON)
    return (VD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}
// c - a·b
template <class V>
SL_INLINE V fnma(V a, V b, V c) {
    return fma(-a, b, c);
}

template <class V, class R, int N>
SL_INLINE V polynomial(V x, const R (&c)[N]) {
    V p = splat(c[N - 1]);
#pragma GCC unroll 16
    for (int i = N - 2; i >= 0; i--) p = fma(p, x, splat(c[i]));
    return p;
}

// To the nearest integer; exact for |x| < 2^22 and 2^51.
SL_INLINE VF nearest(VF x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }
SL_INLINE VD nearest(VD x) { return (x + splat(6755399441055744.0)) - splat(6755399441055744.0); }

// Sum of all lanes, in a fixed order: halves folded onto each other.
template <class R>
SL_INLINE R sum_lanes(typename Simd<R>::V x) {
    R lane[Simd<R>::W];
    store(lane, x);
    for (int w = Simd<R>::W / 2; w > 0; w /= 2)
        for (int i = 0; i < w; i++) lane[i] += lane[i + w];
    return lane[0];
}

// Sums over the lanes of as many vectors as there are lanes: lane i of the result is the sum of x[i]; x is spoiled.
SL_INLINE VF sums_of_lanes(VF* x) {
    constexpr int W = Simd<float>::W;
#if SL_BYTES == 64
    for (int i = 0; i < W; i += 4) {
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]), _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[i + 2], (__m512)x[i + 3]),
                                        _mm512_unpackhi_ps((__m512)x[i + 2], (__m512)x[i + 3]));
        x[i] = (VF)_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    }
    // Each of x[0], x[4], x[8], x[12] now has four parts of four sums.
    const __m512 a = (__m512)x[0], b = (__m512)x[4], c = (__m512)x[8], d = (__m512)x[12];
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
    return (VF)_mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
#elif SL_BYTES == 32
    for (int i = 0; i < W; i += 4) x[i] = (VF)_mm256_hadd_ps(_mm256_hadd_ps((__m256)x[i], (__m256)x[i + 1]), _mm256_hadd_ps((__m256)x[i + 2], (__m256)x[i + 3]));
    const __m256 a = (__m256)x[0], b = (__m256)x[4];
    return (VF)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#else
    VF sums;
    for (int i = 0; i < W; i++) sums[i] = sum_lanes<float>(x[i]);
    return sums;
#endif
}

// Lane by lane minimum of integers. (Compilers make three instructions of the ternary form.)
SL_INLINE UF minimum(UF a, UF b) {
#if SL_BYTES == 64
    return (UF)_mm512_min_epu32((__m512i)a, (__m512i)b);
#elif SL_BYTES == 32
    return (UF)_mm256_min_epu32((__m256i)a, (__m256i)b);
#else
    return a < b ? a : b;
#endif
}
SL_INLINE IF minimum(IF a, IF b) {
#if SL_BYTES == 64
    return (IF)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif SL_BYTES == 32
    return (IF)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
    return a < b ? a : b;
#endif
}

// 2^x. Coefficients: weighted least squares with exchange of weights (relative error 8e-8 and 3e-18), the constant exactly 1.
// x is clamped to the exponents of normal numbers, above to a power that is infinite. In float a NaN may come out as a number (the
// clamps are integer instructions, which leave the multiply-add units alone): callers see to NaN; exp() and the rest below keep it.
SL_INLINE VF exp2(VF x) {
    constexpr float c[] = {0.69314719548260271721f, 0.24022348954445219853f, 0.055503332545860349771f, 0.0096663729732708814049f,
                           0.0013400407116078717883f};
    // As integers: the bits of negative floats, read unsigned, grow with magnitude, and are above those of all positive ones.
    const UF lowest = bits<UF>(splat(-126.0f));
    const IF highest = bits<IF>(splat(128.0f));
    const VF y = bits<VF>(minimum((IF)minimum(bits<UF>(x), lowest), highest));
    const VF magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to the nearest integer and leaves that in the low bits
    const VF shifted = y + magic;
    const VF f = y - (shifted - magic);
    const VF p = fma(polynomial(f, c), f, splat(1.0f));
    return bits<VF>(bits<IF>(p) + (bits<IF>(shifted) << 23));
}
SL_INLINE VD exp2(VD x) {
    constexpr double c[] = {0.69314718055994530909,     0.24022650695910098223,     0.055504108664821659657,
                            0.0096181291076068867272,   0.0013333558146396033071,   0.00015403530441738642396,
                            0.00001525273385324689476,  1.3215442586539134962e-6,   1.0178051743684489885e-7,
                            7.0725861950602286379e-9,   4.4566729554520416446e-10};
    const VD lowest = splat(-1022.0), highest = splat(1024.0);
    VD y = x < lowest ? lowest : x;
    y = y > highest ? highest : y;
    const VD magic = splat(6755399441055744.0);  // 1.5 · 2^52
    const VD shifted = y + magic;
    const VD f = y - (shifted - magic);
    const VD p = fma(polynomial(f, c), f, splat(1.0));
    return bits<VD>(bits<ID>(p) + (bits<ID>(shifted) << 52));
}

// e^x for finite x up to 88, and any below; the product with log2(e) is corrected, so that large |x| keep their accuracy.
SL_INLINE VF exp(VF x) {
    const VF log2e = splat(1.44269504088896341f), lowest = splat(-200.0f);
    x = x < lowest ? lowest : x;
    const VF y = x * log2e;
#if defined(__FMA__) || defined(__ARM_NEON)
    const VF slack = fma(x, splat(1.92596299e-8f), fma(x, log2e, -y));  // what the product's rounding lost
#else
    const VF n = nearest(y);
    const VF r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);  // Cody-Waite: the first product is exact
    const VF slack = r * log2e - (y - n);
#endif
    const VF e = exp2(y);
    return fma(e, slack * splat(0.69314718f), e);
}
SL_INLINE VD exp(VD x) {
    const VD log2e = splat(1.4426950408889634074), lowest = splat(-1000.0);
    x = x < lowest ? lowest : x;
    const VD y = x * log2e;
#if defined(__FMA__) || defined(__ARM_NEON)
    const VD slack = fma(x, splat(2.0355273740931033e-17), fma(x, log2e, -y));
#else
    const VD n = nearest(y);
    const VD r = (x - n * splat(6.93147180369123816490e-01)) - n * splat(1.90821492927058770002e-10);
    const VD slack = r * log2e - (y - n);
#endif
    const VD e = exp2(y);
    return fma(e, slack * splat(0.6931471805599453), e);
}

// log(1 + e) for e in [0, 1], by 2 atanh(e / (2 + e)); relative accuracy down to e = 0.
SL_INLINE VF log1p01(VF e) {
    constexpr float c[] = {0.33333333677545733248f, 0.19999848160757145986f, 0.14296405005857748012f, 0.10850025851153099777f,
                           0.11626868205963853129f};
    const VF s = e / (e + splat(2.0f)), q = s * s;
    const VF twice = s + s;
    return fma(twice * q, polynomial(q, c), twice);
}
SL_INLINE VD log1p01(VD e) {
    constexpr double c[] = {0.33333333333333333449, 0.19999999999999750032,  0.14285714285803389168,  0.11111111098732998891,
                            0.090909099715600335979, 0.0769227122281413908,  0.066676048706555534494, 0.058669424227125591879,
                            0.054240983792353632864, 0.037396751359375028198, 0.078268110396010286529};
    const VD s = e / (e + splat(2.0)), q = s * s;
    const VD twice = s + s;
    return fma(twice * q, polynomial(q, c), twice);
}

template <class V>
SL_INLINE V absolute(V x) {
    return x < V{} ? -x : x;
}

// softplus and its slope, from one exponential: log(1 + e^x) = max(x, 0) + log1p(e^-|x|).
template <class R, class V>
SL_INLINE void softplus(V x, V& value, V& slope) {
    const V e = exp(-absolute(x));
    value = log1p01(e) + (x < V{} ? V{} : x);
    const V one = splat(R(1));
    slope = (x < V{} ? e : one) / (one + e);
}

template <class R, class V>
SL_INLINE V sigmoid(V x) {
    const V e = exp(-absolute(x)), one = splat(R(1));
    return (x < V{} ? e : one) / (one + e);
}
template <class R, class V>
SL_INLINE V silu(V x) {
    return x * sigmoid<R>(x);
}
// silu and its slope s (1 + x (1 - s)).
template <class R, class V>
SL_INLINE void silu(V x, V& value, V& slope) {
    const V s = sigmoid<R>(x);
    value = x * s;
    slope = fma(value, splat(R(1)) - s, s);
}


// e^{2πi f} for a fraction of a turn f in [-1, 1].
template <class R, class V>
SL_INLINE void unit_circle(V f, V& cosine, V& sine) {
    typedef typename Simd<R>::I I;
    const V q = nearest(f * splat(R(4)));
    const V r = fma(q, splat(R(-0.25)), f) * splat(R(6.283185307179586476925));  // within ±π/4
    const V r2 = r * r;
    V s, c;
    if constexpr (sizeof(R) == 4) {
        constexpr R cs[] = {-0.16666664607557367905f, 0.0083327373041859347376f, -0.00019585492778092781305f};
        constexpr R cc[] = {-0.4999999996794380342f, 0.041666650182320521774f, -0.0013887564074254873215f, 0.00002446053189600075829f};
        s = fma(r * r2, polynomial(r2, cs), r);
        c = fma(r2, polynomial(r2, cc), splat(R(1)));
    } else {
        constexpr R cs[] = {-0.16666666666666666665,   0.0083333333333333313802, -0.00019841269841264824022, 2.7557319219152428433e-6,
                            -2.5052106167845484949e-8, 1.6058521422686240541e-10, -7.5860986809581235872e-13};
        constexpr R cc[] = {-0.5, 0.041666666666666666645, -0.0013888888888888881448, 0.000024801587301577744626,
                            -2.7557319217957686135e-7, 2.0876754922804295713e-9, -1.1470353601567621764e-11, 4.7407062554215574947e-14};
        s = fma(r * r2, polynomial(r2, cs), r);
        c = fma(r2, polynomial(r2, cc), splat(R(1)));
    }
    const I quarter = __builtin_convertvector(q, I);
    const I odd = -(quarter & 1);
    const V sine_part = odd ? c : s, cosine_part = odd ? s : c;
    sine = (quarter & 2) != 0 ? -sine_part : sine_part;
    cosine = ((quarter + 1) & 2) != 0 ? -cosine_part : cosine_part;
}

// Fraction of a turn, in about [-1/2, 1/2], of dt · turns: always reduced in double, because dt · A may be many turns.
SL_INLINE VD fraction(VD dt, const double* turns) {
    VD x = dt * load(turns);
    x = x - nearest(x);
    return x - nearest(x);
}
SL_INLINE VF fraction(VF dt, const double* turns) {
    constexpr int H = Simd<double>::W;
    float lane[2 * H];
    store(lane, dt);
    typedef typename Vector<float, H>::V Half;
    const VD low = fraction(__builtin_convertvector(load_as<Half>(lane), VD), turns);
    const VD high = fraction(__builtin_convertvector(load_as<Half>(lane + H), VD), turns + H);
    store(lane, __builtin_convertvector(low, Half));
    store(lane + H, __builtin_convertvector(high, Half));
    return load(lane);
}

}  // namespace

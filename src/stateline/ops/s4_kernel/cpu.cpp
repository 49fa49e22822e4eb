// s4_kernel and s4_cauchy on CPUs, values and gradients. The definition is in reference.py.
// The kernel in two levels: with l = i·Q + j, exp(l z) = exp(i Q z) exp(j z), both from products in double, so that K is a product of
// a matrix (blocks × states) and one (states × Q). The Cauchy sums in double throughout: near a pole nothing less will do.
// Suffixes: r read-out, h system, n state, l step, k frequency, i block, j step in a block.
#include <math.h>
#include <stdlib.h>

#include "pool.h"
#include "tile.h"

namespace {

constexpr int Q = 128;    // steps in a block
constexpr int GROUP = 4;  // blocks computed side by side

// Laid out as Python packs it: every field is eight bytes.
struct KernelArgs {
    int64_t r, h, n, t, threads, is_double;
    const double* z;       // (h, n, 2)
    const char *c, *dk;    // (r, h, n, 2), (r, h, t)
    char *k, *dc;          // (r, h, t), (r, h, n, 2)
    double* dz;            // (r, h, n, 2): each read-out's share
};

struct Complex {
    double re, im;
};
SL_INLINE Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
SL_INLINE Complex exponential(double re, double im) {
    const double size = ::exp(re);
    return {size * ::cos(im), size * ::sin(im)};
}

template <class T>
struct Shared {
    const T& a;
    int failed;
};

template <class R>
struct Blocks {
    static constexpr int W = Simd<R>::W;
    typedef typename Simd<R>::V V;

    const KernelArgs& a;
    int64_t h;
    int n, wide;          // states, and that rounded up to whole vectors
    R* powers;            // by step: [2][n][Q]; by state: [2][Q][wide]; real and imaginary parts of exp(j z)
    Complex *step, *now;  // exp(Q z); exp(i Q z)
    R* factors;           // [GROUP][2][wide]: forward, c exp(i Q z)

    static size_t bytes(const KernelArgs& a) {
        const size_t wide = size_t(a.n + W - 1) / W * W;
        return sizeof(R) * (2 * Q * wide + 2 * GROUP * wide) + sizeof(Complex) * 2 * wide + 64 * 8;
    }
    Blocks(const KernelArgs& args, int64_t system, Arena& arena) : a(args), h(system), n(int(args.n)), wide((n + W - 1) / W * W) {
        powers = arena.take<R>(2 * Q * size_t(wide));
        factors = arena.take<R>(2 * GROUP * size_t(wide));
        step = (Complex*)arena.take<double>(2 * size_t(wide)), now = (Complex*)arena.take<double>(2 * size_t(wide));
    }
    // exp(j z): each from one product of one of sixteen with one of eight, which come from the exponential itself.
    void make_powers(bool by_step) {
        if (!by_step) __builtin_memset(powers, 0, sizeof(R) * 2 * Q * wide);
        for (int s = 0; s < n; s++) {
            const double re = a.z[2 * (h * n + s)], im = a.z[2 * (h * n + s) + 1];
            Complex low[16], high[Q / 16];
            for (int j = 0; j < 16; j++) low[j] = exponential(j * re, j * im);
            for (int j = 0; j < Q / 16; j++) high[j] = exponential(16 * j * re, 16 * j * im);
            for (int j = 0; j < Q; j++) {
                const Complex p = low[j % 16] * high[j / 16];
                const int64_t at = by_step ? int64_t(s) * Q + j : int64_t(j) * wide + s;
                powers[at] = R(p.re), powers[at + int64_t(by_step ? n : wide) * Q] = R(p.im);
            }
            step[s] = exponential(Q * re, Q * im);
        }
    }
    void begin() {
        for (int s = 0; s < n; s++) now[s] = {1, 0};
    }
    // Products drift by a rounding a block; every 64th comes from the exponential again.
    void advance(int64_t block) {
        for (int s = 0; s < n; s++) {
            const double re = a.z[2 * (h * n + s)], im = a.z[2 * (h * n + s) + 1], l = double(block) * Q;
            now[s] = block % 64 ? now[s] * step[s] : exponential(l * re, l * im);
        }
    }

    void forward(int64_t row) {
        const int64_t blocks = (a.t + Q - 1) / Q, line = row * a.h + h;
        const R* c = (const R*)a.c + line * n * 2;
        R* out = (R*)a.k + line * a.t;
        begin();
        for (int64_t first = 0; first < blocks; first += GROUP) {
            for (int g = 0; g < GROUP; g++) {
                for (int s = 0; s < n; s++) {
                    const Complex f = Complex{double(c[2 * s]), double(c[2 * s + 1])} * now[s];
                    factors[(g * 2) * wide + s] = R(2 * f.re), factors[(g * 2 + 1) * wide + s] = R(-2 * f.im);
                }
                advance(first + g + 1);
            }
            for (int j = 0; j < Q; j += 2 * W) product(j, first, out);
        }
    }
    // GROUP blocks × two vectors of steps.
    void product(int j, int64_t first, R* out) const {
        V sum[GROUP][2] = {};
        for (int s = 0; s < n; s++) {
            const R *re = powers + int64_t(s) * Q + j, *im = re + int64_t(n) * Q;
            const V re0 = load(re), re1 = load(re + W), im0 = load(im), im1 = load(im + W);
            for (int g = 0; g < GROUP; g++) {
                const V x = splat(factors[(g * 2) * wide + s]), y = splat(factors[(g * 2 + 1) * wide + s]);
                sum[g][0] = fma(y, im0, fma(x, re0, sum[g][0]));
                sum[g][1] = fma(y, im1, fma(x, re1, sum[g][1]));
            }
        }
        for (int g = 0; g < GROUP; g++)
            for (int v = 0; v < 2; v++) {
                const int64_t l = (first + g) * Q + j + v * W, left = a.t - l;
                if (left >= W)
                    store(out + l, sum[g][v]);
                else if (left > 0)
                    __builtin_memcpy(out + l, &sum[g][v], sizeof(R) * left);
            }
    }

    // Lanes are states. Sums and first moments within a block in R, over blocks in double.
    void backward(int64_t row, Complex* sums, Complex* moments) {
        const int64_t blocks = (a.t + Q - 1) / Q, line = row * a.h + h;
        const R *c = (const R*)a.c + line * n * 2, *dk = (const R*)a.dk + line * a.t;
        __builtin_memset(sums, 0, sizeof(Complex) * wide), __builtin_memset(moments, 0, sizeof(Complex) * wide);
        begin();
        for (int64_t i = 0; i < blocks; i++) {
            const int count = int(a.t - i * Q < Q ? a.t - i * Q : Q);
            for (int s = 0; s < wide; s += W) {
                V re = {}, im = {}, re1 = {}, im1 = {};
                for (int j = 0; j < count; j++) {
                    const R g = dk[i * Q + j];
                    const V x = splat(g), y = splat(g * R(j)), pr = load(powers + int64_t(j) * wide + s);
                    const V pi = load(powers + int64_t(Q + j) * wide + s);
                    re = fma(x, pr, re), im = fma(x, pi, im), re1 = fma(y, pr, re1), im1 = fma(y, pi, im1);
                }
                R part[4][W];
                store(part[0], re), store(part[1], im), store(part[2], re1), store(part[3], im1);
                for (int w = 0; w < W && s + w < n; w++) {
                    const Complex p = Complex{part[0][w], part[1][w]} * now[s + w], m = Complex{part[2][w], part[3][w]} * now[s + w];
                    sums[s + w].re += p.re, sums[s + w].im += p.im;
                    moments[s + w].re += m.re + double(i * Q) * p.re, moments[s + w].im += m.im + double(i * Q) * p.im;
                }
            }
            advance(i + 1);
        }
        R* dc = (R*)a.dc + line * n * 2;
        double* dz = a.dz + line * n * 2;
        for (int s = 0; s < n; s++) {
            const Complex m = Complex{double(c[2 * s]), double(c[2 * s + 1])} * moments[s];
            dc[2 * s] = R(2 * sums[s].re), dc[2 * s + 1] = R(-2 * sums[s].im);
            dz[2 * s] = 2 * m.re, dz[2 * s + 1] = -2 * m.im;
        }
    }
};

template <class R, bool GRADIENT>
void kernel_task(void* context, int64_t system) {
    Shared<KernelArgs>& job = *(Shared<KernelArgs>*)context;
    const size_t more = sizeof(Complex) * 2 * size_t(job.a.n + 16) + 128;
    Arena arena = {(char*)sl_scratch(Blocks<R>::bytes(job.a) + more)};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    Blocks<R> blocks(job.a, system, arena);
    blocks.make_powers(!GRADIENT);
    if constexpr (GRADIENT) {
        Complex *sums = (Complex*)arena.take<double>(2 * size_t(blocks.wide)), *moments = (Complex*)arena.take<double>(2 * size_t(blocks.wide));
        for (int64_t row = 0; row < job.a.r; row++) blocks.backward(row, sums, moments);
    } else {
        for (int64_t row = 0; row < job.a.r; row++) blocks.forward(row);
    }
}

struct CauchyArgs {
    int64_t r, h, n, k, threads;
    const double *alpha, *beta, *p, *q, *s, *c;  // (r, h, n) twice, (h, n) twice, (k) twice
    double* out;                                 // (r, h, k, 2)
    const double* g;                             // (r, h, k, 2)
    double *dalpha, *dbeta, *dp, *dq;
};

constexpr int ROWS = 4;  // read-outs at once
constexpr int DW = Simd<double>::W;

// 1 / ((c² q − 4 s²) − 4i s c p) as (re, im)
SL_INLINE void fraction(double p, double q, VD s, VD c, VD& re, VD& im) {
    const VD below = fnma(splat(4.0) * s, s, c * c * splat(q)), side = splat(-4.0 * p) * s * c;
    const VD size = splat(1.0) / fma(below, below, side * side);
    re = below * size, im = -side * size;
}
SL_INLINE VD some(const double* x, int lanes) { return lanes == DW ? load(x) : load_some<double>(x, lanes); }
// Real and imaginary parts of up to DW complex numbers; absent ones are 0.
SL_INLINE void split(const double* x, int lanes, VD& re, VD& im) {
    double a[DW] = {}, b[DW] = {};
    for (int i = 0; i < lanes; i++) a[i] = x[2 * i], b[i] = x[2 * i + 1];
    re = load(a), im = load(b);
}

void cauchy_task(void* context, int64_t h) {
    const CauchyArgs& a = ((Shared<CauchyArgs>*)context)->a;
    for (int64_t k = 0; k < a.k; k += DW) {
        const int lanes = int(a.k - k < DW ? a.k - k : DW);
        VD s = some(a.s + k, lanes), c = some(a.c + k, lanes);
        if (lanes < DW) {  // a fraction there is, though nobody wants it
            double one[DW];
            store(one, c);
            for (int i = lanes; i < DW; i++) one[i] = 1;
            c = load(one);
        }
        for (int64_t r0 = 0; r0 < a.r; r0 += ROWS) {
            const int rows = int(a.r - r0 < ROWS ? a.r - r0 : ROWS);
            VD re[ROWS] = {}, im[ROWS] = {};
            for (int64_t n = 0; n < a.n; n++) {
                VD x, y;
                fraction(a.p[h * a.n + n], a.q[h * a.n + n], s, c, x, y);
                const VD cx = c * x, cy = c * y, sx = s * x, sy = s * y;
                for (int r = 0; r < rows; r++) {
                    const int64_t at = ((r0 + r) * a.h + h) * a.n + n;
                    const VD al = splat(a.alpha[at]), be = splat(a.beta[at]);
                    re[r] = fnma(be, sy, fma(al, cx, re[r])), im[r] = fma(be, sx, fma(al, cy, im[r]));
                }
            }
            for (int r = 0; r < rows; r++) {
                double x[DW], y[DW];
                store(x, re[r]), store(y, im[r]);
                double* out = a.out + (((r0 + r) * a.h + h) * a.k + k) * 2;
                for (int i = 0; i < lanes; i++) out[2 * i] = x[i], out[2 * i + 1] = y[i];
            }
        }
    }
}

// One state after another; the incoming gradients of a few vectors of frequencies stay in the cache.
void cauchy_backward_task(void* context, int64_t h) {
    const CauchyArgs& a = ((Shared<CauchyArgs>*)context)->a;
    for (int64_t n = 0; n < a.n; n++) {
        const int64_t own = h * a.n + n;
        VD dp = {}, dq = {};
        for (int64_t r = 0; r < a.r; r++) a.dalpha[(r * a.h + h) * a.n + n] = a.dbeta[(r * a.h + h) * a.n + n] = 0;
        for (int64_t r = 0; r < a.r; r++) {
            const int64_t at = (r * a.h + h) * a.n + n;
            const VD al = splat(a.alpha[at]), be = splat(a.beta[at]);
            VD da = {}, db = {};
            for (int64_t k = 0; k < a.k; k += DW) {
                const int lanes = int(a.k - k < DW ? a.k - k : DW);
                const VD s = some(a.s + k, lanes);
                VD c = some(a.c + k, lanes), x, y, gr, gi;
                if (lanes < DW) {
                    double one[DW];
                    store(one, c);
                    for (int i = lanes; i < DW; i++) one[i] = 1;
                    c = load(one);
                }
                split(a.g + ((r * a.h + h) * a.k + k) * 2, lanes, gr, gi);
                fraction(a.p[own], a.q[own], s, c, x, y);
                const VD br = fma(gr, x, gi * y), bi = fnma(gi, x, gr * y);  // conj(g) · fraction
                da = fma(br, c, da), db = fnma(bi, s, db);
                const VD nr = c * al, ni = s * be;  // times the numerator, times the fraction
                const VD hr = fnma(bi, ni, br * nr), hi = fma(br, ni, bi * nr);
                const VD fr = fnma(hi, y, hr * x), fi = fma(hr, y, hi * x);
                dp = fma(fi * s, c, dp), dq = fma(fr * c, c, dq);
            }
            a.dalpha[at] = sum_lanes<double>(da), a.dbeta[at] = sum_lanes<double>(db);
        }
        a.dp[own] = -4 * sum_lanes<double>(dp), a.dq[own] = -sum_lanes<double>(dq);
    }
}

}  // namespace

SL_KERNEL(s4_kernel_forward) {
    const KernelArgs& a = *(const KernelArgs*)args;
    Shared<KernelArgs> job = {a, 0};
    const double cost = 2e-4 * double(a.h) * double(a.n) * (double(a.r) * double(a.t) + 400);
    sl_parallel(a.h, a.threads, cost, a.is_double ? kernel_task<double, false> : kernel_task<float, false>, &job);
    return job.failed;
}

SL_KERNEL(s4_kernel_backward) {
    const KernelArgs& a = *(const KernelArgs*)args;
    Shared<KernelArgs> job = {a, 0};
    const double cost = 4e-4 * double(a.h) * double(a.n) * (double(a.r) * double(a.t) + 400);
    sl_parallel(a.h, a.threads, cost, a.is_double ? kernel_task<double, true> : kernel_task<float, true>, &job);
    return job.failed;
}

SL_KERNEL(s4_cauchy_forward) {
    const CauchyArgs& a = *(const CauchyArgs*)args;
    Shared<CauchyArgs> job = {a, 0};
    sl_parallel(a.h, a.threads, 2e-3 * double(a.h) * double(a.n) * double(a.k), cauchy_task, &job);
    return SL_OK;
}

SL_KERNEL(s4_cauchy_backward) {
    const CauchyArgs& a = *(const CauchyArgs*)args;
    Shared<CauchyArgs> job = {a, 0};
    sl_parallel(a.h, a.threads, 4e-3 * double(a.r) * double(a.h) * double(a.n) * double(a.k), cauchy_backward_task, &job);
    return SL_OK;
}

// trapezoid_ssd on CPUs, forward and one step; cpu_backward.cpp has the gradient. The definition is in reference.py.
#include "cpu_trapezoid.h"

namespace {

struct Job {
    const Args& a;
    int failed;
};

template <class R>
struct Forward : Head<R> {
    typedef Head<R> Base;
    using typename Base::V;
    using Base::a, Base::channels, Base::head, Base::n, Base::ranks, Base::tile, Base::tiles, Base::vectors, Base::W, Base::x;
    // Tiles of all ranks [r][v][PITCH][W]: what a step adds by its own end of the trapezoid, and by the one before; y.
    R *own, *last, *y;

    static size_t scratch_bytes(const Args& a) {
        return Base::scratch_bytes(a) + sizeof(R) * 3 * ((a.p + W - 1) / W * W * PITCH * a.r) + 64 * 3;
    }
    Forward(const Args& args, Arena& arena) : Base(args, arena) {
        R** const all[] = {&own, &last, &y};
        for (R** p : all) *p = arena.take<R>(tiles * ranks);
    }

    void sequence(int64_t index) {
        const Segment segment = a.segments()[index];
        this->load_state(a.initial, index);
        for (int64_t first = 0; first < segment.stop - segment.start; first += T) {
            const int64_t left = segment.stop - segment.start - first;
            const int count = int(left < T ? left : T);
            const Span at = span(segment, a.reverse, first);
            this->load_all(segment.row, at, count, false);
            this->load_rows(this->Q, a.C, this->C_bias, segment.row, at, count);
            weigh(count);
            for_blocks<WIDE>(vectors, n, [&]<int NV, int NT>(int v, int64_t s) { advance<NV, NT>(v, s, count); });
            finish(segment.row, at, count);
            this->pass_on(count);
        }
        this->store_state(a.end, index);
    }
    void weigh(int count) const {
        for (int64_t k = 0; k < ranks; k++)
            for (int v = 0; v < vectors; v++) {
                const V mix = this->mixed(k, v);
                V past = load(this->before + v * W);
                for (int r = 0; r < count; r++) {
                    const int64_t i = v * tile + r * W;
                    const V now = load(x + i);
                    store(own + k * tiles + i, splat(this->newer[r]) * (mix * now));
                    store(last + k * tiles + i, splat(this->decay[r] * this->older[r]) * (mix * past));
                    past = now;
                }
            }
    }
    // The recurrence over `count` steps for NV vectors of channels and NT states; y accumulates S q.
    template <int NV, int NT>
    __attribute__((noinline)) void advance(int v0, int64_t s0, int count) const {
        V S_[NT][NV];
        R* const state = this->S + (v0 * n + s0) * W;
#pragma GCC unroll 8
        for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) S_[s][v] = load(state + (v * n + s) * W);
        for (int r = 0; r < count; r++) {
            const V shrink = splat(this->decay[r]);
            const R *b = this->K + r * ranks * n + s0, *c = this->Q + r * ranks * n + s0;
#pragma GCC unroll 8
            for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) S_[s][v] = S_[s][v] * shrink;
            for (int64_t k = 0; k < ranks; k++, b += n) {
                const int64_t i = k * tiles + v0 * tile + r * W;
                V in[NV], past[NV];
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) in[v] = load(own + i + v * tile), past[v] = load(last + i + v * tile);
#pragma GCC unroll 8
                for (int s = 0; s < NT; s++) {
                    const V now = splat(b[ranks * n + s]), then = splat(b[s]);
#pragma GCC unroll 8
                    for (int v = 0; v < NV; v++) S_[s][v] = fma(past[v], then, fma(in[v], now, S_[s][v]));
                }
            }
            for (int64_t k = 0; k < ranks; k++, c += n) {
                R* const out = y + k * tiles + v0 * tile + r * W;
                V out_[NV];
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) out_[v] = s0 ? load(out + v * tile) : V{};
#pragma GCC unroll 8
                for (int s = 0; s < NT; s++) {
                    const V cs = splat(c[s]);
#pragma GCC unroll 8
                    for (int v = 0; v < NV; v++) out_[v] = fma(S_[s][v], cs, out_[v]);
                }
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) store(out + v * tile, out_[v]);
            }
        }
#pragma GCC unroll 8
        for (int s = 0; s < NT; s++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) store(state + (v * n + s) * W, S_[s][v]);
    }
    // y + D·v, gated or not, to memory.
    void finish(int64_t row, Span at, int count) const {
        this->load_gate(row, at, count);
        for (int64_t k = 0; k < ranks; k++)
            for (int v = 0; v < vectors; v++) {
                const V skip = splat(this->D) * this->mixed(k, v);
                for (int r = 0; r < count; r++) {
                    const int64_t i = v * tile + r * W;
                    const V out = n ? load(y + k * tiles + i) : V{};
                    store(y + k * tiles + i, a.D ? fma(skip, load(x + i), out) : out);
                }
            }
        if (a.z.data)
            for (int v = 0; v < vectors; v++)
                for (int r = 0; r < count; r++) {
                    const int64_t i = v * tile + r * W;
                    store(y + i, gated(y + i, tiles, load(this->z + i), v));
                }
        for (int64_t k = 0; k < a.outputs(); k++) {
            char* const to = a.y.data + dtype_size(a.y.dtype) * ((((row * a.t + at.token) * a.h + head) * a.outputs() + k) * channels);
            store_tile(y + k * tiles, PITCH, 0, count, channels, a.y.dtype, to, at.direction * a.h * a.outputs() * channels);
        }
    }
    // Σ_r y_mix y silu(z_mix z) of a vector of channels; y of the next rank lies `apart`.
    V gated(const R* from, int64_t apart, V z, int v) const {
        V sum = {};
        for (int64_t k = 0; k < ranks; k++)
            sum = fma(load(from + k * apart) * this->of_mix(this->y_mix, k, v), silu<R>(z * this->of_mix(this->z_mix, k, v)), sum);
        return sum;
    }

    // One token in place, channel after channel, states in lanes: the state is read and written once, as it lies.
    void token(int64_t row, int64_t slot) {
        const Span at = {0, 1};
        R* const S = this->of(a.initial.ssm, slot, channels * n);
        R* const old = this->of(a.initial.k, slot, ranks * n);
        R* const past = this->of(a.initial.v, slot, channels);
        R* const turned = this->pairs ? this->of(a.initial.angle, slot, this->pairs) : nullptr;
        if (turned) __builtin_memcpy(this->angle, turned, sizeof(R) * this->pairs);
        this->load_all(row, at, 1, false);
        this->load_rows(this->Q, a.C, this->C_bias, row, at, 1);
        R* const now = this->K + ranks * n;
        read_numbers(this->before, channels, a.x.dtype, a.x.at(row, 0, head));
        const V shrink = splat(this->decay[0]);
        const int64_t full = n / W * W, width = int64_t(vectors) * W;
        const int rest = int(n - full);
        for (int c = 0; c < channels; c++) {
            R* const state = S + c * n;
            const auto at_states = [&]<class Load>(int64_t s, Load&& load_of) {
                V sum = load_of(state + s) * shrink;
                for (int64_t k = 0; k < ranks; k++) {
                    const R weight = this->mix[k * width + c];
                    const V in = splat(this->newer[0] * (weight * this->before[c]));
                    const V then = splat(this->decay[0] * this->older[0] * (weight * past[c]));
                    sum = fma(then, load_of(old + k * n + s), fma(in, load_of(now + k * n + s), sum));
                }
                return sum;
            };
            const auto some = [&](const R* p) { return load_some<R>(p, rest); };
            for (int64_t s = 0; s < full; s += W) store(state + s, at_states(s, [](const R* p) { return load(p); }));
            if (rest) store_some<R>(state + full, at_states(full, some), rest);
            for (int64_t k = 0; k < ranks; k++) {
                const R* const q = this->Q + k * n;
                V sum = {};
                for (int64_t s = 0; s < full; s += W) sum = fma(load(state + s), load(q + s), sum);
                if (rest) sum = fma(some(state + full), some(q + full), sum);
                y[k * width + c] = sum_lanes<R>(sum) + this->D * (this->mix[k * width + c] * this->before[c]);
            }
        }
        if (a.z.data) read_numbers(this->z, channels, a.z.dtype, a.z.at(row, 0, head));
        for (int v = 0; v < vectors && a.z.data; v++) store(y + v * W, gated(y + v * W, width, load(this->z + v * W), v));
        for (int64_t k = 0; k < a.outputs(); k++) {
            const int64_t to = ((row * a.h + head) * a.outputs() + k) * channels;
            write_numbers(y + k * width, channels, a.y.dtype, a.y.data + dtype_size(a.y.dtype) * to);
        }
        __builtin_memcpy(old, now, sizeof(R) * ranks * n);
        __builtin_memcpy(past, this->before, sizeof(R) * channels);
        if (turned) __builtin_memcpy(turned, this->angle, sizeof(R) * this->pairs);
    }
};

template <class R, bool STEP>
void run(void* context, int64_t task) {
    Job& job = *(Job*)context;
    const Args& a = job.a;
    const int64_t row = task / a.h, slot = STEP && a.index ? a.index[row] : row;
    if (slot < 0) return;
    Arena arena = {(char*)sl_scratch(Forward<R>::scratch_bytes(a))};
    if (!arena.memory) {
        job.failed = SL_NO_MEMORY;
        return;
    }
    Forward<R> k(a, arena);
    k.select(task % a.h);
    if (STEP)
        k.token(row, slot);
    else
        k.sequence(row);
}

}  // namespace

SL_KERNEL(trapezoid_ssd_forward) {
    const Args& a = *(const Args*)args;
    if (!a.segments().valid()) return SL_BAD_SEGMENTS;
    Job job = {a, SL_OK};
    sl_parallel(a.count * a.h, a.threads, a.cost_us(a.is_double ? 12 : 6), a.is_double ? run<double, false> : run<float, false>, &job);
    return job.failed;
}

SL_KERNEL(trapezoid_ssd_step) {
    const Args& a = *(const Args*)args;
    for (int64_t row = 0; row < a.b; row++)
        if ((a.index ? a.index[row] : row) >= a.slots) return SL_BAD_INDEX;
    Job job = {a, SL_OK};
    sl_parallel(a.b * a.h, a.threads, a.cost_us(a.is_double ? 20 : 10), a.is_double ? run<double, true> : run<float, true>, &job);
    return job.failed;
}

// One token for each of b sequences through a whole Mamba-1 language model with packed matrices: embedding, blocks, final norm, head.
// The definition is LanguageModel.step_.
//
// A token is a chain of phases, each cut into chunks that threads take as they come; a thread that finds no chunk left waits
// for the phase to be done. Any number of threads may come, even late or never: one alone does all. No chunk's result depends on
// who computes it or on how phases are cut, so neither does the token.
// Suffixes and letters: b sequence, d channel of the inner width, n state, k tap, r rank of the step size.
#include <sched.h>
#include <stdlib.h>

#include "packed.h"
#include "pool.h"

namespace {

struct Norm {
    const float *weight, *bias;  // (d_model); a bias makes it LayerNorm
};
struct Layer {
    Norm norm;
    Packed in_proj, x_proj, dt_proj, out_proj;
    const float *taps, *conv_bias;  // (k, d), (d) or null
    const float *A2, *D, *dt_bias;  // (d, n) = -exp(A_log) · log2(e), (d), (d)
    Norm norm2;                     // of the MLP; null weight: there is none
    Packed fc1, fc2;
};
// Laid out as Python packs it: every field is eight bytes.
struct Args {
    int64_t b, layers, d_model, d, n, r, k, hidden, threads;
    double eps;
    const Layer* layer;
    Norm norm;
    Packed embedding, head;
    const int64_t* ids;            // (b)
    float* const (*states)[2];     // a layer's convolution (b, k-1, d) and scan (b, d, n) states, changed in place
    float* logits;                 // (b, rows of the head)
};

constexpr int W = Simd<float>::W;
constexpr int SPINS = 4000;
constexpr int64_t CHUNKS = 24;  // of a phase, for each thread

struct alignas(128) Phase {
    int64_t next, done;
};

inline int64_t wide(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Row `row` as numbers: to (columns).
static void unpack_row(const Packed& w, int64_t row, float* to) {
    const int64_t block = row / LANES, lane = row % LANES, steps = w.lanes();
    const char* p = w.data + block * steps * 64 + 4 * lane;
    if (w.format == PACKED_BF16) {
        for (int64_t c = 0; c < w.columns; c++) to[c] = bits<float>(uint32_t(load_as<uint16_t>(p + c / 2 * 64 + c % 2 * 2)) << 16);
    } else if (w.format == PACKED_INT8) {
        const float scale = ((const float*)w.scales)[row];
        for (int64_t c = 0; c < w.columns; c++) to[c] = float(int(uint8_t(p[c / 4 * 64 + c % 4])) - 128) * scale;
    } else {
        const uint16_t* scales = (const uint16_t*)w.scales + block * (w.padded() / GROUP) * LANES + lane;
        for (int64_t c = 0; c < w.columns; c++) {
            const int byte = uint8_t(p[c / 8 * 64 + c % 4]), q = (c % 8 < 4 ? byte : byte >> 4) & 15;
            to[c] = float(q - 8) * bits<float>(uint32_t(scales[c / GROUP * LANES]) << 16);
        }
    }
}

// What all threads share: vectors of each sequence, one row a sequence, and the phases.
struct Token {
    const Args& a;
    Phase* phases;
    float *x, *stream, *h, *xz, *u, *select, *y, *mlp;
    int finished;  // some thread saw the last phase done; one without memory leaves the work to the others
};

// One thread's walk through the phases.
struct Worker {
    Token& t;
    const Args& a;
    Phase* phase;
    char* prepared;   // rows of x as the phase's matrix reads them

    template <class F>
    void run(int64_t chunks, F&& chunk) {
        Phase& p = *phase++;
        for (;;) {
            const int64_t i = __atomic_fetch_add(&p.next, 1, __ATOMIC_RELAXED);
            if (i >= chunks) break;
            chunk(i);
            __atomic_fetch_add(&p.done, 1, __ATOMIC_RELEASE);
        }
        for (int spins = 0; __atomic_load_n(&p.done, __ATOMIC_ACQUIRE) < chunks; spins++) {
            if (spins > SPINS) sched_yield();
#if defined(__SSE2__)
            _mm_pause();
#endif
        }
    }

    // Blocks in a chunk: whole tiles, small enough that the last one does not keep the other threads waiting.
    int64_t blocks_of_chunk(int64_t blocks) const {
        const int64_t each = blocks / (CHUNKS * a.threads);
        return each < MOST_R ? MOST_R : each / MOST_R * MOST_R;
    }

    // out[i · stride + row] = (w · from row i) + bias, all rows of w, as one phase.
    void multiply(const Packed& w, const float* from, int64_t from_stride, float* out, int64_t stride) {
        const int64_t each = w.blocks() < 8 * a.threads ? 1 : blocks_of_chunk(w.blocks());
        bool ready = false;
        run((w.blocks() + each - 1) / each, [&](int64_t i) {
            if (!ready) ready = true, prepare_all(w, from, from_stride);
            const int64_t first = i * each, last = first + each < w.blocks() ? first + each : w.blocks();
            product(w, first, last, prepared, w.x_bytes(), a.b, [&](int64_t m, int64_t block, float* sums) {
                add_bias(w, block, sums);
                const int64_t rows = w.rows - block * LANES < LANES ? w.rows - block * LANES : LANES;
                __builtin_memcpy(out + m * stride + block * LANES, sums, sizeof(float) * rows);
            });
        });
    }
    void prepare_all(const Packed& w, const float* from, int64_t stride) {
        for (int64_t i = 0; i < a.b; i++) prepare(w, from + i * stride, prepared + i * w.x_bytes());
    }
    static void add_bias(const Packed& w, int64_t block, float* sums) {
        if (!w.bias) return;
        const int64_t row = block * LANES;
        for (int64_t i = 0; i < LANES && row + i < w.rows; i++) sums[i] += w.bias[row + i];
    }

    // stream += x; h = norm(stream).
    void normalise(const Norm& norm, bool first) {
        run(a.b, [&](int64_t i) {
            float *s = t.stream + i * wide(a.d_model), *h = t.h + i * wide(a.d_model);
            const float* x = t.x + i * wide(a.d_model);
            const int64_t n = a.d_model;
            VF sums = {}, squares = {};
            for (int64_t c = 0; c < wide(n); c += W) {  // padded with zeros
                const VF v = first ? load(x + c) : load(s + c) + load(x + c);
                store(s + c, v);
                sums += v;
                squares = fma(v, v, squares);
            }
            float mean = 0, square = sum_lanes<float>(squares) / float(n);
            if (norm.bias) {
                mean = sum_lanes<float>(sums) / float(n);
                VF spread = {};
                for (int64_t c = 0; c < n; c += W) {
                    const VF v = c + W <= n ? load(s + c) - splat(mean) : centred_tail(s + c, int(n - c), mean);
                    spread = fma(v, v, spread);
                }
                square = sum_lanes<float>(spread) / float(n);
            }
            const float scale = 1.0f / __builtin_sqrtf(square + float(a.eps));
            for (int64_t c = 0; c < n; c++) h[c] = (s[c] - mean) * scale * norm.weight[c] + (norm.bias ? norm.bias[c] : 0.0f);
        });
    }
    static VF centred_tail(const float* p, int lanes, float mean) {
        float full[W] = {};
        for (int i = 0; i < lanes; i++) full[i] = p[i] - mean;
        return load(full);
    }

    // u = silu(convolution of the first half of xz), and the state moves on by one.
    void convolve(const Layer& l, float* state) {
        const int64_t each = 128;
        run((a.d + each - 1) / each, [&](int64_t chunk) {
            const int64_t first = chunk * each, last = first + each < a.d ? first + each : a.d;
            for (int64_t i = 0; i < a.b; i++) {
                float *memory = state + i * (a.k - 1) * a.d, *u = t.u + i * wide(a.d);
                const float* x = t.xz + i * wide(2 * a.d);
                for (int64_t c = first; c < last; c += W) {
                    const int lanes = int(last - c < W ? last - c : W);
                    auto read = [&](const float* p) { return lanes == W ? load(p) : load_some<float>(p, lanes); };
                    auto write = [&](float* p, VF v) { lanes == W ? store(p, v) : store_some<float>(p, v, lanes); };
                    VF sum = l.conv_bias ? read(l.conv_bias + c) : VF{};
                    const VF newest = read(x + c);
                    for (int64_t j = 0; j + 1 < a.k; j++) {
                        sum = fma(read(l.taps + j * a.d + c), read(memory + j * a.d + c), sum);
                        write(memory + j * a.d + c, j + 2 < a.k ? read(memory + (j + 1) * a.d + c) : newest);
                    }
                    sum = fma(read(l.taps + (a.k - 1) * a.d + c), newest, sum);
                    write(u + c, silu<float>(sum));
                }
            }
        });
    }

    // Step sizes, the recurrence and the gate: y = (C·h + D u) · silu(z).
    void scan(const Layer& l, float* state) {
        const int64_t blocks = l.dt_proj.blocks(), each = blocks_of_chunk(blocks), width = wide(a.r + 2 * a.n);
        bool ready = false;
        run((blocks + each - 1) / each, [&](int64_t chunk) {
            if (!ready) ready = true, prepare_all(l.dt_proj, t.select, width);
            const int64_t first = chunk * each, last = first + each < blocks ? first + each : blocks;
            product(l.dt_proj, first, last, prepared, l.dt_proj.x_bytes(), a.b, [&](int64_t i, int64_t block, float* dt) {
                const float *select = t.select + i * width, *z = t.xz + i * wide(2 * a.d) + a.d;
                const int64_t c = block * LANES, count = a.d - c < LANES ? a.d - c : LANES;
                advance(l, c, count, dt, t.u + i * wide(a.d) + c, z + c, select + a.r, select + a.r + a.n,
                        state + (i * a.d + c) * a.n, t.y + i * wide(a.d) + c);
            });
        });
    }
    void advance(const Layer& l, int64_t c, int64_t count, float* dt, const float* u, const float* z, const float* B, const float* C,
                 float* state, float* y) const {
        const int64_t n = a.n;
        float out[LANES] = {}, gate[LANES] = {}, bias[LANES] = {};
        __builtin_memcpy(bias, l.dt_bias + c, sizeof(float) * count);
        __builtin_memcpy(gate, z, sizeof(float) * count);
        for (int i = 0; i < LANES; i += W) {
            VF value, slope;
            softplus<float>(load(dt + i) + load(bias + i), value, slope);
            store(dt + i, value);
            store(gate + i, silu<float>(load(gate + i)));
        }
        for (int64_t first = 0; first < LANES; first += W) {
            VF sum[W] = {};
#pragma GCC unroll 16
            for (int j = 0; j < W; j++)
                if (first + j < count)
                    sum[j] = advance_channel(l.A2 + (c + first + j) * n, dt[first + j], u[first + j], B, C, state + (first + j) * n);
            store(out + first, sums_of_lanes(sum));
        }
        for (int64_t j = 0; j < count; j++) y[j] = (out[j] + l.D[c + j] * u[j]) * gate[j];
    }
    // h ← exp(dt A) h + dt u B of one channel; C·h, to be summed over lanes.
    VF advance_channel(const float* A2, float dt, float u, const float* B, const float* C, float* state) const {
        const int64_t n = a.n;
        const VF size = splat(dt), drive = splat(dt * u);
        VF sum = {};
        int64_t s = 0;
        for (; s + W <= n; s += W) {
            const VF h = decayed(load(A2 + s) * size, load(state + s), drive * load(B + s));
            store(state + s, h);
            sum = fma(h, load(C + s), sum);
        }
        if (s < n) {
            const int lanes = int(n - s);
            const VF h = decayed(load_some<float>(A2 + s, lanes) * size, load_some<float>(state + s, lanes),
                                 drive * load_some<float>(B + s, lanes));
            store_some<float>(state + s, h, lanes);
            sum = fma(h, load_some<float>(C + s, lanes), sum);
        }
        return sum;
    }
    // exp2 may lose a NaN; a product with it does not.
    static VF decayed(VF exponent, VF h, VF input) { return fma(exponent == exponent ? exp2(exponent) : exponent, h, input); }

    // value · silu(gate) of fc1's two halves.
    void gate_mlp() {
        run(a.b, [&](int64_t i) {
            float* value = t.mlp + i * wide(2 * a.hidden);
            for (int64_t c = 0; c < a.hidden; c += W) {  // hidden is a multiple of 128
                const VF v = load(value + c), g = load(value + a.hidden + c);
                store(value + c, v * silu<float>(g));
            }
        });
    }

    void whole_token() {
        run(a.b, [&](int64_t i) { unpack_row(a.embedding, a.ids[i], t.x + i * wide(a.d_model)); });
        const int64_t model = wide(a.d_model), inner = wide(a.d);
        for (int64_t i = 0; i < a.layers; i++) {
            const Layer& l = a.layer[i];
            normalise(l.norm, i == 0);
            multiply(l.in_proj, t.h, model, t.xz, wide(2 * a.d));
            convolve(l, a.states[i][0]);
            multiply(l.x_proj, t.u, inner, t.select, wide(a.r + 2 * a.n));
            scan(l, a.states[i][1]);
            multiply(l.out_proj, t.y, inner, t.x, model);
            if (l.norm2.weight) {
                normalise(l.norm2, false);
                multiply(l.fc1, t.h, model, t.mlp, wide(2 * a.hidden));
                gate_mlp();
                multiply(l.fc2, t.mlp, wide(2 * a.hidden), t.x, model);
            }
        }
        normalise(a.norm, a.layers == 0);
        multiply(a.head, t.h, model, a.logits, a.head.rows);
    }
};

int64_t widest_x(const Args& a) {
    int64_t most = a.head.x_bytes();
    auto see = [&](const Packed& w) { most = w.data && w.x_bytes() > most ? w.x_bytes() : most; };
    for (int64_t i = 0; i < a.layers; i++) {
        const Layer& l = a.layer[i];
        see(l.in_proj), see(l.x_proj), see(l.dt_proj), see(l.out_proj), see(l.fc1), see(l.fc2);
    }
    return most;
}

void work(void* context, int64_t) {
    Token& t = *(Token*)context;
    char* memory = (char*)sl_scratch(t.a.b * widest_x(t.a));
    if (!memory) return;
    Worker worker = {t, t.a, t.phases, memory};
    worker.whole_token();
    __atomic_store_n(&t.finished, 1, __ATOMIC_RELAXED);
}

}  // namespace

SL_KERNEL(decode_token) {
    const Args& a = *(const Args*)args;
    if (!a.b) return SL_OK;
    const int64_t phases = 2 + a.layers * 10 + 1, model = wide(a.d_model), inner = wide(a.d);
    const int64_t floats = a.b * (3 * model + wide(2 * a.d) + 2 * inner + wide(a.r + 2 * a.n) + wide(2 * a.hidden)) + 64;
    const size_t bytes = sizeof(Phase) * phases + sizeof(float) * floats;
    char* memory = nullptr;
    if (posix_memalign((void**)&memory, 128, bytes)) return SL_NO_MEMORY;
    __builtin_memset(memory, 0, bytes);
    Arena arena = {memory};
    Token t = {a, arena.take<Phase>(phases)};
    float* p = arena.take<float>(floats);
    auto take = [&](int64_t width) { float* here = p; p += a.b * width; return here; };
    t.x = take(model), t.stream = take(model), t.h = take(model), t.xz = take(wide(2 * a.d));
    t.u = take(inner), t.y = take(inner), t.select = take(wide(a.r + 2 * a.n)), t.mlp = take(wide(2 * a.hidden));
    sl_parallel(a.threads, a.threads, 1e9, work, &t);
    free(memory);
    return t.finished ? SL_OK : SL_NO_MEMORY;
}

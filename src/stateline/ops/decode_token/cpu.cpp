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
constexpr int64_t FETCHED = 384 << 10;

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
    float *x, *stream[2], *z, *u, *select, *y, *mlp;
    int finished;  // some thread saw the last phase done; one without memory leaves the work to the others
};

// One thread's walk through the phases.
struct Worker {
    Token& t;
    const Args& a;
    Phase* phase;
    char* prepared;   // rows of x as the phase's matrix reads them
    float* h;         // (d_model) a normalised row
    int current = 0;  // the stream to read

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

    // One phase: sink(i, block, rows, sums) for all rows of w times what `prepare_x` made of each sequence, 16 at a time, with bias.
    template <class P, class F>
    void product_phase(const Packed& w, P&& prepare_x, F&& sink) {
        const int64_t blocks = w.blocks(), each = blocks < 8 * a.threads ? 1 : blocks_of_chunk(blocks);
        bool ready = false;
        run((blocks + each - 1) / each, [&](int64_t chunk) {
            if (!ready) ready = true, prepare_x(chunk == 0);
            const int64_t first = chunk * each, last = first + each < blocks ? first + each : blocks;
            product(w, first, last, prepared, w.x_bytes(), a.b, [&](int64_t i, int64_t block, float* sums) {
                const int64_t row = block * LANES, rows = w.rows - row < LANES ? w.rows - row : LANES;
                if (w.bias)
                    for (int64_t j = 0; j < rows; j++) sums[j] += w.bias[row + j];
                sink(i, row, rows, sums);
            });
        });
    }
    void prepare_all(const Packed& w, const float* from, int64_t stride) {
        for (int64_t i = 0; i < a.b; i++) prepare(w, from + i * stride, prepared + i * w.x_bytes());
    }
    // to[i · stride + row] = (w · from row i) + bias.
    void multiply(const Packed& w, const float* from, int64_t from_stride, float* to, int64_t stride) {
        product_phase(w, [&](bool) { prepare_all(w, from, from_stride); },
                      [&](int64_t i, int64_t row, int64_t rows, const float* sums) {
                          __builtin_memcpy(to + i * stride + row, sums, sizeof(float) * rows);
                      });
    }
    // The same, of norm(stream + x). Every thread that takes part normalises for itself, which costs less than to wait for one; the
    // first chunk's leaves the sum in the other stream, which nobody reads before the next phase.
    template <class F>
    void normalised_product(const Norm& norm, const Packed& w, F&& sink) {
        const int64_t width = wide(a.d_model);
        const float* old = t.stream[current];
        float* next = t.stream[current ^= 1];
        product_phase(w, [&](bool first) {
            for (int64_t i = 0; i < a.b; i++) {
                normalise(norm, old + i * width, t.x + i * width, first ? next + i * width : nullptr);
                prepare(w, h, prepared + i * w.x_bytes());
            }
        }, sink);
    }
    // h = norm(stream + x); the sum goes to `keep` if there is one. All rows are padded with zeros.
    void normalise(const Norm& norm, const float* stream, const float* x, float* keep) {
        const int64_t n = a.d_model;
        VF sums = {}, squares = {};
        for (int64_t c = 0; c < wide(n); c += W) {
            const VF v = load(stream + c) + load(x + c);
            store(h + c, v);
            if (keep) store(keep + c, v);
            sums += v;
            squares = fma(v, v, squares);
        }
        float mean = 0, square = sum_lanes<float>(squares) / float(n);
        if (norm.bias) {
            mean = sum_lanes<float>(sums) / float(n);
            VF spread = {};
            for (int64_t c = 0; c < n; c += W) {
                const VF v = c + W <= n ? load(h + c) - splat(mean) : centred_tail(h + c, int(n - c), mean);
                spread = fma(v, v, spread);
            }
            square = sum_lanes<float>(spread) / float(n);
        }
        const float scale = 1.0f / __builtin_sqrtf(square + float(a.eps));
        if (norm.bias)
            for (int64_t c = 0; c < n; c++) h[c] = (h[c] - mean) * scale * norm.weight[c] + norm.bias[c];
        else
            for (int64_t c = 0; c < n; c++) h[c] = h[c] * scale * norm.weight[c];
    }
    static VF centred_tail(const float* p, int lanes, float mean) {
        float full[W] = {};
        for (int i = 0; i < lanes; i++) full[i] = p[i] - mean;
        return load(full);
    }

    // in_proj, and as its rows come: u = silu(convolution) of the first d, whose state moves on by one, and z of the others.
    void enter(const Layer& l, float* state) {
        normalised_product(l.norm, l.in_proj, [&](int64_t i, int64_t row, int64_t rows, const float* sums) {
            const int64_t inner = row >= a.d ? 0 : row + rows <= a.d ? rows : a.d - row;
            if (inner) convolve(l, row, inner, sums, state + i * (a.k - 1) * a.d + row, t.u + i * wide(a.d) + row);
            __builtin_memcpy(t.z + i * wide(a.d) + row + inner - a.d, sums + inner, sizeof(float) * (rows - inner));
        });
    }
    void convolve(const Layer& l, int64_t c, int64_t count, const float* newest, float* memory, float* u) const {
        for (int64_t first = 0; first < count; first += W) {
            const int lanes = int(count - first < W ? count - first : W);
            auto read = [&](const float* p) { return lanes == W ? load(p) : load_some<float>(p, lanes); };
            auto write = [&](float* p, VF v) { lanes == W ? store(p, v) : store_some<float>(p, v, lanes); };
            const int64_t at = c + first;
            VF sum = l.conv_bias ? read(l.conv_bias + at) : VF{};
            const VF x = load(newest + first);
            for (int64_t j = 0; j + 1 < a.k; j++) {
                float* m = memory + j * a.d + first;
                sum = fma(read(l.taps + j * a.d + at), read(m), sum);
                write(m, j + 2 < a.k ? read(m + a.d) : x);
            }
            write(u + first, silu<float>(fma(read(l.taps + (a.k - 1) * a.d + at), x, sum)));
        }
    }

    // Asks for a share of a matrix that is wanted next, while the scan leaves memory idle; no more than second-level caches hold.
    void fetch(const Packed& w, int64_t first, int64_t last, int64_t of) const {
        const int64_t bytes = w.blocks() * w.lanes() * 64, most = a.threads * FETCHED, share = (bytes < most ? bytes : most) / of;
        const char* p = w.data + first * share;
        for (int64_t i = 0; i < (last - first) * share; i += 64) __builtin_prefetch(p + i, 0, 2);
    }

    // Step sizes, the recurrence and the gate: y = (C·h + D u) · silu(z).
    void scan(const Layer& l, float* state) {
        const int64_t blocks = l.dt_proj.blocks(), each = blocks_of_chunk(blocks), width = wide(a.r + 2 * a.n);
        bool ready = false;
        run((blocks + each - 1) / each, [&](int64_t chunk) {
            if (!ready) ready = true, prepare_all(l.dt_proj, t.select, width);
            const int64_t first = chunk * each, last = first + each < blocks ? first + each : blocks;
            fetch(l.out_proj, first, last, blocks);
            product(l.dt_proj, first, last, prepared, l.dt_proj.x_bytes(), a.b, [&](int64_t i, int64_t block, float* dt) {
                const float *select = t.select + i * width, *z = t.z + i * wide(a.d);
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

    // fc2(value · silu(gate)) of fc1's halves; hidden is a multiple of 128.
    void mlp(const Layer& l) {
        const int64_t width = wide(2 * a.hidden);
        normalised_product(l.norm2, l.fc1, [&](int64_t i, int64_t row, int64_t rows, const float* sums) {
            __builtin_memcpy(t.mlp + i * width + row, sums, sizeof(float) * rows);
        });
        run(a.b, [&](int64_t i) {
            float* value = t.mlp + i * width;
            for (int64_t c = 0; c < a.hidden; c += W) store(value + c, load(value + c) * silu<float>(load(value + a.hidden + c)));
        });
        multiply(l.fc2, t.mlp, width, t.x, wide(a.d_model));
    }

    void whole_token() {
        run(a.b, [&](int64_t i) { unpack_row(a.embedding, a.ids[i], t.x + i * wide(a.d_model)); });
        for (int64_t i = 0; i < a.layers; i++) {
            const Layer& l = a.layer[i];
            enter(l, a.states[i][0]);
            multiply(l.x_proj, t.u, wide(a.d), t.select, wide(a.r + 2 * a.n));
            scan(l, a.states[i][1]);
            multiply(l.out_proj, t.y, wide(a.d), t.x, wide(a.d_model));
            if (l.norm2.weight) mlp(l);
        }
        normalised_product(a.norm, a.head, [&](int64_t i, int64_t row, int64_t rows, const float* sums) {
            __builtin_memcpy(a.logits + i * a.head.rows + row, sums, sizeof(float) * rows);
        });
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
    const int64_t prepared = t.a.b * widest_x(t.a);
    char* memory = (char*)sl_scratch(prepared + sizeof(float) * wide(t.a.d_model));
    if (!memory) return;
    Worker worker = {t, t.a, t.phases, memory, (float*)(memory + prepared)};
    worker.whole_token();
    __atomic_store_n(&t.finished, 1, __ATOMIC_RELAXED);
}

}  // namespace

SL_KERNEL(decode_token) {
    const Args& a = *(const Args*)args;
    if (!a.b) return SL_OK;
    const int64_t phases = 2 + a.layers * 7, model = wide(a.d_model), inner = wide(a.d);
    const int64_t floats = a.b * (3 * model + 3 * inner + wide(a.r + 2 * a.n) + wide(2 * a.hidden)) + 64;
    const size_t bytes = sizeof(Phase) * phases + sizeof(float) * floats;
    char* memory = nullptr;
    if (posix_memalign((void**)&memory, 128, bytes)) return SL_NO_MEMORY;
    __builtin_memset(memory, 0, bytes);
    Arena arena = {memory};
    Token t = {a, arena.take<Phase>(phases)};
    float* p = arena.take<float>(floats);
    auto take = [&](int64_t width) { float* here = p; p += a.b * width; return here; };
    t.x = take(model), t.stream[0] = take(model), t.stream[1] = take(model);
    t.z = take(inner), t.u = take(inner), t.y = take(inner), t.select = take(wide(a.r + 2 * a.n)), t.mlp = take(wide(2 * a.hidden));
    sl_parallel(a.threads, a.threads, 1e9, work, &t);
    free(memory);
    return t.finished ? SL_OK : SL_NO_MEMORY;
}

// One token for each of b sequences through a whole Mamba-1 or Mamba-2 language model with packed matrices: embedding, blocks, final
// norm, head.
// The definition is LanguageModel.step_.
//
// A token is a chain of phases, each cut into chunks that threads take as they come; a thread that finds no chunk left waits
// for the phase to be done. Any number of threads may come, even late or never: one alone does all. No chunk's result depends on
// who computes it or on how phases are cut, so neither does the token.
// Suffixes and letters: b sequence, d channel of the inner width, n state, k tap, r rank of the step size, h head, g group.
#include <sched.h>
#include <stdlib.h>

#include "head_step.h"
#include "packed.h"
#include "pool.h"

namespace {

struct Norm {
    const float *weight, *bias;  // (d_model); a bias makes it LayerNorm
};
struct Layer {
    Norm norm;
    Packed in_proj, x_proj, dt_proj, out_proj;  // x_proj, dt_proj: of Mamba-1
    const float *taps, *conv_bias;              // (k, channels), (channels) or null
    const float *A, *D, *dt_bias;               // Mamba-1: (d, n) = -exp(A_log) · log2(e), (d), (d); Mamba-2: (h) = -exp(A_log), (d), (h)
    const float* scale;                         // (d) of the norm before out_proj
    Norm norm2;                                 // of the MLP; null weight: there is none
    Packed fc1, fc2;
};
// Of Mamba-2; h is 0 for Mamba-1. beside: channels of the gated unit beside the recurrence. normalise: before out_proj, in g groups;
// gate_last: and before the gate.
struct Heads {
    int64_t h, g, beside, normalise, gate_last;
    double low, high, eps;  // of dt; of the norm
};
// Laid out as Python packs it: every field is eight bytes.
struct Args {
    int64_t b, layers, d_model, d, n, r, k, hidden;
    Heads heads;
    int64_t threads;
    double eps;
    const Layer* layer;
    Norm norm;
    Packed embedding, head;
    const int64_t* ids;            // (b)
    float* const (*states)[2];     // a layer's convolution (b, k-1, channels) and scan (b, d, n) states, changed in place
    float* logits;                 // (b, rows of the head)

    int64_t channels() const { return heads.h ? d + 2 * heads.g * n : d; }  // of the convolution
    int64_t before() const { return heads.h ? 2 * heads.beside + d : 0; }   // rows of in_proj that come before them
    int64_t rest() const { return heads.h ? before() + channels() + heads.h : 2 * d; }  // rows of in_proj
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
    float *x, *stream[2], *rest, *u, *select, *y, *mlp;  // rest: rows of in_proj, of which the convolution's come to u
    int finished;  // some thread saw the last phase done; one without memory leaves the work to the others
};

// One thread's walk through the phases.
struct Worker {
    Token& t;
    const Args& a;
    Phase* phase;
    char* prepared;   // rows of x as the phase's matrix reads them
    float* h;         // (d_model or the columns of out_proj) a normalised row
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

    // in_proj, and as its rows come: u = silu(convolution) of some, whose state moves on by one; the others stay as they are.
    void enter(const Layer& l, float* state) {
        const int64_t begin = a.before(), channels = a.channels(), end = begin + channels;
        auto within = [&](int64_t row) { return row < begin ? begin : row > end ? end : row; };
        normalised_product(l.norm, l.in_proj, [&](int64_t i, int64_t row, int64_t rows, const float* sums) {
            __builtin_memcpy(t.rest + i * wide(a.rest()) + row, sums, sizeof(float) * rows);
            const int64_t c = within(row) - begin, count = within(row + rows) - begin - c;
            if (count)
                convolve(l, c, count, sums + begin + c - row, state + i * (a.k - 1) * channels + c, t.u + i * wide(channels) + c);
        });
    }
    void convolve(const Layer& l, int64_t c, int64_t count, const float* newest, float* memory, float* u) const {
        const int64_t channels = a.channels();
        for (int64_t first = 0; first < count; first += W) {
            const int lanes = int(count - first < W ? count - first : W);
            auto read = [&](const float* p) { return lanes == W ? load(p) : load_some<float>(p, lanes); };
            auto write = [&](float* p, VF v) { lanes == W ? store(p, v) : store_some<float>(p, v, lanes); };
            const int64_t at = c + first;
            VF sum = l.conv_bias ? read(l.conv_bias + at) : VF{};
            const VF x = load(newest + first);
            for (int64_t j = 0; j + 1 < a.k; j++) {
                float* m = memory + j * channels + first;
                sum = fma(read(l.taps + j * channels + at), read(m), sum);
                write(m, j + 2 < a.k ? read(m + channels) : x);
            }
            write(u + first, silu<float>(fma(read(l.taps + (a.k - 1) * channels + at), x, sum)));
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
                const float *select = t.select + i * width, *z = t.rest + i * wide(a.rest()) + a.d;
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
                    sum[j] = advance_channel(l.A + (c + first + j) * n, dt[first + j], u[first + j], B, C, state + (first + j) * n);
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

    // Mamba-2: step sizes, the recurrence and, unless a norm comes first, the gate; the gated unit beside them.
    void scan_heads(const Layer& l, float* state) {
        const Heads& q = a.heads;
        const int64_t p = a.d / q.h, few = a.b * q.h < 8 * a.threads && p > LANES, each = few ? LANES : p, parts = (p + each - 1) / each;
        const int64_t chunks = a.b * q.h * parts;
        run(chunks + (q.beside ? a.b : 0), [&](int64_t chunk) {
            if (chunk >= chunks) return unit_beside(chunk - chunks);
            const int64_t i = chunk / (q.h * parts), head = chunk / parts % q.h, c = chunk % parts * each;
            advance_head(l, i, head, c, p - c < each ? p - c : each, state + (i * a.d + head * p + c) * a.n);
        });
    }
    // `count` channels of a head of width p from its c-th on.
    void advance_head(const Layer& l, int64_t i, int64_t head, int64_t c, int64_t count, float* state) {
        const Heads& q = a.heads;
        const float *u = t.u + i * wide(a.channels()), *B = u + a.d + head * q.g / q.h * a.n;
        float* rest = t.rest + i * wide(a.rest());
        VF size, slope;
        softplus<float>(splat(rest[a.before() + a.channels() + head] + l.dt_bias[head]), size, slope);
        const VF low = splat(float(q.low)), high = splat(float(q.high));
        size = size < low ? low : size;
        size = size > high ? high : size;
        float dt[W], decay[W];
        store(dt, size);
        store(decay, exp(size * splat(l.A[head])));
        c += head * (a.d / q.h);
        float *y = t.y + i * wide(q.beside + a.d) + q.beside + c, *z = rest + 2 * q.beside + c;
        advance_channels(decay[0], dt[0], u + c, int(count), B, B + q.g * a.n, a.n, state, y);
        for (int64_t j = 0; j < count; j += W) {
            const int lanes = int(count - j < W ? count - j : W);
            auto read = [&](const float* p) { return lanes == W ? load(p) : load_some<float>(p, lanes); };
            auto write = [&](float* p, VF v) { lanes == W ? store(p, v) : store_some<float>(p, v, lanes); };
            const VF gate = silu<float>(read(z + j)), out = fma(read(l.D + c + j), read(u + c + j), read(y + j));
            write(y + j, q.gate_last ? out : out * gate);
            if (q.gate_last) write(z + j, gate);
        }
    }
    void unit_beside(int64_t i) {
        const int64_t count = a.heads.beside;
        const float *gate = t.rest + i * wide(a.rest()), *value = gate + count;
        float* y = t.y + i * wide(count + a.d);
        for (int64_t c = 0; c < count; c += W) {
            const int lanes = int(count - c < W ? count - c : W);
            store_some<float>(y + c, silu<float>(load_some<float>(gate + c, lanes)) * load_some<float>(value + c, lanes), lanes);
        }
    }
    // out_proj of what `scan_heads` left, normalised in groups; as in `normalised_product` by every thread for itself.
    void leave(const Layer& l) {
        const Heads& q = a.heads;
        const int64_t width = q.beside + a.d;
        if (!q.normalise) return multiply(l.out_proj, t.y, wide(width), t.x, wide(a.d_model));
        product_phase(l.out_proj, [&](bool) {
            for (int64_t i = 0; i < a.b; i++) {
                const float *y = t.y + i * wide(width), *gate = t.rest + i * wide(a.rest()) + 2 * q.beside;
                __builtin_memcpy(h, y, sizeof(float) * q.beside);
                for (int64_t g = 0; g < q.g; g++) normalise_group(l, g * (a.d / q.g), y + q.beside, gate);
                prepare(l.out_proj, h, prepared + i * l.out_proj.x_bytes());
            }
        }, [&](int64_t i, int64_t row, int64_t rows, const float* sums) {
            __builtin_memcpy(t.x + i * wide(a.d_model) + row, sums, sizeof(float) * rows);
        });
    }
    // h = y / rms(y) · scale, times the gate where it comes last, of the group that starts at channel `from`.
    void normalise_group(const Layer& l, int64_t from, const float* y, const float* gate) {
        const int64_t end = from + a.d / a.heads.g;
        VF squares = {};
        for (int64_t c = from; c < end; c += W) {
            const VF v = c + W <= end ? load(y + c) : load_some<float>(y + c, int(end - c));
            squares = fma(v, v, squares);
        }
        const float by = 1.0f / __builtin_sqrtf(sum_lanes<float>(squares) / float(end - from) + float(a.heads.eps));
        float* to = h + a.heads.beside;
        for (int64_t c = from; c < end; c++) to[c] = y[c] * by * l.scale[c];
        if (a.heads.gate_last)
            for (int64_t c = from; c < end; c++) to[c] *= gate[c];
    }

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
            if (a.heads.h) {
                scan_heads(l, a.states[i][1]);
                leave(l);
            } else {
                multiply(l.x_proj, t.u, wide(a.d), t.select, wide(a.r + 2 * a.n));
                scan(l, a.states[i][1]);
                multiply(l.out_proj, t.y, wide(a.d), t.x, wide(a.d_model));
            }
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
    const int64_t prepared = t.a.b * widest_x(t.a), inner = t.a.heads.beside + t.a.d;
    char* memory = (char*)sl_scratch(prepared + sizeof(float) * wide(t.a.d_model > inner ? t.a.d_model : inner));
    if (!memory) return;
    Worker worker = {t, t.a, t.phases, memory, (float*)(memory + prepared)};
    worker.whole_token();
    __atomic_store_n(&t.finished, 1, __ATOMIC_RELAXED);
}

}  // namespace

SL_KERNEL(decode_token) {
    const Args& a = *(const Args*)args;
    if (!a.b) return SL_OK;
    const int64_t phases = 2 + a.layers * 7, model = wide(a.d_model), rest = wide(a.rest()), u = wide(a.channels());
    const int64_t y = wide(a.heads.beside + a.d), select = wide(a.r + 2 * a.n), mlp = wide(2 * a.hidden);
    const int64_t floats = a.b * (3 * model + rest + u + y + select + mlp) + 64;
    const size_t bytes = sizeof(Phase) * phases + sizeof(float) * floats;
    char* memory = nullptr;
    if (posix_memalign((void**)&memory, 128, bytes)) return SL_NO_MEMORY;
    __builtin_memset(memory, 0, bytes);
    Arena arena = {memory};
    Token t = {a, arena.take<Phase>(phases)};
    float* p = arena.take<float>(floats);
    auto take = [&](int64_t width) { float* here = p; p += a.b * width; return here; };
    t.x = take(model), t.stream[0] = take(model), t.stream[1] = take(model);
    t.rest = take(rest), t.u = take(u), t.y = take(y), t.select = take(select), t.mlp = take(mlp);
    sl_parallel(a.threads, a.threads, 1e9, work, &t);
    free(memory);
    return t.finished ? SL_OK : SL_NO_MEMORY;
}

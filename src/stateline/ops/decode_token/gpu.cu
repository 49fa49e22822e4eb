// One token through a whole Mamba-1 model, as one cooperative launch of a block on every multiprocessor.
//
// A warp of each block does nothing but fetch: it streams the block's share of every matrix, in the order of use, through a ring
// of stages in shared memory, and does not wait where the others wait for all blocks. So device memory is read without a pause
// although a layer has four phases that need each other's results:
//   1 in_proj and the convolution   2 x_proj   3 dt_proj, the scan and the gate   4 out_proj, the residual sum
// A matrix goes in tiles of 16 rows, dealt out to the blocks in turn. Eight warps share the columns of a tile, multiply with
// mma.m16n8k16 (bfloat16, sums in float32) for NB · 8 sequences at once, and add up in the order of the warps: neither the number of
// sequences nor of blocks changes a result.
// RMSNorm is applied behind the matrix that reads it: rows of it are multiplied by the norm's weight before, by the norm after.
//
// Compiled for NB, TM tiles that a block multiplies at once, SLOTS pieces of a vector that a warp has under way, SPLIT or not, and for the formats of the matrices (native/packed.h): IN, X, OUT, HEAD; dt_proj is bfloat16. Integers multiply
// bfloat16 exactly; their scales are applied to sums, of a row (int8) or of 32 columns of a row (int4).
//
// Letters: b sequences, d width, e inner channels, n state, r rank of the step size; TAPS are compiled in.
// Vectors between phases lie as the mma wants them: for 16 columns of the matrix and a sequence 16 numbers, in the order that
// `place` gives. Columns of sequences that are not there hold what they hold: no result mixes sequences.

// 1/rms of the residual stream of every sequence, from sums of squares of 16 channels each; those who read meet first.
__device__ void find_norms(const Block& s) {
    const int tiles = (int)((s.a.d + 15) / 16);
    float sum[NB];
#pragma unroll
    for (int j = 0; j < NB; j++) sum[j] = 0;
    for (int i = s.lane; i < tiles; i += 32)
#pragma unroll
        for (int j = 0; j < NB; j++) sum[j] += fresh(s.a.squares + (j * 8 + s.warp) * tiles + i);
#pragma unroll
    for (int j = 0; j < NB; j++) {
#pragma unroll
        for (int w = 16; w; w /= 2) sum[j] += __shfl_xor_sync(~0u, sum[j], w);
        if (s.lane == 0) s.norms[j * 8 + s.warp] = rsqrtf(sum[j] / (float)s.a.d + (float)s.a.eps);
    }
}

// The stream of a sequence at channel k, by all 16 threads of a tile: kept, and as the next matrix reads it.
__device__ __forceinline__ void put_stream(const Args& a, int k, int c, float h, float norm, bool last) {
    float square = 0;
    if (k < a.d) {
        a.h[c * a.d + k] = h;
        a.hf[last ? place<HEAD>(k, c) : place<IN>(k, c)] = bf16(h * norm);
        square = h * h;
    }
#pragma unroll
    for (int w = 8; w; w /= 2) square += __shfl_xor_sync(0xffffu << (threadIdx.x & 16), square, w);
    if ((k & 15) == 0) a.squares[c * ((a.d + 15) / 16) + (k >> 4)] = square;
}

// Number k of a packed row: the embedding is kept as the head is.
__device__ __forceinline__ float packed_at(const Matrix& m, i64 row, int k) {
    const i64 block = row >> 4;
    const int lanes = lanes_of<HEAD>(m), in = (int)(row & 15);
    const unsigned char* bytes = (const unsigned char*)m.data;
    if (HEAD == BF16) return wide(((const u16*)m.data)[(block * lanes + (k >> 1)) * 32 + in * 2 + (k & 1)]);
    if (HEAD == INT8) return ((float)bytes[(block * lanes + (k >> 2)) * 64 + in * 4 + (k & 3)] - 128.0f) * ((const float*)m.scales)[row];
    const u32 two = bytes[(block * lanes + (k >> 3)) * 64 + in * 4 + (k & 3)];
    return ((float)(k & 4 ? two >> 4 : two & 15) - 8.0f) * wide(((const u16*)m.scales)[(block * (lanes / 4) + (k >> 5)) * 16 + in]);
}

// An id outside the vocabulary, which nobody has looked at, gives NaN.
__device__ __forceinline__ float embedded(const Args& a, i64 id, int k) {
    return id >= 0 && id < a.embedding.rows ? packed_at(a.embedding, id, k) : __int_as_float(0x7fc00000);
}

__device__ void embed(const Block& s) {
    const Args& a = s.a;
    const float* norm = a.layers ? a.table[0].norm : a.norm;
    const int b = (int)a.b, count = (int)((a.d + 15) / 16) * b * 16;
    for (int q = blockIdx.x * 32 * WARPS + threadIdx.x; q < count; q += gridDim.x * 32 * WARPS) {
        const int k = q / (16 * b) * 16 + (q & 15), c = q / 16 % b;
        const bool in = k < a.d;
        put_stream(a, k, c, in ? embedded(a, a.ids[c], k) : 0.0f, in ? norm[k] : 0.0f, a.layers == 0);
    }
}

// ---- the phases

__device__ __forceinline__ void warm(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Into the cache before it is wanted: what the block's tiles of in_proj need of the layer beside the matrix, ...
__device__ void warm_convolution(const Block& s, const Layer& l, const float* state) {
    const Args& a = s.a;
    const int k = TAPS, rows = (int)((a.e + 15) / 16), each = k + 1 + (k - 1) * (int)a.b;
    for (int tile = s.deal.mine(); tile < rows; tile += gridDim.x)
        for (int i = threadIdx.x; i < each; i += 32 * WARPS) {
            if (i < k) warm(l.taps + i * a.e + tile * 16);
            else if (i == k) { if (l.conv_bias) warm(l.conv_bias + tile * 16); }
            else warm(state + (i - k - 1) * a.e + tile * 16);
        }
}

// ... those of the scan, ...
__device__ void warm_scan(const Block& s, const Layer& l, const float* state) {
    const Args& a = s.a;
    const int lines = (int)a.n;  // 16 channels' numbers, 64 bytes each
    for (int tile = s.deal.mine(); tile < (a.e + 15) / 16; tile += gridDim.x) {
        for (int i = threadIdx.x; i < lines; i += 32 * WARPS) warm(l.A2 + (tile * lines + i) * 16);
        if (threadIdx.x == 0) warm(l.D + tile * 16), warm(l.dt_bias + tile * 16);
        if (tile * 16 + 16 <= a.e)
            for (int i = threadIdx.x; i < lines * a.b; i += 32 * WARPS)
                warm(state + (i / lines) * a.e * a.n + ((i64)tile * lines + i % lines) * 16);
    }
}

// ... and of out_proj.
__device__ void warm_stream(const Block& s, const float* norm) {
    const Args& a = s.a;
    for (int tile = s.deal.mine() + threadIdx.x * gridDim.x; tile < (a.d + 15) / 16; tile += 32 * WARPS * gridDim.x)
        warm(norm + tile * 16);
}

// What a convolution reads beside its input: earlier inputs, taps with the newest last, bias.
struct Held {
    float seen[TAPS], taps[TAPS], bias;
};

__device__ __forceinline__ Held hold(const Args& a, const Layer& l, const float* state, int c, int row) {
    Held h;
    h.bias = l.conv_bias ? __ldg(l.conv_bias + row) : 0.0f;
#pragma unroll
    for (int j = 0; j < TAPS; j++) {
        h.taps[j] = __ldg(l.taps + j * a.e + row);
        h.seen[j] = j < TAPS - 1 ? state[((i64)c * (TAPS - 1) + j) * a.e + row] : 0.0f;
    }
    return h;
}

__device__ __forceinline__ void convolve(const Args& a, float* state, int c, int row, float x, Held h) {
    h.seen[TAPS - 1] = x;
    float y = h.bias;
#pragma unroll
    for (int j = 0; j < TAPS; j++) {
        y += h.seen[j] * h.taps[j];
        if (j < TAPS - 1) state[((i64)c * (TAPS - 1) + j) * a.e + row] = h.seen[j + 1];
    }
    y = silu(y);
    a.u[c * a.e + row] = y;
    a.uf[place<X>(row, c)] = bf16(y);
}

struct Early {
    float4 h[EARLY];
};

__device__ __forceinline__ float4* state_of(const Args& a, float* states, int c, int channel, int q) {
    return (float4*)(states + ((i64)c * a.e + channel) * a.n) + q;
}

// The next states that a lane will scan, of sequences `from` and on: they are on their way while something else is computed.
__device__ __forceinline__ void read_early(const Block& s, float* states, Early& early, int tile, int from) {
    const int channel = tile * 16 + (s.warp & 1) * 8 + (s.lane >> 2), q = s.lane & 3;
    if (channel >= s.a.e || q * 4 >= s.a.n) return;
#pragma unroll
    for (int i = 0; i < EARLY; i++)
        if (from + 4 * i < s.a.b) early.h[i] = __ldcs(state_of(s.a, states, from + 4 * i, channel, q));
}

// Step sizes of `count` tiles of the block: rows of dt_proj by a warp for eight sequences, softplus, into shared memory.
__device__ void find_steps(Block& s, const Layer& l, int first, int count) {
    const int lanes = lanes_of<BF16>(l.dt), pieces = (lanes + 15) / 16, g = s.lane >> 2, t = s.lane & 3;
    int stage[CHANNELS];
    Ring ring = s.ring;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        stage[i] = 0;
        if (i < count) stage[i] = ring.front(), ring.next();
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        const int j = (s.warp + 8 - i * NB % 8) % 8;  // other warps for other tiles
        if (i >= count || j >= NB) continue;
        float c[4] = {0, 0, 0, 0};
#pragma unroll 4
        for (int piece = 0; piece < pieces; piece++) {
            const uint4 v = __ldcg((const uint4*)(s.a.rf + (piece * COLS + j * 8) * 32 + s.lane * 8));
            const u32 x[2][2] = {{v.x, v.y}, {v.z, v.w}};
            u32 w[2][4];
            load_rows<BF16>(w, s.stages + stage[i], piece * 16, lanes, s.lane);
            mma(c, w[0], x[0]);
            mma(c, w[1], x[1]);
        }
        float* steps = s.steps + i * COLS * PAD;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const int row = (first + i * (int)gridDim.x) * 16 + 2 * g + q / 2;
            const float v = c[q] + (row < s.a.e ? __ldg(l.dt_bias + row) : 0.0f);
            steps[(j * 8 + 2 * t + q % 2) * PAD + 2 * g + q / 2] = fmaxf(v, 0.0f) + log1pf(__expf(-fabsf(v)));
        }
    }
    for (int i = 0; i < count; i++) s.ring.pop(s.lane);
}

__device__ __forceinline__ void copy_in(float* to, const float* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(to)), "l"(from) : "memory");
}

// The scan of a tile's 16 channels: two warps take eight each of a sequence, four lanes a channel, four states a lane at a time.
__device__ void scan(Block& s, const Layer& l, float* states, Early& early) {
    const Args& a = s.a;
    const int tiles = tiles_of(l.dt), blocks = gridDim.x, n = (int)a.n, q = s.lane & 3, b = (int)a.b;
    const int within = (s.warp & 1) * 8 + (s.lane >> 2), start = s.warp >> 1;
    for (int first = s.deal.mine(); first < tiles; first += CHANNELS * blocks) {
        const int count = min(CHANNELS, (tiles - first + blocks - 1) / blocks);
        if (first < blocks)
            for (int i = threadIdx.x; i < b * n / 2; i += 32 * WARPS) copy_in(s.bc + 4 * i, a.bc + 4 * i);
        for (int i = threadIdx.x; i < 8 * b * count; i += 32 * WARPS) {
            const int tile = i / (8 * b), c = i / 8 % b, quarter = (i & 3) * 4, from = (first + tile * blocks) * 16 + quarter;
            float* to = s.uz + tile * 2 * COLS * 16 + (i & 4 ? COLS * 16 : 0) + c * 16 + quarter;
            if (from < a.e) copy_in(to, (i & 4 ? a.z : a.u) + c * a.e + from);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        find_steps(s, l, first, count);
        asm volatile("cp.async.wait_all;" ::: "memory");
        meet_warps();
#pragma unroll 1
        for (int tile = 0; tile < count; tile++) {
            const int at = first + tile * blocks, channel = at * 16 + within;
            const bool there = channel < a.e;
            const float* steps = s.steps + tile * COLS * PAD + within;
            const float* uz = s.uz + tile * 2 * COLS * 16 + within;
            const float skip = there ? __ldg(l.D + channel) : 0.0f;
            const float4* rates = (const float4*)(l.A2 + channel * n);
            const float4 A = there && q < n / 4 ? __ldg(rates + q) : make_float4(0, 0, 0, 0);
#pragma unroll 1
            for (int from = start; from < b; from += 4 * EARLY) {
                Early now = early;
                const bool more = from + 4 * EARLY < b;
                read_early(s, states, early, more ? at : at + blocks, more ? from + 4 * EARLY : start);
#pragma unroll
                for (int i = 0; i < EARLY; i++) {
                    const int c = from + 4 * i;
                    if (c >= b) break;
                    const float dt = steps[c * PAD], u = uz[c * 16], z = uz[COLS * 16 + c * 16];
                    float y = 0;
                    for (int j = q; j < n / 4; j += 4) {
                        if (!there) break;
                        float4* state = state_of(a, states, c, channel, j);
                        float4 h = j == q ? now.h[i] : __ldcs(state);
                        const float4 rate = j == q ? A : __ldg(rates + j);
                        const float4 B = ((const float4*)(s.bc + c * 2 * n))[j], C = ((const float4*)(s.bc + c * 2 * n + n))[j];
                        const float in = dt * u;
                        h.x = exp2f(dt * rate.x) * h.x + in * B.x, y += h.x * C.x;
                        h.y = exp2f(dt * rate.y) * h.y + in * B.y, y += h.y * C.y;
                        h.z = exp2f(dt * rate.z) * h.z + in * B.z, y += h.z * C.z;
                        h.w = exp2f(dt * rate.w) * h.w + in * B.w, y += h.w * C.w;
                        __stcs(state, h);
                    }
                    y += __shfl_xor_sync(~0u, y, 1);
                    y += __shfl_xor_sync(~0u, y, 2);
                    if (q == 0 && there) a.yf[place<OUT>(channel, c)] = bf16((y + skip * u) * silu(z));
                }
            }
        }
        meet_warps();  // before the next tiles' steps
    }
    s.deal.next(tiles);
}

__device__ void describe(const Block& s, int i) {
    if (i < s.a.layers && threadIdx.x < sizeof(Layer) / 8)
        ((i64*)(s.described + (i & 1)))[threadIdx.x] = ((const i64*)(s.a.table + i))[threadIdx.x];
}

__device__ void multiply_all(const Args& a, Block& s) {
    const int e = (int)a.e, r = (int)a.r, n = (int)a.n;
    const auto nothing = [] {};
    const auto none = [](int, int) { return 0; };
    describe(s, 0);
    embed(s);
    s.arrive();
    for (int i = 0; i < a.layers; i++) {
        const Layer& l = s.described[i & 1];
        warm_convolution(s, l, a.states[2 * i]);
        s.wait();
        product<IN, false>(
            s, l.in, a.hf, [&] { find_norms(s); },
            [&](int row, int c) { return row < e ? hold(a, l, a.states[2 * i], c, row) : Held(); },
            [&](int row, int c, float sum, const Held& held) {
                if (row >= 2 * e) return;
                sum = sum * s.norms[c] + (l.in.bias ? l.in.bias[row] : 0.0f);
                if (row < e) convolve(a, a.states[2 * i], c, row, sum, held);
                else a.z[c * e + row - e] = sum;
            });
        s.arrive();
        describe(s, i + 1);
        s.wait();
        const float* norm = i + 1 < a.layers ? s.described[i + 1 & 1].norm : a.norm;
        const auto put = [&](int row, int c, float sum, int) {
            if (row >= r + 2 * n) return;
            if (row < r) a.rf[place<BF16>(row, c)] = bf16(sum);
            else a.bc[c * 2 * n + row - r] = sum;
        };
        if (SPLIT) {
            const int rows = 16 * tiles_of(l.x), slices = (lanes_of<X>(l.x) + SLICE - 1) / SLICE, b = (int)a.b;
            product<X, true>(s, l.x, a.uf, nothing, none,
                             [&](int row, int c, float sum, int) { a.parts[(row / rows * b + c) * rows + row % rows] = sum; });
            s.arrive();
            s.wait();
            for (int q = blockIdx.x * 32 * WARPS + threadIdx.x; q < rows * b; q += gridDim.x * 32 * WARPS) {
                float sum = 0;
                for (int i = 0; i < slices; i++) sum += fresh(a.parts + i * b * rows + q);
                put(q % rows, q / rows, sum, 0);
            }
        } else {
            product<X, false>(s, l.x, a.uf, nothing, none, put);
        }
        s.arrive();
        Early early;
        read_early(s, a.states[2 * i + 1], early, s.deal.mine(), s.warp >> 1);
        warm_scan(s, l, a.states[2 * i + 1]);
        s.wait();
        scan(s, l, a.states[2 * i + 1], early);
        s.arrive();
        warm_stream(s, norm);
        s.wait();
        product<OUT, false>(
            s, l.out, a.yf, nothing,
            [&](int row, int c) {
                if (row >= a.d) return make_float2(0, 0);
                const float bias = l.out.bias ? __ldg(l.out.bias + row) : 0.0f;
                return make_float2(fresh(a.h + c * a.d + row) + bias, __ldg(norm + row));
            },
            [&](int row, int c, float sum, float2 held) {
                put_stream(a, row, c, held.x + sum, held.y, i + 1 == a.layers);
            });
        s.arrive();
    }
    s.wait();
    product<HEAD, false>(s, a.head, a.hf, [&] { find_norms(s); }, none, [&](int row, int c, float sum, int) {
        if (row < a.head.rows) a.logits[c * a.head.rows + row] = sum * s.norms[c] + (a.head.bias ? a.head.bias[row] : 0.0f);
    });
}

extern "C" __global__ void __launch_bounds__(288, 1) decode_token(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) char shared[];
    const int stages = (int)a.stages;
    char* rest = shared + stages * STAGE;
    const u32 full = at(rest), empty = full + 8 * stages;
    rest += 16 * stages;
    Ring ring{at(shared), full, empty, stages, 0, 0};
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * i));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * i), "r"(WARPS));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (warp == WARPS) {
        if (lane == 0) fetch_all(a, ring);
        return;
    }
    float* f = (float*)(rest + WARPS * OWN + 2 * sizeof(Layer));
    Block s{a, ring, Deal{}, shared, rest, rest + warp * OWN, (Layer*)(rest + WARPS * OWN), f, f + COLS,
            f + COLS + CHANNELS * COLS * PAD, f + COLS + CHANNELS * COLS * PAD + COLS * 2 * (int)a.n, warp, lane, 0};
    multiply_all(a, s);
    meet_warps();
    if (threadIdx.x == 0) {  // the last block to leave makes the meeting place ready for the next launch
        u32 left;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(left) : "l"(a.meeting + 32) : "memory");
        if (left == gridDim.x - 1) a.meeting[0] = a.meeting[32] = 0;
    }
}

// One token through a whole model, as launches that overlap at their ends, four a layer of Mamba-1 and three of Mamba-2:
//   embed   then for each layer   in_proj and the convolution   what lies between   out_proj, the residual sum
//   and the head at last
// Between lie x_proj, then dt_proj, the scan and the gate (gpu_scan.cu); or the heads and their gate (gpu_heads.cu).
// A kernel is started while the one in front of it ends (programmatic dependent launch), and asks for matrices and states, which no
// other kernel of the token writes, before it waits for its vectors.
//
// A product: one warp fetches stages of STEP pieces (32 columns each) of a block's tiles of 16 rows, and of the vectors; eight warps
// multiply with mma.m16n8k16 (bfloat16, sums in float32), in groups that share the pieces of a stage and parts that share the
// sequences. Where tiles are few, the blocks of a cluster have the same ones and different columns, and add up through each other's
// shared memory. Sums are added in the order of columns: no result depends on other rows.
// RMSNorm is applied behind the matrix that reads it: rows of it are multiplied by the norm's weight before, by the norm after.
// Integers multiply bfloat16 exactly; their scales are applied to sums, of a row (int8) or of 32 columns of a row (int4).
//
// Compiled for NB, TAPS, STATES, HEADS (0: Mamba-1) and for each matrix (IN, X, OUT, HEAD) its format, T_… tiles of a block,
// S_… blocks that share columns, A_… whether a block has a multiprocessor for itself, W_… whether the columns are whole pieces.
// Code that runs once comes from far away: little of it is unrolled.
//
// Letters: b sequences, d width, e inner channels, n state, r rank of the step size.
// Vectors between kernels lie as the mma wants them: for 32 columns of the matrix and a sequence 32 numbers, in the order that `place`
// gives. Columns of sequences that are not there hold what they hold: no result mixes sequences.

#if HEADS
#define DIRECT (!BESIDE && !GATE_LAST && (NGROUPS == 1 || !NORMALISE))
#define SCALED (DIRECT && NORMALISE)
constexpr int PARTS_ACROSS = (BLOCKS + 3) & ~3;  // numbers between sequences of the sums of squares in front of out_proj
#endif

struct Nothing {};
struct Held {
    float4 seen[TAPS > 1 ? TAPS - 1 : 1];  // earlier inputs of the convolution
};

// Zeros behind the numbers of a vector, up to a whole piece, which meets no columns of the matrix.
template <int FORMAT>
__device__ void clear_behind(u16* vectors, int size) {
    for (int i = threadIdx.x; i < (-size & 31) * COLS; i += 256) vectors[place<FORMAT>(size + i / COLS, i % COLS)] = 0;
}

extern "C" __global__ void __launch_bounds__(256) embed(const __grid_constant__ Args a) {
    let_next_start();
    const int b = (int)a.b, d = (int)a.d, tiles = (d + 15) / 16, count = tiles * b * 16, q = blockIdx.x * 256 + threadIdx.x;
    if (blockIdx.x == 0) {  // memory that nobody else writes
        clear_behind<IN>(a.hf, d);
        clear_behind<OUT>(a.yf, (int)a.e + BESIDE);
#if HEADS
        for (int i = threadIdx.x; i < (PARTS_ACROSS - BLOCKS) * COLS; i += 256) a.parts[i % COLS * PARTS_ACROSS + BLOCKS + i / COLS] = 0;
#else
        clear_behind<X>(a.uf, (int)a.e);
        clear_behind<BF16>(a.rf, (int)a.r);
#endif
        for (int i = threadIdx.x; i < (across(a) - tiles) * COLS; i += 256) a.squares[i % COLS * across(a) + tiles + i / COLS] = 0;
    }
    if (q >= count) return;
    const int k = q / (16 * b) * 16 + (q & 15), c = q / 16 % b;
    float h = 0;
    if (k < d) {
        h = embedded(a, a.ids[c], k);
        a.h[(i64)c * d + k] = h;
        a.hf[place<IN>(k, c)] = bf16(h * a.next[k]);
    }
    float square = h * h;
#pragma unroll
    for (int w = 8; w; w /= 2) square += __shfl_xor_sync(0xffffu << (threadIdx.x & 16), square, w);
    if ((k & 15) == 0) a.squares[c * across(a) + (k >> 4)] = square;
}

__device__ __forceinline__ float4 four(const float* p) { return __ldg((const float4*)p); }

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Numbers row to row + 3 of `rows`, which may end before them.
__device__ __forceinline__ float4 last_four(const float* p, int row, int rows) {
    if (row + 4 <= rows) return four(p + row);
    return make_float4(p[min(row, rows - 1)], p[min(row + 1, rows - 1)], p[min(row + 2, rows - 1)], p[min(row + 3, rows - 1)]);
}

// `channel`: the first of four. What it was is in `held`.
__device__ __forceinline__ void convolve(const Args& a, int channel, int c, float4 x, const Held& held) {
    const Layer& l = a.l;
    const i64 channels = a.channels;
    float4 y = l.conv_bias ? four(l.conv_bias + channel) : make_float4(0, 0, 0, 0);
    float* state = a.conv + (i64)c * (TAPS - 1) * channels + channel;
#pragma unroll
    for (int j = 0; j < TAPS; j++) {
        const float4 now = j < TAPS - 1 ? held.seen[j] : x, taps = four(l.taps + j * channels + channel);
        y.x += now.x * taps.x, y.y += now.y * taps.y, y.z += now.z * taps.z, y.w += now.w * taps.w;
        if (j) store(state + (j - 1) * channels, now);
    }
    y = make_float4(silu(y.x), silu(y.y), silu(y.z), silu(y.w));
    store(a.u + (i64)c * channels + channel, y);
#if !HEADS
    put<X>(a.uf, channel, c, y);
#endif
}

// Rows from `before` on are convolved, `channels` of them; what is around them goes to z as it is.
extern "C" __global__ void __launch_bounds__(288, 2 - A_IN) in_proj(const __grid_constant__ Args a) {
    __shared__ float norms[COLS];
    const Matrix& m = a.l.in;
    const int before = (int)a.before, channels = (int)a.channels, rows = (int)m.rows;
    product<IN, T_IN, S_IN, A_IN, W_IN>(
        a, m, a.hf,
        [&](int first, int apart, int count, int rank) {  // what the convolution will read, each block of a cluster its share
            const int each = (TAPS - 1) * (int)a.b + TAPS + 2;
            for (int i = rank * 256 + threadIdx.x; i < count * each; i += 256 * S_IN) {
                const int row = (first + i % count * apart) * 16, channel = row - before, j = i / count - TAPS - 2;
                const bool some = channel >= 0 && channel < channels;
                if (j >= 0 && some) warm(a.conv + (i64)j * channels + channel);
                else if (j < 0 && j >= -TAPS && some) warm(a.l.taps + (i64)(j + TAPS) * channels + channel);
                else if (j == -TAPS - 1 && some && a.l.conv_bias) warm(a.l.conv_bias + channel);
                else if (j == -TAPS - 2 && row < rows && m.bias) warm(m.bias + row);
            }
        },
        [&](int warp, int lane) { find_norms(norms, a.squares, across(a) / 4, (float)a.d, a.eps, warp, lane); },
        [&](int row, int c) {
            Held held;
            const int channel = row - before;
            if (channel >= 0 && channel < channels)
#pragma unroll
                for (int j = 0; j < TAPS - 1; j++) held.seen[j] = *(const float4*)(a.conv + ((i64)c * (TAPS - 1) + j) * channels + channel);
            return held;
        },
        [&](int row, int c, float4 sum, const Held& held) {
            if (row >= rows) return;
            sum = times(sum, norms[c]);
            if (m.bias) sum = plus(sum, last_four(m.bias, row, rows));
            const int channel = row - before;
            if (channel >= 0 && channel < channels) convolve(a, channel, c, sum, held);
            else store(a.z + (i64)c * a.rest + (channel < 0 ? row : row - channels), sum);
        });
}

struct Stream {
    float4 h, norm;
};

extern "C" __global__ void __launch_bounds__(288, 2 - A_OUT) out_proj(const __grid_constant__ Args a) {
#if SCALED
    __shared__ float norms[COLS];
#endif
    const Matrix& m = a.l.out;
    const int d = (int)a.d;
    product<OUT, T_OUT, S_OUT, A_OUT, W_OUT>(
        a, m, a.yf,
        [&](int first, int apart, int count, int rank) {  // the stream and the norm
            for (int i = rank * 256 + threadIdx.x; i < count * ((int)a.b + 2); i += 256 * S_OUT) {
                const int row = (first + i % count * apart) * 16, c = i / count;
                if (row >= d) continue;
                if (c < a.b) warm(a.h + (i64)c * d + row);
                else if (c == a.b) warm(a.next + row);
                else if (m.bias) warm(m.bias + row);
            }
        },
        [&](int warp, int lane) {
#if SCALED
            find_norms(norms, a.parts, PARTS_ACROSS / 4, (float)a.e, a.gate_eps, warp, lane);
#endif
        },
        [&](int row, int c) {
            Stream s;
            if (row < d) s.h = __ldcg((const float4*)(a.h + (i64)c * d + row)), s.norm = four(a.next + row);
            return s;
        },
        [&](int row, int c, float4 sum, const Stream& s) {
            float square = 0;
            if (row < d) {
#if SCALED
                sum = times(sum, norms[c]);
#endif
                float4 h = plus(s.h, sum);
                if (m.bias) h = plus(h, four(m.bias + row));
                store(a.h + (i64)c * d + row, h);
                if (a.last) put<HEAD>(a.hf, row, c, times(h, s.norm));
                else put<IN>(a.hf, row, c, times(h, s.norm));
                square = h.x * h.x + h.y * h.y + h.z * h.z + h.w * h.w;
            }
            const u32 together = 15u << (threadIdx.x & 28);
            square += __shfl_xor_sync(together, square, 1);
            square += __shfl_xor_sync(together, square, 2);
            if ((row & 15) == 0) a.squares[c * across(a) + (row >> 4)] = square;
        });
}

extern "C" __global__ void __launch_bounds__(288, 2 - A_HEAD) head(const __grid_constant__ Args a) {
    __shared__ float norms[COLS];
    const Matrix& m = a.head;
    const int rows = (int)m.rows;
    product<HEAD, T_HEAD, S_HEAD, A_HEAD, W_HEAD>(
        a, m, a.hf, [](int, int, int, int) {},
        [&](int warp, int lane) { find_norms(norms, a.squares, across(a) / 4, (float)a.d, a.eps, warp, lane); },
        [](int, int) { return Nothing(); },
        [&](int row, int c, float4 sum, Nothing) {
            sum = times(sum, norms[c]);
            float* to = a.logits + (i64)c * rows + row;
            if (m.bias) sum = plus(sum, last_four(m.bias, row, rows));
            if (rows % 4 == 0 && row < rows) {
                store(to, sum);
            } else {
                if (row < rows) to[0] = sum.x;
                if (row + 1 < rows) to[1] = sum.y;
                if (row + 2 < rows) to[2] = sum.z;
                if (row + 3 < rows) to[3] = sum.w;
            }
        });
}

// One token through a whole Mamba-1 model, as four launches a layer that overlap at their ends:
//   embed   then for each layer   in_proj and the convolution   x_proj   dt_proj, the scan and the gate   out_proj, the residual sum
//   and the head at last
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
// Compiled for NB, TAPS, STATES and for each matrix (IN, X, OUT, HEAD) its format, T_… tiles of a block, S_… blocks that share columns,
// W_… whether the columns are whole pieces. Code that runs once comes from far away: little of it is unrolled.
//
// Letters: b sequences, d width, e inner channels, n state, r rank of the step size.
// Vectors between kernels lie as the mma wants them: for 32 columns of the matrix and a sequence 32 numbers, in the order that `place`
// gives. Columns of sequences that are not there hold what they hold: no result mixes sequences.

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
        clear_behind<X>(a.uf, (int)a.e);
        clear_behind<OUT>(a.yf, (int)a.e);
        clear_behind<BF16>(a.rf, (int)a.r);
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

__device__ __forceinline__ void convolve(const Args& a, int row, int c, float4 x, const Held& held) {
    const Layer& l = a.l;
    float4 y = l.conv_bias ? four(l.conv_bias + row) : make_float4(0, 0, 0, 0);
    float* state = a.conv + (i64)c * (TAPS - 1) * a.e + row;
#pragma unroll
    for (int j = 0; j < TAPS; j++) {
        const float4 now = j < TAPS - 1 ? held.seen[j] : x, taps = four(l.taps + j * a.e + row);
        y.x += now.x * taps.x, y.y += now.y * taps.y, y.z += now.z * taps.z, y.w += now.w * taps.w;
        if (j) *(float4*)(state + (j - 1) * a.e) = now;
    }
    y = make_float4(silu(y.x), silu(y.y), silu(y.z), silu(y.w));
    *(float4*)(a.u + (i64)c * a.e + row) = y;
    put<X>(a.uf, row, c, y);
}

extern "C" __global__ void __launch_bounds__(288, 2) in_proj(const __grid_constant__ Args a) {
    __shared__ float norms[COLS];
    const Matrix& m = a.l.in;
    const int e = (int)a.e;
    product<IN, T_IN, S_IN, W_IN>(
        a, m, a.hf,
        [&](int first, int apart, int count, int rank) {  // what the convolution will read, each block of a cluster its share
            const int each = (TAPS - 1) * (int)a.b + TAPS + 2;
            for (int i = rank * 256 + threadIdx.x; i < count * each; i += 256 * S_IN) {
                const int row = (first + i % count * apart) * 16, j = i / count - TAPS - 2;
                if (j >= 0 && row < e) warm(a.conv + (i64)j * e + row);
                else if (j >= -TAPS && row < e) warm(a.l.taps + (i64)(j + TAPS) * e + row);
                else if (j == -TAPS - 1 && row < e && a.l.conv_bias) warm(a.l.conv_bias + row);
                else if (j == -TAPS - 2 && row < 2 * e && m.bias) warm(m.bias + row);
            }
        },
        [&](int warp, int lane) { find_norms(a, norms, warp, lane); },
        [&](int row, int c) {
            Held held;
            if (row < e)
#pragma unroll
                for (int j = 0; j < TAPS - 1; j++) held.seen[j] = *(const float4*)(a.conv + ((i64)c * (TAPS - 1) + j) * e + row);
            return held;
        },
        [&](int row, int c, float4 sum, const Held& held) {
            if (row >= 2 * e) return;
            sum = times(sum, norms[c]);
            if (m.bias) sum = plus(sum, four(m.bias + row));
            if (row < e) convolve(a, row, c, sum, held);
            else *(float4*)(a.z + (i64)c * e + row - e) = sum;
        });
}

extern "C" __global__ void __launch_bounds__(288, 2) x_proj(const __grid_constant__ Args a) {
    const int r = (int)a.r, n = (int)a.n;
    product<X, T_X, S_X, W_X>(
        a, a.l.x, a.uf, [](int, int, int, int) {}, [](int, int) {}, [](int, int) { return Nothing(); },
        [&](int first, int c, float4 sums, Nothing) {
            const float sum[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = first + i;
                if (row < r) a.rf[place<BF16>(row, c)] = bf16(sum[i]);
                else if (row < r + 2 * n) a.bc[c * 2 * n + row - r] = sum[i];
            }
        });
}

struct Stream {
    float4 h, norm;
};

extern "C" __global__ void __launch_bounds__(288, 2) out_proj(const __grid_constant__ Args a) {
    const Matrix& m = a.l.out;
    const int d = (int)a.d;
    product<OUT, T_OUT, S_OUT, W_OUT>(
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
        [](int, int) {},
        [&](int row, int c) {
            Stream s;
            if (row < d) s.h = __ldcg((const float4*)(a.h + (i64)c * d + row)), s.norm = four(a.next + row);
            return s;
        },
        [&](int row, int c, float4 sum, const Stream& s) {
            float square = 0;
            if (row < d) {
                float4 h = plus(s.h, sum);
                if (m.bias) h = plus(h, four(m.bias + row));
                *(float4*)(a.h + (i64)c * d + row) = h;
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

extern "C" __global__ void __launch_bounds__(288, 2) head(const __grid_constant__ Args a) {
    __shared__ float norms[COLS];
    const Matrix& m = a.head;
    const int rows = (int)m.rows;
    product<HEAD, T_HEAD, S_HEAD, W_HEAD>(
        a, m, a.hf, [](int, int, int, int) {}, [&](int warp, int lane) { find_norms(a, norms, warp, lane); },
        [](int, int) { return Nothing(); },
        [&](int row, int c, float4 sum, Nothing) {
            sum = times(sum, norms[c]);
            float* to = a.logits + (i64)c * rows + row;
            const float4 bias = !m.bias ? make_float4(0, 0, 0, 0)
                                        : make_float4(m.bias[min(row, rows - 1)], m.bias[min(row + 1, rows - 1)],
                                                      m.bias[min(row + 2, rows - 1)], m.bias[min(row + 3, rows - 1)]);
            sum = plus(sum, bias);
            if (rows % 4 == 0 && row < rows) {
                *(float4*)to = sum;
            } else {
                if (row < rows) to[0] = sum.x;
                if (row + 1 < rows) to[1] = sum.y;
                if (row + 2 < rows) to[2] = sum.z;
                if (row + 3 < rows) to[3] = sum.w;
            }
        });
}

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// h = exp2(dt rate) h + in B; adds C h to y.
__device__ __forceinline__ float4 advance(float4 h, float4 rate, float4 B, float4 C, float dt, float in, float& y) {
    h.x = ex2(dt * rate.x) * h.x + in * B.x, y += h.x * C.x;
    h.y = ex2(dt * rate.y) * h.y + in * B.y, y += h.y * C.y;
    h.z = ex2(dt * rate.z) * h.z + in * B.z, y += h.z * C.z;
    h.w = ex2(dt * rate.w) * h.w + in * B.w, y += h.w * C.w;
    return h;
}

// Sixteen channels of sixteen sequences, whose states come while x_proj ends. A warp takes eight channels of four sequences, four lanes a
// channel, four states a lane at a time; then each lane finishes one of the sequences.
extern "C" __global__ void __launch_bounds__(256) scan(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) char shared[];
    constexpr int N = STATES, MANY = 16, QUAD = 4;
    const int tile = blockIdx.x, c0 = blockIdx.y * MANY, b = min(MANY, (int)a.b - c0), e = (int)a.e;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, lines = lanes_of<BF16>(a.l.dt);
    float* bc = (float*)shared;                       // (sequence, B and C)
    char* rows = (char*)(bc + MANY * 2 * N);           // of dt_proj; what is read behind them, for a whole piece, does not count
    float2* moves = (float2*)(rows + lines * 64);      // (sequence, channel) of dt and dt u
    float2* gates = moves + MANY * 16;                 // of D u and silu(z)
    float* sums = (float*)(gates + MANY * 16);         // of four shares of dt_proj's columns
    const int q = lane & 3, within = (warp & 1) * 8 + (lane >> 2), from = (warp >> 1) * QUAD, channel = tile * 16 + within;
    const bool some = channel < e && q < N / 4;
    float* state = a.ssm + ((i64)(c0 + from) * e + channel) * N + 4 * q;
    const i64 stride = (i64)e * N;
    float4 h[QUAD];
#pragma unroll
    for (int i = 0; i < QUAD; i++)
        if (some && from + i < b) h[i] = __ldcs((const float4*)(state + i * stride));
    for (int i = threadIdx.x; i < lines * 4; i += 256) copy_in((float*)(rows + 16 * i), (const float*)(a.l.dt.data + (i64)tile * lines * 64 + 16 * i));
    const float* rates = a.l.A2 + (i64)channel * N;
    const float4 rate = some ? four(rates + 4 * q) : make_float4(0, 0, 0, 0);
    const int own = tile * 16 + (threadIdx.x & 15), mine = threadIdx.x >> 4;  // the element whose step size the thread finds
    const bool there = own < e && mine < b;
    const float bias = own < e ? __ldg(a.l.dt_bias + own) : 0.0f, skip = own < e ? __ldg(a.l.D + own) : 0.0f;
    let_next_start();
    wait_for_last();
    for (int i = threadIdx.x; i < b * N / 2; i += 256) copy_in(bc + 4 * i, a.bc + c0 * 2 * N + 4 * i);
    asm volatile("cp.async.commit_group;" ::: "memory");
    const float u = there ? __ldcg(a.u + (i64)(c0 + mine) * e + own) : 0.0f, z = there ? __ldcg(a.z + (i64)(c0 + mine) * e + own) : 0.0f;
    const int eight = warp & 1, g = lane >> 2, t = lane & 3, pieces = (lines + 15) / 16;
    const u16* vectors = a.rf + (c0 + eight * 8) * 32 + lane * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (warp >> 1 < pieces && eight * 8 < b) v = __ldcg((const uint4*)(vectors + (warp >> 1) * COLS * 32));
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    float c[1][4] = {{0, 0, 0, 0}};
#pragma unroll 1
    for (int piece = warp >> 1; piece < pieces; piece += 4) {
        const u32 x[1][4] = {{v.x, v.y, v.z, v.w}};
        if (piece + 4 < pieces && eight * 8 < b) v = __ldcg((const uint4*)(vectors + (piece + 4) * COLS * 32));
        u32 w[2][4];
        load_rows<BF16>(w, rows, piece * 16, lines, lane);
        add_products<BF16>(c, w, x, 1, 1);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[((warp >> 1) * MANY + eight * 8 + 2 * t + i % 2) * PAD + 2 * g + i / 2] = c[0][i];
    __syncthreads();
    const float* parts = sums + mine * PAD + (threadIdx.x & 15);
    const float raw = bias + ((parts[0] + parts[MANY * PAD]) + (parts[2 * MANY * PAD] + parts[3 * MANY * PAD]));
    const float dt = fmaxf(raw, 0.0f) + log1pf(__expf(-fabsf(raw)));
    moves[threadIdx.x] = make_float2(dt, dt * u);
    gates[threadIdx.x] = make_float2(skip * u, silu(z));
    __syncthreads();
    float y[QUAD] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        if (from + i >= b) break;
        const float2 move = moves[(from + i) * 16 + within];
        const float* both = bc + (from + i) * 2 * N;
        if (some)
            __stcs((float4*)(state + i * stride),
                   advance(h[i], rate, ((const float4*)both)[q], ((const float4*)(both + N))[q], move.x, move.y, y[i]));
#pragma unroll 1
        for (int j = q + 4; j < N / 4; j += 4) {
            if (channel >= e) break;
            float4* more = (float4*)(state + i * stride) + (j - q);
            __stcs(more, advance(__ldcs(more), four(rates + 4 * j), ((const float4*)both)[j], ((const float4*)(both + N))[j], move.x, move.y, y[i]));
        }
    }
    // Each lane's sequence: sums of four sequences over four lanes by three shuffles.
    const bool odd = q & 1, high = q & 2;
    const float low = (odd ? y[1] : y[0]) + __shfl_xor_sync(~0u, odd ? y[0] : y[1], 1);
    const float up = (odd ? y[3] : y[2]) + __shfl_xor_sync(~0u, odd ? y[2] : y[3], 1);
    const float sum = (high ? up : low) + __shfl_xor_sync(~0u, high ? low : up, 2);
    if (channel >= e || from + q >= b) return;
    const float2 gate = gates[(from + q) * 16 + within];
    a.yf[place<OUT>(channel, c0 + from + q)] = bf16((sum + gate.x) * gate.y);
}

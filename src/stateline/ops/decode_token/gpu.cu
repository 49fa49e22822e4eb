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

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short u16;

constexpr int COLS = 8 * NB;         // sequences of a launch, at most
constexpr int WARPS = 8;             // that multiply
constexpr int LANES = 256;           // 64-byte lines of a stage: four bytes of each of 16 rows
constexpr int STAGE = LANES * 64;
constexpr int PIECE = NB * 512;      // bytes of a piece: 32 columns, all sequences
constexpr int PAD = 20;              // floats between sequences of a tile's sums: no bank conflicts
constexpr int SUMS = COLS * PAD;     // floats of a tile
constexpr int OWN = (SLOTS * PIECE > TM * SUMS * 4 ? SLOTS * PIECE : TM * SUMS * 4);  // bytes of a warp: pieces, then sums
constexpr int EARLY = 4;             // states of the scan that are read ahead
constexpr int TOGETHER = 2;          // elements of a result that a thread finishes at once
constexpr int CHANNELS = NB <= 2 ? 4 : NB == 4 ? 2 : 1;  // tiles of channels that a block scans at once
constexpr int SLICE = 2 * LANES;     // lines of a part of x_proj, if SPLIT: few tiles and long sums would keep few blocks busy

struct Matrix {
    const char* data;
    const char* scales;
    const float* bias;
    i64 format, rows, columns;
};
struct Layer {
    const float* norm;
    Matrix in, x, dt, out;
    const float *taps, *conv_bias, *A2, *D, *dt_bias;
};
struct Args {
    i64 layers, b, d, e, n, r;
    double eps;
    const float* norm;
    Matrix embedding, head;
    const Layer* table;
    const i64* ids;
    float* logits;
    float *h, *u, *z, *bc, *squares, *parts;
    u16 *hf, *uf, *yf, *rf;
    u32* meeting;
    i64 stages;
    float* states[2 * LAYERS];
};

__device__ __forceinline__ u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void meet_warps() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
__device__ __forceinline__ float fresh(const float* p) { return __ldcg(p); }

__device__ __forceinline__ u16 bf16(float x) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float wide(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

enum Format { BF16 = 0, INT8 = 1, INT4 = 2 };
template <int FORMAT>
constexpr int LINES = 16 >> FORMAT;  // of 32 columns

// Where column k of a matrix meets sequence c in a vector. Of 32 columns, two products of 16, lane t multiplies: of bfloat16 the
// pairs of lines t and t + 4, then t + 8 and t + 12; of bytes line t, then t + 4; of nibbles the low, then the high ones of line t.
template <int FORMAT>
__device__ __forceinline__ int place(int k, int c) {
    const int from = ((k >> 5) * COLS + c) * 32, in = k & 31;
    if (FORMAT == BF16) return from + (in >> 1 & 3) * 8 + (in >> 4) * 4 + (in >> 3 & 1) * 2 + (in & 1);
    if (FORMAT == INT8) return from + (in >> 2 & 3) * 8 + (in >> 4) * 4 + (in & 3);
    return from + (in >> 3) * 8 + (in >> 2 & 1) * 4 + (in & 3);
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- the ring: stages that are filled by the fetching warp and emptied by the others

struct Ring {
    u32 stages, full, empty;  // addresses in shared memory: data, barriers
    int count, slot;
    u32 turn;

    __device__ void next() {
        if (++slot == count) slot = 0, turn ^= 1;
    }
    __device__ static void wait(u32 barrier, u32 parity) {
        u32 done;
        do asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
        while (!done);
    }
    __device__ void push(const char* from, u32 bytes, u64 policy) {
        wait(empty + 8 * slot, turn ^ 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + 8 * slot), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                     ::"r"(stages + slot * STAGE), "l"(from), "r"(bytes), "r"(full + 8 * slot), "l"(policy) : "memory");
        next();
    }
    __device__ int front() const {  // where its bytes begin
        wait(full + 8 * slot, turn);
        return slot * STAGE;
    }
    __device__ void pop(int lane) {
        __syncwarp();
        if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * slot) : "memory");
        next();
    }
};

// ---- which tiles are a block's

struct Deal {
    int first = 0;  // the block that takes the next matrix's first tile

    __device__ int mine() const {
        const int j = (int)blockIdx.x - first;
        return j < 0 ? j + gridDim.x : j;
    }
    __device__ void next(int tiles) { first = (first + tiles) % gridDim.x; }
};

__device__ __forceinline__ int tiles_of(const Matrix& m) { return (int)((m.rows + 15) / 16); }
template <int FORMAT>
__device__ __forceinline__ int lanes_of(const Matrix& m) {
    const int columns = (int)m.columns;
    return FORMAT == BF16 ? (columns + 1) / 2 : FORMAT == INT8 ? (columns + 3) / 4 : (columns + 31) / 32 * 4;
}

template <int FORMAT, bool PARTED = false>
__device__ void fetch(const Matrix& m, Ring& ring, Deal& deal, u64 policy) {
    const int whole = tiles_of(m), all = lanes_of<FORMAT>(m), blocks = gridDim.x;
    const int tiles = PARTED ? whole * ((all + SLICE - 1) / SLICE) : whole, at_once = PARTED ? 1 : TM;
    for (int first = deal.mine(); first < tiles; first += at_once * blocks) {
        const int begin = PARTED ? first / whole * SLICE : 0, lanes = PARTED ? min(all, begin + SLICE) : all;
        for (int from = begin; from < lanes; from += LANES)
            for (int i = first; i < min(tiles, first + at_once * blocks); i += blocks)
                ring.push(m.data + ((i64)(PARTED ? i % whole : i) * all + from) * 64, 64 * min(LANES, lanes - from), policy);
    }
    deal.next(tiles);
}

__device__ void fetch_all(const Args& a, Ring ring) {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    Deal deal;
    for (int i = 0; i < a.layers; i++) {
        const Layer& l = a.table[i];
        fetch<IN>(l.in, ring, deal, policy);
        fetch<X, SPLIT>(l.x, ring, deal, policy);
        fetch<BF16>(l.dt, ring, deal, policy);
        fetch<OUT>(l.out, ring, deal, policy);
    }
    fetch<HEAD>(a.head, ring, deal, policy);
}

// ---- what the multiplying warps share

struct Block {
    const Args& a;
    Ring ring;
    Deal deal;
    const char* stages;  // all below: shared memory
    char *all, *own;     // of all warps, of this one: pieces of a vector, then sums
    Layer* described;    // this layer and the next, in turn
    float *norms, *steps, *bc, *uz;
    int warp, lane, met;

    __device__ void arrive() {
        meet_warps();
        met += gridDim.x;
        if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.meeting) : "memory");
    }
    __device__ void wait() {
        if (threadIdx.x == 0) {
            u32 seen;
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(a.meeting) : "memory");
            while (seen < (u32)met);
        }
        meet_warps();
    }
};

// Four bytes q + 128, or nibbles q + 8, as bfloat16 numbers q.
__device__ __forceinline__ void from_bytes(u32& low, u32& high, u32 bytes, float middle) {
    float f[4];
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440 + i)) - (8388608.0f + middle);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(f[1]), "f"(f[0]));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(f[3]), "f"(f[2]));
}

// What lane t, g multiplies of 32 columns: rows 2g and 2g + 1, as two operands of the mma. Lines from `lines` on pad the matrix; the
// stage holds something else there.
template <int FORMAT>
__device__ __forceinline__ void load_rows(u32 (&w)[2][4], const char* stage, int line, int lines, int lane) {
    const int t = lane & 3, g = lane >> 2;
    constexpr u32 NOTHING = FORMAT == BF16 ? 0 : FORMAT == INT8 ? 0x80808080u : 0x88888888u;
    uint2 v[4 >> FORMAT];
#pragma unroll
    for (int i = 0; i < 4 >> FORMAT; i++) {
        v[i] = *(const uint2*)(stage + (line + 4 * i + t) * 64 + g * 8);
        if (line + 4 * i + t >= lines) v[i].x = v[i].y = NOTHING;
    }
    if (FORMAT == BF16) {
#pragma unroll
        for (int i = 0; i < 4; i++) w[i / 2][i % 2 * 2] = v[i % (4 >> FORMAT)].x, w[i / 2][i % 2 * 2 + 1] = v[i % (4 >> FORMAT)].y;
    } else if (FORMAT == INT8) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            from_bytes(w[i][0], w[i][2], v[i % (4 >> FORMAT)].x, 128.0f);
            from_bytes(w[i][1], w[i][3], v[i % (4 >> FORMAT)].y, 128.0f);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            from_bytes(w[i][0], w[i][2], v[0].x >> 4 * i & 0x0f0f0f0fu, 8.0f);
            from_bytes(w[i][1], w[i][3], v[0].y >> 4 * i & 0x0f0f0f0fu, 8.0f);
        }
    }
}

// c += 32 columns of 16 rows times x, for all sequences. `scales`: of the lane's two rows, for int4.
template <int FORMAT>
__device__ __forceinline__ void multiply(float (&c)[NB][4], const u32 (&w)[2][4], const u32 (&x)[2][NB][2], u32 scales) {
    const float first = wide((u16)scales), second = wide((u16)(scales >> 16));
#pragma unroll
    for (int j = 0; j < NB; j++) {
        if (FORMAT == INT4) {
            float sum[4] = {0, 0, 0, 0};
            mma(sum, w[0], x[0][j]);
            mma(sum, w[1], x[1][j]);
            c[j][0] += first * sum[0], c[j][1] += first * sum[1];
            c[j][2] += second * sum[2], c[j][3] += second * sum[3];
        } else {
            mma(c[j], w[0], x[0][j]);
            mma(c[j], w[1], x[1][j]);
        }
    }
}

// A vector on its way into shared memory: each lane fetches what it multiplies itself, SLOTS pieces ahead.
struct Pieces {
    const u16* from;
    char* own;  // the lane's 16 bytes of the warp's first slot
    int lane, end, b;

    __device__ void fetch(int piece, int slot) const {
        if (piece < end)
#pragma unroll
            for (int j = 0; j < NB; j++)
                if (j * 8 + (lane >> 2) < b)
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(own + slot * PIECE + j * 512)),
                             "l"(from + ((i64)(piece * COLS + j * 8) * 32 + lane * 8)) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    __device__ void take(u32 (&x)[2][NB][2], int slot) const {
        asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 1) : "memory");
#pragma unroll
        for (int j = 0; j < NB; j++) {
            const uint4 v = *(const uint4*)(own + slot * PIECE + j * 512);
            x[0][j][0] = v.x, x[0][j][1] = v.y, x[1][j][0] = v.z, x[1][j][1] = v.w;
        }
    }
};

// finish(row, column, sum, load(row, column)) for all elements of m · vectors in this block's tiles, rows that pad it included.
// What `load` reads is on its way for several elements before the first is finished; `meanwhile` runs while vectors come in.
// PARTED: a tile's columns are dealt out too, SLICE lines at a time, and `row` counts on from one slice to the next.
template <int FORMAT, bool PARTED, class Meanwhile, class Load, class Finish>
__device__ void product(Block& s, const Matrix& m, const u16* vectors, Meanwhile meanwhile, Load load, Finish finish) {
    constexpr int L = LINES<FORMAT>, EACH = LANES / L / WARPS;  // pieces of a warp in a stage
    const int all = lanes_of<FORMAT>(m), whole = tiles_of(m), blocks = gridDim.x, lane = s.lane;
    const int tiles = PARTED ? whole * ((all + SLICE - 1) / SLICE) : whole;
    for (int first = s.deal.mine(); first < tiles; first += (PARTED ? 1 : TM) * blocks) {
        const int count = min(PARTED ? 1 : TM, (tiles - first + blocks - 1) / blocks);
        const int begin = PARTED ? first / whole * SLICE : 0, lanes = PARTED ? min(all, begin + SLICE) : all;
        auto tile_of = [&](int i) { return PARTED ? first % whole : first + i * blocks; };
        const Pieces pieces{vectors, s.own + lane * 16, lane, (lanes + L - 1) / L, (int)s.a.b};
#pragma unroll
        for (int i = 0; i < SLOTS; i++) pieces.fetch(begin / L + s.warp + i * WARPS, i);
        if (first < blocks) meanwhile();
        float c[TM][NB][4];
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < NB; j++)
#pragma unroll
                for (int q = 0; q < 4; q++) c[i][j][q] = 0;
        int slot = 0;
        for (int from = begin; from < lanes; from += LANES) {
            int stage[TM];
            Ring ring = s.ring;
#pragma unroll
            for (int i = 0; i < TM; i++) {
                stage[i] = 0;
                if (i < count) stage[i] = ring.front(), ring.next();
            }
#pragma unroll 2
            for (int q = 0; q < EACH; q++) {
                const int line = (q * WARPS + s.warp) * L;
                if (from + line >= lanes) break;
                u32 x[2][NB][2];
                pieces.take(x, slot);
#pragma unroll
                for (int i = 0; i < TM; i++)
                    if (i < count) {
                        u32 w[2][4], scales = 0;
                        if (FORMAT == INT4)
                            scales = __ldg((const u32*)m.scales + ((i64)tile_of(i) * all + from + line) * 2 + (lane >> 2));
                        load_rows<FORMAT>(w, s.stages + stage[i], line, lanes - from, lane);
                        multiply<FORMAT>(c[i], w, x, scales);
                    }
                pieces.fetch((from + line) / L + SLOTS * WARPS, slot);
                if (++slot == SLOTS) slot = 0;
            }
            for (int i = 0; i < count; i++) s.ring.pop(lane);
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncwarp();  // sums take the place of the pieces
        const int t = lane & 3, g = lane >> 2;
#pragma unroll
        for (int i = 0; i < TM; i++) {
            if (i >= count) break;
            float* to = (float*)s.own + i * SUMS + 2 * g;
#pragma unroll
            for (int j = 0; j < NB; j++) {
                *(float2*)(to + (j * 8 + 2 * t) * PAD) = make_float2(c[i][j][0], c[i][j][2]);
                *(float2*)(to + (j * 8 + 2 * t + 1) * PAD) = make_float2(c[i][j][1], c[i][j][3]);
            }
        }
        meet_warps();
        const int b = (int)s.a.b, elements = count * 16 * b;
        for (int from = threadIdx.x; from < elements; from += 32 * WARPS * TOGETHER) {
            decltype(load(0, 0)) held[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int q = from + 32 * WARPS * i;
                if (q < elements) held[i] = load((first + q / (16 * b) * blocks) * 16 + (q & 15), q / 16 % b);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int q = from + 32 * WARPS * i, tile = q / (16 * b), c = q / 16 % b, row = (first + tile * blocks) * 16 + (q & 15);
                if (q >= elements) break;
                const float* parts = (const float*)s.all + tile * SUMS + c * PAD + (q & 15);
                float sum = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum += parts[w * (OWN / 4)];
                finish(row, c, FORMAT == INT8 ? sum * __ldg((const float*)m.scales + (PARTED ? row % (16 * whole) : row)) : sum, held[i]);
            }
        }
        meet_warps();
    }
    s.deal.next(tiles);
}

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

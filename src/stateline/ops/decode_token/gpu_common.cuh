// What the phases of gpu.cu are made of: records, the ring that matrices come through, products. In front of it when compiled.

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


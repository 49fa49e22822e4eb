// Products of packed matrices and vectors: what gpu.cu, which tells of them, is made of. Between gpu_matrix.cuh and it when compiled.

constexpr int WARPS = 8;
constexpr int GROUPS = 4;                                // the same for all NB, and with it the order of sums
constexpr int PARTS = NB < 2 ? 1 : 2, EACH = NB / PARTS;  // EACH: eights of sequences of a warp
constexpr int SHARES = WARPS / (GROUPS * PARTS);         // of the tiles, where warps are left
constexpr int STEP = GROUPS;                             // pieces of a stage
// Whether a kernel lets the next one start at once, or when it has multiplied (timings: benchmarks/NOTES.md).
constexpr bool EARLY = NB < 4;
template <bool ALONE>
constexpr int ROOM = ALONE ? 225280 : 112640;  // bytes of stages: one block or two fit on a multiprocessor
constexpr int PIECE = COLS * 64;  // bytes
constexpr int TOGETHER = NB < 4 ? 2 : 3;  // elements of a result, four rows each, that a thread finishes at once
constexpr int TILE = COLS * PAD + 16;  // floats of a tile's sums

// Filled by gpu.py in this order; every field has eight bytes.
struct Args {
    i64 b, d, e, n, r, before, channels, rest;
    double eps, low, high, gate_eps;
    Matrix embedding, head;
    const i64* ids;
    float* logits;
    float *h, *u, *z, *bc, *squares, *y, *parts;
    u16 *hf, *uf, *yf, *rf;
    Layer l;
    const float* next;  // the norm behind the layer
    i64 last;
    float *conv, *ssm;
};

__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    u32 done;
    do asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                    : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    while (!done);
}
__device__ __forceinline__ void bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
__device__ __forceinline__ u64 once() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ u64 often() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void leave_cluster() {  // what was read was used: nothing written need be seen by others
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 of_block(const float4* p, int rank) {  // the same place in a block of the cluster
    float4 v;
    asm volatile("{.reg .u32 q; mapa.shared::cluster.u32 q, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [q];}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at(p)), "r"(rank) : "memory");
    return v;
}

// Sixteen bytes at once: of an assignment the compiler sometimes makes four stores.
__device__ __forceinline__ void store(float* to, float4 v) { __stwb((float4*)to, v); }

__device__ __forceinline__ float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
__device__ __forceinline__ float4 times(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
__device__ __forceinline__ float4 times(float4 a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }

// Numbers k to k + 3 of sequence c as a matrix of a format reads them.
template <int FORMAT>
__device__ __forceinline__ void put(u16* vectors, int k, int c, float4 v) {
    const u32 low = (u32)bf16(v.y) << 16 | bf16(v.x), high = (u32)bf16(v.w) << 16 | bf16(v.z);
    if (FORMAT == BF16) {
        *(u32*)(vectors + place<FORMAT>(k, c)) = low;
        *(u32*)(vectors + place<FORMAT>(k + 2, c)) = high;
    } else {
        *(uint2*)(vectors + place<FORMAT>(k, c)) = make_uint2(low, high);
    }
}

// A block's part of a product.
template <int FORMAT, int T, int S, bool ALONE>
struct Share {
    static constexpr int L = LINES<FORMAT>, TILE_PIECE = L * 64, SCALES = FORMAT == INT4 ? 32 : 0;
    static constexpr int VECTORS = STEP * T * (TILE_PIECE + SCALES), BYTES = STEP * PIECE + VECTORS, STAGES = ROOM<ALONE> / BYTES;
    static_assert(STAGES >= 2 && GROUPS * T * TILE * 4 <= ROOM<ALONE>, "");

    const Matrix& m;
    int rank, first, apart, count, all, begin, end, steps;

    __device__ Share(const Matrix& m) : m(m) {
        all = lanes_of<FORMAT>(m);
        rank = blockIdx.x % S;
        first = blockIdx.x / S, apart = gridDim.x / S;  // tiles lie apart, for rows of a matrix may differ in what follows
        count = (tiles_of(m) - first + apart - 1) / apart;
        const int pieces = (all + L - 1) / L, each = (pieces + S - 1) / S;
        begin = min(pieces, rank * each), end = min(pieces, begin + each), steps = (end - begin + STEP - 1) / STEP;
    }
    __device__ int pieces(int step) const { return min(STEP, end - begin - step * STEP); }
    __device__ int lines(int step) const { return all - (begin + step * STEP) * L; }

    // By one thread: everything of the matrix that there is room for, then, when they are ready, vectors, and so on.
    __device__ void fetch(u32 stages, u32 full, u32 empty, const u16* vectors) const {
        const u64 policy = once(), keep = often();
        for (int i = 0; i < min(STAGES, steps); i++) matrix(i, stages + i * BYTES, full + 8 * i, policy);
        wait_for_last();
        for (int i = 0; i < min(STAGES, steps); i++) vector(i, stages + i * BYTES, full + 8 * i, vectors, keep);
        int slot = 0;
        u32 turn = 0;
        for (int i = STAGES; i < steps; i++) {
            wait(empty + 8 * slot, turn);
            matrix(i, stages + slot * BYTES, full + 8 * slot, policy);
            vector(i, stages + slot * BYTES, full + 8 * slot, vectors, keep);
            if (++slot == STAGES) slot = 0, turn ^= 1;
        }
    }
    __device__ void matrix(int i, u32 to, u32 barrier, u64 policy) const {
        const int from = begin + i * STEP, n = pieces(i), bytes = 64 * min(n * L, lines(i));
        expect(barrier, count * (bytes + n * SCALES) + n * PIECE);
        for (int t = 0; t < count; t++) {
            bulk(to + t * STEP * TILE_PIECE, m.data + ((i64)(first + t * apart) * all + from * L) * 64, bytes, barrier, policy);
            if (FORMAT == INT4)
                bulk(to + STEP * (T * TILE_PIECE + t * 32), m.scales + ((i64)(first + t * apart) * (all / 4) + from) * 32, n * 32, barrier, policy);
        }
    }
    __device__ void vector(int i, u32 to, u32 barrier, const u16* vectors, u64 policy) const {
        bulk(to + VECTORS, vectors + (i64)(begin + i * STEP) * COLS * 32, pieces(i) * PIECE, barrier, policy);
    }
};

// c += piece q of all tiles of a stage times the sequences from `at` on. Tiles that the block does not have add what nobody reads.
template <int FORMAT, int T, int S, bool ALONE, bool WHOLE>
__device__ __forceinline__ void add_piece(
    float (&c)[(T + SHARES - 1) / SHARES][EACH][4], const char* lines, const char* stage, int q, int at, int left, int share, int lane) {
    using Part = Share<FORMAT, T, S, ALONE>;
    u32 x[EACH][4];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const uint4 v = *(const uint4*)(stage + Part::VECTORS + q * PIECE + (at + j) * 512 + lane * 16);
        x[j][0] = v.x, x[j][1] = v.y, x[j][2] = v.z, x[j][3] = v.w;
    }
#pragma unroll
    for (int j = 0; j < (T + SHARES - 1) / SHARES; j++) {
        const int i = j * SHARES + share;
        if (T % SHARES && i >= T) break;
        u32 w[2][4];
        load_halves<FORMAT, WHOLE>(w, lines + i * STEP * Part::TILE_PIECE, left, lane);
        float low = 1, high = 1;
        if (FORMAT == INT4) {
            const u16* scales = (const u16*)(stage + STEP * (T * Part::TILE_PIECE + i * 32) + q * 32) + (lane >> 2);
            low = wide(scales[0]), high = wide(scales[8]);
        }
        add_products<FORMAT>(c[j], w, x, low, high);
    }
}

// finish(row, sequence, sum, load(row, sequence)) for the elements of m · vectors, 16 rows of a sequence by neighbouring threads.
// `early` runs while the kernel in front ends, `before` when the vectors are ready.
template <int FORMAT, int T, int S, bool ALONE, bool WHOLE, class Early, class Before, class Load, class Finish>
__device__ void product(
    const Args& a, const Matrix& m, const u16* vectors, Early early, Before before, Load load, Finish finish) {
    extern __shared__ __align__(128) char shared[];
    using Part = Share<FORMAT, T, S, ALONE>;
    __shared__ u64 barriers[2 * Part::STAGES];
    const u32 full = at(barriers), empty = full + 8 * Part::STAGES;
    const Part part(m);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, b = (int)a.b;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Part::STAGES; i++) init(full + 8 * i, 1), init(empty + 8 * i, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (EARLY) let_next_start();
    if (warp == WARPS) {
        if (lane == 0) part.fetch(at(shared), full, empty, vectors);
        __syncwarp();
    } else {
        early(part.first, part.apart, part.count, part.rank);
        wait_for_last();
        before(warp, lane);
        constexpr int OWN = (T + SHARES - 1) / SHARES;
        const int group = warp % GROUPS, at = warp / GROUPS % PARTS * EACH, share = warp / (GROUPS * PARTS);
        float c[OWN][EACH][4];
#pragma unroll
        for (int i = 0; i < OWN; i++)
#pragma unroll
            for (int j = 0; j < EACH; j++)
#pragma unroll
                for (int q = 0; q < 4; q++) c[i][j][q] = 0;
        int slot = 0;
        u32 turn = 0;
#pragma unroll 1
        for (int step = 0; step < part.steps; step++) {
            const char* stage = shared + slot * Part::BYTES;
            const int pieces = part.pieces(step), lines = part.lines(step);
            wait(full + 8 * slot, turn);
#pragma unroll 1
            for (int q = group; q < STEP; q += GROUPS) {
                if (q >= pieces) break;
                const char* from = stage + q * Part::TILE_PIECE;
                add_piece<FORMAT, T, S, ALONE, WHOLE>(c, from, stage, q, at, lines - q * Part::L, share, lane);
            }
            __syncwarp();
            if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * slot) : "memory");
            if (++slot == Part::STAGES) slot = 0, turn ^= 1;
        }
        if (!EARLY) let_next_start();
        asm volatile("bar.sync 1, 256;" ::: "memory");  // sums take the place of the stages
        const int t = lane & 3, g = lane >> 2;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (T % SHARES && i * SHARES + share >= T) break;
            float* to = (float*)shared + (group * T + i * SHARES + share) * TILE + g;
#pragma unroll
            for (int j = 0; j < EACH; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) to[((at + j) * 8 + 2 * t + k % 2) * PAD + k / 2 * 8] = c[i][j][k];
        }
    }
    __syncthreads();
    if (S > 1) {  // the groups' sums first, for what comes from other blocks takes longer
        float4* sums = (float4*)shared;
        for (int q = threadIdx.x; q < T * TILE / 4; q += 288)
#pragma unroll
            for (int k = 1; k < GROUPS; k++) {
                const float4 more = sums[q + k * T * TILE / 4];
                sums[q].x += more.x, sums[q].y += more.y, sums[q].z += more.z, sums[q].w += more.w;
            }
        meet_cluster();
    }
    if (warp < WARPS) {
        const int all = T * b * 4, step = S * 256;
#pragma unroll 1
        for (int from = part.rank * 256 + threadIdx.x; from < all; from += step * TOGETHER) {
            decltype(load(0, 0)) held[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int q = from + i * step, tile = (q >> 2) % T, column = (q >> 2) / T;
                if (q < all && tile < part.count) held[i] = load((part.first + tile * part.apart) * 16 + (q & 3) * 4, column);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int q = from + i * step, tile = (q >> 2) % T, column = (q >> 2) / T;
                if (q >= all || tile >= part.count) continue;
                const float4* place = (const float4*)((const float*)shared + tile * TILE + column * PAD) + (q & 3);
                const int row = (part.first + tile * part.apart) * 16 + (q & 3) * 4;
                float4 sum = make_float4(0, 0, 0, 0);
                if (S > 1) {
#pragma unroll
                    for (int k = 0; k < S; k++) sum = plus(sum, of_block(place, k));
                } else {
#pragma unroll
                    for (int k = 0; k < GROUPS; k++) sum = plus(sum, place[k * T * TILE / 4]);
                }
                if (FORMAT == INT8) sum = times(sum, __ldg((const float4*)((const float*)m.scales + row)));
                finish(row, column, sum, held[i]);
            }
        }
    }
    if (S > 1) leave_cluster();  // nobody does while others read its sums
}

// Packed matrices and the vectors they multiply, on a GPU: in front of gpu.cu when it is compiled, whose letters are used.
// Compiled for NB: 8 · NB sequences of a launch, at most.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short u16;

constexpr int COLS = 8 * NB;  // sequences of a launch, at most
constexpr int PAD = 20;       // floats between sequences of a tile's sums: no bank conflicts

struct Matrix {
    const char* data;
    const char* scales;
    const float* bias;
    i64 format, rows, columns;
};
// x, dt: of Mamba-1 alone.   A: A2 of Mamba-1.   scale: of Mamba-2 alone.
struct Layer {
    const float* norm;
    Matrix in, x, dt, out;
    const float *taps, *conv_bias, *A, *D, *dt_bias, *scale;
};

__device__ __forceinline__ u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
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

__device__ __forceinline__ int tiles_of(const Matrix& m) { return (int)((m.rows + 15) / 16); }
template <int FORMAT>
__device__ __forceinline__ int lanes_of(const Matrix& m) {
    const int columns = (int)m.columns;
    return FORMAT == BF16 ? (columns + 1) / 2 : FORMAT == INT8 ? (columns + 3) / 4 : (columns + 31) / 32 * 4;
}

// Four bytes q + 128, or nibbles q + 8, as bfloat16 numbers q.
__device__ __forceinline__ void from_bytes(u32& low, u32& high, u32 bytes, float middle) {
    float f[4];
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440 + i)) - (8388608.0f + middle);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(f[1]), "f"(f[0]));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(f[3]), "f"(f[2]));
}

// Two rows of what is in memory, as two operands of the mma.
template <int FORMAT>
__device__ __forceinline__ void spread(u32 (&w)[2][4], const u32 (&low)[4 >> FORMAT], const u32 (&high)[4 >> FORMAT]) {
    constexpr int N = 4 >> FORMAT;
    if (FORMAT == BF16) {
#pragma unroll
        for (int i = 0; i < 4; i++) w[i / 2][i % 2 * 2] = low[i % N], w[i / 2][i % 2 * 2 + 1] = high[i % N];
    } else if (FORMAT == INT8) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            from_bytes(w[i][0], w[i][2], low[i % N], 128.0f);
            from_bytes(w[i][1], w[i][3], high[i % N], 128.0f);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            from_bytes(w[i][0], w[i][2], low[0] >> 4 * i & 0x0f0f0f0fu, 8.0f);
            from_bytes(w[i][1], w[i][3], high[0] >> 4 * i & 0x0f0f0f0fu, 8.0f);
        }
    }
}

// What lane t, g multiplies of 32 columns of rows 2g and 2g + 1. Lines from `lines` on pad the matrix; the stage holds something
// else there.
template <int FORMAT>
__device__ __forceinline__ void load_rows(u32 (&w)[2][4], const char* stage, int line, int lines, int lane) {
    const int t = lane & 3, g = lane >> 2;
    constexpr u32 NOTHING = FORMAT == BF16 ? 0 : FORMAT == INT8 ? 0x80808080u : 0x88888888u;
    u32 low[4 >> FORMAT], high[4 >> FORMAT];
#pragma unroll
    for (int i = 0; i < 4 >> FORMAT; i++) {
        const uint2 v = *(const uint2*)(stage + (line + 4 * i + t) * 64 + g * 8);
        const bool there = line + 4 * i + t < lines;
        low[i] = there ? v.x : NOTHING, high[i] = there ? v.y : NOTHING;
    }
    spread<FORMAT>(w, low, high);
}

// The same of rows g and g + 8, where all lines count if WHOLE, else `left`. Lanes of the third and fourth line read the halves of a line in the
// other order, so that no two lanes of a warp want the same bank.
template <int FORMAT, bool WHOLE>
__device__ __forceinline__ void load_halves(u32 (&w)[2][4], const char* lines, int left, int lane) {
    constexpr u32 NOTHING = FORMAT == BF16 ? 0 : FORMAT == INT8 ? 0x80808080u : 0x88888888u;
    const int t = lane & 3, g = lane >> 2;
    const bool other = t & 2;
    const u32* from = (const u32*)(lines + t * 64 + g * 4);
    u32 low[4 >> FORMAT], high[4 >> FORMAT];
#pragma unroll
    for (int i = 0; i < 4 >> FORMAT; i++) {
        u32 a = from[64 * i + (other ? 8 : 0)], b = from[64 * i + (other ? 0 : 8)];
        if (!WHOLE && 4 * i + t >= left) a = b = NOTHING;
        low[i] = other ? b : a, high[i] = other ? a : b;
    }
    spread<FORMAT>(w, low, high);
}

// c += 32 columns of 16 rows times x, of N eights of sequences: one after another, since a product waits for the one that it adds to.
// low, high: scales of the lane's two rows, for int4.
template <int FORMAT, int N>
__device__ __forceinline__ void add_products(
    float (&c)[N][4], const u32 (&w)[2][4], const u32 (&x)[N][4], float low, float high) {
    float own[N][4];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int k = 0; k < N; k++) {
            if (FORMAT == INT4 && !half) own[k][0] = own[k][1] = own[k][2] = own[k][3] = 0;
            const u32 two[2] = {x[k][2 * half], x[k][2 * half + 1]};
            mma(FORMAT == INT4 ? own[k] : c[k], w[half], two);
        }
    if (FORMAT == INT4)
#pragma unroll
        for (int k = 0; k < N; k++) c[k][0] += low * own[k][0], c[k][1] += low * own[k][1], c[k][2] += high * own[k][2], c[k][3] += high * own[k][3];
}

__device__ __forceinline__ void warm(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ void copy_in(float* to, const float* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(to)), "l"(from) : "memory");
}

// Numbers between sequences of the sums of squares: tiles of the stream, four at a time.
template <class Args>
__device__ __forceinline__ int across(const Args& a) { return (int)((a.d + 15) / 16 + 3) & ~3; }

// 1/rms of `size` numbers of every sequence, from sums of their squares, `fours` times four of them, by eight warps.
__device__ __forceinline__ void find_norms(float* norms, const float* squares, int fours, float size, double eps, int warp, int lane) {
    float sum[NB];
#pragma unroll
    for (int j = 0; j < NB; j++) sum[j] = 0;
    for (int i = lane; i < fours; i += 32)
#pragma unroll
        for (int j = 0; j < NB; j++) {
            const float4 v = __ldcg((const float4*)squares + (j * 8 + warp) * fours + i);
            sum[j] += (v.x + v.y) + (v.z + v.w);
        }
#pragma unroll
    for (int j = 0; j < NB; j++) {
#pragma unroll
        for (int w = 16; w; w /= 2) sum[j] += __shfl_xor_sync(~0u, sum[j], w);
        if (lane == 0) norms[j * 8 + warp] = rsqrtf(sum[j] / size + (float)eps);
    }
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
template <class Args>
__device__ __forceinline__ float embedded(const Args& a, i64 id, int k) {
    return id >= 0 && id < a.embedding.rows ? packed_at(a.embedding, id, k) : __int_as_float(0x7fc00000);
}

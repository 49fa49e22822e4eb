// selective_scan on a GPU: the gradient, from the last tile to the first. See gpu_common.cuh for how work is laid out.
//
//     g[s] = C[s] dy[s] + a[s+1] g[s+1]       the same scan with lanes reversed
//     dx = sum_n g B    pull = sum_n a g h[s-1] A    dB = sum_d g x    dC = sum_d h dy
//
// States before each tile come from the forward pass, its marks. Sums over channels: a thread adds its two, the four pairs
// of a warp meet in shared memory after every state (TURNS: lines that they use in turn), the four warps after GROUP
// states, and each block writes its own part; `add_up` adds the parts in order.

#define LINE (2 * TILE)               // dB and dC of one state
#define OWN (LANES_C * (LINE + 8))    // floats of a warp's pairs; 8 more keep banks apart
#define LN2 0.6931471805599453f

extern __shared__ __align__(16) unsigned char shared[];

// The gradient that enters this chunk from the steps after it.
__device__ __forceinline__ void enter_adjoint(float4* adjoint, const float4* system, const Call& k, const Place& p) {
    const int n = (int)k.n;
    const i64 across = k.d * k.n;
    const int chunks = (int)((p.length + k.chunk - 1) / k.chunk);
#pragma unroll 1
    for (int i = thread(); i < WIDTH * n; i += THREADS) {
        int channel = i / n, j = i % n, c = p.c0 + channel;
        float G = 0.0f, a = ((const float*)(system + j * PAIRS + channel / 2))[channel % 2];
        if (c < p.c1) {
            G = k.dstate[p.seq * across + (i64)c * n + j];
#pragma unroll 1
            for (int q = chunks - 1; q > p.chunk; --q) {
                i64 row = p.chunk_row + q;
                G = fmaf(ex2(a * k.adjoint_sums[row * k.d + c]), G, k.adjoint_ends[row * across + (i64)c * n + j]);
            }
        }
        float* to = (float*)(adjoint + j * PAIRS + channel / 2);
        to[channel % 2] = 0.0f, to[2 + channel % 2] = G;
    }
}

// Where a thread adds up two steps of one state's dB or dC: threads go through LINE, then the next state's.
#define AT_ONCE (THREADS / TILE)      // states
struct Sum { float *to, *next; int from; bool first, second, paired; };
__device__ __forceinline__ Sum sum_of(const Call& k, const Place& p, int s) {
    const int line = thread() * 2 / TILE, where = thread() * 2 % TILE, left = p.last - s;
    const int step = where % (LANES_T * 4) / 4 * RUN + where / (LANES_T * 4) * 4 + where % 4;
    Sum x;
    x.from = line * TILE + where;
    x.first = step < left, x.second = step + 1 < left;
    x.paired = x.second && !k.reverse && p.start % 2 == 0 && k.t % 2 == 0;
    x.to = k.parts + ((((i64)p.block * k.b + p.row) * 2 + line % 2) * k.n + line / 2) * k.t + time_of(k, p, s + step);
    x.next = x.to + (k.reverse ? -1 : 1);
    return x;
}
// Adds the warps' sums of `states` states from j on and writes the block's.
__device__ __forceinline__ void write_parts(const float* warps, const Sum& x, const Call& k, int j, int states) {
#pragma unroll 1
    for (int i = 0; i + thread() / TILE < states; i += AT_ONCE) {
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int q = 0; q < THREADS / 32; ++q) {
            float2 v = *(const float2*)(warps + (q * GROUP + i) * LINE + x.from);
            sum.x += v.x, sum.y += v.y;
        }
        const i64 ahead = (i64)(j + i) * (int)k.t;
        if (x.paired) {
            *(float2*)(x.to + ahead) = sum;
        } else {
            if (x.first) x.to[ahead] = sum.x;
            if (x.second) x.next[ahead] = sum.y;
        }
    }
}
// Adds the pairs' dB and dC of one state.
__device__ __forceinline__ void join_pairs(const float* own, float* to) {
    const int lane = thread() % 32;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    __syncwarp();
    if (lane * 4 >= LINE) return;
#pragma unroll
    for (int q = 0; q < LANES_C; ++q) {
        float4 v = *(const float4*)(own + q * (LINE + 8) + lane * 4);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    *(float4*)(to + lane * 4) = sum;
}

// What a lane keeps of its run for two channels.
struct Run { float dt[2][RUN], x[2][RUN], dy[2][RUN], y[2][RUN], dx[2][RUN], pull[2][RUN], before[2], after[2]; };

// One state: forwards, then backwards. Leaves the lane's sums for B and C in `own`.
__device__ __forceinline__ void one_state(
    Run& q, const float* line_at, int to_C, const float4* system_j, const float2* mark_j, float4* adjoint_j, float* own,
    const Lane& me) {
    const float2 sys = *(const float2*)system_j, mark = *mark_j;
    const float4 adj = *adjoint_j;
    float a[2][RUN], before[2][RUN], B[RUN], C[RUN], dB[RUN], dC[RUN], dA[2], carry[2];
    const int turn = turn_of(me.run);
    load_run(B, line_at, turn);
    load_run(C, line_at + to_C, turn);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const float A = c ? sys.y : sys.x;
        float end = 0.0f, drive[RUN];
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
            a[c][r] = ex2(q.dt[c][r] * A);
            drive[r] = q.x[c][r] * B[r];
            end = r ? fmaf(a[c][r], end, drive[r]) : drive[r];
        }
        float h = scan_lanes<true>(end, ex2(q.before[c] * A), c ? mark.y : mark.x);
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
            before[c][r] = h;
            h = fmaf(a[c][r], h, drive[r]);
            q.y[c][r] = fmaf(C[r], h, q.y[c][r]);
            dC[r] = c ? fmaf(h, q.dy[c][r], dC[r]) : h * q.dy[c][r];
        }
    }
    float* to = own + me.pair % LANES_C * (LINE + 8) + me.run * 4;
#pragma unroll
    for (int v = 0; v < RUN / 4; ++v)
        *(float4*)(to + TILE + v * (LANES_T * 4)) = make_float4(dC[4 * v], dC[4 * v + 1], dC[4 * v + 2], dC[4 * v + 3]);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const float A = c ? sys.y : sys.x;
        float G = 0.0f, sum = 0.0f;
#pragma unroll
        for (int r = RUN - 1; r >= 0; --r) G = a[c][r] * (r == RUN - 1 ? C[r] * q.dy[c][r] : fmaf(C[r], q.dy[c][r], G));
        G = scan_lanes<false>(G, ex2(q.after[c] * A), c ? adj.w : adj.z);
#pragma unroll
        for (int r = RUN - 1; r >= 0; --r) {
            float g = fmaf(C[r], q.dy[c][r], G);
            G = a[c][r] * g;
            float through = G * before[c][r];
            q.pull[c][r] = fmaf(through, A, q.pull[c][r]);
            sum = fmaf(through, q.dt[c][r], sum);
            q.dx[c][r] = fmaf(g, B[r], q.dx[c][r]);
            dB[r] = c ? fmaf(g, q.x[c][r], dB[r]) : g * q.x[c][r];
        }
        dA[c] = sum, carry[c] = G;
    }
#pragma unroll
    for (int v = 0; v < RUN / 4; ++v)
        *(float4*)(to + v * (LANES_T * 4)) = make_float4(dB[4 * v], dB[4 * v + 1], dB[4 * v + 2], dB[4 * v + 3]);
    __syncwarp();  // all lanes have read what is replaced
    if (me.run == 0) *(float2*)&adjoint_j->z = make_float2(carry[0], carry[1]);
    const bool high = me.run >= LANES_T / 2;  // the upper lanes add up the second channel's
    float sum = (high ? dA[1] : dA[0]) + __shfl_xor_sync(FULL, high ? dA[0] : dA[1], 16);
    sum += __shfl_xor_sync(FULL, sum, 8);
    sum += __shfl_xor_sync(FULL, sum, 4);
    if (me.run % (LANES_T / 2) == 0) ((float*)adjoint_j)[high] += sum;
}

__device__ __forceinline__ void read_run(Run& q, const T* tiles, const Call& k, const Place& p, int s) {
    const Lane me = lane_of();
    const float2 D = parameter(p.D, me);
    const T* here = tiles + at(me.run * RUN, me.channel);
    float sum[2] = {0.0f, 0.0f};
    step_sizes(q.dt, tiles + BUFFER, k, p, me, s);
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
        float2 u = get2(here + r * WIDTH), dy = get2(here + r * WIDTH + 3 * BUFFER);
        q.x[0][r] = q.dt[0][r] * u.x, q.x[1][r] = q.dt[1][r] * u.y;
        q.dy[0][r] = dy.x, q.dy[1][r] = dy.y;
        q.y[0][r] = D.x * u.x, q.y[1][r] = D.y * u.y;
#pragma unroll
        for (int c = 0; c < 2; ++c) q.dx[c][r] = q.pull[c][r] = 0.0f, sum[c] += q.dt[c][r];
    }
    if (k.z.at) {
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
            float2 z = get2(here + r * WIDTH + 2 * BUFFER);
            q.dy[0][r] *= z.x * sigmoid(z.x), q.dy[1][r] *= z.y * sigmoid(z.y);
        }
    }
#pragma unroll
    for (int r = 0; r < RUN; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) keep(q.dt[c][r]), keep(q.x[c][r]), keep(q.dy[c][r]);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        q.before[c] = beside<true>(sum[c], 0.0f);
        q.after[c] = beside<false>(sum[c], 0.0f);
    }
}

// Gradients of u, dt and z in place of the tiles' u, dt and z; adds to those of D and the bias.
__device__ __forceinline__ void write_run(
    Run& q, T* tiles, const Call& k, const Place& p, int s, float2& dD, float2& dbias) {
    const Lane me = lane_of();
    const float2 D = parameter(p.D, me);
    T* here = tiles + at(me.run * RUN, me.channel);
    if (k.z.at) {
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
            float2 z = get2(here + r * WIDTH + 2 * BUFFER), dy = get2(here + r * WIDTH + 3 * BUFFER);
            float s0 = sigmoid(z.x), s1 = sigmoid(z.y);
            put2(here + r * WIDTH + 2 * BUFFER, dy.x * q.y[0][r] * s0 * fmaf(z.x, 1.0f - s0, 1.0f),
                 dy.y * q.y[1][r] * s1 * fmaf(z.y, 1.0f - s1, 1.0f));
        }
    }
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
        float2 u = get2(here + r * WIDTH);
        put2(here + r * WIDTH, fmaf(q.dx[0][r], q.dt[0][r], D.x * q.dy[0][r]),
             fmaf(q.dx[1][r], q.dt[1][r], D.y * q.dy[1][r]));
        dD.x = fmaf(q.dy[0][r], u.x, dD.x), dD.y = fmaf(q.dy[1][r], u.y, dD.y);
        q.dx[0][r] = fmaf(q.dx[0][r], u.x, q.pull[0][r] * LN2);  // now of dt
        q.dx[1][r] = fmaf(q.dx[1][r], u.y, q.pull[1][r] * LN2);
    }
    if (k.softplus) {
        const float2 bias = parameter(p.bias, me);
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
            float2 raw = get2(here + r * WIDTH + BUFFER);
            q.dx[0][r] *= sigmoid(raw.x + bias.x), q.dx[1][r] *= sigmoid(raw.y + bias.y);
        }
    }
    if (s + TILE > p.last) {
        const int left = p.last - s - me.run * RUN;
#pragma unroll
        for (int r = 0; r < RUN; ++r)
            if (r >= left) q.dx[0][r] = q.dx[1][r] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < RUN; ++r) {
        put2(here + r * WIDTH + BUFFER, q.dx[0][r], q.dx[1][r]);
        dbias.x += q.dx[0][r], dbias.y += q.dx[1][r];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS) scan_backward(const __grid_constant__ Call k) {
    __shared__ Place p;
    if (!locate(k, p)) return;
    const int n = (int)k.n, raw_size = TILE * padded(k);
    T *tiles = (T*)shared, *b_raw = tiles + 2 * 4 * BUFFER, *c_raw = b_raw + raw_size;  // u, dt, z, dy, twice
    float *B = (float*)(c_raw + raw_size), *own = B + 2 * n * TILE, *warps = own + THREADS / 32 * TURNS * OWN;
    float4 *system = (float4*)(warps + THREADS / 32 * GROUP * LINE), *adjoint = system + n * PAIRS;
    float2* marks = (float2*)(adjoint + n * PAIRS);  // twice
    auto fetch = [&](int stage, int s) {
        T* to = tiles + stage * 4 * BUFFER;
        if (s >= p.first) {
            load_rows(to, p, p.u, s);
            load_rows(to + BUFFER, p, p.dt, s);
            if (k.z.at) load_rows(to + 2 * BUFFER, p, p.z, s);
            load_rows(to + 3 * BUFFER, p, p.dy, s);
            load_groups(b_raw, k, p, p.B, s);
            load_groups(c_raw, k, p, p.C, s);
            const float2* from = (const float2*)mark_of(p, s);
#pragma unroll 1
            for (int i = 2 * thread(); i < n * PAIRS; i += 2 * THREADS)
                copy_async(marks + stage * n * PAIRS + i, from + i, 16);
        }
        commit();
    };
    int s = p.first + (p.last - p.first + TILE - 1) / TILE * TILE - TILE;
    fetch(0, s);
    load_system(system, k, p);
    __syncthreads();
    enter_adjoint(adjoint, system, k, p);
    float2 dD = make_float2(0.0f, 0.0f), dbias = dD;
    int stage = 0;
#pragma unroll 1
    for (; s >= p.first; s -= TILE, stage ^= 1) {
        Run q;
        T* here = tiles + stage * 4 * BUFFER;
        wait<0>();
        __syncthreads();
        spread(B, b_raw, k);
        spread(B + n * TILE, c_raw, k);
        read_run(q, here, k, p, s);
        __syncthreads();
        fetch(stage ^ 1, s - TILE);
        const Sum sum = sum_of(k, p, s);
#pragma unroll 1
        for (int j = 0; j < n; j += GROUP) {
            const Lane me = lane_of();
            const int states = n - j < GROUP ? n - j : GROUP, warp = thread() / 32;
            const float* line = B + j * TILE + me.run * 4;
            const float4* system_j = system + j * PAIRS + me.pair;
            const float2* mark = marks + (stage * n + j) * PAIRS + me.pair;
            float *mine = own + warp * TURNS * OWN, *to = warps + warp * GROUP * LINE;
#pragma unroll 1
            for (int left = states; left > 0; --left) {
                one_state(q, line, n * TILE, system_j, mark, const_cast<float4*>(system_j) + n * PAIRS, mine, me);
                join_pairs(mine, to);
                if (TURNS == 1) __syncwarp();  // the next state's sums replace these
                if (TURNS == 2) mine = own + warp * TURNS * OWN + (left + states + 1) % 2 * OWN;
                line += TILE, system_j += PAIRS, mark += PAIRS, to += LINE;
            }
            __syncthreads();
            write_parts(warps, sum, k, j, states);
            if (n > GROUP) __syncthreads();
        }
        write_run(q, here, k, p, s, dD, dbias);
        __syncthreads();
        store_rows(here, p, p.du, s);
        store_rows(here + BUFFER, p, p.ddt, s);
        if (k.z.at) store_rows(here + 2 * BUFFER, p, p.dz, s);
    }
    wait<0>();
    __syncthreads();
    const i64 row = p.chunk_row + p.chunk;
    save<false>(k.dA_rows + row * k.d * n, adjoint, k, p);
    if (k.dinitial && p.chunk == 0) save<true>(k.dinitial + p.seq * k.d * n, adjoint, k, p);
    const Lane me = lane_of();
#pragma unroll
    for (int by = LANES_C; by < 32; by *= 2) {
        dD.x += __shfl_xor_sync(FULL, dD.x, by), dD.y += __shfl_xor_sync(FULL, dD.y, by);
        dbias.x += __shfl_xor_sync(FULL, dbias.x, by), dbias.y += __shfl_xor_sync(FULL, dbias.y, by);
    }
    const int c = p.c0 + me.channel;
    if (me.run == 0 && c < p.c1) {
        const bool two = c + 1 < p.c1;
        if (k.dD) k.dD_rows[row * k.d + c] = dD.x;
        if (k.dD && two) k.dD_rows[row * k.d + c + 1] = dD.y;
        if (k.dbias) k.dbias_rows[row * k.d + c] = dbias.x;
        if (k.dbias && two) k.dbias_rows[row * k.d + c + 1] = dbias.y;
    }
}

// dB and dC (b, t, g, n) from the parts of the group's blocks, in their order.
__device__ __forceinline__ void add_parts(const Call& k, unsigned block) {
    const unsigned pieces = (unsigned)((k.t + THREADS - 1) / THREADS), line = block / pieces;
    const i64 t = (i64)(block % pieces) * THREADS + threadIdx.x;
    const unsigned n = (unsigned)k.n, b = (unsigned)k.b;
    const i64 j = line % n, which = line / n % 2, row = line / n / 2 % b, group = line / n / 2 / b;
    const i64 blocks = ((k.d + k.g - 1) / k.g + WIDTH - 1) / WIDTH, stride = k.b * 2 * k.n * k.t;
    const int used = (int)((first_channel(k, group + 1) - first_channel(k, group) + WIDTH - 1) / WIDTH);
    if (t >= k.t) return;
    const float* from = k.parts + group * blocks * stride + ((row * 2 + which) * k.n + j) * k.t + t;
    float sum = 0.0f;
#pragma unroll 8
    for (int q = 0; q < used; ++q, from += stride) sum += *from;
    (which ? k.dC : k.dB)[((row * k.t + t) * k.g + group) * k.n + j] = narrow(sum);
}

// Gradients of A, D and the bias from the rows of all chunks, in their order.
__device__ __forceinline__ void add_rows(const Call& k, i64 i) {
    const i64 across = k.d * k.n, rest = i - across;
    if (rest >= 2 * k.d) return;
    float* to = rest < 0 ? k.dA : rest < k.d ? k.dD : k.dbias;
    const float* rows = rest < 0 ? k.dA_rows : rest < k.d ? k.dD_rows : k.dbias_rows;
    if (!to) return;
    const i64 stride = rest < 0 ? across : k.d, at = rest < 0 ? i : rest % k.d;
    float sum = 0.0f;
#pragma unroll 1
    for (i64 seq = 0; seq < k.sequences; ++seq) {
        const i64 row = k.table ? k.table[3 * seq] : seq, start = k.table ? k.table[3 * seq + 1] : 0;
        const i64 length = k.table ? k.table[3 * seq + 2] - start : k.t;
        const float* from = rows + ((row * k.t + start) / k.chunk + seq) * stride + at;
        sum += *from;
#pragma unroll 4
        for (i64 done = k.chunk; done < length; done += k.chunk) from += stride, sum += *from;
    }
    to[at] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) add_up(const __grid_constant__ Call k) {
    const i64 parts = 2 * k.b * k.g * k.n * ((k.t + THREADS - 1) / THREADS);
    if (blockIdx.x < parts)
        add_parts(k, blockIdx.x);
    else
        add_rows(k, (blockIdx.x - parts) * THREADS + threadIdx.x);
}

"""CUDA source of the all-reduces over peer memory. Compiled by NVRTC for one dtype, rank and number of ranks.

Every rank maps the same buffer of every other (`p0` ... `p7`); its layout, in this order:

    flags    2 stages x BLOCKS x 8 words: the call that rank r's block b has reached
    packets  2 halves x SIZE sources x PACKET_BYTES: data and call number side by side (small messages)
    input    2 halves x DATA_BYTES: a rank's own summands
    result   2 halves x DATA_BYTES: sums that the ranks have handed out (two-shot)

`state` is this rank's own: state[0] counts calls, so that CUDA graphs can replay them; state[1] counts finished blocks.
A call uses the halves that its number's parity picks. A rank can be in call k + 2 only after every other has entered
call k + 1, hence left call k: nobody overwrites what another still reads, and no call needs a closing barrier.

Ranks are added in rank order in float32 and rounded once, so that all of them hold the same bits.
"""

SOURCE = r"""
typedef unsigned int u32;
typedef long long i64;

#define PEERS char *p0, char *p1, char *p2, char *p3, char *p4, char *p5, char *p6, char *p7
#define PEER_LIST char *const peers[8] = {p0, p1, p2, p3, p4, p5, p6, p7}; char *const mine = peers[RANK];
#define FLAG_BYTES (2ll * BLOCKS * 8 * 4)
#define PACKETS(half, source) (FLAG_BYTES + ((half) * SIZE + (source)) * (i64)PACKET_BYTES)
#define INPUT(half) (FLAG_BYTES + 2ll * SIZE * PACKET_BYTES + (half) * (i64)DATA_BYTES)
#define RESULT(half) (INPUT(2) + (half) * (i64)DATA_BYTES)

#if DTYPE == 0  // float32: 4 values in 16 bytes
#define WIDTH 4
__device__ __forceinline__ void unpack(uint4 v, float *x) {
    x[0] = __uint_as_float(v.x); x[1] = __uint_as_float(v.y); x[2] = __uint_as_float(v.z); x[3] = __uint_as_float(v.w);
}
__device__ __forceinline__ uint4 pack(const float *x) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
#else
#define WIDTH 8
#if DTYPE == 1  // bfloat16
__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ u32 pair(float a, float b) {
    u32 out; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(b), "f"(a)); return out;
}
#else  // float16
__device__ __forceinline__ float half_bits(unsigned short v) {
    float out; asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v)); return out;
}
__device__ __forceinline__ float low(u32 v) { return half_bits((unsigned short)(v & 0xffffu)); }
__device__ __forceinline__ float high(u32 v) { return half_bits((unsigned short)(v >> 16)); }
__device__ __forceinline__ u32 pair(float a, float b) {
    u32 out; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(b), "f"(a)); return out;
}
#endif
__device__ __forceinline__ void unpack(uint4 v, float *x) {
    x[0] = low(v.x); x[1] = high(v.x); x[2] = low(v.y); x[3] = high(v.y);
    x[4] = low(v.z); x[5] = high(v.z); x[6] = low(v.w); x[7] = high(v.w);
}
__device__ __forceinline__ uint4 pack(const float *x) {
    return make_uint4(pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7]));
}
#endif

__device__ __forceinline__ uint4 load_peer(const char *p) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_peer(char *p, uint4 v) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};"
                 :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Which call this is. Read by every block before any block can finish the call, see leave(). The next kernel may start
// now, to fetch its first weights, and this one may have: kernels/launch.py has the rules.
__device__ __forceinline__ u32 enter(const u32 *state) {
    u32 call;
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(call) : "l"(state) : "memory");
    return call;
}
// The last block to leave begins the next call.
__device__ __forceinline__ void leave(u32 *state) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(state + 1, 1u) == gridDim.x - 1) {
            state[1] = 0;
            state[0] += 1;
        }
    }
}
// Wait until block blockIdx.x of every rank has come here in this call; what it wrote before is then visible.
__device__ __forceinline__ void meet(char *const *peers, char *mine, int stage, u32 call) {
    __syncthreads();
    const int r = threadIdx.x;
    if (r < SIZE) {
        u32 *flag = 0;
        #pragma unroll
        for (int k = 0; k < SIZE; ++k)
            if (k == r) flag = (u32 *)peers[k];
        const int row = (stage * BLOCKS + blockIdx.x) * 8;
        asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(flag + row + RANK), "r"(call + 1) : "memory");
        u32 seen;
        do {
            asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"((u32 *)mine + row + r) : "memory");
        } while ((int)(seen - (call + 1)) < 0);
    }
    __syncthreads();
}

// Send 16 bytes to every other rank as two packets of (word, call, word, call); 8-byte stores are never torn.
__device__ __forceinline__ void send(char *const *peers, u32 call, i64 i, uint4 v) {
    #pragma unroll
    for (int r = 0; r < SIZE; ++r) {
        if (r == RANK) continue;
        char *to = peers[r] + PACKETS(call & 1, RANK) + i * 32;
        store_peer(to, make_uint4(v.x, call + 1, v.y, call + 1));
        store_peer(to + 16, make_uint4(v.z, call + 1, v.w, call + 1));
    }
}
// Sum vector i over the ranks, this rank's own summand being v, once the others' packets are here.
__device__ __forceinline__ uint4 receive(char *mine, u32 call, i64 i, uint4 v) {
    float sum[WIDTH];
    #pragma unroll
    for (int r = 0; r < SIZE; ++r) {
        uint4 part = v;
        if (r != RANK) {
            const char *from = mine + PACKETS(call & 1, r) + i * 32;
            uint4 a, b;
            do {
                a = load_peer(from);
                b = load_peer(from + 16);
            } while (a.y != call + 1 || a.w != call + 1 || b.y != call + 1 || b.w != call + 1);
            part = make_uint4(a.x, a.z, b.x, b.z);
        }
        float x[WIDTH];
        unpack(part, x);
        #pragma unroll
        for (int k = 0; k < WIDTH; ++k) sum[k] = r == 0 ? x[k] : sum[k] + x[k];
    }
    return pack(sum);
}
// Sum the 16 bytes at `offset` of every rank's buffer.
__device__ __forceinline__ uint4 gather(char *const *peers, i64 offset) {
    uint4 part[SIZE];
    #pragma unroll
    for (int r = 0; r < SIZE; ++r) part[r] = load_peer(peers[r] + offset);
    float sum[WIDTH];
    #pragma unroll
    for (int r = 0; r < SIZE; ++r) {
        float x[WIDTH];
        unpack(part[r], x);
        #pragma unroll
        for (int k = 0; k < WIDTH; ++k) sum[k] = r == 0 ? x[k] : sum[k] + x[k];
    }
    return pack(sum);
}

// Small messages: each rank sends its data, flags inside, and adds what arrives. n: vectors of 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS) packets(const uint4 *in, uint4 *out, i64 n, u32 *state, PEERS) {
    PEER_LIST
    const u32 call = enter(state);
    const i64 step = (i64)gridDim.x * THREADS;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) send(peers, call, i, in[i]);
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) out[i] = receive(mine, call, i, in[i]);
    leave(state);
}

// Each rank reads everybody's data.
extern "C" __global__ void __launch_bounds__(THREADS) one_shot(const uint4 *in, uint4 *out, i64 n, u32 *state, PEERS) {
    PEER_LIST
    const u32 call = enter(state);
    const i64 step = (i64)gridDim.x * THREADS, input = INPUT(call & 1);
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) *(uint4 *)(mine + input + i * 16) = in[i];
    meet(peers, mine, 0, call);
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) out[i] = gather(peers, input + i * 16);
    leave(state);
}

// Each rank sums its share of the data and hands the sums to everybody.
extern "C" __global__ void __launch_bounds__(THREADS) two_shot(const uint4 *in, uint4 *out, i64 n, u32 *state, PEERS) {
    PEER_LIST
    const u32 call = enter(state);
    const i64 step = (i64)gridDim.x * THREADS, share = (n + SIZE - 1) / SIZE;
    const i64 input = INPUT(call & 1), result = RESULT(call & 1);
    for (i64 j = (i64)blockIdx.x * THREADS + threadIdx.x; j < share; j += step)
        #pragma unroll
        for (int r = 0; r < SIZE; ++r)
            if (r * share + j < n) *(uint4 *)(mine + input + (r * share + j) * 16) = in[r * share + j];
    meet(peers, mine, 0, call);
    for (i64 j = (i64)blockIdx.x * THREADS + threadIdx.x; j < share; j += step) {
        const i64 i = RANK * share + j;
        if (i >= n) continue;
        const uint4 sum = gather(peers, input + i * 16);
        #pragma unroll
        for (int r = 0; r < SIZE; ++r) *(uint4 *)(peers[r] + result + i * 16) = sum;
    }
    meet(peers, mine, 1, call);
    for (i64 j = (i64)blockIdx.x * THREADS + threadIdx.x; j < share; j += step)
        #pragma unroll
        for (int r = 0; r < SIZE; ++r)
            if (r * share + j < n) out[r * share + j] = load_peer(mine + result + (r * share + j) * 16);
    leave(state);
}

// out = rms_norm(total) * weight, where total = sum over ranks of in, + residual. One block a row at a time.
// `width` vectors a row, at most ROW_VECTORS * THREADS. SMALL: packets; else one_shot.
template <bool SMALL>
__device__ __forceinline__ void add_norm(const uint4 *in, const uint4 *residual, const uint4 *weight, uint4 *out,
                                         uint4 *total, i64 rows, i64 width, float eps, u32 *state, PEERS) {
    PEER_LIST
    __shared__ float partial[THREADS / 32];
    const u32 call = enter(state);
    const i64 input = INPUT(call & 1);
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x)
        for (i64 j = threadIdx.x; j < width; j += THREADS) {
            const i64 i = row * width + j;
            if (SMALL) send(peers, call, i, in[i]);
            else *(uint4 *)(mine + input + i * 16) = in[i];
        }
    if (!SMALL) meet(peers, mine, 0, call);
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        float kept[ROW_VECTORS][WIDTH], squares = 0;
        #pragma unroll
        for (int v = 0; v < ROW_VECTORS; ++v) {
            const i64 j = threadIdx.x + v * THREADS, i = row * width + j;
            if (j < width) {
                float x[WIDTH];
                unpack(SMALL ? receive(mine, call, i, in[i]) : gather(peers, input + i * 16), kept[v]);
                unpack(residual[i], x);
                #pragma unroll
                for (int k = 0; k < WIDTH; ++k) kept[v][k] += x[k];
                const uint4 rounded = pack(kept[v]);
                total[i] = rounded;
                unpack(rounded, kept[v]);
                #pragma unroll
                for (int k = 0; k < WIDTH; ++k) squares += kept[v][k] * kept[v][k];
            }
        }
        #pragma unroll
        for (int offset = 16; offset; offset >>= 1) squares += __shfl_xor_sync(~0u, squares, offset);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = squares;
        __syncthreads();
        squares = 0;
        #pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) squares += partial[w];
        __syncthreads();
        const float scale = rsqrtf(squares / (float)(width * WIDTH) + eps);
        #pragma unroll
        for (int v = 0; v < ROW_VECTORS; ++v) {
            const i64 j = threadIdx.x + v * THREADS;
            if (j < width) {
                float w[WIDTH];
                #pragma unroll
                for (int k = 0; k < WIDTH; ++k) kept[v][k] *= scale;
                unpack(pack(kept[v]), kept[v]);
                unpack(weight[j], w);
                #pragma unroll
                for (int k = 0; k < WIDTH; ++k) kept[v][k] *= w[k];
                out[row * width + j] = pack(kept[v]);
            }
        }
    }
    leave(state);
}
#define ADD_NORM(name, small) \
    extern "C" __global__ void __launch_bounds__(THREADS) name( \
        const uint4 *in, const uint4 *residual, const uint4 *weight, uint4 *out, uint4 *total, i64 rows, i64 width, \
        float eps, u32 *state, PEERS) { \
        add_norm<small>(in, residual, weight, out, total, rows, width, eps, state, p0, p1, p2, p3, p4, p5, p6, p7); \
    }
ADD_NORM(packets_add_norm, true)
ADD_NORM(one_shot_add_norm, false)
"""

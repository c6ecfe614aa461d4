// Decode attention over a paged K/V cache at the speed at which the cache is read: kernels/decode_hopper.py compiles and
// launches this, and prefixes macros and hopper.cu:
//
//   HEADS      key/value heads, a warp each; GROUP query heads (at most 8) attend with each of them
//   HEAD_DIM   64 or 128
//   STAGES     tiles of TILE tokens in flight, keys and values of all heads
//   HALF       float16; otherwise bfloat16
//
// The work is cut as kernels/paged_decode.py says, one slice a block. One warp loads, by two bulk copies a tile. Tokens are
// the rows of the products, query heads the columns: s = K q, out = V^T p, so that the few heads of a group fill a side.
// Behind a gate (kernels/launch.py) everything but q and the last token of a context was written before it, and is read
// before the kernel in front has ended: through L2, for nothing tells L1 of it.
// Symbols as in FlashAttention, Dao 2023: m running maximum, l running sum, acc running output.

constexpr int TILE = 16;
constexpr int RUNS = HEAD_DIM / 64;                    // of 64 elements, 128 bytes, of a head
constexpr int HEAD_BYTES = RUNS * TILE * 128;          // of one tile: runs of [TILE, 64] in 128-byte swizzle
constexpr int KEY_BYTES = HEADS * HEAD_BYTES, STAGE_BYTES = 2 * KEY_BYTES;
constexpr int STEPS = HEAD_DIM / 16;
constexpr int BLOCKS = HEADS < 8 ? 8 / HEADS : 1;      // a multiprocessor

struct Slices {
  const int* plan;
  int count;

  __device__ __forceinline__ int size() const { return __ldcg(plan); }
  __device__ __forceinline__ int num_live() const { return __ldcg(plan + 1); }
  __device__ __forceinline__ int sequence(int slice) const { return __ldcg(plan + 2 + slice); }
  __device__ __forceinline__ int tile(int slice) const { return __ldcg(plan + 2 + count + slice); }
  __device__ __forceinline__ int units_before(int sequence) const { return __ldcg(plan + 2 + 2 * count + sequence); }
};

// The tiles of one sequence that a slice has.
struct Segment {
  int sequence, length, skipped, tiles, first, take;

  __device__ __forceinline__ void find(const int* lengths, int which, int from, int left, int window) {
    sequence = which, first = from;
    length = __ldcg(lengths + sequence);
    skipped = window > 0 ? max(length - window, 0) / TILE : 0;
    tiles = max((length + TILE - 1) / TILE - skipped, 1);
    take = min(tiles - first, left);
  }
};

// Where in a head's tile of a stage the 8 elements are that begin at `element` of a token.
__device__ __forceinline__ u32 place(int token, int element) {
  return (element / 64 * TILE + token) * 128 + ((element % 64 / 8) ^ (token & 7)) * 16;
}

__device__ __forceinline__ float over_tokens(float value, bool largest) {  // of one column, over its 8 lanes
#pragma unroll
  for (int bit = 4; bit < 32; bit *= 2) {
    const float other = __shfl_xor_sync(~0u, value, bit);
    value = largest ? fmaxf(value, other) : value + other;
  }
  return value;
}

extern "C" __global__ void __launch_bounds__(32 * HEADS + 32, BLOCKS) decode(
    const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v, const half_bits* q,
    const int* tables, const int* lengths, const int* plan, u32* arrived, float4* partial, float* partial_ml,
    half_bits* out, int num_seqs, int num_slices, int start_tiles, int block_size, int window, int keep_empty,
    int behind_gate, float scale, long long stride_qb, long long stride_qh, long long stride_tb, long long stride_ob,
    long long stride_oh, u64 policy) {
  extern __shared__ char memory[];
  const u32 stages = (address_of(memory) + 1023) & ~1023u;
  const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
  const int lane = threadIdx.x % 32, head = __shfl_sync(~0u, threadIdx.x / 32, 0), slice = blockIdx.x;
  const Slices slices{plan, num_slices};

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, HEADS);
    }
    barrier_inits_fence();
  }
  __syncthreads();
  let_next_start();
  if (!behind_gate) wait_for_last();
  const int num_live = slices.num_live(), from_unit = slices.tile(slice);
  int sequence = slices.sequence(slice), first = max(from_unit, 0), left = slices.size() + min(from_unit, 0);
  Segment now;
  u32 stage = 0;

  if (head == HEADS) {
    u32 phase = 1;
    bool waits = behind_gate;
    for (; left > 0 && sequence < num_live; left -= now.take + start_tiles, sequence++, first = 0) {
      now.find(lengths, sequence, first, left, window);
      const int* table = tables + sequence * stride_tb;
      int block = 0;
      for (int i = 0; i < now.take; i++) {
        if (i % 32 == 0) {  // the next 32 tiles' blocks, one a lane
          const int token = (now.skipped + first + i + lane) * TILE;
          block = token < now.length ? __ldcg(table + token / block_size) : 0;
        }
        if (waits && i == now.tiles - 1 - first) {  // the last token is the kernel in front's
          wait_for_last();
          waits = false;
        }
        const int from = __shfl_sync(~0u, block, i % 32), token = (now.skipped + first + i) * TILE % block_size;
        if (one_lane()) {
          const u32 to = stages + stage * STAGE_BYTES, bar = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase);
          barrier_expect(bar, STAGE_BYTES);
          load_box(to, &map_k, bar, 0, token, 0, from, policy);
          load_box(to + KEY_BYTES, &map_v, bar, 0, token, 0, from, policy);
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    return;
  }

  // This thread's places: of products' rows (tokens; elements of the output) lane / 4 and that + 8, of columns (query heads)
  // two from `column`. Where ldmatrix takes a row from: of 4 matrices of 8 x 8, lane / 8 is the one.
  const int row = lane / 4, column = lane % 4 * 2, matrix = lane / 8, in_matrix = lane % 8;
  u32 phase = 0;
  for (bool begins = true; left > 0 && sequence < num_live;
       left -= now.take + start_tiles, sequence++, first = 0, begins = false) {
    now.find(lengths, sequence, first, left, window);
    wait_for_last();
    u32 queries[STEPS][2];
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        queries[i][j] = row < GROUP ? *(const u32*)(q + sequence * stride_qb + (head * GROUP + row) * stride_qh
                                                    + i * 16 + j * 8 + column)
                                    : 0;
    float m[2] = {minus_infinity(), minus_infinity()}, l[2] = {}, acc[STEPS][4] = {};
    for (int i = 0; i < now.take; i++) {
      const int token = (now.skipped + first + i) * TILE;
      const u32 keys = stages + stage * STAGE_BYTES + head * HEAD_BYTES, values = keys + KEY_BYTES;
      barrier_wait(full + 8 * stage, phase);
      float s[2][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        u32 a[4];
        load_matrices(a, keys + place(matrix % 2 * 8 + in_matrix, step * 16 + matrix / 2 * 8));
        multiply_add(s[step % 2], a, queries[step]);
      }
      const bool ends = token + TILE > now.length, edge = window > 0 && token < now.length - window;
      if (ends) {  // what lies behind the last token may be anything, even NaN
        for (int chunk = lane; chunk < RUNS * TILE * 8; chunk += 32)
          if (token + chunk / 8 % TILE >= now.length)
            *shared_pointer<uint4>(values + chunk * 16) = make_uint4(0, 0, 0, 0);
        stores_fence();
        __syncwarp();
      }
      float p[4], shift[2], decay[2];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int index = token + row + c / 2 * 8;
        const bool seen = index < now.length && (!edge || index >= now.length - window);
        p[c] = seen ? (s[0][c] + s[1][c]) * scale : minus_infinity();
      }
      bool changed = false;
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const float larger = fmaxf(m[c], over_tokens(fmaxf(p[c], p[c + 2]), true));
        changed |= larger != m[c];
        shift[c] = larger == minus_infinity() ? 0 : larger;
        decay[c] = power_of_two(m[c] - shift[c]);
        m[c] = larger;
      }
      if (__any_sync(~0u, changed)) {
#pragma unroll
        for (int c = 0; c < 2; c++) l[c] *= decay[c];
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
          for (int c = 0; c < 4; c++) acc[step][c] *= decay[c % 2];
      }
#pragma unroll
      for (int c = 0; c < 4; c++) {
        p[c] = power_of_two(p[c] - shift[c % 2]);
        l[c % 2] += p[c];
      }
      const u32 weights[2] = {transposed(pack(p[0], p[1])), transposed(pack(p[2], p[3]))};
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        u32 a[4];
        load_matrices_transposed(a, values + place(matrix / 2 * 8 + in_matrix, step * 16 + matrix % 2 * 8));
        multiply_add(acc[step], a, weights);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    l[0] = over_tokens(l[0], false), l[1] = over_tokens(l[1], false);

    if (now.take < now.tiles) {
      const int own = (slice * 2 + !begins) * HEADS + head;
#pragma unroll
      for (int step = 0; step < STEPS; step++)
        __stcg(partial + (own * STEPS + step) * 32 + lane,
               make_float4(acc[step][0], acc[step][1], acc[step][2], acc[step][3]));
      if (row == 0) __stcg((float4*)partial_ml + own * 4 + lane, make_float4(m[0], l[0], m[1], l[1]));
      __syncwarp();
      // Slices [from, to] hold this sequence; the last one to arrive merges them.
      const int begin = slices.units_before(sequence), from = begin / slices.size();
      const int to = (begin + now.tiles - 1) / slices.size();
      u32 before = 0;
      if (lane == 0) before = count_and_see(arrived + sequence * HEADS + head);
      before = __shfl_sync(~0u, before, 0);
      __syncwarp();
      if (before != to - from) continue;
      m[0] = m[1] = minus_infinity(), l[0] = l[1] = 0;
#pragma unroll
      for (int step = 0; step < STEPS; step++) acc[step][0] = acc[step][1] = acc[step][2] = acc[step][3] = 0;
      for (int eight = from; eight <= to; eight += 8) {  // at a time; of their m and l a lane has those of one slice
        const int other = min(eight + row, to);
        const bool second = other == from && slices.sequence(other) != sequence;
        const int theirs = (other * 2 + second) * HEADS + head;
        const float4 ml = __ldcg((const float4*)partial_ml + theirs * 4 + lane % 4);
        const bool exists = eight + row <= to;
        const float m_other[2] = {exists ? ml.x : minus_infinity(), exists ? ml.z : minus_infinity()};
        float old[2], add[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float larger = fmaxf(m[c], over_tokens(m_other[c], true));
          const float base = larger == minus_infinity() ? 0 : larger;
          old[c] = power_of_two(m[c] - base), add[c] = power_of_two(m_other[c] - base);
          l[c] = l[c] * old[c] + over_tokens((c ? ml.w : ml.y) * add[c], false);
          m[c] = larger;
        }
        int places[8];
        float weights[8][2];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          places[i] = __shfl_sync(~0u, theirs, 4 * i) * STEPS * 32 + lane;
          weights[i][0] = __shfl_sync(~0u, add[0], 4 * i + lane % 4);
          weights[i][1] = __shfl_sync(~0u, add[1], 4 * i + lane % 4);
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
          float4 four[8];
#pragma unroll
          for (int i = 0; i < 8; i++)
            four[i] = eight + i <= to ? __ldcg(partial + places[i] + step * 32) : make_float4(0, 0, 0, 0);
#pragma unroll
          for (int c = 0; c < 4; c++) acc[step][c] *= old[c % 2];
#pragma unroll
          for (int i = 0; i < 8; i++) {
            acc[step][0] += four[i].x * weights[i][0], acc[step][1] += four[i].y * weights[i][1];
            acc[step][2] += four[i].z * weights[i][0], acc[step][3] += four[i].w * weights[i][1];
          }
        }
      }
      if (lane == 0) atomicExch(arrived + sequence * HEADS + head, 0u);
    }
    if (keep_empty && now.length == 0) continue;
    const float share[2] = {1 / fmaxf(l[0], 1e-30f), 1 / fmaxf(l[1], 1e-30f)};
    half_bits* to = out + sequence * stride_ob + (head * GROUP + row) * stride_oh + column;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const u32 two = transposed(pack(acc[step][2 * half] * share[0], acc[step][2 * half + 1] * share[1]));
        if (row < GROUP) *(u32*)(to + step * 16 + half * 8) = two;
      }
  }
  wait_for_last();
  if (keep_empty) return;
  for (int padding = num_live + slice; padding < num_seqs; padding += num_slices)
#pragma unroll
    for (int i = 0; i < 2 * STEPS; i++)
      if (row < GROUP)
        *(u32*)(out + padding * stride_ob + (head * GROUP + row) * stride_oh + i * 8 + column) = 0;
}

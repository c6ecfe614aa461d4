// Decode attention over a paged K/V cache at the speed at which the cache is read: kernels/decode_hopper.py compiles and
// launches this, and prefixes macros and hopper.cu:
//
//   HEADS      key/value heads, a warp each; GROUP query heads (at most 8) attend with each of them
//   HEAD_DIM   64 or 128
//   STAGES     tiles of TILE tokens in flight, keys and values of all heads
//   HALF       float16; otherwise bfloat16
//   ROTARY     whether q and the last tokens' keys and values are as projected: they are rotated, and written to the cache,
//              here, by the block that has the last tile of a context
//
// The work is cut as kernels/paged_decode.py says, one slice a block. One warp loads a tile's keys and its values, each as
// the run of bytes that they are: boxes of 128 bytes came 5 % slower. In shared memory a head's rows then all begin in the
// same bank, where ldmatrix would read one at a time: lanes read 16 bytes each, so that not more than two meet, and have
// the elements of a product in the order in which they get them, which is free as long as both factors agree.
// Tokens are the rows of the products, query heads the columns: s = K q, out = V^T p, so that the few heads of a group
// fill a side.
// `written` says what was written before this could start (kernels/launch.py): BEHIND_GATE, everything but q and the last
// token of a context, which is read before the kernel in front has ended; BESIDE_PREFILL, these as well, so that the
// kernel in front is waited for at the end only. It is read through L2, for nothing tells L1 of it.
// Symbols as in FlashAttention, Dao 2023: m running maximum, l running sum, acc running output.

enum { BEHIND_GATE = 1, BESIDE_PREFILL };

constexpr int TILE = 16;
constexpr int TOKEN = HEADS * HEAD_DIM, TOKEN_BYTES = 2 * TOKEN;
constexpr int KEY_BYTES = TILE * TOKEN_BYTES, STAGE_BYTES = 2 * KEY_BYTES;
constexpr int STEPS = HEAD_DIM / 16;                   // of a product
constexpr int EIGHTS = HEAD_DIM / 64;                  // 16 bytes each, a thread has of a value's elements
constexpr int HALF_DIM = HEAD_DIM / 2, WORDS = HEAD_DIM / 64;  // of a head: what is rotated together; a lane's words
constexpr int BLOCKS = HEADS < 8 ? 8 / HEADS : 1;      // a multiprocessor

// Two elements of a head's first half and two of its second, rotated to a position: RoFormer, Su et al. 2021.
__device__ __forceinline__ void rotate(u32& low, u32& high, float2 cosines, float2 sines) {
  const float a[2] = {widen((half_bits)low), widen((half_bits)(low >> 16))};
  const float b[2] = {widen((half_bits)high), widen((half_bits)(high >> 16))};
  low = pack(a[0] * cosines.x - b[0] * sines.x, a[1] * cosines.y - b[1] * sines.y);
  high = pack(b[0] * cosines.x + a[0] * sines.x, b[1] * cosines.y + a[1] * sines.y);
}

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

__device__ __forceinline__ u32 word(const uint4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// Swap the two if so.
__device__ __forceinline__ void exchange(uint4& a, uint4& b, bool so) {
  const uint4 first = so ? b : a, second = so ? a : b;
  a = first, b = second;
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
    half_bits* k_cache, half_bits* v_cache, const half_bits* q, const half_bits* new_k, const half_bits* new_v,
    const float* cos_sin, const int* tables, const int* lengths,
    const int* plan, u32* arrived, float4* partial, float* partial_ml, half_bits* out, int num_seqs, int num_slices,
    int start_tiles, int block_size, int window, int keep_empty, int written, float scale, long long stride_qb,
    long long stride_qh, long long stride_new, long long stride_c, long long stride_kb, long long stride_vb, long long stride_tb, long long stride_ob,
    long long stride_oh, u64 policy) {
  extern __shared__ char memory[];
  const u32 stages = address_of(memory);
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
  if (written < BEHIND_GATE) wait_for_last();
  const int num_live = slices.num_live(), from_unit = slices.tile(slice);
  int sequence = slices.sequence(slice), first = max(from_unit, 0), left = slices.size() + min(from_unit, 0);
  Segment now;
  u32 stage = 0;

  if (head == HEADS) {
    u32 phase = 1;
    bool waits = written == BEHIND_GATE && !ROTARY;
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
        const long long from = __shfl_sync(~0u, block, i % 32);
        const int token = (now.skipped + first + i) * TILE, at = token % block_size * TOKEN;
        const u32 bytes = max(min(now.length - ROTARY - token, TILE), 0) * TOKEN_BYTES;
        if (one_lane()) {
          const u32 to = stages + stage * STAGE_BYTES, bar = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase);
          barrier_expect(bar, 2 * bytes);
          if (bytes > 0) {
            load_run(to, k_cache + from * stride_kb + at, bytes, bar, policy);
            load_run(to + KEY_BYTES, v_cache + from * stride_vb + at, bytes, bar, policy);
          }
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    return;
  }

  // This thread's places: of products' rows lane / 4 and that + 8, of columns (query heads) two from `column`, of what is
  // summed over two from `column` and two from `column` + 8. Of a key's and a query's elements those are its eights, which
  // lie 4 apart, two steps each; of a value's, rows of V^T, its two of step i are 2 i and the next of `own_values`.
  const int row = lane / 4, column = lane % 4 * 2, own_values = row * EIGHTS * 8;
  u32 phase = 0;
  for (bool begins = true; left > 0 && sequence < num_live;
       left -= now.take + start_tiles, sequence++, first = 0, begins = false) {
    now.find(lengths, sequence, first, left, window);
    if (written < BESIDE_PREFILL) wait_for_last();
    u32 queries[STEPS][2];
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        queries[i][j] = row < GROUP ? __ldcg((const u32*)(q + sequence * stride_qb + (head * GROUP + row) * stride_qh
                                                          + i / 2 * 32 + lane % 4 * 8 + i % 2 * 4 + j * 2))
                                    : 0;
#if ROTARY
    const int last = max(now.length - 1, 0), block = last / block_size;
    const float2* cosines = (const float2*)(cos_sin + last * stride_c);
    const bool has_last = first + now.take == now.tiles && now.length > 0;
#pragma unroll
    for (int i = 0; i < STEPS / 2; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int at = i / 2 * 16 + lane % 4 * 4 + i % 2 * 2 + j;
        rotate(queries[i][j], queries[i + STEPS / 2][j], cosines[at], cosines[HALF_DIM / 2 + at]);
      }
    u32 key[WORDS], value[WORDS];  // of the last token: this lane's, of each half
    if (has_last) {
      const long long from = sequence * stride_new + head * HEAD_DIM;
      const long long in_block = last % block_size * TOKEN + head * HEAD_DIM;
      const long long to = __ldcg(tables + sequence * stride_tb + block);
      u32* keys_to = (u32*)(k_cache + to * stride_kb + in_block);
      u32* values_to = (u32*)(v_cache + to * stride_vb + in_block);
      const u32 *keys_from = (const u32*)(new_k + from), *values_from = (const u32*)(new_v + from);
      if (WORDS == 2) {
        key[0] = __ldcg(keys_from + lane), key[WORDS - 1] = __ldcg(keys_from + 32 + lane);
        rotate(key[0], key[WORDS - 1], cosines[lane], cosines[HALF_DIM / 2 + lane]);
      } else {  // half of the lanes have words of the first half, the others the words that go with them
        const u32 mine = __ldcg(keys_from + lane), other = __shfl_xor_sync(~0u, mine, 16);
        u32 low = lane < 16 ? mine : other, high = lane < 16 ? other : mine;
        rotate(low, high, cosines[lane % 16], cosines[HALF_DIM / 2 + lane % 16]);
        key[0] = lane < 16 ? low : high;
      }
#pragma unroll
      for (int i = 0; i < WORDS; i++) {
        value[i] = __ldcg(values_from + 32 * i + lane);
        keys_to[32 * i + lane] = key[i], values_to[32 * i + lane] = value[i];
      }
    }
#endif
    float m[2] = {minus_infinity(), minus_infinity()}, l[2] = {}, acc[STEPS][4] = {};
    for (int i = 0; i < now.take; i++) {
      const int token = (now.skipped + first + i) * TILE;
      const u32 keys = stages + stage * STAGE_BYTES + head * HEAD_DIM * 2, values = keys + KEY_BYTES;
      barrier_wait(full + 8 * stage, phase);
#if ROTARY
      if (has_last && i == now.take - 1) {
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
          const u32 place = (last - token) * TOKEN_BYTES + (32 * j + lane) * 4;
          *shared_pointer<u32>(keys + place) = key[j], *shared_pointer<u32>(values + place) = value[j];
        }
        stores_fence();
        __syncwarp();
      }
#endif
      float s[2][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; step += 4) {
        uint4 eights[2][2];  // of this row and that + 8; neighbouring rows take the two in opposite order
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int i = 0; i < 2; i++)
            eights[half][i] = load_words(keys + (row + 8 * half) * TOKEN_BYTES
                                         + (step * 2 + (i ^ row % 2) * 4 + lane % 4) * 16);
#pragma unroll
        for (int half = 0; half < 2; half++) exchange(eights[half][0], eights[half][1], row % 2);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const uint4 upper = eights[0][i], lower = eights[1][i];
          const u32 a[2][4] = {{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}};
          multiply_add(s[0], a[0], queries[step + 2 * i]);
          multiply_add(s[1], a[1], queries[step + 2 * i + 1]);
        }
      }
      const bool ends = token + TILE > now.length, edge = window > 0 && token < now.length - window;
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
      uint4 eights[4][EIGHTS];  // of tokens `column`, the next, and these + 8
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int of = column + i % 2 + i / 2 * 8;
#pragma unroll
        for (int j = 0; j < EIGHTS; j++)
          eights[i][j] = load_words(values + of * TOKEN_BYTES + own_values * 2 + (j ^ lane % EIGHTS) * 16);
        if (EIGHTS == 2) exchange(eights[i][0], eights[i][EIGHTS - 1], lane % 2);
        if (ends && token + of >= now.length)  // what lies behind the last token may be anything, even NaN
#pragma unroll
          for (int j = 0; j < EIGHTS; j++) eights[i][j] = make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        u32 two[4];
#pragma unroll
        for (int i = 0; i < 4; i++) two[i] = word(eights[i][step / 4], step % 4);
        const u32 a[4] = {lower_halves(two[0], two[1]), upper_halves(two[0], two[1]), lower_halves(two[2], two[3]),
                          upper_halves(two[2], two[3])};
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
        if (column < GROUP)
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
            four[i] = eight + i <= to && column < GROUP ? __ldcg(partial + places[i] + step * 32)
                                                        : make_float4(0, 0, 0, 0);
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
#pragma unroll
    for (int c = 0; c < 2; c++) {
      half_bits* to = out + sequence * stride_ob + (head * GROUP + column + c) * stride_oh + own_values;
#pragma unroll
      for (int step = 0; step < STEPS; step++)
        if (column + c < GROUP) *(u32*)(to + 2 * step) = pack(acc[step][c] * share[c], acc[step][c + 2] * share[c]);
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

// Prefill attention over a paged K/V cache on Hopper's matrix units: kernels/prefill_hopper.py compiles and launches
// this, with macros, wgmma() for tiles of K, wgmma_values() for tiles of V and hopper.cu in front:
//
//   D       head size, 64 or 128
//   KEYS    keys of a tile
//   BLOCK   tokens of a cache block; KEYS is a multiple of it
//   Q_STAGES, K_STAGES, V_STAGES  pieces' queries, and tiles of K and V, in flight
//   WINDOW  whether there is a sliding window
//   HALF    float16; otherwise bfloat16
//
// A piece of work is ROWS queries of one sequence and head. Its tiles of keys are taken from the last to the first. One
// warp loads (a bulk tensor copy a cache block and 64 columns, completing on mbarriers); two warpgroups of 64 rows each
// multiply. While a warpgroup's softmax of one tile is under way the matrix units have its product of the tile before
// with V, and the other warpgroup's products. As in FlashAttention-3, Shah et al. 2024, but for the turns that
// warpgroups take there.
// Symbols: s scores, p probabilities, m running maximum (in powers of two), l running sum, o running output.

constexpr int GROUPS = 2, CONSUMERS = 128 * GROUPS, ROWS = 64 * GROUPS;
constexpr int PANELS = D / 64;  // tiles lie in shared memory in panels of 64 columns: 128 bytes, the swizzle's width
constexpr int Q_PANEL = ROWS * 128, PANEL = KEYS * 128;
constexpr int Q_BYTES = PANELS * Q_PANEL, TILE_BYTES = PANELS * PANEL;
constexpr int BLOCKS = KEYS / BLOCK;  // cache blocks of a tile, a lane each
constexpr float NOTHING = -1e30f;     // the maximum before the first key: finite, so that differences are numbers
constexpr float SLACK = 8.0f;         // m may lag by this: p stays under 2^SLACK, and o is seldom rescaled
constexpr int GROUP = 1;              // the first of the named barriers, one a warpgroup

// In shared memory, from its first multiple of 1,024 on.
constexpr u32 Q_AT = 0, K_AT = Q_AT + Q_STAGES * Q_BYTES, V_AT = K_AT + K_STAGES * TILE_BYTES;
constexpr u32 PIECE_AT = V_AT + V_STAGES * TILE_BYTES, Q_FULL = PIECE_AT + 32 * Q_STAGES;  // a piece is two int4
constexpr u32 Q_EMPTY = Q_FULL + 8 * Q_STAGES, K_FULL = Q_EMPTY + 8 * Q_STAGES, K_EMPTY = K_FULL + 8 * K_STAGES;
constexpr u32 V_FULL = K_EMPTY + 8 * K_STAGES, V_EMPTY = V_FULL + 8 * V_STAGES;

// V as what a product sums over the rows of: in 128-byte swizzle 8 rows are 1,024 bytes, 64 columns a panel.
__device__ __forceinline__ u64 values_descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)(PANEL >> 4) << 16) | (64ull << 32) | (1ull << 62);
}

// A ring of stages: where in it a warp is, and the parity that it waits with there. FULL, EMPTY: its barriers.
template <int STAGES, u32 FULL, u32 EMPTY> struct Ring {
  u32 at, phase, slot;

  __device__ __forceinline__ u32 full() const { return at + FULL + 8 * slot; }
  __device__ __forceinline__ u32 empty() const { return at + EMPTY + 8 * slot; }
  __device__ __forceinline__ void advance() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
  __device__ __forceinline__ void make() const {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(at + FULL + 8 * i, 1);
      barrier_init(at + EMPTY + 8 * i, 4 * GROUPS);
    }
  }
};

// The pieces in order, of which each block takes a growing sequence: sequence after sequence, in each the last rows
// first, of all heads. A warp looks for one together.
struct Schedule {
  const int* cu_seqlens_q;
  int num_seqs, heads;
  int base, passed;  // every 32nd sequence; pieces of the sequences before it
  int seq, tile, head, start, num_new;

  __device__ __forceinline__ bool find(int piece) {
    const int lane = threadIdx.x % 32;
    for (; base < num_seqs; base += 32) {
      int row = 0, count = 0;
      if (base + lane < num_seqs) {
        row = cu_seqlens_q[base + lane];
        count = cu_seqlens_q[base + lane + 1] - row;
      }
      const int tiles = (count + ROWS - 1) / ROWS;
      int end = tiles;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(~0u, end, step);
        if (lane >= step) end += before;
      }
      const u32 after = __ballot_sync(~0u, piece - passed < end * heads);
      if (after) {
        const int owner = __ffs(after) - 1;
        const int rank = piece - passed - __shfl_sync(~0u, end - tiles, owner) * heads;
        seq = base + owner, head = rank % heads;
        tile = __shfl_sync(~0u, tiles, owner) - 1 - rank / heads;
        start = __shfl_sync(~0u, row, owner), num_new = __shfl_sync(~0u, count, owner);
        return true;
      }
      passed += __shfl_sync(~0u, end, 31) * heads;
    }
    return false;  // `passed` is how many there are
  }
};

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1) attend(
    const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
    const __grid_constant__ TensorMap map_v, half_bits* out, const int* tables, const int* context_lens,
    const int* cu_seqlens_q, int* taken, int num_rows, int num_seqs, int heads, int group_heads, int table_stride,
    int cache_rows, float scale, int window, int beside_decodes, u64 policy) {
  extern __shared__ char memory[];
  const u32 at = (address_of(memory) + 1023) & ~1023u;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform, or setmaxnreg is ignored
  const int lane = threadIdx.x % 32;
  // Who fills the stages need not wait the first time around: a barrier's phase before its first has parity 1.
  const u32 parity = group == GROUPS;
  Ring<Q_STAGES, Q_FULL, Q_EMPTY> q{at, parity, 0};
  Ring<K_STAGES, K_FULL, K_EMPTY> k{at, parity, 0};
  Ring<V_STAGES, V_FULL, V_EMPTY> v{at, parity, 0};

  if (threadIdx.x == 0) {
    q.make(), k.make(), v.make();
    barrier_inits_fence();
  }
  __syncthreads();
  if (!beside_decodes) let_next_start();
  wait_for_last();
  if (beside_decodes) let_next_start();  // all that they read has been written now

  if (group == GROUPS) {
    leave_registers<40>();
    if (threadIdx.x < CONSUMERS + 32) {
      Schedule work{cu_seqlens_q, num_seqs, heads, 0, 0};
      int column = 0;
      // A tile of K or V; each lane knows where in the cache a block of it begins, and one loads them all.
      auto load = [&](const TensorMap& map, u32 tiles, auto& ring, int row) {
        barrier_wait(ring.empty(), ring.phase);
        int rows[BLOCKS];
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) rows[i] = __shfl_sync(~0u, row, i);
        if (one_lane()) {
          const u32 to = at + tiles + ring.slot * TILE_BYTES;
          barrier_expect(ring.full(), TILE_BYTES);
#pragma unroll
          for (int i = 0; i < BLOCKS; i++)
#pragma unroll
            for (int panel = 0; panel < PANELS; panel++)
              load_tile(to + panel * PANEL + i * (BLOCK * 128), &map, ring.full(), column + 64 * panel, rows[i],
                        policy);
        }
        __syncwarp();
        ring.advance();
      };
      int piece = blockIdx.x;
      while (work.find(piece)) {
        int next = 0;
        if (lane == 0) next = atomicAdd(taken, 1);
        const int context = context_lens[work.seq], row = work.tile * ROWS;
        const int position = context - work.num_new + row;  // of the piece's first row
        const int first = (min(position + ROWS, context) - 1) / KEYS;
        const int last = WINDOW ? max(position - window + 1, 0) / KEYS : 0;
        const int* table = tables + (long long)work.seq * table_stride;
        const int num_blocks = (context + BLOCK - 1) / BLOCK;
        auto row_of = [&](int n) {  // blocks past the context are loaded from past the cache: zeros
          const int index = n * BLOCKS + lane;
          return lane < BLOCKS && index < num_blocks ? table[index] * BLOCK : cache_rows;
        };
        column = work.head / group_heads * D;
        int v_row = row_of(first);
        barrier_wait(q.empty(), q.phase);
        if (one_lane()) {
          int4* to = shared_pointer<int4>(at + PIECE_AT + 32 * q.slot);
          to[0] = make_int4(work.start + row, work.num_new - row, work.head, position);
          to[1] = make_int4(first, last, context, 0);
          barrier_expect(q.full(), Q_BYTES);
#pragma unroll
          for (int panel = 0; panel < PANELS; panel++)
            load_tile(at + Q_AT + q.slot * Q_BYTES + panel * Q_PANEL, &map_q, q.full(), work.head * D + 64 * panel,
                      work.start + row, policy);
        }
        __syncwarp();
        q.advance();
        load(map_k, K_AT, k, v_row);
        for (int n = first - 1; n >= last; n--) {
          const int k_row = row_of(n);
          load(map_k, K_AT, k, k_row);
          load(map_v, V_AT, v, v_row);
          v_row = k_row;
        }
        load(map_v, V_AT, v, v_row);
        piece = gridDim.x + __shfl_sync(~0u, next, 0);
      }
      // As many take a piece, or find none, as there are pieces: the last of them sets the counter back.
      if (lane == 0 && piece - (int)gridDim.x == work.passed - 1) *taken = 0;
      barrier_wait(q.empty(), q.phase);
      if (lane == 0) {
        *shared_pointer<int4>(at + PIECE_AT + 32 * q.slot) = make_int4(0, 0, 0, 0);
        barrier_arrive(q.full());
      }
    }
  } else {
    take_registers<232>();
    const int quad = lane % 4, row = threadIdx.x / 32 * 16 + lane / 4;  // of the piece; and row + 8

    // Rows that are no sequence's, and not the decodes'.
    const int begin = beside_decodes ? 0 : cu_seqlens_q[0], gap = cu_seqlens_q[num_seqs] - begin;
    const int row_uint4s = heads * D / 8;
    for (long long i = blockIdx.x * CONSUMERS + threadIdx.x; i < (long long)(num_rows - gap) * row_uint4s;
         i += gridDim.x * CONSUMERS)
      ((uint4*)out)[i < (long long)begin * row_uint4s ? i : i + (long long)gap * row_uint4s] = make_uint4(0, 0, 0, 0);

    float s[KEYS / 2], o[D / 2], m[2], l[2];
    u32 p[KEYS / 4];
    auto release = [&](u32 bar) {
      if (lane == 0) barrier_arrive(bar);
    };
    auto begin_scores = [&]() {
      const u64 a = matrix_descriptor(at + Q_AT + q.slot * Q_BYTES + group * (64 * 128));
      const u64 b = matrix_descriptor(at + K_AT + k.slot * TILE_BYTES);
      hold(s);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < D / 16; i++)
        wgmma(s, a + i / 4 * (Q_PANEL / 16) + i % 4 * 2, b + i / 4 * (PANEL / 16) + i % 4 * 2, i > 0);
      wgmma_commit();
    };
    auto begin_values = [&]() {
      const u64 b = values_descriptor(at + V_AT + v.slot * TILE_BYTES);
      hold(o), hold(p);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < KEYS / 16; i++) wgmma_values(o, p + 4 * i, b + i * (16 * 128 / 16));
      wgmma_commit();
    };

    for (;; q.advance()) {
      barrier_wait(q.full(), q.phase);
      const int4* piece = shared_pointer<int4>(at + PIECE_AT + 32 * q.slot);
      const int4 where = piece[0], keys = piece[1];
      const int rows = where.y, first = keys.x, last = keys.y, context = keys.z;
      if (rows == 0) break;
      if (rows <= group * 64) {  // none for this group: its part in the others' waiting is all that it has
        for (int n = first; n >= last; n--) {
          barrier_wait(k.full(), k.phase);
          release(k.empty());
          k.advance();
          barrier_wait(v.full(), v.phase);
          release(v.empty());
          v.advance();
        }
        release(q.empty());
        continue;
      }
      const int position = where.w + row, low = where.w + group * 64;  // of this thread's and the group's first row

      // Folds the scores of tile n into m and l: s becomes p, and what is summed up so far is to be scaled by `decay`.
      float decay[2];
      auto soften = [&](int n) {
        const bool edge = WINDOW && n * KEYS <= low + 63 - window;
        if ((n + 1) * KEYS - 1 > low || edge) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int seen = position + 8 * h - n * KEYS - 2 * quad;
#pragma unroll
            for (int e = 0; e < KEYS / 8; e++)
#pragma unroll
              for (int c = 0; c < 2; c++)
                if (8 * e + c > seen || (WINDOW && 8 * e + c <= seen - window))
                  s[4 * e + 2 * h + c] = __uint_as_float(0xFF800000);  // -infinity
          }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float top = s[2 * h], other = s[2 * h + 1];
#pragma unroll
          for (int e = 1; e < KEYS / 8; e++)
            top = fmaxf(top, s[4 * e + 2 * h]), other = fmaxf(other, s[4 * e + 2 * h + 1]);
          top = fmaxf(top, other);
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale;
          const float now = top > m[h] + SLACK ? top : m[h];
          decay[h] = power_of_two(m[h] - now);
          m[h] = now;
          l[h] *= decay[h];
        }
#pragma unroll
        for (int e = 0; e < KEYS / 8; e++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float* x = s + 4 * e + 2 * h;
            x[0] = power_of_two(x[0] * scale - m[h]), x[1] = power_of_two(x[1] * scale - m[h]);
            l[h] += x[0] + x[1];
          }
      };
      auto take_over = [&]() {  // once o's last product is done
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
        if (__any_sync(~0u, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
          for (int i = 0; i < D / 2; i++) o[i] *= decay[i / 2 % 2];
        }
      };

#pragma unroll
      for (int i = 0; i < D / 2; i++) o[i] = 0.0f;
      m[0] = m[1] = NOTHING, l[0] = l[1] = 0.0f;

      barrier_wait(k.full(), k.phase);
      begin_scores();
      wgmma_wait<0>();
      hold(s);
      release(k.empty());
      if (first == last) release(q.empty());
      k.advance();
      soften(first);
      take_over();
      barrier_wait(v.full(), v.phase);
      // Rows past the context may hold anything, and 0 times that need not be 0. Each group clears them for itself.
      if ((first + 1) * KEYS > context) {
        const u32 from = at + V_AT + v.slot * TILE_BYTES + (context - first * KEYS) * 128;
        const int count = ((first + 1) * KEYS - context) * 8;
        for (int i = threadIdx.x % 128; i < count; i += 128)
#pragma unroll
          for (int panel = 0; panel < PANELS; panel++)
            *shared_pointer<int4>(from + panel * PANEL + 16 * i) = make_int4(0, 0, 0, 0);
        stores_fence();
        named_sync(GROUP + group, 128);
      }
      for (int n = first - 1; n >= last; n--) {
        barrier_wait(k.full(), k.phase);
        begin_scores();
        begin_values();
        wgmma_wait<1>();
        hold(s);
        release(k.empty());
        if (n == last) release(q.empty());
        k.advance();
        soften(n);
        hold(s);
        // The next V is waited for here so that there is a branch between the softmax and the end of the product that
        // it is to overlap: the assembler would move that up.
        const u32 used = v.empty();
        v.advance();
        barrier_wait(v.full(), v.phase);
        wgmma_wait<0>();
        hold(o), hold(p);
        release(used);
        take_over();
      }
      begin_values();
      wgmma_wait<0>();
      hold(o);
      release(v.empty());
      v.advance();

#pragma unroll
      for (int h = 0; h < 2; h++) {
        l[h] += __shfl_xor_sync(~0u, l[h], 1);
        l[h] += __shfl_xor_sync(~0u, l[h], 2);
        const float share = 1.0f / l[h];
        half_bits* to = out + ((long long)(where.x + row + 8 * h) * heads + where.z) * D;
#pragma unroll
        for (int e = 0; e < D / 8; e += 4) {  // four lanes turn 4 runs of 8 columns so that each stores a whole one
          u32 w[4];
#pragma unroll
          for (int i = 0; i < 4; i++) w[i] = pack(o[4 * (e + i) + 2 * h] * share, o[4 * (e + i) + 2 * h + 1] * share);
          turn_runs(w);
          if (row + 8 * h < rows) *(uint4*)(to + 8 * (e + quad)) = make_uint4(w[0], w[1], w[2], w[3]);
        }
      }
    }
  }
}

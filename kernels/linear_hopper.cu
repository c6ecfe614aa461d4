// x [rows, K] times weight [columns, K] transposed on Hopper's matrix units: kernels/linear_hopper.py compiles and
// launches this, and prefixes macros and wgmma() for its tile:
//
//   GROUPS   consumer warpgroups (at most 3); each owns 64 rows of the block's tile of ROWS = 64 * GROUPS
//   WIDTH    columns of a block's tile: weight rows, of which with GATED the first half are gate's, the second up's
//   PARTS    wgmma() multiplies WIDTH / PARTS columns; as many calls a step of 16 along K
//   STAGES   tiles of x and weight in flight
//   CM, CN   a cluster is CM * CN blocks, side by side along the rows and the columns: blocks of one row of the cluster
//            share a tile of x, those of one column a tile of the weight; each loads its part for all of them
//   HALF     float16; otherwise bfloat16
//   NORMED   x was multiplied by an RMSNorm's weight, but not by its scale: rows of the result are, from the sums of squares
//            of which the columns' owners left a part each in `square_sums` [parts, rows]
//   NORMS    the result, the new residual stream, is left so for the next product: times the norm's weight in `normed`, and
//            the sums of squares of this block's columns
//   SPLITS   1, 2 or 4 parts of K
//
// One warp loads (bulk tensor copies that complete on mbarriers), the warpgroups multiply. With 2 or 4 splits the K range
// of a tile is cut; each split then adds up its share of the tile's columns from what the others left in `partial`, in
// a fixed order. The grid may be smaller than the number of tiles: clusters take them in turn.

constexpr int ROWS = 64 * GROUPS;
constexpr int DEPTH = 64;  // of K a stage: 128 bytes, the swizzle's width
constexpr int X_BYTES = ROWS * DEPTH * 2, W_BYTES = WIDTH * DEPTH * 2, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int CLUSTER = CM * CN;
constexpr int SHARERS = CM + CN - 1;  // blocks that load into, or from, a block's stages
constexpr int CONSUMERS = 128 * GROUPS;
constexpr int OUT_WIDTH = GATED ? WIDTH / 2 : WIDTH;
constexpr int EIGHTS = OUT_WIDTH / 8;  // runs of 8 columns, of which a thread holds 2 in 2 rows

template <int N> struct Constant { static constexpr int value = N; };

__device__ __forceinline__ void consumers_sync() { named_sync(1, CONSUMERS); }

// The pieces of work, each one tile of a cluster for one split of K; of one tile the splits are neighbours, then the
// tiles of up to 8 cluster rows with the same columns, so that what runs at one time shares its loads in L2.
struct Work {
  int tiles_m, tiles_n, steps;
  int m, n, split, first, last;

  __device__ __forceinline__ int count() const { return tiles_m * tiles_n * SPLITS; }

  __device__ __forceinline__ void go(int item) {
    split = item % SPLITS;
    int tile = item / SPLITS, band = 8 * tiles_n, row = tile / band * 8, in_band = tile % band;
    int rows = min(8, tiles_m - row);
    m = row + in_band % rows;
    n = in_band / rows;
    first = steps * split / SPLITS;
    last = steps * (split + 1) / SPLITS;
  }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(CONSUMERS + 128, 1) product(
    const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w, half_bits* out,
    const half_bits* bias, const half_bits* residual, float4* partial, u32* arrived, long long stride_out,
    long long stride_residual, int rows, int columns, int steps, int tiles_m, int tiles_n,
    u64 policy_x, u64 policy_w, const float* square_sums, int parts, int size, float eps, const half_bits* next_norm,
    half_bits* normed, float* next_square_sums, int gate) {
  extern __shared__ char memory[];
  const u32 stages = (address_of(memory) + 1023) & ~1023u;
  const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
  const u32 scales = empty + 8 * STAGES;  // of the tile's rows
  const u32 rank = cluster_rank();
  const int block_m = CN == 1 ? rank : rank / CN, block_n = CN == 1 ? 0 : rank % CN;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform, or setmaxnreg is ignored

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4 * GROUPS * SHARERS);
    }
    barrier_inits_fence();
  }
  cluster_sync();
  if (!gate) let_next_start();

  Work work{tiles_m, tiles_n, steps};
  const int first_item = blockIdx.x / CLUSTER, num_clusters = gridDim.x / CLUSTER;

  if (group == GROUPS) {
    if (GROUPS == 3) leave_registers<32>();
    if (NORMED && threadIdx.x >= CONSUMERS + 32) {
      wait_for_last();
      for (int item = first_item; item < work.count(); item += num_clusters) {
        work.go(item);
        for (int i = threadIdx.x - CONSUMERS - 32; i < ROWS; i += 96) {
          const int row = (work.m * CM + block_m) * ROWS + i;
          float sum = 0;
          for (int part = 0; row < rows && part < parts; part++) sum += __ldcg(square_sums + part * rows + row);
          store_shared(scales + 4 * i, rsqrtf(sum / size + eps));
        }
        named_sync(2, CONSUMERS + 96);  // they are there
        named_sync(3, CONSUMERS + 96);  // they are read
      }
    } else if (threadIdx.x < CONSUMERS + 32 && one_lane()) {
      auto load_x = [&](u32 slot, int step) {
        const u32 to = stages + slot * STAGE_BYTES, bar = full + 8 * slot;
        const int row = (work.m * CM + block_m) * ROWS;
        if (CN == 1) {
          load_tile(to, &map_x, bar, step * DEPTH, row, policy_x);
        } else {
          const int part = block_n;
          load_tile_for(to + part * (X_BYTES / 2), &map_x, bar, step * DEPTH, row + part * (ROWS / 2), policy_x,
                        ((1 << CN) - 1) << (block_m * CN));
        }
      };
      auto load_w = [&](u32 slot, int step) {
        const u32 to = stages + slot * STAGE_BYTES + X_BYTES, bar = full + 8 * slot;
        const int column = (work.n * CN + block_n) * OUT_WIDTH, second = GATED ? columns : WIDTH / 2;
        if (CM == 1) {
          load_tile(to, &map_w, bar, step * DEPTH, column, policy_w);
          if (GATED) load_tile(to + W_BYTES / 2, &map_w, bar, step * DEPTH, column + second, policy_w);
        } else {
          const int part = block_m;
          load_tile_for(to + part * (W_BYTES / 2), &map_w, bar, step * DEPTH, column + part * second, policy_w,
                        (CN == 1 ? 3 : 5) << block_n);
        }
      };
      u32 slot = 0, phase = 1;
      int ahead = 0;  // steps of the first item whose weights are under way
      if (first_item < work.count()) {
        work.go(first_item);
        ahead = min(STAGES, work.last - work.first);
        for (int i = 0; i < ahead; i++) {
          barrier_expect(full + 8 * i, STAGE_BYTES);
          load_w(i, work.first + i);
        }
      }
      wait_for_last();
      if (gate) let_next_start();
      for (int item = first_item; item < work.count(); item += num_clusters) {
        work.go(item);
        for (int step = work.first; step < work.last; step++) {
          if (ahead > 0) {
            ahead--;
          } else {
            barrier_wait(empty + 8 * slot, phase);
            barrier_expect(full + 8 * slot, STAGE_BYTES);
            load_w(slot, step);
          }
          load_x(slot, step);
          if (++slot == STAGES) slot = 0, phase ^= 1;
        }
      }
    }
    __syncwarp();
    cluster_sync();  // none leaves while another may still arrive at its barriers
  } else {
    if (GROUPS == 3) take_registers<160>();
    const int lane = threadIdx.x % 32, quad = lane % 4;
    wait_for_last();
    float acc[WIDTH / 2];
    u32 slot = 0, phase = 0;
    // The block of the cluster that this lane tells that a stage is free: those of its row, then the rest of its column.
    const u32 sharer = lane < CN ? block_m * CN + lane
                                 : (lane - CN < block_m ? lane - CN : lane - CN + 1) * CN + block_n;
    auto release = [&](u32 which) {
      if (lane < SHARERS) barrier_arrive_at(empty + 8 * which, sharer);
    };
    for (int item = first_item; item < work.count(); item += num_clusters) {
      work.go(item);
      const int row0 = (work.m * CM + block_m) * ROWS + group * 64;
      const bool active = row0 < rows;
      u32 before = 0;
      for (int step = work.first; step < work.last; step++) {
        barrier_wait(full + 8 * slot, phase);
        if (active) {
          const u64 x = matrix_descriptor(stages + slot * STAGE_BYTES + group * (64 * DEPTH * 2));
          const u64 w = matrix_descriptor(stages + slot * STAGE_BYTES + X_BYTES);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < DEPTH / 16; k++) {
            wgmma(acc, x + 2 * k, w + 2 * k, step > work.first || k > 0);
            if (PARTS == 2)
              wgmma(acc + WIDTH / 4, x + 2 * k, w + 2 * k + W_BYTES / 32, step > work.first || k > 0);
          }
          wgmma_commit();
          if (step > work.first) {
            wgmma_wait<1>();
            release(before);
          }
        } else if (step > work.first) {
          release(before);
        }
        before = slot;
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
      wgmma_wait<0>();
      release(before);

      const int row = row0 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // and row + 8
      const int column0 = (work.n * CN + block_n) * OUT_WIDTH;
      if (NORMED) {
        named_sync(2, CONSUMERS + 96);
        const u32 mine = scales + (threadIdx.x / 32 * 16 + lane / 4) * 4;
        const float scale[2] = {*shared_pointer<float>(mine), *shared_pointer<float>(mine + 32)};
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) acc[i] *= scale[i / 2 % 2];
        named_sync(3, CONSUMERS + 96);
      }

      // Add what comes after the product to runs [begin, end) of 8 columns, and store them.
      auto finish = [&](int begin, int end) {
        if (!GATED && bias != nullptr) {
#pragma unroll
          for (int e = begin; e < end; e++) {
            const int column = column0 + 8 * e + 2 * quad;
            const u32 two = column < columns ? *(const u32*)(bias + column) : 0;
            const float low = widen((half_bits)two), high = widen((half_bits)(two >> 16));
            acc[4 * e] += low, acc[4 * e + 1] += high, acc[4 * e + 2] += low, acc[4 * e + 3] += high;
          }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const bool in_rows = row + 8 * h < rows;
          if (!GATED && residual != nullptr && in_rows) {
            const half_bits* from = residual + (row + 8 * h) * stride_residual;
#pragma unroll
            for (int e = begin; e < end; e++) {
              const int column = column0 + 8 * e + 2 * quad;
              const u32 two = column < columns ? *(const u32*)(from + column) : 0;
              acc[4 * e + 2 * h] += widen((half_bits)two), acc[4 * e + 2 * h + 1] += widen((half_bits)(two >> 16));
            }
          }
          auto value = [&](int e) -> u32 {  // columns 2 * quad and the next of run e
            const float a = acc[4 * e + 2 * h], b = acc[4 * e + 2 * h + 1];
            if (!GATED) return pack(a, b);
            return pack(silu(a) * acc[WIDTH / 4 + 4 * e + 2 * h], silu(b) * acc[WIDTH / 4 + 4 * e + 2 * h + 1]);
          };
          auto store = [&](half_bits* to, auto value) {
#pragma unroll
            for (int e = begin; e + 4 <= end; e += 4) {  // four lanes turn 4 runs so that each stores one of them whole
              u32 w[4] = {value(e), value(e + 1), value(e + 2), value(e + 3)};
              turn_runs(w);
              const int column = column0 + 8 * (e + quad);
              if (in_rows && column < columns) *(uint4*)(to + column) = make_uint4(w[0], w[1], w[2], w[3]);
            }
#pragma unroll
            for (int e = end - (end - begin) % 4; e < end; e++) {
              const int column = column0 + 8 * e + 2 * quad;
              if (in_rows && column < columns) *(u32*)(to + column) = value(e);
            }
          };
          store(out + (row + 8 * h) * stride_out, value);
          if (NORMS) {
            float sum = 0;
            store(normed + (row + 8 * h) * (long long)columns, [&](int e) -> u32 {
              const int column = column0 + 8 * e + 2 * quad;
              if (column >= columns) return 0;
              const u32 two = value(e), scale = __ldg((const u32*)(next_norm + column));
              const float low = widen((half_bits)two), high = widen((half_bits)(two >> 16));
              sum += low * low + high * high;
              return pack(low * widen((half_bits)scale), high * widen((half_bits)(scale >> 16)));
            });
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const int part = (work.n * CN + block_n) * SPLITS + work.split;
            if (quad == 0 && in_rows) next_square_sums[part * rows + row + 8 * h] = sum;
          }
        }
      };

#if SPLITS == 1
      if (active) finish(0, EIGHTS);
#else
      // partial: [tile, split, run, thread] of four floats. Split s owns the s-th of the tile's equal parts of runs.
      const int tile = (work.m * CM + block_m) * tiles_n * CN + work.n * CN + block_n;
      float4* mine = partial + ((long long)tile * SPLITS + work.split) * (EIGHTS * CONSUMERS) + threadIdx.x;
      if (active) {
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
          if (e * SPLITS / EIGHTS != work.split)
            __stcg(mine + e * CONSUMERS, make_float4(acc[4 * e], acc[4 * e + 1], acc[4 * e + 2], acc[4 * e + 3]));
      }
      consumers_sync();
      if (threadIdx.x == 0) {
        count_arrival(arrived + tile);
        while (arrivals(arrived + tile) < SPLITS) {}
      }
      consumers_sync();
      auto add_up = [&](auto which) {
        constexpr int SPLIT = decltype(which)::value, PART = EIGHTS / SPLITS;
        float4 theirs[SPLITS - 1][PART];
#pragma unroll
        for (int other = 1; other < SPLITS; other++) {
          const float4* from = mine + ((SPLIT + other) % SPLITS - SPLIT) * (EIGHTS * CONSUMERS);
#pragma unroll
          for (int e = 0; e < PART; e++) theirs[other - 1][e] = __ldcg(from + (SPLIT * PART + e) * CONSUMERS);
        }
#pragma unroll
        for (int other = 1; other < SPLITS; other++)
#pragma unroll
          for (int e = 0; e < PART; e++) {
            float* a = acc + (SPLIT * PART + e) * 4;
            a[0] += theirs[other - 1][e].x, a[1] += theirs[other - 1][e].y;
            a[2] += theirs[other - 1][e].z, a[3] += theirs[other - 1][e].w;
          }
        finish(SPLIT * PART, (SPLIT + 1) * PART);
      };
      if (active) {
        if (work.split == 0) add_up(Constant<0>());
        else if (work.split == 1) add_up(Constant<1>());
#if SPLITS == 4
        else if (work.split == 2) add_up(Constant<2>());
        else add_up(Constant<3>());
#endif
      }
      consumers_sync();
      // The last to have read sets the counter back.
      if (threadIdx.x == 0 && atomicAdd(arrived + tile, 1u) == 2 * SPLITS - 1) atomicExch(arrived + tile, 0u);
#endif
    }
    cluster_sync();
  }
}

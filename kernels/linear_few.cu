// Few rows of x [rows, K] times weight [columns, K] transposed, at the speed at which the weights are read:
// kernels/linear_few.py compiles and launches this, and prefixes macros, wgmma() and hopper.cu:
//
//   HEIGHT   weight rows a block reads: a multiple of 16 up to 128; with GATED runs of 8 of gate's and of up's in turns
//   ROWS     rows of x, and more of zeros: a multiple of 8 up to 64
//   STAGES   tiles of weight and x in flight
//   SPLITS   blocks of a cluster, each of which multiplies a part of K; their sums meet in shared memory
//   GATED    silu(gate) * up of the two halves of the weight
//
// The weights are the left operand, 64 rows an instruction, so that few rows of x cost few registers: half of a
// multiprocessor's, like half of its shared memory, is left for the next kernel, whose first weights come while this
// one ends.

constexpr int DEPTH = 64;
constexpr int W_BYTES = HEIGHT * DEPTH * 2, X_BYTES = ROWS * DEPTH * 2, STAGE_BYTES = W_BYTES + X_BYTES;
// Warpgroups, which multiply 64 weight rows each; rows past the tile's are of no use to anyone.
constexpr int GROUPS = HEIGHT > 64 ? 2 : 1;
constexpr int PAST = GROUPS * 64 * DEPTH * 2 - STAGE_BYTES, SLACK = PAST > 0 ? PAST : 0;
constexpr int CONSUMERS = 128 * GROUPS;
constexpr int SHARE = HEIGHT / SPLITS;  // weight rows of the tile whose results this block of the cluster writes
constexpr int OUT_WIDTH = GATED ? SHARE / 2 : SHARE;
constexpr int PITCH = HEIGHT + 4;  // floats between rows of the sums: no bank twice
static_assert(ROWS * PITCH * 4 <= STAGES * STAGE_BYTES, "the sums go where the stages were");

__device__ __forceinline__ void consumers_sync() { named_sync(1, CONSUMERS); }

extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(CONSUMERS + 32, 2) few(
    const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w, half_bits* out,
    const half_bits* bias, const half_bits* residual, long long stride_out, long long stride_residual, int rows,
    int columns, int steps, u64 policy_x, u64 policy_w, int gate) {
  extern __shared__ char memory[];
  const u32 stages = (address_of(memory) + 1023) & ~1023u;
  // Behind the stages what the last block of 64 rows reaches past them, then the barriers.
  const u32 full = stages + STAGES * STAGE_BYTES + SLACK, empty = full + 8 * STAGES;
  const u32 sums = stages;  // once the stages are done with
  const int split = SPLITS == 1 ? 0 : cluster_rank(), tile = blockIdx.x / SPLITS;
  const int first = steps * split / SPLITS, last = steps * (split + 1) / SPLITS;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4 * GROUPS);
    }
    barrier_inits_fence();
  }
  __syncthreads();
  if (!gate) let_next_start();

  if (group == GROUPS) {
    if (one_lane()) {
      auto load_w = [&](u32 slot, int step) {
        const u32 to = stages + slot * STAGE_BYTES;
        barrier_expect(full + 8 * slot, STAGE_BYTES);
        if (GATED) load_box(to, &map_w, full + 8 * slot, step * DEPTH, 0, 0, tile * (HEIGHT / 16), policy_w);
        else load_tile(to, &map_w, full + 8 * slot, step * DEPTH, tile * HEIGHT, policy_w);
      };
      int ahead = min(STAGES, last - first);  // steps whose weights are under way
      for (int i = 0; i < ahead; i++) load_w(i, first + i);
      wait_for_last();
      if (gate) let_next_start();
      u32 slot = 0, phase = 1;
      for (int step = first; step < last; step++) {
        if (ahead > 0) {
          ahead--;
        } else {
          barrier_wait(empty + 8 * slot, phase);
          load_w(slot, step);
        }
        load_tile(stages + slot * STAGE_BYTES + W_BYTES, &map_x, full + 8 * slot, step * DEPTH, 0, policy_x);
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
    }
    __syncwarp();
    if (SPLITS > 1) {
      cluster_sync();
      cluster_sync();
    }
    return;
  }

  const int lane = threadIdx.x % 32;
  float acc[ROWS / 2];
  wait_for_last();
  u32 slot = 0, phase = 0, before = 0;
  for (int step = first; step < last; step++) {
    barrier_wait(full + 8 * slot, phase);
    const u32 w = stages + slot * STAGE_BYTES, x = w + W_BYTES;
    wgmma_fence();
    const u64 left = matrix_descriptor(w + group * (64 * DEPTH * 2)), right = matrix_descriptor(x);
#pragma unroll
    for (int part = 0; part < DEPTH / 16; part++)
      wgmma(acc, left + 2 * part, right + 2 * part, step > first || part > 0);
    wgmma_commit();
    if (step > first) {
      wgmma_wait<1>();
      if (lane == 0) barrier_arrive(empty + 8 * before);
    }
    before = slot;
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
  wgmma_wait<0>();
  consumers_sync();  // none multiplies any more: the stages' memory takes the sums

  const int of_tile = threadIdx.x / 32 * 16 + lane / 4;  // the weight row; and + 8
#pragma unroll
  for (int i = 0; i < ROWS / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (of_tile + j / 2 * 8 < HEIGHT)
        store_shared(sums + ((8 * i + lane % 4 * 2 + j % 2) * PITCH + of_tile + j / 2 * 8) * 4, acc[4 * i + j]);
  if (SPLITS > 1) cluster_sync();
  else consumers_sync();

  // Of one row of x, 8 results that lie side by side: the splits' sums in their order, then what comes after.
  for (int unit = threadIdx.x; unit < rows * (OUT_WIDTH / 8); unit += CONSUMERS) {
    const int row = unit / (OUT_WIDTH / 8), run = unit % (OUT_WIDTH / 8);
    const int column = (tile * SPLITS + split) * OUT_WIDTH + 8 * run;
    if (column >= columns) continue;
    const u32 from = sums + (row * PITCH + split * SHARE + run * (GATED ? 16 : 8)) * 4;
    float value[GATED ? 16 : 8] = {};
#pragma unroll
    for (int s = 0; s < SPLITS; s++) {
#pragma unroll
      for (int i = 0; i < (GATED ? 16 : 8); i += 4) {
        const float4 four = SPLITS == 1 ? load_shared(from + 4 * i) : load_cluster(address_in(from + 4 * i, s));
        value[i] += four.x, value[i + 1] += four.y, value[i + 2] += four.z, value[i + 3] += four.w;
      }
    }
    if (GATED) {
#pragma unroll
      for (int i = 0; i < 8; i++) value[i] = silu(value[i]) * value[i + 8 * GATED];
    }
    auto add = [&](uint4 eight) {
      const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int i = 0; i < 8; i++) value[i] += widen((half_bits)(words[i / 2] >> (i % 2 * 16)));
    };
    if (bias != nullptr) add(*(const uint4*)(bias + column));
    if (residual != nullptr) add(*(const uint4*)(residual + row * stride_residual + column));
    *(uint4*)(out + row * stride_out + column) =
        make_uint4(pack(value[0], value[1]), pack(value[2], value[3]), pack(value[4], value[5]), pack(value[6], value[7]));
  }
  if (SPLITS > 1) cluster_sync();  // none leaves while another may still read its sums
}

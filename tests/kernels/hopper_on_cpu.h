// Runs a kernel written for Hopper on a CPU, thread by thread: what stands in place of kernels/hopper.cu and wgmma().
//
// All threads of a launch are fibers of one thread; a thread that waits lets the others run. What the hardware does by
// itself happens late and in a random order, to find code that does not wait for it: a bulk copy leaves NaN in its
// place when it is asked for and is done some time later; a product is made when its group is waited for; the kernel in
// front ends, and what it writes is there, some time after this one has begun. A launch gives what went wrong: nothing
// left to run means a deadlock. bfloat16 only. Layouts: PTX ISA, "Asynchronous warpgroup level
// matrix instructions" and "Tensors", 128-byte swizzle.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>

using std::max;
using std::min;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short half_bits;
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __cluster_dims__(...)
#define __launch_bounds__(...)

struct int4 { int x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Sizes, strides in bytes and the box, from the dimension that is contiguous.
struct TensorMap { char* base; long rank, sizes[4], strides[4], box[4]; };

constexpr int SHARED_BYTES = 232 * 1024, FIRST_ADDRESS = 512;

struct Barrier { u32 expected, missing; long bytes; u32 phase; };
struct Meeting { int arrived = 0, times = 0; };
struct Block { std::vector<char> shared; std::map<u32, Barrier> barriers; Meeting named[16]; };
struct Product { float* d; u64 a, b; int add; const u32* registers; };
struct Copy { int block; u32 to, bar; TensorMap map; long at[4]; std::vector<int> blocks; };
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  int number, block;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};

static std::vector<Thread> fibers;
static std::vector<Block> blocks;
static std::vector<Copy> copies;
static std::vector<Meeting> clusters, warps;
static std::vector<u32> lanes;
static Thread* now;
static ucontext_t scheduler;
static std::function<void()> body;
static std::mt19937 dice(1);
static int block_threads, cluster_blocks, grid_blocks;
static long events;

struct Index { int x; };
#define threadIdx (Index{::now->number})
#define blockIdx (Index{::now->block})
#define gridDim (Index{grid_blocks})

static std::string failure;

inline void pause() { swapcontext(&now->context, &scheduler); }

inline void give_up(const char* why) {
  failure = std::string(why) + ": block " + std::to_string(now->block) + ", thread " + std::to_string(now->number);
  for (;;) pause();
}

inline void meet(Meeting& place, int count) {
  const int before = place.times;
  events++;
  if (++place.arrived == count) place.arrived = 0, place.times++;
  else while (place.times == before) pause();
  events++;
}

// --- shared memory; an address within the cluster has the block above bit 32

inline char* at(u64 address, long bytes) {
  const int block = address >> 32 ? (int)(address >> 32) - 1 : now->block;
  const u32 offset = (u32)address;
  if (offset < FIRST_ADDRESS || offset + bytes > FIRST_ADDRESS + SHARED_BYTES) give_up("outside of shared memory");
  return blocks[block].shared.data() + offset - FIRST_ADDRESS;
}
inline char* dynamic_shared() { return blocks[now->block].shared.data(); }
inline u32 address_of(const void* p) { return (u32)((const char*)p - dynamic_shared()) + FIRST_ADDRESS; }
template <typename T> T* shared_pointer(u32 address) { return (T*)at(address, sizeof(T)); }
inline u32 cluster_rank() { return now->block % cluster_blocks; }
inline int member(u32 rank) { return now->block / cluster_blocks * cluster_blocks + (int)rank; }
inline u64 address_in(u32 address, u32 rank) { return (u64)(member(rank) + 1) << 32 | address; }
inline float4 load_cluster(u64 address) { return *(float4*)at(address, 16); }
inline uint4 load_words(u32 address) { return *(uint4*)at(address, 16); }
inline u32 lower_halves(u32 a, u32 b) { return a & 0xFFFF | b << 16; }
inline u32 upper_halves(u32 a, u32 b) { return a >> 16 | b & 0xFFFF0000; }
inline float4 load_shared(u32 address) { return load_cluster(address); }
inline void store_shared(u32 address, float v) { *(float*)at(address, 4) = v; }

// --- barriers

inline Barrier& barrier(int block, u32 bar) {
  auto found = blocks[block].barriers.find(bar);
  if (found == blocks[block].barriers.end()) give_up("no barrier was initialised here");
  return found->second;
}
inline void settle(Barrier& b) {
  if (b.missing == 0 && b.bytes == 0) b.phase ^= 1, b.missing = b.expected;
  events++;
}
inline void arrive(Barrier& b) {
  if (b.missing == 0) give_up("one arrival too many");
  b.missing--;
  settle(b);
}
inline void barrier_init(u32 bar, u32 count) { blocks[now->block].barriers[bar] = {count, count, 0, 0}; }
inline void barrier_inits_fence() {}
inline void barrier_expect(u32 bar, u32 bytes) {
  Barrier& b = barrier(now->block, bar);
  b.bytes += bytes;
  arrive(b);
}
inline void barrier_arrive(u32 bar) { arrive(barrier(now->block, bar)); }
inline void barrier_arrive_at(u32 bar, u32 rank) { arrive(barrier(member(rank), bar)); }
inline void barrier_wait(u32 bar, u32 parity) {
  while (barrier(now->block, bar).phase == parity) pause();
  events++;
}
inline void named_sync(int name, int threads) { meet(blocks[now->block].named[name], threads); }
inline void __syncthreads() { named_sync(0, block_threads); }
inline void cluster_sync() { meet(clusters[now->block / cluster_blocks], block_threads * cluster_blocks); }
inline int warp() { return (now->block * block_threads + now->number) / 32; }
inline void __syncwarp() { meet(warps[warp()], 32); }
// What every lane of the warp has in a register, for all of them to see.
template <typename T> struct Lanes {
  T of[32];
  Lanes(T mine) {
    static_assert(sizeof(T) == 4, "a register");
    u32* places = &lanes[warp() * 32];
    memcpy(places + now->number % 32, &mine, 4);
    __syncwarp();
    memcpy(of, places, sizeof of);
    __syncwarp();
  }
};
template <typename T> T __shfl_sync(u32, T value, int lane) { return Lanes<T>(value).of[lane]; }
template <typename T> T __shfl_xor_sync(u32, T value, int bit) { return Lanes<T>(value).of[now->number % 32 ^ bit]; }
template <typename T> T __shfl_up_sync(u32, T value, int by) {
  const int lane = now->number % 32;
  return Lanes<T>(value).of[lane < by ? lane : lane - by];
}
inline u32 __ballot_sync(u32, bool value) {
  const Lanes<int> all(value);
  u32 bits = 0;
  for (int lane = 0; lane < 32; lane++) bits |= (u32)all.of[lane] << lane;
  return bits;
}
inline bool __any_sync(u32, bool value) { return __ballot_sync(~0u, value); }
inline int __ffs(u32 bits) { return __builtin_ffs(bits); }
inline bool one_lane() { return __syncwarp(), now->number % 32 == 0; }

// --- bulk copies

inline void start_copy(u32 to, const TensorMap* map, u32 bar, std::vector<long> place, std::vector<int> targets) {
  if (map->rank != (long)place.size() || map->box[0] != 64) give_up("a box of another shape");
  long bytes = 128;
  for (int d = 1; d < map->rank; d++) bytes *= map->box[d];
  Copy copy{now->block, to, bar, *map, {}, targets};
  std::copy(place.begin(), place.end(), copy.at);
  if (to % 1024 % 128) give_up("a box begins in the middle of a row");
  for (int block : targets) memset(at((u64)(block + 1) << 32 | to, bytes), 0xFF, bytes);
  copies.push_back(copy);
  events++;
}
inline void load_tile(u32 to, const TensorMap* map, u32 bar, int k, int row, u64) {
  start_copy(to, map, bar, {k, row}, {now->block});
}
inline void load_tile_for(u32 to, const TensorMap* map, u32 bar, int k, int row, u64, unsigned short mask) {
  std::vector<int> targets;
  for (int rank = 0; rank < cluster_blocks; rank++)
    if (mask >> rank & 1) targets.push_back(member(rank));
  start_copy(to, map, bar, {k, row}, targets);
}
inline void load_box(u32 to, const TensorMap* map, u32 bar, int a, int b, int c, int d, u64) {
  start_copy(to, map, bar, {a, b, c, d}, {now->block});
}
inline void load_run(u32 to, const void* from, u32 bytes, u32 bar, u64) {
  if (to % 16 || (u64)from % 16 || bytes % 16) give_up("a run of bytes begins or ends in the middle of 16");
  memset(at(to, bytes), 0xFF, bytes);
  copies.push_back({now->block, to, bar, {(char*)from}, {(long)bytes}, {now->block}});
  events++;
}
inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }
inline void end_copy(size_t which) {
  const Copy copy = copies[which];
  copies.erase(copies.begin() + which);
  if (copy.map.rank == 0) {
    Barrier& b = barrier(copy.block, copy.bar);
    memcpy(at((u64)(copy.block + 1) << 32 | copy.to, copy.at[0]), copy.map.base, copy.at[0]);
    b.bytes -= copy.at[0];
    return settle(b);
  }
  long box[4] = {64, 1, 1, 1}, row = 0;
  for (int d = 1; d < copy.map.rank; d++) box[d] = copy.map.box[d];
  for (long g = 0; g < box[3]; g++)
    for (long h = 0; h < box[2]; h++)
      for (long r = 0; r < box[1]; r++, row++)
        for (long k = 0; k < 64; k++) {
          const long place[4] = {copy.at[0] + k, copy.at[1] + r, copy.at[2] + h, copy.at[3] + g};
          bool inside = true;
          long offset = 2 * place[0];
          for (int d = 0; d < copy.map.rank; d++) {
            inside = inside && place[d] >= 0 && place[d] < copy.map.sizes[d];
            if (d) offset += place[d] * copy.map.strides[d];
          }
          const half_bits value = inside ? *(half_bits*)(copy.map.base + offset) : 0;
          for (int block : copy.blocks)
            *(half_bits*)at((u64)(block + 1) << 32 | swizzled(copy.to + row * 128 + k * 2), 2) = value;
        }
  for (int block : copy.blocks) {
    Barrier& b = barrier(block, copy.bar);
    b.bytes -= row * 128;
    settle(b);
  }
}

// --- numbers

inline float as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
inline float __uint_as_float(u32 bits) { return as_float(bits); }
inline float widen(half_bits bits) { return as_float((u32)bits << 16); }
inline u32 narrow(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return f != f ? 0x7FFF : bits + 0x7FFF + (bits >> 16 & 1) >> 16;
}
inline u32 pack(float low, float high) { return narrow(high) << 16 | narrow(low); }
inline float silu(float x) { return x / (1 + expf(-x)); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> void __stcg(T* p, T v) { *p = v; }
inline float minus_infinity() { return -INFINITY; }
inline float power_of_two(float x) { return exp2f(x); }
inline u32 count_and_see(u32* counter) { return events++, (*counter)++; }
inline int atomicAdd(int* p, int v) { return (*p += v) - v; }
inline u32 atomicAdd(u32* p, u32 v) { return (*p += v) - v; }
inline void atomicExch(u32* p, u32 v) { *p = v; }
inline void count_arrival(u32* counter) { ++*counter, events++; }
inline u32 arrivals(const u32* counter) { pause(); return *counter; }

// --- the matrix units: d [64, COLUMNS], or [64, VALUE_COLUMNS], of 128 threads, of which each makes its own part

inline u64 matrix_descriptor(u32 address) { return (u64)((address & 0x3FFFF) >> 4) | 64ull << 32 | 1ull << 62; }
inline float element(u64 matrix, int row, int k) {
  const u32 start = (matrix & 0x3FFF) << 4, stride = (matrix >> 32 & 0x3FFF) << 4;
  return widen(*(half_bits*)at(swizzled(start + row / 8 * stride + row % 8 * 128 + k * 2), 2));
}
inline float value_element(u64 matrix, int column, int k) {
  const u32 start = (matrix & 0x3FFF) << 4, panel = (matrix >> 16 & 0x3FFF) << 4, stride = (matrix >> 32 & 0x3FFF) << 4;
  const u32 place = start + column / 64 * panel + k / 8 * stride + k % 8 * 128 + column % 64 * 2;
  return widen(*(half_bits*)at(swizzled(place), 2));
}
template <typename T> void hold(const T&) {}
inline void wgmma_fence() {}
inline void wgmma(float* d, u64 a, u64 b, int add) { now->open.push_back({d, a, b, add, nullptr}); }
inline void wgmma_values(float* d, const u32* a, u64 b) { now->open.push_back({d, 0, b, 1, a}); }
inline void wgmma_commit() { now->groups.push_back(now->open), now->open.clear(); }
inline void multiply(size_t which) {
  const Product& product = now->groups.front()[which];
  const int lane = now->number % 32, row = now->number % 128 / 32 * 16 + lane / 4;
  float left[2][16];  // rows `row` and `row + 8` of a
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 16; k++)
      if (product.registers) {  // those of four lanes make a row
        const Thread& other = now[lane / 4 * 4 + k % 8 / 2 - lane];
        left[half][k] = widen((half_bits)(other.groups.front()[which].registers[half + k / 8 * 2] >> k % 2 * 16));
      } else {
        left[half][k] = element(product.a, row + half * 8, k);
      }
  for (int i = 0; i < (product.registers ? VALUE_COLUMNS : COLUMNS) / 2; i++) {
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = product.add ? product.d[i] : 0;
    for (int k = 0; k < 16; k++)
      sum += left[i % 4 / 2][k] * (product.registers ? value_element(product.b, column, k) : element(product.b, column, k));
    product.d[i] = sum;
  }
}
template <int LEFT> void wgmma_wait() {
  pause();
  for (; (int)now->groups.size() > LEFT; now->groups.pop_front()) {
    __syncwarp();  // lanes go on together, and see each other's registers
    for (size_t i = 0; i < now->groups.front().size(); i++) multiply(i);
    __syncwarp();
  }
  __syncwarp();
}

// --- products of a warp

inline half_bits element_of(const Lanes<u32>& matrix, int row, int column) {
  return (half_bits)(matrix.of[row * 4 + column / 2] >> column % 2 * 16);
}
inline u32 transposed(u32 two) {
  const Lanes<u32> all(two);
  const int row = now->number % 32 / 4, column = now->number % 4 * 2;
  return (u32)element_of(all, column + 1, row) << 16 | element_of(all, column, row);
}
inline void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const Lanes<u32> as[4] = {a[0], a[1], a[2], a[3]}, bs[2] = {b[0], b[1]};
  const int row = now->number % 32 / 4, column = now->number % 4 * 2;
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++)
      d[i] += widen(element_of(as[i / 2 + k / 8 * 2], row, k % 8)) * widen(element_of(bs[k / 8], column + i % 2, k % 8));
}
inline void stores_fence() {}

// --- the kernel in front, and the next one

struct Write { void* to; const void* from; long bytes; };
static std::vector<Write> last_writes;
static bool last_ended, next_started_early;
inline void end_last() {
  for (const Write& write : last_writes) memcpy(write.to, write.from, write.bytes);
  last_ended = true, events++;
}
inline void let_next_start() { next_started_early |= !last_ended; }
inline void wait_for_last() {
  while (!last_ended) pause();
}

template <int COUNT> void take_registers() {}
template <int COUNT> void leave_registers() {}

// --- a launch

inline void run_fiber() {
  body();
  now->done = true;
  events++;
  pause();
}
inline const char* launch(int grid, int cluster, int threads, std::function<void()> kernel) {
  failure.clear(), copies.clear(), last_ended = next_started_early = false;
  body = kernel, grid_blocks = grid, cluster_blocks = cluster, block_threads = threads;
  blocks.assign(grid, Block());
  for (Block& block : blocks) block.shared.assign(SHARED_BYTES, (char)0xFF);
  clusters.assign(grid / cluster, Meeting());
  warps.assign(grid * threads / 32, Meeting());
  lanes.assign(grid * threads, 0);
  fibers = std::vector<Thread>(grid * threads);
  std::vector<Thread*> order;
  for (int i = 0; i < grid * threads; i++) {
    Thread& fiber = fibers[i];
    fiber.number = i % threads, fiber.block = i / threads;
    fiber.stack.resize(32 * 1024);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
    order.push_back(&fiber);
  }
  std::vector<char> held(grid * threads / 32, 0);  // warps that others run ahead of for a while
  bool all = false;                                // after a round in which nothing happened
  while (!order.empty()) {
    const long before = events;
    if (dice() % 4 == 0) std::shuffle(order.begin(), order.end(), dice);
    for (char& warp : held)
      if (dice() % 8 == 0) warp = dice() % 2;
    for (Thread* fiber : order) {
      if (!all && held[(fiber->block * threads + fiber->number) / 32]) continue;
      now = fiber;
      swapcontext(&scheduler, &fiber->context);
      if (!failure.empty()) return failure.c_str();
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](Thread* fiber) { return fiber->done; }), order.end());
    if (!copies.empty() && (dice() % 3 == 0 || events == before)) end_copy(dice() % copies.size());
    else if (!last_ended && (dice() % 64 == 0 || events == before)) end_last();
    else if (events == before && all && !order.empty()) return "deadlock";
    all = events == before;
  }
  return nullptr;
}

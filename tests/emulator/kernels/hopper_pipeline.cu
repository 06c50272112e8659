// Hopper's instructions together, in the smallest kernel that has use for all of them: C = A B^T,
// 128 rows a tile, by a producer and two consumer warpgroups. And the same with a fault, of which
// each must be found.
#include <string>

#include "cuda/kernels/ptx_sm90.cuh"
#include "cuda/kernels/tensor_map.cuh"
#include "micro.h"

using namespace moe_ext::cuda;

namespace {

#define FAULTS(X)                   \
  X(none)                           \
  X(no_wait_for_empty)              \
  X(wrong_parity_at_full)           \
  X(wrong_parity_at_empty)          \
  X(phase_not_flipped)              \
  X(full_counts_two)                \
  X(expects_one_box)                \
  X(released_before_the_wait)       \
  X(last_release_missing)           \
  X(released_by_every_lane)         \
  X(no_fence_of_the_barriers)       \
  X(no_barrier_behind_the_barriers) \
  X(no_wgmma_fence)                 \
  X(no_commit)                      \
  X(accumulators_read_early)        \
  X(accumulators_written_in_flight) \
  X(accumulators_not_cleared)       \
  X(one_warp_apart)                 \
  X(wrong_step_along_k)             \
  X(no_proxy_fence)                 \
  X(no_barrier_before_the_store)    \
  X(staging_reused)                 \
  X(exit_before_the_store_has_read) \
  X(registers_never_given)

#define NAME(X) X,
enum Fault { FAULTS(NAME) };
#undef NAME

constexpr int kStages = 2, kTile = 64 * 64;  // elements: 64 rows of 64

struct Smem {
  alignas(1024) uint16_t a[kStages][2 * kTile], b[kStages][kTile], staged[2][kTile];
  uint64_t full[kStages], empty[kStages];
};

struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  template <Fault fault>
  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    if (fault != phase_not_flipped) phase ^= 1;
  }
};

template <Fault fault>
__device__ void produce(Smem& smem, const CUtensorMap& a, const CUtensorMap& b, int tiles,
                        int k_blocks) {
  if (threadIdx.x != 0) return;
  Ring ring;
  for (int tile = 0; tile < tiles; ++tile) {
    for (int k = 0; k < k_blocks; ++k, ring.advance<fault>()) {
      const uint32_t full = ptx::smem_u32(&smem.full[ring.stage]);
      if (fault != no_wait_for_empty)
        ptx::mbarrier_wait(ptx::smem_u32(&smem.empty[ring.stage]),
                           ring.phase ^ (fault != wrong_parity_at_empty));
      ptx::mbarrier_arrive_expect(full, (fault == expects_one_box ? 2 : 3) * kTile * 2);
      ptx::tma_load(ptx::smem_u32(smem.a[ring.stage]), a, full, {k * 64, tile * 128});
      ptx::tma_load(ptx::smem_u32(smem.b[ring.stage]), b, full, {k * 64, 0});
    }
  }
}

template <Fault fault>
__device__ void multiply(Smem& smem, int group, float (&d)[32], Ring& ring, int k_blocks) {
  const bool apart = fault == one_warp_apart && threadIdx.x / 32 == 6;
  for (int k = 0; k < k_blocks; ++k, ring.advance<fault>()) {
    ptx::mbarrier_wait(ptx::smem_u32(&smem.full[ring.stage]),
                       ring.phase ^ (fault == wrong_parity_at_full));
    if (fault != no_wgmma_fence) ptx::wgmma_fence();
    const uint32_t a = ptx::smem_u32(smem.a[ring.stage] + group * kTile);
    const uint32_t b = ptx::smem_u32(smem.b[ring.stage]);
    constexpr int kStep = fault == wrong_step_along_k ? 16 : 32;
#pragma unroll
    for (int step = 0; step < (apart ? 3 : 4); ++step) {
      ptx::wgmma<64, true, false, false>(d, ptx::descriptor(a + step * kStep, 1024),
                                         ptx::descriptor(b + step * 32, 1024),
                                         fault == accumulators_not_cleared || k > 0 || step > 0);
    }
    if (fault != no_commit) ptx::wgmma_commit();
    if (fault == accumulators_written_in_flight) d[3] = 0.0f;
    const uint32_t empty = ptx::smem_u32(&smem.empty[ring.stage]);
    if (fault == released_before_the_wait && ptx::elect_one()) ptx::mbarrier_arrive(empty);
    ptx::wgmma_wait<fault == accumulators_read_early ? 1 : 0>();
    if (fault == released_before_the_wait) continue;
    if (fault == last_release_missing && k == k_blocks - 1) continue;
    if (fault == released_by_every_lane || ptx::elect_one()) ptx::mbarrier_arrive(empty);
  }
}

// Rounds d, 64 x 64, and stores it.
template <Fault fault>
__device__ void store(Smem& smem, int group, const float (&d)[32], const CUtensorMap& c, int tile) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  if (fault != staging_reused && thread == 0) ptx::tma_store_wait_read<0>();
  ptx::named_bar_sync(1 + group, 128);
  const int row = thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // 16 columns: a matrix for each half of rows and of columns
    uint32_t both[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = d + j * 8 + i / 2 * 4 + i % 2 * 2;
      both[i] = __bfloat16_as_ushort(__float2bfloat16_rn(pair[0])) |
                __bfloat16_as_ushort(__float2bfloat16_rn(pair[1])) << 16;
    }
    const int chunk = (j * 2 + lane / 16) ^ (row % 8);
    ptx::stmatrix_x4(ptx::smem_u32(smem.staged[group]) + row * 128 + chunk * 16, both);
  }
  if (fault != no_proxy_fence) ptx::fence_proxy_async();
  if (fault != no_barrier_before_the_store) ptx::named_bar_sync(1 + group, 128);
  if (thread != 0) return;
  ptx::tma_store(c, ptx::smem_u32(smem.staged[group]), {0, tile * 128 + group * 64});
  ptx::tma_store_commit();
}

template <Fault fault>
__global__ void __launch_bounds__(384, 1)
    pipeline(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
             const __grid_constant__ CUtensorMap c, int tiles, int k_blocks) {
  Smem& smem = dyn_smem<Smem>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(ptx::smem_u32(&smem.full[i]), fault == full_counts_two ? 2 : 1);
      ptx::mbarrier_init(ptx::smem_u32(&smem.empty[i]), 8);
    }
    if (fault != no_fence_of_the_barriers) ptx::fence_mbarrier_init();
  }
  if (fault != no_barrier_behind_the_barriers) __syncthreads();
  if (threadIdx.x < 128) {
    if (fault != registers_never_given) ptx::give_registers<40>();
    return produce<fault>(smem, a, b, tiles, k_blocks);
  }
  ptx::take_registers<232>();
  const int group = threadIdx.x / 128 - 1;
  Ring ring;
  for (int tile = 0; tile < tiles; ++tile) {
    float d[32];
    if (fault == accumulators_not_cleared) {
      for (float& element : d) element = __uint_as_float(0x7fc00000);
    }
    multiply<fault>(smem, group, d, ring, k_blocks);
    store<fault>(smem, group, d, c, tile);
  }
  if (fault != exit_before_the_store_has_read && threadIdx.x % 128 == 0) ptx::tma_store_wait<0>();
}

}  // namespace

// c (tiles * 128, 64) = a (tiles * 128, 64 k_blocks) times the transpose of b (64, 64 k_blocks).
MICRO_KERNEL micro_pipeline(const char* fault, const uint16_t* a, const uint16_t* b, uint16_t* c,
                            int tiles, int k_blocks) {
  const uint64_t rows = 128u * tiles, k = 64u * k_blocks;
  CUtensorMap a_map, b_map, c_map;
  if (!make_tensor_map(a_map, a, {k, rows}, {k * 2}, {64, 128}) ||
      !make_tensor_map(b_map, b, {k, 64}, {k * 2}, {64, 64}) ||
      !make_tensor_map(c_map, c, {64, rows}, {128}, {64, 64}))
    return -3;
#define RUN(X)                  \
  if (std::string(fault) == #X) \
    return run("pipeline", 1, 384, sizeof(Smem), pipeline<X>, a_map, b_map, c_map, tiles, k_blocks);
  FAULTS(RUN)
#undef RUN
  return -2;
}

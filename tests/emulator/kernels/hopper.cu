// mbarriers, TMA, wgmma, stmatrix, setmaxnreg: an instruction a kernel. For sm_90a.
#include <type_traits>

#include "cuda/kernels/ptx_sm90.cuh"
#include "cuda/kernels/tensor_map.cuh"
#include "micro.h"

using namespace moe_ext::cuda;

// ---- mbarrier --------------------------------------------------------------------------------

// Warp 0 hands 6 rows of 32 ints through two places to warp 1. in: (6, 32); out: (6, 32).
__global__ void mbarrier_ring(const int* in, int* out) {
  __shared__ int place[2][32];
  __shared__ uint64_t full[2], empty[2];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(ptx::smem_u32(&full[i]), 32);
      ptx::mbarrier_init(ptx::smem_u32(&empty[i]), 32);
    }
  }
  __syncthreads();
  for (int i = 0; i < 6; ++i) {
    const uint32_t is_full = ptx::smem_u32(&full[i % 2]), is_empty = ptx::smem_u32(&empty[i % 2]);
    const uint32_t parity = i / 2 % 2;
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(is_empty, parity ^ 1);
      place[i % 2][lane] = in[i * 32 + lane];
      ptx::mbarrier_arrive(is_full);
    } else {
      ptx::mbarrier_wait(is_full, parity);
      out[i * 32 + 31 - lane] = place[i % 2][31 - lane];
      ptx::mbarrier_arrive(is_empty);
    }
  }
}

MICRO_KERNEL micro_mbarrier_ring(const int* in, int* out) {
  return run("mbarrier_ring", 1, 64, 0, mbarrier_ring, in, out);
}

// ---- TMA -------------------------------------------------------------------------------------

namespace {
struct BoxSmem {
  alignas(1024) uint16_t box[64 * 64];
  uint64_t full;
};
}  // namespace

template <int dims>
struct At {
  int at[dims];
};

// raw: what lies in shared memory, 64 x 64 elements, 0xffff where nothing came.
template <int dims>
__global__ void box_load(const __grid_constant__ CUtensorMap map, At<dims> where, int bytes,
                         uint16_t* raw) {
  BoxSmem& smem = dyn_smem<BoxSmem>();
  for (int i = threadIdx.x; i < 64 * 64; i += 32) smem.box[i] = 0xffff;
  ptx::fence_proxy_async();
  const uint32_t full = ptx::smem_u32(&smem.full);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(full, bytes);
    ptx::tma_load(ptx::smem_u32(smem.box), map, full, where.at);
  }
  ptx::mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < 64 * 64; i += 32) raw[i] = smem.box[i];
}

// The same way back.
template <int dims>
__global__ void box_store(const __grid_constant__ CUtensorMap map, At<dims> where,
                          const uint16_t* raw) {
  BoxSmem& smem = dyn_smem<BoxSmem>();
  for (int i = threadIdx.x; i < 64 * 64; i += 32) smem.box[i] = raw[i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store(map, ptx::smem_u32(smem.box), where.at);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
}

template <int dims>
static int copy_box(bool store, void* data, const int64_t* sizes, const int64_t* strides,
                    const int* box, const int* at, bool swizzled, uint16_t* raw) {
  uint64_t map_sizes[dims], map_strides[dims - 1];
  uint32_t map_box[dims], bytes = 2;
  At<dims> where;
  for (int d = 0; d < dims; ++d) {
    map_sizes[d] = sizes[d], map_box[d] = box[d], where.at[d] = at[d];
    bytes *= map_box[d];
    if (d > 0) map_strides[d - 1] = strides[d - 1];
  }
  CUtensorMap map;
  if (!make_tensor_map(map, data, map_sizes, map_strides, map_box, swizzled)) return -3;
  if (store) return run("box_store", 1, 32, sizeof(BoxSmem), box_store<dims>, map, where, raw);
  return run("box_load", 1, 32, sizeof(BoxSmem), box_load<dims>, map, where,
             static_cast<int>(bytes), raw);
}

// -3: the map is refused.
MICRO_KERNEL micro_box(int store, int dims, uint16_t* data, const int64_t* sizes,
                       const int64_t* strides, const int* box, const int* at, int swizzled,
                       uint16_t* raw) {
  const auto copy = dims == 2   ? copy_box<2>
                    : dims == 3 ? copy_box<3>
                    : dims == 4 ? copy_box<4>
                                : copy_box<5>;
  return copy(store, data, sizes, strides, box, at, swizzled, raw);
}

// ---- wgmma -----------------------------------------------------------------------------------

// Four products, of 16 along k each. a, b: shared memory as it is to lie; in, out: (128, N / 2).
template <int N, bool bf16, bool a_mn, bool b_mn>
__global__ void multiply_64(const uint32_t* a, const uint32_t* b, const float* in, bool accumulate,
                            float* out) {
  struct Smem {
    alignas(1024) uint32_t a[64 * 32], b[N * 32];
  };
  Smem& smem = dyn_smem<Smem>();
  const int thread = threadIdx.x;
  for (int i = thread; i < 64 * 32; i += 128) smem.a[i] = a[i];
  for (int i = thread; i < N * 32; i += 128) smem.b[i] = b[i];
  ptx::fence_proxy_async();
  __syncthreads();
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = in[thread * (N / 2) + i];
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const auto operand = [&](const uint32_t* begin, bool mn) {
      return ptx::descriptor(ptx::smem_u32(begin) + step * (mn ? 16 * 128 : 32), 1024, 8192);
    };
    ptx::wgmma<N, bf16, a_mn, b_mn>(d, operand(smem.a, a_mn), operand(smem.b, b_mn),
                                    accumulate || step > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[thread * (N / 2) + i] = d[i];
}

template <int N, bool bf16>
static int multiply_majors(int a_mn, int b_mn, const uint32_t* a, const uint32_t* b,
                           const float* in, int accumulate, float* out) {
  const auto kernel =
      a_mn ? (b_mn ? multiply_64<N, bf16, true, true> : multiply_64<N, bf16, true, false>)
           : (b_mn ? multiply_64<N, bf16, false, true> : multiply_64<N, bf16, false, false>);
  return run("multiply_64", 1, 128, (64 + N) * 128, kernel, a, b, in, accumulate != 0, out);
}

MICRO_KERNEL micro_wgmma(int n, int bf16, int a_mn, int b_mn, const uint32_t* a, const uint32_t* b,
                         const float* in, int accumulate, float* out) {
  const auto with = [&](auto of_n) {
    constexpr int kN = decltype(of_n)::value;
    return (bf16 ? multiply_majors<kN, true> : multiply_majors<kN, false>)(a_mn, b_mn, a, b, in,
                                                                           accumulate, out);
  };
  switch (n) {
    case 32:
      return with(std::integral_constant<int, 32>());
    case 64:
      return with(std::integral_constant<int, 64>());
    case 128:
      return with(std::integral_constant<int, 128>());
    case 192:
      return with(std::integral_constant<int, 192>());
    default:
      return with(std::integral_constant<int, 256>());
  }
}

// ---- stmatrix --------------------------------------------------------------------------------

// r: (32, 4) registers; rows: the row that a lane points at; out: 32 rows of 8 elements.
template <bool transposed>
__global__ void store_matrices(const uint32_t* r, const int* rows, uint16_t* out) {
  __shared__ __align__(16) uint16_t smem[32][8];
  const int lane = threadIdx.x;
  uint32_t mine[4];
  for (int m = 0; m < 4; ++m) mine[m] = r[lane * 4 + m];
  const uint32_t row = ptx::smem_u32(smem[rows[lane]]);
  if (transposed) {
    ptx::stmatrix_x4_trans(row, mine);
  } else {
    ptx::stmatrix_x4(row, mine);
  }
  __syncwarp();
  for (int i = lane; i < 32 * 8; i += 32) out[i] = smem[i / 8][i % 8];
}

MICRO_KERNEL micro_stmatrix(int transposed, const uint32_t* r, const int* rows, uint16_t* out) {
  return run("stmatrix", 1, 32, 0, transposed ? store_matrices<true> : store_matrices<false>, r,
             rows, out);
}

// ---- registers and election --------------------------------------------------------------------

// Of 384 threads 128 give registers and 256 take them; out: who was elected, (384).
__global__ void __launch_bounds__(384, 1) registers_and_election(int* out) {
  if (threadIdx.x < 128) {
    ptx::give_registers<40>();
  } else {
    ptx::take_registers<232>();
  }
  out[threadIdx.x] = ptx::elect_one();
}

MICRO_KERNEL micro_registers(int* out) {
  return run("registers", 1, 384, 0, registers_and_election, out);
}

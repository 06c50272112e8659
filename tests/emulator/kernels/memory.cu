// cp.async, ldmatrix, dynamic shared memory.
#include "micro.h"

using namespace moe_ext::cuda;

namespace {
struct Fill {
  alignas(16) uint8_t four[17][32][4], eight[17][32][8], sixteen[17][32][16];
};
}  // namespace

// Copies of 4, 8 and 16 bytes that read 0, 1, ... of them. in: (32, 16) bytes;
// out: (3, 17, 32, 16), of which a copy's size is written.
__global__ void copy_fill(const uint8_t* in, uint8_t* out) {
  Fill& smem = dyn_smem<Fill>();
  const int lane = threadIdx.x;
  const uint8_t* source = in + lane * 16;
  for (int bytes = 0; bytes <= 16; ++bytes) {
    if (bytes <= 4) ptx::cp_async_4(ptx::smem_u32(smem.four[bytes][lane]), source, bytes);
    if (bytes <= 8) ptx::cp_async_8(ptx::smem_u32(smem.eight[bytes][lane]), source, bytes);
    ptx::cp_async_16(ptx::smem_u32(smem.sixteen[bytes][lane]), source, bytes);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int bytes = 0; bytes <= 16; ++bytes) {
    uint8_t* target = out + (bytes * 32 + lane) * 16;
    for (int i = 0; i < 4 && bytes <= 4; ++i) target[i] = smem.four[bytes][lane][i];
    target += 17 * 32 * 16;
    for (int i = 0; i < 8 && bytes <= 8; ++i) target[i] = smem.eight[bytes][lane][i];
    target += 17 * 32 * 16;
    for (int i = 0; i < 16; ++i) target[i] = smem.sixteen[bytes][lane][i];
  }
}

MICRO_KERNEL micro_copy_fill(const uint8_t* in, uint8_t* out) {
  return run("copy_fill", 1, 32, sizeof(Fill), copy_fill, in, out);
}

// Three groups; after the wait for all but `left` those before are there. Each warp reads
// what the other copied. in: (3, 64) ints; out: (3, 64), of which 3 - left are written.
template <int left>
__global__ void copy_groups(const int* in, int* out) {
  __shared__ __align__(16) int target[3][64];
  const int thread = threadIdx.x, other = thread ^ 32;
  for (int group = 0; group < 3; ++group) {
    ptx::cp_async_4(ptx::smem_u32(&target[group][thread]), in + group * 64 + thread);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<left>();
  __syncthreads();
  for (int group = 0; group < 3 - left; ++group) out[group * 64 + other] = target[group][other];
}

MICRO_KERNEL micro_copy_groups(int left, const int* in, int* out) {
  if (left == 0) return run("copy_groups", 1, 64, 0, copy_groups<0>, in, out);
  if (left == 1) return run("copy_groups", 1, 64, 0, copy_groups<1>, in, out);
  return run("copy_groups", 1, 64, 0, copy_groups<2>, in, out);
}

// in: 64 rows of 8 16-bit elements; rows: the row that a lane points at; out: (32, 4).
template <int matrices, bool transposed>
__global__ void load_matrices(const uint16_t* in, const int* rows, uint32_t* out) {
  __shared__ __align__(16) uint16_t smem[64][8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 512; i += 32) smem[i / 8][i % 8] = in[i];
  __syncwarp();
  const uint32_t row = ptx::smem_u32(smem[rows[lane]]);
  uint32_t r1[1], r2[2], r4[4];
  if constexpr (matrices == 1 && !transposed) ptx::ldmatrix_x1(r1[0], row);
  if constexpr (matrices == 1 && transposed) ptx::ldmatrix_x1_trans(r1[0], row);
  if constexpr (matrices == 2 && !transposed) ptx::ldmatrix_x2(r2, row);
  if constexpr (matrices == 2 && transposed) ptx::ldmatrix_x2_trans(r2, row);
  if constexpr (matrices == 4 && !transposed) ptx::ldmatrix_x4(r4, row);
  if constexpr (matrices == 4 && transposed) ptx::ldmatrix_x4_trans(r4, row);
  const uint32_t* loaded = matrices == 1 ? r1 : matrices == 2 ? r2 : r4;
  for (int m = 0; m < matrices; ++m) out[lane * 4 + m] = loaded[m];
}

MICRO_KERNEL micro_ldmatrix(int matrices, int transposed, const uint16_t* in, const int* rows,
                            uint32_t* out) {
  const auto kernel =
      matrices == 1   ? (transposed ? load_matrices<1, true> : load_matrices<1, false>)
      : matrices == 2 ? (transposed ? load_matrices<2, true> : load_matrices<2, false>)
                      : (transposed ? load_matrices<4, true> : load_matrices<4, false>);
  return run("ldmatrix", 1, 32, 0, kernel, in, rows, out);
}

// out: the alignment of dynamic shared memory beside static, its address's distance.
__global__ void smem_addresses(int* out) {
  __shared__ int before[3];
  struct Smem {
    uint8_t bytes[2048];
  };
  Smem& smem = dyn_smem<Smem>();
  if (threadIdx.x == 0) {
    before[0] = 7;
    out[0] = static_cast<int>(ptx::smem_u32(&smem) % 1024);
    out[1] = static_cast<int>(ptx::smem_u32(smem.bytes + 77) - ptx::smem_u32(&smem));
    out[2] = static_cast<int>(ptx::smem_u32(before + 2) - ptx::smem_u32(before));
    out[3] = before[0];
  }
}

MICRO_KERNEL micro_smem(int* out) { return run("smem", 1, 32, 2048, smem_addresses, out); }

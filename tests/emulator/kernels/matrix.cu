// mma.sync: registers in, registers out.
#include "micro.h"

using namespace moe_ext::cuda;

// a: (32, 4), b: (32, 2), c and out: (32, 4).
template <int kind>
__global__ void multiply(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int lane = threadIdx.x;
  uint32_t fragment_a[4], fragment_b[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) fragment_b[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) sum[i] = c[lane * 4 + i];
  if constexpr (kind == 0) ptx::mma_m16n8k16_bf16(sum, fragment_a, fragment_b);
  if constexpr (kind == 1) ptx::mma_m16n8k16_f16(sum, fragment_a, fragment_b);
  if constexpr (kind == 2) ptx::mma_m16n8k8_tf32(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = sum[i];
}

MICRO_KERNEL micro_mma(int kind, const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const auto kernel = kind == 0 ? multiply<0> : kind == 1 ? multiply<1> : multiply<2>;
  return run("mma", 1, 32, 0, kernel, a, b, c, out);
}

__global__ void round_to_tf32(const float* in, uint32_t* out) {
  out[threadIdx.x] = ptx::to_tf32(in[threadIdx.x]);
}

MICRO_KERNEL micro_to_tf32(int count, const float* in, uint32_t* out) {
  return run("to_tf32", 1, count, 0, round_to_tf32, in, out);
}

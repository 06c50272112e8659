// The approximations: a value in, a value out.
#include "micro.h"

using namespace moe_ext::cuda;

__global__ void ex2_approx(const float* in, float* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  out[i] = ptx::ex2_approx(in[i]);
}

__global__ void rcp_approx(const float* in, float* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  out[i] = ptx::rcp_approx(in[i]);
}

// in, out: (32 * warps).
MICRO_KERNEL micro_ex2_approx(int warps, const float* in, float* out) {
  return run("ex2_approx", warps, 32, 0, ex2_approx, in, out);
}
MICRO_KERNEL micro_rcp_approx(int warps, const float* in, float* out) {
  return run("rcp_approx", warps, 32, 0, rcp_approx, in, out);
}

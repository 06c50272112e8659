// Shuffles, votes, reductions.
#include "micro.h"

using namespace moe_ext::cuda;

// out[lane * 16 + i]: result i of a lane.
__global__ void warp_results(const int* in, int* out) {
  const int lane = threadIdx.x;
  const int x = in[lane];
  int* result = out + lane * 16;
  result[0] = __shfl_sync(kFullWarp, x, 5);
  result[1] = __shfl_sync(kFullWarp, x, lane + 1, 8);
  result[2] = __shfl_up_sync(kFullWarp, x, 3, 16);
  result[3] = __shfl_down_sync(kFullWarp, x, 5, 8);
  result[4] = __shfl_xor_sync(kFullWarp, x, 9);
  result[5] = __shfl_xor_sync(kFullWarp, x, 9, 8);
  result[6] = static_cast<int>(__ballot_sync(kFullWarp, x % 3 == 0));
  result[7] = __any_sync(kFullWarp, x == 7);
  result[8] = __all_sync(kFullWarp, x > -100);
  result[9] = static_cast<int>(__match_any_sync(kFullWarp, x / 5));
  result[10] = __reduce_add_sync(kFullWarp, x);
  result[11] = __reduce_min_sync(kFullWarp, x - 7);
  result[12] = __reduce_max_sync(kFullWarp, x - 70);
  result[13] = static_cast<int>(__reduce_xor_sync(kFullWarp, static_cast<unsigned>(x)));
  // Two halves of a warp, each on its own way.
  if (lane < 16) {
    result[14] = __shfl_xor_sync(0xffffu, x, 5);
  } else {
    result[14] = __popc(__ballot_sync(0xffff0000u, lane > 20));
  }
  __syncwarp();
  result[15] = static_cast<int>(__reduce_max_sync(kFullWarp, static_cast<unsigned>(x - 70)));
}

MICRO_KERNEL micro_warp(const int* in, int* out) {
  return run("micro_warp", 1, 32, 0, warp_results, in, out);
}

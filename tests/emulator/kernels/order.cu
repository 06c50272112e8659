// Barriers, atomics, flags between blocks.
#include "micro.h"

using namespace moe_ext::cuda;

// 128 threads: two named barriers at once, a producer that only arrives, the barriers that
// count. in: (128); out: (128, 6).
__global__ void barriers(const int* in, int* out) {
  __shared__ int value[128], produced[64];
  const int thread = threadIdx.x;
  int* result = out + thread * 6;
  value[thread] = in[thread];
  ptx::named_bar_sync(1 + thread / 64, 64);  // warps 0 and 1, warps 2 and 3
  result[0] = value[thread ^ 63];
  __syncthreads();
  result[1] = value[127 - thread];
  if (thread < 64) {
    produced[thread] = value[thread] + 1000;
    ptx::named_bar_arrive(3, 128);
    result[2] = -1;
  } else {
    ptx::named_bar_sync(3, 128);
    result[2] = produced[thread - 64];
  }
  result[3] = __syncthreads_count(in[thread] % 3 == 0);
  result[4] = __syncthreads_or(in[thread] == 5) != 0;
  result[5] = __syncthreads_and(in[thread] >= 0) != 0;
}

MICRO_KERNEL micro_barriers(const int* in, int* out) {
  return run("barriers", 1, 128, 0, barriers, in, out);
}

// Every thread on 9 cells; the last is an addition made of compare-and-swap.
__global__ void atomics(int* cells) {
  const int x = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(cells + 0, x);
  atomicSub(cells + 1, x);
  atomicMin(cells + 2, x - 5);
  atomicMax(cells + 3, x - 5);
  atomicAnd(cells + 4, ~(1 << (x % 8)));
  atomicOr(cells + 5, 1 << (x % 31));
  atomicXor(cells + 6, x);
  atomicAdd(reinterpret_cast<unsigned*>(cells) + 7, 0xffffffffu);
  for (int seen = atomicAdd(cells + 8, 0);;) {
    const int found = atomicCAS(cells + 8, seen, seen + x);
    if (found == seen) break;
    seen = found;
  }
}

MICRO_KERNEL micro_atomics(int* cells) { return run("atomics", 5, 40, 0, atomics, cells); }

// Blocks take tickets; each waits for the flag of the one before and carries its sum on.
// state: ticket, then a flag a block; out: (blocks).
__global__ void chain(uint32_t* state, int* sums) {
  __shared__ uint32_t ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(state, 1u);
  __syncthreads();
  const uint32_t mine = ticket;
  if (threadIdx.x == 0) {
    int before = 0;
    if (mine > 0) {
      while (ptx::ld_acquire(state + mine) == 0) {
      }
      before = sums[mine - 1];
    }
    sums[mine] = before + static_cast<int>(mine) + 1;
    ptx::st_release(state + mine + 1, 1);
  }
}

MICRO_KERNEL micro_chain(int blocks, uint32_t* state, int* sums) {
  return run("chain", blocks, 64, 0, chain, state, sums);
}

// The last block to finish sums what the others wrote: out[blocks] is the sum.
__global__ void last_block(uint32_t* counter, int* out) {
  __shared__ bool last;
  const int blocks = gridDim.x;
  if (threadIdx.x == 0) {
    out[blockIdx.x] = static_cast<int>(blockIdx.x) * 3 + 1;
    __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < blocks; ++i) sum += out[i];
    out[blocks] = sum;
  }
}

MICRO_KERNEL micro_last_block(int blocks, uint32_t* counter, int* out) {
  return run("last_block", blocks, 32, 0, last_block, counter, out);
}

// Kernels with a fault each, which the emulator must report. Not for a GPU.
#include "micro.h"

using namespace moe_ext::cuda;

namespace {

struct Smem {
  int word[32];
};

__global__ void divergent_barrier(int*) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    __nanosleep(1);
    __syncthreads();
  }
}

__global__ void barrier_left_out(int* p) {
  if (threadIdx.x < 32) {
    ptx::named_bar_sync(1, 64);
    p[0] = 1;
  }
}

__global__ void barrier_of_two_sizes(int*) { ptx::named_bar_sync(1, threadIdx.x < 32 ? 64 : 96); }

__global__ void shuffle_after_exit(int* p) {
  const int lane = threadIdx.x;
  if (lane >= 20) return;
  p[lane] = __shfl_sync(kFullWarp, lane, 0);
}

__global__ void mixed_collectives(int* p) {
  const int lane = threadIdx.x;
  if (lane < 16) {
    p[lane] = __shfl_sync(kFullWarp, lane, 0);
  } else {
    p[lane] = static_cast<int>(__ballot_sync(kFullWarp, 1));
  }
}

__global__ void mask_without_self(int* p) {
  p[threadIdx.x] = __shfl_sync(0xffffu, static_cast<int>(threadIdx.x), 0);
}

__global__ void endless_spin(int* p) {
  while (ptx::ld_acquire(reinterpret_cast<uint32_t*>(p)) == 77) {
  }
}

__global__ void past_the_end(int* p) { p[1024 + threadIdx.x] = 1; }

__global__ void just_past_the_end(int* p) {
  if (threadIdx.x == 3) p[1022] = 1;
}

__global__ void past_dynamic_smem(int* p) {
  Smem& smem = dyn_smem<Smem>();
  smem.word[threadIdx.x + 200] = 1;  // within the last of the 1024 bytes that it is rounded to
  __syncwarp();
  p[threadIdx.x] = smem.word[threadIdx.x];
}

__global__ void misaligned_copy(int* p) {
  Smem& smem = dyn_smem<Smem>();
  ptx::cp_async_16(ptx::smem_u32(smem.word), p + 1);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

__global__ void no_wait_for_a_copy(int* p) {
  Smem& smem = dyn_smem<Smem>();
  ptx::cp_async_4(ptx::smem_u32(&smem.word[threadIdx.x]), p + threadIdx.x);
  ptx::cp_async_commit();
  p[32 + threadIdx.x] = smem.word[threadIdx.x];
}

__global__ void unwritten_smem(int* p) {
  Smem& smem = dyn_smem<Smem>();
  if (threadIdx.x < 31) smem.word[threadIdx.x] = 1;
  __syncthreads();
  p[threadIdx.x] = smem.word[31 - threadIdx.x];
}

__global__ void no_barrier(int* p) {
  __shared__ int word[64];
  word[threadIdx.x] = static_cast<int>(threadIdx.x);
  p[threadIdx.x] = word[63 - threadIdx.x];
}

__global__ void no_barrier_before_reuse(int* p) {
  __shared__ int word[64];
  int sum = 0;
  for (int i = 0; i < 4; ++i) {
    word[threadIdx.x] = i;
    __syncthreads();
    sum += word[63 - threadIdx.x];
  }
  p[threadIdx.x] = sum;
}

__global__ void shuffle_orders_nothing(int* p) {
  Smem& smem = dyn_smem<Smem>();
  const int lane = threadIdx.x;
  smem.word[lane] = lane;
  const int x = __shfl_xor_sync(kFullWarp, lane, 1);
  p[lane] = smem.word[31 - lane] + x;
}

__global__ void blocks_write_one_place(int* p) { p[0] = static_cast<int>(blockIdx.x); }

// The last block reads what another wrote. That takes a fence before and after the ticket, and
// a barrier before them where other threads have written.
__global__ void last_block_without_fence(int* p) {
  p[1 + blockIdx.x] = 1;
  const bool last = atomicAdd(p, 1) == static_cast<int>(gridDim.x) - 1;
  __threadfence();
  if (last) p[1000] = p[1 + (blockIdx.x + 1) % gridDim.x];
}

__global__ void last_block_without_second_fence(int* p) {
  p[1 + blockIdx.x] = 1;
  __threadfence();
  const bool last = atomicAdd(p, 1) == static_cast<int>(gridDim.x) - 1;
  if (last) p[1001] = p[1 + (blockIdx.x + 1) % gridDim.x];
}

__global__ void last_block_without_barrier(int* p) {
  p[1 + blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (threadIdx.x > 0) return;
  __threadfence();
  const bool last = atomicAdd(p, 1) == static_cast<int>(gridDim.x) - 1;
  __threadfence();
  if (last) p[1002] = p[2 + (blockIdx.x + 1) % gridDim.x * blockDim.x];
}

__global__ void shuffle_orders_no_tensor(int* p) {
  const int lane = threadIdx.x;
  p[lane] = lane;
  const int x = __shfl_xor_sync(kFullWarp, lane, 1);
  p[32 + lane] = p[31 - lane] + x;
}

__global__ void overwritten_while_read(int* p) {
  const int x = p[63 - threadIdx.x];
  p[threadIdx.x] = x;
}

__global__ void misaligned_vector(int* p) {
  auto* four = reinterpret_cast<float4*>(p + 1);
  four[threadIdx.x] = float4{1, 2, 3, 4};
}

__global__ void anothers_local_memory(int* p) {
  __shared__ int* pointer;
  int mine[4] = {1, 2, 3, 4};
  if (threadIdx.x == 0) pointer = mine;
  __syncthreads();
  if (threadIdx.x == 1) pointer[p[100] & 3] = 5;
  __syncthreads();
  p[threadIdx.x] = mine[p[100] & 3];
}

__global__ void host_memory(int* p, const int* host) { p[threadIdx.x] = host[threadIdx.x]; }

// Not a variable of the library: those are read as constants are.
int* const host_array = new int[64]{};

}  // namespace

// p: 1024 ints; `bytes` of it are used by the test.
MICRO_KERNEL micro_fault(const char* name, int* p) {
#define FAULT(KERNEL, BLOCKS, THREADS, SMEM, ...) \
  if (std::string(name) == #KERNEL) return run(#KERNEL, BLOCKS, THREADS, SMEM, KERNEL, __VA_ARGS__);
  FAULT(divergent_barrier, 1, 64, 0, p)
  FAULT(barrier_left_out, 1, 64, 0, p)
  FAULT(barrier_of_two_sizes, 1, 96, 0, p)
  FAULT(shuffle_after_exit, 1, 32, 0, p)
  FAULT(mixed_collectives, 1, 32, 0, p)
  FAULT(mask_without_self, 1, 32, 0, p)
  FAULT(endless_spin, 1, 32, 0, p)
  FAULT(past_the_end, 1, 32, 0, p)
  FAULT(just_past_the_end, 1, 32, 0, p)
  FAULT(past_dynamic_smem, 1, 32, sizeof(Smem), p)
  FAULT(misaligned_copy, 1, 32, sizeof(Smem), p)
  FAULT(no_wait_for_a_copy, 1, 32, sizeof(Smem), p)
  FAULT(unwritten_smem, 1, 32, sizeof(Smem), p)
  FAULT(no_barrier, 1, 64, 0, p)
  FAULT(no_barrier_before_reuse, 1, 64, 0, p)
  FAULT(shuffle_orders_nothing, 1, 32, sizeof(Smem), p)
  FAULT(blocks_write_one_place, 4, 1, 0, p)
  FAULT(last_block_without_fence, 8, 1, 0, p)
  FAULT(last_block_without_second_fence, 8, 1, 0, p)
  FAULT(last_block_without_barrier, 8, 64, 0, p)
  FAULT(shuffle_orders_no_tensor, 1, 32, 0, p)
  FAULT(overwritten_while_read, 1, 64, 0, p)
  FAULT(misaligned_vector, 1, 32, 0, p)
  FAULT(anothers_local_memory, 1, 32, 0, p)
  FAULT(host_memory, 1, 32, 0, p, host_array)
  return -2;
}

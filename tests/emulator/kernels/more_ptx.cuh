// Instructions of the emulator that no kernel needs so far, in the manner of
// csrc/cuda/kernels/ptx.cuh, which has those that the kernels use.
#pragma once

#include "cuda/kernels/ptx.cuh"

namespace moe_ext::cuda::ptx {

// ---- named barriers; see named_bar_sync -------------------------------------------------

// Counts as having come to barrier `id`, and goes on: for a producer, whose consumers
// call named_bar_sync. `threads` counts both.
__device__ __forceinline__ void named_bar_arrive(int id, int threads) {
#ifdef MOE_EXT_EMULATOR
  emulator::barrier(id, threads, emulator::kBarrierArrive, 0);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- cp.async of 4 and 8 bytes, through L1 (.ca); see cp_async_16 ------------------------

__device__ __forceinline__ void cp_async_4(uint32_t target, const void* source, int bytes = 4) {
#ifdef MOE_EXT_EMULATOR
  emulator::cp_async(target, source, 4, bytes);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_8(uint32_t target, const void* source, int bytes = 8) {
#ifdef MOE_EXT_EMULATOR
  emulator::cp_async(target, source, 8, bytes);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(source), "r"(bytes)
               : "memory");
#endif
}

// ---- ldmatrix of one and two matrices; see ldmatrix_x4 ------------------------------------
//
// x1 and x2 read the addresses of lanes 0 to 7 and 0 to 15; the others' must be valid all the
// same.

__device__ __forceinline__ void ldmatrix_x1(uint32_t& r, uint32_t row) {
#ifdef MOE_EXT_EMULATOR
  emulator::ldmatrix(&r, row, 1, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r)
               : "r"(row)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t& r, uint32_t row) {
#ifdef MOE_EXT_EMULATOR
  emulator::ldmatrix(&r, row, 1, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r)
               : "r"(row)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
#ifdef MOE_EXT_EMULATOR
  emulator::ldmatrix(r, row, 2, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
#ifdef MOE_EXT_EMULATOR
  emulator::ldmatrix(r, row, 2, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
#endif
}

// ---- flags between blocks -------------------------------------------------------------

// Reads a flag; what its writer wrote before st_release is visible after it. A block may
// spin on it only for a block that is sure to run: one with a lower ticket.
__device__ __forceinline__ uint32_t ld_acquire(const uint32_t* flag) {
#ifdef MOE_EXT_EMULATOR
  return emulator::ld_acquire(flag);
#else
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
#endif
}

// Sets a flag, after everything that this thread has written.
__device__ __forceinline__ void st_release(uint32_t* flag, uint32_t value) {
#ifdef MOE_EXT_EMULATOR
  emulator::st_release(flag, value);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#endif
}

}  // namespace moe_ext::cuda::ptx

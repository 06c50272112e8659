// Instructions that CUDA C++ has no word for: one function each, and no inline assembly
// anywhere else in csrc; Hopper's own are in ptx_sm90.cuh. Every function has two halves, the
// instruction for nvcc and the emulator's account of it, and a test in tests/emulator
// (test_primitives.py, test_hopper.py) that holds both to the PTX manual. More of them, which
// no kernel needs so far, are in tests/emulator/kernels/more_ptx.cuh.
//
// Where a function is a warp's (ldmatrix, mma) all 32 lanes call it together. Lanes are
// counted as the manual does: group = lane / 4, of 8; member = lane % 4.
#pragma once

#include "platform.cuh"

namespace moe_ext::cuda::ptx {

// A pointer into shared memory as the 32-bit address that the instructions below take.
__device__ __forceinline__ uint32_t smem_u32(const void* pointer) {
#ifdef MOE_EXT_EMULATOR
  return emulator::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// ---- named barriers: 0 is __syncthreads, 1 to 15 are free ------------------------

// Waits until `threads` threads (whole warps) have come to barrier `id`. What they wrote
// before is then visible to all of them.
__device__ __forceinline__ void named_bar_sync(int id, int threads) {
#ifdef MOE_EXT_EMULATOR
  emulator::barrier(id, threads, emulator::kBarrierSync, 0);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- cp.async: copies from global to shared memory that run beside the thread --------
//
// A copy moves 16 bytes, past L1 (.cg); both addresses are multiples of that. Only the first
// `bytes` are read, the rest of the target becomes zero: with 0, `source` is not read at
// all, but must still be a valid pointer. The target may be touched after
// cp_async_wait, by this thread; by others after a barrier behind it.

__device__ __forceinline__ void cp_async_16(uint32_t target, const void* source, int bytes = 16) {
#ifdef MOE_EXT_EMULATOR
  emulator::cp_async(target, source, 16, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
#endif
}

// Makes a group, perhaps an empty one, of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#ifdef MOE_EXT_EMULATOR
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the N youngest groups of this thread are unfinished.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#ifdef MOE_EXT_EMULATOR
  emulator::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements from shared memory --------------------
//
// Lane 8 m + r gives the address of row r of matrix m: 16 bytes, aligned to 16. Register m
// of a lane then holds elements (group, 2 member) and (group, 2 member + 1) of matrix m,
// the lower column in the lower half; with _trans elements (2 member, group) and
// (2 member + 1, group), as of the transposed matrix.

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
#ifdef MOE_EXT_EMULATOR
  emulator::ldmatrix(r, row, 4, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
#ifdef MOE_EXT_EMULATOR
  emulator::ldmatrix(r, row, 4, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#endif
}

// ---- mma: C += A B on the tensor cores, accumulated in float32 ------------------------
//
// C is 16x8: c[0], c[1] are (group, 2 member), (group, 2 member + 1); c[2], c[3] the same
// of row group + 8.
//
// 16-bit elements, two a register, the lower column (of A) or row (of B) in the lower
// half. A is 16x16: a[0] is (group, 2 member..), a[1] (group + 8, 2 member..), a[2] and
// a[3] the same with columns + 8: what ldmatrix_x4 gives for the four quarters in the order
// top left, bottom left, top right, bottom right. B is 16x8: b[0] is (2 member.., group),
// b[1] (2 member + 8.., group): what ldmatrix gives of B's transpose, stored row by row.

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
#ifdef MOE_EXT_EMULATOR
  emulator::mma(emulator::kMmaBf16, c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
#ifdef MOE_EXT_EMULATOR
  emulator::mma(emulator::kMmaF16, c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// tf32: a float32 of which the lower 13 bits are ignored; see to_tf32. A is 16x8: a[0] is
// (group, member), a[1] (group + 8, member), a[2] and a[3] the same with columns + 4. B is
// 8x8: b[0] is (member, group), b[1] (member + 4, group).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
#ifdef MOE_EXT_EMULATOR
  emulator::mma(emulator::kMmaTf32, c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The nearest tf32 (ties away from zero), as bits. Without it mma would round towards zero,
// which biases a sum.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef MOE_EXT_EMULATOR
  return emulator::to_tf32(x);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// ---- approximations, by the special function unit ------------------------------------
//
// Subnormal numbers are zeros, of inputs and of results (.ftz); beyond the range there are
// infinities, and NaN stays NaN.

// 2^x, at most 2 units of the last place off.
__device__ __forceinline__ float ex2_approx(float x) {
#ifdef MOE_EXT_EMULATOR
  return emulator::ex2_approx(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x, at most 1 unit of the last place off.
__device__ __forceinline__ float rcp_approx(float x) {
#ifdef MOE_EXT_EMULATOR
  return emulator::rcp_approx(x);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace moe_ext::cuda::ptx

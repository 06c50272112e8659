// Hopper's instructions, in the manner of ptx.cuh: mbarriers, TMA, wgmma, stmatrix, registers
// that move between warps. What uses them is compiled for sm_90a, and for nothing else.
//
// Shared memory has two readers: threads, and the async proxy, through which TMA and wgmma
// go. What threads wrote is the async proxy's to read after fence_proxy_async, by each thread
// that wrote, before the barrier that tells of it.
#pragma once

#include <cuda.h>

#include "ptx.cuh"

namespace moe_ext::cuda::ptx {

// ---- mbarrier: arrivals and bytes, counted together ------------------------------------
//
// A barrier of 8 bytes in shared memory, in phases: one ends when `arrivals` have come and as
// many bytes have landed as were expected, and the next begins. A thread waits for the end of
// the phase of a parity: 0 for the first, third, ...; of parity 1 it passes at once as long
// as the first has not ended.

// By one thread. The others may use the barrier behind fence_mbarrier_init, by the same
// thread, and a __syncthreads.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
#ifdef MOE_EXT_EMULATOR
  emulator::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

__device__ __forceinline__ void fence_mbarrier_init() {
#ifdef MOE_EXT_EMULATOR
  emulator::fence_mbarrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
#ifdef MOE_EXT_EMULATOR
  emulator::mbarrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// Arrives, and makes the phase wait for `bytes` more.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
#ifdef MOE_EXT_EMULATOR
  emulator::mbarrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef MOE_EXT_EMULATOR
  emulator::mbarrier_wait(barrier, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// See above. Both are needed on the way from a thread's store to TMA or wgmma.
__device__ __forceinline__ void fence_proxy_async() {
#ifdef MOE_EXT_EMULATOR
  emulator::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- TMA: boxes of a tensor, copied by one thread's order --------------------------------
//
// The map says what the tensor is, which box of it is copied and how its rows are swizzled;
// coordinates count elements, the innermost dimension first. What lies outside of the tensor
// is read as zeros and not written. The map is a __grid_constant__ parameter of the kernel.

// Copies a box to `target`, a multiple of 128, or of 1024 where the map swizzles by 128
// bytes. The whole box's bytes, zeros too, are counted on the barrier.
template <int dims>
__device__ __forceinline__ void tma_load(uint32_t target, const CUtensorMap& map, uint32_t barrier,
                                         const int (&at)[dims]) {
  static_assert(dims >= 2 && dims <= 5);
#ifdef MOE_EXT_EMULATOR
  emulator::tma_load(target, map, barrier, at, dims);
#else
  const auto address = reinterpret_cast<uint64_t>(&map);
#define MOE_EXT_TMA_LOAD(DIMS, COORDINATES, ...)                                       \
  asm volatile("cp.async.bulk.tensor." DIMS                                            \
               ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, " \
               "{" COORDINATES "}], [%2];" ::"r"(target),                              \
               "l"(address), "r"(barrier), __VA_ARGS__                                 \
               : "memory")
  if constexpr (dims == 2) MOE_EXT_TMA_LOAD("2d", "%3, %4", "r"(at[0]), "r"(at[1]));
  if constexpr (dims == 3) MOE_EXT_TMA_LOAD("3d", "%3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  if constexpr (dims == 4)
    MOE_EXT_TMA_LOAD("4d", "%3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  if constexpr (dims == 5)
    MOE_EXT_TMA_LOAD("5d", "%3, %4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
                     "r"(at[4]));
#undef MOE_EXT_TMA_LOAD
#endif
}

// Copies the box from `source`, placed as for tma_load.
template <int dims>
__device__ __forceinline__ void tma_store(const CUtensorMap& map, uint32_t source,
                                          const int (&at)[dims]) {
  static_assert(dims >= 2 && dims <= 5);
#ifdef MOE_EXT_EMULATOR
  emulator::tma_store(map, source, at, dims);
#else
  const auto address = reinterpret_cast<uint64_t>(&map);
#define MOE_EXT_TMA_STORE(DIMS, COORDINATES, ...)          \
  asm volatile("cp.async.bulk.tensor." DIMS                \
               ".global.shared::cta.tile.bulk_group [%0, " \
               "{" COORDINATES "}], [%1];" ::"l"(address), \
               "r"(source), __VA_ARGS__                    \
               : "memory")
  if constexpr (dims == 2) MOE_EXT_TMA_STORE("2d", "%2, %3", "r"(at[0]), "r"(at[1]));
  if constexpr (dims == 3)
    MOE_EXT_TMA_STORE("3d", "%2, %3, %4", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  if constexpr (dims == 4)
    MOE_EXT_TMA_STORE("4d", "%2, %3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  if constexpr (dims == 5)
    MOE_EXT_TMA_STORE("5d", "%2, %3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
                      "r"(at[4]));
#undef MOE_EXT_TMA_STORE
#endif
}

// Makes a group of this thread's stores since the last one.
__device__ __forceinline__ void tma_store_commit() {
#ifdef MOE_EXT_EMULATOR
  emulator::tma_store_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until at most the N youngest groups of this thread still read shared memory.
template <int N>
__device__ __forceinline__ void tma_store_wait_read() {
#ifdef MOE_EXT_EMULATOR
  emulator::tma_store_wait(N, true);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
#endif
}

// Waits until at most the N youngest groups of this thread are not yet written.
template <int N>
__device__ __forceinline__ void tma_store_wait() {
#ifdef MOE_EXT_EMULATOR
  emulator::tma_store_wait(N, false);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- wgmma: D += A B by a warpgroup, which goes on meanwhile ------------------------------
//
// A warpgroup is 4 warps, the first a multiple of 4; all its threads call these functions
// together. A is 64x16 and B 16xN, of 16-bit elements in shared memory, D float32 in
// registers: thread t of the warpgroup has, of row 16 (t / 32) + group (+ 8), columns
// 8 j + 2 member, + 1 as d[4 j], d[4 j + 1] (d[4 j + 2], d[4 j + 3]).
//
// Both operands lie as TMA with a swizzle of 128 bytes leaves them: K-major is rows (of A;
// of B's transpose) of 64 elements along k; MN-major is rows of k, each 64 elements along m or
// n. See descriptor.
//
// Products run in groups. Before the first of them, and whenever D has been touched, comes
// wgmma_fence; D may be touched again after wgmma_wait.

__device__ __forceinline__ void wgmma_fence() {
#ifdef MOE_EXT_EMULATOR
  emulator::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef MOE_EXT_EMULATOR
  emulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most the N youngest groups of this warp are unfinished.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
#ifdef MOE_EXT_EMULATOR
  emulator::wgmma_wait(N);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// An operand at `address`, of 128-byte rows in groups of 8, which are 1024 bytes and a
// multiple of it. K-major: `stride` is the distance from 8 rows to the next 8. The 16 of k
// begin at a multiple of 32 bytes of the row: add them to the address. MN-major: `stride` is
// that from 8 of k to the next 8, `leading` that from 64 of m or n to the next 64.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t stride,
                                               uint32_t leading = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 |
         (address & 0x3ffff) >> 4;
}

// The same operand `bytes` further on, a multiple of 16: an addition, where descriptor is a dozen
// instructions. Only the lower half changes, as addresses are of 18 bits.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  const uint32_t lower = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & 0xffffffff00000000ull) | lower;
}

#define MOE_EXT_D_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MOE_EXT_D_32 \
  MOE_EXT_D_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOE_EXT_D_64                                                                 \
  MOE_EXT_D_32                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MOE_EXT_D_96                                                                 \
  MOE_EXT_D_64                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MOE_EXT_D_128                                                                \
  MOE_EXT_D_96                                                                       \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109" \
  ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122"   \
  ", %123, %124, %125, %126, %127"
#define MOE_EXT_IO_4(I) "+f"(d[I]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3])
#define MOE_EXT_IO_16(I) \
  MOE_EXT_IO_4(I), MOE_EXT_IO_4(I + 4), MOE_EXT_IO_4(I + 8), MOE_EXT_IO_4(I + 12)
#define MOE_EXT_IO_32(I) MOE_EXT_IO_16(I), MOE_EXT_IO_16(I + 16)
#define MOE_EXT_IO_64(I) MOE_EXT_IO_32(I), MOE_EXT_IO_32(I + 32)
#define MOE_EXT_IO_96(I) MOE_EXT_IO_64(I), MOE_EXT_IO_32(I + 64)
#define MOE_EXT_IO_128(I) MOE_EXT_IO_64(I), MOE_EXT_IO_64(I + 64)

// D of `COUNT` registers a thread; A, B, P, TA, TB are the numbers of the operands behind them.
#define MOE_EXT_WGMMA(N, TYPE, COUNT, A, B, P, TA, TB)                                       \
  asm volatile(                                                                              \
      "{\n"                                                                                  \
      ".reg .pred p;\n"                                                                      \
      "setp.ne.b32 p, %" #P                                                                  \
      ", 0;\n"                                                                               \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MOE_EXT_D_##COUNT \
      "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB                                        \
      ";\n"                                                                                  \
      "}"                                                                                    \
      : MOE_EXT_IO_##COUNT(0)                                                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(a_mn)),      \
        "n"(static_cast<int>(b_mn)))

// `accumulate`: else D is what the product is. `a_mn`, `b_mn`: the operand is MN-major.
template <int N, bool bf16, bool a_mn, bool b_mn>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 32 || N == 64 || N == 128 || N == 192 || N == 256);
#ifdef MOE_EXT_EMULATOR
  emulator::wgmma({N, bf16, a_mn, b_mn, accumulate, a, b}, d);
#else
#define MOE_EXT_WGMMA_OF(TYPE)                                               \
  if constexpr (N == 32) MOE_EXT_WGMMA(32, TYPE, 16, 16, 17, 18, 19, 20);    \
  if constexpr (N == 64) MOE_EXT_WGMMA(64, TYPE, 32, 32, 33, 34, 35, 36);    \
  if constexpr (N == 128) MOE_EXT_WGMMA(128, TYPE, 64, 64, 65, 66, 67, 68);  \
  if constexpr (N == 192) MOE_EXT_WGMMA(192, TYPE, 96, 96, 97, 98, 99, 100); \
  if constexpr (N == 256) MOE_EXT_WGMMA(256, TYPE, 128, 128, 129, 130, 131, 132)
  if constexpr (bf16) {
    MOE_EXT_WGMMA_OF("bf16");
  } else {
    MOE_EXT_WGMMA_OF("f16");
  }
#undef MOE_EXT_WGMMA_OF
#endif
}

#undef MOE_EXT_WGMMA
#undef MOE_EXT_IO_128
#undef MOE_EXT_IO_96
#undef MOE_EXT_IO_64
#undef MOE_EXT_IO_32
#undef MOE_EXT_IO_16
#undef MOE_EXT_IO_4
#undef MOE_EXT_D_128
#undef MOE_EXT_D_96
#undef MOE_EXT_D_64
#undef MOE_EXT_D_32
#undef MOE_EXT_D_16

// ---- stmatrix: ldmatrix's reverse ----------------------------------------------------------
//
// Lane 8 m + r gives the address of row r of matrix m, and of matrix m the elements that
// ldmatrix would give it.

__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
#ifdef MOE_EXT_EMULATOR
  emulator::stmatrix(row, r, false);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
#ifdef MOE_EXT_EMULATOR
  emulator::stmatrix(row, r, true);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

// ---- a block's warps, apart ----------------------------------------------------------------

// Whether this lane is the one that acts for its warp, of which all lanes call this.
__device__ __forceinline__ bool elect_one() {
#ifdef MOE_EXT_EMULATOR
  return emulator::elect_one();
#else
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected;
#endif
}

// Registers a thread of this warpgroup, a multiple of 8: gives the others back, or waits
// until so many are free.
template <int count>
__device__ __forceinline__ void give_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
#ifdef MOE_EXT_EMULATOR
  emulator::set_registers(count, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

template <int count>
__device__ __forceinline__ void take_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
#ifdef MOE_EXT_EMULATOR
  emulator::set_registers(count, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

}  // namespace moe_ext::cuda::ptx

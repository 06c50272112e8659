// CUDA C++ as a host compiler sees it: the qualifiers, the built-in variables and the
// intrinsics that kernels use. Types such as float4 and __nv_bfloat16 are CUDA's own
// headers', which a host compiler takes as they are; what those leave to nvcc is here. An
// intrinsic that is missing is added here, as CUDA's manual describes it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulator.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static
// One instance a block: the runtime swaps a thread-local block's content with the block.
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::emulator::thread_idx())
#define blockIdx (::emulator::block_idx())
#define blockDim (::emulator::block_dim())
#define gridDim (::emulator::grid_dim())
static constexpr int warpSize = 32;

// An intrinsic is inlined, so that the runtime finds the kernel's line as its caller. The
// checked build instruments kernels; an intrinsic's own work is not a kernel's access.
#define MOE_EXT_INTRINSIC static inline __attribute__((always_inline, unused, no_sanitize_thread))
// Atomics stay out of line: inlined, their access would be instrumented as a plain one.
#define MOE_EXT_ATOMIC static __attribute__((noinline, unused, no_sanitize_thread))

// ---- synchronisation -----------------------------------------------------------------

MOE_EXT_INTRINSIC void __syncthreads() { emulator::barrier(0, 0, emulator::kBarrierSync, 0); }
MOE_EXT_INTRINSIC int __syncthreads_and(int predicate) {
  return emulator::barrier(0, 0, emulator::kBarrierAnd, predicate);
}
MOE_EXT_INTRINSIC int __syncthreads_or(int predicate) {
  return emulator::barrier(0, 0, emulator::kBarrierOr, predicate);
}
MOE_EXT_INTRINSIC int __syncthreads_count(int predicate) {
  return emulator::barrier(0, 0, emulator::kBarrierCount, predicate);
}
MOE_EXT_INTRINSIC void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::collective(emulator::kSyncWarp, mask, 0);
}
MOE_EXT_INTRINSIC void __threadfence() { emulator::fence(); }
MOE_EXT_INTRINSIC void __threadfence_system() { emulator::fence(); }
MOE_EXT_INTRINSIC void __threadfence_block() {}
MOE_EXT_INTRINSIC void __nanosleep(unsigned) { emulator::pause(); }
MOE_EXT_INTRINSIC unsigned __activemask() { return emulator::active_mask(); }
MOE_EXT_INTRINSIC void __trap() { emulator::trap(); }

// ---- warp ------------------------------------------------------------------------------

template <class T>
MOE_EXT_INTRINSIC T moe_ext_collective(emulator::WarpOp op, unsigned mask, T value,
                                       uint64_t argument = 0) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::collective(op, mask, bits, argument);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
MOE_EXT_INTRINSIC uint64_t moe_ext_shuffle_argument(unsigned lane, int width) {
  return lane | static_cast<uint64_t>(width) << 32;
}
template <class T>
MOE_EXT_INTRINSIC T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return moe_ext_collective(emulator::kShuffle, mask, value, moe_ext_shuffle_argument(lane, width));
}
template <class T>
MOE_EXT_INTRINSIC T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return moe_ext_collective(emulator::kShuffleUp, mask, value,
                            moe_ext_shuffle_argument(delta, width));
}
template <class T>
MOE_EXT_INTRINSIC T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return moe_ext_collective(emulator::kShuffleDown, mask, value,
                            moe_ext_shuffle_argument(delta, width));
}
template <class T>
MOE_EXT_INTRINSIC T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return moe_ext_collective(emulator::kShuffleXor, mask, value,
                            moe_ext_shuffle_argument(lanes, width));
}
MOE_EXT_INTRINSIC unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emulator::collective(emulator::kBallot, mask, predicate != 0));
}
MOE_EXT_INTRINSIC int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulator::collective(emulator::kAny, mask, predicate != 0));
}
MOE_EXT_INTRINSIC int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulator::collective(emulator::kAll, mask, predicate != 0));
}
template <class T>
MOE_EXT_INTRINSIC unsigned __match_any_sync(unsigned mask, T value) {
  return static_cast<unsigned>(moe_ext_collective<uint64_t>(emulator::kMatchAny, mask, [&] {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
  }()));
}
template <class T>
MOE_EXT_INTRINSIC unsigned __match_all_sync(unsigned mask, T value, int* predicate) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const auto result = static_cast<unsigned>(emulator::collective(emulator::kMatchAll, mask, bits));
  *predicate = result != 0;
  return result;
}
MOE_EXT_INTRINSIC unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return moe_ext_collective(emulator::kReduceAdd, mask, value);
}
MOE_EXT_INTRINSIC int __reduce_add_sync(unsigned mask, int value) {
  return moe_ext_collective(emulator::kReduceAdd, mask, value);
}
MOE_EXT_INTRINSIC unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return moe_ext_collective(emulator::kReduceMinUnsigned, mask, value);
}
MOE_EXT_INTRINSIC int __reduce_min_sync(unsigned mask, int value) {
  return moe_ext_collective(emulator::kReduceMinSigned, mask, value);
}
MOE_EXT_INTRINSIC unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return moe_ext_collective(emulator::kReduceMaxUnsigned, mask, value);
}
MOE_EXT_INTRINSIC int __reduce_max_sync(unsigned mask, int value) {
  return moe_ext_collective(emulator::kReduceMaxSigned, mask, value);
}
MOE_EXT_INTRINSIC unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return moe_ext_collective(emulator::kReduceAnd, mask, value);
}
MOE_EXT_INTRINSIC unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return moe_ext_collective(emulator::kReduceOr, mask, value);
}
MOE_EXT_INTRINSIC unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return moe_ext_collective(emulator::kReduceXor, mask, value);
}

// ---- atomics -----------------------------------------------------------------------------

#define MOE_EXT_ATOMIC_OP(NAME, T, NEW)                                            \
  MOE_EXT_ATOMIC T NAME(T* address, T value) {                                     \
    emulator::access(address, sizeof(T), true, true, __builtin_return_address(0)); \
    const T old = *address;                                                        \
    *address = (NEW);                                                              \
    return old;                                                                    \
  }
#define MOE_EXT_ATOMIC_OPS(T)                                                      \
  MOE_EXT_ATOMIC_OP(atomicAdd, T, old + value)                                     \
  MOE_EXT_ATOMIC_OP(atomicSub, T, old - value)                                     \
  MOE_EXT_ATOMIC_OP(atomicExch, T, value)                                          \
  MOE_EXT_ATOMIC_OP(atomicMin, T, value < old ? value : old)                       \
  MOE_EXT_ATOMIC_OP(atomicMax, T, value > old ? value : old)                       \
  MOE_EXT_ATOMIC_OP(atomicAnd, T, old& value)                                      \
  MOE_EXT_ATOMIC_OP(atomicOr, T, old | value)                                      \
  MOE_EXT_ATOMIC_OP(atomicXor, T, old ^ value)                                     \
  MOE_EXT_ATOMIC T atomicCAS(T* address, T expected, T value) {                    \
    emulator::access(address, sizeof(T), true, true, __builtin_return_address(0)); \
    const T old = *address;                                                        \
    if (old == expected) *address = value;                                         \
    return old;                                                                    \
  }
MOE_EXT_ATOMIC_OPS(int)
MOE_EXT_ATOMIC_OPS(unsigned)
MOE_EXT_ATOMIC_OPS(unsigned long long)
// There are none for float and double on purpose: their sums would depend on the order.

// ---- loads and stores with a hint ---------------------------------------------------------

template <class T>
MOE_EXT_INTRINSIC T moe_ext_load(const T* address) {
  return *address;
}
#define __ldg(address) moe_ext_load(address)
#define __ldcs(address) moe_ext_load(address)
#define __ldcg(address) moe_ext_load(address)
#define __ldca(address) moe_ext_load(address)
#define __ldlu(address) moe_ext_load(address)
#define __ldcv(address) moe_ext_load(address)
#define __stcs(address, value) (*(address) = (value))
#define __stcg(address, value) (*(address) = (value))
#define __stwb(address, value) (*(address) = (value))
#define __stwt(address, value) (*(address) = (value))

// ---- bits -----------------------------------------------------------------------------------

template <class To, class From>
MOE_EXT_INTRINSIC To moe_ext_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
MOE_EXT_INTRINSIC unsigned __float_as_uint(float x) { return moe_ext_bits<unsigned>(x); }
MOE_EXT_INTRINSIC int __float_as_int(float x) { return moe_ext_bits<int>(x); }
MOE_EXT_INTRINSIC float __uint_as_float(unsigned x) { return moe_ext_bits<float>(x); }
MOE_EXT_INTRINSIC float __int_as_float(int x) { return moe_ext_bits<float>(x); }
MOE_EXT_INTRINSIC long long __double_as_longlong(double x) { return moe_ext_bits<long long>(x); }
MOE_EXT_INTRINSIC double __longlong_as_double(long long x) { return moe_ext_bits<double>(x); }
MOE_EXT_INTRINSIC int __popc(unsigned x) { return __builtin_popcount(x); }
MOE_EXT_INTRINSIC int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
MOE_EXT_INTRINSIC int __ffs(int x) { return __builtin_ffs(x); }
MOE_EXT_INTRINSIC int __ffsll(long long x) { return __builtin_ffsll(x); }
MOE_EXT_INTRINSIC int __clz(int x) { return x ? __builtin_clz(x) : 32; }
MOE_EXT_INTRINSIC int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
MOE_EXT_INTRINSIC unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
MOE_EXT_INTRINSIC unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
// Byte i of the result is the one of the eight bytes (x the lower four) that nibble i names.
MOE_EXT_INTRINSIC unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7)) & 0xff);
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// ---- mathematics ----------------------------------------------------------------------------

// The C library declares functions of these names, hence macros.
#define __expf(x) (::std::exp(static_cast<float>(x)))
#define __exp2f(x) (::std::exp2(static_cast<float>(x)))
#define __exp10f(x) (::std::pow(10.0f, static_cast<float>(x)))
#define __logf(x) (::std::log(static_cast<float>(x)))
#define __log2f(x) (::std::log2(static_cast<float>(x)))
#define __powf(x, y) (::std::pow(static_cast<float>(x), static_cast<float>(y)))
#define __tanhf(x) (::std::tanh(static_cast<float>(x)))
MOE_EXT_INTRINSIC float __fdividef(float a, float b) { return a / b; }
MOE_EXT_INTRINSIC float __fdiv_rn(float a, float b) { return a / b; }
MOE_EXT_INTRINSIC float __frcp_rn(float a) { return 1.0f / a; }
MOE_EXT_INTRINSIC float __fsqrt_rn(float a) { return std::sqrt(a); }
MOE_EXT_INTRINSIC float __frsqrt_rn(float a) { return 1.0f / std::sqrt(a); }
MOE_EXT_INTRINSIC float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
MOE_EXT_INTRINSIC double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
MOE_EXT_INTRINSIC float __saturatef(float a) { return std::fmin(std::fmax(a, 0.0f), 1.0f); }
MOE_EXT_INTRINSIC float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
MOE_EXT_INTRINSIC double rsqrt(double a) { return 1.0 / std::sqrt(a); }
// Sums and products that nvcc never contracts into an FMA: out of line, as g++ would.
__attribute__((noinline, unused)) static float __fmul_rn(float a, float b) { return a * b; }
__attribute__((noinline, unused)) static float __fadd_rn(float a, float b) { return a + b; }
__attribute__((noinline, unused)) static double __dmul_rn(double a, double b) { return a * b; }
__attribute__((noinline, unused)) static double __dadd_rn(double a, double b) { return a + b; }
MOE_EXT_INTRINSIC int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
MOE_EXT_INTRINSIC int __float2int_rd(float a) { return static_cast<int>(std::floor(a)); }
MOE_EXT_INTRINSIC int __float2int_rz(float a) { return static_cast<int>(a); }
MOE_EXT_INTRINSIC float __int2float_rn(int a) { return static_cast<float>(a); }

#define MOE_EXT_MIN_MAX(T)                                    \
  MOE_EXT_INTRINSIC T min(T a, T b) { return a < b ? a : b; } \
  MOE_EXT_INTRINSIC T max(T a, T b) { return a > b ? a : b; }
MOE_EXT_MIN_MAX(int)
MOE_EXT_MIN_MAX(unsigned)
MOE_EXT_MIN_MAX(long)
MOE_EXT_MIN_MAX(unsigned long)
MOE_EXT_MIN_MAX(long long)
MOE_EXT_MIN_MAX(unsigned long long)
MOE_EXT_INTRINSIC float min(float a, float b) { return std::fmin(a, b); }
MOE_EXT_INTRINSIC float max(float a, float b) { return std::fmax(a, b); }
MOE_EXT_INTRINSIC double min(double a, double b) { return std::fmin(a, b); }
MOE_EXT_INTRINSIC double max(double a, double b) { return std::fmax(a, b); }

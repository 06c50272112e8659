// Loops that run on the widest vectors of the machine, though the library is
// compiled for any machine of its kind: a kernel is a struct with one always-inline
// `run`; `simd_call<Kernel>(arguments)` holds one copy of it for every instruction
// set and picks at run time. Whatever `run` calls must be always-inline as well, and
// lambdas in it would not take its instruction set over.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/kernels.h"

#if defined(__GNUC__) || defined(__clang__)
#define MOE_EXT_INLINE inline __attribute__((always_inline))
#else
#define MOE_EXT_INLINE inline
#endif

namespace moe_ext {

#if defined(__x86_64__) && defined(__GNUC__)

template <typename Kernel, typename... Args>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))) void simd_call_avx512(
    Args... args) {
  Kernel::run(args...);
}

template <typename Kernel, typename... Args>
__attribute__((target("avx2,fma,f16c"))) void simd_call_avx2(Args... args) {
  Kernel::run(args...);
}

template <typename Kernel, typename... Args>
void simd_call(Args... args) {
  switch (cpu::instruction_set()) {
    case cpu::Isa::avx512:
    case cpu::Isa::avx512_bf16:
      return simd_call_avx512<Kernel>(args...);
    case cpu::Isa::avx2:
      return simd_call_avx2<Kernel>(args...);
    default:
      return Kernel::run(args...);
  }
}

#else

template <typename Kernel, typename... Args>
void simd_call(Args... args) {
  Kernel::run(args...);
}

#endif

template <typename To, typename From>
MOE_EXT_INLINE To bit_cast(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// What a dtype is accumulated in.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Conversions to and from the accumulation's type, by integer operations, so that a
// loop over them becomes vector code on every machine. Rounding is to nearest even.
MOE_EXT_INLINE float widen(float x) { return x; }
MOE_EXT_INLINE double widen(double x) { return x; }
MOE_EXT_INLINE float widen(c10::BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.x) << 16);
}
MOE_EXT_INLINE float widen(c10::Half x) {
  const uint32_t bits = x.x, magnitude = (bits & 0x7fffu) << 13;
  // Moves the exponent's bias from 15 to 127, subnormal numbers included.
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(scaled | special | (bits & 0x8000u) << 16);
}

template <typename T, typename A>
MOE_EXT_INLINE T narrow(A x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const float f = static_cast<float>(x);
    const uint32_t bits = bit_cast<uint32_t>(f);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return c10::BFloat16(static_cast<uint16_t>(f != f ? 0x7fc0u : rounded),
                         c10::BFloat16::from_bits());
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    const float f = static_cast<float>(x);
    const uint32_t bits = bit_cast<uint32_t>(f), magnitude = bits & 0x7fffffffu;
    // Overflows what is too large, then adds a power of two at which float32's last
    // bit is float16's (never below that of its subnormal numbers).
    const float base = bit_cast<float>(magnitude) * 0x1p112f * 0x1p-110f;
    const uint32_t exponent = magnitude & 0x7f800000u;
    const uint32_t bias = (exponent < 0x38800000u ? 0x38800000u : exponent) + 0x07800000u;
    const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>(bias) + base);
    const uint32_t half = (sum >> 13 & 0x7c00u) + (sum & 0x0fffu);
    return c10::Half(static_cast<uint16_t>((bits >> 16 & 0x8000u) | (f != f ? 0x7e00u : half)),
                     c10::Half::from_bits());
  } else {
    return static_cast<T>(x);
  }
}

// exp(x) for x <= 0, within 1 ulp, in operations that every vector unit has; 0 below
// the normal numbers; NaN stays NaN.
MOE_EXT_INLINE float exp_nonpositive(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  // A mask, not a branch around the product: without AVX-512 that would keep loops scalar.
  const uint32_t keep = x < -87.0f ? 0u : ~0u;
  return bit_cast<float>(bit_cast<uint32_t>(p * power) & keep);
}

MOE_EXT_INLINE double exp_nonpositive(double x) { return std::exp(x); }

template <typename A>
MOE_EXT_INLINE A sigmoid(A x) {
  const A e = exp_nonpositive(x < A(0) ? x : -x);
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}

}  // namespace moe_ext

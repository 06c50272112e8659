// AVX-512 with BF16: bfloat16 is multiplied as it is, two products a lane. All else is AVX-512's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

// All headers stand above this line: what follows may use the instructions, nothing else may.
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#define MOE_VECTOR_BYTES 64
#define MOE_MULTIPLIES_BF16

namespace moe_ext::cpu {
namespace with_bf16 {

#include "avx512.inl"

}  // namespace with_bf16

extern const Kernels<bf16> avx512_bf16_products = with_bf16::products<bf16>();

}  // namespace moe_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

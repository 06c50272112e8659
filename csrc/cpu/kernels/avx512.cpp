// AVX-512: 32 registers of 64 bytes.

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
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define MOE_VECTOR_BYTES 64

namespace moe_ext::cpu {
namespace avx512 {

#include "avx512.inl"

}  // namespace avx512

extern const Table avx512_table = avx512::table();

}  // namespace moe_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

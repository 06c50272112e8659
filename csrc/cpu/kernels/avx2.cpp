// AVX2 with FMA: 16 registers of 32 bytes.

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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define MOE_VECTOR_BYTES 32

namespace moe_ext::cpu {
namespace avx2 {

constexpr int MR_NT_FEW = 6, MR_NT = 1, MR_NN = 6, MR_WIDE = 3;
constexpr int NR_VECTORS = 3, kRegisterSums = 12;
// Eight rows, often a power of two apart, would take all ways of the first-level cache.
constexpr int kWeightRowsAtOnce = 4;
// The processor's own prefetcher follows one stream in a page.
constexpr int64_t kShortRow = 2048;
constexpr int kDepthUnroll = 4;
constexpr bool kManyReadInPlace = false;

#include "all.inl"

}  // namespace avx2

extern const Table avx2_table = avx2::table();

}  // namespace moe_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

// Any processor: what the compiler makes of 16-byte vectors (SSE2, NEON).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

#define MOE_VECTOR_BYTES 16

namespace moe_ext::cpu {
namespace baseline {

constexpr int MR_NT_FEW = 2, MR_NT = 1, MR_NN = 4, MR_WIDE = 2;
constexpr int NR_VECTORS = 1, kRegisterSums = 8;
constexpr int kWeightRowsAtOnce = 8;
constexpr int64_t kShortRow = 0;
constexpr int kDepthUnroll = 1;
constexpr bool kManyReadInPlace = true;

#include "all.inl"

}  // namespace baseline

extern const Table baseline_table = baseline::table();

}  // namespace moe_ext::cpu

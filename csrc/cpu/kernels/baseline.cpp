// Any processor: what the compiler makes of 16-byte vectors (SSE2, NEON).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define MOE_VECTOR_BYTES 16

namespace moe_ext::cpu {
namespace baseline {

// The heights of the register tiles: as many sums as leave registers for the operands.
constexpr int kTallTileNT = 2, kTileNT = 1, kTileNN = 4, kTileWide = 2;
constexpr int kPanelVectors = 1, kPanelSums = 8;
// Rows of weights that at most kTileNT rows read at once.
constexpr int kWeightRowsNT = 8;
// Bytes of a row of weights up to which the rows ahead are prefetched one after the other.
constexpr int64_t kShortRow = 0;
// Steps along k that a tile's loop takes at once.
constexpr int kDepthUnroll = 1;
// Whether many rows, too, read weights across k where they lie, if these need no conversion.
constexpr bool kManyReadInPlace = true;

#include "all.inl"

}  // namespace baseline

extern const Kernels<float> baseline_float = baseline::table<float>("baseline");
extern const Kernels<double> baseline_double = baseline::table<double>("baseline");

}  // namespace moe_ext::cpu

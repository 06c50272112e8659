// What AVX-512 has to say before all.inl, with and without products of bf16.

constexpr int MR_NT_FEW = 6, MR_NT = 3, MR_NN = 12, MR_WIDE = 6;
constexpr int NR_VECTORS = 3, kRegisterSums = 24;
constexpr int kWeightRowsAtOnce = 4;
constexpr int64_t kShortRow = 0;
constexpr int kDepthUnroll = 1;
constexpr bool kManyReadInPlace = true;

#include "all.inl"

// What AVX-512 has to say before all.inl, with and without products of bf16.

constexpr int kTallTileNT = 6, kTileNT = 3, kTileNN = 12, kTileWide = 6;
constexpr int kPanelVectors = 3, kTileSums = 24;
constexpr int kWeightRowsNT = 4;
constexpr int64_t kShortRow = 0;
constexpr int kDepthUnroll = 1;
constexpr bool kManyReadInPlace = true;

#include "all.inl"

// Everything an instruction set's file compiles, inside its own namespace, in the order
// in which each part needs the ones before.
//
// Before it, an instruction set says
//
//   kTallTileNT, kTileNT, kTileNN, kTileWide
//                     the heights of the register tiles: as many sums as leave registers for the
//                     operands
//   kPanelVectors     the widest panel
//   kTileSums         the most sums of a tile that reads eight rows of weights
//   kWeightRowsNT     the most of them that few rows read at once
//   kShortRow         bytes of a row of weights up to which the rows ahead are prefetched one
//                     after the other
//   kDepthUnroll      steps along k that a tile's loop takes at once
//   kManyReadInPlace  whether many rows, too, read weights across k where they lie, if these
//                     need no conversion

// clang-format off
#include "simd.inl"
#include "rows.inl"
#include "transpose.inl"
#include "tiles.inl"
#include "block.inl"
#include "gemm.inl"
#include "activation.inl"
#include "table.inl"

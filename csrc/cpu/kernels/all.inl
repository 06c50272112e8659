// Everything an instruction set's file compiles, inside its own namespace, in the order
// in which each part needs the ones before.
//
// Before it, an instruction set says
//
//   MR_NT_FEW, MR_NT, MR_NN, MR_WIDE
//                      rows of a tile of each microkernel: as many sums as leave registers for
//                      the operands
//   NR_VECTORS         the widest micropanel of packed rows
//   kRegisterSums      the most sums of a tile that reads eight rows of weights
//   kWeightRowsAtOnce  the most of them that few rows read at once
//   kShortRow          bytes of a row of weights up to which the rows ahead are prefetched one
//                      after the other
//   kDepthUnroll       steps along k that a microkernel's loop takes at once
//   kManyReadInPlace   whether many rows, too, read weights across k where they lie, if these
//                      need no conversion

// clang-format off
#include "simd.inl"
#include "conversions.inl"
#include "exp.inl"
#include "transpose.inl"
#include "microkernels.inl"
#include "packing.inl"
#include "gemm.inl"
#include "gemm_tn.inl"
#include "activation.inl"
#include "router_logits.inl"
#include "topk_route.inl"
#include "weighted_combine.inl"
#include "accumulate_stats.inl"
#include "sums.inl"
#include "table.inl"

// Everything an instruction set's file compiles, inside its own namespace, in the order
// in which each part needs the ones before.
// clang-format off
#include "simd.inl"
#include "rows.inl"
#include "transpose.inl"
#include "tiles.inl"
#include "block.inl"
#include "gemm.inl"
#include "activation.inl"
#include "table.inl"

// Everything an instruction set's file compiles, inside its own namespace.
#include "activation.inl"
#include "gemm.inl"
#include "rows.inl"
#include "simd.inl"
#include "table.inl"

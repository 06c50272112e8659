// Hopper's tensor cores, for grouped_ffn.cu's table: what they can take, and how it is
// launched. The kernels are in grouped_gemm_sm90.cuh.
#pragma once

#include <cuda.h>

#include "grouped_ffn.h"

namespace moe_ext::cuda {

// bfloat16 and float16 on sm_90, by a library with code for sm_90a, of which every operand is
// one that TMA can copy: as for sm80_takes, and besides results of whole 16 bytes; up to 512
// experts, with more than 64 rows on the average (any number, where the choice may not depend
// on it).
bool sm90_takes(const RowsGemm& gemm);
bool sm90_takes(const WeightGradient& gradient);

// Whether these kernels are for this GPU, and only its driver keeps them from it: it makes no
// maps. `data`: any memory of the device.
bool sm90_is_refused(int sm, const void* data);

// Of a kBackward epilogue: the first dimension of score_parts.
int64_t sm90_column_tiles(const RowsGemm& gemm);

cudaError_t sm90_rows_gemm(const RowsGemm& gemm, cudaStream_t stream);
cudaError_t sm90_weight_gradient(const WeightGradient& gradient, cudaStream_t stream);

namespace sm90 {

constexpr int kTileM = 128, kTileN = 256, kTileK = 64;
constexpr int kMostExperts = 512;  // whose offsets have room in shared memory
constexpr int kSlice = 64;         // rows and columns of a box on its way out

// What a launch tells TMA: of the full product and of the low-rank part, and of the epilogue's
// matrices. a: of rows that are not gathered.
struct RowsGemmMaps {
  CUtensorMap a[2], w[2], out, kept, dh;
};

// b: the rows that are not gathered, q or (is_swapped) p; out: of the gradient.
struct WeightGradientMaps {
  CUtensorMap b, out;
};
// Whether q is the one that is gathered: the tile's rows are then q's columns.
inline bool is_swapped(const WeightGradient& gradient) { return gradient.q.index != nullptr; }

// T: bf16 or f16; each compiled apart, in grouped_gemm_sm90_*.cu.
template <class T>
cudaError_t rows_gemm(const RowsGemmMaps& maps, const RowsGemm& gemm, cudaStream_t stream);
template <class T>
cudaError_t weight_gradient(const WeightGradientMaps& maps, const WeightGradient& gradient,
                            cudaStream_t stream);

}  // namespace sm90
}  // namespace moe_ext::cuda

// The tensor cores of sm_80 and up, for grouped_ffn.cu's table: what they can take, and
// how it is launched. The kernels are in grouped_gemm_sm80.cuh.
#pragma once

#include "grouped_ffn.h"

namespace moe_ext::cuda {

// bfloat16 and float16, and float32 where tf32 is allowed; operands that 16-byte copies
// can read: one stride of 1, all others, the addresses and the length along the stride of 1
// multiples of 16 bytes; a low-rank part that lies like the full one.
bool sm80_takes(const RowsGemm& gemm);
bool sm80_takes(const WeightGradient& gradient);

// Of a kBackward epilogue: the first dimension of score_parts.
int64_t sm80_column_tiles(const RowsGemm& gemm);

cudaError_t sm80_rows_gemm(const RowsGemm& gemm, cudaStream_t stream);
cudaError_t sm80_weight_gradient(const WeightGradient& gradient, cudaStream_t stream);

namespace sm80 {

constexpr int kTileN = 128;       // columns of a tile
constexpr int kFewestRows = 16;   // rows of the smallest tile of a RowsGemm
constexpr int kWeightRows = 128;  // of the smallest tile of a WeightGradient

// T: bf16, f16, or float for tf32; each compiled apart, in grouped_gemm_sm80_*.cu.
template <class T>
cudaError_t rows_gemm(const RowsGemm& gemm, cudaStream_t stream);
template <class T>
cudaError_t weight_gradient(const WeightGradient& gradient, cudaStream_t stream);

}  // namespace sm80
}  // namespace moe_ext::cuda

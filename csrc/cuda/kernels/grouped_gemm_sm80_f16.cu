#include "grouped_gemm_sm80_tiles.cuh"

namespace moe_ext::cuda::sm80 {

template cudaError_t rows_gemm<f16>(const RowsGemm&, cudaStream_t);
template cudaError_t weight_gradient<f16>(const WeightGradient&, cudaStream_t);

}  // namespace moe_ext::cuda::sm80

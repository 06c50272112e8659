#include "grouped_gemm_sm80_tiles.cuh"

namespace moe_ext::cuda::sm80 {

template cudaError_t rows_gemm<float>(const RowsGemm&, cudaStream_t);
template cudaError_t weight_gradient<float>(const WeightGradient&, cudaStream_t);

}  // namespace moe_ext::cuda::sm80

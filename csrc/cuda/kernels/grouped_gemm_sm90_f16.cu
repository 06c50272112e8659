#include "grouped_gemm_sm90.cuh"

namespace moe_ext::cuda::sm90 {

template cudaError_t rows_gemm<f16>(const RowsGemmMaps&, const RowsGemm&, cudaStream_t);
template cudaError_t weight_gradient<f16>(const WeightGradientMaps&, const WeightGradient&,
                                          cudaStream_t);

}  // namespace moe_ext::cuda::sm90

// Which products the tensor cores of sm_80 can take, and the way to their dtype's kernels.

#include "dtypes.cuh"
#include "grouped_gemm_sm80.h"
#include "tiles.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int64_t kMost = 0x7fffffff;  // blocks of a grid; what an int can count

bool has_dtype(const GemmContext& context) {
  if (context.sm < 80) return false;
  return context.dtype == Dtype::bf16 || context.dtype == Dtype::f16 ||
         (context.dtype == Dtype::f32 && context.allow_tf32);
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
bool is_aligned(int64_t elements, Dtype dtype) { return elements * size_of(dtype) % 16 == 0; }

// Rows of `length` elements.
bool is_aligned(const RowMatrix& rows, int64_t length, Dtype dtype) {
  return is_aligned(rows.data) && is_aligned(rows.stride, dtype) && is_aligned(length, dtype);
}

bool fits(int64_t row_tiles, int64_t columns) {
  return row_tiles * ((columns + sm80::kTileN - 1) / sm80::kTileN) <= kMost;
}

}  // namespace

bool sm80_takes(const RowsGemm& gemm) {
  const Dtype dtype = gemm.context.dtype;
  const int64_t columns = gemm.epilogue.columns;
  const bool k_major = gemm.full.w.k_stride == 1;
  const auto takes = [&](const Product& p) {
    return is_aligned(p.a, p.k, dtype) &&
           (k_major ? p.w.k_stride == 1 : p.w.n_stride == 1 && is_aligned(columns, dtype)) &&
           is_aligned(p.w.data) && is_aligned(k_major ? p.w.n_stride : p.w.k_stride, dtype) &&
           is_aligned(p.w.expert_stride, dtype) && p.k * size_of(dtype) <= kMost;
  };
  return has_dtype(gemm.context) && takes(gemm.full) &&
         (gemm.low_rank.k == 0 || takes(gemm.low_rank)) &&
         fits(most_row_tiles(gemm.context.rows, gemm.context.experts, sm80::kFewestRows),
              2 * columns);
}

bool sm80_takes(const WeightGradient& gradient) {
  const Dtype dtype = gradient.context.dtype;
  const int64_t row_tiles = (gradient.m + sm80::kWeightRows - 1) / sm80::kWeightRows;
  return has_dtype(gradient.context) && is_aligned(gradient.p, gradient.m, dtype) &&
         is_aligned(gradient.q, gradient.n, dtype) &&
         fits(gradient.context.experts * row_tiles, gradient.n);
}

int64_t sm80_column_tiles(const RowsGemm& gemm) {
  return (gemm.epilogue.columns + sm80::kTileN - 1) / sm80::kTileN;
}

cudaError_t sm80_rows_gemm(const RowsGemm& gemm, cudaStream_t stream) {
  switch (gemm.context.dtype) {
    case Dtype::bf16:
      return sm80::rows_gemm<bf16>(gemm, stream);
    case Dtype::f16:
      return sm80::rows_gemm<f16>(gemm, stream);
    default:
      return sm80::rows_gemm<float>(gemm, stream);
  }
}

cudaError_t sm80_weight_gradient(const WeightGradient& gradient, cudaStream_t stream) {
  switch (gradient.context.dtype) {
    case Dtype::bf16:
      return sm80::weight_gradient<bf16>(gradient, stream);
    case Dtype::f16:
      return sm80::weight_gradient<f16>(gradient, stream);
    default:
      return sm80::weight_gradient<float>(gradient, stream);
  }
}

}  // namespace moe_ext::cuda

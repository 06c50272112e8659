// Tokens and their rows on a GPU: what csrc/cuda's ops tell the kernels. No torch.
//
// weighted_combine is the first launcher, its backward the second. Without weights the
// same two are gather_rows, the other way round: a gather is the gradient of a plain sum.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtypes.h"

namespace moe_ext::cuda {

// All tensors are contiguous; rows are of `dtype` and `hidden` long.
struct TokenRows {
  int64_t tokens, top_k, hidden, rows;  // T, K, H, R
  Dtype dtype;
  Dtype accumulate;               // f64, or f32 where neither rows nor weights are float64
  const int32_t* assignment_row;  // (T, K): below 0, or no row at all: nothing
  const void* weights;            // (T, K); null: all are 1
  Dtype weights_dtype;
};

// y[t] = sum over j in ascending order of weights[t][j] * rows[assignment_row[t][j]]
struct TokenSums {
  TokenRows plan;
  const void* rows;  // (R, H)
  void* y;           // (T, H)
};
cudaError_t sum_token_rows(const TokenSums& sums, cudaStream_t stream);

// drows[assignment_row[t][j]] = weights[t][j] * dy[t], and 0 for rows without an owner;
// dweights[t][j] = <dy[t], rows[assignment_row[t][j]]>, and 0 for a dropped assignment.
struct TokenSumsGradient {
  TokenRows plan;
  const int32_t* row_owner;  // (R): not in 0..owners-1 where a row has no owner
  int64_t owners;
  const void* dy;    // (T, H)
  const void* rows;  // (R, H); read for dweights only
  void* drows;       // (R, H), or null: not wanted
  void* dweights;    // (T, K) of weights_dtype, or null
};
cudaError_t sum_token_rows_backward(const TokenSumsGradient& gradient, cudaStream_t stream);

}  // namespace moe_ext::cuda

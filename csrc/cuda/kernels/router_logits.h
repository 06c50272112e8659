// router_logits on a GPU: what csrc/cuda/router_logits.cpp tells the kernels. No torch.
//
// Its three products are one kernel:  out (M, N) = a (M, K) b (N, K)^T.
//
//   logits (T, E) = x W^T + bias     a = x,    b = W      K = H
//   dx     (T, H) = G W              a = G,    b = W^T    K = E
//   dW     (E, H) = G^T x            a = G^T,  b = x^T    K = T
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtypes.h"

namespace moe_ext::cuda {

// Element (row, k) at data + row * stride + k where elements are neighbours along depth, else
// at data + row + k * stride.
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t stride;
  bool along_depth;
};

struct RouterProduct {
  int64_t m, n, k;
  Operand a, b;
  bool is_double;    // accumulates in float64, else in float32
  const void* bias;  // (N), added to every row, or null
  Dtype bias_dtype;
  void* out;  // (M, N) contiguous
  Dtype out_dtype;

  // k is cut into so many pieces (plan_splits' answer), each summed by blocks of its own.
  int64_t splits, k_per_split;
  void* parts;  // (splits, M, N) of the accumulation's type, where splits > 1
};

// How finely k is cut. The pieces of kFixed are such that an element of `out` has the same
// bits whether k was cut or not, so they may follow M; those of kFree depend on M, N and K.
enum class Splits { kFixed, kFree };
void plan_splits(RouterProduct& product, Splits splits);
cudaError_t router_product(const RouterProduct& product, cudaStream_t stream);

// out (N) = the sum over rows of a (M, N): added in float64, run of rows by
// run of rows.
struct ColumnSums {
  int64_t m, n;
  bool is_double;
  const void* a;  // (M, N) contiguous, of the accumulation's type, as is out
  void* out;
  double* parts;  // (column_sum_blocks(m), N)
};
int64_t column_sum_blocks(int64_t m);
cudaError_t column_sums(const ColumnSums& sums, cudaStream_t stream);

}  // namespace moe_ext::cuda

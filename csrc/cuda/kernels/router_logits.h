// router_logits on a GPU: what csrc/cuda/router_logits.cpp tells the kernels. No torch.
//
// Its three products are one:  out (M, N) = a (M, K) b (N, K)^T.
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

constexpr int kRouterSlab = 256;  // terms that meet in one accumulator

struct RouterProduct {
  int64_t m, n, k;
  Operand a, b;
  const void* a_rest;  // on tensor cores: lies as a does, and is added to it; or null
  bool tensor_cores;   // see router_on_tensor_cores
  bool is_double;      // accumulates in float64, else in float32
  const void* bias;    // (N), added to every row, or null
  Dtype bias_dtype;
  void* out;  // (M, N) contiguous
  Dtype out_dtype;

  // k is cut into so many pieces (plan_splits' answer), each summed by blocks of its own.
  int64_t splits, k_per_split;
  void* parts;  // (splits, M, N) of the accumulation's type, where splits > 1
};

// Whether the logits of x (T, H) and a weight (E, H) are multiplied on tensor cores; so are their
// gradients, in bfloat16. It depends on nothing else, so that the same numbers have the same bits
// wherever they lie: the caller copies what 16-byte copies cannot read as it is, which wants
// addresses and strides that are multiples of 16 bytes.
inline bool router_on_tensor_cores(Dtype x, Dtype weight, int64_t hidden) {
  return x == weight && (x == Dtype::bf16 || x == Dtype::f16) && hidden % 8 == 0;
}

// The logits' gradient g (T, E) for tensor cores: halves (2, T, columns) in bfloat16, g rounded and
// what that left; zeros from E on.
struct GradientHalves {
  int64_t rows, experts, columns;
  const float* g;
  void* halves;
};
cudaError_t halve_gradient(const GradientHalves& halves, cudaStream_t stream);

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

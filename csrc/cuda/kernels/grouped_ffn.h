// The experts on a GPU: what csrc/cuda's ops tell the kernels. No torch.
//
// An expert's FFN, forward and backward, is two kinds of grouped matrix product:
//
//   RowsGemm        out[r] = W_e a[r]          for every row r, e its expert (r by r, or a
//                   (+ B_e b[r])               gathered through an index)
//   WeightGradient  out_e = sum over e's rows r of p[r] q[r]^T
//
// Forward is two RowsGemms: up_proj with the gate in its epilogue, then down_proj.
// Backward: dA = dy W_down with the gate's derivative in its epilogue, dX rows =
// dH W_up, and a WeightGradient for each of the two weights. A low-rank part of a weight, W_e
// + B_e A_e, is a product of its own, b = A_e a, and then the second sum. How a weight lies in
// memory (transposed, [gate; up], interleaved) is strides and column numbers, never a copy.
//
// Which kernel runs a product is decided in one table, in grouped_ffn.cu. It knows only
// what the host knows: `expert_offsets` is read on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../activation.h"
#include "dtypes.h"

namespace moe_ext::cuda {

// Row r: neighbouring elements from data + (index ? index[r] : r) * stride. An index outside of
// 0..limit-1 leads nowhere: such a row is read as zeros.
struct RowMatrix {
  const void* data;
  int64_t stride;
  const int32_t* index;
  int64_t limit;
};

// W_e(n, k), of the products' dtype: data + e * expert_stride + n * n_stride + k * k_stride.
// n counts columns of the output in the order of memory: with a gate there are 2I of them.
struct ExpertMatrix {
  const void* data;
  int64_t expert_stride, n_stride, k_stride;
};

// Where element i of the gate and of up stands in a row of 2I preactivations (or of dH, or
// along n of up_proj): gate + i * step and up + i * step. Without a gate only `gate` counts.
struct GateColumns {
  int64_t gate, up, step;
};
constexpr GateColumns gate_columns(const ActivationSpec& spec, int64_t intermediate) {
  if (!spec.gated) return {0, 0, 1};
  if (spec.interleaved) return {0, 1, 2};
  return {0, intermediate, 1};
}

// What becomes of a RowsGemm's accumulators; the bodies are in epilogues.cuh.
enum class EpilogueKind {
  kStore,     // out[r][n] = acc + bias[e][n]
  kActivate,  // h = acc + bias; kept[r] = h; out[r][i] = act(h): n counts I columns, each
              // with the accumulators of a gate and an up column
  kBackward,  // acc is dA[r][i], before the routing weight w. From the preactivations in
              // `kept`: dh[r] = w act'(h) dA; out[r][i] = w A; score_parts = <dA, A>
};

struct Epilogue {
  EpilogueKind kind;
  ActivationSpec activation;
  GateColumns at;       // gate_columns(activation, columns)
  int64_t columns;      // of out: n for kStore, I for the others
  void* out;            // (R, columns), rows out_stride elements apart; of the products' dtype
  int64_t out_stride;   // out is null for kBackward where w A is not wanted
  const void* bias;     // (E, width) contiguous, in the order of memory; null: none
  void* kept;           // (R, width) contiguous preactivations; width is 2I with a gate, else I;
                        // written by kActivate (null: not wanted), read by kBackward
  void* dh;             // (R, width) contiguous; kBackward only; null where it is not wanted
  const void* weights;  // (T, K): a row's w is weights[row_assignment[r]]; null: 1
  Dtype weights_dtype;  //
  const int32_t* row_assignment;  // (R): below 0 or not below `assignments`: a weight of 0
  int64_t assignments;            // T * K
  // (column_tiles, R), in the compute type, or null: <dA, A> over the columns of a tile.
  void* score_parts;
};

// What both kinds of product have in common.
struct GemmContext {
  Dtype dtype;  // of a, W, p, q and all of the epilogue's matrices
  int sm;       // the device's architecture: 80 for sm_80
  int sm_count;
  int64_t smem;          // bytes of shared memory that a multiprocessor has
  bool allow_tf32;       // float32 products may round their operands to tf32
  bool batch_invariant;  // a row's result may not depend on how many rows there are
  int64_t tokens;        // T
  int64_t rows;          // R, of which expert_offsets[E] hold something
  int64_t experts;
  // (E+1), on the device; whatever stands there, tiles.cuh makes it lie within 0..R.
  const int32_t* expert_offsets;
};

// W_e a[r] for every row r.
struct Product {
  int64_t k;  // length of a's rows
  RowMatrix a;
  ExpertMatrix w;
};

struct RowsGemm {
  GemmContext context;
  Product full;
  Product low_rank;  // added into the same accumulators; a without an index; k of 0: none
  Epilogue epilogue;
};

struct WeightGradient {
  GemmContext context;
  int64_t m, n;    // lengths of p's rows and of q's
  RowMatrix p, q;  // one of them may be gathered
  void* out;       // (E, m, n) contiguous; exact zeros for an expert without rows
};

// Columns of the output are cut into so many tiles by the kernel that runs this product:
// the first dimension of score_parts.
int64_t column_tiles(const RowsGemm& gemm);

cudaError_t rows_gemm(const RowsGemm& gemm, cudaStream_t stream);
cudaError_t weight_gradient(const WeightGradient& gradient, cudaStream_t stream);

// out_e = sum over e's rows of weight_r * rows[r], in blocks of 256 rows: a bias gradient.
struct BiasGradient {
  GemmContext context;
  int64_t columns;
  RowMatrix rows;
  const void* weights;  // as in Epilogue
  Dtype weights_dtype;
  const int32_t* row_assignment;
  int64_t assignments;
  void* out;  // (E, columns) contiguous
};
cudaError_t bias_gradient(const BiasGradient& gradient, cudaStream_t stream);

// dweights of row r's assignment = the row's score_parts in a fixed order + <dy[t], bias_e>,
// with t its token; 0 for an assignment without a row, or whose row is another's.
struct ScoreGradient {
  GemmContext context;
  int64_t assignments, tiles, columns;  // T * K; of score_parts; of dy
  const int32_t* assignment_row;        // (T, K)
  const int32_t* row_assignment;        // (R)
  RowMatrix dy;
  const void* score_parts;  // (tiles, R), compute type
  const void* bias;         // (E, columns) contiguous; null: none
  void* out;                // (T, K) of out_dtype
  Dtype out_dtype;
};
cudaError_t score_gradient(const ScoreGradient& gradient, cudaStream_t stream);

// Rows past the last one that holds something become 0: what a public output promises.
struct ZeroTail {
  GemmContext context;
  void* rows;  // (R, columns) contiguous
  int64_t columns;
};
cudaError_t zero_tail(const ZeroTail& tail, cudaStream_t stream);

}  // namespace moe_ext::cuda

// The arithmetic of the experts on a CPU, without torch: what csrc/cpu's ops call.
//
// Everything is computed in T (float for float32, bfloat16 and float16 tensors,
// double for float64) on blocks that fit into a core's cache; `Dtype` says how
// memory outside those blocks is stored. One source (what all.inl lists) is compiled
// once for each instruction set (avx512.cpp, avx2.cpp, baseline.cpp), and
// `kernels<T>()` picks the best at run time.
//
// Every sum has a fixed order that does not depend on the number of threads.

#pragma once

#include <cstdint>

#include "../../activation.h"

namespace moe_ext::cpu {

enum class Dtype { f64, f32, bf16, f16 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

using moe_ext::Activation;
using moe_ext::ActivationSpec;

// Rows in memory: row r starts at data + (index ? index[r] : r) * stride elements.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t stride;
  const int32_t* index;
};

// The rows from `begin` on.
inline Rows rows_from(Rows rows, int64_t begin) {
  if (rows.index) {
    rows.index += begin;
  } else {
    rows.data = static_cast<const char*>(rows.data) + begin * rows.stride * size_of(rows.dtype);
  }
  return rows;
}

// One expert's weight as W(n, k): element (n, k) at data + n*stride_n + k*stride_k.
// One of the strides is 1 in the layouts that are fast.
struct Weight {
  const void* data;
  Dtype dtype;
  int64_t stride_n, stride_k;
};

// The leading dimension of a block in scratch memory: whole vectors, and one
// more line so that rows a power of two apart do not fall into one cache set.
constexpr int64_t kPadBytes = 64;
template <class T>
constexpr int64_t padded(int64_t cols) {
  constexpr int64_t line = kPadBytes / sizeof(T);
  return (cols + line - 1) / line * line + line;
}

// Sums over tokens (weight and bias gradients) go in chunks of this many rows.
constexpr int64_t kRowChunk = 256;
// Where rows may be cut into calls of matmul without changing how any of them is summed.
constexpr int64_t kRowUnit = 16;
// What a block of rows takes, see Kernels.
template <class T>
constexpr int64_t block_size(int64_t m, int64_t cols) {
  return (m + kRowUnit - 1) / kRowUnit * kRowUnit * padded<T>(cols);
}
// Columns that one call of matmul covers at most, and one of activate_backward.
constexpr int64_t kMatmulColumns = 1024, kActivateColumns = 256;

template <class T>
struct Kernels {
  const char* name;

  // ---- the forward pass: blocks of one expert's rows
  //
  // A block of m rows and some columns holds the first `turned` rows turned over, a vector of
  // rows for each column, as products like them; then the other rows as they are. It takes
  // block_size(m, cols) elements. `turned` is 0 or turned_rows(m, dtype of the weights), alike in
  // all that meet.

  int64_t (*turned_rows)(int64_t m, Dtype weights);

  // block = src, converted.
  void (*load_block)(T* block, Rows src, int64_t m, int64_t turned, int64_t cols);
  // Row r of dtype at dst + r*stride = the block's row plus bias (null: none), rounded to nearest
  // even.
  void (*store_block)(void* dst, Dtype dtype, int64_t stride, const T* block, int64_t m,
                      int64_t turned, int64_t cols, const T* bias);

  // c = a W(n0..n1, 0..k)^T, blocks of m rows; n1 - n0 <= kMatmulColumns. Turned rows need W's
  // rows to run along k (stride_k 1), and may be summed in another order than the others.
  // `scratch` holds matmul_scratch(m, k) elements.
  void (*matmul_block)(T* c, const T* a, int64_t m, int64_t turned, Weight w, int64_t k, int64_t n0,
                       int64_t n1, T* scratch);

  // From m rows of 2 * cols columns as they are: the even columns, and the odd ones.
  void (*unweave)(T* even, T* odd, const T* both, int64_t m, int64_t cols);

  // Columns i0..i1 of the block a = activation of the preactivations in the blocks `gate` and
  // `up` of those columns; up is null without a gate. With `kept`, the preactivations also go
  // to row r of kept (dtype, stride).
  void (*activate_block)(T* a, T* gate, T* up, int64_t m, int64_t turned, int64_t i0, int64_t i1,
                         int64_t intermediate, const ActivationSpec& spec, const T* bias,
                         void* kept, Dtype dtype, int64_t stride);

  // ---- the backward pass: rows as they are

  // dst (rows, padded<T>(cols)) = src, converted; the padding up to a whole line is zero.
  void (*load_rows)(T* dst, Rows src, int64_t rows, int64_t cols);
  // dst row r of dtype at dst + r*stride = src (rows, ld), rounded to nearest even.
  void (*store_rows)(void* dst, Dtype dtype, int64_t stride, const T* src, int64_t ld, int64_t rows,
                     int64_t cols);

  // c (m, padded<T>(n1-n0)) = a (m, lda) W(n0..n1, 0..k)^T; n1 - n0 <= kMatmulColumns.
  // `scratch` holds matmul_scratch(m, k) elements.
  void (*matmul)(T* c, const T* a, int64_t lda, int64_t m, Weight w, int64_t k, int64_t n0,
                 int64_t n1, T* scratch);
  int64_t (*matmul_scratch)(int64_t m, int64_t k);

  // out rows m0..m1 (dtype, stride) = sum over r of p(r, m) q(r, 0..n): a weight gradient,
  // written past the caches where they would not hold all of it. `scratch` holds
  // outer_scratch(m1 - m0) elements.
  void (*outer)(void* out, Dtype dtype, int64_t stride, bool past_caches, Rows p, int64_t m0,
                int64_t m1, Rows q, int64_t n, int64_t rows, T* scratch);
  int64_t (*outer_scratch)(int64_t height);

  // For rows 0..m, columns i0..i1: from da = dL/d(activation) before the routing weight,
  // and the preactivations h (dtype, stride): dh = dL/dh (with the weight), wa = weight *
  // activation, score[r] += sum of da * activation. weight and score may be null;
  // i1 - i0 <= kActivateColumns.
  void (*activate_backward)(T* dh, int64_t ld_dh, T* wa, int64_t ld_wa, T* score, const T* da,
                            int64_t ld_da, const void* h, Dtype dtype, int64_t stride,
                            const T* weight, int64_t m, int64_t i0, int64_t i1,
                            int64_t intermediate, const ActivationSpec& spec);

  // out (dtype) = sum over j of weight[j] * rows[index[j]], in the order of j; index < 0 adds
  // nothing; no weight is weight 1.
  void (*combine)(void* out, Dtype dtype, const T* rows, int64_t ld, const int32_t* index,
                  const T* weight, int64_t top_k, int64_t cols);

  // out[0..cols) (dtype) = sum over r of weight[r] * src(r, c).
  void (*sum_rows)(void* out, Dtype dtype, Rows src, const T* weight, int64_t rows, int64_t cols);

  // The inner product of the rows that left.data and right.data point to.
  T (*dot)(Rows left, Rows right, int64_t cols);
};

template <class T>
const Kernels<T>& kernels();

enum class Isa { baseline, avx2, avx512 };
// What kernels() are of, and all else that is compiled for several.
Isa instruction_set();

}  // namespace moe_ext::cpu

// The arithmetic of the experts on a CPU, without torch: what csrc/cpu's ops call.
//
// Products take operands of type P from blocks that fit into a core's cache and add them up
// in Sum<P>. P is double for float64 tensors; bf16 for bfloat16 where the instruction set
// multiplies it as it is; float for all else. `Dtype` says how memory outside those blocks is
// stored. One source (what all.inl lists) is compiled once for each instruction set
// (avx512_bf16.cpp, avx512.cpp, avx2.cpp, baseline.cpp), and `kernels<P>()` picks the best at
// run time.
//
// Every sum has a fixed order that does not depend on the number of threads.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../../activation.h"

namespace moe_ext::cpu {

enum class Dtype { f64, f32, bf16, f16 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class P>
struct Operand {
  using Sum = P;
  static constexpr Dtype dtype = sizeof(P) == 8 ? Dtype::f64 : Dtype::f32;
};
template <>
struct Operand<bf16> {
  using Sum = float;
  static constexpr Dtype dtype = Dtype::bf16;
};
template <class P>
using Sum = typename Operand<P>::Sum;

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

// A thread's scratch memory, handed out from its beginning; a copy hands out the same again.
struct Scratch {
  char* at;

  template <class T>
  static constexpr int64_t bytes(int64_t elements) {
    return (elements * int64_t(sizeof(T)) + kPadBytes - 1) / kPadBytes * kPadBytes;
  }
  template <class T>
  T* take(int64_t elements) {
    T* taken = reinterpret_cast<T*>(at);
    at += bytes<T>(elements);
    return taken;
  }
};

template <class P>
struct Kernels {
  using S = Sum<P>;
  const char* name;

  // ---- the forward pass: blocks of one expert's rows
  //
  // A block of m rows and some columns holds the first `turned` rows turned over, a vector of
  // rows for each column (each pair of columns of bf16), as products like them; then the other
  // rows as they are. It takes block_size(m, cols) elements: of P for operands, of S for
  // products. `turned` is 0 or turned_rows(m, dtype of the weights), alike in all that meet.

  int64_t (*turned_rows)(int64_t m, Dtype weights);

  // block = src, converted.
  void (*load_block)(P* block, Rows src, int64_t m, int64_t turned, int64_t cols);
  // Row r of dtype at dst + r*stride = the block's row plus bias (null: none), rounded to nearest
  // even.
  void (*store_block)(void* dst, Dtype dtype, int64_t stride, const S* block, int64_t m,
                      int64_t turned, int64_t cols, const S* bias);

  // c = a W(n0..n1, 0..k)^T, blocks of m rows; n1 - n0 <= kMatmulColumns. Turned rows need W's
  // rows to run along k (stride_k 1), and may be summed in another order than the others.
  // `scratch` holds matmul_scratch(m, k) bytes.
  void (*matmul_block)(S* c, const P* a, int64_t m, int64_t turned, Weight w, int64_t k, int64_t n0,
                       int64_t n1, Scratch scratch);

  // From m rows of 2 * cols columns as they are: the even columns, and the odd ones.
  void (*unweave)(S* even, S* odd, const S* both, int64_t m, int64_t cols);

  // Columns i0..i1 of the block a = activation of the preactivations in the blocks `gate` and
  // `up` of those columns; up is null without a gate, i0 is even. With `kept`, the preactivations
  // also go to row r of kept (dtype, stride).
  void (*activate_block)(P* a, S* gate, S* up, int64_t m, int64_t turned, int64_t i0, int64_t i1,
                         int64_t intermediate, const ActivationSpec& spec, const S* bias,
                         void* kept, Dtype dtype, int64_t stride);

  // ---- the backward pass: rows as they are

  // dst (rows, padded<P>(cols)) = src, converted; the padding up to a whole line is zero.
  void (*load_rows)(P* dst, Rows src, int64_t rows, int64_t cols);
  // dst row r of dtype at dst + r*stride = src (rows, ld), rounded to nearest even.
  void (*store_rows)(void* dst, Dtype dtype, int64_t stride, const S* src, int64_t ld, int64_t rows,
                     int64_t cols);

  // c (m, padded<S>(n1-n0)) = a (m, lda) W(n0..n1, 0..k)^T; n1 - n0 <= kMatmulColumns.
  // `scratch` holds matmul_scratch(m, k) bytes.
  void (*matmul)(S* c, const P* a, int64_t lda, int64_t m, Weight w, int64_t k, int64_t n0,
                 int64_t n1, Scratch scratch);
  int64_t (*matmul_scratch)(int64_t m, int64_t k);

  // out rows m0..m1 (dtype, stride) = sum over r of p(r, m) q(r, 0..n): a weight gradient,
  // written past the caches where they would not hold all of it. `scratch` holds
  // outer_scratch(m1 - m0) bytes.
  void (*outer)(void* out, Dtype dtype, int64_t stride, bool past_caches, Rows p, int64_t m0,
                int64_t m1, Rows q, int64_t n, int64_t rows, Scratch scratch);
  int64_t (*outer_scratch)(int64_t height);

  // For rows 0..m, columns i0..i1: from da = dL/d(activation) before the routing weight,
  // and the preactivations h (dtype, stride): dh = dL/dh (with the weight), wa = weight *
  // activation, score[r] += sum of da * activation. weight and score may be null;
  // i1 - i0 <= kActivateColumns.
  void (*activate_backward)(P* dh, int64_t ld_dh, P* wa, int64_t ld_wa, S* score, const S* da,
                            int64_t ld_da, const void* h, Dtype dtype, int64_t stride,
                            const S* weight, int64_t m, int64_t i0, int64_t i1,
                            int64_t intermediate, const ActivationSpec& spec);

  // out (dtype) = sum over j of weight[j] * rows[index[j]], in the order of j; index < 0 adds
  // nothing; no weight is weight 1.
  void (*combine)(void* out, Dtype dtype, const S* rows, int64_t ld, const int32_t* index,
                  const S* weight, int64_t top_k, int64_t cols);

  // out[0..cols) (dtype) = sum over r of weight[r] * src(r, c).
  void (*sum_rows)(void* out, Dtype dtype, Rows src, const S* weight, int64_t rows, int64_t cols);

  // The inner product of the rows that left.data and right.data point to.
  S (*dot)(Rows left, Rows right, int64_t cols);
};

template <class P>
const Kernels<P>& kernels();

enum class Isa { baseline, avx2, avx512, avx512_bf16 };
// What kernels() are of, and all else that is compiled for several. Throws where MOE_EXT_CPU
// names none of this processor's.
Isa instruction_set();
const char* name_of(Isa isa);
// The names of all that this processor has.
std::vector<std::string> instruction_sets();
// Whether there are kernels<bf16>().
inline bool multiplies_bf16() { return instruction_set() == Isa::avx512_bf16; }

}  // namespace moe_ext::cpu

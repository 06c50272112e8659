// The arithmetic of the ops on a CPU, without torch: what csrc/cpu's ops call.
//
// One source (what all.inl lists) is compiled once for each instruction set (avx512_bf16.cpp,
// avx512.cpp, avx2.cpp, baseline.cpp) into one table, and dispatch.cpp picks the best at run time:
// `kernels<P>()` are the products of matrices, `row_kernels<A>()` all that goes row by row.
//
// Products take operands of type P from blocks that fit into a core's cache and add them up in
// Sum<P>. P is double for float64 tensors; bf16 for bfloat16 where the instruction set multiplies
// it as it is; float for all else.
//
// Every sum has a fixed order that does not depend on the number of threads.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../../activation.h"
#include "../../routing.h"
#include "layouts.h"

namespace moe_ext::cpu {

using moe_ext::Activation;
using moe_ext::ActivationSpec;

// In BLIS's words: the most columns of one product, the most rows of a block, and how many rows
// a weight's gradient sums at once.
constexpr int64_t NC = 1024, MC = 256, KC_TN = 256;
// The most columns of one call of activate_backward.
constexpr int64_t kActivateColumns = 256;

// The preactivations of some columns of a block of one expert's rows.
template <class S>
struct Preactivations {
  Block<S> gate, up;  // up.data is null without a gate
  const ActivationSpec& spec;
  const S* bias;  // of all columns, as memory has them; null: none
  RowsOut kept;   // where the preactivations go as well; data may be null
};

// The backward pass of the activation, of some columns of one expert's rows.
template <class P>
struct ActivationBackward {
  using S = Sum<P>;
  Matrix<P> dh;     // dL/dh, with the weight, as memory has its columns
  Matrix<P> wa;     // weight * activation
  S* score;         // += sum of da * activation; may be null
  Rows h;           // the preactivations
  const S* weight;  // of each row; null: 1
  const ActivationSpec& spec;
};

// out (m, n) = sum over r < rows of p(r, 0..m) q(r, 0..n): a weight's gradient, written past the
// caches where they would not hold all of it.
struct OuterProduct {
  RowsOut out;
  bool past_caches;
  Rows p, q;
  int64_t m, n, rows;
  bool even_chunks = true;  // the rows are added up in nearly equal chunks of at most KC_TN
};

// A block of tokens on its way through topk_route. In a replay `experts` is read, otherwise it is
// written.
template <class A>
struct Routing {
  const RouteOptions& options;
  Rows logits;
  const A* bias;        // for the choice; may be null
  const bool* padding;  // may be null
  A* weights;
  int32_t* experts;
  A* score_sums;  // of this block
  A* logsumexp;
};

// The gradients of topk_route's results, any of which may be null, to those of a block's logits.
template <class A>
struct RoutingBackward {
  const RouteOptions& options;
  Rows logits;
  const bool* padding;
  const int32_t* experts;
  const A *weights, *score_sums, *logsumexp;
  RowsOut dlogits;
};

template <class P>
struct Kernels {
  using S = Sum<P>;

  // ---- the forward pass: blocks of one expert's rows

  // How many of so many rows are packed, for products with weights of that dtype.
  int64_t (*packed_rows)(int64_t rows, Dtype weights);

  // The rows, converted; and rows = the block's plus bias (null: none).
  void (*load_block)(const Block<P>& to, const Rows& from);
  void (*store_block)(const RowsOut& to, const Block<S>& from, const S* bias);

  // c = a W(n0.., 0..a.cols)^T; c.cols <= NC. Packed rows need W's rows to run along k
  // (stride_k 1), and may be summed in another order than the others. `scratch` holds
  // matmul_scratch(a.rows, a.cols) bytes.
  void (*matmul_block)(const Block<S>& c, const Block<P>& a, const Weight& w, int64_t n0,
                       Scratch scratch);

  // to += from, blocks of the same shape.
  void (*add_block)(const Block<S>& to, const Block<S>& from);

  // Of a block without packed rows: the even columns, and the odd ones.
  void (*unweave)(const Block<S>& even, const Block<S>& odd, const Block<S>& both);

  // Columns i0.. of the block a = activation of the preactivations; i0 is even.
  void (*activate_block)(const Block<P>& a, const Preactivations<S>& h, int64_t i0);

  // ---- the backward pass: rows as they are

  // The rows, converted; the padding up to a whole line is zero.
  void (*load_rows)(const Matrix<P>& to, const Rows& from);
  void (*store_rows)(const RowsOut& to, const Matrix<S>& from);

  // As matmul_block; c.ld is padded<S>(c.cols).
  void (*matmul)(const Matrix<S>& c, const Matrix<P>& a, const Weight& w, int64_t n0,
                 Scratch scratch);
  int64_t (*matmul_scratch)(int64_t rows, int64_t k);

  // `scratch` holds outer_scratch(m) bytes.
  void (*outer)(const OuterProduct& product, Scratch scratch);
  int64_t (*outer_scratch)(int64_t m);

  // From da = dL/d(activation) before the routing weight, of columns i0..i0 + da.cols;
  // da.cols <= kActivateColumns.
  void (*activate_backward)(const ActivationBackward<P>& to, const Matrix<S>& da, int64_t i0);
};

// What goes row by row, added up in A: float, or double for float64. Rows may be of any dtype where
// that is double.
template <class A>
struct RowKernels {
  // A block of logits = x W^T + bias (null: none); `scratch` holds logits_scratch(logits.rows,
  // hidden) bytes.
  void (*router_logits)(const Matrix<A>& logits, const Rows& x, const Rows& weight, int64_t hidden,
                        const A* bias, Scratch scratch);
  int64_t (*logits_scratch)(int64_t tokens, int64_t hidden);

  void (*route)(const Routing<A>& to, int64_t tokens);
  void (*route_backward)(const RoutingBackward<A>& from, int64_t tokens);

  // out's one row = sum over j of weight[j] * row j of `rows`, in the order of j; an index below 0
  // adds nothing; no weight is weight 1.
  void (*combine)(const RowsOut& out, const Rows& rows, const A* weight, int64_t top_k,
                  int64_t cols);
  // Of one row: drow = weight * dy and dweight = <dy, row>; drow.data and dweight may be null.
  void (*combine_backward)(const RowsOut& drow, A* dweight, const Rows& dy, const Rows& row,
                           A weight, int64_t cols);

  // Of one token's scores, and its largest logit.
  void (*entropy)(const Rows& logits, int64_t num_experts, bool is_sigmoid, A* result,
                  A* max_logit);

  // out's one row = sum over r of weight[r] * src(r, c).
  void (*sum_rows)(const RowsOut& out, const Rows& src, const A* weight, int64_t rows,
                   int64_t cols);
  // out[c] = sum over r of a(r, c), in float64.
  void (*sum_columns)(A* out, const Matrix<const A>& a);
  // The inner product of the rows that left.data and right.data point to.
  A (*dot)(const Rows& left, const Rows& right, int64_t cols);
};

// All that one instruction set has.
struct Table {
  Kernels<float> f32;
  Kernels<double> f64;
  RowKernels<float> rows_f32;
  RowKernels<double> rows_f64;
};

template <class P>
const Kernels<P>& kernels();
template <class A>
const RowKernels<A>& row_kernels();

enum class Isa { baseline, avx2, avx512, avx512_bf16 };
// What kernels() are of. Throws where MOE_EXT_CPU names none of this processor's.
Isa instruction_set();
const char* name_of(Isa isa);
// The names of all that this processor has.
std::vector<std::string> instruction_sets();
// Whether there are kernels<bf16>().
inline bool multiplies_bf16() { return instruction_set() == Isa::avx512_bf16; }

}  // namespace moe_ext::cpu

// router_logits: logits = x W^T + b, and its backward dx = G W, dW = G^T x, db = sum G.
//
// x and W are read in their own dtypes; blocks of them are converted in cache, and no wide copy
// of either exists as a whole. A sum has one order, which depends on no other token and on no
// thread: the logits' is in kernels/router_logits.inl, the gradients' goes over E (dx) or T (dW)
// in ascending order, 256 terms at a time.

#include "checks/router_logits.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "cpu/tensors.h"
#include "cpu/threads.h"

namespace moe_ext::cpu {
namespace {

// Tokens, and experts, of a block of logits; rows, and columns, of a block of a gradient.
constexpr int64_t kTokens = 64, kExperts = 64, kHeight = 192, kWidth = 128;

int64_t pieces_of(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

at::Tensor with_whole_rows(const at::Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
}

template <class A>
void logits_of(const at::Tensor& x, const at::Tensor& weight, const A* bias,
               const at::Tensor& logits) {
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t T = x.size(0), H = x.size(1), E = weight.size(0);
  const Rows tokens = rows_of(x), experts = rows_of(weight);
  const Matrix<A> all{logits.mutable_data_ptr<A>(), T, E, E};
  const int64_t expert_blocks = pieces_of(E, kExperts);
  const auto carve = [&](Scratch& scratch) {
    return scratch.take_scratch(kernels.logits_scratch(std::min(T, kTokens), H));
  };
  for_items(
      pieces_of(T, kTokens) * expert_blocks, T * E * H, carve,
      [&](const Scratch& scratch, int64_t item) {
        const int64_t t = item / expert_blocks * kTokens;
        const int64_t e = item % expert_blocks * kExperts;
        kernels.router_logits(
            all.from_row(t, std::min(kTokens, T - t)).from_column(e, std::min(kExperts, E - e)),
            tokens.from_row(t), experts.from_row(e), H, bias ? bias + e : nullptr, scratch);
      });
}

// out (M, N) = p^T q, over all rows of p (K, M) and q (K, N).
template <class A>
void product(const at::Tensor& p, const at::Tensor& q, const at::Tensor& out) {
  const Kernels<A>& kernel = kernels<A>();
  const int64_t M = out.size(0), N = out.size(1), K = p.size(0);
  const Rows left = rows_of(p), right = rows_of(q);
  const RowsOut all = rows_out(out);
  const int64_t column_blocks = pieces_of(N, kWidth);
  const auto carve = [&](Scratch& scratch) {
    return scratch.take_scratch(kernel.outer_scratch(std::min(M, kHeight)));
  };
  for_items(pieces_of(M, kHeight) * column_blocks, M * N * K, carve,
            [&](const Scratch& scratch, int64_t item) {
              const int64_t m = item / column_blocks * kHeight, n = item % column_blocks * kWidth;
              kernel.outer({all.from_row(m).from_column(n), /*past_caches=*/false,
                            left.from_column(m), right.from_column(n), std::min(kHeight, M - m),
                            std::min(kWidth, N - n), K, /*even_chunks=*/false},
                           scratch);
            });
}

at::Tensor router_logits(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  const auto accumulation = check_router_logits(x, weight, bias);
  const at::Tensor b = bias ? bias->to(accumulation).contiguous() : at::Tensor();
  at::Tensor logits = at::empty({x.size(0), weight.size(0)}, x.options().dtype(accumulation));
  with_sums(accumulation == at::kDouble, [&](auto a) {
    using A = decltype(a);
    logits_of<A>(with_whole_rows(x), with_whole_rows(weight), data_or_null<A>(b), logits);
  });
  return logits;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward(
    const at::Tensor& grad_logits, const at::Tensor& x, const at::Tensor& weight,
    std::array<bool, 3> output_mask) {
  const auto accumulation = check_router_logits_backward(grad_logits, x, weight);
  const int64_t T = x.size(0), E = weight.size(0);
  const at::Tensor grad = grad_logits.contiguous();
  const auto shape = [&](bool wanted, const at::Tensor& like) {
    return wanted ? like.sizes().vec() : std::vector<int64_t>{0};
  };
  at::Tensor dx = at::empty(shape(output_mask[0], x), x.options());
  at::Tensor dweight = at::empty(shape(output_mask[1], weight), weight.options());
  at::Tensor dbias = at::empty({output_mask[2] ? E : 0}, grad.options());
  with_sums(accumulation == at::kDouble, [&](auto a) {
    using A = decltype(a);
    if (output_mask[0]) product<A>(grad.t().contiguous(), with_whole_rows(weight), dx);
    if (output_mask[1]) product<A>(grad, with_whole_rows(x), dweight);
    if (output_mask[2])
      row_kernels<A>().sum_columns(dbias.mutable_data_ptr<A>(),
                                   {grad.const_data_ptr<A>(), T, E, E});
  });
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("router_logits", &router_logits);
  m.impl("router_logits_backward", &router_logits_backward);
}

}  // namespace moe_ext::cpu

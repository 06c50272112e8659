// moe_forward: y_t = sum_j w_tj ffn_e(x_t) over the kept j in ascending order, the
// rows never leaving float32 (float64). Backward takes each row's upstream gradient from
// dy through row_token, and gives dw_tj = <dA, A> + <dy, c> from inside the activation's
// backward pass. The work is in ffn.cpp, which grouped_ffn shares.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "checks.h"
#include "cpu/ffn.h"

namespace moe_ext::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The routing weights in the sums' type, after the checks that grouped_ffn has not.
template <class T>
at::Tensor check_weights(const char* op, const Experts& call, const at::Tensor& weights,
                         const at::Tensor& row_assignment) {
  check_routing(op, call, weights, row_assignment);
  return weights.to(sizeof(T) == 8 ? at::kDouble : at::kFloat).contiguous();
}

std::tuple<at::Tensor, at::Tensor> moe_forward(
    const at::Tensor& x, const at::Tensor& weights, const at::Tensor& expert_offsets,
    const at::Tensor& row_token, const at::Tensor& row_assignment, const at::Tensor& assignment_row,
    const at::Tensor& up_proj, const at::Tensor& down_proj, const OptionalTensor& up_bias,
    const OptionalTensor& down_bias, std::string_view activation, std::optional<double> limit,
    double alpha, double up_offset, bool transposed, bool interleaved, bool keep_preactivations,
    bool batch_invariant) {
  constexpr const char* op = "moe_forward";
  Experts call = check_memory(
      op, check_ffn(op, x, expert_offsets, row_token, assignment_row, up_proj, down_proj, up_bias,
                    down_bias, activation, limit, alpha, up_offset, transposed, interleaved));
  call.batch_invariant = batch_invariant;
  at::Tensor y = at::empty({call.tokens, call.hidden}, x.options());
  at::Tensor kept = preactivations_of(call, keep_preactivations);
  with_operands(call, [&](auto p) {
    using P = decltype(p);
    using T = Sum<P>;
    const at::Tensor w = check_weights<T>(op, call, weights, row_assignment);
    const WorkspaceRows<T> rows(call.kept, call.hidden);
    ffn_forward<P>(call, rows.out(), keep_preactivations ? kept.mutable_data_ptr() : nullptr);
    combine_tokens<T>(call, y, rows, w.const_data_ptr<T>());
  });
  return {y, kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weights,
    const at::Tensor& preactivations, const at::Tensor& expert_offsets, const at::Tensor& row_token,
    const at::Tensor& row_assignment, const at::Tensor& assignment_row, const at::Tensor& up_proj,
    const at::Tensor& down_proj, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
    std::string_view activation, std::optional<double> limit, double alpha, double up_offset,
    bool transposed, bool interleaved, std::array<bool, 6> output_mask) {
  constexpr const char* op = "moe_backward";
  const Experts call = check_memory(
      op, check_ffn(op, x, expert_offsets, row_token, assignment_row, up_proj, down_proj, up_bias,
                    down_bias, activation, limit, alpha, up_offset, transposed, interleaved));
  const at::Tensor dy = check_upstream(op, "grad", call, grad, call.tokens);
  const at::Tensor kept = check_preactivations(op, call, preactivations);
  const at::Tensor assignments = row_assignment.contiguous();
  at::Tensor dweights;
  const FfnGradients g = with_operands(call, [&](auto p) {
    using P = decltype(p);
    using T = Sum<P>;
    const at::Tensor w = check_weights<T>(op, call, weights, assignments);
    const int32_t* assignment = assignments.const_data_ptr<int32_t>();
    const Workspace<T> row_weight(call.kept), score(call.kept);
    for (int64_t r = 0; r < call.kept; ++r) {
      TORCH_CHECK_VALUE(assignment[r] >= 0 && assignment[r] < w.numel(), op,
                        ": row_assignment must be in 0..T*K-1 where a row is kept");
      row_weight[r] = w.const_data_ptr<T>()[assignment[r]];
    }
    const FfnGradients gradients = ffn_backward<P>(
        call,
        {dy.const_data_ptr(), call.dtype, dy.stride(0), call.row_token.const_data_ptr<int32_t>()},
        row_weight.data(), output_mask[1] ? score.data() : nullptr, kept,
        {output_mask[0], output_mask[2], output_mask[3], output_mask[4], output_mask[5]});
    if (output_mask[1]) {
      const at::Tensor dw = at::zeros(w.sizes(), w.options());
      for (int64_t r = 0; r < call.kept; ++r) {
        dw.mutable_data_ptr<T>()[assignment[r]] = score[r];
      }
      dweights = dw.to(weights.scalar_type());
    } else {
      dweights = at::empty({0}, weights.options());
    }
    return gradients;
  });
  return {g.x, dweights, g.up_proj, g.down_proj, g.up_bias, g.down_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("moe_forward", &moe_forward);
  m.impl("moe_backward", &moe_backward);
}

}  // namespace moe_ext::cpu

// moe_forward: y_t = sum_j w_tj ffn_e(x_t) over the kept j in ascending order. Backward
// takes each row's upstream gradient from dy through row_token, and gives
// dw_tj = <dA, A> + <dy, c> from inside the activation's backward pass. The work is in
// ffn.cpp, which grouped_ffn shares.

#include <torch/library.h>

#include <tuple>

#include "cuda/ffn.h"

namespace moe_ext {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> moe_forward(
    const at::Tensor& x, const at::Tensor& weights, const at::Tensor& expert_offsets,
    const at::Tensor& row_token, const at::Tensor& row_assignment, const at::Tensor& assignment_row,
    const at::Tensor& up_proj, const at::Tensor& down_proj, const OptionalTensor& up_bias,
    const OptionalTensor& down_bias, std::string_view activation, std::optional<double> limit,
    double alpha, double up_offset, bool transposed, bool interleaved, bool keep_preactivations,
    bool batch_invariant) {
  constexpr const char* op = "moe_forward";
  const FfnCall call =
      check_ffn(op, x, expert_offsets, row_token, assignment_row, up_proj, down_proj, up_bias,
                down_bias, activation, limit, alpha, up_offset, transposed, interleaved);
  check_routing(op, call, weights, row_assignment);
  const OnDevice device(x);
  const FfnRows result =
      ffn_forward(op, device, call, keep_preactivations, batch_invariant, row_assignment);
  return {combine_tokens(op, device, call, result.rows, weights.contiguous()),
          result.preactivations};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weights,
    const at::Tensor& preactivations, const at::Tensor& expert_offsets, const at::Tensor& row_token,
    const at::Tensor& row_assignment, const at::Tensor& assignment_row, const at::Tensor& up_proj,
    const at::Tensor& down_proj, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
    std::string_view activation, std::optional<double> limit, double alpha, double up_offset,
    bool transposed, bool interleaved, std::array<bool, 6> output_mask) {
  constexpr const char* op = "moe_backward";
  const FfnCall call =
      check_ffn(op, x, expert_offsets, row_token, assignment_row, up_proj, down_proj, up_bias,
                down_bias, activation, limit, alpha, up_offset, transposed, interleaved);
  const at::Tensor dy = check_upstream(op, "grad", call, grad, call.tokens);
  const at::Tensor kept = check_preactivations(op, call, preactivations);
  check_routing(op, call, weights, row_assignment);
  const auto g =
      ffn_backward(op, OnDevice(x), call, {dy, weights.contiguous(), row_assignment.contiguous()},
                   kept, output_mask);
  return {g[kX], g[kWeights], g[kUpProj], g[kDownProj], g[kUpBias], g[kDownBias]};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) {
  m.impl("moe_forward", &moe_forward);
  m.impl("moe_backward", &moe_backward);
}

}  // namespace moe_ext

// grouped_ffn: every row through its expert, rows_r = down_e act(up_e x_t + b) + c, with
// t = row_token_r. The work is in ffn.cpp, which moe_forward shares.

#include <torch/library.h>

#include <tuple>

#include "cuda/ffn.h"

namespace moe_ext {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> grouped_ffn(
    const at::Tensor& x, const at::Tensor& expert_offsets, const at::Tensor& row_token,
    const at::Tensor& assignment_row, const at::Tensor& up_proj, const at::Tensor& down_proj,
    const OptionalTensor& up_bias, const OptionalTensor& down_bias, std::string_view activation,
    std::optional<double> limit, double alpha, double up_offset, bool transposed, bool interleaved,
    bool keep_preactivations, bool batch_invariant) {
  constexpr const char* op = "grouped_ffn";
  const FfnCall call =
      check_ffn(op, x, expert_offsets, row_token, assignment_row, up_proj, down_proj, up_bias,
                down_bias, activation, limit, alpha, up_offset, transposed, interleaved);
  const OnDevice device(x);
  FfnRows result = ffn_forward(op, device, call, keep_preactivations, batch_invariant);
  zero_tail(op, device, call, result.rows);
  return {result.rows, result.preactivations};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> grouped_ffn_backward(
    const at::Tensor& grad_rows, const at::Tensor& x, const at::Tensor& preactivations,
    const at::Tensor& expert_offsets, const at::Tensor& row_token, const at::Tensor& assignment_row,
    const at::Tensor& up_proj, const at::Tensor& down_proj, const OptionalTensor& up_bias,
    const OptionalTensor& down_bias, std::string_view activation, std::optional<double> limit,
    double alpha, double up_offset, bool transposed, bool interleaved,
    std::array<bool, 5> output_mask) {
  constexpr const char* op = "grouped_ffn_backward";
  const FfnCall call =
      check_ffn(op, x, expert_offsets, row_token, assignment_row, up_proj, down_proj, up_bias,
                down_bias, activation, limit, alpha, up_offset, transposed, interleaved);
  const at::Tensor dy = check_upstream(op, "grad_rows", call, grad_rows, call.rows);
  const at::Tensor kept = check_preactivations(op, call, preactivations);
  const auto [want_x, want_up, want_down, want_up_bias, want_down_bias] = output_mask;
  const auto g = ffn_backward(op, OnDevice(x), call, {dy, {}, {}}, kept,
                              {want_x, false, want_up, want_down, want_up_bias, want_down_bias});
  return {g[kX], g[kUpProj], g[kDownProj], g[kUpBias], g[kDownBias]};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) {
  m.impl("grouped_ffn", &grouped_ffn);
  m.impl("grouped_ffn_backward", &grouped_ffn_backward);
}

}  // namespace moe_ext

// grouped_ffn: every row through its expert, rows_r = down_e act(up_e x_t + b) + c, with
// t = row_token_r. The work is in ffn.cpp, which moe_forward shares.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <string_view>
#include <tuple>

#include "checks.h"
#include "cpu/ffn.h"

namespace moe_ext::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> grouped_ffn(
    const at::Tensor& x, const at::Tensor& expert_offsets, const at::Tensor& row_token,
    const at::Tensor& assignment_row, const at::Tensor& up_proj, const at::Tensor& down_proj,
    const OptionalTensor& up_bias, const OptionalTensor& down_bias, std::string_view activation,
    std::optional<double> limit, double alpha, double up_offset, bool transposed, bool interleaved,
    bool keep_preactivations, bool batch_invariant) {
  Experts call = check_memory(
      "grouped_ffn",
      check_ffn("grouped_ffn", x, expert_offsets, row_token, assignment_row, up_proj, down_proj,
                up_bias, down_bias, activation, limit, alpha, up_offset, transposed, interleaved));
  call.batch_invariant = batch_invariant;
  at::Tensor rows = at::empty({call.rows, call.hidden}, x.options());
  at::Tensor kept = preactivations_of(call, keep_preactivations);
  with_operands(call, [&](auto p) {
    ffn_forward<decltype(p)>(call, {rows.mutable_data_ptr(), call.dtype, call.hidden},
                             keep_preactivations ? kept.mutable_data_ptr() : nullptr);
  });
  rows.narrow(0, call.kept, call.rows - call.kept).zero_();
  return {rows, kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> grouped_ffn_backward(
    const at::Tensor& grad_rows, const at::Tensor& x, const at::Tensor& preactivations,
    const at::Tensor& expert_offsets, const at::Tensor& row_token, const at::Tensor& assignment_row,
    const at::Tensor& up_proj, const at::Tensor& down_proj, const OptionalTensor& up_bias,
    const OptionalTensor& down_bias, std::string_view activation, std::optional<double> limit,
    double alpha, double up_offset, bool transposed, bool interleaved,
    std::array<bool, 5> output_mask) {
  constexpr const char* op = "grouped_ffn_backward";
  const Experts call = check_memory(
      op, check_ffn(op, x, expert_offsets, row_token, assignment_row, up_proj, down_proj, up_bias,
                    down_bias, activation, limit, alpha, up_offset, transposed, interleaved));
  const at::Tensor upstream = check_upstream(op, "grad_rows", call, grad_rows, call.rows);
  const at::Tensor kept = check_preactivations(op, call, preactivations);
  const FfnGradients g = with_operands(call, [&](auto p) {
    return ffn_backward<decltype(p)>(call,
                                     {upstream.const_data_ptr(), call.dtype, upstream.stride(0)},
                                     nullptr, nullptr, kept, output_mask);
  });
  return {g.x, g.up_proj, g.down_proj, g.up_bias, g.down_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("grouped_ffn", &grouped_ffn);
  m.impl("grouped_ffn_backward", &grouped_ffn_backward);
}

}  // namespace moe_ext::cpu

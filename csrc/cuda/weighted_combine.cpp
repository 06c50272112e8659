// weighted_combine on a GPU; kernels and formulas are in kernels/weighted_combine.cu.

#include "checks/weighted_combine.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "cuda/check_plan.h"
#include "cuda/device.h"
#include "cuda/kernels/weighted_combine.h"

namespace moe_ext {
namespace {

// What the kernels must know of rows, weights and plan, all of them contiguous.
cuda::TokenRows token_rows(const at::Tensor& rows, const at::Tensor& weights,
                           const at::Tensor& assignment_row) {
  return {
      .tokens = weights.size(0),
      .top_k = weights.size(1),
      .hidden = rows.size(1),
      .rows = rows.size(0),
      .dtype = dtype_of(rows),
      .accumulate =
          combine_accumulation(rows, weights) == at::kDouble ? cuda::Dtype::f64 : cuda::Dtype::f32,
      .assignment_row = assignment_row.const_data_ptr<int32_t>(),
      .weights = weights.const_data_ptr(),
      .weights_dtype = dtype_of(weights),
  };
}

void check_plan_of_rows(const char* op, const at::Tensor& row_assignment,
                        const at::Tensor& assignment_row) {
  check_indices(op, "row_assignment", row_assignment, assignment_row.numel(), true);
  check_indices(op, "assignment_row", assignment_row, row_assignment.size(0), true);
}

at::Tensor weighted_combine(const at::Tensor& rows, const at::Tensor& weights,
                            const at::Tensor& row_assignment, const at::Tensor& assignment_row) {
  constexpr const char* op = "weighted_combine";
  check_weighted_combine(op, rows, weights, row_assignment, assignment_row);
  check_plan_of_rows(op, row_assignment, assignment_row);
  const OnDevice device(rows);
  const at::Tensor r = rows.contiguous(), w = weights.contiguous();
  const at::Tensor plan = assignment_row.contiguous();
  at::Tensor y = at::empty({weights.size(0), rows.size(1)}, rows.options());
  const cuda::TokenSums sums{
      .plan = token_rows(r, w, plan),
      .rows = r.const_data_ptr(),
      .y = y.mutable_data_ptr(),
  };
  check_launch(op, cuda::sum_token_rows(sums, device.stream()));
  return y;
}

std::tuple<at::Tensor, at::Tensor> weighted_combine_backward(const at::Tensor& grad_y,
                                                             const at::Tensor& rows,
                                                             const at::Tensor& weights,
                                                             const at::Tensor& row_assignment,
                                                             const at::Tensor& assignment_row,
                                                             std::array<bool, 2> output_mask) {
  check_weighted_combine_backward(grad_y, rows, weights, row_assignment, assignment_row);
  check_plan_of_rows("weighted_combine_backward", row_assignment, assignment_row);
  const OnDevice device(rows);
  const at::Tensor dy = grad_y.contiguous(), r = rows.contiguous(), w = weights.contiguous();
  const at::Tensor plan = assignment_row.contiguous(), owner = row_assignment.contiguous();
  const auto [wants_rows, wants_weights] = output_mask;
  at::Tensor drows =
      wants_rows ? at::empty(rows.sizes(), rows.options()) : at::empty({0}, rows.options());
  at::Tensor dweights = wants_weights ? at::empty(weights.sizes(), weights.options())
                                      : at::empty({0}, weights.options());
  const cuda::TokenSumsGradient gradient{
      .plan = token_rows(r, w, plan),
      .row_owner = owner.const_data_ptr<int32_t>(),
      .owners = weights.numel(),
      .dy = dy.const_data_ptr(),
      .rows = r.const_data_ptr(),
      .drows = wants_rows ? drows.mutable_data_ptr() : nullptr,
      .dweights = wants_weights ? dweights.mutable_data_ptr() : nullptr,
  };
  check_launch("weighted_combine_backward",
               cuda::sum_token_rows_backward(gradient, device.stream()));
  return {drows, dweights};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) {
  m.impl("weighted_combine", &weighted_combine);
  m.impl("weighted_combine_backward", &weighted_combine_backward);
}

}  // namespace moe_ext

// gather_rows on a GPU. A gather is the gradient of a plain sum and a plain sum that of a
// gather, so both kernels are weighted_combine's, without weights: each token is read once
// and written to its rows; the other way, it gathers and sums them.

#include "checks/gather_rows.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/check_plan.h"
#include "cuda/device.h"
#include "cuda/kernels/weighted_combine.h"

namespace moe_ext {
namespace {

// Contiguous rows and plan, for sums without weights.
cuda::TokenRows token_rows(const at::Tensor& rows, const at::Tensor& assignment_row) {
  const bool wide = rows.scalar_type() == at::kDouble;
  return {
      .tokens = assignment_row.size(0),
      .top_k = assignment_row.size(1),
      .hidden = rows.size(1),
      .rows = rows.size(0),
      .dtype = dtype_of(rows),
      .accumulate = wide ? cuda::Dtype::f64 : cuda::Dtype::f32,
      .assignment_row = assignment_row.const_data_ptr<int32_t>(),
  };
}

at::Tensor gather_rows(const at::Tensor& x, const at::Tensor& row_token,
                       const at::Tensor& assignment_row) {
  check_gather_rows(x, row_token, assignment_row);
  check_indices("gather_rows", "row_token", row_token, x.size(0), true);
  check_indices("gather_rows", "assignment_row", assignment_row, row_token.size(0), true);
  const OnDevice device(x);
  const at::Tensor source = x.contiguous();
  const at::Tensor plan = assignment_row.contiguous(), owner = row_token.contiguous();
  at::Tensor rows = at::empty({row_token.size(0), x.size(1)}, x.options());
  const cuda::TokenSumsGradient gather{
      .plan = token_rows(rows, plan),
      .row_owner = owner.const_data_ptr<int32_t>(),
      .owners = x.size(0),
      .dy = source.const_data_ptr(),
      .drows = rows.mutable_data_ptr(),
  };
  check_launch("gather_rows", cuda::sum_token_rows_backward(gather, device.stream()));
  return rows;
}

at::Tensor gather_rows_backward(const at::Tensor& grad_rows, const at::Tensor& assignment_row) {
  check_gather_rows_backward(grad_rows, assignment_row);
  check_indices("gather_rows_backward", "assignment_row", assignment_row, grad_rows.size(0), true);
  const OnDevice device(grad_rows);
  const at::Tensor source = grad_rows.contiguous(), plan = assignment_row.contiguous();
  at::Tensor dx = at::empty({plan.size(0), grad_rows.size(1)}, grad_rows.options());
  const cuda::TokenSums sums{
      .plan = token_rows(source, plan),
      .rows = source.const_data_ptr(),
      .y = dx.mutable_data_ptr(),
  };
  check_launch("gather_rows_backward", cuda::sum_token_rows(sums, device.stream()));
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) {
  m.impl("gather_rows", &gather_rows);
  m.impl("gather_rows_backward", &gather_rows_backward);
}

}  // namespace moe_ext

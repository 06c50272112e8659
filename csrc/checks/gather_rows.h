// The arguments of gather_rows and of its backward, for every device.
#pragma once

#include "checks.h"

namespace moe_ext {

inline void check_gather_rows(const at::Tensor& x, const at::Tensor& row_token,
                              const at::Tensor& assignment_row) {
  constexpr const char* op = "gather_rows";
  check_argument(op, "x", x, is_float(x), x.dim() == 2,
                 "float64, float32, bfloat16 or float16 of shape (T, H)");
  check_argument(op, "assignment_row", assignment_row, assignment_row.scalar_type() == at::kInt,
                 assignment_row.dim() == 2 && assignment_row.size(0) == x.size(0),
                 "int32 of shape (T, K), with T = ", x.size(0));
  check_argument(op, "row_token", row_token, row_token.scalar_type() == at::kInt,
                 row_token.dim() == 1 && row_token.size(0) <= assignment_row.numel(),
                 "int32 of shape (R,), with R <= T*K = ", assignment_row.numel());
  check_same_device(op, "row_token", row_token, "x", x);
  check_same_device(op, "assignment_row", assignment_row, "x", x);
}

inline void check_gather_rows_backward(const at::Tensor& grad_rows,
                                       const at::Tensor& assignment_row) {
  constexpr const char* op = "gather_rows_backward";
  check_argument(op, "grad_rows", grad_rows, is_float(grad_rows), grad_rows.dim() == 2,
                 "float64, float32, bfloat16 or float16 of shape (R, H)");
  check_argument(op, "assignment_row", assignment_row, assignment_row.scalar_type() == at::kInt,
                 assignment_row.dim() == 2, "int32 of shape (T, K)");
  check_same_device(op, "assignment_row", assignment_row, "grad_rows", grad_rows);
}

}  // namespace moe_ext

// The arguments of weighted_combine and of its backward, for every device.
#pragma once

#include "checks.h"

namespace moe_ext {

inline void check_weighted_combine(const char* op, const at::Tensor& rows,
                                   const at::Tensor& weights, const at::Tensor& row_assignment,
                                   const at::Tensor& assignment_row) {
  check_argument(op, "rows", rows, is_float(rows), rows.dim() == 2,
                 "float64, float32, bfloat16 or float16 of shape (R, H)");
  const auto dtype = weights.scalar_type();
  check_argument(op, "weights", weights,
                 dtype == rows.scalar_type() || dtype == at::kFloat || dtype == at::kDouble,
                 weights.dim() == 2, "of rows' dtype ", dtype_name(rows.scalar_type()),
                 " or float32 or float64, of shape (T, K)");
  check_argument(op, "row_assignment", row_assignment, row_assignment.scalar_type() == at::kInt,
                 row_assignment.dim() == 1 && row_assignment.size(0) == rows.size(0),
                 "int32 of shape (R,), with R = ", rows.size(0));
  check_argument(op, "assignment_row", assignment_row, assignment_row.scalar_type() == at::kInt,
                 assignment_row.sizes() == weights.sizes(), "int32 of shape (T, K) = (",
                 weights.size(0), ", ", weights.size(1), ") like weights");
  check_same_device(op, "weights", weights, "rows", rows);
  check_same_device(op, "row_assignment", row_assignment, "rows", rows);
  check_same_device(op, "assignment_row", assignment_row, "rows", rows);
}

inline void check_weighted_combine_backward(const at::Tensor& grad, const at::Tensor& rows,
                                            const at::Tensor& weights,
                                            const at::Tensor& row_assignment,
                                            const at::Tensor& assignment_row) {
  constexpr const char* op = "weighted_combine_backward";
  check_weighted_combine(op, rows, weights, row_assignment, assignment_row);
  check_argument(op, "grad_y", grad, grad.scalar_type() == rows.scalar_type(),
                 grad.dim() == 2 && grad.size(0) == weights.size(0) && grad.size(1) == rows.size(1),
                 "of rows' dtype ", dtype_name(rows.scalar_type()), " and shape (T, H) = (",
                 weights.size(0), ", ", rows.size(1), ")");
  check_same_device(op, "grad_y", grad, "rows", rows);
}

// What the sums are taken in.
inline at::ScalarType combine_accumulation(const at::Tensor& rows, const at::Tensor& weights) {
  const bool wide = rows.scalar_type() == at::kDouble || weights.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

}  // namespace moe_ext

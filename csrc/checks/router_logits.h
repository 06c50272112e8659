// The arguments of router_logits and its backward, checked: the same on every device.
#pragma once

#include <optional>

#include "checks.h"

namespace moe_ext {

// Returns what is accumulated in: float64 if either is float64, else float32.
inline at::ScalarType check_router_matrices(const char* op, const at::Tensor& x,
                                            const at::Tensor& weight) {
  check_argument(op, "x", x, is_float(x), x.dim() == 2,
                 "float64, float32, bfloat16 or float16 of shape (T, H)");
  check_argument(op, "weight", weight, is_float(weight),
                 weight.dim() == 2 && weight.size(1) == x.size(1),
                 "float64, float32, bfloat16 or float16 of shape (E, H), with H = ", x.size(1));
  check_same_device(op, "weight", weight, "x", x);
  const bool is_double = x.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble;
  return is_double ? at::kDouble : at::kFloat;
}

inline at::ScalarType check_router_logits(const at::Tensor& x, const at::Tensor& weight,
                                          const std::optional<at::Tensor>& bias) {
  constexpr const char* op = "router_logits";
  const auto accumulation = check_router_matrices(op, x, weight);
  const int64_t E = weight.size(0);
  if (bias) {
    check_argument(op, "bias", *bias, is_float(*bias), bias->dim() == 1 && bias->size(0) == E,
                   "floating point of shape (E,) = (", E, ",)");
    check_same_device(op, "bias", *bias, "x", x);
  }
  return accumulation;
}

inline at::ScalarType check_router_logits_backward(const at::Tensor& grad_logits,
                                                   const at::Tensor& x, const at::Tensor& weight) {
  constexpr const char* op = "router_logits_backward";
  const auto accumulation = check_router_matrices(op, x, weight);
  const int64_t T = x.size(0), E = weight.size(0);
  check_argument(op, "grad_logits", grad_logits, grad_logits.scalar_type() == accumulation,
                 grad_logits.dim() == 2 && grad_logits.size(0) == T && grad_logits.size(1) == E,
                 dtype_name(accumulation), " of shape (T, E) = (", T, ", ", E, ")");
  check_same_device(op, "grad_logits", grad_logits, "x", x);
  return accumulation;
}

}  // namespace moe_ext

// The arguments of the ops that run experts, for every device: grouped_ffn, moe_forward
// and their backwards. Sizes and strides come out of it; no memory is read.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string_view>

#include "activation.h"
#include "checks.h"

namespace moe_ext {

// A call's experts, plan and options, checked.
struct FfnCall {
  at::Tensor x;                                          // (T, H), its rows' elements side by side
  at::Tensor expert_offsets, row_token, assignment_row;  // the plan, contiguous
  at::Tensor up_proj, down_proj;                         // as they came
  at::Tensor up_bias, down_bias;                         // undefined where there is none
  ActivationSpec spec;
  bool transposed;

  int64_t tokens, hidden, intermediate, width, experts, top_k;  // width: of a preactivation row
  int64_t rows;                                                 // R

  // The weights' dimensions that count outputs and inputs.
  int64_t out_dim() const { return transposed ? 2 : 1; }
  int64_t in_dim() const { return transposed ? 1 : 2; }
};

struct NamedActivation {
  Activation phi;
  bool gated;
};
constexpr NamedActivation kActivations[] = {
    {Activation::silu, true},       {Activation::gelu, true},  {Activation::gelu_tanh, true},
    {Activation::relu, true},       {Activation::silu, false}, {Activation::gelu, false},
    {Activation::gelu_tanh, false}, {Activation::relu, false}, {Activation::relu2, false}};

inline FfnCall check_ffn(const char* op, const at::Tensor& x, const at::Tensor& expert_offsets,
                         const at::Tensor& row_token, const at::Tensor& assignment_row,
                         const at::Tensor& up_proj, const at::Tensor& down_proj,
                         const std::optional<at::Tensor>& up_bias,
                         const std::optional<at::Tensor>& down_bias, std::string_view activation,
                         std::optional<double> limit, double alpha, double up_offset,
                         bool transposed, bool interleaved) {
  check_argument(op, "x", x, is_float(x), x.dim() == 2,
                 "float64, float32, bfloat16 or float16 of shape (T, H)");
  const int name = check_name(
      op, "activation", activation,
      {"swiglu", "geglu", "geglu_tanh", "reglu", "silu", "gelu", "gelu_tanh", "relu", "relu2"});
  const auto [phi, gated] = kActivations[name];
  const int64_t hidden = x.size(1);
  const char* dtype = dtype_name(x.scalar_type());
  const auto same_dtype = [&](const at::Tensor& t) { return t.scalar_type() == x.scalar_type(); };

  const int64_t out = transposed ? 2 : 1, in = transposed ? 1 : 2;
  check_argument(
      op, "up_proj", up_proj, same_dtype(up_proj),
      up_proj.dim() == 3 && up_proj.size(in) == hidden && (!gated || up_proj.size(out) % 2 == 0),
      "of x's dtype ", dtype, " and shape ",
      transposed ? (gated ? "(E, H, 2I)" : "(E, H, I)") : (gated ? "(E, 2I, H)" : "(E, I, H)"),
      " for ", activation, ", with H = ", hidden);
  const int64_t experts = up_proj.size(0), width = up_proj.size(out);
  const int64_t intermediate = gated ? width / 2 : width;
  check_argument(op, "down_proj", down_proj, same_dtype(down_proj),
                 down_proj.dim() == 3 && down_proj.size(0) == experts &&
                     down_proj.size(out) == hidden && down_proj.size(in) == intermediate,
                 "of x's dtype ", dtype, " and shape ", transposed ? "(E, I, H)" : "(E, H, I)",
                 ", with E = ", experts, ", H = ", hidden, ", I = ", intermediate);
  const auto check_bias = [&](const char* bias_name, const std::optional<at::Tensor>& bias,
                              int64_t size) {
    if (!bias) return;
    check_argument(op, bias_name, *bias, same_dtype(*bias),
                   bias->dim() == 2 && bias->size(0) == experts && bias->size(1) == size,
                   "of x's dtype ", dtype, " and shape (", experts, ", ", size, ")");
    check_same_device(op, bias_name, *bias, "x", x);
  };
  check_bias("up_bias", up_bias, width);
  check_bias("down_bias", down_bias, hidden);
  check_same_device(op, "up_proj", up_proj, "x", x);
  check_same_device(op, "down_proj", down_proj, "x", x);
  check_plan(op, expert_offsets, row_token, std::nullopt, assignment_row, x.size(0), experts);
  check_same_device(op, "expert_offsets", expert_offsets, "x", x);

  check_value(op, "limit", !limit || (gated && *limit > 0), limit.value_or(0),
              "above 0 and go with a gated activation");
  check_value(op, "alpha", alpha == 1.0 || activation == "swiglu", alpha, "1 unless swiglu");
  check_value(op, "alpha", std::isfinite(alpha), alpha, "finite");
  check_value(op, "up_offset", std::isfinite(up_offset) && (up_offset == 0.0 || gated), up_offset,
              "finite, and 0 without a gate");
  check_value(op, "interleaved", !interleaved || gated, interleaved, "False without a gate");

  return {x.stride(1) == 1 ? x : x.contiguous(),
          expert_offsets.contiguous(),
          row_token.contiguous(),
          assignment_row.contiguous(),
          up_proj,
          down_proj,
          up_bias.value_or(at::Tensor()),
          down_bias.value_or(at::Tensor()),
          {phi, gated, interleaved, limit.value_or(std::numeric_limits<double>::infinity()), alpha,
           up_offset},
          transposed,
          x.size(0),
          hidden,
          intermediate,
          width,
          experts,
          assignment_row.size(1),
          row_token.size(0)};
}

// The second result of the forward op.
inline at::Tensor check_preactivations(const char* op, const FfnCall& call,
                                       const at::Tensor& tensor) {
  check_argument(op, "preactivations", tensor, tensor.scalar_type() == call.x.scalar_type(),
                 tensor.dim() == 2 && tensor.size(0) == call.rows && tensor.size(1) == call.width,
                 "the second result of the forward op, of shape (", call.rows, ", ", call.width,
                 ")");
  check_same_device(op, "preactivations", tensor, "x", call.x);
  return tensor.contiguous();
}

// The upstream gradient, of grouped_ffn's rows or of moe_forward's tokens: its rows'
// elements side by side.
inline at::Tensor check_upstream(const char* op, const char* name, const FfnCall& call,
                                 const at::Tensor& grad, int64_t rows) {
  check_argument(op, name, grad, grad.scalar_type() == call.x.scalar_type(),
                 grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == call.hidden,
                 "of x's dtype and shape (", rows, ", ", call.hidden, ")");
  check_same_device(op, name, grad, "x", call.x);
  return grad.stride(1) == 1 ? grad : grad.contiguous();
}

// The routing weights, and the plan's part that only goes with them.
inline void check_routing(const char* op, const FfnCall& call, const at::Tensor& weights,
                          const at::Tensor& row_assignment) {
  const at::ScalarType dtype = weights.scalar_type();
  check_argument(op, "weights", weights, dtype == call.x.scalar_type() || dtype == at::kFloat,
                 weights.dim() == 2 && weights.sizes() == call.assignment_row.sizes(),
                 "float32 or of x's dtype ", dtype_name(call.x.scalar_type()),
                 ", of shape (T, K) = (", call.tokens, ", ", call.top_k, ")");
  check_same_device(op, "weights", weights, "x", call.x);
  check_plan(op, call.expert_offsets, call.row_token, row_assignment, call.assignment_row,
             call.tokens, call.experts);
}

}  // namespace moe_ext

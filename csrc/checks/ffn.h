// The arguments of the ops that run experts, for every device: grouped_ffn, moe_forward
// and their backwards, read and checked. Sizes come out of it; no memory is read.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cmath>
#include <limits>

#include "activation.h"
#include "checks.h"
#include "operands.h"

namespace moe_ext {

// A call's experts, plan and options, checked. What an op does not take is undefined.
struct FfnCall : ExpertOperands {
  at::Tensor x;                                          // (T, H), its rows' elements side by side
  at::Tensor expert_offsets, row_token, assignment_row;  // the plan, contiguous
  at::Tensor weights, row_assignment;  // the routing weights, and their part of it
  at::Tensor upstream;                 // backward: the gradient of the rows, or of the tokens
  at::Tensor preactivations;           // backward: what the forward op kept
  bool keep_preactivations = false, batch_invariant = false;
  std::array<bool, kGradients> wanted{};  // backward

  ActivationSpec spec;
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

// The experts, the rows of x and the plan; fills in the sizes.
inline void check_ffn(const char* op, FfnCall& call) {
  const auto& [up_proj, down_proj, up_bias, down_bias, up_lora_a, up_lora_b, down_lora_a,
               down_lora_b, activation, limit, alpha, up_offset, transposed, interleaved] =
      static_cast<const ExpertOperands&>(call);
  const at::Tensor& x = call.x;
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
  const auto check_bias = [&](const char* bias_name, const at::Tensor& bias, int64_t size) {
    if (!bias.defined()) return;
    check_argument(op, bias_name, bias, same_dtype(bias),
                   bias.dim() == 2 && bias.size(0) == experts && bias.size(1) == size,
                   "of x's dtype ", dtype, " and shape (", experts, ", ", size, ")");
    check_same_device(op, bias_name, bias, "x", x);
  };
  check_bias("up_bias", up_bias, width);
  check_bias("down_bias", down_bias, hidden);
  const auto check_factors = [&](const char* a_name, const at::Tensor& a, const char* b_name,
                                 const at::Tensor& b, int64_t in_size, int64_t out_size) {
    TORCH_CHECK_VALUE(a.defined() == b.defined(), op, ": ", a_name, " and ", b_name,
                      " must be given together, got ", describe(a), " and ", describe(b));
    if (!a.defined()) return;
    check_argument(op, a_name, a, same_dtype(a),
                   a.dim() == 3 && a.size(0) == experts && a.size(1) == in_size && a.size(2) >= 1,
                   "of x's dtype ", dtype, " and shape (", experts, ", ", in_size, ", r)");
    check_argument(
        op, b_name, b, same_dtype(b),
        b.dim() == 3 && b.size(0) == experts && b.size(1) == a.size(2) && b.size(2) == out_size,
        "of x's dtype ", dtype, " and shape (", experts, ", ", a.size(2), ", ", out_size, ")");
    check_same_device(op, a_name, a, "x", x);
    check_same_device(op, b_name, b, "x", x);
  };
  check_factors("up_lora_a", up_lora_a, "up_lora_b", up_lora_b, hidden, width);
  check_factors("down_lora_a", down_lora_a, "down_lora_b", down_lora_b, intermediate, hidden);
  check_same_device(op, "up_proj", up_proj, "x", x);
  check_same_device(op, "down_proj", down_proj, "x", x);
  check_plan(op, call.expert_offsets, call.row_token, std::nullopt, call.assignment_row, x.size(0),
             experts);
  check_same_device(op, "expert_offsets", call.expert_offsets, "x", x);

  check_value(op, "limit", !limit || (gated && *limit > 0), limit.value_or(0),
              "above 0 and go with a gated activation");
  check_value(op, "alpha", alpha == 1.0 || activation == "swiglu", alpha, "1 unless swiglu");
  check_value(op, "alpha", std::isfinite(alpha), alpha, "finite");
  check_value(op, "up_offset", std::isfinite(up_offset) && (up_offset == 0.0 || gated), up_offset,
              "finite, and 0 without a gate");
  check_value(op, "interleaved", !interleaved || gated, interleaved, "False without a gate");

  call.spec = {phi,         gated,
               interleaved, limit.value_or(std::numeric_limits<double>::infinity()),
               alpha,       up_offset};
  call.tokens = x.size(0);
  call.hidden = hidden;
  call.intermediate = intermediate;
  call.width = width;
  call.experts = experts;
  call.top_k = call.assignment_row.size(1);
  call.rows = call.row_token.size(0);
}

// The routing weights, and the plan's part that only goes with them.
inline void check_routing(const char* op, const FfnCall& call) {
  const at::Tensor& weights = call.weights;
  const at::ScalarType dtype = weights.scalar_type();
  check_argument(op, "weights", weights, dtype == call.x.scalar_type() || dtype == at::kFloat,
                 weights.dim() == 2 && weights.sizes() == call.assignment_row.sizes(),
                 "float32 or of x's dtype ", dtype_name(call.x.scalar_type()),
                 ", of shape (T, K) = (", call.tokens, ", ", call.top_k, ")");
  check_same_device(op, "weights", weights, "x", call.x);
  check_plan(op, call.expert_offsets, call.row_token, call.row_assignment, call.assignment_row,
             call.tokens, call.experts);
}

// What only a backward op takes.
inline void check_backward(const char* op, const char* grad_name, const FfnCall& call) {
  const at::Tensor &grad = call.upstream, &kept = call.preactivations;
  const int64_t grad_rows = call.weights.defined() ? call.tokens : call.rows;
  check_argument(op, grad_name, grad, grad.scalar_type() == call.x.scalar_type(),
                 grad.dim() == 2 && grad.size(0) == grad_rows && grad.size(1) == call.hidden,
                 "of x's dtype and shape (", grad_rows, ", ", call.hidden, ")");
  check_same_device(op, grad_name, grad, "x", call.x);
  check_argument(op, "preactivations", kept, kept.scalar_type() == call.x.scalar_type(),
                 kept.dim() == 2 && kept.size(0) == call.rows && kept.size(1) == call.width,
                 "the second result of the forward op, of shape (", call.rows, ", ", call.width,
                 ")");
  check_same_device(op, "preactivations", kept, "x", call.x);
}

// The arguments of grouped_ffn, moe_forward or either's backward op, checked.
inline FfnCall read_ffn(Arguments& args) {
  const char* op = args.op();
  FfnCall call;
  const char* grad_name = args.next_is("grad_rows") ? "grad_rows" : "grad_y";
  const bool backward = args.next_is(grad_name);
  if (backward) call.upstream = args.tensor(grad_name);
  call.x = args.tensor("x");
  const bool weighted = args.next_is("weights");
  if (weighted) call.weights = args.tensor("weights");
  if (backward) call.preactivations = args.tensor("preactivations");
  call.expert_offsets = args.tensor("expert_offsets");
  call.row_token = args.tensor("row_token");
  if (weighted) call.row_assignment = args.tensor("row_assignment");
  call.assignment_row = args.tensor("assignment_row");
  static_cast<ExpertOperands&>(call) = ExpertOperands::read(args);
  if (backward) {
    int gradient = 0;
    for (const bool wanted : args.flags("output_mask")) {
      if (gradient == kWeights && !weighted) ++gradient;
      call.wanted[gradient++] = wanted;
    }
    gradient = kUpProj;
    for (const at::Tensor* tensor : call.tensors()) call.wanted[gradient++] &= tensor->defined();
  } else {
    call.keep_preactivations = args.flag("keep_preactivations");
    call.batch_invariant = args.flag("batch_invariant");
  }

  check_ffn(op, call);
  if (weighted) check_routing(op, call);
  if (backward) check_backward(op, grad_name, call);
  for (at::Tensor* rows : {&call.x, &call.upstream}) {
    if (rows->defined() && rows->stride(1) != 1) *rows = rows->contiguous();
  }
  for (at::Tensor* whole : {&call.expert_offsets, &call.row_token, &call.row_assignment,
                            &call.assignment_row, &call.weights, &call.preactivations}) {
    if (whole->defined()) *whole = whole->contiguous();
  }
  return call;
}

}  // namespace moe_ext

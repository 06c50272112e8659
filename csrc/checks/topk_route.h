// The arguments of topk_route and its backward, checked: the same on every device.
#pragma once

#include <optional>
#include <string_view>

#include "checks.h"
#include "operands.h"
#include "routing.h"

namespace moe_ext {

inline void check_route_inputs(const char* op, const at::Tensor& logits,
                               const std::optional<at::Tensor>& padding_mask) {
  check_argument(op, "logits", logits, is_float(logits), logits.dim() == 2 && logits.size(1) >= 1,
                 "float64, float32, bfloat16 or float16 of shape (T, E), E at least 1");
  if (padding_mask) {
    check_padding_mask(op, *padding_mask, logits.size(0));
    check_same_device(op, "padding_mask", *padding_mask, "logits", logits);
  }
}

inline void check_route_experts(const char* op, const at::Tensor& experts, const at::Tensor& logits,
                                int64_t top_k) {
  check_argument(
      op, "experts", experts, is_index(experts),
      experts.dim() == 2 && experts.size(0) == logits.size(0) && experts.size(1) == top_k,
      "int32 or int64 of shape (T, K) = (", logits.size(0), ", ", top_k, ")");
  check_same_device(op, "experts", experts, "logits", logits);
}

inline ScoreFunction check_score_function(const char* op, std::string_view name) {
  return static_cast<ScoreFunction>(
      check_name(op, "score_function", name, {"softmax", "sigmoid", "softmax_topk"}));
}

// A call of topk_route, checked.
struct RouteCall {
  at::Tensor logits;
  std::optional<at::Tensor> selection_bias, padding_mask, experts;
  RouteOptions options;
};

inline RouteCall read_topk_route(Arguments& args) {
  const char* op = args.op();
  const at::Tensor& logits = args.tensor("logits");
  const int64_t top_k = args.integer("top_k");
  const auto selection_bias = args.optional_tensor("selection_bias");
  const auto padding_mask = args.optional_tensor("padding_mask");
  const auto experts = args.optional_tensor("experts");
  const auto [score_function, norm_topk_prob, routed_scaling_factor, n_group, topk_group,
              group_score] = RouteArguments::read(args);
  check_route_inputs(op, logits, padding_mask);
  const int64_t E = logits.size(1);
  check_value(op, "top_k", top_k >= 1 && top_k <= E, top_k, "in 1..E = ", E);
  check_value(op, "n_group", n_group >= 1 && E % n_group == 0, n_group,
              "at least 1 and a divisor of E = ", E);
  check_value(op, "topk_group", topk_group >= 1 && topk_group <= n_group, topk_group,
              "in 1..n_group = ", n_group);
  check_value(op, "top_k", top_k <= topk_group * (E / n_group), top_k,
              "at most the experts of topk_group groups, ", topk_group * (E / n_group));
  RouteOptions options{
      E,
      top_k,
      check_score_function(op, score_function),
      norm_topk_prob,
      routed_scaling_factor,
      n_group,
      topk_group,
      static_cast<GroupScore>(check_name(op, "group_score", group_score, {"max", "top2_sum"})),
      /*replay=*/experts.has_value()};
  const bool adds_scores = options.group_score == kTop2Sum && topk_group < n_group;
  options.by_logits =
      options.score_function == kSoftmaxTopk && !selection_bias.has_value() && !adds_scores;
  if (selection_bias) {
    check_argument(op, "selection_bias", *selection_bias, is_float(*selection_bias),
                   selection_bias->dim() == 1 && selection_bias->size(0) == E,
                   "floating point of shape (E,) = (", E, ",)");
    check_same_device(op, "selection_bias", *selection_bias, "logits", logits);
  }
  if (experts) check_route_experts(op, *experts, logits, top_k);
  return {logits, selection_bias, padding_mask, experts, options};
}

inline RouteOptions check_topk_route_backward(const std::optional<at::Tensor>& grad_weights,
                                              const std::optional<at::Tensor>& grad_score_sums,
                                              const std::optional<at::Tensor>& grad_logsumexp,
                                              const at::Tensor& logits, const at::Tensor& experts,
                                              const std::optional<at::Tensor>& padding_mask,
                                              std::string_view score_function, bool norm_topk_prob,
                                              double routed_scaling_factor) {
  constexpr const char* op = "topk_route_backward";
  check_route_inputs(op, logits, padding_mask);
  check_route_experts(op, experts, logits, experts.dim() == 2 ? experts.size(1) : 0);
  const int64_t T = logits.size(0), E = logits.size(1), K = experts.size(1);
  const RouteOptions options{E,
                             K,
                             check_score_function(op, score_function),
                             norm_topk_prob,
                             routed_scaling_factor,
                             /*n_group=*/1,
                             /*topk_group=*/1,
                             kMax,
                             /*replay=*/true};
  const auto accumulation = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto check = [&](const char* name, const std::optional<at::Tensor>& grad,
                         at::IntArrayRef shape) {
    if (!grad) return;
    check_argument(op, name, *grad, grad->scalar_type() == accumulation, grad->sizes() == shape,
                   dtype_name(accumulation), " of shape ", shape);
    check_same_device(op, name, *grad, "logits", logits);
  };
  check("grad_weights", grad_weights, {T, K});
  check("grad_score_sums", grad_score_sums, {E});
  check("grad_logsumexp", grad_logsumexp, {T});
  return options;
}

}  // namespace moe_ext

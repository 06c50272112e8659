// The arguments of accumulate_stats, checked, and whether it has anything to do: the same
// on every device.
#pragma once

#include <torch/library.h>

#include <optional>
#include <string_view>

#include "checks.h"
#include "routing.h"

namespace torch::autograd {
// From torch/csrc/autograd/graph_task.h, which would bring the whole engine along:
// -1 outside of a backward pass.
TORCH_API int get_current_graph_task_id();
}  // namespace torch::autograd

namespace moe_ext {

// What runs inside a backward pass is a recomputation, and was counted before.
inline bool is_recomputation() { return torch::autograd::get_current_graph_task_id() != -1; }

inline ScoreFunction check_accumulate_stats(
    const at::Tensor& counts, const at::Tensor& score_sums, const at::Tensor& totals,
    const std::optional<at::Tensor>& step_counts, const at::Tensor& logits,
    const at::Tensor& experts, const at::Tensor& expert_counts, const at::Tensor& route_score_sums,
    const std::optional<at::Tensor>& assignment_row, const std::optional<at::Tensor>& padding_mask,
    std::string_view score_function) {
  constexpr const char* op = "accumulate_stats";
  check_argument(op, "logits", logits, is_float(logits), logits.dim() == 2,
                 "float64, float32, bfloat16 or float16 of shape (T, E)");
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  const auto check_sums = [&](const char* name, const at::Tensor& t, at::ScalarType dtype,
                              int64_t size) {
    check_argument(op, name, t, t.scalar_type() == dtype,
                   t.dim() == 1 && t.size(0) == size && t.is_contiguous(), dtype_name(dtype),
                   " and contiguous of shape (", size, ",)");
    check_same_device(op, name, t, "logits", logits);
  };
  check_sums("counts", counts, at::kLong, num_experts);
  check_sums("score_sums", score_sums, at::kDouble, num_experts);
  check_sums("totals", totals, at::kDouble, kStatsSlots);
  if (step_counts) check_sums("step_counts", *step_counts, at::kLong, num_experts);
  check_argument(op, "experts", experts, is_index(experts),
                 experts.dim() == 2 && experts.size(0) == tokens,
                 "int32 or int64 of shape (T, K), with T = ", tokens);
  check_same_device(op, "experts", experts, "logits", logits);
  check_argument(op, "expert_counts", expert_counts, expert_counts.scalar_type() == at::kInt,
                 expert_counts.dim() == 1 && expert_counts.size(0) == num_experts,
                 "int32 of shape (E,), with E = ", num_experts);
  check_same_device(op, "expert_counts", expert_counts, "logits", logits);
  check_argument(
      op, "route_score_sums", route_score_sums,
      route_score_sums.scalar_type() == at::kFloat || route_score_sums.scalar_type() == at::kDouble,
      route_score_sums.dim() == 1 && route_score_sums.size(0) == num_experts,
      "float32 or float64 of shape (E,), with E = ", num_experts);
  check_same_device(op, "route_score_sums", route_score_sums, "logits", logits);
  if (assignment_row) {
    check_argument(op, "assignment_row", *assignment_row, assignment_row->scalar_type() == at::kInt,
                   assignment_row->sizes() == experts.sizes(),
                   "int32 of shape (T, K) like experts");
    check_same_device(op, "assignment_row", *assignment_row, "logits", logits);
  }
  if (padding_mask) {
    check_padding_mask(op, *padding_mask, tokens);
    check_same_device(op, "padding_mask", *padding_mask, "logits", logits);
  }
  return static_cast<ScoreFunction>(
      check_name(op, "score_function", score_function, {"softmax", "sigmoid", "softmax_topk"}));
}

}  // namespace moe_ext

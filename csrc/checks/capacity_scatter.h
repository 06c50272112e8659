// The arguments of capacity_scatter, for every device, and what follows from them alone.
#pragma once

#include <limits>

#include "checks.h"

namespace moe_ext {

enum DropPolicy { kChoice, kToken, kProbs };

struct ScatterPlan {
  int64_t rows;  // R
  DropPolicy policy;
};

inline ScatterPlan check_capacity_scatter(const at::Tensor& experts, int64_t num_experts,
                                          std::optional<int64_t> capacity,
                                          const std::optional<at::Tensor>& weights,
                                          const std::optional<at::Tensor>& padding_mask,
                                          std::string_view drop_policy, int64_t num_sequences) {
  constexpr const char* op = "capacity_scatter";
  check_argument(op, "experts", experts, is_index(experts), experts.dim() == 2,
                 "int32 or int64 of shape (T, K)");
  const int64_t tokens = experts.size(0), top_k = experts.size(1), size = experts.numel();
  constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();
  check_value(op, "experts", size < kMaxIndex, size, "fewer than 2**31 - 1 assignments T*K");
  check_value(op, "num_experts", num_experts >= 1 && num_experts < kMaxIndex, num_experts,
              "in 1..2**31 - 2");
  if (capacity) check_value(op, "capacity", *capacity >= 0, *capacity, "None or at least 0");
  check_value(op, "num_sequences", num_sequences >= 1 && tokens % num_sequences == 0, num_sequences,
              "at least 1 and a divisor of T = ", tokens);
  const auto policy = static_cast<DropPolicy>(
      check_name(op, "drop_policy", drop_policy, {"choice", "token", "probs"}));
  if (weights) {
    check_argument(op, "weights", *weights, is_float(*weights), weights->sizes() == experts.sizes(),
                   "floating point of shape (T, K) = (", tokens, ", ", top_k, ") like experts");
    check_same_device(op, "weights", *weights, "experts", experts);
  }
  TORCH_CHECK_VALUE(!capacity || policy != kProbs || weights, op,
                    ": weights must be given with drop_policy probs, got None");
  if (padding_mask) {
    check_padding_mask(op, *padding_mask, tokens);
    check_same_device(op, "padding_mask", *padding_mask, "experts", experts);
  }

  // min(T*K, E*C*num_sequences), whose product may not fit 64 bits.
  const int64_t buckets = num_experts * num_sequences;
  const bool limited = capacity && *capacity <= (size - 1) / buckets;
  return {limited ? *capacity * buckets : size, policy};
}

}  // namespace moe_ext

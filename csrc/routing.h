// What the routing stages are told, and how their statistics are laid out: shared by the
// CPU ops, the CUDA ops and the kernels, so it knows neither torch nor CUDA.
#pragma once

#include <cstdint>

namespace moe_ext {

enum ScoreFunction { kSoftmax, kSigmoid, kSoftmaxTopk };
enum GroupScore { kMax, kTop2Sum };

struct RouteOptions {
  int64_t num_experts, top_k;
  ScoreFunction score_function;
  bool norm_topk_prob;
  double scale;
  int64_t n_group, topk_group;
  GroupScore group_score;
  bool replay;
  // softmax_topk's choice, unless something is added to its scores: the logits order as the
  // softmax does, and do not underflow.
  bool by_logits = false;
};

// The slots of accumulate_stats' `totals`; moe_ext/reference.py has the same list.
enum StatsSlot {
  kTokens,
  kAssignments,
  kDropped,
  kLostTokens,
  kEntropy,
  kMaxLogit,
  kForwards,
  kStatsSlots
};

}  // namespace moe_ext

// One token's logits and all that topk_route makes of them but the choice: shared by
// its forward and its backward, which recomputes the row instead of keeping it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/simd.h"
#include "routing.h"

namespace moe_ext {

constexpr int64_t kLanes = 16;  // the widest vector, in float32

// E in whole vectors.
inline int64_t padded(const RouteOptions& o) {
  return (o.num_experts + kLanes - 1) / kLanes * kLanes;
}

template <typename A>
constexpr A kInf = std::numeric_limits<A>::infinity();

// One token's row and what is made of it.
template <typename A>
struct RouteRow {
  explicit RouteRow(const RouteOptions& o)
      : logits(padded(o), -kInf<A>), exps(padded(o)), scores(padded(o)) {}
  std::vector<A> logits, exps, scores;  // exps: exp(logit - max)
  A exp_sum, score_sum, logsumexp;
};

template <typename T, typename A>
MOE_EXT_INLINE void read_row(RouteRow<A>& row, const T* source, const RouteOptions& o) {
  const int64_t size = padded(o);
  A* logits = row.logits.data();
  A* exps = row.exps.data();
  A* scores = row.scores.data();
#pragma omp simd
  for (int64_t e = 0; e < o.num_experts; ++e) logits[e] = widen(source[e]);
  A max = -kInf<A>;
  int32_t nan = 0;
#pragma omp simd reduction(max : max) reduction(| : nan)
  for (int64_t e = 0; e < size; ++e) {
    max = logits[e] > max ? logits[e] : max;
    nan |= logits[e] != logits[e];
  }
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < size; ++e) {
    exps[e] = exp_nonpositive(logits[e] - max);
    sum += exps[e];
  }
  row.exp_sum = sum;
  row.logsumexp = !nan && std::isinf(max) ? max : max + std::log(sum);
  if (o.score_function == kSigmoid) {
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t e = 0; e < size; ++e) {
      scores[e] = sigmoid(logits[e]);
      total += scores[e];
    }
    row.score_sum = total;
  } else {
#pragma omp simd
    for (int64_t e = 0; e < size; ++e) scores[e] = exps[e] / sum;
    row.score_sum = 1;
  }
}

// The weights before routed_scaling_factor.
template <typename A>
MOE_EXT_INLINE void weigh(const RouteRow<A>& row, const RouteOptions& o, const int32_t* experts,
                          A* weights) {
  const int64_t E = o.num_experts, K = o.top_k;
  double sum = 0;  // K may be large
  if (o.score_function == kSoftmaxTopk) {
    A max = -kInf<A>;
    for (int64_t j = 0; j < K; ++j)
      if (experts[j] < E && row.logits[experts[j]] > max) max = row.logits[experts[j]];
    for (int64_t j = 0; j < K; ++j) {
      weights[j] = experts[j] < E ? exp_nonpositive(row.logits[experts[j]] - max) : A(0);
      sum += weights[j];
    }
  } else {
    for (int64_t j = 0; j < K; ++j) {
      weights[j] = experts[j] < E ? row.scores[experts[j]] : A(0);
      sum += weights[j];
    }
    sum = o.norm_topk_prob ? sum + 1e-20 : 1;
  }
  const A total = static_cast<A>(sum);
  for (int64_t j = 0; j < K; ++j) weights[j] = experts[j] < E ? weights[j] / total : A(0);
}

}  // namespace moe_ext

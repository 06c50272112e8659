// topk_route: from a token's logits to its experts and weights, in one pass over the logits,
// together with everything the losses need; and its backward, which recomputes a token's scores
// instead of keeping them.
//
// A token's scores live in one row of the first-level cache, padded with -inf to whole vectors, so
// that every expert goes through the same vector instructions and equal logits have equal scores.
// The choice is made on integer keys that order like the scores (NaN as -inf); below them is one
// more key for what may not be chosen, so an id is always in range.

constexpr int64_t kScoreLanes = 16;   // the widest vector, in float
constexpr int64_t kManyChoices = 32;  // above this top_k, sorting beats picking

inline int64_t padded_scores(int64_t num_experts) { return round_up(num_experts, kScoreLanes); }

template <class A>
constexpr A kInf = std::numeric_limits<A>::infinity();

// One token's logits and what is made of them.
template <class A>
struct Scores {
  explicit Scores(const RouteOptions& o)
      : logits(padded_scores(o.num_experts), -kInf<A>),
        exps(logits.size()),
        scores(logits.size()) {}
  std::vector<A> logits, exps, scores;  // exps: exp(logit - max)
  A exp_sum, score_sum, logsumexp;
};

template <class A, class T>
void read_scores(Scores<A>& row, const T* source, const RouteOptions& o) {
  const int64_t size = padded_scores(o.num_experts);
  A* logits = row.logits.data();
  A* exps = row.exps.data();
  A* scores = row.scores.data();
#pragma omp simd
  for (int64_t e = 0; e < o.num_experts; ++e) logits[e] = to_compute(source[e]);
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
      scores[e] = sigmoid_of_score(logits[e]);
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
template <class A>
void weigh(const Scores<A>& row, const RouteOptions& o, const int32_t* experts, A* weights) {
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

// ---- the choice

template <class A>
using Key = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

template <class K>
constexpr K kIneligible = std::numeric_limits<K>::min();

// Orders as the numbers do; NaN as -inf, -0 as 0.
template <class A>
MOE_INLINE Key<A> key_of(A x) {
  using K = Key<A>;
  const K bits = bit_cast<K>((x == x ? x : -kInf<A>)+A(0));
  return bits ^ (bits >> (8 * sizeof(K) - 1) & std::numeric_limits<K>::max());
}

// The largest key's lowest index, which is then no longer eligible.
template <class K>
MOE_INLINE int32_t take_best(K* keys, int64_t padded) {
  K best = kIneligible<K>;
#pragma omp simd reduction(max : best)
  for (int64_t e = 0; e < padded; ++e) best = keys[e] > best ? keys[e] : best;
  int32_t id = std::numeric_limits<int32_t>::max();
#pragma omp simd reduction(min : id)
  for (int32_t e = 0; e < static_cast<int32_t>(padded); ++e) {
    const int32_t candidate = keys[e] == best ? e : id;
    id = candidate < id ? candidate : id;
  }
  keys[id] = kIneligible<K>;
  return id;
}

// Of one token after the other.
template <class A>
struct Chooser {
  using K = Key<A>;

  Chooser(const RouteOptions& o, const A* bias)
      : o(o), bias(bias), keys(padded_scores(o.num_experts)), groups(padded_scores(o.n_group)) {}

  void choose(const Scores<A>& row, int32_t* experts) {
    const int64_t E = o.num_experts;
    const A* scores = (o.by_logits ? row.logits : row.scores).data();
    K* key = keys.data();
    if (bias) {
      const A* b = bias;
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) key[e] = key_of(scores[e] + b[e]);
    } else {
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) key[e] = key_of(scores[e]);
    }
    std::fill(keys.begin() + E, keys.end(), kIneligible<K>);
    if (o.topk_group < o.n_group) keep_best_groups(scores);
    if (o.top_k > kManyChoices) {
      sort_best(experts);
    } else {
      for (int64_t j = 0; j < o.top_k; ++j)
        experts[j] = take_best(key, padded_scores(o.num_experts));
    }
  }

 private:
  // All at once; a tie goes to the lower id.
  void sort_best(int32_t* experts) {
    order.clear();
    for (int32_t e = 0; e < o.num_experts; ++e) order.emplace_back(keys[e], -e);
    std::partial_sort(order.begin(), order.begin() + o.top_k, order.end(), std::greater<>());
    for (int64_t j = 0; j < o.top_k; ++j) experts[j] = -order[j].second;
  }

  // Makes the experts of all groups but the best `topk_group` ineligible.
  void keep_best_groups(const A* scores) {
    const int64_t size = o.num_experts / o.n_group;
    for (int64_t g = 0; g < o.n_group; ++g) {
      A first = -kInf<A>, second = -kInf<A>;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        const A score = scores[e] + (bias ? bias[e] : A(0));
        if (score > first) {
          second = first;
          first = score;
        } else if (score > second) {
          second = score;
        }
      }
      const bool top2_sum = o.group_score == kTop2Sum && size > 1;
      groups[g] = key_of(top2_sum ? first + second : first);
    }
    std::fill(groups.begin() + o.n_group, groups.end(), kIneligible<K>);
    for (int64_t i = 0; i < o.topk_group; ++i) take_best(groups.data(), groups.size());
    for (int64_t g = 0; g < o.n_group; ++g)
      if (groups[g] != kIneligible<K>) std::fill_n(keys.begin() + g * size, size, kIneligible<K>);
  }

  const RouteOptions& o;
  const A* bias;
  std::vector<K> keys, groups;
  std::vector<std::pair<K, int32_t>> order;
};

// ---- blocks of tokens

template <class A, class T>
void route_tokens(const Routing<A>& to, int64_t tokens) {
  const RouteOptions o = to.options;
  const int64_t E = o.num_experts, K = o.top_k;
  const A scale = static_cast<A>(o.scale);
  Scores<A> row(o);
  Chooser<A> chooser(o, to.bias);
  A* score_sums = to.score_sums;
  std::fill_n(score_sums, E, A(0));
  for (int64_t t = 0; t < tokens; ++t) {
    A* weight = to.weights + t * K;
    int32_t* expert = to.experts + t * K;
    if (to.padding && to.padding[t]) {
      std::fill_n(weight, K, A(0));
      std::fill_n(expert, K, static_cast<int32_t>(E));
      to.logsumexp[t] = 0;
      continue;
    }
    read_scores(row, row_of<T>(to.logits, t), o);
    to.logsumexp[t] = row.logsumexp;
    const A* scores = row.scores.data();
    const A share = 1 / row.score_sum;
#pragma omp simd
    for (int64_t e = 0; e < E; ++e) score_sums[e] += scores[e] * share;
    if (!o.replay) chooser.choose(row, expert);
    weigh(row, o, expert, weight);
    for (int64_t j = 0; j < K; ++j) weight[j] *= scale;
  }
}

template <class A>
void route(const Routing<A>& to, int64_t tokens) {
  with_storage<A>(to.logits.dtype,
                  [&](auto stored) { route_tokens<A, decltype(stored)>(to, tokens); });
}

// With v the weights before the factor c and g = c dw, the chosen scores get
//   normalised: (g - <g, v>) / sum of the chosen scores      otherwise: g
// and every score gets (G - <G, s> / S) / S from score_sums, S being the sum of the
// scores. A softmax passes ds on as s (ds - <ds, s>), a sigmoid as s (1 - s) ds;
// softmax_topk's weights reach the chosen logits directly, as v (g - <g, v>).
template <class A, class T>
void route_tokens_backward(const RoutingBackward<A>& from, int64_t tokens) {
  const RouteOptions o = from.options;
  const int64_t E = o.num_experts, K = o.top_k;
  const A scale = static_cast<A>(o.scale);
  const A *dweights = from.weights, *dscore_sums = from.score_sums;
  Scores<A> row(o);
  std::vector<A> dscores(E), v(K), dchosen(K);
  for (int64_t t = 0; t < tokens; ++t) {
    T* out = static_cast<T*>(from.dlogits.data) + t * from.dlogits.stride;
    if (from.padding && from.padding[t]) {
      std::fill_n(out, E, T());
      continue;
    }
    read_scores(row, row_of<T>(from.logits, t), o);
    const int32_t* expert = from.experts + t * K;
    const A* scores = row.scores.data();
    const A* exps = row.exps.data();
    A* ds = dscores.data();

    if (dscore_sums) {
      const A share = 1 / row.score_sum;
      A mean = 0;
#pragma omp simd reduction(+ : mean)
      for (int64_t e = 0; e < E; ++e) mean += dscore_sums[e] * scores[e];
      mean *= share;
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) ds[e] = (dscore_sums[e] - mean) * share;
    } else {
      std::fill_n(ds, E, A(0));
    }
    if (dweights) {
      weigh(row, o, expert, v.data());
      double dot = 0, sum = 1e-20;  // K may be large
      for (int64_t j = 0; j < K; ++j) {
        if (expert[j] >= E) continue;
        dchosen[j] = dweights[t * K + j] * scale;
        dot += dchosen[j] * v[j];
        sum += scores[expert[j]];
      }
      const A inner = static_cast<A>(dot), total = static_cast<A>(sum);
      for (int64_t j = 0; j < K; ++j) {
        if (expert[j] >= E) continue;
        if (o.score_function == kSoftmaxTopk) {
          dchosen[j] = v[j] * (dchosen[j] - inner);
        } else {
          ds[expert[j]] += o.norm_topk_prob ? (dchosen[j] - inner) / total : dchosen[j];
        }
      }
    }

    if (o.score_function == kSigmoid) {
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) ds[e] *= scores[e] * (1 - scores[e]);
    } else {
      A inner = 0;
#pragma omp simd reduction(+ : inner)
      for (int64_t e = 0; e < E; ++e) inner += ds[e] * scores[e];
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) ds[e] = scores[e] * (ds[e] - inner);
    }
    if (dweights && o.score_function == kSoftmaxTopk) {
      for (int64_t j = 0; j < K; ++j)
        if (expert[j] < E) ds[expert[j]] += dchosen[j];
    }
    if (from.logsumexp) {
      const A factor = from.logsumexp[t] / row.exp_sum;
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) ds[e] += exps[e] * factor;
    }
#pragma omp simd
    for (int64_t e = 0; e < E; ++e) from_compute(out[e], ds[e]);
  }
}

template <class A>
void route_backward(const RoutingBackward<A>& from, int64_t tokens) {
  with_storage<A>(from.logits.dtype,
                  [&](auto stored) { route_tokens_backward<A, decltype(stored)>(from, tokens); });
}

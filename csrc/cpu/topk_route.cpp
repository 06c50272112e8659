// topk_route: from a token's logits to its experts and weights, in one pass over
// the logits, together with everything the losses need.
//
// A token's scores live in one row of L1, padded with -inf to whole vectors, so that
// every expert goes through the same vector instructions and equal logits have equal
// scores. The choice is made on integer keys that order like the scores (NaN as -inf);
// below them is one more key for what may not be chosen, so an id is always in range.
// score_sums is summed over blocks of 256 tokens, then over the blocks in float64.

#include "checks/topk_route.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/route_row.h"
#include "cpu/simd.h"

namespace moe_ext {
namespace {

constexpr int64_t kBlock = 256;       // tokens
constexpr int64_t kManyChoices = 32;  // above this top_k, sorting beats picking

template <typename A>
using key_t = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

template <typename Key>
constexpr Key kIneligible = std::numeric_limits<Key>::min();

// Orders as the numbers do; NaN as -inf, -0 as 0.
template <typename A>
MOE_EXT_INLINE key_t<A> key_of(A x) {
  using Key = key_t<A>;
  const Key bits = bit_cast<Key>((x == x ? x : -kInf<A>)+A(0));
  return bits ^ (bits >> (8 * sizeof(Key) - 1) & std::numeric_limits<Key>::max());
}

// The largest key's lowest id, which is then no longer eligible.
template <typename Key>
MOE_EXT_INLINE int32_t take_best(Key* keys, int64_t padded) {
  Key best = kIneligible<Key>;
#pragma omp simd reduction(max : best)
  for (int64_t e = 0; e < padded; ++e) best = keys[e] > best ? keys[e] : best;
  int32_t id = std::numeric_limits<int32_t>::max();
#pragma omp simd reduction(min : id)
  for (int32_t e = 0; e < static_cast<int32_t>(padded); ++e) {
    const int32_t candidate = keys[e] == best ? e : id;
    id = candidate < id ? candidate : id;
  }
  keys[id] = kIneligible<Key>;
  return id;
}

// The choice of one token after the other.
template <typename A>
struct Chooser {
  Chooser(const RouteOptions& o, const A* bias)
      : o(o), bias(bias), keys(padded(o)), order(o.num_experts), group_scores(o.n_group) {}

  MOE_EXT_INLINE void choose(const RouteRow<A>& row, int32_t* experts) {
    const int64_t E = o.num_experts;
    const A* scores = (o.by_logits ? row.logits : row.scores).data();
    key_t<A>* key = keys.data();
    if (bias) {
      const A* b = bias;
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) key[e] = key_of(scores[e] + b[e]);
    } else {
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) key[e] = key_of(scores[e]);
    }
    std::fill(keys.begin() + E, keys.end(), kIneligible<key_t<A>>);
    if (o.topk_group < o.n_group) keep_best_groups(scores);
    if (o.top_k > kManyChoices) {
      sort_best(keys.data(), E, o.top_k);
      std::copy_n(order.begin(), o.top_k, experts);
    } else {
      for (int64_t j = 0; j < o.top_k; ++j) experts[j] = take_best(key, padded(o));
    }
  }

 private:
  // order[0..count-1] = the best of `size` keys; a tie goes to the lower index.
  void sort_best(const key_t<A>* key, int64_t size, int64_t count) {
    std::iota(order.begin(), order.begin() + size, 0);
    std::partial_sort(
        order.begin(), order.begin() + count, order.begin() + size,
        [key](int32_t a, int32_t b) { return key[a] != key[b] ? key[a] > key[b] : a < b; });
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
      group_scores[g] = key_of(top2_sum ? first + second : first);
    }
    sort_best(group_scores.data(), o.n_group, o.n_group);
    for (int64_t i = o.topk_group; i < o.n_group; ++i)
      std::fill_n(keys.begin() + order[i] * size, size, kIneligible<key_t<A>>);
  }

  const RouteOptions& o;
  const A* bias;
  std::vector<key_t<A>> keys;
  std::vector<int32_t> order;
  std::vector<key_t<A>> group_scores;
};

// Tokens begin..end-1. In a replay `experts` is given, otherwise it is written.
template <typename T, typename A>
struct RouteBlock {
  static MOE_EXT_INLINE void run(const T* logits, const A* bias, const bool* padding,
                                 const RouteOptions* options, int64_t begin, int64_t end,
                                 A* weights, int32_t* experts, A* score_sums, A* logsumexp) {
    const RouteOptions o = *options;
    const int64_t E = o.num_experts, K = o.top_k;
    const A scale = static_cast<A>(o.scale);
    RouteRow<A> row(o);
    Chooser<A> chooser(o, bias);
    std::fill_n(score_sums, E, A(0));
    for (int64_t t = begin; t < end; ++t) {
      A* weight = weights + t * K;
      int32_t* expert = experts + t * K;
      if (padding && padding[t]) {
        std::fill_n(weight, K, A(0));
        std::fill_n(expert, K, static_cast<int32_t>(E));
        logsumexp[t] = 0;
        continue;
      }
      read_row(row, logits + t * E, o);
      logsumexp[t] = row.logsumexp;
      const A* scores = row.scores.data();
      const A share = 1 / row.score_sum;
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) score_sums[e] += scores[e] * share;
      if (!o.replay) chooser.choose(row, expert);
      weigh(row, o, expert, weight);
      for (int64_t j = 0; j < K; ++j) weight[j] *= scale;
    }
  }
};

// With v the weights before the factor c and g = c dw, the chosen scores get
//   normalised: (g - <g, v>) / sum of the chosen scores      otherwise: g
// and every score gets (G - <G, s> / S) / S from score_sums, S being the sum of the
// scores. A softmax passes ds on as s (ds - <ds, s>), a sigmoid as s (1 - s) ds;
// softmax_topk's weights reach the chosen logits directly, as v (g - <g, v>).
template <typename T, typename A>
struct RouteBlockBackward {
  static MOE_EXT_INLINE void run(const T* logits, const bool* padding, const int32_t* experts,
                                 const A* dweights, const A* dscore_sums, const A* dlogsumexp,
                                 const RouteOptions* options, int64_t begin, int64_t end,
                                 T* dlogits) {
    const RouteOptions o = *options;
    const int64_t E = o.num_experts, K = o.top_k;
    const A scale = static_cast<A>(o.scale);
    RouteRow<A> row(o);
    std::vector<A> dscores(E), v(K), dchosen(K);
    for (int64_t t = begin; t < end; ++t) {
      T* out = dlogits + t * E;
      if (padding && padding[t]) {
        std::fill_n(out, E, T(0));
        continue;
      }
      read_row(row, logits + t * E, o);
      const int32_t* expert = experts + t * K;
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
      if (dlogsumexp) {
        const A factor = dlogsumexp[t] / row.exp_sum;
#pragma omp simd
        for (int64_t e = 0; e < E; ++e) ds[e] += exps[e] * factor;
      }
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) out[e] = narrow<T>(ds[e]);
    }
  }
};

// Recorded ids as int32 of their own; what exceeds int32 stays a sentinel.
at::Tensor read_experts(const char* op, const at::Tensor& experts) {
  at::Tensor copy = at::empty(experts.sizes(), experts.options().dtype(at::kInt));
  const at::Tensor source = experts.contiguous();
  AT_DISPATCH_INDEX_TYPES(source.scalar_type(), "topk_route", [&] {
    const index_t* from = source.const_data_ptr<index_t>();
    int32_t* to = copy.mutable_data_ptr<int32_t>();
    index_t lowest = 0;
    for (int64_t i = 0; i < source.numel(); ++i) {
      lowest = std::min(lowest, from[i]);
      to[i] = static_cast<int32_t>(std::min<int64_t>(from[i], std::numeric_limits<int32_t>::max()));
    }
    check_value(op, "experts", lowest >= 0, lowest,
                "ids of at least 0 (E and above are sentinels)");
  });
  return copy;
}

std::array<at::Tensor, 5> topk_route(Arguments& args) {
  const at::Tensor& logits = args.tensor("logits");
  const int64_t top_k = args.integer("top_k");
  const auto selection_bias = args.optional_tensor("selection_bias");
  const auto padding_mask = args.optional_tensor("padding_mask");
  const auto experts = args.optional_tensor("experts");
  const RouteOptions o = check_topk_route(logits, top_k, selection_bias, padding_mask, experts,
                                          RouteArguments::read(args));
  const int64_t T = logits.size(0), E = logits.size(1);
  at::Tensor chosen = o.replay ? read_experts("topk_route", *experts)
                               : at::empty({T, top_k}, logits.options().dtype(at::kInt));

  const bool is_double = logits.scalar_type() == at::kDouble;
  const auto accumulation = logits.options().dtype(is_double ? at::kDouble : at::kFloat);
  const int64_t num_blocks = (T + kBlock - 1) / kBlock;
  at::Tensor weights = at::empty({T, top_k}, accumulation);
  at::Tensor counts = at::empty({E}, chosen.options());
  at::Tensor score_sums = at::empty({E}, accumulation);
  at::Tensor logsumexp = at::empty({T}, accumulation);
  at::Tensor block_sums = num_blocks > 1 ? at::empty({num_blocks, E}, accumulation) : score_sums;

  const at::Tensor l = logits.contiguous();
  const at::Tensor bias = selection_bias
                              ? selection_bias->detach().to(accumulation.dtype()).contiguous()
                              : at::Tensor();
  const at::Tensor mask = padding_mask ? padding_mask->contiguous() : at::Tensor();
  int32_t* ids = chosen.mutable_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, l.scalar_type(), "topk_route", [&] {
    using A = accumulate_t<scalar_t>;
    const scalar_t* logit = l.const_data_ptr<scalar_t>();
    const A* bias_data = bias.defined() ? bias.const_data_ptr<A>() : nullptr;
    const bool* padding = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
    A* weight = weights.mutable_data_ptr<A>();
    A* lse = logsumexp.mutable_data_ptr<A>();
    A* sums = block_sums.mutable_data_ptr<A>();
    at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b)
        simd_call<RouteBlock<scalar_t, A>>(logit, bias_data, padding, &o, b * kBlock,
                                           std::min((b + 1) * kBlock, T), weight, ids, sums + b * E,
                                           lse);
    });
    if (num_blocks != 1) {
      A* total = score_sums.mutable_data_ptr<A>();
      std::vector<double> sum(E, 0.0);
      for (int64_t b = 0; b < num_blocks; ++b)
        for (int64_t e = 0; e < E; ++e) sum[e] += sums[b * E + e];
      for (int64_t e = 0; e < E; ++e) total[e] = static_cast<A>(sum[e]);
    }
  });
  int32_t* count = counts.mutable_data_ptr<int32_t>();
  std::fill_n(count, E, 0);
  for (int64_t a = 0; a < T * top_k; ++a)
    if (ids[a] < E) ++count[ids[a]];
  return {weights, chosen, counts, score_sums, logsumexp};
}

at::Tensor topk_route_backward(const std::optional<at::Tensor>& grad_weights,
                               const std::optional<at::Tensor>& grad_score_sums,
                               const std::optional<at::Tensor>& grad_logsumexp,
                               const at::Tensor& logits, const at::Tensor& experts,
                               const std::optional<at::Tensor>& padding_mask,
                               std::string_view score_function, bool norm_topk_prob,
                               double routed_scaling_factor) {
  const RouteOptions o = check_topk_route_backward(grad_weights, grad_score_sums, grad_logsumexp,
                                                   logits, experts, padding_mask, score_function,
                                                   norm_topk_prob, routed_scaling_factor);
  const int64_t T = logits.size(0), E = logits.size(1);
  const auto read = [](const std::optional<at::Tensor>& grad) {
    return grad ? grad->contiguous() : at::Tensor();
  };
  const at::Tensor dweights = read(grad_weights);
  const at::Tensor dscore_sums = read(grad_score_sums);
  const at::Tensor dlogsumexp = read(grad_logsumexp);

  const at::Tensor l = logits.contiguous();
  const at::Tensor ids = read_experts("topk_route_backward", experts);
  const at::Tensor mask = padding_mask ? padding_mask->contiguous() : at::Tensor();
  at::Tensor dlogits = at::empty({T, E}, logits.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, l.scalar_type(), "topk_route", [&] {
    using A = accumulate_t<scalar_t>;
    const auto data = [](const at::Tensor& t) {
      return t.defined() ? t.const_data_ptr<A>() : nullptr;
    };
    const bool* padding = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
    at::parallel_for(0, (T + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
      simd_call<RouteBlockBackward<scalar_t, A>>(
          l.const_data_ptr<scalar_t>(), padding, ids.const_data_ptr<int32_t>(), data(dweights),
          data(dscore_sums), data(dlogsumexp), &o, first * kBlock, std::min(last * kBlock, T),
          dlogits.mutable_data_ptr<scalar_t>());
    });
  });
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("topk_route", kernel<&topk_route>());
  m.impl("topk_route_backward", &topk_route_backward);
}

}  // namespace moe_ext

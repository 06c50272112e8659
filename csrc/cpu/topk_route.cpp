// topk_route: from a token's logits to its experts and weights, in one pass over the logits,
// together with everything the losses need. The loops are in kernels/topk_route.inl; score_sums
// is summed over blocks of 256 tokens, then over the blocks in float64.

#include "checks/topk_route.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>

#include "cpu/tensors.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kBlock = 256;  // tokens

// body(first token, tokens) for every block, by threads that share the blocks out.
template <class Body>
void for_blocks(int64_t tokens, Body body) {
  at::parallel_for(0, (tokens + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) body(b * kBlock, std::min(kBlock, tokens - b * kBlock));
  });
}

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
  const RouteCall call = read_topk_route(args);
  const RouteOptions& o = call.options;
  const at::Tensor& logits = call.logits;
  const int64_t T = logits.size(0), E = logits.size(1), top_k = o.top_k;
  at::Tensor chosen = o.replay ? read_experts("topk_route", *call.experts)
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
  const at::Tensor bias = call.selection_bias
                              ? call.selection_bias->detach().to(accumulation.dtype()).contiguous()
                              : at::Tensor();
  const at::Tensor mask = call.padding_mask ? call.padding_mask->contiguous() : at::Tensor();
  int32_t* ids = chosen.mutable_data_ptr<int32_t>();
  with_sums(is_double, [&](auto sums_in) {
    using A = decltype(sums_in);
    const bool* padding = data_or_null<bool>(mask);
    const A* bias_data = data_or_null<A>(bias);
    A* sums = block_sums.mutable_data_ptr<A>();
    for_blocks(T, [&](int64_t t, int64_t tokens) {
      row_kernels<A>().route({o, rows_of(l).from_row(t), bias_data, padding ? padding + t : nullptr,
                              weights.mutable_data_ptr<A>() + t * top_k, ids + t * top_k,
                              sums + t / kBlock * E, logsumexp.mutable_data_ptr<A>() + t},
                             tokens);
    });
    if (num_blocks != 1)
      row_kernels<A>().sum_columns(score_sums.mutable_data_ptr<A>(), {sums, num_blocks, E, E});
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
  with_sums(logits.scalar_type() == at::kDouble, [&](auto sums_in) {
    using A = decltype(sums_in);
    const int64_t K = o.top_k;
    const bool* padding = data_or_null<bool>(mask);
    const A *weight_grads = data_or_null<A>(dweights), *lse_grads = data_or_null<A>(dlogsumexp);
    for_blocks(T, [&](int64_t t, int64_t tokens) {
      row_kernels<A>().route_backward(
          {o, rows_of(l).from_row(t), padding ? padding + t : nullptr,
           ids.const_data_ptr<int32_t>() + t * K, weight_grads ? weight_grads + t * K : nullptr,
           data_or_null<A>(dscore_sums), lse_grads ? lse_grads + t : nullptr,
           rows_out(dlogits).from_row(t)},
          tokens);
    });
  });
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("topk_route", kernel<&topk_route>());
  m.impl("topk_route_backward", &topk_route_backward);
}

}  // namespace moe_ext::cpu

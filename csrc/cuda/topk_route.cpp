// topk_route on CUDA: checks, allocates, launches. What the arguments mean is said in
// moe_ext/functional.py; the kernels are in kernels/topk_route.cu.
//
// An id below 0 is known to the device only: it counts as a sentinel, like E and above.

#include "checks/topk_route.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "cuda/device.h"
#include "cuda/kernels/topk_route.h"

namespace moe_ext {
namespace {

// A tensor's memory, or null for one that is not given.
template <class T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

at::Tensor contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->contiguous() : at::Tensor();
}

// Calls f(A{}) with what logits are computed in.
template <class F>
void with_accumulation(const at::Tensor& logits, const F& f) {
  logits.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

std::array<at::Tensor, 5> topk_route(Arguments& args) {
  const RouteCall call = read_topk_route(args);
  const at::Tensor& logits = call.logits;
  const OnDevice device(logits);
  const int64_t T = logits.size(0), E = logits.size(1), top_k = call.options.top_k;
  const bool is_double = logits.scalar_type() == at::kDouble;
  const auto accumulation = logits.options().dtype(is_double ? at::kDouble : at::kFloat);
  const auto integer = logits.options().dtype(at::kInt);
  const at::Tensor l = logits.contiguous();
  const at::Tensor bias = call.selection_bias
                              ? call.selection_bias->detach().to(accumulation.dtype()).contiguous()
                              : at::Tensor();
  const at::Tensor mask = contiguous(call.padding_mask), replayed = contiguous(call.experts);

  at::Tensor weights = at::empty({T, top_k}, accumulation);
  at::Tensor chosen = at::empty({T, top_k}, integer);
  at::Tensor counts = at::empty({E}, integer);
  at::Tensor score_sums = at::empty({E}, accumulation);
  at::Tensor logsumexp = at::empty({T}, accumulation);
  with_accumulation(logits, [&](auto a) {
    using A = decltype(a);
    cuda::TopkRoute<A> p{};
    p.options = call.options;
    p.tokens = T;
    p.grid = cuda::topk_route_grid<A>(T, E);
    p.logits = l.const_data_ptr();
    p.dtype = dtype_of(l);
    p.selection_bias = data_or_null<A>(bias);
    p.padding = data_or_null<bool>(mask);
    if (replayed.defined()) {
      p.replayed = replayed.const_data_ptr();
      p.replayed_is_int64 = replayed.scalar_type() == at::kLong;
    }
    p.weights = weights.mutable_data_ptr<A>();
    p.experts = chosen.mutable_data_ptr<int32_t>();
    p.logsumexp = logsumexp.mutable_data_ptr<A>();
    p.score_sums = score_sums.mutable_data_ptr<A>();
    p.counts = counts.mutable_data_ptr<int32_t>();
    at::Tensor block_sums = at::empty({p.grid.blocks, p.grid.row_size}, accumulation);
    at::Tensor block_counts = at::empty({p.grid.blocks, p.grid.row_size}, integer);
    at::Tensor workspace = at::empty({p.grid.workspace_bytes}, logits.options().dtype(at::kByte));
    p.block_sums = block_sums.mutable_data_ptr<A>();
    p.block_counts = block_counts.mutable_data_ptr<int32_t>();
    p.workspace = workspace.mutable_data_ptr();
    check_launch("topk_route", cuda::topk_route(p, device.stream()));
  });
  return {weights, chosen, counts, score_sums, logsumexp};
}

at::Tensor topk_route_backward(const std::optional<at::Tensor>& grad_weights,
                               const std::optional<at::Tensor>& grad_score_sums,
                               const std::optional<at::Tensor>& grad_logsumexp,
                               const at::Tensor& logits, const at::Tensor& experts,
                               const std::optional<at::Tensor>& padding_mask,
                               std::string_view score_function, bool norm_topk_prob,
                               double routed_scaling_factor) {
  const RouteOptions options = check_topk_route_backward(
      grad_weights, grad_score_sums, grad_logsumexp, logits, experts, padding_mask, score_function,
      norm_topk_prob, routed_scaling_factor);
  const OnDevice device(logits);
  const int64_t T = logits.size(0), E = logits.size(1);
  const at::Tensor l = logits.contiguous(), ids = experts.contiguous();
  const at::Tensor mask = contiguous(padding_mask);
  const at::Tensor dweights = contiguous(grad_weights);
  const at::Tensor dscore_sums = contiguous(grad_score_sums);
  const at::Tensor dlogsumexp = contiguous(grad_logsumexp);
  at::Tensor dlogits = at::empty({T, E}, logits.options());
  with_accumulation(logits, [&](auto a) {
    using A = decltype(a);
    cuda::TopkRouteBackward<A> p{};
    p.options = options;
    p.tokens = T;
    p.grid = cuda::topk_route_grid<A>(T, E);
    p.logits = l.const_data_ptr();
    p.dtype = dtype_of(l);
    p.padding = data_or_null<bool>(mask);
    p.experts = ids.const_data_ptr();
    p.experts_are_int64 = ids.scalar_type() == at::kLong;
    p.dweights = data_or_null<A>(dweights);
    p.dscore_sums = data_or_null<A>(dscore_sums);
    p.dlogsumexp = data_or_null<A>(dlogsumexp);
    p.dlogits = dlogits.mutable_data_ptr();
    at::Tensor workspace = at::empty({p.grid.workspace_bytes}, logits.options().dtype(at::kByte));
    p.workspace = workspace.mutable_data_ptr();
    check_launch("topk_route_backward", cuda::topk_route_backward(p, device.stream()));
  });
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) {
  m.impl("topk_route", kernel<&topk_route>());
  m.impl("topk_route_backward", &topk_route_backward);
}

}  // namespace moe_ext

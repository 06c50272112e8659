// moe_infer: a whole layer's forward pass for inference, the same on every device.
//
// It calls the stages' ops one after the other, through the dispatcher, so the results have
// the bits that they have when Python calls them. What it saves is the Python between them,
// which a step of few tokens notices when the caches are full of other layers' weights.

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "operands.h"

namespace moe_ext {
namespace {

using c10::IValue;
using torch::jit::Stack;

// An op by its name, for whatever device its arguments turn out to be on.
c10::OperatorHandle stage(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

void push(Stack& stack, const IValue& value) { stack.push_back(value); }
void push(Stack& stack, const c10::ArrayRef<IValue>& values) {
  stack.insert(stack.end(), values.begin(), values.end());
}

// The op's results. An argument is a value, or several that follow each other in the schema.
template <size_t results, class... Given>
std::array<IValue, results> call(const c10::OperatorHandle& op, Stack& stack,
                                 const Given&... arguments) {
  (push(stack, arguments), ...);
  op.callBoxed(&stack);
  std::array<IValue, results> result;
  std::move(stack.begin(), stack.end(), result.begin());
  stack.clear();
  return result;
}

std::array<at::Tensor, 1> moe_infer(Arguments& args) {
  static const c10::OperatorHandle router_logits = stage("moe_ext::router_logits"),
                                   topk_route = stage("moe_ext::topk_route"),
                                   capacity_scatter = stage("moe_ext::capacity_scatter"),
                                   accumulate_stats = stage("moe_ext::accumulate_stats"),
                                   moe_forward = stage("moe_ext::moe_forward");
  const at::Tensor &x = args.tensor("x"), &gate_weight = args.tensor("gate_weight");
  const IValue &gate_bias = args.value("gate_bias"), &counts = args.value("counts"),
               &score_sums = args.value("score_sums"), &totals = args.value("totals"),
               &top_k = args.value("top_k");
  const auto parameters = args.values_of<ExpertOperands>();
  const IValue &selection_bias = args.value("selection_bias"),
               &padding_mask = args.value("padding_mask");
  const auto options = args.values_of<RouteArguments>();
  const IValue &capacity = args.value("capacity"), &drop_policy = args.value("drop_policy"),
               &num_sequences = args.value("num_sequences"),
               &batch_invariant = args.value("batch_invariant");

  const at::AutoDispatchBelowAutograd below;
  const IValue none, &score_function = options.front();
  const at::Tensor tokens = x.dim() == 2 ? x : x.reshape({-1, gate_weight.size(-1)});
  const IValue mask = padding_mask.isNone() ? none : padding_mask.toTensor().reshape({-1});
  Stack stack;
  stack.reserve(32);
  const auto [logits] = call<1>(router_logits, stack, tokens, gate_weight, gate_bias);
  const auto [weights, experts, expert_counts, route_score_sums, logsumexp] =
      call<5>(topk_route, stack, logits, top_k, selection_bias, mask, /*experts=*/none, options);
  const auto [expert_offsets, row_token, row_assignment, assignment_row, before_drops] =
      call<5>(capacity_scatter, stack, experts, gate_weight.size(0), capacity, weights, mask,
              drop_policy, num_sequences);
  // Before the experts, whose weights push the routing out of the caches.
  call<0>(accumulate_stats, stack, counts, score_sums, totals, /*step_counts=*/none, logits,
          experts, expert_counts, route_score_sums, assignment_row, mask, score_function);
  // The router may be float64 where the experts are not.
  const at::Tensor& w = weights.toTensor();
  const auto [y, preactivations] =
      call<2>(moe_forward, stack, tokens, x.scalar_type() == at::kDouble ? w : w.to(at::kFloat),
              expert_offsets, row_token, row_assignment, assignment_row, parameters,
              /*keep_preactivations=*/false, batch_invariant);
  return {x.dim() == 2 ? y.toTensor() : y.toTensor().view(x.sizes())};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CompositeExplicitAutograd, m) {
  m.impl("moe_infer", kernel<&moe_infer>());
}

}  // namespace moe_ext

// moe_infer: a whole layer's forward pass for inference, the same on every device.
//
// It calls the stages' ops one after the other, through the dispatcher, so the results have
// the bits that they have when Python calls them. What it saves is the Python between them,
// which a step of few tokens notices when the caches are full of other layers' weights.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace moe_ext {
namespace {

using Tensor = at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// An op by its name, for whatever device its arguments turn out to be on.
template <class Signature>
c10::TypedOperatorHandle<Signature> stage(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor moe_infer(const Tensor& x, const Tensor& gate_weight, const OptionalTensor& gate_bias,
                 const Tensor& up_proj, const Tensor& down_proj, const OptionalTensor& up_bias,
                 const OptionalTensor& down_bias, Tensor& counts, Tensor& score_sums,
                 Tensor& totals, int64_t top_k, const OptionalTensor& selection_bias,
                 const OptionalTensor& padding_mask, std::string_view score_function,
                 bool norm_topk_prob, double routed_scaling_factor, int64_t n_group,
                 int64_t topk_group, std::string_view group_score, std::optional<int64_t> capacity,
                 std::string_view drop_policy, int64_t num_sequences, std::string_view activation,
                 std::optional<double> limit, double alpha, double up_offset, bool transposed,
                 bool interleaved, bool batch_invariant) {
  static const auto router_logits =
      stage<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>("moe_ext::router_logits");
  static const auto topk_route = stage<FiveTensors(
      const Tensor&, int64_t, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      std::string_view, bool, double, int64_t, int64_t, std::string_view)>("moe_ext::topk_route");
  static const auto capacity_scatter =
      stage<FiveTensors(const Tensor&, int64_t, std::optional<int64_t>, const OptionalTensor&,
                        const OptionalTensor&, std::string_view, int64_t)>(
          "moe_ext::capacity_scatter");
  static const auto accumulate_stats =
      stage<void(Tensor&, Tensor&, Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                 const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                 std::string_view)>("moe_ext::accumulate_stats");
  static const auto moe_forward = stage<TwoTensors(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, std::string_view,
      std::optional<double>, double, double, bool, bool, bool, bool)>("moe_ext::moe_forward");

  const at::AutoDispatchBelowAutograd below;
  const Tensor tokens = x.dim() == 2 ? x : x.reshape({-1, gate_weight.size(-1)});
  const OptionalTensor mask =
      padding_mask && padding_mask->dim() != 1 ? padding_mask->reshape({-1}) : padding_mask;
  const Tensor logits = router_logits.call(tokens, gate_weight, gate_bias);
  auto [weights, experts, expert_counts, route_score_sums, logsumexp] =
      topk_route.call(logits, top_k, selection_bias, mask, /*experts=*/std::nullopt, score_function,
                      norm_topk_prob, routed_scaling_factor, n_group, topk_group, group_score);
  const auto [expert_offsets, row_token, row_assignment, assignment_row, counts_before_drops] =
      capacity_scatter.call(experts, gate_weight.size(0), capacity, weights, mask, drop_policy,
                            num_sequences);
  // Before the experts, whose weights push the routing out of the caches.
  accumulate_stats.call(counts, score_sums, totals, /*step_counts=*/std::nullopt, logits, experts,
                        expert_counts, route_score_sums, assignment_row, mask, score_function);
  // The router may be float64 where the experts are not.
  if (x.scalar_type() != at::kDouble) weights = weights.to(at::kFloat);
  const auto [y, preactivations] = moe_forward.call(
      tokens, weights, expert_offsets, row_token, row_assignment, assignment_row, up_proj,
      down_proj, up_bias, down_bias, activation, limit, alpha, up_offset, transposed, interleaved,
      /*keep_preactivations=*/false, batch_invariant);
  return x.dim() == 2 ? y : y.view(x.sizes());
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CompositeExplicitAutograd, m) { m.impl("moe_infer", &moe_infer); }

}  // namespace moe_ext

// capacity_scatter on a GPU; the algorithm is in kernels/capacity_scatter.cu.

#include "checks/capacity_scatter.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "cuda/device.h"
#include "cuda/kernels/capacity_scatter.h"

namespace moe_ext {
namespace {

cuda::DropOrder drop_order(DropPolicy policy) {
  switch (policy) {
    case kChoice:
      return cuda::DropOrder::kChoice;
    case kToken:
      return cuda::DropOrder::kToken;
    default:
      return cuda::DropOrder::kProbs;
  }
}

// Reads its tensors where they are, whatever their strides.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> capacity_scatter(
    const at::Tensor& experts, int64_t num_experts, std::optional<int64_t> capacity,
    const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& padding_mask,
    std::string_view drop_policy, int64_t num_sequences) {
  const auto [rows, policy] = check_capacity_scatter(experts, num_experts, capacity, weights,
                                                     padding_mask, drop_policy, num_sequences);
  const OnDevice device(experts);
  const int64_t tokens = experts.size(0), top_k = experts.size(1);
  // As many places as a sequence has assignments are enough for any routing.
  const bool limited = capacity && *capacity < experts.numel() / num_sequences;
  const auto order = limited ? drop_order(policy) : cuda::DropOrder::kNone;
  const auto shape = cuda::scatter_shape(tokens, top_k, num_experts, num_sequences, order);

  const auto options = experts.options().dtype(at::kInt);
  at::Tensor expert_offsets = at::empty({num_experts + 1}, options);
  at::Tensor row_token = at::empty({rows}, options);
  at::Tensor row_assignment = at::empty({rows}, options);
  at::Tensor assignment_row = at::empty({tokens, top_k}, options);
  at::Tensor expert_counts = at::empty({num_experts}, options);
  at::Tensor workspace = at::empty({shape.workspace_size()}, options);
  cuda::CapacityScatter scatter{
      .shape = shape,
      .top_k = top_k,
      .rows = rows,
      .capacity = limited ? static_cast<int32_t>(*capacity) : 0,
      .experts = experts.const_data_ptr(),
      .experts_are_int64 = experts.scalar_type() == at::kLong,
      .experts_token_stride = experts.stride(0),
      .experts_choice_stride = experts.stride(1),
      .expert_offsets = expert_offsets.mutable_data_ptr<int32_t>(),
      .row_token = row_token.mutable_data_ptr<int32_t>(),
      .row_assignment = row_assignment.mutable_data_ptr<int32_t>(),
      .assignment_row = assignment_row.mutable_data_ptr<int32_t>(),
      .expert_counts = expert_counts.mutable_data_ptr<int32_t>(),
  };
  scatter.set_workspace(workspace.mutable_data_ptr<int32_t>());
  if (padding_mask) {
    scatter.padding = padding_mask->const_data_ptr<bool>();
    scatter.padding_stride = padding_mask->stride(0);
  }
  if (order == cuda::DropOrder::kProbs) {
    scatter.weights = weights->const_data_ptr();
    scatter.weights_dtype = dtype_of(*weights);
    scatter.weights_token_stride = weights->stride(0);
    scatter.weights_choice_stride = weights->stride(1);
  }
  check_launch("capacity_scatter", cuda::capacity_scatter(scatter, device.stream()));
  return {expert_offsets, row_token, row_assignment, assignment_row, expert_counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) { m.impl("capacity_scatter", &capacity_scatter); }

}  // namespace moe_ext

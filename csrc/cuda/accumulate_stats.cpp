// accumulate_stats on CUDA: checks, allocates, launches. It adds to its first arguments in
// place, reads nothing back, and does nothing while a backward pass recomputes.

#include "checks/accumulate_stats.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/kernels/accumulate_stats.h"

namespace moe_ext {
namespace {

void accumulate_stats(at::Tensor& counts, at::Tensor& score_sums, at::Tensor& totals,
                      const std::optional<at::Tensor>& step_counts, const at::Tensor& logits,
                      const at::Tensor& experts, const at::Tensor& expert_counts,
                      const at::Tensor& route_score_sums,
                      const std::optional<at::Tensor>& assignment_row,
                      const std::optional<at::Tensor>& padding_mask,
                      std::string_view score_function) {
  const ScoreFunction function = check_accumulate_stats(
      counts, score_sums, totals, step_counts, logits, experts, expert_counts, route_score_sums,
      assignment_row, padding_mask, score_function);
  if (is_recomputation()) return;
  const OnDevice device(logits);
  const at::Tensor l = logits.contiguous(), ids = experts.contiguous();
  const at::Tensor rows = assignment_row ? assignment_row->contiguous() : at::Tensor();
  const at::Tensor mask = padding_mask ? padding_mask->contiguous() : at::Tensor();
  const at::Tensor n = expert_counts.contiguous(), sums = route_score_sums.contiguous();

  cuda::AccumulateStats p{};
  p.tokens = l.size(0);
  p.num_experts = l.size(1);
  p.top_k = ids.size(1);
  p.is_sigmoid = function == kSigmoid;
  p.logits = l.const_data_ptr();
  p.dtype = dtype_of(l);
  p.experts = ids.const_data_ptr();
  p.experts_are_int64 = ids.scalar_type() == at::kLong;
  p.assignment_row = rows.defined() ? rows.const_data_ptr<int32_t>() : nullptr;
  p.padding = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  p.expert_counts = n.const_data_ptr<int32_t>();
  p.route_score_sums = sums.const_data_ptr();
  p.route_score_sums_dtype = dtype_of(sums);
  p.counts = counts.mutable_data_ptr<int64_t>();
  p.step_counts = step_counts ? step_counts->mutable_data_ptr<int64_t>() : nullptr;
  p.score_sums = score_sums.mutable_data_ptr<double>();
  p.totals = totals.mutable_data_ptr<double>();
  cuda::accumulate_stats_blocks(p);
  at::Tensor parts = at::empty({p.blocks * static_cast<int64_t>(sizeof(cuda::StatsPart))},
                               logits.options().dtype(at::kByte));
  p.parts = static_cast<cuda::StatsPart*>(parts.mutable_data_ptr());
  check_launch("accumulate_stats", cuda::accumulate_stats(p, device.stream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) { m.impl("accumulate_stats", &accumulate_stats); }

}  // namespace moe_ext

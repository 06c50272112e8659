// accumulate_stats: adds one forward's routing to running statistics. It does
// nothing while a backward pass runs, so a forward that activation checkpointing
// repeats counts once. A token's entropy is taken over its normalised scores:
//   softmax:  H = log Z - sum_e p_e (l_e - max),  p_e = exp(l_e - max) / Z
//   sigmoid:  H = log S - sum_e s_e log s_e / S,  S = sum_e s_e
// Tokens are added in blocks of 256, and the blocks in order, so the result does not
// depend on the number of threads.

#include "checks/accumulate_stats.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/tensors.h"

namespace moe_ext::cpu {
namespace {

constexpr const char* kOp = "accumulate_stats";
constexpr int64_t kBlock = 256;

struct BlockTotals {
  int64_t tokens = 0, assignments = 0, dropped = 0, lost = 0;
  double entropy = 0;
  double max_logit = -std::numeric_limits<double>::infinity();
};

// A NaN stays once it is there.
inline double larger(double a, double b) { return b > a || b != b ? b : a; }

template <class A, class Id>
BlockTotals block_totals(const Rows& logits, const Id* experts, const int32_t* assignment_row,
                         const bool* padding, bool is_sigmoid, int64_t begin, int64_t end,
                         int64_t num_experts, int64_t top_k) {
  BlockTotals block;
  for (int64_t t = begin; t < end; ++t) {
    if (padding && padding[t]) continue;
    ++block.tokens;
    int64_t assigned = 0, kept = 0;
    for (int64_t a = t * top_k; a < (t + 1) * top_k; ++a) {
      if (experts[a] >= num_experts) continue;
      ++assigned;
      kept += !assignment_row || assignment_row[a] >= 0;
    }
    block.assignments += assigned;
    block.dropped += assigned - kept;
    block.lost += assigned > 0 && kept == 0;
    A entropy, max_logit;
    row_kernels<A>().entropy(logits.from_row(t), num_experts, is_sigmoid, &entropy, &max_logit);
    block.entropy += entropy;
    block.max_logit = larger(block.max_logit, max_logit);
  }
  return block;
}

void accumulate_stats(at::Tensor& counts, at::Tensor& score_sums, at::Tensor& totals,
                      const std::optional<at::Tensor>& step_counts, const at::Tensor& logits,
                      const at::Tensor& experts, const at::Tensor& expert_counts,
                      const at::Tensor& route_score_sums,
                      const std::optional<at::Tensor>& assignment_row,
                      const std::optional<at::Tensor>& padding_mask,
                      std::string_view score_function) {
  const bool is_sigmoid =
      check_accumulate_stats(counts, score_sums, totals, step_counts, logits, experts,
                             expert_counts, route_score_sums, assignment_row, padding_mask,
                             score_function) == kSigmoid;
  if (is_recomputation()) return;
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);

  const at::Tensor l = logits.contiguous(), ids = experts.contiguous();
  const at::Tensor rows = assignment_row ? assignment_row->contiguous() : at::Tensor();
  const at::Tensor mask = padding_mask ? padding_mask->contiguous() : at::Tensor();
  const int32_t* row_data = data_or_null<int32_t>(rows);
  const bool* mask_data = data_or_null<bool>(mask);
  std::vector<BlockTotals> blocks((tokens + kBlock - 1) / kBlock);
  with_sums(l.scalar_type() == at::kDouble, [&](auto sums_in) {
    AT_DISPATCH_INDEX_TYPES(ids.scalar_type(), kOp, [&] {
      const index_t* id_data = ids.const_data_ptr<index_t>();
      at::parallel_for(0, blocks.size(), 1, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b)
          blocks[b] = block_totals<decltype(sums_in)>(
              rows_of(l), id_data, row_data, mask_data, is_sigmoid, b * kBlock,
              std::min((b + 1) * kBlock, tokens), num_experts, ids.size(1));
      });
    });
  });

  double* total = totals.mutable_data_ptr<double>();
  // Zeros are a fresh start, so the first maximum replaces what it finds.
  double max_logit =
      total[kForwards] > 0 ? total[kMaxLogit] : -std::numeric_limits<double>::infinity();
  for (const BlockTotals& block : blocks) {
    total[kTokens] += block.tokens;
    total[kAssignments] += block.assignments;
    total[kDropped] += block.dropped;
    total[kLostTokens] += block.lost;
    total[kEntropy] += block.entropy;
    max_logit = larger(max_logit, block.max_logit);
  }
  total[kMaxLogit] = max_logit;
  total[kForwards] += 1;

  const at::Tensor n = expert_counts.contiguous(), sums = route_score_sums.contiguous();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  int64_t* step = step_counts ? step_counts->mutable_data_ptr<int64_t>() : nullptr;
  double* score_sum = score_sums.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(sums.scalar_type(), kOp, [&] {
    for (int64_t e = 0; e < num_experts; ++e) {
      count[e] += n.const_data_ptr<int32_t>()[e];
      if (step) step[e] += n.const_data_ptr<int32_t>()[e];
      score_sum[e] += sums.const_data_ptr<scalar_t>()[e];
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("accumulate_stats", &accumulate_stats); }

}  // namespace moe_ext::cpu

// accumulate_stats: adds one forward's routing to running statistics. It does
// nothing while a backward pass runs, so a forward that activation checkpointing
// repeats counts once. A token's entropy is taken over its normalised scores:
//   softmax:  H = log Z - sum_e p_e (l_e - max),  p_e = exp(l_e - max) / Z
//   sigmoid:  H = log S - sum_e s_e log s_e / S,  S = sum_e s_e
// Tokens are added in blocks of 256, and the blocks in order, so the result does not
// depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/simd.h"

namespace torch::autograd {
// From torch/csrc/autograd/graph_task.h, which would bring the whole engine along:
// -1 outside of a backward pass.
TORCH_API int get_current_graph_task_id();
}  // namespace torch::autograd

namespace moe_ext {
namespace {

constexpr const char* kOp = "accumulate_stats";
constexpr int64_t kBlock = 256;

// The slots of `totals`; moe_ext/reference.py has the same list.
enum Slot { kTokens, kAssignments, kDropped, kLostTokens, kEntropy, kMaxLogit, kForwards, kSlots };

struct BlockTotals {
  int64_t tokens = 0, assignments = 0, dropped = 0, lost = 0;
  double entropy = 0;
  double max_logit = -std::numeric_limits<double>::infinity();
};

// A NaN stays once it is there.
inline double larger(double a, double b) { return b > a || b != b ? b : a; }

// One token's largest logit and the entropy of its scores.
template <typename A>
struct TokenEntropy {
  template <typename T>
  static MOE_EXT_INLINE void run(const T* logits, int64_t num_experts, bool is_sigmoid, A* entropy,
                                 A* max_logit) {
    A top = -std::numeric_limits<A>::infinity();
    A nan = 0;
#pragma omp simd reduction(max : top) reduction(+ : nan)
    for (int64_t e = 0; e < num_experts; ++e) {
      const A l = static_cast<A>(logits[e]);
      top = l > top ? l : top;
      nan += l != l ? l : A(0);
    }
    A sum = 0, weighted = 0;
    if (is_sigmoid) {
#pragma omp simd reduction(+ : sum, weighted)
      for (int64_t e = 0; e < num_experts; ++e) {
        const A s = sigmoid(static_cast<A>(logits[e]));
        sum += s;
        weighted += s > A(0) ? s * std::log(s) : A(0);
      }
      *entropy = std::log(sum) - weighted / sum;
    } else {
#pragma omp simd reduction(+ : sum, weighted)
      for (int64_t e = 0; e < num_experts; ++e) {
        const A d = static_cast<A>(logits[e]) - top;
        const A p = exp_nonpositive(d);
        sum += p;
        weighted += p > A(0) ? p * d : A(0);
      }
      *entropy = std::log(sum) - weighted / sum;
    }
    *max_logit = top + nan;
  }
};

template <typename T, typename Id>
BlockTotals block_totals(const T* logits, const Id* experts, const int32_t* assignment_row,
                         const bool* padding, bool is_sigmoid, int64_t begin, int64_t end,
                         int64_t num_experts, int64_t top_k) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
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
    simd_call<TokenEntropy<A>>(logits + t * num_experts, num_experts, is_sigmoid, &entropy,
                               &max_logit);
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
  check_argument(kOp, "logits", logits, is_float(logits), logits.dim() == 2,
                 "float64, float32, bfloat16 or float16 of shape (T, E)");
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  const auto is_vector = [](const at::Tensor& t, int64_t size) {
    return t.dim() == 1 && t.size(0) == size && t.is_contiguous();
  };
  const auto check_sums = [&](const char* name, const at::Tensor& t, at::ScalarType dtype,
                              int64_t size) {
    check_argument(kOp, name, t, t.scalar_type() == dtype, is_vector(t, size), dtype_name(dtype),
                   " and contiguous of shape (", size, ",)");
  };
  check_sums("counts", counts, at::kLong, num_experts);
  check_sums("score_sums", score_sums, at::kDouble, num_experts);
  check_sums("totals", totals, at::kDouble, kSlots);
  if (step_counts) check_sums("step_counts", *step_counts, at::kLong, num_experts);
  check_argument(kOp, "experts", experts, is_index(experts),
                 experts.dim() == 2 && experts.size(0) == tokens,
                 "int32 or int64 of shape (T, K), with T = ", tokens);
  check_argument(kOp, "expert_counts", expert_counts, expert_counts.scalar_type() == at::kInt,
                 expert_counts.dim() == 1 && expert_counts.size(0) == num_experts,
                 "int32 of shape (E,), with E = ", num_experts);
  check_argument(
      kOp, "route_score_sums", route_score_sums,
      route_score_sums.scalar_type() == at::kFloat || route_score_sums.scalar_type() == at::kDouble,
      route_score_sums.dim() == 1 && route_score_sums.size(0) == num_experts,
      "float32 or float64 of shape (E,), with E = ", num_experts);
  if (assignment_row)
    check_argument(
        kOp, "assignment_row", *assignment_row, assignment_row->scalar_type() == at::kInt,
        assignment_row->sizes() == experts.sizes(), "int32 of shape (T, K) like experts");
  if (padding_mask) check_padding_mask(kOp, *padding_mask, tokens);
  const bool is_sigmoid = check_name(kOp, "score_function", score_function,
                                     {"softmax", "sigmoid", "softmax_topk"}) == 1;

  if (torch::autograd::get_current_graph_task_id() != -1) return;

  const at::Tensor l = logits.contiguous(), ids = experts.contiguous();
  const at::Tensor rows = assignment_row ? assignment_row->contiguous() : at::Tensor();
  const at::Tensor mask = padding_mask ? padding_mask->contiguous() : at::Tensor();
  const int32_t* row_data = rows.defined() ? rows.const_data_ptr<int32_t>() : nullptr;
  const bool* mask_data = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  std::vector<BlockTotals> blocks((tokens + kBlock - 1) / kBlock);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, l.scalar_type(), kOp, [&] {
    AT_DISPATCH_INDEX_TYPES(ids.scalar_type(), kOp, [&] {
      const scalar_t* logit_data = l.const_data_ptr<scalar_t>();
      const index_t* id_data = ids.const_data_ptr<index_t>();
      at::parallel_for(0, blocks.size(), 1, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b)
          blocks[b] = block_totals(logit_data, id_data, row_data, mask_data, is_sigmoid, b * kBlock,
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

  const at::Tensor n = expert_counts.contiguous();
  const at::Tensor sums = route_score_sums.to(at::kDouble).contiguous();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  int64_t* step = step_counts ? step_counts->mutable_data_ptr<int64_t>() : nullptr;
  double* score_sum = score_sums.mutable_data_ptr<double>();
  for (int64_t e = 0; e < num_experts; ++e) {
    count[e] += n.const_data_ptr<int32_t>()[e];
    if (step) step[e] += n.const_data_ptr<int32_t>()[e];
    score_sum[e] += sums.const_data_ptr<double>()[e];
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("accumulate_stats", &accumulate_stats); }

}  // namespace moe_ext

// capacity_scatter: the plan, by a stable counting sort of the assignments.
//
// One pass over the ids counts, one (with a capacity) decides who stays, one places
// the rows. All are serial: they take nanoseconds an assignment where the experts
// take microseconds, and their order is the meaning of "stable".

#include "checks/capacity_scatter.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

namespace moe_ext::cpu {
namespace {

constexpr const char* kOp = "capacity_scatter";

// Assignments as one flat array of ids in 0..E, where E means no expert's.
struct Assignments {
  std::vector<int32_t> ids;
  int32_t num_experts;
  int64_t top_k;
  int64_t num_sequences;

  int64_t size() const { return static_cast<int64_t>(ids.size()); }
  int64_t sequence_size() const { return size() / num_sequences; }
};

template <typename Id>
Assignments read_ids(const Id* experts, const bool* padding, int64_t tokens, int64_t top_k,
                     int32_t num_experts, int64_t num_sequences) {
  Assignments all{std::vector<int32_t>(tokens * top_k), num_experts, top_k, num_sequences};
  Id lowest = 0;
  for (int64_t a = 0; a < all.size(); ++a) {
    lowest = std::min(lowest, experts[a]);
    all.ids[a] = static_cast<int32_t>(std::min<Id>(experts[a], num_experts));
  }
  check_value(kOp, "experts", lowest >= 0, lowest, "ids of at least 0 (E and above are sentinels)");
  if (padding) {
    for (int64_t t = 0; t < tokens; ++t)
      if (padding[t]) std::fill_n(all.ids.begin() + t * top_k, top_k, num_experts);
  }
  return all;
}

// Marks with -1 what does not find a place among the `capacity` of its expert, and
// takes it off the expert's count. Assignments come in the order of `drop_policy`,
// a sequence at a time.
void drop_in_order(const Assignments& all, int64_t capacity, DropPolicy policy, int32_t* row,
                   std::vector<int32_t>& counts) {
  std::vector<int64_t> places(all.num_experts + 1);
  const auto visit = [&](int64_t a) {
    const int32_t expert = all.ids[a];
    if (expert == all.num_experts || places[expert]-- > 0) return;
    row[a] = -1;
    --counts[expert];
  };
  for (int64_t begin = 0; begin < all.size(); begin += all.sequence_size()) {
    const int64_t end = begin + all.sequence_size();
    std::fill(places.begin(), places.end(), capacity);
    if (policy == kToken) {
      for (int64_t a = begin; a < end; ++a) visit(a);
    } else {
      for (int64_t j = 0; j < all.top_k; ++j)
        for (int64_t a = begin + j; a < end; a += all.top_k) visit(a);
    }
  }
}

// The same, with the largest weights first; a tie goes to the earlier assignment, and
// NaN comes last, with -inf.
void drop_by_weight(const Assignments& all, int64_t capacity, const double* weights, int32_t* row,
                    std::vector<int32_t>& counts) {
  const auto key = [&](int32_t a) {
    return weights[a] == weights[a] ? weights[a] : -std::numeric_limits<double>::infinity();
  };
  const auto goes_before = [&](int32_t a, int32_t b) {
    return key(a) != key(b) ? key(a) > key(b) : a < b;
  };
  std::vector<int32_t> order(all.sequence_size());
  std::vector<int32_t> bucket_end(all.num_experts + 1);
  for (int64_t begin = 0; begin < all.size(); begin += all.sequence_size()) {
    // This sequence's assignments by expert, as a counting sort.
    const int64_t end = begin + all.sequence_size();
    std::fill(bucket_end.begin(), bucket_end.end(), 0);
    for (int64_t a = begin; a < end; ++a) ++bucket_end[all.ids[a]];
    std::exclusive_scan(bucket_end.begin(), bucket_end.end(), bucket_end.begin(), 0);
    for (int64_t a = begin; a < end; ++a) order[bucket_end[all.ids[a]]++] = a;

    auto first = order.begin();
    for (int32_t expert = 0; expert < all.num_experts; ++expert) {
      const auto last = order.begin() + bucket_end[expert];
      if (last - first > capacity) {
        const auto dropped = first + capacity;
        std::nth_element(first, dropped, last, goes_before);
        std::for_each(dropped, last, [&](int32_t a) { row[a] = -1; });
        counts[expert] -= static_cast<int32_t>(last - dropped);
      }
      first = last;
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> capacity_scatter(
    const at::Tensor& experts, int64_t num_experts, std::optional<int64_t> capacity,
    const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& padding_mask,
    std::string_view drop_policy, int64_t num_sequences) {
  const auto [rows, policy] = check_capacity_scatter(experts, num_experts, capacity, weights,
                                                     padding_mask, drop_policy, num_sequences);
  const int64_t tokens = experts.size(0), top_k = experts.size(1), size = experts.numel();
  const at::Tensor ids = experts.contiguous();
  const at::Tensor mask = padding_mask ? padding_mask->contiguous() : at::Tensor();
  const bool* padding = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  const Assignments all = AT_DISPATCH_INDEX_TYPES(ids.scalar_type(), kOp, [&] {
    return read_ids(ids.const_data_ptr<index_t>(), padding, tokens, top_k,
                    static_cast<int32_t>(num_experts), num_sequences);
  });

  const auto options = experts.options().dtype(at::kInt);
  at::Tensor expert_offsets = at::empty({num_experts + 1}, options);
  at::Tensor row_token = at::empty({rows}, options);
  at::Tensor row_assignment = at::empty({rows}, options);
  at::Tensor assignment_row = at::empty({tokens, top_k}, options);
  at::Tensor expert_counts = at::empty({num_experts}, options);
  int32_t* offsets = expert_offsets.mutable_data_ptr<int32_t>();
  int32_t* token_of = row_token.mutable_data_ptr<int32_t>();
  int32_t* assignment_of = row_assignment.mutable_data_ptr<int32_t>();
  int32_t* row = assignment_row.mutable_data_ptr<int32_t>();

  std::vector<int32_t> counts(num_experts + 1, 0);
  for (const int32_t expert : all.ids) ++counts[expert];
  std::copy_n(counts.begin(), num_experts, expert_counts.mutable_data_ptr<int32_t>());
  std::fill_n(row, size, 0);
  if (capacity && policy == kProbs) {
    const at::Tensor keys = weights->detach().to(at::kDouble).contiguous();
    drop_by_weight(all, *capacity, keys.const_data_ptr<double>(), row, counts);
  } else if (capacity) {
    drop_in_order(all, *capacity, policy, row, counts);
  }

  offsets[0] = 0;
  std::inclusive_scan(counts.begin(), counts.end() - 1, offsets + 1);
  std::copy_n(offsets, num_experts, counts.begin());  // from here on: the next free row
  for (int64_t t = 0, a = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < top_k; ++j, ++a) {
      const int32_t expert = all.ids[a];
      if (row[a] < 0 || expert == num_experts) {
        row[a] = -1;
        continue;
      }
      const int32_t r = counts[expert]++;
      row[a] = r;
      token_of[r] = static_cast<int32_t>(t);
      assignment_of[r] = static_cast<int32_t>(a);
    }
  }
  std::fill(token_of + offsets[num_experts], token_of + rows, -1);
  std::fill(assignment_of + offsets[num_experts], assignment_of + rows, -1);
  return {expert_offsets, row_token, row_assignment, assignment_row, expert_counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("capacity_scatter", &capacity_scatter); }

}  // namespace moe_ext::cpu

// accumulate_stats on a GPU: what csrc/cuda/accumulate_stats.cpp tells the kernels. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../routing.h"
#include "dtypes.h"

namespace moe_ext::cuda {

// What a block of tokens adds to the totals.
struct StatsPart {
  double entropy, max_logit;
  int64_t tokens, assignments, dropped, lost;
};

struct AccumulateStats {
  int64_t tokens, num_experts, top_k;
  bool is_sigmoid;
  const void* logits;  // (T, E) contiguous
  Dtype dtype;
  const void* experts;  // (T, K)
  bool experts_are_int64;
  const int32_t* assignment_row;  // (T, K) or null: nothing was dropped
  const bool* padding;            // (T) or null
  const int32_t* expert_counts;   // (E)
  const void* route_score_sums;   // (E)
  Dtype route_score_sums_dtype;

  int64_t* counts;       // (E), added to, as are the others
  int64_t* step_counts;  // (E) or null
  double* score_sums;    // (E)
  double* totals;        // (kStatsSlots)

  int64_t blocks, tokens_per_block;  // accumulate_stats_blocks' answer
  StatsPart* parts;                  // (blocks)
};

// Fills in `blocks` and `tokens_per_block` from `tokens`.
void accumulate_stats_blocks(AccumulateStats& params);
cudaError_t accumulate_stats(const AccumulateStats& params, cudaStream_t stream);

}  // namespace moe_ext::cuda

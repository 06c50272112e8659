// topk_route on a GPU: what csrc/cuda/topk_route.cpp tells the kernels. No torch.
//
// A is what everything is computed in: float, or double for float64 logits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../routing.h"
#include "dtypes.h"

namespace moe_ext::cuda {

// How a routing of `tokens` rows is cut into blocks, which decides the sizes of the
// workspaces, and the order in which score_sums is summed.
struct RouteGrid {
  int64_t blocks, tokens_per_block;
  int64_t row_size;         // experts, rounded up: the width of block_sums and block_counts
  int64_t workspace_bytes;  // for rows too long for registers; else 0
};
template <class A>
RouteGrid topk_route_grid(int64_t tokens, int64_t num_experts);

// What the forward and the backward both go through.
struct RouteRows {
  RouteOptions options;
  int64_t tokens;
  RouteGrid grid;
  const void* logits;  // (T, E) contiguous
  Dtype dtype;
  const bool* padding;  // (T) or null
  void* workspace;      // grid.workspace_bytes
};

template <class A>
struct TopkRoute : RouteRows {
  const A* selection_bias;  // (E) or null
  const void* replayed;     // (T, K) ids to take instead of choosing, if options.replay
  bool replayed_is_int64;

  A* weights;        // (T, K)
  int32_t* experts;  // (T, K)
  A* logsumexp;      // (T)
  A* score_sums;     // (E)
  int32_t* counts;   // (E)

  A* block_sums;          // (grid.blocks, grid.row_size)
  int32_t* block_counts;  // likewise
};
template <class A>
cudaError_t topk_route(const TopkRoute<A>& params, cudaStream_t stream);

template <class A>
struct TopkRouteBackward : RouteRows {
  const void* experts;  // (T, K)
  bool experts_are_int64;
  const A* dweights;     // (T, K), or null: no gradient comes this way
  const A* dscore_sums;  // (E), or null
  const A* dlogsumexp;   // (T), or null
  void* dlogits;         // (T, E), of the logits' dtype
};
template <class A>
cudaError_t topk_route_backward(const TopkRouteBackward<A>& params, cudaStream_t stream);

}  // namespace moe_ext::cuda

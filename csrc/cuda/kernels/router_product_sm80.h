// router_logits' products on tensor cores, for router_logits.cu. No torch.
#pragma once

#include "router_logits.h"

namespace moe_ext::cuda::sm80 {

// Of a block: how much of out (M, N) it owns.
struct RouterTile {
  int rows, columns;
};
RouterTile router_tile(const RouterProduct& product);

cudaError_t router_product(const RouterProduct& product, cudaStream_t stream);

}  // namespace moe_ext::cuda::sm80

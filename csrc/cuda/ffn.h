// The experts on a GPU: what grouped_ffn and moe_forward share. Both check their
// arguments into an FfnCall (checks/ffn.h) and run ffn_forward and ffn_backward on it;
// they differ in where a row's upstream gradient comes from, in the routing weights, and
// in what becomes of the rows.
//
// Workspaces come from torch's allocator and live inside one call: A, w A, dH and dX rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "checks/ffn.h"
#include "cuda/device.h"
#include "cuda/kernels/grouped_ffn.h"

namespace moe_ext {

struct FfnRows {
  at::Tensor rows;            // (R, H), the tail garbage
  at::Tensor preactivations;  // (R, 2I or I), the tail 0; of shape (0) where not asked for
};

FfnRows ffn_forward(const char* op, const OnDevice& device, const FfnCall& call);

// Of shape (0) where the call does not ask for it, or where there is no such tensor.
Gradients ffn_backward(const char* op, const OnDevice& device, const FfnCall& call);

// out (T, H) = every token's rows, by `weights` (T, K) or, where that is undefined, by 1.
at::Tensor combine_tokens(const char* op, const OnDevice& device, const FfnCall& call,
                          const at::Tensor& rows, const at::Tensor& weights);

void zero_tail(const char* op, const OnDevice& device, const FfnCall& call, const at::Tensor& rows);

}  // namespace moe_ext

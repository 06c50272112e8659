// MOE_EXT_CHECK=1: an op on a GPU reads its plan back and refuses what leads nowhere, as the CPU
// does. Without it nothing waits for the device, and such entries are sentinels: the kernels
// follow none of them out of a tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdlib>
#include <string_view>

#include "checks.h"

namespace moe_ext {

inline bool checks_plans() {
  const char* wish = std::getenv("MOE_EXT_CHECK");
  return wish && std::string_view(wish) == "1";
}

// The first `used` of the indices (default: all) lead to one of `limit` things, or, with
// `or_none`, are below 0.
inline void check_indices(const char* op, const char* name, const at::Tensor& indices,
                          int64_t limit, bool or_none, int64_t used = -1) {
  if (!checks_plans()) return;
  const at::Tensor here = indices.cpu().contiguous();
  const int32_t* index = here.const_data_ptr<int32_t>();
  for (int64_t i = 0, end = used < 0 ? here.numel() : used; i < end; ++i) {
    TORCH_CHECK_VALUE(index[i] < limit && (or_none || index[i] >= 0), op, ": ", name, "[", i,
                      "] must be ", or_none ? "below " : "in 0..", or_none ? limit : limit - 1,
                      ", got ", index[i]);
  }
}

// Returns how many rows hold something.
inline int64_t check_offsets(const char* op, const at::Tensor& expert_offsets, int64_t rows) {
  if (!checks_plans()) return 0;
  const at::Tensor here = expert_offsets.cpu().contiguous();
  const int32_t* offset = here.const_data_ptr<int32_t>();
  int32_t least = 0;
  for (int64_t e = 0; e < here.numel(); ++e) {
    TORCH_CHECK_VALUE(offset[e] >= least && offset[e] <= (e ? rows : 0), op, ": expert_offsets[", e,
                      "] must rise from 0 to at most R = ", rows, ", got ", offset[e], " after ",
                      least);
    least = offset[e];
  }
  return least;
}

}  // namespace moe_ext

// Memory for large results and workspaces of the CPU ops.
//
// A layer's weight gradients are as large as its weights, and every step frees and
// allocates them again. Fresh memory costs a page fault every 4 KiB, which for experts
// with few rows takes as long as the arithmetic. So large blocks lie on huge pages and
// are kept for the next tensor of about their size. All together never exceed one and a
// half times what was in use at once, and the system may take what is kept (MADV_FREE)
// when memory runs short.

#pragma once

#include <ATen/core/Tensor.h>

namespace moe_ext::cpu {

// Like at::empty on the CPU.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace moe_ext::cpu

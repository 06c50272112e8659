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

#include "cpu/kernels/layouts.h"

namespace moe_ext::cpu {

// Like at::empty on the CPU.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

// Elements that live inside one call.
template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t elements)
      : bytes_(empty_large({elements * int64_t(sizeof(T))}, at::TensorOptions(at::kByte))) {}
  T* data() const { return static_cast<T*>(bytes_.mutable_data_ptr()); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  at::Tensor bytes_;
};

// Rows of operands or sums in such memory.
template <class T>
class WorkspaceRows {
 public:
  WorkspaceRows(int64_t rows, int64_t cols) : cols_(cols), memory_(rows * padded<T>(cols)) {}
  Matrix<T> part(int64_t begin, int64_t count) const {
    return {memory_.data() + begin * padded<T>(cols_), count, cols_, padded<T>(cols_)};
  }
  Rows rows() const { return {memory_.data(), Operand<T>::dtype, padded<T>(cols_)}; }
  RowsOut out() const { return {memory_.data(), Operand<T>::dtype, padded<T>(cols_)}; }

 private:
  int64_t cols_;
  Workspace<T> memory_;
};

}  // namespace moe_ext::cpu

// Tensors as the kernels see them.

#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels/kernels.h"

namespace moe_ext::cpu {

inline Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Dtype::f64;
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    default:
      return Dtype::f16;
  }
}

// Of two dimensions, each row's elements side by side.
inline Rows rows_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0)};
}
inline RowsOut rows_out(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), dtype_of(tensor), tensor.stride(0)};
}

// Null where the tensor is undefined.
template <class T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// Calls body(A()) with the type that is added up in.
template <class Body>
auto with_sums(bool is_double, Body body) {
  return is_double ? body(double()) : body(float());
}

}  // namespace moe_ext::cpu

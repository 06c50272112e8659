// The element types of tensors, as a run-time value. Host and device; no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_ext::cuda {

enum class Dtype { f64, f32, bf16, f16 };

__host__ __device__ constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

}  // namespace moe_ext::cuda

// Tensor maps: what TMA knows of a tensor of 16-bit elements, made on the host for a launch.
#pragma once

#include <cuda.h>

#include "platform.cuh"

namespace moe_ext::cuda {

// Dimensions from the innermost on: `sizes` in elements, `strides` in bytes of all but the
// first. `box` is what a copy moves. Swizzled by 128 bytes: the box's rows are of at most 64
// elements, and lie as wgmma reads them (ptx_sm90.cuh).
//
// False where the driver refuses: an address or a stride that is no multiple of 16, for
// example, or no driver that knows how.
template <int dims>
bool make_tensor_map(CUtensorMap& map, const void* data, const uint64_t (&sizes)[dims],
                     const uint64_t (&strides)[dims - 1], const uint32_t (&box)[dims],
                     bool swizzled = true) {
#ifdef MOE_EXT_EMULATOR
  return emulator::encode_tensor_map(&map, data, dims, sizes, strides, box, swizzled);
#else
  // Found through the runtime: nothing is linked with the driver's library.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) cudaGetLastError();  // it is no later call's
    return error == cudaSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
                                : nullptr;
  }();
  if (!encode) return false;
  uint32_t element_strides[dims];
  for (uint32_t& stride : element_strides) stride = 1;
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, dims, const_cast<void*>(data), sizes, strides,
                box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#endif
}

// Maps of rows that end where a copy wants it, and not where the tensor does: which rows there
// are is said by the coordinates (sm90_store.cuh), since only the device knows. That takes two
// more dimensions, whose strides cancel: the address wraps around at 64 bits.
constexpr int kRaggedRows = 1 << 30;
constexpr uint64_t kAround = uint64_t{1} << 35;

inline bool make_ragged_map(CUtensorMap& map, const void* data, uint64_t columns,
                            uint64_t row_bytes, const uint32_t (&box)[2]) {
  return make_tensor_map(map, data, {columns, kRaggedRows, INT32_MAX, INT32_MAX},
                         {row_bytes, row_bytes, kAround - row_bytes}, {box[0], box[1], 1, 1});
}

// Of rows that are two halves of `columns` each, of which the second dimension names one: a box
// past the end of the first half must not reach into the second.
inline bool make_ragged_halves_map(CUtensorMap& map, const void* data, uint64_t columns,
                                   const uint32_t (&box)[2]) {
  const uint64_t half_bytes = 2 * columns, row_bytes = 2 * half_bytes;
  return make_tensor_map(map, data, {columns, 2, kRaggedRows, INT32_MAX, INT32_MAX},
                         {half_bytes, row_bytes, row_bytes, kAround - row_bytes},
                         {box[0], 1, box[1], 1, 1});
}

}  // namespace moe_ext::cuda

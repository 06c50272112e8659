// Boxes of tensors, for tensor_map.cpp and bulk_copy.cpp.
#pragma once

#include <algorithm>

#include "block.h"

namespace emulator {

TensorMap decode(const CUtensorMap& map, int dims, void* call_site);

struct RowOfBox {
  char* data;              // in the tensor; null: nothing of the row is there
  uint32_t offset, bytes;  // in the box's row
};
RowOfBox row_of(const Box& box, uint32_t row);

// Where a byte lies that would be at `address` without the swizzle of 128 bytes: chunks of 16
// bytes, moved by the address of their 128.
inline uint32_t swizzle128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

}  // namespace emulator

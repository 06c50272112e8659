// Tensor maps: what cuTensorMapEncodeTiled takes and refuses, for 16-bit elements. The 128
// opaque bytes hold a TensorMap of ours.

#include <cstring>

#include "bulk_copy.h"

namespace emulator {

static constexpr uint64_t kMagic = 0x70616d2072736e74;
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

bool encode_tensor_map(CUtensorMap* map, const void* data, int dims, const uint64_t* sizes,
                       const uint64_t* strides, const uint32_t* box, bool swizzled) {
  TensorMap encoded{};
  if (settings().refuse_maps) return false;
  if (dims < 1 || dims > kMostDims || reinterpret_cast<uintptr_t>(data) % 16) return false;
  encoded.magic = kMagic;
  encoded.data = static_cast<char*>(const_cast<void*>(data));
  encoded.dims = static_cast<uint8_t>(dims);
  encoded.swizzled = swizzled;
  for (int d = 0; d < dims; ++d) {
    if (sizes[d] == 0 || sizes[d] > uint64_t{1} << 32 || box[d] == 0 || box[d] > 256) return false;
    encoded.size[d] = sizes[d];
    encoded.box[d] = static_cast<uint16_t>(box[d]);
    if (d == 0) continue;
    if (strides[d - 1] % 16 || strides[d - 1] >= uint64_t{1} << 40) return false;
    encoded.stride[d] = strides[d - 1];
  }
  if (encoded.row_bytes() % 16 || (swizzled && encoded.row_bytes() > 128)) return false;
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &encoded, sizeof encoded);
  return true;
}

TensorMap decode(const CUtensorMap& map, int dims, void* call_site) {
  TensorMap decoded;
  std::memcpy(&decoded, &map, sizeof decoded);
  if (decoded.magic != kMagic) fail_at(call_site, "TMA: no tensor map");
  if (decoded.dims != dims)
    fail_at(call_site, "TMA: %d coordinates in a tensor of %d dimensions", dims, decoded.dims);
  return decoded;
}

// Row `row` of the box: which of its elements are the tensor's, and where. Addresses wrap
// around at 64 bits, which a ragged map uses.
RowOfBox row_of(const Box& box, uint32_t row) {
  const TensorMap& map = box.map;
  auto address = reinterpret_cast<uint64_t>(map.data) + int64_t{box.at[0]} * 2;
  bool inside = true;
  for (int d = 1; d < map.dims; ++d) {
    const int64_t at = int64_t{box.at[d]} + row % map.box[d];
    row /= map.box[d];
    inside &= at >= 0 && at < static_cast<int64_t>(map.size[d]);
    address += static_cast<uint64_t>(at) * map.stride[d];
  }
  const int64_t begin = box.at[0], end = begin + map.box[0];
  const int64_t first = std::max<int64_t>(begin, 0);
  const int64_t last = std::min<int64_t>(end, static_cast<int64_t>(map.size[0]));
  if (!inside || first >= last) return {nullptr, 0, 0};
  return {reinterpret_cast<char*>(address) + (first - begin) * 2,
          static_cast<uint32_t>(first - begin) * 2, static_cast<uint32_t>(last - first) * 2};
}

}  // namespace emulator

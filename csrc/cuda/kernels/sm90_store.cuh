// A consumer's results on their way to memory: rounded, through shared memory, by TMA.
//
// 64 x 64 at a time. The warpgroup lays a slice as TMA expects its box, swizzled (stmatrix does
// so without bank conflicts); then one thread starts the copy, and the warpgroup goes on to the
// next slice, in the other buffer. The map is a ragged one: it clips the box at the last row of
// the tile, so that the next expert's rows stay as they are.
#pragma once

#include "dtypes.cuh"
#include "sm90_pipeline.cuh"
#include "tensor_map.cuh"

namespace moe_ext::cuda::sm90 {

static_assert(kSlice == kConsumerM);

// In shared memory, as TMA lays a box of it.
template <class T>
struct alignas(1024) Slice {
  T element[kConsumerM * kSlice];
};

// Where element (row, column) of a slice lies, in bytes.
__device__ __forceinline__ int slice_offset(int row, int column) {
  return row * kRowBytes + ((column / 8 ^ row % 8) * 16 + column % 8 * 2);
}

// A thread's accumulators of a slice are 32, in eights: of 16 columns, columns 2 member and + 1
// of row `group` and of row + 8, then those of columns + 8. That is a warp's four 8x8 matrices:
// the halves of 16 rows, then of 16 columns. i: the first of eight.

// kTransposed: the accumulators' columns are the slice's rows.
template <bool kTransposed = false, class T>
__device__ __forceinline__ void lay_eight(Slice<T>& slice, int i, const float (&eight)[8]) {
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x % kWarpgroup / kWarpSize * 16;
  const int column = i * 2 + lane / 16 * 8;
  const uint32_t four[4] = {to_word(eight[0], eight[1], T()), to_word(eight[2], eight[3], T()),
                            to_word(eight[4], eight[5], T()), to_word(eight[6], eight[7], T())};
  const uint32_t target = ptx::smem_u32(&slice);
  if constexpr (kTransposed) {
    ptx::stmatrix_x4_trans(target + slice_offset(column + lane % 8, warp_row + lane / 8 % 2 * 8),
                           four);
  } else {
    ptx::stmatrix_x4(target + slice_offset(warp_row + lane % 16, column), four);
  }
}

template <class T>
__device__ __forceinline__ void take_eight(float (&eight)[8], const Slice<T>& slice, int i) {
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x % kWarpgroup / kWarpSize * 16;
  uint32_t four[4];
  ptx::ldmatrix_x4(
      four, ptx::smem_u32(&slice) + slice_offset(warp_row + lane % 16, i * 2 + lane / 16 * 8));
#pragma unroll
  for (int j = 0; j < 4; ++j) from_word(four[j], eight[2 * j], eight[2 * j + 1], T());
}

// ---- ragged boxes ---------------------------------------------------------------------------
//
// See make_ragged_map. At coordinates (column, 2^30 - count + i, begin + count, 2^30) the
// address is that of row begin + i, modulo 2^64; and rows from `count` on are beyond the second
// dimension's end.

struct RaggedAt {
  int at[4];
};
// Row i, column `column` of the `count` rows from `begin` on.
__device__ __forceinline__ RaggedAt ragged_at(int column, int begin, int count, int i) {
  return {{column, kRaggedRows - count + i, begin + count, kRaggedRows}};
}

// The same of one half of rows that have two: see make_ragged_halves_map.
struct RaggedHalfAt {
  int at[5];
};
__device__ __forceinline__ RaggedHalfAt half_at(const RaggedAt& rows, int half) {
  return {{rows.at[0], half, rows.at[1], rows.at[2], rows.at[3]}};
}

// A consumer's rows of a tile, from `column` on; of one half of rows that have two.
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t from, const Tile& tile,
                                          int consumer, int column) {
  ptx::tma_store(map, from, ragged_at(column, tile.row, tile.rows, consumer * kConsumerM).at);
}
__device__ __forceinline__ void store_half_box(const CUtensorMap& map, uint32_t from,
                                               const Tile& tile, int consumer, int column,
                                               int half) {
  const RaggedAt rows = ragged_at(column, tile.row, tile.rows, consumer * kConsumerM);
  ptx::tma_store(map, from, half_at(rows, half).at);
}

// ---- stores ---------------------------------------------------------------------------------

// What the threads of a consumer do together.
class Consumer {
 public:
  __device__ explicit Consumer(int number)
      : number_(number), leads_(threadIdx.x % kWarpgroup == 0) {}

  __device__ __forceinline__ int number() const { return number_; }
  __device__ __forceinline__ bool leads() const { return leads_; }  // of TMA's orders

  // The numbers are constants: for a computed one ptxas reserves all 16.
  __device__ __forceinline__ void sync() const {
    if (number_ == 0) {
      ptx::named_bar_sync(1, kWarpgroup);
    } else {
      ptx::named_bar_sync(2, kWarpgroup);
    }
  }

  // Before the block ends.
  __device__ __forceinline__ void finish() const {
    if (leads_) ptx::tma_store_wait<0>();
  }

 private:
  int number_;
  bool leads_;
};

// A consumer's way out, through two buffers in turn.
template <class T>
class SliceStore {
 public:
  struct Staging {
    Slice<T> slice[2];
  };

  __device__ SliceStore(Staging& staging, const Consumer& consumer)
      : staging_(staging), consumer_(consumer) {}

  __device__ __forceinline__ int consumer() const { return consumer_.number(); }

  // fill(slice) lays the slice in shared memory, each thread its part; send(address) starts its
  // copy, in one of them.
  template <class Fill, class Send>
  __device__ __forceinline__ void store(Fill fill, Send send) {
    Slice<T>& slice = staging_.slice[next_];
    next_ ^= 1;
    if (consumer_.leads()) ptx::tma_store_wait_read<1>();  // of this buffer, two slices ago
    consumer_.sync();
    fill(slice);
    ptx::fence_proxy_async();
    consumer_.sync();
    if (!consumer_.leads()) return;
    send(ptx::smem_u32(&slice));
    ptx::tma_store_commit();
  }

  // Of accumulators: value(i, eight) says what becomes of the eight from i on.
  template <bool kTransposed = false, class Value, class Send>
  __device__ __forceinline__ void store_eights(Value value, Send send) {
    store(
        [&](Slice<T>& slice) {
#pragma unroll
          for (int i = 0; i < kSlice / 2; i += 8) {
            float eight[8];
            value(i, eight);
            lay_eight<kTransposed>(slice, i, eight);
          }
        },
        send);
  }

 private:
  Staging& staging_;
  const Consumer& consumer_;
  int next_ = 0;
};

}  // namespace moe_ext::cuda::sm90

// A block of an sm_90 GEMM: one warpgroup fills stages of shared memory with operands, two
// multiply them, and mbarriers pass the stages to and fro.
//
//   full[s]    the stage holds a tile of k: the producer has arrived, and every byte that it
//              announced has landed
//   empty[s]   it has been read: each consumer warp arrives, once its products are finished.
//              One arrival a warp, since the four warps of a wgmma finish apart.
//
// A stage is 64 of k (128 bytes, the swizzle's width) of 128 rows of A and 256 of B; a
// consumer has 64 of A's rows, and so 64 x 256 of the tile: 128 accumulators a thread. The
// tensor cores then read from shared memory just as fast as it can give (128 bytes a clock).
#pragma once

#include "dtypes.cuh"
#include "grouped_gemm_sm90.h"
#include "operand_tiles.cuh"
#include "ptx_sm90.cuh"
#include "tiles.cuh"

namespace moe_ext::cuda::sm90 {

constexpr int kWarpgroup = 128, kConsumers = 2;  // threads; warpgroups
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerM = kTileM / kConsumers;

// Registers move from the producer to the consumers: of 168 a thread, which 384 threads start
// with. A producer that gathers has addresses to hold.
template <bool kGathered>
constexpr int kProducerRegisters = kGathered ? 56 : 40;
template <bool kGathered>
constexpr int kConsumerRegisters = kGathered ? 224 : 232;

constexpr int kRowBytes = 128;                   // of an operand in shared memory
constexpr int kEightRows = 8 * kRowBytes;        // the swizzle's pattern
constexpr int kPanelBytes = kTileK * kRowBytes;  // MN-major: 64 of m or n, all of k

template <class T>
struct Stage {
  static_assert(sizeof(T) == 2);
  alignas(1024) T a[kTileM * kTileK];
  alignas(1024) T b[kTileN * kTileK];
};

// Goes round the stages. A barrier's phases alternate between parity 0 and 1, and so does
// `parity` with each round.
template <int kStages>
class Ring {
 public:
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  __device__ __forceinline__ void advance() {
    if (++stage_ < kStages) return;
    stage_ = 0;
    parity_ ^= 1;
  }

 private:
  int stage_ = 0;
  uint32_t parity_ = 0;
};

template <int kStages>
struct Barriers {
  using Ring = sm90::Ring<kStages>;

  uint64_t full[kStages], empty[kStages];

  // By one thread, before the block's first __syncthreads. full_arrivals: of a stage's producers.
  __device__ __forceinline__ void init(int full_arrivals) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(ptx::smem_u32(&full[s]), full_arrivals);
      ptx::mbarrier_init(ptx::smem_u32(&empty[s]), kConsumers * kWarpgroup / kWarpSize);
    }
    ptx::fence_mbarrier_init();
  }

  __device__ __forceinline__ uint32_t full_at(const Ring& ring) const {
    return ptx::smem_u32(&full[ring.stage()]);
  }

  // The producer's: waits until the ring's stage may be filled. In the first round there is
  // nothing to wait for, which the opposite parity says.
  __device__ __forceinline__ void wait_empty(const Ring& ring) {
    ptx::mbarrier_wait(ptx::smem_u32(&empty[ring.stage()]), ring.parity() ^ 1);
  }
  // The consumers'.
  __device__ __forceinline__ void wait_full(const Ring& ring) {
    ptx::mbarrier_wait(full_at(ring), ring.parity());
  }
  __device__ __forceinline__ void release(int stage) {  // by all lanes of a warp
    if (ptx::elect_one()) ptx::mbarrier_arrive(ptx::smem_u32(&empty[stage]));
  }
};

// The tiles of every expert's rows, in order. Each role of a block walks through them by
// itself, in steps of the grid, and all come to the same tiles.
class RowTiles {
 public:
  // offsets: experts + 1 of them, each within 0..rows, in shared memory.
  __device__ RowTiles(const int* offsets, int experts, int column_tiles)
      : offsets_(offsets), experts_(experts), column_tiles_(column_tiles) {}

  // Tile `number`, which is above all that were asked for; its expert is -1 beyond the last.
  __device__ __forceinline__ Tile at(int number) {
    for (; expert_ < experts_; ++expert_) {
      const int begin = offsets_[expert_], rows = max(offsets_[expert_ + 1] - begin, 0);
      const int row_tiles = (rows + kTileM - 1) / kTileM;
      const int tiles = row_tiles * column_tiles_;
      if (number < first_ + tiles) {
        int row_tile, column_tile;
        place_tile(number - first_, row_tiles, column_tiles_, row_tile, column_tile);
        const int row = row_tile * kTileM;
        return {expert_, begin + row, min(rows - row, kTileM), column_tile};
      }
      first_ += tiles;
    }
    return {-1, 0, 0, 0};
  }

 private:
  const int* offsets_;
  int experts_, column_tiles_;
  int expert_ = 0, first_ = 0;  // the expert's first tile
};

// The tiles of every expert's gradient, matrices of `rows` rows; see RowTiles.
class WeightTiles {
 public:
  __device__ WeightTiles(int rows, int experts, int column_tiles)
      : rows_(rows), experts_(experts), column_tiles_(column_tiles) {}

  __device__ __forceinline__ Tile at(int number) const {
    const Tile tile = find_weight_tile(rows_, kTileM, column_tiles_, number);
    return tile.expert < experts_ ? tile : Tile{-1, 0, 0, 0};
  }

 private:
  int rows_, experts_, column_tiles_;
};

// ---- a consumer's products ------------------------------------------------------------------

// What a consumer, one of the warpgroups, reads of the stages: 64 of A's 128 (K-major, so many
// rows; MN-major, a panel), all of B.
template <class T, Major kMajorA, Major kMajorB>
class Products {
  static_assert(kConsumerM * kRowBytes == kPanelBytes);

 public:
  __device__ Products(const Stage<T>* stages, int consumer)
      : a_(ptx::descriptor(ptx::smem_u32(stages->a) + consumer * kPanelBytes, kEightRows)),
        b_(ptx::descriptor(ptx::smem_u32(stages->b), kEightRows, kPanelBytes)) {}

  // acc += a stage's product, of the consumer's 64 rows.
  __device__ __forceinline__ void issue(float (&acc)[kTileN / 2], int stage) const {
    constexpr bool kMnA = kMajorA == Major::kMN, kMnB = kMajorB == Major::kMN;
    constexpr int kStepA = kMnA ? 16 * kRowBytes : 32;  // bytes to the next 16 of k
    constexpr int kStepB = kMnB ? 16 * kRowBytes : 32;
    const uint64_t a = ptx::advance(a_, stage * sizeof(Stage<T>));
    const uint64_t b = ptx::advance(b_, stage * sizeof(Stage<T>));
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
      ptx::wgmma<kTileN, std::is_same_v<T, bf16>, kMnA, kMnB>(acc, ptx::advance(a, step * kStepA),
                                                              ptx::advance(b, step * kStepB), true);
    }
  }

 private:
  uint64_t a_, b_;
};

// acc = the sum over `depth` stages, which are released as soon as they have been read.
template <class T, Major kMajorA, Major kMajorB, int kStages>
__device__ __forceinline__ void multiply(float (&acc)[kTileN / 2],
                                         const Products<T, kMajorA, kMajorB>& products,
                                         Barriers<kStages>& barriers, Ring<kStages>& ring,
                                         int depth) {
#pragma unroll
  for (float& element : acc) element = 0.0f;
  int before = -1;  // the stage whose products may be under way
#pragma unroll 1
  for (int i = 0; i < depth; ++i) {
    barriers.wait_full(ring);
    ptx::wgmma_fence();
    products.issue(acc, ring.stage());
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (before >= 0) barriers.release(before);
    before = ring.stage();
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  if (before >= 0) barriers.release(before);
}

// Of a consumer whose part of the tile does not exist.
template <int kStages>
__device__ __forceinline__ void skip(Barriers<kStages>& barriers, Ring<kStages>& ring, int depth) {
  for (int i = 0; i < depth; ++i) {
    barriers.wait_full(ring);
    barriers.release(ring.stage());
    ring.advance();
  }
}

}  // namespace moe_ext::cuda::sm90

// How the producer fills a stage.
//
// Weights come by TMA, in two boxes of 128 columns (MN-major: four of 64), and so do rows that
// lie one after the other: one thread gives the orders. Rows that are gathered through an index
// come by cp.async from all 128 threads, which lay each 16 bytes where TMA's swizzle would have
// them. wgmma reads through the async proxy, so that each thread must see its copies landed and
// fence before it says so: it does that kLag stages later, and its copies overlap.
#pragma once

#include "sm90_epilogues.cuh"

namespace moe_ext::cuda::sm90 {

// Arrivals at a stage's `full`: of the thread that orders boxes, and of each gathering warp.
template <bool kGathered>
constexpr int kFullArrivals = kGathered ? 1 + kWarpgroup / kWarpSize : 1;

// Stages that a product takes.
__device__ __forceinline__ int depth_of(const Product& p) {
  return static_cast<int>((p.k + kTileK - 1) / kTileK);
}

// The weight's part of a stage, which `columns` begins.
template <class T, Major kMajorB>
__device__ __forceinline__ void load_weight(const Stage<T>& stage, const CUtensorMap& map,
                                            uint32_t full, const TileColumns& columns, int k,
                                            int expert) {
  const uint32_t b = ptx::smem_u32(stage.b);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t target = b + half * sizeof(stage.b) / 2;
    const int column = columns.box[half];
    if constexpr (kMajorB == Major::kK) {
      ptx::tma_load(target, map, full, {k, column, expert});
    } else {
      ptx::tma_load(target, map, full, {column, k, expert});
      ptx::tma_load(target + kPanelBytes, map, full, {column + kTileK, k, expert});
    }
  }
}

// Everything by TMA. By one thread.
template <Major kMajorB, Columns kColumns, class T, int kStages>
__device__ void produce_boxes(Stage<T> (&stages)[kStages], Barriers<kStages>& barriers,
                              const RowsGemmMaps& maps, const RowsGemm& gemm, RowTiles tiles) {
  Ring<kStages> ring;
  for (int number = blockIdx.x;; number += gridDim.x) {
    const Tile tile = tiles.at(number);
    if (tile.expert < 0) return;
    const TileColumns columns = tile_columns<kColumns>(gemm.epilogue, tile.column_tile);
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      const int depth = depth_of(part == 0 ? gemm.full : gemm.low_rank);
#pragma unroll 1
      for (int i = 0; i < depth; ++i, ring.advance()) {
        barriers.wait_empty(ring);
        const Stage<T>& stage = stages[ring.stage()];
        const uint32_t full = barriers.full_at(ring);
        ptx::mbarrier_arrive_expect(full, sizeof(Stage<T>));
        ptx::tma_load(ptx::smem_u32(stage.a), maps.a[part], full, {i * kTileK, tile.row});
        load_weight<T, kMajorB>(stage, maps.w[part], full, columns, i * kTileK, tile.expert);
      }
    }
  }
}

// Stages that cp.async is filling. The warpgroup calls everything together.
template <int kStages>
class Landing {
 public:
  __device__ explicit Landing(Barriers<kStages>& barriers) : barriers_(barriers) {}

  // The copies of the next stage have been issued.
  __device__ __forceinline__ void add() {
    ptx::cp_async_commit();
    if (++under_way_ <= kLag) return;
    ptx::cp_async_wait<kLag>();
    tell_of_one();
  }
  __device__ __forceinline__ void finish() {
    ptx::cp_async_wait<0>();
    while (under_way_ > 0) tell_of_one();
  }

 private:
  static constexpr int kLag = kStages - 2;

  __device__ __forceinline__ void tell_of_one() {
    ptx::fence_proxy_async();
    __syncwarp();
    if (ptx::elect_one()) ptx::mbarrier_arrive(barriers_.full_at(ring_));
    ring_.advance();
    --under_way_;
  }

  Barriers<kStages>& barriers_;
  Ring<kStages> ring_;  // at the stage that is to be told of next
  int under_way_ = 0;
};

// Rows through their index, or as they lie where there is none. By the warpgroup.
template <Major kMajorB, Columns kColumns, class T, int kStages>
__device__ void produce_gathered(Stage<T> (&stages)[kStages], Barriers<kStages>& barriers,
                                 const RowsGemmMaps& maps, const RowsGemm& gemm, RowTiles tiles) {
  using Rows = OperandTile<T, Major::kK, kTileM, kRowBytes>;  // its swizzle is TMA's
  static_assert(Rows::kBytes == sizeof(Stage<T>::a));
  Ring<kStages> ring;
  Landing<kStages> landing(barriers);
  for (int number = blockIdx.x;; number += gridDim.x) {
    const Tile tile = tiles.at(number);
    if (tile.expert < 0) break;
    const TileColumns columns = tile_columns<kColumns>(gemm.epilogue, tile.column_tile);
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      const Product& p = part == 0 ? gemm.full : gemm.low_rank;
      if (p.k == 0) continue;
      const char* const a = static_cast<const char*>(p.a.data);
      KMajorLoader<Rows, kWarpgroup> rows(
          [&](int row) -> const char* {
            if (row >= tile.rows) return nullptr;
            const int64_t from = p.a.index ? p.a.index[tile.row + row] : tile.row + row;
            if (p.a.index && !leads(from, p.a.limit)) return nullptr;
            return a + from * p.a.stride * sizeof(T);
          },
          static_cast<int>(p.k * sizeof(T)), a);
      const int depth = depth_of(p);
#pragma unroll 1
      for (int i = 0; i < depth; ++i, ring.advance()) {
        barriers.wait_empty(ring);
        Stage<T>& stage = stages[ring.stage()];
        if (threadIdx.x == 0) {
          const uint32_t full = barriers.full_at(ring);
          ptx::mbarrier_arrive_expect(full, sizeof stage.b);
          load_weight<T, kMajorB>(stage, maps.w[part], full, columns, i * kTileK, tile.expert);
        }
        rows.load(reinterpret_cast<unsigned char*>(stage.a));
        landing.add();
      }
    }
  }
  landing.finish();
}

// For a weight's gradient: k counts an expert's rows. A's are gathered, or lie from `index` of
// null on; B's come in ragged boxes, which end with the expert's rows: beyond them both are zeros.
template <class T, int kStages>
__device__ void produce_columns(Stage<T> (&stages)[kStages], Barriers<kStages>& barriers,
                                const WeightGradientMaps& maps, const RowMatrix& a,
                                int64_t a_columns, const int* offsets, WeightTiles tiles) {
  using Panel = OperandTile<T, Major::kMN, kTileK, kRowBytes>;
  static_assert(2 * Panel::kBytes == sizeof(Stage<T>::a));
  using Columns = MnMajorLoader<Panel, kWarpgroup, true>;
  Ring<kStages> ring;
  Landing<kStages> landing(barriers);
  for (int number = blockIdx.x;; number += gridDim.x) {
    const Tile tile = tiles.at(number);
    if (tile.expert < 0) break;
    const int begin = offsets[tile.expert], rows = max(offsets[tile.expert + 1] - begin, 0);
    const int64_t row_bytes = a.stride * sizeof(T);
    const char* const data = static_cast<const char*>(a.data) + (a.index ? 0 : begin * row_bytes);
    const auto panel = [&](int which) {
      const int64_t first = tile.row + which * kTileK;
      return Columns(
          [&](int chunk) -> const char* {
            return first + chunk * 8 < a_columns ? data + (first + chunk * 8) * sizeof(T) : nullptr;
          },
          row_bytes, a.index ? a.index + begin : nullptr, a.limit, rows, data);
    };
    Columns low = panel(0), high = panel(1);
#pragma unroll 1
    for (int k = 0; k < rows; k += kTileK, ring.advance()) {
      barriers.wait_empty(ring);
      Stage<T>& stage = stages[ring.stage()];
      if (threadIdx.x == 0) {
        const uint32_t full = barriers.full_at(ring), b = ptx::smem_u32(stage.b);
        ptx::mbarrier_arrive_expect(full, sizeof stage.b);
#pragma unroll
        for (int i = 0; i < kTileN / kTileK; ++i) {
          ptx::tma_load(b + i * kPanelBytes, maps.b, full,
                        ragged_at(tile.column_tile * kTileN + i * kTileK, begin, rows, k).at);
        }
      }
      auto* const bytes = reinterpret_cast<unsigned char*>(stage.a);
      low.load(bytes);
      high.load(bytes + kPanelBytes);
      landing.add();
    }
  }
  landing.finish();
}

}  // namespace moe_ext::cuda::sm90

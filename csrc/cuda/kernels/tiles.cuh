// Which part of a grouped GEMM's result a block owns.
//
// The rows of expert e are expert_offsets[e] to expert_offsets[e + 1], and only the device
// knows them. The host launches as many blocks as any routing could need; each block looks
// for its tile by its number alone, and those beyond the last tile leave. So the order of
// tiles is static, no block waits for another, and a graph captures the launch for every
// routing. The waste is small: at most one partly filled tile, and one block too many a
// column of tiles, per expert. (Decoding, where that would be most of them, has blocks that take
// tile after tile.)
//
// Within an expert, kRowTilesTogether tiles of rows walk through the columns side by side:
// the tiles in flight then form a square rather than a line, so that most of what they
// read of both operands is in L2.
#pragma once

#include "platform.cuh"

namespace moe_ext::cuda {

constexpr int kRowTilesTogether = 16;

// ---- an expert's rows -----------------------------------------------------------------

// Whether an index of a plan leads to one of `limit` things: no other may be followed.
__device__ __forceinline__ bool leads(int32_t index, int64_t limit) {
  return index >= 0 && index < limit;
}

// Where expert e's rows begin (and those of expert e - 1 end), within 0..rows whatever a plan says.
__device__ __forceinline__ int offset_of(const int32_t* __restrict__ expert_offsets, int64_t e,
                                         int64_t rows) {
  return min(max(expert_offsets[e], 0), static_cast<int>(rows));
}

// How many rows expert e has: none where its offsets fall.
__device__ __forceinline__ int rows_of(const int32_t* __restrict__ expert_offsets, int64_t e,
                                       int64_t rows) {
  return max(offset_of(expert_offsets, e + 1, rows) - offset_of(expert_offsets, e, rows), 0);
}

// ---- rows x weight: tiles of an expert's rows ----------------------------------------

// No routing of `rows` rows to `experts` experts has more tiles of `tile_rows` rows: an
// expert that has rows has one of them in its first tile, and the rest fill tiles.
inline int64_t most_row_tiles(int64_t rows, int64_t experts, int64_t tile_rows) {
  const int64_t used = rows < experts ? rows : experts;
  return used + (rows - used) / tile_rows;
}

struct Tile {
  int expert;  // -1: there is no such tile
  int row;     // the tile's first row among all rows (of a weight: of the expert's matrix)
  int rows;    // at most as many as a tile has
  int column_tile;
};

// Tile `place` of a matrix of row_tiles x column_tiles: see above.
__device__ __forceinline__ void place_tile(int place, int row_tiles, int column_tiles,
                                           int& row_tile, int& column_tile) {
  const int first = place / (kRowTilesTogether * column_tiles) * kRowTilesTogether;
  const int together = min(row_tiles - first, kRowTilesTogether);
  place -= first * column_tiles;
  row_tile = first + place % together;
  column_tile = place / together;
}

// The `block`-th tile. The whole warp calls this together; every warp of a block finds the
// same, without shared memory: two sums over experts, first of each lane's share of the
// experts, then within the share that has the tile.
__device__ inline Tile find_row_tile(const int32_t* __restrict__ expert_offsets, int experts,
                                     int64_t all_rows, int tile_rows, int column_tiles,
                                     unsigned block) {
  const int lane = threadIdx.x % kWarpSize;
  const int wanted = static_cast<int>(block / column_tiles);  // counted in tiles of rows
  const auto tiles_of = [&](int e) {
    return (rows_of(expert_offsets, e, all_rows) + tile_rows - 1) / tile_rows;
  };
  const auto sum_up_to_lane = [&](int value) {
#pragma unroll
    for (int d = 1; d < kWarpSize; d *= 2) {
      const int below = __shfl_up_sync(kFullWarp, value, d);
      if (lane >= d) value += below;
    }
    return value;
  };

  const int share = (experts + kWarpSize - 1) / kWarpSize;
  const int share_end = min((lane + 1) * share, experts);
  int tiles = 0;
  for (int e = lane * share; e < share_end; ++e) tiles += tiles_of(e);
  const int end = sum_up_to_lane(tiles);
  const unsigned ends_after = __ballot_sync(kFullWarp, end > wanted);
  if (ends_after == 0) return {-1, 0, 0, 0};
  const int owner = __ffs(ends_after) - 1;
  int before = __shfl_sync(kFullWarp, end - tiles, owner);

  for (int first = owner * share;; first += kWarpSize) {
    const int e = first + lane;
    const int tiles_e = e < experts ? tiles_of(e) : 0;
    const int end_e = before + sum_up_to_lane(tiles_e);
    const unsigned ends_after_e = __ballot_sync(kFullWarp, end_e > wanted);
    if (ends_after_e == 0) {
      before = __shfl_sync(kFullWarp, end_e, kWarpSize - 1);
      continue;
    }
    const int lane_e = __ffs(ends_after_e) - 1, expert = first + lane_e;
    const int row_tiles = __shfl_sync(kFullWarp, tiles_e, lane_e);
    const int first_tile = __shfl_sync(kFullWarp, end_e, lane_e) - row_tiles;
    int row_tile, column_tile;
    place_tile(static_cast<int>(block - static_cast<unsigned>(first_tile) * column_tiles),
               row_tiles, column_tiles, row_tile, column_tile);
    const int row = offset_of(expert_offsets, expert, all_rows) + row_tile * tile_rows;
    const int end_row = offset_of(expert_offsets, expert + 1, all_rows);
    return {expert, row, min(end_row - row, tile_rows), column_tile};
  }
}

// ---- rows^T x rows: tiles of every expert's weight -----------------------------------

// The `block`-th tile of matrices with `rows` rows, one for each expert.
__device__ inline Tile find_weight_tile(int rows, int tile_rows, int column_tiles, unsigned block) {
  const int row_tiles = (rows + tile_rows - 1) / tile_rows;
  const unsigned tiles = static_cast<unsigned>(row_tiles) * column_tiles;
  int row_tile, column_tile;
  place_tile(static_cast<int>(block % tiles), row_tiles, column_tiles, row_tile, column_tile);
  const int row = row_tile * tile_rows;
  return {static_cast<int>(block / tiles), row, min(rows - row, tile_rows), column_tile};
}

}  // namespace moe_ext::cuda

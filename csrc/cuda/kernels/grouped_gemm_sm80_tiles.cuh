// The shapes of the tiles of grouped_gemm_sm80.cuh, and which of them a product has.
//
// A deep ring of stages hides more of the memory's latency. But of the 100 KB of shared memory
// that a multiprocessor of sm_86, sm_89 and sm_120 has, it leaves too little for a second block;
// two of a shallow ring fit, three of few rows, and then one block's epilogue runs beside
// another's products. Short products, which have nothing to keep in a deep ring, have shallow
// ones on every device.
#pragma once

#include <type_traits>

#include "grouped_gemm_sm80.cuh"

namespace moe_ext::cuda::sm80 {

// ---- shapes -----------------------------------------------------------------------------
//
// TileShape<rows, warps along them, warps along the columns, bytes of k, stages, blocks>

using Deep16 = TileShape<kFewestRows, 1, 4, 128, 3, 3>;
using Deep32 = TileShape<32, 1, 4, 128, 3, 3>;
using Deep64 = TileShape<64, 2, 2, 128, 3, 2>;
using Deep128 = TileShape<kWeightRows, 2, 2, 64, 4, 2>;
using Deep256 = TileShape<256, 4, 2, 64, 4, 1>;

using Shallow16 = TileShape<kFewestRows, 1, 4, 64, 3, 3>;
using Shallow32 = TileShape<32, 1, 4, 64, 3, 3>;
using Shallow64 = TileShape<64, 2, 2, 64, 4, 2>;
using Shallow128 = TileShape<kWeightRows, 2, 2, 64, 3, 2>;

// Shared memory of a multiprocessor: what the fewest have, and what the others have at least. A
// block takes 1 KB more than it asks for.
constexpr int64_t kLeastSmem = 100 << 10, kMoreSmem = 164 << 10;
template <class Shape>
constexpr int64_t blocks_in(int64_t smem) {
  return smem / (Shape::kRingBytes + 1024);
}
static_assert(blocks_in<Shallow16>(kLeastSmem) == 3 && blocks_in<Shallow32>(kLeastSmem) == 3);
static_assert(blocks_in<Shallow64>(kLeastSmem) == 2 && blocks_in<Shallow128>(kLeastSmem) == 2);
static_assert(blocks_in<Deep16>(kMoreSmem) == 2 && blocks_in<Deep32>(kMoreSmem) == 2);
static_assert(blocks_in<Deep64>(kMoreSmem) == 2 && blocks_in<Deep128>(kMoreSmem) == 2);
static_assert(blocks_in<Deep256>(kLeastSmem) == 1);

// ---- the launches -----------------------------------------------------------------------

template <class T, class Shape, Major kMajorB>
cudaError_t launch_rows_gemm(const RowsGemm& gemm, const char* name, cudaStream_t stream) {
  const Epilogue& e = gemm.epilogue;
  const bool paired = e.kind == EpilogueKind::kActivate && e.activation.gated;
  const int64_t column_tiles = (e.columns * (paired ? 2 : 1) + kTileN - 1) / kTileN;
  const int64_t blocks =
      most_row_tiles(gemm.context.rows, gemm.context.experts, Shape::kM) * column_tiles;
  if (blocks == 0) return cudaSuccess;
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
                            Shape::kRingBytes, stream, name};
  return launch(config, rows_gemm_kernel<T, Shape, kMajorB>, gemm, static_cast<int>(column_tiles));
}

template <class T, class Shape>
cudaError_t launch_weight_gradient(const WeightGradient& gradient, const char* name,
                                   cudaStream_t stream) {
  const int64_t column_tiles = (gradient.n + kTileN - 1) / kTileN;
  const int64_t row_tiles = (gradient.m + Shape::kM - 1) / Shape::kM;
  const int64_t blocks = gradient.context.experts * row_tiles * column_tiles;
  if (blocks == 0) return cudaSuccess;
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
                            Shape::kRingBytes, stream, name};
  return launch(config, weight_gradient_kernel<T, Shape>, gradient, static_cast<int>(column_tiles));
}

// ---- which tile -------------------------------------------------------------------------
//
// The first entry of a table for which all holds. A row of the result has the same bits from
// all of them.

constexpr int64_t kAny = INT64_MAX;

// Fewer shapes for tf32: they all have to be compiled. An entry for 16-bit types alone is for no
// number of rows there, with a kernel that is compiled anyway.
template <class T>
constexpr bool kHalves = sizeof(T) == 2;
template <class T, class Shape, class Tf32Shape>
using ByType = std::conditional_t<kHalves<T>, Shape, Tf32Shape>;

// A tile of many rows reads the weights less often; one of few wastes less of itself.
template <class T, Major kMajorB>
struct RowsTile {
  int64_t most_rows;   // that an expert has on the average
  int64_t least_k;     // bytes
  int64_t least_smem;  // of a multiprocessor
  const char* name;
  cudaError_t (*launch)(const RowsGemm&, const char*, cudaStream_t);

  template <class Shape, class Tf32Shape = Shape>
  static constexpr auto kLaunch = launch_rows_gemm<T, ByType<T, Shape, Tf32Shape>, kMajorB>;
};

constexpr int64_t kDeepK = 512;

template <class T, Major kMajorB>
cudaError_t choose_rows_gemm(const RowsGemm& gemm, cudaStream_t stream) {
  using Entry = RowsTile<T, kMajorB>;
  constexpr int64_t k32 = kHalves<T> ? 32 : 0, k128 = kHalves<T> ? 1023 : kAny;
  static constexpr Entry kTiles[] = {
      {16, kDeepK, kMoreSmem, "rows_gemm_sm80, 16 rows, deep", Entry::template kLaunch<Deep16>},
      {16, 0, 0, "rows_gemm_sm80, 16 rows, shallow", Entry::template kLaunch<Shallow16>},
      {k32, kDeepK, kMoreSmem, "rows_gemm_sm80, 32 rows, deep",
       Entry::template kLaunch<Deep32, Deep64>},
      {k32, 0, 0, "rows_gemm_sm80, 32 rows, shallow",
       Entry::template kLaunch<Shallow32, Shallow64>},
      {64, kDeepK, kMoreSmem, "rows_gemm_sm80, 64 rows, deep", Entry::template kLaunch<Deep64>},
      {64, 0, 0, "rows_gemm_sm80, 64 rows, shallow", Entry::template kLaunch<Shallow64>},
      {k128, kDeepK, kMoreSmem, "rows_gemm_sm80, 128 rows, deep", Entry::template kLaunch<Deep128>},
      {k128, 0, 0, "rows_gemm_sm80, 128 rows, shallow", Entry::template kLaunch<Shallow128>},
      {kAny, kDeepK, 0, "rows_gemm_sm80, 256 rows, deep",
       Entry::template kLaunch<Deep256, Deep128>},
      {kAny, 0, 0, "rows_gemm_sm80, 128 rows, shallow", Entry::template kLaunch<Shallow128>},
  };
  const GemmContext& context = gemm.context;
  const int64_t rows = context.rows / (context.experts ? context.experts : 1);
  const int64_t k_bytes = gemm.full.k * static_cast<int64_t>(sizeof(T));
  const Entry* tile = kTiles;
  while (rows > tile->most_rows || k_bytes < tile->least_k || context.smem < tile->least_smem) {
    ++tile;
  }
  return tile->launch(gemm, tile->name, stream);
}

template <class T>
cudaError_t rows_gemm(const RowsGemm& gemm, cudaStream_t stream) {
  return gemm.full.w.k_stride == 1 ? choose_rows_gemm<T, Major::kK>(gemm, stream)
                                   : choose_rows_gemm<T, Major::kMN>(gemm, stream);
}

// Of 256 rows no second block fits, so a tile of that many must have many rows to add up, and
// waste little of itself: at most an eighth more than tiles of 128 rows.
struct WeightTile {
  int64_t least_rows;  // that an expert has on the average
  int64_t least_smem;  // of a multiprocessor
  int tile_rows;
  const char* name;
  cudaError_t (*launch)(const WeightGradient&, const char*, cudaStream_t);
};

template <class T>
cudaError_t weight_gradient(const WeightGradient& gradient, cudaStream_t stream) {
  static constexpr WeightTile kTiles[] = {
      {kHalves<T> ? 512 : kAny, 0, 256, "weight_gradient_sm80, 256 rows, deep",
       launch_weight_gradient<T, ByType<T, Deep256, Deep128>>},
      {128, kMoreSmem, 128, "weight_gradient_sm80, 128 rows, deep",
       launch_weight_gradient<T, Deep128>},
      {0, 0, 128, "weight_gradient_sm80, 128 rows, shallow", launch_weight_gradient<T, Shallow128>},
  };
  const GemmContext& context = gradient.context;
  const int64_t rows = context.rows / (context.experts ? context.experts : 1);
  const auto wastes = [&](int64_t tile_rows) {
    const auto covered = [&](int64_t size) { return (gradient.m + size - 1) / size * size; };
    return covered(tile_rows) * 8 > covered(kWeightRows) * 9;
  };
  const WeightTile* tile = kTiles;
  while (rows < tile->least_rows || context.smem < tile->least_smem || wastes(tile->tile_rows)) {
    ++tile;
  }
  return tile->launch(gradient, tile->name, stream);
}

}  // namespace moe_ext::cuda::sm80

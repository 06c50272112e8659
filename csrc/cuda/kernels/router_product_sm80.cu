// router_logits' products on tensor cores: out (M, N) = (a + a_rest) (M, K) b (N, K)^T (+ bias),
// with operands of one 16-bit dtype and float32 accumulation.
//
// A product of two 16-bit numbers is exact in float32; tensor cores add up 16 of them at once,
// almost as exactly as float32 units would, and no more than a slab in one accumulator. The logits'
// gradient is float32: it comes as two bfloat16 matrices, the rounded one and what rounding left,
// and is multiplied in two passes; 2^-17 of it is lost, of results that are rounded to 2^-9.
//
// A block owns kM x 128 of out, and goes through K by the main loop of
// grouped_gemm_sm80.cuh. The order of a sum: ascending k within a slab, 16 of them an
// instruction, then slab after slab, a's pass and then a_rest's. It is the same in every shape of
// the tile, so a token's logits have the same bits whatever shares its batch.
//
// Shared memory: kStages * (kM + 128) * kBytesK. Alignment: see router_on_tensor_cores. FLOPs:
// 2 M N K, twice with a_rest. Bytes: a once per 128 columns, b once per kM rows (from L2, for
// the most part), out once; the floor is each once, which E <= 128 reaches for x.
#include "dtypes.cuh"
#include "grouped_gemm_sm80.cuh"
#include "router_product_sm80.h"

namespace moe_ext::cuda::sm80 {
namespace {

// TileShape<rows, warps along them, warps along the columns, bytes of k, stages, blocks>
using Few = TileShape<16, 1, 4, 128, 3, 3>;
using Some = TileShape<64, 2, 2, 128, 3, 2>;
using Many = TileShape<128, 4, 2, 128, 3, 1>;

// A block's part of an operand: `extent` rows from `first` on (columns, where they are
// neighbours), `length` of k from `begin` on.
template <class Tile, int kThreads>
__device__ __forceinline__ auto loader(const void* data, int64_t stride, int64_t first,
                                       int64_t extent, int64_t begin, int length) {
  constexpr int kBytes = sizeof(typename Tile::Element), kChunk = 16 / kBytes;
  const char* from = static_cast<const char*>(data);
  if constexpr (Tile::kMajor == Major::kK) {
    return KMajorLoader<Tile, kThreads>(
        [&](int row) -> const char* {
          return first + row < extent ? from + ((first + row) * stride + begin) * kBytes : nullptr;
        },
        (length + kChunk - 1) / kChunk * 16, from);
  } else {
    from += (begin * stride + first) * kBytes;
    return MnMajorLoader<Tile, kThreads, false>(
        [&](int chunk) -> const char* {
          return first + chunk * kChunk < extent ? from + chunk * 16 : nullptr;
        },
        stride* kBytes, nullptr, 0, length, from);
  }
}

template <class T, class Shape, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    router_product_kernel(const RouterProduct p, const int column_tiles) {
  using Loop = Mainloop<T, Shape, kMajorA, kMajorB>;
  using ATile = typename Loop::ATile;
  using BTile = typename Loop::BTile;
  constexpr int kSlabTiles = kRouterSlab / ATile::kDepth;
  static_assert(kSlabTiles * ATile::kDepth == kRouterSlab);
  auto& smem = dyn_smem<typename Loop::Smem>();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / column_tiles) * Shape::kM;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % column_tiles) * kTileN;
  const int64_t split = blockIdx.y, begin = split * p.k_per_split;
  const int length = static_cast<int>(min(p.k_per_split, max(p.k - begin, int64_t{0})));
  const int depth = (length + ATile::kDepth - 1) / ATile::kDepth;

  typename Loop::Accumulators total, sum;  // sum: of one slab
  Loop::clear(total);
  Loop::clear(sum);
#pragma unroll 1
  for (int pass = 0; pass < (p.a_rest ? 2 : 1); ++pass) {
    const void* a = pass == 0 ? p.a.data : p.a_rest;
    auto load_a = loader<ATile, Shape::kThreads>(a, p.a.stride, first_row, p.m, begin, length);
    auto load_b =
        loader<BTile, Shape::kThreads>(p.b.data, p.b.stride, first_column, p.n, begin, length);
    Loop::run(smem, load_a, load_b, depth, sum, [&](int tile) {
      if (tile + 1 < depth && (tile + 1) % kSlabTiles != 0) return;
      Loop::add(total, sum);
      Loop::clear(sum);
    });
  }

  using Mine = Share<Shape, kTileN / 8>;
  const int64_t column = first_column + Mine::item() * 8;
  const int columns = static_cast<int>(min(max(p.n - column, int64_t{0}), int64_t{8}));
  float bias[8] = {};
  if (p.bias && p.splits == 1) {
    for (int i = 0; i < columns; ++i) bias[i] = load_as<float>(p.bias, p.bias_dtype, column + i);
  }
  const auto put = [&](auto* out) {
    const int64_t rows = min(p.m - first_row, int64_t{Shape::kM});
#pragma unroll 1
    for (int first = 0; first < rows; first += Loop::kStagedRows) {
      Loop::stage(smem, total, first);
      const int staged_rows = static_cast<int>(min(rows - first, int64_t{Loop::kStagedRows}));
#pragma unroll 1
      for (int row = Mine::row(0); row < staged_rows; row += Mine::kRowsAtOnce) {
        float value[8];
        Loop::read_staged(value, smem, row, Mine::item() * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] += bias[i];
        store_neighbours(out + (first_row + first + row) * p.n + column, value, columns);
      }
    }
  };
  if (p.splits > 1) {
    put(static_cast<float*>(p.parts) + split * p.m * p.n);
  } else if (p.out_dtype == Dtype::f32) {
    put(static_cast<float*>(p.out));
  } else {
    put(static_cast<T*>(p.out));
  }
}

// ---- the launches -----------------------------------------------------------------------

template <class T, class Shape, Major kMajorA, Major kMajorB>
cudaError_t launch_shape(const RouterProduct& p, cudaStream_t stream) {
  const int64_t column_tiles = (p.n + kTileN - 1) / kTileN;
  const int64_t row_tiles = (p.m + Shape::kM - 1) / Shape::kM;
  const LaunchConfig config{
      dim3(static_cast<unsigned>(row_tiles * column_tiles), static_cast<unsigned>(p.splits)),
      dim3(Shape::kThreads), Shape::kRingBytes, stream, "router_product_sm80"};
  return launch(config, router_product_kernel<T, Shape, kMajorA, kMajorB>, p,
                static_cast<int>(column_tiles));
}

template <class T, Major kMajorA, Major kMajorB>
cudaError_t launch_layout(const RouterProduct& p, cudaStream_t stream) {
  switch (router_tile(p).rows) {
    case Few::kM:
      // Rows of shared memory hold at least 64 bytes.
      if constexpr (kMajorA == Major::kK) return launch_shape<T, Few, kMajorA, kMajorB>(p, stream);
      return cudaErrorInvalidValue;
    case Some::kM:
      return launch_shape<T, Some, kMajorA, kMajorB>(p, stream);
    default:
      return launch_shape<T, Many, kMajorA, kMajorB>(p, stream);
  }
}

}  // namespace

RouterTile router_tile(const RouterProduct& p) {
  if (p.m <= Few::kM && p.a.along_depth) return {Few::kM, kTileN};
  return {p.m <= Some::kM ? Some::kM : Many::kM, kTileN};
}

cudaError_t router_product(const RouterProduct& p, cudaStream_t stream) {
  if (p.a.dtype == Dtype::f16) return launch_layout<f16, Major::kK, Major::kK>(p, stream);
  if (p.b.along_depth) return launch_layout<bf16, Major::kK, Major::kK>(p, stream);
  return p.a.along_depth ? launch_layout<bf16, Major::kK, Major::kMN>(p, stream)
                         : launch_layout<bf16, Major::kMN, Major::kMN>(p, stream);
}

}  // namespace moe_ext::cuda::sm80

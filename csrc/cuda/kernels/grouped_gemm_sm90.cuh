// Grouped matrix products by wgmma and TMA, for sm_90a.
//
//   rows_gemm_sm90         out[r] = epilogue(W_e a[r] + B_e b[r]) for the rows r of expert e, the
//                          second sum only with a low-rank part
//   weight_gradient_sm90   out_e = sum over e's rows r of p[r] q[r]^T
//
// A block stays on its multiprocessor and walks through tiles of 128 rows of one expert and 256
// columns of the weight. sm90_pipeline.cuh has what its warps share, sm90_producers.cuh the way
// in, sm90_epilogues.cuh, sm90_backward.cuh and sm90_store.cuh the way out. While the consumers
// write one tile the producer is already filling the stages for the next.
//
// Shared memory: 4 stages of 48 KiB and 32 KiB on the way out (backward, 3 stages and 80 KiB), 2
// KiB of offsets. Alignment: see sm90_takes. Tails (k, columns) are zeros in shared memory; rows
// that a tile lacks are the next expert's, which only their own accumulators meet, and which are
// not stored.
//
// Work: 2 * 128 * 256 FLOPs for each of k, for 384 elements read: 85 FLOPs a byte from L2, and
// of shared memory's 128 bytes a clock the tensor cores' reads take 96, the fill 32.
//
// The same bits every run: a warpgroup owns its results alone and sums k in one order.
#pragma once

#include "grouped_gemm_sm90.h"
#include "sm90_backward.cuh"
#include "sm90_producers.cuh"

namespace moe_ext::cuda::sm90 {

template <class T, int kStages, class Staging>
struct Smem {
  Stage<T> stage[kStages];
  Staging staging[kConsumers];
  Barriers<kStages> barriers;
  Landed landed[kConsumers];  // of a backward epilogue
  int offsets[kMostExperts + 1];
};

// Before the roles part. Offsets are those of the experts' rows, within 0..rows whatever a plan
// says.
template <class Smem>
__device__ __forceinline__ void begin_block(Smem& smem, const GemmContext& context,
                                            int full_arrivals) {
  for (int e = threadIdx.x; e <= context.experts; e += kThreads) {
    smem.offsets[e] = offset_of(context.expert_offsets, e, context.rows);
  }
  if (threadIdx.x == 0) smem.barriers.init(full_arrivals);
  __syncthreads();
}

// The number of this thread's warp, said so that ptxas sees that all lanes have the same.
__device__ __forceinline__ int warp_number() {
  return __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
}
constexpr int kWarpsOfGroup = kWarpgroup / kWarpSize;

#if defined(MOE_EXT_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOE_EXT_SM90_KERNEL(...) __VA_ARGS__
#else  // of another architecture: never launched
#define MOE_EXT_SM90_KERNEL(...) __trap();
#endif

// ---- rows x weight ------------------------------------------------------------------------

// What is compiled apart: how the weights lie, whether rows are gathered, which epilogue, and how
// its gates and ups lie.
template <class T_, Major kMajorB_, bool kGathered_, EpilogueKind kKind_, Columns kColumns_>
struct Variant {
  using T = T_;
  static constexpr Major kMajorB = kMajorB_;
  static constexpr bool kGathered = kGathered_;
  static constexpr EpilogueKind kKind = kKind_;
  static constexpr Columns kColumns = kColumns_;

  static constexpr bool kBackward = kKind == EpilogueKind::kBackward;
  static constexpr Columns kWeightColumns =
      kKind == EpilogueKind::kActivate ? kColumns : Columns::kPlain;
  using Backward = BackwardSlices<T, kColumns>;
  // The epilogue's slices take a stage's place.
  using Smem = std::conditional_t<kBackward, sm90::Smem<T, 3, typename Backward::Staging>,
                                  sm90::Smem<T, 4, typename SliceStore<T>::Staging>>;
  static_assert(sizeof(Smem) <= 227 * 1024);
};

template <class V>
__device__ void consume(typename V::Smem& smem, const RowsGemmMaps& maps, const RowsGemm& gemm,
                        RowTiles tiles, int number) {
  using T = typename V::T;
  const Epilogue& e = gemm.epilogue;
  const Consumer consumer(number);
  const Products<T, Major::kK, V::kMajorB> products(smem.stage, number);
  auto epilogue = [&] {
    if constexpr (V::kBackward) {
      return typename V::Backward(smem.staging[number], smem.landed[number], consumer, maps,
                                  gemm.context, e);
    } else {
      return SliceStore<T>(smem.staging[number], consumer);
    }
  }();
  typename decltype(smem.barriers)::Ring ring;
  const int depth = depth_of(gemm.full) + depth_of(gemm.low_rank);
  for (int next = blockIdx.x;; next += gridDim.x) {
    const Tile tile = tiles.at(next);
    if (tile.expert < 0) break;
    if (number * kConsumerM >= tile.rows) {
      skip(smem.barriers, ring, depth);
      continue;
    }
    if constexpr (V::kBackward) epilogue.ask(tile);
    float acc[kTileN / 2];
    multiply(acc, products, smem.barriers, ring, depth);
    if constexpr (V::kBackward) {
      epilogue.finish(tile, acc);
    } else if constexpr (V::kKind == EpilogueKind::kActivate) {
      activate_tile<T, V::kColumns>(epilogue, maps, e, tile, acc);
    } else {
      store_tile(epilogue, maps, e, tile, acc);
    }
  }
  consumer.finish();
}

template <class V>
__global__ void __launch_bounds__(kThreads, 1)
    rows_gemm_kernel(const __grid_constant__ RowsGemmMaps maps,
                     const __grid_constant__ RowsGemm gemm, const int column_tiles) {
  MOE_EXT_SM90_KERNEL({
    auto& smem = dyn_smem<typename V::Smem>();
    if constexpr (V::kBackward) {
      if (threadIdx.x < kConsumers) smem.landed[threadIdx.x].init();
    }
    begin_block(smem, gemm.context, kFullArrivals<V::kGathered>);
    const RowTiles tiles(smem.offsets, static_cast<int>(gemm.context.experts), column_tiles);
    const int warp = warp_number();
    if (warp < kWarpsOfGroup) {
      ptx::give_registers<kProducerRegisters<V::kGathered>>();
      if constexpr (V::kGathered) {
        produce_gathered<V::kMajorB, V::kWeightColumns>(smem.stage, smem.barriers, maps, gemm,
                                                        tiles);
      } else if (warp == 0 && ptx::elect_one()) {
        produce_boxes<V::kMajorB, V::kWeightColumns>(smem.stage, smem.barriers, maps, gemm, tiles);
      }
    } else {
      ptx::take_registers<kConsumerRegisters<V::kGathered>>();
      consume<V>(smem, maps, gemm, tiles, warp / kWarpsOfGroup - 1);
    }
  })
}

// ---- rows^T x rows ----------------------------------------------------------------------

template <class T>
using GradientSmem = Smem<T, 4, typename SliceStore<T>::Staging>;

// kSwapped: see is_swapped.
template <class T, bool kSwapped>
__device__ void consume_gradient(GradientSmem<T>& smem, const WeightGradientMaps& maps,
                                 const WeightTiles& tiles, int b_columns, int number) {
  const Consumer consumer(number);
  const Products<T, Major::kMN, Major::kMN> products(smem.stage, number);
  SliceStore<T> out(smem.staging[number], consumer);
  typename decltype(smem.barriers)::Ring ring;
  for (int next = blockIdx.x;; next += gridDim.x) {
    const Tile tile = tiles.at(next);
    if (tile.expert < 0) break;
    const int rows = max(smem.offsets[tile.expert + 1] - smem.offsets[tile.expert], 0);
    const int depth = (rows + kTileK - 1) / kTileK;
    if (number * kConsumerM >= tile.rows) {
      skip(smem.barriers, ring, depth);
      continue;
    }
    float acc[kTileN / 2];
    multiply(acc, products, smem.barriers, ring, depth);  // zeros for an expert without rows
    const int row = tile.row + number * kConsumerM;
#pragma unroll
    for (int slice = 0; slice < kTileN / kSlice; ++slice) {
      const int column = tile.column_tile * kTileN + slice * kSlice;
      if (column >= b_columns) break;
      out.template store_eights<kSwapped>(
          [&](int i, float (&eight)[8]) {
#pragma unroll
            for (int j = 0; j < 8; ++j) eight[j] = acc[slice * (kSlice / 2) + i + j];
          },
          [&](uint32_t from) {
            ptx::tma_store(maps.out, from,
                           {kSwapped ? row : column, kSwapped ? column : row, tile.expert});
          });
    }
  }
  consumer.finish();
}

template <class T, bool kSwapped>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ WeightGradientMaps maps,
                           const __grid_constant__ WeightGradient gradient,
                           const int column_tiles) {
  MOE_EXT_SM90_KERNEL({
    auto& smem = dyn_smem<GradientSmem<T>>();
    begin_block(smem, gradient.context, kFullArrivals<true>);
    const RowMatrix& a = kSwapped ? gradient.q : gradient.p;
    const auto a_columns = static_cast<int>(kSwapped ? gradient.n : gradient.m);
    const auto b_columns = static_cast<int>(kSwapped ? gradient.m : gradient.n);
    const WeightTiles tiles(a_columns, static_cast<int>(gradient.context.experts), column_tiles);
    const int warp = warp_number();
    if (warp < kWarpsOfGroup) {
      ptx::give_registers<kProducerRegisters<true>>();
      produce_columns(smem.stage, smem.barriers, maps, a, a_columns, smem.offsets, tiles);
    } else {
      ptx::take_registers<kConsumerRegisters<true>>();
      consume_gradient<T, kSwapped>(smem, maps, tiles, b_columns, warp / kWarpsOfGroup - 1);
    }
  })
}

// ---- the launches -----------------------------------------------------------------------

// A block a multiprocessor, or fewer.
inline LaunchConfig persistent(const GemmContext& context, int64_t tiles, size_t smem_bytes,
                               cudaStream_t stream, const char* name) {
  const auto blocks = static_cast<unsigned>(tiles < context.sm_count ? tiles : context.sm_count);
  return {dim3(blocks), dim3(kThreads), smem_bytes, stream, name};
}

template <class V>
cudaError_t launch_rows_gemm(const RowsGemmMaps& maps, const RowsGemm& gemm, cudaStream_t stream) {
  const GemmContext& context = gemm.context;
  const int64_t column_tiles = sm90_column_tiles(gemm);
  const int64_t tiles = most_row_tiles(context.rows, context.experts, kTileM) * column_tiles;
  if (tiles == 0) return cudaSuccess;
  return launch(persistent(context, tiles, sizeof(typename V::Smem), stream, "rows_gemm_sm90"),
                rows_gemm_kernel<V>, maps, gemm, static_cast<int>(column_tiles));
}

// Calls body with a constant for how gates and ups lie.
template <class Body>
cudaError_t with_columns(const ActivationSpec& spec, Body body) {
  if (!spec.gated) return body(std::integral_constant<Columns, Columns::kPlain>());
  return spec.interleaved ? body(std::integral_constant<Columns, Columns::kInterleaved>())
                          : body(std::integral_constant<Columns, Columns::kHalves>());
}

template <class T, Major kMajorB>
cudaError_t choose_rows_gemm(const RowsGemmMaps& maps, const RowsGemm& gemm, cudaStream_t stream) {
  using Kind = EpilogueKind;
  const Epilogue& e = gemm.epilogue;
  if (e.kind == Kind::kStore) {
    using Gathered = Variant<T, kMajorB, true, Kind::kStore, Columns::kPlain>;
    using Boxes = Variant<T, kMajorB, false, Kind::kStore, Columns::kPlain>;
    return gemm.full.a.index ? launch_rows_gemm<Gathered>(maps, gemm, stream)
                             : launch_rows_gemm<Boxes>(maps, gemm, stream);
  }
  return with_columns(e.activation, [&](auto columns) {
    constexpr Columns kColumns = decltype(columns)::value;
    using Activate = Variant<T, kMajorB, true, Kind::kActivate, kColumns>;
    using Backward = Variant<T, kMajorB, true, Kind::kBackward, kColumns>;
    return e.kind == Kind::kActivate ? launch_rows_gemm<Activate>(maps, gemm, stream)
                                     : launch_rows_gemm<Backward>(maps, gemm, stream);
  });
}

template <class T>
cudaError_t rows_gemm(const RowsGemmMaps& maps, const RowsGemm& gemm, cudaStream_t stream) {
  return gemm.full.w.k_stride == 1 ? choose_rows_gemm<T, Major::kK>(maps, gemm, stream)
                                   : choose_rows_gemm<T, Major::kMN>(maps, gemm, stream);
}

template <class T>
cudaError_t weight_gradient(const WeightGradientMaps& maps, const WeightGradient& gradient,
                            cudaStream_t stream) {
  const bool swapped = is_swapped(gradient);
  const int64_t a_columns = swapped ? gradient.n : gradient.m;
  const int64_t b_columns = swapped ? gradient.m : gradient.n;
  const int64_t column_tiles = (b_columns + kTileN - 1) / kTileN;
  const int64_t tiles =
      gradient.context.experts * ((a_columns + kTileM - 1) / kTileM) * column_tiles;
  if (tiles == 0) return cudaSuccess;
  const auto kernel = swapped ? weight_gradient_kernel<T, true> : weight_gradient_kernel<T, false>;
  return launch(
      persistent(gradient.context, tiles, sizeof(GradientSmem<T>), stream, "weight_gradient_sm90"),
      kernel, maps, gradient, static_cast<int>(column_tiles));
}

}  // namespace moe_ext::cuda::sm90

// rows x weight for a handful of rows, as in decoding: each chosen expert's weights are
// streamed once, past rows that stay in the caches.
//
//   acc[r][n] = sum over k of a[r][k] W_e(n, k), plus the same of the low-rank part, then
//               the epilogue; W along k in memory
//
// With so few rows the weights' bytes are the time, and what it takes is many loads in
// flight on all multiprocessors. So a warp owns only kColumns columns of W (with a gate: of
// gate and up, two pairs) for up to kRows rows of one expert; its lanes go along k together,
// 16 bytes each. Every lane sums its own terms; then the lanes trade halves of what they
// hold until each sum is in one lane, neighbouring columns (or a gate and its up) together,
// as the epilogue wants them. Grid: kWarps warps a block, and no more blocks than the device
// holds at a time: each goes from tile to tile (of kRows rows, by tiles.cuh) until there is none.
// As many as any routing could need would be thousands without work, since 16 tokens may choose
// 16 K experts and rarely do.
//
// Shared memory: none. No alignment is needed; rows of W and a that begin at multiples of 16
// bytes move 16 bytes a load. Per element of W (2 or 4 bytes, read once if an expert has at
// most kRows rows): 2 * kRows FLOPs and, from L1, kRows / kColumns elements of a. A
// lane's terms and the lanes' order are fixed, so the bits are; but they are others than
// those of the tiled kernels, so batch_invariant turns this kernel off.
#pragma once

#include "epilogues.cuh"
#include "tiles.cuh"

namespace moe_ext::cuda {
namespace decode {

constexpr int kMostTokens = 16;  // more tokens are the tiled kernels' business
constexpr int kColumns = 4, kWarps = 4, kThreads = kWarps * kWarpSize;

// Adds up `value`, kValues sums that every lane has a part of. Halving at each step what a
// lane is still responsible for, lane l ends with the sums of index first..first+1, with
// first = l / kLanes * 2; kLanes lanes end with the same ones.
template <int kValues>
struct Trade {
  static constexpr int kLanes = kWarpSize * 2 / kValues;

  template <int kLeft, class C>
  static __device__ __forceinline__ void halve(C (&value)[kValues]) {
    constexpr int distance = kWarpSize * kLeft / kValues / 2;
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < kLeft / 2; ++i) {
      const C kept = upper ? value[kLeft / 2 + i] : value[i];
      const C given = upper ? value[i] : value[kLeft / 2 + i];
      value[i] = kept + __shfl_xor_sync(kFullWarp, given, distance);
    }
    if constexpr (kLeft > 4) halve<kLeft / 2>(value);
  }

  template <class C>
  static __device__ __forceinline__ void sum(C (&value)[kValues]) {
    halve<kValues>(value);
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      value[0] += __shfl_xor_sync(kFullWarp, value[0], distance);
      value[1] += __shfl_xor_sync(kFullWarp, value[1], distance);
    }
  }
};

__host__ __device__ inline bool is_paired(const Epilogue& e) {
  return e.kind == EpilogueKind::kActivate && e.activation.gated;
}
// Columns of the output that a block covers.
__host__ __device__ inline int columns_of_block(const Epilogue& e) {
  return kWarps * (is_paired(e) ? kColumns / 2 : kColumns);
}

// Blocks of a multiprocessor: what registers are for.
template <int kRows>
constexpr int kBlocks = kRows == 4 ? 3 : 2;

template <class T, int kRows>
__device__ __forceinline__ void multiply_tile(const RowsGemm& g, const Tile& tile, bool packs) {
  using C = Compute<T>;
  constexpr int kPack = kMaxPackBytes / sizeof(T);
  const Epilogue& e = g.epilogue;
  const bool paired = is_paired(e);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t column = static_cast<int64_t>(tile.column_tile) * columns_of_block(e) +
                         warp * (columns_of_block(e) / kWarps);
  if (!__any_sync(kFullWarp, column < e.columns)) return;

  // Where a weight has its column c. One past the last is the last again: read in bounds, and
  // never stored.
  const auto column_of = [&](const ExpertMatrix& weight, int c) {
    const int64_t mine = min(column + (paired ? c / 2 : c), e.columns - 1);
    const int64_t n = !paired ? mine : (c % 2 ? e.at.up : e.at.gate) + mine * e.at.step;
    return static_cast<const T*>(weight.data) + tile.expert * weight.expert_stride +
           n * weight.n_stride;
  };
  const T* w[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) w[c] = column_of(g.full.w, c);
  // Rows that the tile does not have, or that are no token's, are not read: their sums stay 0.
  const T* a[kRows];
  unsigned present = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = tile.row + min(r, tile.rows - 1);
    const RowMatrix& rows = g.full.a;
    const int from = rows.index ? rows.index[row] : row;
    const bool is_there = !rows.index || leads(from, rows.limit);
    present |= static_cast<unsigned>(is_there && r < tile.rows) << r;
    a[r] =
        static_cast<const T*>(rows.data) + static_cast<int64_t>(is_there ? from : 0) * rows.stride;
  }

  // The next step's weights are on their way while this one's are multiplied; the terms of
  // kTogether rows are loaded before the first of them is used.
  C sum[kRows * kColumns] = {};
  with_packs(packs, [&](auto whole) {
    constexpr int kTogether = 4;
    static_assert(kRows % kTogether == 0);
    constexpr bool kWhole = decltype(whole)::value;
    const auto count_at = [&](int64_t k) {
      return kWhole || g.full.k - k >= kPack ? kPack : static_cast<int>(g.full.k - k);
    };
    Neighbours<T, kPack> next[kColumns];
    const auto fetch = [&](int64_t k) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) next[c].load(whole, w[c] + k, count_at(k));
    };
    int64_t k = lane * kPack;
    if (k < g.full.k) fetch(k);
#pragma unroll 1
    for (; k < g.full.k; k += kWarpSize * kPack) {
      C weight[kColumns][kPack];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) next[c].values(weight[c]);
      if (k + kWarpSize * kPack < g.full.k) fetch(k + kWarpSize * kPack);
#pragma unroll
      for (int first = 0; first < kRows; first += kTogether) {
        Neighbours<T, kPack> terms[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (present >> (first + i) & 1) terms[i].load(whole, a[first + i] + k, count_at(k));
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int r = first + i;
          if (!(present >> r & 1)) continue;
          C value[kPack];
          terms[i].values(value);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
#pragma unroll
            for (int j = 0; j < kPack; ++j) sum[r * kColumns + c] += value[j] * weight[c][j];
          }
        }
      }
    }
  });

  // A rank is short, and the factor may lie either way: an element a lane.
#pragma unroll 1
  for (int64_t k = lane; k < g.low_rank.k; k += kWarpSize) {
    const Product& p = g.low_rank;
    C weight[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) weight[c] = to_compute(column_of(p.w, c)[k * p.w.k_stride]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= tile.rows) break;
      const C value = to_compute(static_cast<const T*>(p.a.data)[(tile.row + r) * p.a.stride + k]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[r * kColumns + c] += value * weight[c];
    }
  }

  using Sums = Trade<kRows * kColumns>;
  Sums::sum(sum);
  const int index = lane / Sums::kLanes * 2, r = index / kColumns, c = index % kColumns;
  if (lane % Sums::kLanes != 0 || r >= tile.rows) return;
  const int64_t row = tile.row + r, mine = column + (paired ? c / 2 : c);
  if (mine >= e.columns) return;
  with_epilogue<false>(e, [&](auto epilogue) {
    constexpr bool kPaired = decltype(epilogue)::kPaired;
    constexpr int kNeighbours = kPaired ? 1 : 2;
    using Columns = typename decltype(epilogue)::template Columns<T, kNeighbours>;
    const Columns out(e, tile.expert, mine);
    C first[kNeighbours], second[kNeighbours];
#pragma unroll
    for (int j = 0; j < kNeighbours; ++j) first[j] = sum[j], second[j] = sum[kPaired ? 1 : j];
    out.finish(row, true, out.fetch(row, out.look_up(row)), first, second);
  });
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocks<kRows>)
    rows_gemm_kernel(RowsGemm g, int column_tiles, bool packs) {
  for (unsigned block = blockIdx.x;; block += gridDim.x) {
    const Tile tile = find_row_tile(g.context.expert_offsets, static_cast<int>(g.context.experts),
                                    g.context.rows, kRows, column_tiles, block);
    // The same in all lanes; a vote says so to the compiler, for which a shuffle in a loop that
    // lanes may leave apart is a call.
    if (!__any_sync(kFullWarp, tile.expert >= 0)) return;
    multiply_tile<T, kRows>(g, tile, packs);
  }
}

// ---- launcher ------------------------------------------------------------------------

inline bool takes(const RowsGemm& g) {
  return g.context.tokens <= kMostTokens && !g.context.batch_invariant && g.full.w.k_stride == 1 &&
         g.context.dtype != Dtype::f64 && g.epilogue.kind != EpilogueKind::kBackward;
}

template <class T, int kRows>
cudaError_t launch_rows(const RowsGemm& g, cudaStream_t stream) {
  constexpr int kPack = kMaxPackBytes / sizeof(T);
  const Product& p = g.full;
  const bool packs = in_packs<T, kPack>(p.w.data, p.w.n_stride, p.k) &&
                     in_packs<T, kPack>(p.w.data, p.w.expert_stride, p.k) &&
                     in_packs<T, kPack>(p.a.data, p.a.stride, p.k);
  const int64_t block_columns = columns_of_block(g.epilogue);
  const int64_t column_tiles = (g.epilogue.columns + block_columns - 1) / block_columns;
  const int64_t blocks = most_row_tiles(g.context.rows, g.context.experts, kRows) * column_tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t held = static_cast<int64_t>(g.context.sm_count) * kBlocks<kRows>;
  const auto grid = static_cast<unsigned>(blocks < held ? blocks : held);
  return launch({dim3(grid), dim3(kThreads), 0, stream, "rows_gemm_decode"},
                rows_gemm_kernel<T, kRows>, g, static_cast<int>(column_tiles), packs);
}

// An expert has at most as many rows as there are tokens (unless a token chose it twice).
template <class T>
cudaError_t launch_rows_gemm(const RowsGemm& g, cudaStream_t stream) {
  return g.context.tokens <= 4 ? launch_rows<T, 4>(g, stream) : launch_rows<T, 16>(g, stream);
}

}  // namespace decode
}  // namespace moe_ext::cuda

// The experts' products in ordinary arithmetic: for float64 and float32, and for half types
// of sizes, strides and alignments that tensor cores cannot take. Any layout is right here.
//
//   rows_gemm_simt        acc[r][n] = sum over k of a[r][k] W_e(n, k), plus the same of the
//                         low-rank part, then the epilogue
//   weight_gradient_simt  out_e[m][n] = sum over e's rows r of p[r][m] q[r][n]
//
// Grid: one block a tile of kTile x kTile accumulators, found by tiles.cuh, in one
// dimension; blocks past the last tile leave. Block: kThreads threads as a 16 x 16 square,
// each with 4 x 4 accumulators. The sum goes kDepth terms at a time: while a block
// multiplies one slice of both operands from shared memory, its threads already hold the
// next one's elements in registers. An epilogue that wants pairs gets gate and up columns
// side by side: column c of the tile is the gate's (c even) or up's (c odd) column c / 2,
// wherever in memory that is.
//
// Shared memory: 2 * kDepth * (kTile + 4) elements of the compute type, 8.7 KB (17 KB in
// float64). No alignment is needed. Every operand is read once a tile: for each kTile^2 *
// 2 * k FLOPs, 2 * kTile * k elements, that is 64 FLOPs an element of 4 bytes: bound by
// FMA instructions. Sums are in the order of k, in blocks of kSumBlock, and nothing but
// the tile's own block adds to them: the same bits always, and for a row whatever rows
// are beside it.
#pragma once

#include "epilogues.cuh"
#include "tiles.cuh"

namespace moe_ext::cuda {
namespace simt {

constexpr int kTile = 64, kDepth = 16, kSquare = 16, kThreads = kSquare * kSquare;
constexpr int kOwn = kTile / kSquare;             // accumulators of a thread, each way
constexpr int kHeld = kTile * kDepth / kThreads;  // elements that a thread moves of a slice
constexpr int kPitch = kTile + 4;                 // keeps a column's elements in other banks
constexpr int kSumBlock = 256;                    // terms between two stages of a sum

// The column of W that stands at column `c` of a tile that begins at column n0 of out.
__device__ __forceinline__ int64_t weight_column(const Epilogue& e, bool paired, int64_t n0,
                                                 int c) {
  if (!paired) return n0 + c;
  return (c % 2 ? e.at.up : e.at.gate) + (n0 + c / 2) * e.at.step;
}

// A slice of one operand: kTile lanes (rows or columns of the tile) by kDepth terms.
template <class C>
struct Slice {
  C held[kHeld];

  // Which lane and term a thread's i-th element is. Neighbouring threads take neighbouring
  // elements of memory: along the terms or along the lanes.
  static __device__ __forceinline__ int lane_of(int i, bool along_terms) {
    const int item = threadIdx.x + i * kThreads;
    return along_terms ? item / kDepth : item % kTile;
  }
  static __device__ __forceinline__ int term_of(int i, bool along_terms) {
    const int item = threadIdx.x + i * kThreads;
    return along_terms ? item % kDepth : item / kTile;
  }

  // element(lane, term) is 0 where there is none.
  template <class Element>
  __device__ __forceinline__ void fetch(bool along_terms, Element element) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      held[i] = element(lane_of(i, along_terms), term_of(i, along_terms));
    }
  }

  __device__ __forceinline__ void put(C (&slice)[kDepth][kPitch], bool along_terms) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      slice[term_of(i, along_terms)][lane_of(i, along_terms)] = held[i];
    }
  }
};

// total[i][j] = sum over terms of left(4 ty + i, term) right(4 tx + j, term).
template <class C, class Left, class Right>
__device__ __forceinline__ void multiply(C (&total)[kOwn][kOwn], int64_t terms, bool left_along,
                                         Left left, bool right_along, Right right) {
  __shared__ __align__(16) C left_slice[kDepth][kPitch];
  __shared__ __align__(16) C right_slice[kDepth][kPitch];
  const int ty = threadIdx.x / kSquare, tx = threadIdx.x % kSquare;
  C sum[kOwn][kOwn] = {};
  Slice<C> next_left, next_right;
  const auto fetch = [&](int64_t first) {
    next_left.fetch(left_along, [&](int lane, int term) {
      return first + term < terms ? left(lane, first + term) : C(0);
    });
    next_right.fetch(right_along, [&](int lane, int term) {
      return first + term < terms ? right(lane, first + term) : C(0);
    });
  };

  fetch(0);
  for (int64_t first = 0; first < terms; first += kDepth) {
    if (first % kSumBlock == 0) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) total[i][j] += sum[i][j], sum[i][j] = C(0);
      }
    }
    next_left.put(left_slice, left_along);
    next_right.put(right_slice, right_along);
    __syncthreads();
    fetch(first + kDepth);
#pragma unroll
    for (int term = 0; term < kDepth; ++term) {
      C a[kOwn], b[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) a[i] = left_slice[term][ty * kOwn + i];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) b[j] = right_slice[term][tx * kOwn + j];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sum[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();  // the slices are read: the next ones may take their place
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) total[i][j] += sum[i][j];
  }
}

// ---- rows x weight -----------------------------------------------------------------

// The epilogue takes pairs: half of a tile's columns are the gate's, half are up's.
__host__ __device__ inline bool is_paired(const Epilogue& e) {
  return e.kind == EpilogueKind::kActivate && e.activation.gated;
}
__host__ __device__ inline int columns_of_tile(const Epilogue& e) {
  return is_paired(e) ? kTile / 2 : kTile;
}

template <class T>
__global__ void __launch_bounds__(kThreads) rows_gemm_kernel(RowsGemm g, int column_tiles) {
  using C = Compute<T>;
  const Epilogue& e = g.epilogue;
  const Tile tile = find_row_tile(g.context.expert_offsets, static_cast<int>(g.context.experts),
                                  g.context.rows, kTile, column_tiles, blockIdx.x);
  if (tile.expert < 0) return;
  const bool paired = is_paired(e);
  const int64_t n0 = static_cast<int64_t>(tile.column_tile) * columns_of_tile(e);
  const int columns = static_cast<int>(min(e.columns - n0, int64_t{columns_of_tile(e)}));
  const int lanes = paired ? 2 * columns : columns;

  __shared__ int row_of[kTile];
  C acc[kOwn][kOwn] = {};
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    const Product p = part == 0 ? g.full : g.low_rank;
    if (p.k == 0) continue;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < tile.rows) {
      const int row = tile.row + thread;
      const int from = p.a.index ? p.a.index[row] : row;
      row_of[thread] = !p.a.index || leads(from, p.a.limit) ? from : -1;
    }
    __syncthreads();
    const T* a = static_cast<const T*>(p.a.data);
    const T* w = static_cast<const T*>(p.w.data) + tile.expert * p.w.expert_stride;
    multiply(
        acc, p.k, true,
        [&](int lane, int64_t k) {
          return lane < tile.rows && row_of[lane] >= 0
                     ? to_compute(a[row_of[lane] * p.a.stride + k])
                     : C(0);
        },
        p.w.k_stride == 1,
        [&](int lane, int64_t k) {
          return lane < lanes
                     ? to_compute(
                           w[weight_column(e, paired, n0, lane) * p.w.n_stride + k * p.w.k_stride])
                     : C(0);
        });
  }

  const int ty = threadIdx.x / kSquare, tx = threadIdx.x % kSquare;
  with_epilogue<true>(e, [&](auto epilogue) {
    using Kind = decltype(epilogue);
    constexpr int kNeighbours = Kind::kPaired ? kOwn / 2 : kOwn;
    using Columns = typename Kind::template Columns<T, kNeighbours>;
    const Columns out(e, tile.expert, n0 + tx * kNeighbours);
#pragma unroll 1
    for (int i = 0; i < kOwn; ++i) {
      const int lane = ty * kOwn + i;
      const bool exists = lane < tile.rows;
      const int64_t row = tile.row + min(lane, tile.rows - 1);
      C first[kNeighbours], second[kNeighbours];
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) {
        first[j] = acc[0][Kind::kPaired ? 2 * j : j];
        second[j] = acc[0][Kind::kPaired ? 2 * j + 1 : j];
      }
      C score = out.finish(row, exists, out.fetch(row, out.look_up(row)), first, second);
      if constexpr (Kind::kScores) {
#pragma unroll
        for (int d = kSquare / 2; d > 0; d /= 2) score += __shfl_xor_sync(kFullWarp, score, d);
        if (e.score_parts && exists && tx == 0) {
          static_cast<C*>(e.score_parts)[tile.column_tile * g.context.rows + row] = score;
        }
      }
      // The next row's come to the front: registers have no addresses.
#pragma unroll
      for (int r = 0; r + 1 < kOwn; ++r) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) acc[r][j] = acc[r + 1][j];
      }
    }
  });
}

// ---- rows^T x rows -------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads)
    weight_gradient_kernel(WeightGradient g, int column_tiles) {
  using C = Compute<T>;
  const Tile tile = find_weight_tile(static_cast<int>(g.m), kTile, column_tiles, blockIdx.x);
  const int64_t n0 = static_cast<int64_t>(tile.column_tile) * kTile;
  const int64_t begin = offset_of(g.context.expert_offsets, tile.expert, g.context.rows);
  const int64_t end = begin + rows_of(g.context.expert_offsets, tile.expert, g.context.rows);
  const T* p = static_cast<const T*>(g.p.data);
  const T* q = static_cast<const T*>(g.q.data);
  C acc[kOwn][kOwn] = {};
  multiply(
      acc, end - begin, false,
      [&](int lane, int64_t r) {
        if (lane >= tile.rows) return C(0);
        const int64_t row = g.p.index ? g.p.index[begin + r] : begin + r;
        if (g.p.index && !leads(row, g.p.limit)) return C(0);
        return to_compute(p[row * g.p.stride + tile.row + lane]);
      },
      false,
      [&](int lane, int64_t r) {
        if (n0 + lane >= g.n) return C(0);
        const int64_t row = g.q.index ? g.q.index[begin + r] : begin + r;
        if (g.q.index && !leads(row, g.q.limit)) return C(0);
        return to_compute(q[row * g.q.stride + n0 + lane]);
      });

  const int ty = threadIdx.x / kSquare, tx = threadIdx.x % kSquare;
  const int64_t column = n0 + tx * kOwn;
  if (column >= g.n) return;
  const int count = static_cast<int>(g.n - column < kOwn ? g.n - column : kOwn);
  T* out = static_cast<T*>(g.out) + (tile.expert * g.m + tile.row) * g.n + column;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int lane = ty * kOwn + i;
    if (lane < tile.rows) store_neighbours<T, kOwn>(out + lane * g.n, acc[i], count);
  }
}

// ---- launchers -----------------------------------------------------------------------

inline int tiles_along(int64_t size, int tile) {
  return static_cast<int>((size + tile - 1) / tile);
}

inline int64_t column_tiles(const RowsGemm& g) {
  return tiles_along(g.epilogue.columns, columns_of_tile(g.epilogue));
}

template <class T>
cudaError_t launch_rows_gemm(const RowsGemm& g, cudaStream_t stream) {
  const int column_tiles = static_cast<int>(simt::column_tiles(g));
  const int64_t blocks = most_row_tiles(g.context.rows, g.context.experts, kTile) * column_tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch({dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, "rows_gemm_simt"},
                rows_gemm_kernel<T>, g, column_tiles);
}

template <class T>
cudaError_t launch_weight_gradient(const WeightGradient& g, cudaStream_t stream) {
  const int column_tiles = tiles_along(g.n, kTile);
  const int64_t blocks = g.context.experts * tiles_along(g.m, kTile) * column_tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(
      {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, "weight_gradient_simt"},
      weight_gradient_kernel<T>, g, column_tiles);
}

}  // namespace simt
}  // namespace moe_ext::cuda

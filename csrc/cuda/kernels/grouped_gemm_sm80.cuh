// Grouped matrix products on tensor cores, for sm_80 and up.
//
//   rows_gemm_sm80        out[r] = epilogue(W_e a[index[r]] + B_e b[r]) for the rows r of
//                         expert e, the second sum only with a low-rank part
//   weight_gradient_sm80  out_e = sum over e's rows r of p[r] q[r]^T
//
// A block of 4 (kM = 256: 8) warps owns kM x 128 of the result: kM rows of one expert, or of
// one weight, and 128 columns (tiles.cuh). A ring of kStages stages in shared
// memory is filled by 16-byte cp.async, gathering rows through their index on the way,
// and read by ldmatrix; mma.sync accumulates in float32. Then the accumulators pass
// through the same shared memory, so that a thread gets 8 neighbouring columns of a row,
// writes them in one piece, and the epilogue's code exists once. With [gate; up] weights
// a tile is 64 columns of gate beside the 64 of up that belong to them; interleaved ones
// are so by themselves.
//
// Shared memory: kStages * (kM + 128) * kBytesK; grouped_gemm_sm80_tiles.cuh has the shapes.
// Alignment: see sm80_takes. Tails (k, columns, rows) are zeros in shared memory, so NaN
// beside an operand never meets a product.
//
// Work: 2 * kM * 128 * k FLOPs a tile, for (kM + 128) * k elements read: 64 FLOPs a byte
// at kM = 128 in 16 bits, 85 at 256, from L2 for the most part. The floor from memory is
// every operand and result once; tiles.cuh's order of tiles keeps to it within what L2
// holds. At kM = 16 the weights' one pass is the floor itself. Of shared memory's 128
// bytes a cycle, a warp's 64 x 64 takes 64 and the copies into it 32 (A100).
//
// The same bits every run: a block owns its results alone, k is summed in one order by
// one warp, in steps that are the same in every tile shape; so a row's result does not
// depend on the other rows either.
#pragma once

#include "epilogues.cuh"
#include "grouped_gemm_sm80.h"
#include "operand_tiles.cuh"
#include "tiles.cuh"

namespace moe_ext::cuda::sm80 {

// What a block owns, and how its warps share it.
template <int kM_, int kWarpsM_, int kWarpsN_, int kBytesK_, int kStages_, int kBlocks_>
struct TileShape {
  static constexpr int kRingBytes = kStages_ * (kM_ + kTileN) * kBytesK_;
  static constexpr int kM = kM_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kBytesK = kBytesK_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor: what registers are for
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarpSize;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kTileN / kWarpsN;
};

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], bf16) {
  ptx::mma_m16n8k16_bf16(c, a, b);
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], f16) {
  ptx::mma_m16n8k16_f16(c, a, b);
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], float) {
  ptx::mma_m16n8k8_tf32(c, a, b);
}

// ---- the main loop ----------------------------------------------------------------------

template <class T, class Shape, Major kMajorA, Major kMajorB>
struct Mainloop {
  using ATile = OperandTile<T, kMajorA, Shape::kM, Shape::kBytesK>;
  using BTile = OperandTile<T, kMajorB, kTileN, Shape::kBytesK>;
  static constexpr int kStages = Shape::kStages, kSteps = Shape::kBytesK / kStepBytes;
  static constexpr int kFragmentsM = Shape::kWarpM / 16, kFragmentsN = Shape::kWarpN / 8;

  // The results on their way from a thread's fragments to its neighbouring columns.
  static constexpr int kStagedRows = [] {
    int rows = Shape::kM;
    while (rows * kTileN * sizeof(float) > Shape::kRingBytes) rows /= 2;
    return rows;
  }();
  union Smem {
    struct {
      alignas(128) unsigned char a[kStages][ATile::kBytes];
      alignas(128) unsigned char b[kStages][BTile::kBytes];
    };
    float staged[kStagedRows * kTileN];
  };
  static_assert(sizeof(Smem) == Shape::kRingBytes);

  // [i][j][..]: rows 16 i and columns 8 j of this warp's part, as mma lays them out.
  using Accumulators = float[kFragmentsM][kFragmentsN][4];

  static __device__ __forceinline__ int warp_m() {
    return threadIdx.x / kWarpSize / Shape::kWarpsN;
  }
  static __device__ __forceinline__ int warp_n() {
    return threadIdx.x / kWarpSize % Shape::kWarpsN;
  }

  static __device__ __forceinline__ void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[i][j][c] = 0.0f;
      }
    }
  }

  static __device__ __forceinline__ void add(Accumulators& total, const Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) total[i][j][c] += acc[i][j][c];
      }
    }
  }

  struct Nothing {
    __device__ void operator()(int) const {}
  };

  // acc += the sum over `depth` tiles of k of a b^T; after each, multiplied(tile).
  template <class LoaderA, class LoaderB, class Multiplied = Nothing>
  static __device__ __forceinline__ void run(Smem& smem, LoaderA& load_a, LoaderB& load_b,
                                             int depth, Accumulators& acc,
                                             Multiplied multiplied = {}) {
    const FragmentReader<ATile, Side::kA, Shape::kWarpM> read_a(warp_m() * Shape::kWarpM);
    const FragmentReader<BTile, Side::kB, Shape::kWarpN> read_b(warp_n() * Shape::kWarpN);
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < depth) {
        load_a.load(smem.a[stage]);
        load_b.load(smem.b[stage]);
      }
      ptx::cp_async_commit();
    }
    int full = 0, empty = kStages - 1;  // the stage to read, the stage to fill
    for (int tile = 0; tile < depth; ++tile) {
      // One group a tile, an empty one where there was nothing to copy: all but the
      // youngest kStages - 2 have landed, this tile's among them. The barrier shows it to
      // every warp, and says that all have read the stage that is filled next.
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      if (tile + kStages - 1 < depth) {
        load_a.load(smem.a[empty]);
        load_b.load(smem.b[empty]);
      }
      ptx::cp_async_commit();

      // Two sets of fragments: ldmatrix fills one while mma reads the other.
      uint32_t a[2][kFragmentsM][4], b[2][kFragmentsN / 2][4];
      read_a.read(a[0], smem.a[full], 0);
      read_b.read(b[0], smem.b[full], 0);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step + 1 < kSteps) {
          read_a.read(a[(step + 1) % 2], smem.a[full], step + 1);
          read_b.read(b[(step + 1) % 2], smem.b[full], step + 1);
        }
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
          for (int j = 0; j < kFragmentsN; ++j) {
            const uint32_t (&pair)[4] = b[step % 2][j / 2];
            const uint32_t operand[2] = {pair[j % 2 * 2], pair[j % 2 * 2 + 1]};
            multiply_add(acc[i][j], a[step % 2][i], operand, T());
          }
        }
      }
      multiplied(tile);
      full = full + 1 == kStages ? 0 : full + 1;
      empty = empty + 1 == kStages ? 0 : empty + 1;
    }
    __syncthreads();  // every copy has landed and been read: the stages' memory is free
  }

  // Four columns of a staged row, as 16 bytes; a row's place in the banks depends on it:
  // writing mma's pairs and reading 8 columns a thread are both free of conflicts.
  static __device__ __forceinline__ float* staged_at(Smem& smem, int row, int column) {
    const int chunk = column / 4;
    return smem.staged + row * kTileN + (chunk ^ (chunk / 8 % 2) ^ (row % 4 * 2)) * 4;
  }
  static __device__ __forceinline__ void read_staged(float (&value)[8], Smem& smem, int row,
                                                     int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 four = *reinterpret_cast<float4*>(staged_at(smem, row, column + half * 4));
      value[half * 4] = four.x, value[half * 4 + 1] = four.y;
      value[half * 4 + 2] = four.z, value[half * 4 + 3] = four.w;
    }
  }

  // Shows the tile's rows `first` to first + kStagedRows to every thread.
  static __device__ __forceinline__ void stage(Smem& smem, const Accumulators& acc, int first) {
    const int lane = threadIdx.x % kWarpSize;
    if (first) __syncthreads();  // the rows before have been read
    const int warp_row = warp_m() * Shape::kWarpM - first;
    if (warp_row >= 0 && warp_row < kStagedRows) {
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = warp_row + i * 16 + half * 8 + lane / 4;
            const int column = warp_n() * Shape::kWarpN + j * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(staged_at(smem, row, column) + column % 4) =
                float2{acc[i][j][half * 2], acc[i][j][half * 2 + 1]};
          }
        }
      }
    }
    __syncthreads();
  }
};

// How a block's threads share `rows` staged rows, kItems items a row: a thread has the same item
// of every row it takes, and neighbouring threads have neighbouring items. All threads take
// equally many steps, the last perhaps past the last row.
template <class Shape, int kItems>
struct Share {
  static constexpr int kRowsAtOnce = Shape::kThreads / kItems;
  static __device__ __forceinline__ int item() { return threadIdx.x % kItems; }
  static __device__ __forceinline__ int row(int step) {
    return threadIdx.x / kItems + step * kRowsAtOnce;
  }
  static __device__ __forceinline__ int steps(int rows) {
    return (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  }
};

// ---- rows x weight ----------------------------------------------------------------------

// A tile's columns, as columns of the weight in the order of memory.
struct TileColumns {
  int64_t first;  // of the epilogue's columns
  int64_t width;  // of the weight
  int64_t half;   // [gate; up] side by side: I; else 0

  __device__ TileColumns(const Epilogue& e, int tile) {
    const bool paired = e.kind == EpilogueKind::kActivate && e.activation.gated;
    first = static_cast<int64_t>(tile) * (paired ? kTileN / 2 : kTileN);
    width = paired ? 2 * e.columns : e.columns;
    half = paired && e.at.step == 1 ? e.columns : 0;
    begin = paired && e.at.step == 2 ? 2 * first : first;
  }

  struct Run {
    int64_t column, left;  // the weight's column; how many from there on belong together
  };
  __device__ __forceinline__ Run at(int n) const {
    if (!half) return {begin + n, width - begin - n};
    const int64_t i = begin + n % (kTileN / 2);
    return {i + (n < kTileN / 2 ? 0 : half), half - i};
  }

 private:
  int64_t begin;
};

template <class T, class Shape, Major kMajorB>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    rows_gemm_kernel(const RowsGemm gemm, const int column_tiles) {
  using Loop = Mainloop<T, Shape, Major::kK, kMajorB>;
  auto& smem = dyn_smem<typename Loop::Smem>();
  const GemmContext& context = gemm.context;
  const Tile tile = find_row_tile(context.expert_offsets, static_cast<int>(context.experts),
                                  context.rows, Shape::kM, column_tiles, blockIdx.x);
  if (tile.expert < 0) return;

  const TileColumns columns(gemm.epilogue, tile.column_tile);
  typename Loop::Accumulators acc;
  Loop::clear(acc);
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    const Product p = part == 0 ? gemm.full : gemm.low_rank;
    if (p.k == 0) continue;
    const int k_bytes = static_cast<int>(p.k * sizeof(T));
    const char* a = static_cast<const char*>(p.a.data);
    KMajorLoader<typename Loop::ATile, Shape::kThreads> load_a(
        [&](int row) -> const char* {
          if (row >= tile.rows) return nullptr;
          const int64_t from = p.a.index ? p.a.index[tile.row + row] : tile.row + row;
          if (p.a.index && !leads(from, p.a.limit)) return nullptr;
          return a + from * p.a.stride * sizeof(T);
        },
        k_bytes, a);
    const char* w = static_cast<const char*>(p.w.data) +
                    tile.expert * p.w.expert_stride * static_cast<int64_t>(sizeof(T));
    const int depth = (k_bytes + Shape::kBytesK - 1) / Shape::kBytesK;
    if constexpr (kMajorB == Major::kK) {
      KMajorLoader<typename Loop::BTile, Shape::kThreads> load_b(
          [&](int n) -> const char* {
            const auto run = columns.at(n);
            return run.left > 0 ? w + run.column * p.w.n_stride * sizeof(T) : nullptr;
          },
          k_bytes, w);
      Loop::run(smem, load_a, load_b, depth, acc);
    } else {
      constexpr int kElements = 16 / sizeof(T);
      MnMajorLoader<typename Loop::BTile, Shape::kThreads, false> load_b(
          [&](int chunk) -> const char* {
            const auto run = columns.at(chunk * kElements);
            return run.left > 0 ? w + run.column * sizeof(T) : nullptr;
          },
          p.w.k_stride * sizeof(T), nullptr, 0, static_cast<int>(p.k), w);
      Loop::run(smem, load_a, load_b, depth, acc);
    }
  }

  const Epilogue& e = gemm.epilogue;
#pragma unroll 1
  for (int first = 0; first < min(Shape::kM, tile.rows); first += Loop::kStagedRows) {
    Loop::stage(smem, acc, first);
    with_epilogue<true>(e, [&](auto epilogue) {
      using Kind = decltype(epilogue);
      using Mine = Share<Shape, Kind::kPaired ? kTileN / 16 : kTileN / 8>;
      using Columns = typename Kind::template Columns<T, 8>;
      const int item = Mine::item(), rows = min(tile.rows - first, Loop::kStagedRows);
      const bool interleaved = Kind::kPaired && !columns.half;
      const Columns out(e, tile.expert, columns.first + item * 8);
      const auto row_at = [&](int step) -> int64_t {
        return tile.row + first + min(Mine::row(step), rows - 1);
      };
      // What a row needs from memory is on its way while the row before is worked on.
      auto next = out.fetch(row_at(0), out.look_up(row_at(0)));
      int32_t found = out.look_up(row_at(1));
#pragma unroll 1
      for (int step = 0; step < Mine::steps(rows); ++step) {
        const auto held = next;
        next = out.fetch(row_at(step + 1), found);
        found = out.look_up(row_at(step + 2));
        const int staged = Mine::row(step);
        float value[8], up[8];
        Loop::read_staged(value, smem, staged, interleaved ? item * 16 : item * 8);
        if constexpr (Kind::kPaired) {
          Loop::read_staged(up, smem, staged, interleaved ? item * 16 + 8 : kTileN / 2 + item * 8);
          split(value, up, interleaved);
        }
        const int64_t r = row_at(step);
        float score = out.finish(r, staged < rows, held, value, up);
        if constexpr (Kind::kScores) {
#pragma unroll
          for (int d = kTileN / 16; d > 0; d /= 2) score += __shfl_xor_sync(kFullWarp, score, d);
          if (e.score_parts && item == 0 && staged < rows) {
            static_cast<float*>(e.score_parts)[tile.column_tile * context.rows + r] = score;
          }
        }
      }
    });
  }
}

// ---- rows^T x rows ----------------------------------------------------------------------

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    weight_gradient_kernel(const WeightGradient gradient, const int column_tiles) {
  using Loop = Mainloop<T, Shape, Major::kMN, Major::kMN>;
  auto& smem = dyn_smem<typename Loop::Smem>();
  const Tile tile =
      find_weight_tile(static_cast<int>(gradient.m), Shape::kM, column_tiles, blockIdx.x);
  const GemmContext& context = gradient.context;
  const int begin = offset_of(context.expert_offsets, tile.expert, context.rows);
  const int rows = rows_of(context.expert_offsets, tile.expert, context.rows);
  const int64_t column = static_cast<int64_t>(tile.column_tile) * kTileN;

  // `length` columns of x from `first` on; its rows from `begin` on are what k counts.
  const auto loader = [&](auto* operand_tile, const RowMatrix& x, int64_t first, int64_t length) {
    using OperandTile = std::remove_pointer_t<decltype(operand_tile)>;
    const int64_t row_bytes = x.stride * sizeof(T);
    const char* data =
        static_cast<const char*>(x.data) + first * sizeof(T) + (x.index ? 0 : begin * row_bytes);
    return MnMajorLoader<OperandTile, Shape::kThreads, true>(
        [&](int chunk) -> const char* {
          return (length - first) * static_cast<int64_t>(sizeof(T)) > chunk * 16 ? data + chunk * 16
                                                                                 : nullptr;
        },
        row_bytes, x.index ? x.index + begin : nullptr, x.limit, rows, data);
  };
  auto load_p =
      loader(static_cast<typename Loop::ATile*>(nullptr), gradient.p, tile.row, gradient.m);
  auto load_q = loader(static_cast<typename Loop::BTile*>(nullptr), gradient.q, column, gradient.n);
  typename Loop::Accumulators acc;
  Loop::clear(acc);
  Loop::run(smem, load_p, load_q, (rows + Loop::ATile::kDepth - 1) / Loop::ATile::kDepth, acc);

  T* matrix = static_cast<T*>(gradient.out) + tile.expert * gradient.m * gradient.n;
  using Mine = Share<Shape, kTileN / 8>;
  const ColumnsOfRows<T, 8, false> out(matrix, gradient.n, {0, 0, 1}, gradient.n,
                                       column + Mine::item() * 8);
#pragma unroll 1
  for (int first = 0; first < min(Shape::kM, tile.rows); first += Loop::kStagedRows) {
    Loop::stage(smem, acc, first);
    const int staged_rows = min(tile.rows - first, Loop::kStagedRows);
#pragma unroll 1
    for (int step = 0; step < Mine::steps(staged_rows); ++step) {
      const int staged = Mine::row(step);
      float value[8];
      Loop::read_staged(value, smem, staged, Mine::item() * 8);
      out.store(tile.row + first + staged, value, value, staged < staged_rows);
    }
  }
}

}  // namespace moe_ext::cuda::sm80

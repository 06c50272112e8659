// The epilogue of dA = dy W_down: from the preactivations h of the tile, dH = w act'(h) dA, w A,
// and each row's part of the routing weight's gradient, <dA, A>.
//
// h comes by TMA into the slices that dH leaves from, 64 columns of A's (with a gate 128 of h) at
// a time: while one is worked on, the next is on its way. The first two are asked for before the
// products, so that they are there when those are done.
#pragma once

#include "epilogues.cuh"
#include "sm90_epilogues.cuh"

namespace moe_ext::cuda::sm90 {

// Says that hidden[i] has landed.
struct Landed {
  uint64_t barrier[2];

  // By one thread, before the block's first __syncthreads.
  __device__ void init() {
    for (uint64_t& each : barrier) ptx::mbarrier_init(ptx::smem_u32(&each), 1);
    ptx::fence_mbarrier_init();
  }
};

template <class T, Columns kColumns>
class BackwardSlices {
  static constexpr bool kGated = kColumns != Columns::kPlain;
  static constexpr int kParts = kGated ? 2 : 1;  // of h: gate and up, or the halves of 128 columns

 public:
  struct Staging {
    Slice<T> hidden[2][2], out;
  };

  __device__ BackwardSlices(Staging& staging, Landed& landed, const Consumer& consumer,
                            const RowsGemmMaps& maps, const GemmContext& context, const Epilogue& e)
      : staging_(staging),
        landed_(landed),
        consumer_(consumer),
        maps_(maps),
        context_(context),
        e_(e) {}

  // Before the tile's products.
  __device__ __forceinline__ void ask(const Tile& tile) {
    if (!consumer_.leads()) return;
    ptx::tma_store_wait_read<0>();  // of the tile before
    for (int slice = 0; slice < 2; ++slice) ask_for(tile, slice);
  }

  __device__ __forceinline__ void finish(const Tile& tile, const float (&acc)[kTileN / 2]) {
    const int lane = threadIdx.x % kWarpSize;
    const int row = consumer_.number() * kConsumerM + threadIdx.x % kWarpgroup / kWarpSize * 16 +
                    lane / 4;  // in the tile; and row + 8
    float weight[2], score[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + half * 8;
      weight[half] = at < tile.rows ? weight_of<float>(e_, assignment_of(e_, tile.row + at)) : 0.0f;
    }
#pragma unroll
    for (int slice = 0; slice < kTileN / kSlice; ++slice) {
      const int column = column_of(tile, slice);
      if (column >= e_.columns) break;
      if (slice > 0) {
        if (consumer_.leads()) {
          ptx::tma_store_wait_read<0>();  // of the slice before, whose place the next one takes
          if (slice + 1 < kTileN / kSlice) ask_for(tile, slice + 1);
        }
        consumer_.sync();
      }
      const int set = slice % 2;
      ptx::mbarrier_wait(ptx::smem_u32(&landed_.barrier[set]), parity_ >> set & 1);
      parity_ ^= 1u << set;
      differentiate(acc + slice * (kSlice / 2), staging_.hidden[set], weight, score);
      ptx::fence_proxy_async();
      consumer_.sync();
      if (consumer_.leads()) send(tile, column, staging_.hidden[set]);
    }
    if (!e_.score_parts) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int d = 1; d < 4; d *= 2) {
        score[half] += __shfl_xor_sync(kFullWarp, score[half], d);
      }
      const int at = row + half * 8;
      if (lane % 4 == 0 && at < tile.rows) {
        static_cast<float*>(e_.score_parts)[tile.column_tile * context_.rows + tile.row + at] =
            score[half];
      }
    }
  }

 private:
  static __device__ __forceinline__ int column_of(const Tile& tile, int slice) {
    return tile.column_tile * kTileN + slice * kSlice;
  }

  __device__ __forceinline__ void ask_for(const Tile& tile, int slice) const {
    const int column = column_of(tile, slice);
    if (column >= e_.columns) return;
    const uint32_t landed = ptx::smem_u32(&landed_.barrier[slice % 2]);
    ptx::mbarrier_arrive_expect(landed, kParts * sizeof(Slice<T>));
    const RaggedAt rows = ragged_at(column, tile.row, tile.rows, consumer_.number() * kConsumerM);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t target = ptx::smem_u32(&staging_.hidden[slice % 2][part]);
      if constexpr (kColumns == Columns::kHalves) {
        ptx::tma_load(target, maps_.kept, landed, half_at(rows, part).at);
      } else {
        const int at = kColumns == Columns::kInterleaved ? 2 * column + part * kSlice : column;
        ptx::tma_load(target, maps_.kept, landed, {at, rows.at[1], rows.at[2], rows.at[3]});
      }
    }
  }

  __device__ __forceinline__ void send(const Tile& tile, int column,
                                       const Slice<T> (&hidden)[2]) const {
    const int consumer = consumer_.number();
    if (e_.dh) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t from = ptx::smem_u32(&hidden[part]);
        if constexpr (kColumns == Columns::kHalves) {
          store_half_box(maps_.dh, from, tile, consumer, column, part);
        } else {
          const int at = kColumns == Columns::kInterleaved ? 2 * column + part * kSlice : column;
          store_box(maps_.dh, from, tile, consumer, at);
        }
      }
    }
    if (e_.out) store_box(maps_.out, ptx::smem_u32(&staging_.out), tile, consumer, column);
    ptx::tma_store_commit();
  }

  // da: 32 accumulators of a slice. h becomes dH, in its place, and w A goes to `out`.
  __device__ __forceinline__ void differentiate(const float* da, Slice<T> (&hidden)[2],
                                                const float (&weight)[2], float (&score)[2]) {
    const Activated<T, kGated> activated(e_.activation);
#pragma unroll
    for (int i = 0; i < kSlice / 2; i += 8) {
      float g[8], u[8] = {}, a[8];
      if constexpr (kColumns == Columns::kInterleaved) {
        take_pairs(g, u, hidden, i);
      } else {
        take_eight(g, hidden[0], i);
        if constexpr (kGated) take_eight(u, hidden[1], i);
      }
      activated.differentiate(g, u, a);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float w = weight[j / 2 % 2], upstream = w * da[i + j];
        score[j / 2 % 2] += da[i + j] * a[j];
        g[j] *= upstream, u[j] *= upstream, a[j] *= w;
      }
      if constexpr (kColumns == Columns::kInterleaved) {
        lay_pairs(g, u, hidden, i);
      } else {
        lay_eight(hidden[0], i, g);
        if constexpr (kGated) lay_eight(hidden[1], i, u);
      }
      lay_eight(staging_.out, i, a);
    }
  }

  // Interleaved, two columns of A's are four of h, gate, up, gate, up: 8 bytes. Columns 0 to 31
  // stand in the first part, the others in the second.
  template <class Body>
  static __device__ __forceinline__ void for_pairs(Slice<T> (&hidden)[2], int i, Body body) {
    const int lane = threadIdx.x % kWarpSize;
    const int row = threadIdx.x % kWarpgroup / kWarpSize * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = i * 2 + j / 2 * 8 + lane % 4 * 2;
      const int at = slice_offset(row + j % 2 * 8, column * 2 % kSlice);
      body(2 * j, *reinterpret_cast<uint2*>(hidden[column * 2 / kSlice].element + at / sizeof(T)));
    }
  }
  static __device__ __forceinline__ void take_pairs(float (&g)[8], float (&u)[8],
                                                    Slice<T> (&hidden)[2], int i) {
    for_pairs(hidden, i, [&](int j, const uint2& words) {
      from_word(words.x, g[j], u[j], T());
      from_word(words.y, g[j + 1], u[j + 1], T());
    });
  }
  static __device__ __forceinline__ void lay_pairs(const float (&g)[8], const float (&u)[8],
                                                   Slice<T> (&hidden)[2], int i) {
    for_pairs(hidden, i, [&](int j, uint2& words) {
      words = uint2{to_word(g[j], u[j], T()), to_word(g[j + 1], u[j + 1], T())};
    });
  }

  Staging& staging_;
  Landed& landed_;
  const Consumer& consumer_;
  const RowsGemmMaps& maps_;
  const GemmContext& context_;
  const Epilogue& e_;
  uint32_t parity_ = 0;  // bit i: of landed_.barrier[i]
};

}  // namespace moe_ext::cuda::sm90

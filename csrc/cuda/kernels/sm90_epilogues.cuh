// What becomes of a tile's accumulators: see EpilogueKind. As in epilogues.cuh the arithmetic is
// in float32 and a value is rounded once; a thread has its 128 accumulators as wgmma leaves
// them, and slices of 64 columns go out one after the other (sm90_store.cuh).
#pragma once

#include "activations.cuh"
#include "sm90_store.cuh"

namespace moe_ext::cuda::sm90 {

// How the 256 columns of a tile stand in the weight.
enum class Columns {
  kPlain,        // one after the other
  kHalves,       // 128 of gate, then the 128 of up that belong to them
  kInterleaved,  // a gate beside its up
};

// Of tile `tile`: its first column of the epilogue's, and where the weight's two boxes of 128
// columns begin.
struct TileColumns {
  int first, box[2];
};
template <Columns kColumns>
__device__ __forceinline__ TileColumns tile_columns(const Epilogue& e, int tile) {
  if constexpr (kColumns == Columns::kPlain) {
    const int first = tile * kTileN;
    return {first, {first, first + kTileN / 2}};
  } else {
    const int first = tile * (kTileN / 2);
    if (kColumns == Columns::kHalves) return {first, {first, static_cast<int>(e.columns) + first}};
    return {first, {2 * first, 2 * first + kTileN / 2}};
  }
}

// ---- biases ---------------------------------------------------------------------------------

// A row of `width` biases, or zeros. Columns are even, and so is the width.
template <class T>
class Bias {
 public:
  __device__ Bias(const Epilogue& e, int64_t width, int expert)
      : row_(e.bias ? static_cast<const T*>(e.bias) + expert * width : nullptr), width_(width) {}

  // eight = acc and this thread's biases of columns `column` to `column` + 15.
  __device__ __forceinline__ void add(float (&eight)[8], const float* acc, int column) const {
    float bias[2][2] = {};
    if (row_) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = column + i * 8 + threadIdx.x % 4 * 2;
        if (at >= width_) continue;
        bias[i][0] = to_compute(row_[at]), bias[i][1] = to_compute(row_[at + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) eight[i] = acc[i] + bias[i / 4][i % 2];
  }

 private:
  const T* row_;
  int64_t width_;
};

// ---- out = acc + bias -----------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void store_tile(SliceStore<T>& out, const RowsGemmMaps& maps,
                                           const Epilogue& e, const Tile& tile,
                                           const float (&acc)[kTileN / 2]) {
  const Bias<T> bias(e, e.columns, tile.expert);
  const int first = tile.column_tile * kTileN;
#pragma unroll
  for (int slice = 0; slice < kTileN / kSlice; ++slice) {
    const int column = first + slice * kSlice;
    if (column >= e.columns) break;
    out.store_eights(
        [&](int i, float (&eight)[8]) {
          bias.add(eight, acc + slice * (kSlice / 2) + i, column + i * 2);
        },
        [&](uint32_t from) { store_box(maps.out, from, tile, out.consumer(), column); });
  }
}

// ---- h = acc + bias, out = act(h) -----------------------------------------------------------

template <class T, Columns kColumns>
__device__ __forceinline__ void activate_tile(SliceStore<T>& out, const RowsGemmMaps& maps,
                                              const Epilogue& e, const Tile& tile,
                                              const float (&acc)[kTileN / 2]) {
  constexpr bool kGated = kColumns != Columns::kPlain;
  constexpr int kColumnsOfOut = kGated ? kTileN / 2 : kTileN;
  const int width = static_cast<int>(kGated ? 2 * e.columns : e.columns);
  const Bias<T> bias(e, width, tile.expert);
  const Activated<T, kGated> activated(e.activation);
  const TileColumns columns = tile_columns<kColumns>(e, tile.column_tile);
  const int consumer = out.consumer();

#pragma unroll
  for (int slice = 0; slice < kColumnsOfOut / kSlice; ++slice) {
    const int column = columns.first + slice * kSlice;
    if (column >= e.columns) break;
    const auto send_out = [&](uint32_t from) { store_box(maps.out, from, tile, consumer, column); };

    if constexpr (kColumns == Columns::kInterleaved) {
      // h, 128 columns of it, goes as it is; a thread has each gate beside its up.
      const float* const both = acc + slice * kSlice;
      const auto h = [&](int i, float (&eight)[8]) {
        bias.add(eight, both + i, 2 * column + i * 2);
      };
#pragma unroll
      for (int half = 0; half < 2 && e.kept; ++half) {
        const int at = 2 * column + half * kSlice;
        if (at >= width) break;
        out.store_eights([&](int i, float (&eight)[8]) { h(half * (kSlice / 2) + i, eight); },
                         [&](uint32_t from) { store_box(maps.kept, from, tile, consumer, at); });
      }
      out.store(
          [&](Slice<T>& where) {
            const int lane = threadIdx.x % kWarpSize;
            const int row = threadIdx.x % kWarpgroup / kWarpSize * 16 + lane / 4;
#pragma unroll
            for (int i = 0; i < kSlice; i += 8) {
              float eight[8], value[4];
              h(i, eight);
              const float g[4] = {eight[0], eight[2], eight[4], eight[6]};
              const float u[4] = {eight[1], eight[3], eight[5], eight[7]};
              activated.apply(g, u, value);
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const int at = slice_offset(row + j % 2 * 8, i + j / 2 * 4 + lane % 4);
                round_to(where.element[at / sizeof(T)], value[j]);
              }
            }
          },
          send_out);
    } else {
      const auto gate = [&](int i, float (&eight)[8]) {
        bias.add(eight, acc + slice * (kSlice / 2) + i, column + i * 2);
      };
      const auto up = [&](int i, float (&eight)[8]) {
        bias.add(eight, acc + kTileN / 4 + slice * (kSlice / 2) + i,
                 static_cast<int>(e.columns) + column + i * 2);
      };
      if (e.kept) {
        out.store_eights(gate, [&](uint32_t from) {
          if constexpr (kGated) {
            store_half_box(maps.kept, from, tile, consumer, column, 0);
          } else {
            store_box(maps.kept, from, tile, consumer, column);
          }
        });
        if constexpr (kGated) {
          out.store_eights(up, [&](uint32_t from) {
            store_half_box(maps.kept, from, tile, consumer, column, 1);
          });
        }
      }
      out.store_eights(
          [&](int i, float (&eight)[8]) {
            float g[8], u[8] = {};
            gate(i, g);
            if constexpr (kGated) up(i, u);
            activated.apply(g, u, eight);
          },
          send_out);
    }
  }
}

}  // namespace moe_ext::cuda::sm90

// Which products Hopper's tensor cores can take, and what they tell TMA.

#include <optional>

#include "dtypes.cuh"
#include "grouped_gemm_sm80.h"
#include "grouped_gemm_sm90.h"
#include "tensor_map.cuh"

namespace moe_ext::cuda {
namespace {

using namespace sm90;

// Whether this library has code for sm_90a: setup.py knows.
#if defined(MOE_EXT_EMULATOR) || defined(MOE_EXT_SM90A)
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif

constexpr uint64_t kElement = 2;  // bytes

uint64_t bytes(int64_t elements) { return static_cast<uint64_t>(elements) * kElement; }

bool is_paired(const Epilogue& e) {
  return e.kind == EpilogueKind::kActivate && e.activation.gated;
}

bool map_rows(CUtensorMap& map, const RowMatrix& rows, int64_t length, int64_t count) {
  return make_tensor_map(map, rows.data,
                         {static_cast<uint64_t>(length), static_cast<uint64_t>(count)},
                         {bytes(rows.stride)}, {kTileK, kTileM});
}

// Both majors as (neighbours in memory, the other of n and k, experts).
bool map_weight(CUtensorMap& map, const Product& p, int64_t columns, int64_t experts) {
  const bool k_major = p.w.k_stride == 1;
  const auto k = static_cast<uint64_t>(p.k), n = static_cast<uint64_t>(columns);
  const uint32_t rows = k_major ? kTileN / 2 : kTileK;  // of the box
  return make_tensor_map(
      map, p.w.data, {k_major ? k : n, k_major ? n : k, static_cast<uint64_t>(experts)},
      {bytes(k_major ? p.w.n_stride : p.w.k_stride), bytes(p.w.expert_stride)}, {kTileK, rows, 1});
}

// Of preactivations or their gradients.
bool map_hidden(CUtensorMap& map, const void* data, const Epilogue& e) {
  const auto columns = static_cast<uint64_t>(e.columns);
  const uint32_t box[2] = {kSlice, kSlice};
  if (e.activation.gated && !e.activation.interleaved)
    return make_ragged_halves_map(map, data, columns, box);
  const uint64_t width = e.activation.gated ? 2 * columns : columns;
  return make_ragged_map(map, data, width, width * kElement, box);
}

bool map_results(RowsGemmMaps& maps, const Epilogue& e) {
  return (!e.out || make_ragged_map(maps.out, e.out, static_cast<uint64_t>(e.columns),
                                    bytes(e.out_stride), {kSlice, kSlice})) &&
         (!e.kept || map_hidden(maps.kept, e.kept, e)) && (!e.dh || map_hidden(maps.dh, e.dh, e));
}

std::optional<RowsGemmMaps> maps_of(const RowsGemm& gemm) {
  const GemmContext& context = gemm.context;
  const Epilogue& e = gemm.epilogue;
  RowsGemmMaps maps{};
  const Product* const products[] = {&gemm.full, &gemm.low_rank};
  for (int part = 0; part < 2; ++part) {
    const Product& p = *products[part];
    if (p.k == 0) continue;
    if (!gemm.full.a.index && !map_rows(maps.a[part], p.a, p.k, context.rows)) return {};
    if (!map_weight(maps.w[part], p, e.columns * (is_paired(e) ? 2 : 1), context.experts))
      return {};
  }
  if (!map_results(maps, e)) return {};
  return maps;
}

std::optional<WeightGradientMaps> maps_of(const WeightGradient& gradient) {
  const bool swapped = is_swapped(gradient);
  const RowMatrix& b = swapped ? gradient.p : gradient.q;
  const auto m = static_cast<uint64_t>(gradient.m), n = static_cast<uint64_t>(gradient.n);
  WeightGradientMaps maps{};
  if (!make_ragged_map(maps.b, b.data, swapped ? m : n, bytes(b.stride), {kTileK, kTileK}) ||
      !make_tensor_map(maps.out, gradient.out,
                       {n, m, static_cast<uint64_t>(gradient.context.experts)},
                       {n * kElement, m * n * kElement}, {kSlice, kSlice, 1}))
    return {};
  return maps;
}

bool takes(const GemmContext& context) {
  return kBuilt && context.sm == 90 && context.dtype != Dtype::f32 && context.rows > 0 &&
         context.rows <= kRaggedRows && context.experts <= kMostExperts &&
         (context.batch_invariant || context.rows > 64 * context.experts);
}

}  // namespace

bool sm90_takes(const RowsGemm& gemm) {
  return takes(gemm.context) && gemm.epilogue.columns * kElement % 16 == 0 && sm80_takes(gemm) &&
         maps_of(gemm).has_value();
}

bool sm90_takes(const WeightGradient& gradient) {
  return takes(gradient.context) && !(gradient.p.index && gradient.q.index) &&
         sm80_takes(gradient) && maps_of(gradient).has_value();
}

bool sm90_is_refused(int sm, const void* data) {
  if (!kBuilt || sm != 90) return false;
  CUtensorMap map;
  const uint32_t box[2] = {kSlice, kSlice};
  return !make_tensor_map(map, data, {kSlice, kSlice}, {kSlice * kElement}, box) ||
         !make_ragged_map(map, data, kSlice, kSlice * kElement, box) ||
         !make_ragged_halves_map(map, data, kSlice, box);
}

int64_t sm90_column_tiles(const RowsGemm& gemm) {
  const int64_t tile = is_paired(gemm.epilogue) ? kTileN / 2 : kTileN;
  return (gemm.epilogue.columns + tile - 1) / tile;
}

cudaError_t sm90_rows_gemm(const RowsGemm& gemm, cudaStream_t stream) {
  const RowsGemmMaps maps = *maps_of(gemm);
  return gemm.context.dtype == Dtype::bf16 ? rows_gemm<bf16>(maps, gemm, stream)
                                           : rows_gemm<f16>(maps, gemm, stream);
}

cudaError_t sm90_weight_gradient(const WeightGradient& gradient, cudaStream_t stream) {
  const WeightGradientMaps maps = *maps_of(gradient);
  return gradient.context.dtype == Dtype::bf16 ? weight_gradient<bf16>(maps, gradient, stream)
                                               : weight_gradient<f16>(maps, gradient, stream);
}

}  // namespace moe_ext::cuda

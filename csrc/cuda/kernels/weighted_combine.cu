// y[t] = sum_j w[t][j] rows[r(t, j)], and its gradient, at the speed of a copy.
//
// Both kernels go token by token, so that what K rows share is read once: forward reads
// T K H elements and writes T H; backward reads T H + T K H and writes T K H. That is the
// floor; beyond kBatch choices backward meets a token's dy again, in the L1. A warp works
// on one token's columns, in packs of 16 bytes (N elements) where rows are made of such
// packs, element by element where they are not (an odd H, a view that begins anywhere).
// kBatch rows are in flight at a time: with 24 warps or more on a multiprocessor some 48 KiB,
// more than twice what an H100's bandwidth times its latency asks for. No shared memory.
//
//   forward    block (32 lanes, 8 tokens); grid (T / 8, column chunks of 32 N elements).
//              Rows shorter than 32 packs take fewer lanes and more tokens a block.
//   backward   block (32 lanes, 8 tokens); grid (T / 8, 1 or column chunks). With dweights
//              a warp goes over all of a token's columns, and its lanes add up at the end.
//
// The same bits every time: one thread sums its column over j in ascending order; an inner
// product is summed over 256 columns, these partial sums in order, then the lanes' sums by
// a butterfly. No atomics. A row without an owner is never read, and gets zeros.

#include <algorithm>
#include <initializer_list>

#include "dtypes.cuh"
#include "platform.cuh"
#include "weighted_combine.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarps = 8;    // tokens of a block, where a token is a warp's
constexpr int kChunk = 256;  // columns whose products are summed before they join the others

// Rows in flight; with float64's registers a thread affords half of them. The kernels ask for
// three blocks on a multiprocessor, so that the compiler stays below 80 registers a thread.
template <class A>
constexpr int kBatchOf = sizeof(A) == 8 ? 2 : 4;

// The row of assignment (t, j), or -1. No plan, however wrong, leads out of the arrays.
__device__ __forceinline__ int32_t row_of(const TokenRows& plan, int64_t token, int64_t j) {
  if (j >= plan.top_k) return -1;
  const int32_t row = plan.assignment_row[token * plan.top_k + j];
  return row >= 0 && row < plan.rows ? row : -1;
}

template <class A>
__device__ __forceinline__ A weight_of(const TokenRows& plan, int64_t token, int64_t j) {
  if (plan.weights == nullptr) return 1;
  return load_as<A>(plan.weights, plan.weights_dtype, token * plan.top_k + j);
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const void* matrix, int64_t element) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(matrix) + element);
}

template <class T, int N>
__device__ __forceinline__ void store_pack(void* matrix, int64_t element, Pack<T, N> pack) {
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(matrix) + element) = pack;
}

template <class T, class A, int N>
__global__ void __launch_bounds__(kWarps* kWarpSize, 3) sum_kernel(const TokenSums p) {
  constexpr int kBatch = kBatchOf<A>;
  const TokenRows& plan = p.plan;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= plan.tokens) return;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x * N;
  int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  for (; column < plan.hidden; column += stride) {
    A sum[N] = {};
    for (int64_t first = 0; first < plan.top_k; first += kBatch) {
      // A loop for each kind of load, so that none of them waits for another.
      int32_t row[kBatch];
      A weight[kBatch];
      Pack<T, N> value[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) row[b] = row_of(plan, token, first + b);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (row[b] >= 0) value[b] = load_pack<T, N>(p.rows, row[b] * plan.hidden + column);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (row[b] >= 0) weight[b] = weight_of<A>(plan, token, first + b);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (row[b] < 0) continue;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sum[i] += weight[b] * static_cast<A>(to_compute(value[b].element[i]));
        }
      }
    }
    Pack<T, N> y;
#pragma unroll
    for (int i = 0; i < N; ++i) round_to(y.element[i], static_cast<Compute<T>>(sum[i]));
    store_pack(p.y, token * plan.hidden + column, y);
  }
}

// <a, b> of two packs.
template <class A, class T, int N>
__device__ __forceinline__ A inner_product(const Pack<T, N>& a, const Pack<T, N>& b) {
  A sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sum += static_cast<A>(to_compute(a.element[i])) * static_cast<A>(to_compute(b.element[i]));
  }
  return sum;
}

template <class A, class T, int N>
__device__ __forceinline__ Pack<T, N> scaled(const Pack<T, N>& pack, A weight) {
  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A value = weight * static_cast<A>(to_compute(pack.element[i]));
    round_to(result.element[i], static_cast<Compute<T>>(value));
  }
  return result;
}

// Every token looks at its share of the rows: K of them, for R is at most T K as a rule.
template <class T, int N>
__device__ __forceinline__ void zero_unowned_rows(const TokenSumsGradient& p, int64_t token,
                                                  int64_t own, int64_t stride) {
  const TokenRows& plan = p.plan;
  Pack<T, N> zeros;
#pragma unroll
  for (int n = 0; n < N; ++n) round_to(zeros.element[n], Compute<T>(0));
  for (int64_t row = token; row < plan.rows; row += plan.tokens) {
    if (p.row_owner[row] >= 0 && p.row_owner[row] < p.owners) continue;
    for (int64_t chunk = own; chunk < plan.hidden; chunk += stride) {
#pragma unroll
      for (int i = 0; i < kChunk; i += kWarpSize * N) {
        if (chunk + i >= plan.hidden) break;
        store_pack(p.drows, row * plan.hidden + chunk + i, zeros);
      }
    }
  }
}

template <class T, class A, int N>
__global__ void __launch_bounds__(kWarps* kWarpSize, 3)
    sum_backward_kernel(const TokenSumsGradient p) {
  constexpr int kBatch = kBatchOf<A>;
  const TokenRows& plan = p.plan;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (token >= plan.tokens) return;                           // a whole warp at a time
  const int64_t own = blockIdx.y * kChunk + threadIdx.x * N;  // this lane's first column
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kChunk;

  for (int64_t first = 0; first < plan.top_k; first += kBatch) {
    int32_t row[kBatch];
    A weight[kBatch] = {}, total[kBatch] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      row[b] = row_of(plan, token, first + b);
      if (row[b] >= 0) weight[b] = weight_of<A>(plan, token, first + b);
    }
    for (int64_t chunk = own; chunk < plan.hidden; chunk += stride) {
      A part[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kChunk; i += kWarpSize * N) {
        const int64_t column = chunk + i;
        if (column >= plan.hidden) break;
        const auto dy = load_pack<T, N>(p.dy, token * plan.hidden + column);
        if (p.dweights != nullptr) {
          Pack<T, N> value[kBatch] = {};
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            if (row[b] >= 0) value[b] = load_pack<T, N>(p.rows, row[b] * plan.hidden + column);
          }
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            if (row[b] >= 0) part[b] += inner_product<A>(dy, value[b]);
          }
        }
        if (p.drows != nullptr) {
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            if (row[b] < 0) continue;
            store_pack(p.drows, row[b] * plan.hidden + column, scaled(dy, weight[b]));
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) total[b] += part[b];
    }
    if (p.dweights == nullptr) continue;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
        total[b] += __shfl_xor_sync(kFullWarp, total[b], lanes);
      }
      if (threadIdx.x == 0 && first + b < plan.top_k) {
        store_as(p.dweights, plan.weights_dtype, token * plan.top_k + first + b, total[b]);
      }
    }
  }

  if (p.drows != nullptr) zero_unowned_rows<T, N>(p, token, own, stride);
}

// ---- launchers -------------------------------------------------------------------------

constexpr int64_t kMaxGridY = 65535;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T_, class A_, int N_>
struct Types {
  using T = T_;
  using A = A_;
  static constexpr int N = N_;
};

// Calls launch(Types<T, A, N>()): N is 16 bytes' worth where every row of every matrix is
// made of such packs. Sums in float64 over narrower rows are rare enough to go one by one.
template <class Launch>
cudaError_t dispatch(const TokenRows& plan, std::initializer_list<const void*> matrices,
                     const Launch& launch) {
  bool packed = plan.hidden * size_of(plan.dtype) % kMaxPackBytes == 0;
  for (const void* matrix : matrices) {
    packed &= reinterpret_cast<uintptr_t>(matrix) % kMaxPackBytes == 0;
  }
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < sizeof(double)) {
      if (plan.accumulate == Dtype::f64) return launch(Types<T, double, 1>());
    }
    return packed ? launch(Types<T, Compute<T>, kMaxPackBytes / sizeof(T)>())
                  : launch(Types<T, Compute<T>, 1>());
  };
  switch (plan.dtype) {
    case Dtype::f64:
      return of(double{});
    case Dtype::f32:
      return of(float{});
    case Dtype::bf16:
      return of(bf16{});
    default:
      return of(f16{});
  }
}

}  // namespace

cudaError_t sum_token_rows(const TokenSums& sums, cudaStream_t stream) {
  const TokenRows& plan = sums.plan;
  if (plan.tokens == 0 || plan.hidden == 0) return cudaSuccess;
  return dispatch(plan, {sums.rows, sums.y}, [&](auto types) {
    using S = decltype(types);
    int lanes = 1;  // of a token
    while (lanes < kWarpSize && lanes * S::N < plan.hidden) lanes *= 2;
    const int tokens = kWarps * kWarpSize / lanes;
    const int64_t chunks = ceil_div(plan.hidden, lanes * S::N);
    const dim3 grid(ceil_div(plan.tokens, tokens), std::min(chunks, kMaxGridY));
    return launch({grid, dim3(lanes, tokens), 0, stream, "sum_token_rows"},
                  sum_kernel<typename S::T, typename S::A, S::N>, sums);
  });
}

cudaError_t sum_token_rows_backward(const TokenSumsGradient& gradient, cudaStream_t stream) {
  const TokenRows& plan = gradient.plan;
  if (plan.tokens == 0) return cudaSuccess;
  const auto matrices = {gradient.dy, gradient.rows, static_cast<const void*>(gradient.drows)};
  return dispatch(plan, matrices, [&](auto types) {
    using S = decltype(types);
    // An inner product is one warp's; without any, the columns may be shared out.
    const int64_t chunks =
        gradient.dweights ? 1 : std::max<int64_t>(1, ceil_div(plan.hidden, kChunk));
    const dim3 grid(ceil_div(plan.tokens, kWarps), std::min(chunks, kMaxGridY));
    return launch({grid, dim3(kWarpSize, kWarps), 0, stream, "sum_token_rows_backward"},
                  sum_backward_kernel<typename S::T, typename S::A, S::N>, gradient);
  });
}

}  // namespace moe_ext::cuda

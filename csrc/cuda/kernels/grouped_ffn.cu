// The experts' launchers: the table that says which kernel runs a product, and the small
// kernels beside the products.
//
// bias_gradient    db_e = sum over e's rows of w_r rows[r]. A block has 32 columns of one
//                  expert and goes through its rows in blocks of 256, in order.
// score_gradient   dw[t][j] = the row's parts in a fixed order + <dy, bias>. A warp has 8
//                  rows, four lanes each for the parts, all lanes for a row's inner product.
// zero_tail        rows past the last one become 0. A grid as large as the device at most:
//                  usually there is nothing to do.
//
// All of them read and write every byte once and are bound by that. Shared memory: 1 KB for
// bias_gradient (2 KB in float64), else none. No alignment is needed; aligned rows move 16
// bytes a thread. A sum is always one thread's or one warp's, in a fixed order: the same
// bits every time.
#include "grouped_ffn.h"
#include "grouped_gemm_decode.cuh"
#include "grouped_gemm_simt.cuh"
#include "grouped_gemm_sm80.h"
#include "grouped_gemm_sm90.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;

int blocks_for(int64_t items, int64_t most = INT32_MAX) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < most ? blocks : most);
}

// ---- which kernel runs a product ------------------------------------------------------
//
// The first that takes it. What a kernel may ask for: dtype, strides and alignment, sm, and
// how many rows an expert has on average; never what only the device knows. The last entry
// takes everything.

struct RowsGemmKernel {
  const char* name;
  bool (*takes)(const RowsGemm&);
  int64_t (*column_tiles)(const RowsGemm&);  // of a kBackward epilogue; null: never takes one
  cudaError_t (*launch)(const RowsGemm&, cudaStream_t);
};
constexpr RowsGemmKernel kRowsGemms[] = {
    {"decode", decode::takes, nullptr,
     [](const RowsGemm& g, cudaStream_t stream) {
       return with_type(g.context.dtype, [&](auto t) {
         if constexpr (sizeof(t) == 8) {
           return cudaErrorInvalidValue;
         } else {
           return decode::launch_rows_gemm<decltype(t)>(g, stream);
         }
       });
     }},
    {"sm90", sm90_takes, sm90_column_tiles, sm90_rows_gemm},
    {"sm80", sm80_takes, sm80_column_tiles, sm80_rows_gemm},
    {"simt", [](const RowsGemm&) { return true; }, simt::column_tiles,
     [](const RowsGemm& g, cudaStream_t stream) {
       return with_type(g.context.dtype,
                        [&](auto t) { return simt::launch_rows_gemm<decltype(t)>(g, stream); });
     }},
};

struct WeightGradientKernel {
  const char* name;
  bool (*takes)(const WeightGradient&);
  cudaError_t (*launch)(const WeightGradient&, cudaStream_t);
};
constexpr WeightGradientKernel kWeightGradients[] = {
    {"sm90", sm90_takes, sm90_weight_gradient},
    {"sm80", sm80_takes, sm80_weight_gradient},
    {"simt", [](const WeightGradient&) { return true; },
     [](const WeightGradient& g, cudaStream_t stream) {
       return with_type(g.context.dtype, [&](auto t) {
         return simt::launch_weight_gradient<decltype(t)>(g, stream);
       });
     }},
};

template <class Kernel, int N, class Problem>
const Kernel& choose(const Kernel (&kernels)[N], const Problem& problem) {
  const Kernel* kernel = kernels;
  while (!kernel->takes(problem)) ++kernel;
  return *kernel;
}

// ---- bias gradients -------------------------------------------------------------------

constexpr int kBiasColumns = 32, kBiasLanes = kThreads / kBiasColumns, kBiasBlock = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_gradient_kernel(BiasGradient g, int column_blocks) {
  using C = Compute<T>;
  __shared__ C parts[kBiasLanes][kBiasColumns];
  const int lane = threadIdx.x / kBiasColumns, mine = threadIdx.x % kBiasColumns;
  const int64_t expert = blockIdx.x / column_blocks;
  const int64_t column = static_cast<int64_t>(blockIdx.x % column_blocks) * kBiasColumns + mine;
  const int64_t begin = offset_of(g.context.expert_offsets, expert, g.context.rows);
  const int64_t end = begin + rows_of(g.context.expert_offsets, expert, g.context.rows);
  C total = C(0);
  for (int64_t first = begin; first < end; first += kBiasBlock) {
    C part = C(0);
    const int64_t last = first + kBiasBlock < end ? first + kBiasBlock : end;
    for (int64_t r = first + lane; r < last && column < g.columns; r += kBiasLanes) {
      const int64_t row = g.rows.index ? g.rows.index[r] : r;
      if (g.rows.index && !leads(row, g.rows.limit)) continue;
      const C value = to_compute(static_cast<const T*>(g.rows.data)[row * g.rows.stride + column]);
      part += weight_of<C>(g, assignment_of(g, r)) * value;
    }
    parts[lane][mine] = part;
    __syncthreads();
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kBiasLanes; ++i) total += parts[i][mine];
    }
    __syncthreads();  // the parts are read: the next ones may take their place
  }
  if (lane == 0 && column < g.columns) {
    round_to(static_cast<T*>(g.out)[expert * g.columns + column], total);
  }
}

// ---- the gradient of the routing weights ----------------------------------------------

constexpr int kScoreRows = 8;  // rows of a warp: their parts fill whole sectors

// The expert that row `row` belongs to: the last whose offset is not above it.
__device__ __forceinline__ int64_t expert_of(const GemmContext& context, int64_t row) {
  int64_t low = 0, high = context.experts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offset_of(context.expert_offsets, middle, context.rows) <= row ? low : high) = middle;
  }
  return low;
}

template <class T>
__global__ void __launch_bounds__(kThreads) score_gradient_kernel(ScoreGradient g) {
  using C = Compute<T>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t last = offset_of(g.context.expert_offsets, g.context.experts, g.context.rows);
  if (thread < g.assignments) {
    const int32_t row = g.assignment_row[thread];
    const bool has_row = leads(row, last) && g.row_assignment[row] == thread;
    if (!has_row) store_as<C>(g.out, g.out_dtype, thread, C(0));
  }

  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = thread / kWarpSize * kScoreRows;
  if (first >= last) return;
  const int64_t row = first + lane % kScoreRows;
  C score = C(0);
  if (row < last) {
    for (int64_t tile = lane / kScoreRows; tile < g.tiles; tile += kWarpSize / kScoreRows) {
      score += static_cast<const C*>(g.score_parts)[tile * g.context.rows + row];
    }
  }
#pragma unroll
  for (int d = kScoreRows; d < kWarpSize; d *= 2) score += __shfl_xor_sync(kFullWarp, score, d);

  if (g.bias) {
    for (int i = 0; i < kScoreRows && first + i < last; ++i) {
      const int64_t r = first + i, from = g.dy.index ? g.dy.index[r] : r;
      if (g.dy.index && !leads(from, g.dy.limit)) continue;  // a whole warp at a time
      const T* dy = static_cast<const T*>(g.dy.data) + from * g.dy.stride;
      const T* bias = static_cast<const T*>(g.bias) + expert_of(g.context, r) * g.columns;
      C product = C(0);
      for (int64_t column = lane; column < g.columns; column += kWarpSize) {
        product += to_compute(dy[column]) * to_compute(bias[column]);
      }
#pragma unroll
      for (int d = kWarpSize / 2; d > 0; d /= 2) {
        product += __shfl_xor_sync(kFullWarp, product, d);
      }
      if (lane == i) score += product;
    }
  }
  if (lane < kScoreRows && row < last) {
    const int32_t assignment = g.row_assignment[row];
    if (leads(assignment, g.assignments) && g.assignment_row[assignment] == row) {
      store_as<C>(g.out, g.out_dtype, assignment, score);
    }
  }
}

// ---- tails ----------------------------------------------------------------------------

template <class T, int N>
__global__ void __launch_bounds__(kThreads) zero_tail_kernel(ZeroTail tail) {
  const GemmContext& context = tail.context;
  const int64_t first =
      offset_of(context.expert_offsets, context.experts, context.rows) * tail.columns;
  const int64_t end = tail.context.rows * tail.columns;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
  const Compute<T> zero[N] = {};
  for (int64_t i = first + (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; i < end;
       i += step) {
    store_neighbours<T, N>(static_cast<T*>(tail.rows) + i, zero,
                           static_cast<int>(end - i < N ? end - i : N));
  }
}

// Neighbours that a thread moves at once.
template <class T>
constexpr int kPack = kMaxPackBytes / sizeof(T);

}  // namespace

// ---- launchers ------------------------------------------------------------------------

int64_t column_tiles(const RowsGemm& gemm) { return choose(kRowsGemms, gemm).column_tiles(gemm); }

cudaError_t rows_gemm(const RowsGemm& gemm, cudaStream_t stream) {
  return choose(kRowsGemms, gemm).launch(gemm, stream);
}

cudaError_t weight_gradient(const WeightGradient& gradient, cudaStream_t stream) {
  return choose(kWeightGradients, gradient).launch(gradient, stream);
}

cudaError_t bias_gradient(const BiasGradient& g, cudaStream_t stream) {
  return with_type(g.context.dtype, [&](auto t) {
    const int column_blocks = static_cast<int>((g.columns + kBiasColumns - 1) / kBiasColumns);
    const unsigned blocks = static_cast<unsigned>(g.context.experts * column_blocks);
    if (blocks == 0) return cudaSuccess;
    return launch({dim3(blocks), dim3(kThreads), 0, stream, "bias_gradient"},
                  bias_gradient_kernel<decltype(t)>, g, column_blocks);
  });
}

cudaError_t score_gradient(const ScoreGradient& g, cudaStream_t stream) {
  return with_type(g.context.dtype, [&](auto t) {
    const int64_t row_threads = (g.context.rows + kScoreRows - 1) / kScoreRows * kWarpSize;
    const int blocks = blocks_for(g.assignments > row_threads ? g.assignments : row_threads);
    if (blocks == 0) return cudaSuccess;
    return launch({dim3(blocks), dim3(kThreads), 0, stream, "score_gradient"},
                  score_gradient_kernel<decltype(t)>, g);
  });
}

cudaError_t zero_tail(const ZeroTail& tail, cudaStream_t stream) {
  return with_type(tail.context.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t elements = tail.context.rows * tail.columns;
    const int blocks = blocks_for((elements + kPack<T> - 1) / kPack<T>, 2 * tail.context.sm_count);
    if (blocks == 0) return cudaSuccess;
    return launch({dim3(blocks), dim3(kThreads), 0, stream, "zero_tail"},
                  zero_tail_kernel<T, kPack<T>>, tail);
  });
}

}  // namespace moe_ext::cuda

// router_logits and its backward: out (M, N) = a (M, K) b (N, K)^T (+ bias), with operands
// of any floating dtype, read as they are, and float32 (or float64) accumulation.
//
// A block of 256 threads owns 64 x 64 of out, 4 x 4 a thread. It goes through K in steps of
// 16: while the threads multiply one step out of shared memory, the next one is on its way
// from memory into registers, where it is widened. An operand may be contiguous along K or
// along its rows, a template parameter: it decides which thread loads what.
//
// The order of a sum: ascending k within a slab of 256, then slab after slab, one fused
// multiply-add after the other; no more than 256 terms meet in one accumulator. Where
// there are too few blocks to fill a GPU, K is cut: for the logits into single slabs,
// which a second launch adds in the same order, so that a token's logits have the same
// bits whatever shares its batch; for dW, where K is the number of tokens, into runs of
// slabs that depend on T, E and H alone. No atomics: the same bits every time.
//
// Shared memory: 17 KB (float64: 34 KB), static. Any alignment and strides; 16-byte loads
// where rows have it. FLOPs: 2 M N K, on the ordinary units, because a float32 router
// decides and must not lose digits; two 16-byte reads of shared memory feed a thread 16
// fused multiply-adds. Bytes: a once per 64 columns, b once per 64 rows, out once (and, cut,
// the parts written and read); the floor is each once, which E <= 64 reaches for x, by far
// the largest.
#include <algorithm>

#include "dtypes.cuh"
#include "platform.cuh"
#include "router_logits.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // rows and columns of a block
constexpr int kStep = 16;  // of K
constexpr int kSlab = 256;
constexpr int kOwn = 4;                // rows and columns of a thread
constexpr int kAcross = kTile / kOwn;  // threads side by side
constexpr int kPitch = kTile + 4;      // keeps 16-byte alignment, spreads the banks
static_assert(kAcross * kAcross == kThreads && kTile * kStep == 4 * kThreads && kSlab % kStep == 0);

// ---- one step's operand, from memory to shared memory -----------------------------------

template <class T, class A>
__device__ __forceinline__ void load_four_of(A (&four)[4], const void* data, int64_t index,
                                             int count) {
  Compute<T> value[4];
  load_neighbours<T, 4>(value, static_cast<const T*>(data) + index, count);
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = static_cast<A>(value[i]);
}

// Four neighbours from `index` on, of which `count` exist; zeros for the others.
template <class A>
__device__ __forceinline__ void load_four(A (&four)[4], const Operand& from, int64_t index,
                                          int count) {
  switch (from.dtype) {
    case Dtype::f64:
      return load_four_of<double>(four, from.data, index, count);
    case Dtype::f32:
      return load_four_of<float>(four, from.data, index, count);
    case Dtype::bf16:
      return load_four_of<bf16>(four, from.data, index, count);
    default:
      return load_four_of<f16>(four, from.data, index, count);
  }
}

// A thread's four elements of a tile of 64 rows x 16 of K: neighbours along K or along rows.
template <class A, bool kAlongDepth>
struct Share {
  int row, depth;  // of the first
  A four[4];

  __device__ __forceinline__ explicit Share(int thread)
      : row(kAlongDepth ? thread / 4 : thread % 16 * 4),
        depth(kAlongDepth ? thread % 4 * 4 : thread / 16) {}

  __device__ __forceinline__ void load(const Operand& from, int64_t first_row, int64_t rows,
                                       int64_t first_k, int64_t end_k) {
    const int64_t r = first_row + row, k = first_k + depth;
    const int64_t left = kAlongDepth ? (r < rows ? end_k - k : 0) : (k < end_k ? rows - r : 0);
    const int count = static_cast<int>(left < 4 ? left : 4);
    load_four(four, from, r * from.row_stride + k * from.depth_stride, count);
  }

  __device__ __forceinline__ void store(A (&tile)[kStep][kPitch]) const {
    if constexpr (kAlongDepth) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[depth + i][row] = four[i];
    } else {
      *reinterpret_cast<Pack<A, 4>*>(&tile[depth][row]) = {four[0], four[1], four[2], four[3]};
    }
  }
};

// ---- the product --------------------------------------------------------------------------

template <class A, bool kAAlongDepth, bool kBAlongDepth>
__global__ void __launch_bounds__(kThreads) router_product_kernel(const RouterProduct p) {
  __shared__ __align__(32) A a_tile[2][kStep][kPitch];
  __shared__ __align__(32) A b_tile[2][kStep][kPitch];
  const int thread = threadIdx.x;
  const int own_row = thread / kAcross * kOwn, own_column = thread % kAcross * kOwn;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t split = blockIdx.z, begin = split * p.k_per_split;
  const int64_t end = begin + p.k_per_split < p.k ? begin + p.k_per_split : p.k;

  Share<A, kAAlongDepth> a(thread);
  Share<A, kBAlongDepth> b(thread);
  A total[kOwn][kOwn] = {}, sum[kOwn][kOwn] = {};  // sum: of one slab
  const auto load = [&](int64_t k) {
    a.load(p.a, first_row, p.m, k, end);
    b.load(p.b, first_column, p.n, k, end);
  };
  const auto store = [&](int stage) {
    a.store(a_tile[stage]);
    b.store(b_tile[stage]);
  };
  if (begin < end) {
    load(begin);
    store(0);
  }
  __syncthreads();
  int stage = 0;
  for (int64_t k = begin; k < end; k += kStep, stage ^= 1) {
    const bool more = k + kStep < end;
    if (more) load(k + kStep);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const auto left = *reinterpret_cast<const Pack<A, kOwn>*>(&a_tile[stage][i][own_row]);
      const auto right = *reinterpret_cast<const Pack<A, kOwn>*>(&b_tile[stage][i][own_column]);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < kOwn; ++c) sum[r][c] += left.element[r] * right.element[c];
      }
    }
    if (!more || (k + kStep - begin) % kSlab == 0) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          total[r][c] += sum[r][c];
          sum[r][c] = 0;
        }
      }
    }
    if (more) store(stage ^ 1);  // all are past the step that read it
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int64_t row = first_row + own_row + r;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int64_t column = first_column + own_column + c;
      if (row >= p.m || column >= p.n) continue;
      const int64_t index = row * p.n + column;
      if (p.splits > 1) {
        static_cast<A*>(p.parts)[split * p.m * p.n + index] = total[r][c];
      } else {
        const A bias = p.bias ? load_as<A>(p.bias, p.bias_dtype, column) : A(0);
        store_as(p.out, p.out_dtype, index, total[r][c] + bias);
      }
    }
  }
}

// out = the parts, added in order, and the bias: a thread an element.
template <class A>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const RouterProduct p) {
  const int64_t size = p.m * p.n;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= size) return;
  A total = 0;
#pragma unroll 4
  for (int64_t split = 0; split < p.splits; ++split)
    total += static_cast<const A*>(p.parts)[split * size + index];
  const A bias = p.bias ? load_as<A>(p.bias, p.bias_dtype, index % p.n) : A(0);
  store_as(p.out, p.out_dtype, index, total + bias);
}

template <class A>
cudaError_t launch_product(const RouterProduct& p, cudaStream_t stream) {
  const bool a_along = p.a.depth_stride == 1, b_along = p.b.depth_stride == 1;
  const auto kernel = a_along && b_along ? router_product_kernel<A, true, true>
                      : a_along          ? router_product_kernel<A, true, false>
                                         : router_product_kernel<A, false, false>;
  const dim3 grid(static_cast<unsigned>((p.m + kTile - 1) / kTile),
                  static_cast<unsigned>((p.n + kTile - 1) / kTile),
                  static_cast<unsigned>(p.splits));
  const cudaError_t error = launch({grid, dim3(kThreads), 0, stream, "router_product"}, kernel, p);
  if (error != cudaSuccess || p.splits == 1) return error;
  const dim3 blocks(static_cast<unsigned>((p.m * p.n + kThreads - 1) / kThreads));
  return launch({blocks, dim3(kThreads), 0, stream, "add_parts"}, add_parts_kernel<A>, p);
}

// ---- sums of columns ------------------------------------------------------------------------

constexpr int kColumns = 32, kRowLanes = kThreads / kColumns;

// As many rows as keep the grid below 1024 blocks high.
int64_t rows_per_sum(int64_t m) { return 256 * std::max<int64_t>(1, (m + 262143) / 262144); }

// Block (x, y): 32 columns of a run of rows, 8 threads a column.
template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const From* a, int64_t m, int64_t n, int64_t rows_per_block, To* out) {
  __shared__ double sums[kRowLanes][kColumns];
  const int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  const int64_t begin = blockIdx.y * rows_per_block;
  const int64_t end = begin + rows_per_block < m ? begin + rows_per_block : m;
  double sum = 0;
  if (c < n) {
#pragma unroll 4
    for (int64_t row = begin + lane; row < end; row += kRowLanes) sum += a[row * n + c];
  }
  sums[lane][column] = sum;
  __syncthreads();
  if (lane > 0 || c >= n) return;
  for (int other = 1; other < kRowLanes; ++other) sum += sums[other][column];
  out[blockIdx.y * n + c] = static_cast<To>(sum);
}

template <class A>
cudaError_t launch_sums(const ColumnSums& p, cudaStream_t stream) {
  const auto columns = static_cast<unsigned>((p.n + kColumns - 1) / kColumns);
  const auto blocks = static_cast<unsigned>(column_sum_blocks(p.m));
  const cudaError_t error =
      launch({dim3(columns, blocks), dim3(kThreads), 0, stream, "column_sums"},
             column_sums_kernel<A, double>, static_cast<const A*>(p.a), p.m, p.n, rows_per_sum(p.m),
             p.parts);
  if (error != cudaSuccess) return error;
  return launch({dim3(columns), dim3(kThreads), 0, stream, "column_sums_total"},
                column_sums_kernel<double, A>, static_cast<const double*>(p.parts),
                static_cast<int64_t>(blocks), p.n, static_cast<int64_t>(blocks),
                static_cast<A*>(p.out));
}

}  // namespace

void plan_splits(RouterProduct& p, Splits splits) {
  constexpr int64_t kBlocks = 256;  // as many as keep a large GPU busy
  const int64_t tiles = ((p.m + kTile - 1) / kTile) * ((p.n + kTile - 1) / kTile);
  const int64_t slabs = (p.k + kSlab - 1) / kSlab;
  int64_t slabs_per_split = std::max<int64_t>(slabs, 1);
  if (slabs > 1 && tiles < kBlocks / 4) slabs_per_split = 1;
  if (splits == Splits::kFree)
    slabs_per_split =
        std::max<int64_t>(1, slabs / std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, tiles)));
  p.k_per_split = slabs_per_split * kSlab;
  p.splits = std::max<int64_t>(1, (p.k + p.k_per_split - 1) / p.k_per_split);
}

cudaError_t router_product(const RouterProduct& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  return p.is_double ? launch_product<double>(p, stream) : launch_product<float>(p, stream);
}

int64_t column_sum_blocks(int64_t m) {
  return std::max<int64_t>(1, (m + rows_per_sum(m) - 1) / rows_per_sum(m));
}

cudaError_t column_sums(const ColumnSums& p, cudaStream_t stream) {
  if (p.n == 0) return cudaSuccess;
  return p.is_double ? launch_sums<double>(p, stream) : launch_sums<float>(p, stream);
}

}  // namespace moe_ext::cuda

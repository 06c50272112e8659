// router_logits and its backward: out (M, N) = a (M, K) b (N, K)^T (+ bias), with operands
// of any floating dtype, read as they are, and float32 (or float64) accumulation. Those that tensor
// cores can take without losing digits go to router_product_sm80.cu; what follows is for the
// others.
//
// A block of 256 threads owns 64 x 64 of out, 4 x 4 a thread. It goes through K in steps of
// 16: while the threads multiply one step out of shared memory, the next one is on its way
// from memory into registers, and is widened only on the way into shared memory, so that no
// load is waited for before. An operand may be contiguous along K or along its rows, a template
// parameter: it decides which thread loads what.
//
// The order of a sum: ascending k within a slab of 256, then slab after slab, one fused
// multiply-add after the other; no more than 256 terms meet in one accumulator. Where
// there are too few blocks to fill a GPU, K is cut: for the logits into single slabs,
// which a second launch adds in the same order, so that a token's logits have the same
// bits whatever shares its batch; for dW, where K is the number of tokens, into runs of
// slabs that depend on T, E and H alone. No atomics: the same bits every time.
//
// Shared memory: 17 KB (float64: 34 KB), static. Any alignment and strides; 16-byte loads
// where all rows have it. FLOPs: 2 M N K, on the ordinary units, because a float32 router
// decides and must not lose digits; two 16-byte reads of shared memory feed a thread 16
// fused multiply-adds. Bytes: a once per 64 columns, b once per 64 rows, out once (and, cut,
// the parts written and read); the floor is each once, which E <= 64 reaches for x, by far
// the largest.
#include <algorithm>
#include <type_traits>

#include "dtypes.cuh"
#include "platform.cuh"
#include "router_logits.h"
#include "router_product_sm80.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;              // rows and columns of a block
constexpr int kStep = 16;              // of K
constexpr int kOwn = 4;                // rows and columns of a thread
constexpr int kAcross = kTile / kOwn;  // threads side by side
constexpr int kPitch = kTile + 4;      // keeps 16-byte alignment, spreads the banks
static_assert(kAcross * kAcross == kThreads && kTile * kStep == 4 * kThreads &&
              kRouterSlab % kStep == 0);

// ---- one step's operand, from memory to shared memory -----------------------------------

// An operand whose type is known at run time only: float64's, which is for checking.
struct Any {};

// A thread's four elements of every step's 64 rows x 16 of K: neighbours along K or along rows.
// They travel as they are, and become the accumulation's A when they are stored.
template <class A, class T, bool kAlongDepth>
class Share {
 public:
  // first_row, begin, length: the rows' first, and the part of K.
  __device__ __forceinline__ Share(const Operand& from, int64_t first_row, int64_t rows,
                                   int64_t begin, int length)
      : row_(kAlongDepth ? threadIdx.x / 4 : threadIdx.x % 16 * 4),
        depth_(kAlongDepth ? threadIdx.x % 4 * 4 : threadIdx.x / 16),
        rows_left_(static_cast<int>(min(rows - first_row, int64_t{kTile})) - row_),
        depth_left_(length - depth_),
        dtype_(from.dtype) {
    const int64_t size = std::is_same_v<T, Any> ? size_of(from.dtype) : sizeof(Held);
    const int64_t row = first_row + row_, depth = begin + depth_;
    step_ = size * (kAlongDepth ? kStep : kStep * from.stride);
    from_ = static_cast<const char*>(from.data) +
            size * (kAlongDepth ? row * from.stride + depth : row + depth * from.stride);
  }

  // The next step's.
  template <class Whole>
  __device__ __forceinline__ void load(Whole whole) {
    const int count =
        rows_left_ <= 0 || depth_left_ <= 0 ? 0 : min(kAlongDepth ? depth_left_ : rows_left_, 4);
    if constexpr (std::is_same_v<T, Any>) {
      A value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = i < count ? load_as<A>(from_, dtype_, i) : A(0);
      four_.set(value);
    } else {
      four_.load(whole, reinterpret_cast<const T*>(from_), count);
    }
    from_ += step_;
    depth_left_ -= kStep;
  }

  __device__ __forceinline__ void store(A (&tile)[kStep][kPitch]) const {
    Compute<Held> value[4];
    four_.values(value);
    if constexpr (kAlongDepth) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[depth_ + i][row_] = value[i];
    } else {
      *reinterpret_cast<Pack<A, 4>*>(&tile[depth_][row_]) = {value[0], value[1], value[2],
                                                             value[3]};
    }
  }

 private:
  using Held = std::conditional_t<std::is_same_v<T, Any>, A, T>;
  int row_, depth_;             // of the first, in a step
  int rows_left_, depth_left_;  // from it on
  Dtype dtype_;
  const char* from_;
  int64_t step_;  // bytes
  Neighbours<Held, 4> four_;
};

// ---- the product --------------------------------------------------------------------------

// A: what is accumulated in.
template <class A, class TypeA, bool kAAlongDepth, class TypeB, bool kBAlongDepth>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 8 ? 1 : 2)
    router_product_kernel(const RouterProduct p, const bool packs) {
  __shared__ __align__(32) A a_tile[2][kStep][kPitch];
  __shared__ __align__(32) A b_tile[2][kStep][kPitch];
  const int thread = threadIdx.x;
  const int own_row = thread / kAcross * kOwn, own_column = thread % kAcross * kOwn;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t split = blockIdx.z, begin = split * p.k_per_split;
  const int length = static_cast<int>(min(p.k_per_split, max(p.k - begin, int64_t{0})));

  Share<A, TypeA, kAAlongDepth> a(p.a, first_row, p.m, begin, length);
  Share<A, TypeB, kBAlongDepth> b(p.b, first_column, p.n, begin, length);
  A total[kOwn][kOwn] = {}, sum[kOwn][kOwn] = {};  // sum: of one slab
  const auto load = [&] {
    with_packs(packs, [&](auto whole) {
      a.load(whole);
      b.load(whole);
    });
  };
  const auto store = [&](int stage) {
    a.store(a_tile[stage]);
    b.store(b_tile[stage]);
  };
  if (length > 0) {
    load();
    store(0);
  }
  __syncthreads();
  int stage = 0;
  for (int k = 0; k < length; k += kStep, stage ^= 1) {
    const bool more = k + kStep < length;
    if (more) load();  // they arrive while this step is multiplied
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
    if (!more || (k + kStep) % kRouterSlab == 0) {
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

  const int64_t row = first_row + own_row, column = first_column + own_column;
  const auto put = [&](auto* out, auto round) {
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        if (row + r < p.m && column + c < p.n)
          round(out[(row + r) * p.n + column + c], total[r][c]);
      }
    }
  };
  if (p.splits > 1) {
    put(static_cast<A*>(p.parts) + split * p.m * p.n, [](A& to, A value) { to = value; });
    return;
  }
  if (p.bias) {
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      if (column + c >= p.n) break;
      const A bias = load_as<A>(p.bias, p.bias_dtype, column + c);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) total[r][c] += bias;
    }
  }
  const auto round = [](auto& to, A value) {
    round_to(to, static_cast<Compute<std::remove_reference_t<decltype(to)>>>(value));
  };
  switch (p.out_dtype) {
    case Dtype::f64:
      return put(static_cast<double*>(p.out), round);
    case Dtype::f32:
      return put(static_cast<float*>(p.out), round);
    case Dtype::bf16:
      return put(static_cast<bf16*>(p.out), round);
    default:
      return put(static_cast<f16*>(p.out), round);
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

template <class A, class TypeA, bool kAAlongDepth, class TypeB, bool kBAlongDepth>
cudaError_t launch_layout(const RouterProduct& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.m + kTile - 1) / kTile),
                  static_cast<unsigned>((p.n + kTile - 1) / kTile),
                  static_cast<unsigned>(p.splits));
  bool packs = false;
  if constexpr (!std::is_same_v<TypeA, Any>) {
    packs = in_packs<TypeA, 4>(p.a.data, p.a.stride, kAAlongDepth ? p.k : p.m) &&
            in_packs<TypeB, 4>(p.b.data, p.b.stride, kBAlongDepth ? p.k : p.n);
  }
  return launch({grid, dim3(kThreads), 0, stream, "router_product"},
                router_product_kernel<A, TypeA, kAAlongDepth, TypeB, kBAlongDepth>, p, packs);
}

// The three products' layouts. Of the two that have the logits' gradient for a, that is of the
// accumulation's type.
template <class A, class TypeA, class TypeB>
cudaError_t launch_product(const RouterProduct& p, cudaStream_t stream) {
  if (p.b.along_depth) return launch_layout<A, TypeA, true, TypeB, true>(p, stream);
  using Gradient = std::conditional_t<std::is_same_v<TypeA, Any>, Any, A>;
  return p.a.along_depth ? launch_layout<A, Gradient, true, TypeB, false>(p, stream)
                         : launch_layout<A, Gradient, false, TypeB, false>(p, stream);
}

cudaError_t launch_product(const RouterProduct& p, cudaStream_t stream) {
  if (p.tensor_cores) return sm80::router_product(p, stream);
  if (p.is_double) return launch_product<double, Any, Any>(p, stream);
  return with_type(p.a.dtype, [&](auto a) {
    return with_type(p.b.dtype, [&](auto b) {
      if constexpr (sizeof(a) == 8 || sizeof(b) == 8) {
        return cudaErrorInvalidValue;  // is_double says so
      } else {
        return launch_product<float, decltype(a), decltype(b)>(p, stream);
      }
    });
  });
}

unsigned blocks_of(int64_t size) { return static_cast<unsigned>((size + kThreads - 1) / kThreads); }

// ---- the gradient for tensor cores --------------------------------------------------------

// A thread an element of a half.
__global__ void __launch_bounds__(kThreads) halve_gradient_kernel(const GradientHalves p) {
  const int64_t size = p.rows * p.columns;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= size) return;
  const int64_t row = index / p.columns, expert = index % p.columns;
  const float g = expert < p.experts ? p.g[row * p.experts + expert] : 0.0f;
  auto* halves = static_cast<bf16*>(p.halves);
  bf16 rounded;
  round_to(rounded, g);
  const float rest = g - to_compute(rounded);
  halves[index] = rounded;
  // Of an infinity nothing is left; the difference would be NaN.
  round_to(halves[size + index], rest - rest == 0 ? rest : 0.0f);
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
  const auto [rows, columns] =
      p.tensor_cores ? sm80::router_tile(p) : sm80::RouterTile{kTile, kTile};
  const int64_t tiles = ((p.m + rows - 1) / rows) * ((p.n + columns - 1) / columns);
  const int64_t slabs = (p.k + kRouterSlab - 1) / kRouterSlab;
  int64_t slabs_per_split = std::max<int64_t>(slabs, 1);
  // With a rest of a, the order of the sum would not be the same.
  if (slabs > 1 && tiles < kBlocks / 4 && !p.a_rest) slabs_per_split = 1;
  if (splits == Splits::kFree)
    slabs_per_split =
        std::max<int64_t>(1, slabs / std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, tiles)));
  p.k_per_split = slabs_per_split * kRouterSlab;
  p.splits = std::max<int64_t>(1, (p.k + p.k_per_split - 1) / p.k_per_split);
}

cudaError_t router_product(const RouterProduct& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  const cudaError_t error = launch_product(p, stream);
  if (error != cudaSuccess || p.splits == 1) return error;
  const LaunchConfig config{dim3(blocks_of(p.m * p.n)), dim3(kThreads), 0, stream, "add_parts"};
  return p.is_double ? launch(config, add_parts_kernel<double>, p)
                     : launch(config, add_parts_kernel<float>, p);
}

cudaError_t halve_gradient(const GradientHalves& p, cudaStream_t stream) {
  const int64_t size = p.rows * p.columns;
  if (size == 0) return cudaSuccess;
  return launch({dim3(blocks_of(size)), dim3(kThreads), 0, stream, "halve_gradient"},
                halve_gradient_kernel, p);
}

int64_t column_sum_blocks(int64_t m) {
  return std::max<int64_t>(1, (m + rows_per_sum(m) - 1) / rows_per_sum(m));
}

cudaError_t column_sums(const ColumnSums& p, cudaStream_t stream) {
  if (p.n == 0) return cudaSuccess;
  return p.is_double ? launch_sums<double>(p, stream) : launch_sums<float>(p, stream);
}

}  // namespace moe_ext::cuda

// router_logits: logits = x W^T + b, and its backward dx = G W, dW = G^T x, db = sum G.
//
// x and W are read in their own dtypes; blocks of them are widened in cache, and no
// wide copy of either exists as a whole. A sum has one order, which depends on no
// other token, on no tile and on no thread:
//   forward   over H in slabs of 1024: sixteen lanes add h = i, i + 16, ..., the lanes
//             are added as a tree, then slab after slab, so no lane adds more than 64;
//   backward  over E (dx) or T (dW) in slabs of 256, in ascending order.

#include "checks/router_logits.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/simd.h"

namespace moe_ext {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kSlab = 1024;  // elements of H that the forward sums together
constexpr int64_t kDepth = 256;  // terms that the backward sums together
constexpr int64_t kRows = 64;    // rows of a block of either product
constexpr int64_t kExperts = 64;
constexpr int64_t kColumns = 2 * kLanes;

// Sixteen numbers: one AVX-512 register of float32, several registers elsewhere.
template <typename A>
struct LanesOf {
  typedef A type __attribute__((vector_size(kLanes * sizeof(A))));
};
template <typename A>
using Lanes = typename LanesOf<A>::type;

template <typename A>
MOE_EXT_INLINE void load(Lanes<A>& v, const A* p) {
  std::memcpy(&v, p, sizeof(v));
}

// The sum of N lanes, as a tree of halves.
template <typename A, int N>
MOE_EXT_INLINE A sum_of(const A* lanes) {
  if constexpr (N == 2) {
    return lanes[0] + lanes[1];
  } else {
    typedef A Half __attribute__((vector_size(N / 2 * sizeof(A))));
    Half low, high;
    std::memcpy(&low, lanes, sizeof(low));
    std::memcpy(&high, lanes + N / 2, sizeof(high));
    low += high;
    A part[N / 2];
    std::memcpy(part, &low, sizeof(low));
    return sum_of<A, N / 2>(part);
  }
}

// rows x columns elements into `to`, which has `to_stride` elements a row; what is
// left of a row becomes zero.
template <typename T, typename A>
struct Widen {
  static MOE_EXT_INLINE void run(const T* from, int64_t from_stride, A* to, int64_t to_stride,
                                 int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<A>(widen(from[c]));
      for (int64_t c = columns; c < to_stride; ++c) to[c] = 0;
    }
  }
};

// A matrix of any floating dtype with contiguous rows.
struct Matrix {
  explicit Matrix(const at::Tensor& t)
      : tensor(t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous()),
        dtype(t.scalar_type()),
        stride(tensor.stride(0)) {}

  template <typename A>
  void widen_into(A* to, int64_t to_stride, int64_t row, int64_t rows, int64_t column,
                  int64_t columns) const {
    const auto call = [&](const auto* data) {
      using T = std::decay_t<decltype(*data)>;
      simd_call<Widen<T, A>>(data + row * stride + column, stride, to, to_stride, rows, columns);
    };
    switch (dtype) {
      case at::kDouble:
        return call(tensor.const_data_ptr<double>());
      case at::kBFloat16:
        return call(tensor.const_data_ptr<c10::BFloat16>());
      case at::kHalf:
        return call(tensor.const_data_ptr<c10::Half>());
      default:
        return call(tensor.const_data_ptr<float>());
    }
  }

  at::Tensor tensor;
  at::ScalarType dtype;
  int64_t stride;
};

// The tile of sums that stays in registers, by what the machine has of them.
template <template <int, int, typename> class Kernel, typename A, typename... Args>
void tiled_call(Args... args) {
  if (cpu::instruction_set() >= cpu::Isa::avx512 && std::is_same_v<A, float>) {
    simd_call<Kernel<4, 4, A>>(args...);
  } else {
    simd_call<Kernel<2, 2, A>>(args...);
  }
}

// out (rows, columns) += a (rows, depth) b^T (columns, depth), in tiles of R x C; the
// depth is a multiple of the lanes.
template <int R, int C, typename A>
struct DotBlock {
  template <int r_count, int c_count>
  static MOE_EXT_INLINE void tile(const A* a, int64_t a_stride, const A* b, int64_t b_stride,
                                  int64_t depth, A* out, int64_t out_stride) {
    Lanes<A> sum[r_count][c_count];
    for (int r = 0; r < r_count; ++r)
      for (int c = 0; c < c_count; ++c) sum[r][c] = Lanes<A>{};
    for (int64_t k = 0; k < depth; k += kLanes) {
      Lanes<A> right[c_count];
      for (int c = 0; c < c_count; ++c) load<A>(right[c], b + c * b_stride + k);
      for (int r = 0; r < r_count; ++r) {
        Lanes<A> left;
        load<A>(left, a + r * a_stride + k);
        for (int c = 0; c < c_count; ++c) sum[r][c] += left * right[c];
      }
    }
    for (int r = 0; r < r_count; ++r)
      for (int c = 0; c < c_count; ++c)
        out[r * out_stride + c] += sum_of<A, kLanes>(reinterpret_cast<const A*>(&sum[r][c]));
  }

  static MOE_EXT_INLINE void run(const A* a, int64_t a_stride, int64_t rows, const A* b,
                                 int64_t b_stride, int64_t columns, int64_t depth, A* out,
                                 int64_t out_stride) {
    int64_t r = 0;
    for (; r + R <= rows; r += R, a += R * a_stride, out += R * out_stride) {
      int64_t c = 0;
      for (; c + C <= columns; c += C)
        tile<R, C>(a, a_stride, b + c * b_stride, b_stride, depth, out + c, out_stride);
      for (; c < columns; ++c)
        tile<R, 1>(a, a_stride, b + c * b_stride, b_stride, depth, out + c, out_stride);
    }
    for (; r < rows; ++r, a += a_stride, out += out_stride) {
      int64_t c = 0;
      for (; c + C <= columns; c += C)
        tile<1, C>(a, a_stride, b + c * b_stride, b_stride, depth, out + c, out_stride);
      for (; c < columns; ++c)
        tile<1, 1>(a, a_stride, b + c * b_stride, b_stride, depth, out + c, out_stride);
    }
  }
};

// out (rows, 32) += a (rows, depth) b (depth, 32), in tiles of 2R rows; a(r, k) lies at
// a[r * a_row + k * a_depth].
template <int R, int, typename A>
struct ProductBlock {
  template <int r_count>
  static MOE_EXT_INLINE void tile(const A* a, int64_t a_row, int64_t a_depth, const A* b,
                                  int64_t depth, A* out) {
    Lanes<A> sum[r_count][2];
    for (int r = 0; r < r_count; ++r) sum[r][0] = sum[r][1] = Lanes<A>{};
    for (int64_t k = 0; k < depth; ++k) {
      Lanes<A> low, high;
      load<A>(low, b + k * kColumns);
      load<A>(high, b + k * kColumns + kLanes);
      for (int r = 0; r < r_count; ++r) {
        const A left = a[r * a_row + k * a_depth];
        sum[r][0] += left * low;
        sum[r][1] += left * high;
      }
    }
    for (int r = 0; r < r_count; ++r) {
      const A* part = reinterpret_cast<const A*>(sum[r]);
      for (int64_t c = 0; c < kColumns; ++c) out[r * kColumns + c] += part[c];
    }
  }

  static MOE_EXT_INLINE void run(const A* a, int64_t a_row, int64_t a_depth, int64_t rows,
                                 const A* b, int64_t depth, A* out) {
    int64_t r = 0;
    for (; r + 2 * R <= rows; r += 2 * R)
      tile<2 * R>(a + r * a_row, a_row, a_depth, b, depth, out + r * kColumns);
    for (; r < rows; ++r) tile<1>(a + r * a_row, a_row, a_depth, b, depth, out + r * kColumns);
  }
};

template <typename T, typename A>
struct Narrow {
  static MOE_EXT_INLINE void run(const A* from, T* to, int64_t to_stride, int64_t rows,
                                 int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c)
        to[r * to_stride + c] = narrow<T>(from[r * kColumns + c]);
    }
  }
};

// Work for at least this many multiplications goes to one thread.
int64_t grain_of(int64_t multiplications) {
  return 1 + (int64_t{1} << 18) / std::max<int64_t>(1, multiplications);
}

template <typename A>
void logits_block(const Matrix& x, const Matrix& weight, const A* bias, A* logits, int64_t token,
                  int64_t tokens, int64_t expert, int64_t experts) {
  const int64_t H = x.tensor.size(1), E = weight.tensor.size(0);
  A* out = logits + token * E + expert;
  for (int64_t t = 0; t < tokens; ++t) std::fill_n(out + t * E, experts, A(0));

  const int64_t widest = (std::min(H, kSlab) + kLanes - 1) / kLanes * kLanes;
  constexpr int64_t kTile = 4;  // experts whose widened rows stay in L1
  std::unique_ptr<A[]> x_buffer, weight_buffer(new A[kTile * widest]);
  constexpr auto own_dtype = c10::CppTypeToScalarType<A>::value;
  const bool x_as_is = x.dtype == own_dtype && H % kLanes == 0;
  const bool weight_as_is = weight.dtype == own_dtype && H % kLanes == 0;
  if (!x_as_is) x_buffer.reset(new A[tokens * widest]);
  for (int64_t begin = 0; begin < H; begin += kSlab) {
    const int64_t size = std::min(kSlab, H - begin);
    const int64_t depth = (size + kLanes - 1) / kLanes * kLanes;
    const A* left = x_buffer.get();
    if (x_as_is) {
      left = x.tensor.const_data_ptr<A>() + token * x.stride + begin;
    } else {
      x.widen_into(x_buffer.get(), depth, token, tokens, begin, size);
    }
    for (int64_t e = 0; e < experts; e += kTile) {
      const int64_t n = std::min(kTile, experts - e);
      const A* right = weight_buffer.get();
      if (weight_as_is) {
        right = weight.tensor.const_data_ptr<A>() + (expert + e) * weight.stride + begin;
      } else {
        weight.widen_into(weight_buffer.get(), depth, expert + e, n, begin, size);
      }
      tiled_call<DotBlock, A>(left, x_as_is ? x.stride : depth, tokens, right,
                              weight_as_is ? weight.stride : depth, n, depth, out + e, E);
    }
  }
  if (!bias) return;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t e = 0; e < experts; ++e) out[t * E + e] += bias[expert + e];
}

template <typename A>
void logits_of(const Matrix& x, const Matrix& weight, const A* bias, A* logits) {
  const int64_t T = x.tensor.size(0), H = x.tensor.size(1), E = weight.tensor.size(0);
  const int64_t token_blocks = (T + kRows - 1) / kRows;
  const int64_t expert_blocks = (E + kExperts - 1) / kExperts;
  const int64_t work = std::min(T, kRows) * std::min(E, kExperts) * H;
  at::parallel_for(0, token_blocks * expert_blocks, grain_of(work), [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t token = i / expert_blocks * kRows, expert = i % expert_blocks * kExperts;
      logits_block(x, weight, bias, logits, token, std::min(kRows, T - token), expert,
                   std::min(kExperts, E - expert));
    }
  });
}

// out (M, N) = a (M, K) b (K, N), with a(m, k) at a[m * a_row + k * a_depth].
template <typename A>
void product(const A* a, int64_t a_row, int64_t a_depth, const Matrix& b, at::Tensor& out) {
  const int64_t M = out.size(0), N = out.size(1), K = b.tensor.size(0);
  const int64_t row_blocks = (M + kRows - 1) / kRows;
  const int64_t column_blocks = (N + kColumns - 1) / kColumns;
  const int64_t work = std::min(M, kRows) * kColumns * K;
  at::parallel_for(0, row_blocks * column_blocks, grain_of(work), [&](int64_t i, int64_t end) {
    std::vector<A> sum(kRows * kColumns), slab(std::min(K, kDepth) * kColumns);
    for (; i < end; ++i) {
      const int64_t row = i / column_blocks * kRows, column = i % column_blocks * kColumns;
      const int64_t rows = std::min(kRows, M - row), columns = std::min(kColumns, N - column);
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t k = 0; k < K; k += kDepth) {
        const int64_t depth = std::min(kDepth, K - k);
        b.widen_into(slab.data(), kColumns, k, depth, column, columns);
        tiled_call<ProductBlock, A>(a + row * a_row + k * a_depth, a_row, a_depth, rows,
                                    const_cast<const A*>(slab.data()), depth, sum.data());
      }
      const auto write = [&](auto* data) {
        using T = std::decay_t<decltype(*data)>;
        simd_call<Narrow<T, A>>(const_cast<const A*>(sum.data()), data + row * N + column, N, rows,
                                columns);
      };
      switch (out.scalar_type()) {
        case at::kDouble:
          write(out.mutable_data_ptr<double>());
          break;
        case at::kBFloat16:
          write(out.mutable_data_ptr<c10::BFloat16>());
          break;
        case at::kHalf:
          write(out.mutable_data_ptr<c10::Half>());
          break;
        default:
          write(out.mutable_data_ptr<float>());
      }
    }
  });
}

// out (E) = the sum of a (T, E) over T, added up in float64.
template <typename A>
void sum_rows(const A* a, int64_t T, int64_t E, A* out) {
  std::vector<double> sum(E, 0.0);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t e = 0; e < E; ++e) sum[e] += a[t * E + e];
  for (int64_t e = 0; e < E; ++e) out[e] = static_cast<A>(sum[e]);
}

// Calls f(A{}) with the accumulation's type.
template <typename F>
void dispatch(at::ScalarType accumulation, const F& f) {
  accumulation == at::kDouble ? f(double{}) : f(float{});
}

at::Tensor router_logits(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  const auto accumulation = check_router_logits(x, weight, bias);
  const int64_t T = x.size(0), E = weight.size(0);
  const at::Tensor b = bias ? bias->to(accumulation).contiguous() : at::Tensor();
  at::Tensor logits = at::empty({T, E}, x.options().dtype(accumulation));
  dispatch(accumulation, [&](auto a) {
    using A = decltype(a);
    logits_of<A>(Matrix(x), Matrix(weight), bias ? b.const_data_ptr<A>() : nullptr,
                 logits.mutable_data_ptr<A>());
  });
  return logits;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward(
    const at::Tensor& grad_logits, const at::Tensor& x, const at::Tensor& weight,
    std::array<bool, 3> output_mask) {
  const auto accumulation = check_router_logits_backward(grad_logits, x, weight);
  const int64_t T = x.size(0), E = weight.size(0);
  const at::Tensor grad = grad_logits.contiguous();
  const auto shape = [&](bool wanted, const at::Tensor& like) {
    return wanted ? like.sizes().vec() : std::vector<int64_t>{0};
  };
  at::Tensor dx = at::empty(shape(output_mask[0], x), x.options());
  at::Tensor dweight = at::empty(shape(output_mask[1], weight), weight.options());
  at::Tensor dbias = at::empty({output_mask[2] ? E : 0}, grad.options());
  dispatch(accumulation, [&](auto a) {
    using A = decltype(a);
    const A* g = grad.const_data_ptr<A>();
    if (output_mask[0]) product(g, E, 1, Matrix(weight), dx);
    if (output_mask[1]) product(g, 1, E, Matrix(x), dweight);
    if (output_mask[2]) sum_rows(g, T, E, dbias.mutable_data_ptr<A>());
  });
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("router_logits", &router_logits);
  m.impl("router_logits_backward", &router_logits_backward);
}

}  // namespace moe_ext

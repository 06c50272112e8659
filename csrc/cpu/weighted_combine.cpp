// weighted_combine: y_t = sum_j w_tj rows[assignment_row_tj], over the kept j in
// ascending order, in float32 (float64 if rows or weights are). Backward, row by row:
// drows_r = w_a dy_t and dw_a = <dy_t, rows_r>, with a = row_assignment_r, t = a / K;
// the inner product in blocks of 256. A dropped assignment adds 0 and gets exactly 0,
// and so do the rows of the tail.

#include "checks/weighted_combine.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "cpu/simd.h"

namespace moe_ext {
namespace {

constexpr int64_t kBlock = 256;  // elements of H at a time, in registers and L1

// One token. `row` and `weight` point at its K assignments.
template <typename T, typename A>
struct CombineToken {
  static MOE_EXT_INLINE void run(const T* rows, const A* weight, const int32_t* row, T* y,
                                 int64_t top_k, int64_t hidden) {
    A sum[kBlock];
    for (int64_t begin = 0; begin < hidden; begin += kBlock) {
      const int64_t n = std::min(kBlock, hidden - begin);
      for (int64_t i = 0; i < n; ++i) sum[i] = 0;
      for (int64_t j = 0; j < top_k; ++j) {
        if (row[j] < 0) continue;
        const T* mine = rows + row[j] * hidden + begin;
        const A w = weight[j];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) sum[i] += w * static_cast<A>(widen(mine[i]));
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[begin + i] = narrow<T>(sum[i]);
    }
  }
};

// One row; `drow` and `dweight` may be null.
template <typename T, typename A>
struct CombineRowBackward {
  static MOE_EXT_INLINE void run(const T* dy, const T* row, A weight, T* drow, A* dweight,
                                 int64_t hidden) {
    if (drow) {
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i)
        drow[i] = narrow<T>(weight * static_cast<A>(widen(dy[i])));
    }
    if (dweight) {
      A total = 0;
      for (int64_t begin = 0; begin < hidden; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, hidden);
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; ++i)
          sum += static_cast<A>(widen(dy[i])) * static_cast<A>(widen(row[i]));
        total += sum;
      }
      *dweight = total;
    }
  }
};

// Calls f(T{}, A{}) with the rows' type and the accumulation's.
template <typename F>
void dispatch(const at::Tensor& rows, at::ScalarType accumulation, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, rows.scalar_type(), "weighted_combine",
                                  [&] {
                                    if (accumulation == at::kDouble) {
                                      f(scalar_t{}, double{});
                                    } else if constexpr (!std::is_same_v<scalar_t, double>) {
                                      f(scalar_t{}, float{});
                                    }
                                  });
}

at::Tensor weighted_combine(const at::Tensor& rows, const at::Tensor& weights,
                            const at::Tensor& row_assignment, const at::Tensor& assignment_row) {
  check_weighted_combine("weighted_combine", rows, weights, row_assignment, assignment_row);
  const at::Tensor plan = assignment_row.contiguous();
  check_memory_below("weighted_combine", "assignment_row", plan, rows.size(0));

  const int64_t tokens = weights.size(0), top_k = weights.size(1), hidden = rows.size(1);
  const at::Tensor r = rows.contiguous();
  const auto accumulation = combine_accumulation(rows, weights);
  const at::Tensor w = weights.to(accumulation).contiguous();
  at::Tensor y = at::empty({tokens, hidden}, rows.options());
  dispatch(rows, accumulation, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const T* row_data = r.const_data_ptr<T>();
    const A* weight_data = w.const_data_ptr<A>();
    const int32_t* plan_data = plan.const_data_ptr<int32_t>();
    T* y_data = y.mutable_data_ptr<T>();
    const int64_t grain = 1 + 32768 / std::max<int64_t>(1, top_k * hidden);
    at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        simd_call<CombineToken<T, A>>(row_data, weight_data + i * top_k, plan_data + i * top_k,
                                      y_data + i * hidden, top_k, hidden);
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> weighted_combine_backward(const at::Tensor& grad,
                                                             const at::Tensor& rows,
                                                             const at::Tensor& weights,
                                                             const at::Tensor& row_assignment,
                                                             const at::Tensor& assignment_row,
                                                             std::array<bool, 2> output_mask) {
  check_weighted_combine_backward(grad, rows, weights, row_assignment, assignment_row);
  const int64_t top_k = weights.size(1), hidden = rows.size(1);
  const at::Tensor plan = row_assignment.contiguous();
  check_memory_below("weighted_combine_backward", "row_assignment", plan, weights.numel());

  const at::Tensor dy = grad.contiguous(), r = rows.contiguous();
  const auto accumulation = combine_accumulation(rows, weights);
  const at::Tensor w = weights.to(accumulation).contiguous();
  at::Tensor drows =
      output_mask[0] ? at::empty(rows.sizes(), rows.options()) : at::empty({0}, rows.options());
  at::Tensor dweights =
      output_mask[1] ? at::zeros(weights.sizes(), w.options()) : at::empty({0}, w.options());
  dispatch(rows, accumulation, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const T* dy_data = dy.const_data_ptr<T>();
    const T* row_data = r.const_data_ptr<T>();
    const A* weight_data = w.const_data_ptr<A>();
    const int32_t* plan_data = plan.const_data_ptr<int32_t>();
    T* drow_data = output_mask[0] ? drows.mutable_data_ptr<T>() : nullptr;
    A* dweight_data = output_mask[1] ? dweights.mutable_data_ptr<A>() : nullptr;
    const int64_t grain = 1 + 16384 / std::max<int64_t>(1, hidden);
    at::parallel_for(0, rows.size(0), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* drow = drow_data ? drow_data + i * hidden : nullptr;
        const int64_t assignment = plan_data[i];
        if (assignment < 0) {
          if (drow) std::fill_n(drow, hidden, T(0));
          continue;
        }
        simd_call<CombineRowBackward<T, A>>(
            dy_data + assignment / top_k * hidden, row_data + i * hidden, weight_data[assignment],
            drow, dweight_data ? dweight_data + assignment : nullptr, hidden);
      }
    });
  });
  return {drows, dweights.to(weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("weighted_combine", &weighted_combine);
  m.impl("weighted_combine_backward", &weighted_combine_backward);
}

}  // namespace moe_ext

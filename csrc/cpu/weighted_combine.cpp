// weighted_combine: y_t = sum_j w_tj rows[assignment_row_tj], over the kept j in
// ascending order, in float32 (float64 if rows or weights are). Backward, row by row:
// drows_r = w_a dy_t and dw_a = <dy_t, rows_r>, with a = row_assignment_r, t = a / K;
// the inner product in blocks of 256. A dropped assignment adds 0 and gets exactly 0,
// and so do the rows of the tail.

#include "checks/weighted_combine.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>

#include "cpu/tensors.h"

namespace moe_ext::cpu {
namespace {

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
  const int32_t* row = plan.const_data_ptr<int32_t>();
  const Rows from = rows_of(r);
  const RowsOut out = rows_out(y);
  with_sums(accumulation == at::kDouble, [&](auto a) {
    using A = decltype(a);
    const A* weight = w.const_data_ptr<A>();
    const int64_t grain = 1 + 32768 / std::max<int64_t>(1, top_k * hidden);
    at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        row_kernels<A>().combine(out.from_row(t), from.with_index(row + t * top_k),
                                 weight + t * top_k, top_k, hidden);
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
  const int32_t* assignment_of = plan.const_data_ptr<int32_t>();
  const Rows upstream = rows_of(dy), from = rows_of(r);
  const RowsOut to = output_mask[0] ? rows_out(drows) : RowsOut{nullptr, from.dtype, 0};
  const int64_t row_bytes = hidden * rows.element_size();
  with_sums(accumulation == at::kDouble, [&](auto a) {
    using A = decltype(a);
    const A* weight = w.const_data_ptr<A>();
    A* dweight = output_mask[1] ? dweights.mutable_data_ptr<A>() : nullptr;
    const int64_t grain = 1 + 16384 / std::max<int64_t>(1, hidden);
    at::parallel_for(0, rows.size(0), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const RowsOut drow = to.data ? to.from_row(i) : to;
        const int64_t assignment = assignment_of[i];
        if (assignment < 0) {
          if (drow.data) std::memset(drow.data, 0, row_bytes);
          continue;
        }
        row_kernels<A>().combine_backward(drow, dweight ? dweight + assignment : nullptr,
                                          upstream.from_row(assignment / top_k), from.from_row(i),
                                          weight[assignment], hidden);
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

}  // namespace moe_ext::cpu

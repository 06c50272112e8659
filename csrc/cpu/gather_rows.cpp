// gather_rows: rows_r = x[row_token_r], 0 in the tail. Backward: dx_t is the sum of
// drows[assignment_row_tj] over the kept j in ascending order, in float32 (float64 for
// float64), rounded once. A token without a row gets exactly 0.

#include "checks/gather_rows.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/tensors.h"

namespace moe_ext::cpu {
namespace {

at::Tensor gather_rows(const at::Tensor& x, const at::Tensor& row_token,
                       const at::Tensor& assignment_row) {
  check_gather_rows(x, row_token, assignment_row);
  const at::Tensor plan = row_token.contiguous();
  check_memory_below("gather_rows", "row_token", plan, x.size(0));

  const at::Tensor source = x.contiguous();
  const int64_t row_count = plan.numel(), row_bytes = x.size(1) * x.element_size();
  at::Tensor rows = at::empty({row_count, x.size(1)}, x.options());
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const int32_t* token = plan.const_data_ptr<int32_t>();
  const int64_t grain = 1 + 65536 / std::max<int64_t>(1, row_bytes);
  at::parallel_for(0, row_bytes ? row_count : 0, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (token[r] < 0) {
        std::memset(to + r * row_bytes, 0, row_bytes);
      } else {
        std::memcpy(to + r * row_bytes, from + token[r] * row_bytes, row_bytes);
      }
    }
  });
  return rows;
}

at::Tensor gather_rows_backward(const at::Tensor& grad_rows, const at::Tensor& assignment_row) {
  check_gather_rows_backward(grad_rows, assignment_row);
  const at::Tensor plan = assignment_row.contiguous();
  check_memory_below("gather_rows_backward", "assignment_row", plan, grad_rows.size(0));

  const int64_t tokens = plan.size(0), top_k = plan.size(1), hidden = grad_rows.size(1);
  const at::Tensor source = grad_rows.contiguous();
  at::Tensor dx = at::empty({tokens, hidden}, grad_rows.options());
  const int32_t* row = plan.const_data_ptr<int32_t>();
  const Rows rows = rows_of(source);
  const RowsOut out = rows_out(dx);
  with_sums(rows.dtype == Dtype::f64, [&](auto a) {
    using A = decltype(a);
    const int64_t grain = 1 + 32768 / std::max<int64_t>(1, top_k * hidden);
    at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        row_kernels<A>().combine(out.from_row(t), rows.with_index(row + t * top_k), nullptr, top_k,
                                 hidden);
    });
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("gather_rows", &gather_rows);
  m.impl("gather_rows_backward", &gather_rows_backward);
}

}  // namespace moe_ext::cpu

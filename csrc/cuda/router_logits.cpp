// router_logits on CUDA: checks, allocates, launches. x and the weight go to the kernels in
// their own dtypes; the three products and the bias's sum are in kernels/router_logits.cu.

#include "checks/router_logits.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "cuda/device.h"
#include "cuda/kernels/router_logits.h"

namespace moe_ext {
namespace {

at::Tensor with_contiguous_rows(const at::Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
}

// Rows that are multiplied along their elements, and columns that are multiplied along the
// rows: the matrix and its transpose.
cuda::Operand rows_of(const at::Tensor& t) {
  return {t.const_data_ptr(), dtype_of(t), t.stride(0), true};
}
cuda::Operand columns_of(const at::Tensor& t) {
  return {t.const_data_ptr(), dtype_of(t), t.stride(0), false};
}

// out = a b^T (+ bias), summed over k.
void multiply(const char* op, const OnDevice& device, const cuda::Operand& a,
              const cuda::Operand& b, int64_t k, const at::Tensor& bias,
              at::ScalarType accumulation, cuda::Splits splits, at::Tensor& out) {
  cuda::RouterProduct p{};
  p.m = out.size(0);
  p.n = out.size(1);
  p.k = k;
  p.a = a;
  p.b = b;
  p.is_double = accumulation == at::kDouble;
  if (bias.defined()) {
    p.bias = bias.const_data_ptr();
    p.bias_dtype = dtype_of(bias);
  }
  p.out = out.mutable_data_ptr();
  p.out_dtype = dtype_of(out);
  cuda::plan_splits(p, splits);
  at::Tensor parts;
  if (p.splits > 1) {
    parts = at::empty({p.splits, p.m, p.n}, out.options().dtype(accumulation));
    p.parts = parts.mutable_data_ptr();
  }
  check_launch(op, cuda::router_product(p, device.stream()));
}

at::Tensor router_logits(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  const auto accumulation = check_router_logits(x, weight, bias);
  const OnDevice device(x);
  const at::Tensor rows = with_contiguous_rows(x), w = with_contiguous_rows(weight);
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  at::Tensor logits = at::empty({x.size(0), weight.size(0)}, x.options().dtype(accumulation));
  multiply("router_logits", device, rows_of(rows), rows_of(w), x.size(1), b, accumulation,
           cuda::Splits::kFixed, logits);
  return logits;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward(
    const at::Tensor& grad_logits, const at::Tensor& x, const at::Tensor& weight,
    std::array<bool, 3> output_mask) {
  constexpr const char* op = "router_logits_backward";
  const auto accumulation = check_router_logits_backward(grad_logits, x, weight);
  const OnDevice device(x);
  const int64_t T = x.size(0), E = weight.size(0);
  const at::Tensor g = grad_logits.contiguous();
  const at::Tensor rows = with_contiguous_rows(x), w = with_contiguous_rows(weight);
  const auto shape = [](bool wanted, const at::Tensor& like) {
    return wanted ? like.sizes().vec() : std::vector<int64_t>{0};
  };
  at::Tensor dx = at::empty(shape(output_mask[0], x), x.options());
  at::Tensor dweight = at::empty(shape(output_mask[1], weight), weight.options());
  at::Tensor dbias = at::empty({output_mask[2] ? E : 0}, g.options());
  if (output_mask[0])
    multiply(op, device, rows_of(g), columns_of(w), E, {}, accumulation, cuda::Splits::kFixed, dx);
  if (output_mask[1])
    multiply(op, device, columns_of(g), columns_of(rows), T, {}, accumulation, cuda::Splits::kFree,
             dweight);
  if (output_mask[2]) {
    at::Tensor parts = at::empty({cuda::column_sum_blocks(T), E}, g.options().dtype(at::kDouble));
    cuda::ColumnSums sums{};
    sums.m = T;
    sums.n = E;
    sums.is_double = accumulation == at::kDouble;
    sums.a = g.const_data_ptr();
    sums.out = dbias.mutable_data_ptr();
    sums.parts = parts.mutable_data_ptr<double>();
    check_launch(op, cuda::column_sums(sums, device.stream()));
  }
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) {
  m.impl("router_logits", &router_logits);
  m.impl("router_logits_backward", &router_logits_backward);
}

}  // namespace moe_ext

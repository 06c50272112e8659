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

bool on_tensor_cores(const at::Tensor& x, const at::Tensor& weight) {
  return cuda::router_on_tensor_cores(dtype_of(x), dtype_of(weight), x.size(1));
}

// t, or a copy whose rows the kernels can read: elements beside each other, and on tensor cores all
// of them 16 bytes at a time.
at::Tensor readable(const at::Tensor& t, bool tensor_cores) {
  const bool contiguous_rows = t.size(1) <= 1 || t.stride(1) == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 &&
                       t.stride(0) * t.element_size() % 16 == 0;
  if (contiguous_rows && (aligned || !tensor_cores)) return t;
  return t.clone(at::MemoryFormat::Contiguous);
}

// Rows that are multiplied along their elements, and columns that are multiplied along the
// rows: the matrix and its transpose.
cuda::Operand rows_of(const at::Tensor& t) {
  return {t.const_data_ptr(), dtype_of(t), t.stride(0), true};
}
cuda::Operand columns_of(const at::Tensor& t) {
  return {t.const_data_ptr(), dtype_of(t), t.stride(0), false};
}

// out = p.a p.b^T (+ bias), summed over p.k.
void multiply(const char* op, const OnDevice& device, cuda::RouterProduct p, const at::Tensor& bias,
              at::ScalarType accumulation, cuda::Splits splits, at::Tensor& out) {
  p.m = out.size(0);
  p.n = out.size(1);
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
  cuda::RouterProduct p{};
  p.tensor_cores = on_tensor_cores(x, weight);
  const at::Tensor rows = readable(x, p.tensor_cores), w = readable(weight, p.tensor_cores);
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  at::Tensor logits = at::empty({x.size(0), weight.size(0)}, x.options().dtype(accumulation));
  p.a = rows_of(rows), p.b = rows_of(w), p.k = x.size(1);
  multiply("router_logits", device, p, b, accumulation, cuda::Splits::kFixed, logits);
  return logits;
}

// g (T, E) float32 as bfloat16, columns up to a multiple of 8: rounded, and what is left of it.
at::Tensor halves_of(const char* op, const OnDevice& device, const at::Tensor& g) {
  const int64_t T = g.size(0), E = g.size(1), columns = (E + 7) / 8 * 8;
  at::Tensor halves = at::empty({2, T, columns}, g.options().dtype(at::kBFloat16));
  const cuda::GradientHalves p{T, E, columns, g.const_data_ptr<float>(), halves.mutable_data_ptr()};
  check_launch(op, cuda::halve_gradient(p, device.stream()));
  return halves;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward(
    const at::Tensor& grad_logits, const at::Tensor& x, const at::Tensor& weight,
    std::array<bool, 3> output_mask) {
  constexpr const char* op = "router_logits_backward";
  const auto accumulation = check_router_logits_backward(grad_logits, x, weight);
  const OnDevice device(x);
  const int64_t T = x.size(0), E = weight.size(0);
  const at::Tensor g = grad_logits.contiguous();
  cuda::RouterProduct p{};
  // float16 has no exponents for what rounding leaves.
  p.tensor_cores = on_tensor_cores(x, weight) && x.scalar_type() == at::kBFloat16;
  const at::Tensor rows = readable(x, p.tensor_cores), w = readable(weight, p.tensor_cores);
  at::Tensor gradient = g, rest;
  if (p.tensor_cores && (output_mask[0] || output_mask[1])) {
    const at::Tensor halves = halves_of(op, device, g);
    gradient = halves.select(0, 0), rest = halves.select(0, 1);
    p.a_rest = rest.const_data_ptr();
  }
  const auto shape = [](bool wanted, const at::Tensor& like) {
    return wanted ? like.sizes().vec() : std::vector<int64_t>{0};
  };
  at::Tensor dx = at::empty(shape(output_mask[0], x), x.options());
  at::Tensor dweight = at::empty(shape(output_mask[1], weight), weight.options());
  at::Tensor dbias = at::empty({output_mask[2] ? E : 0}, g.options());
  if (output_mask[0]) {
    p.a = rows_of(gradient), p.b = columns_of(w), p.k = E;
    multiply(op, device, p, {}, accumulation, cuda::Splits::kFixed, dx);
  }
  if (output_mask[1]) {
    p.a = columns_of(gradient), p.b = columns_of(rows), p.k = T;
    multiply(op, device, p, {}, accumulation, cuda::Splits::kFree, dweight);
  }
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

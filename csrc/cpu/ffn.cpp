// What both passes of the experts share: checks, a weight as the kernels see it, the sum over a
// token's rows.

#include "cpu/ffn.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "cpu/tensors.h"

namespace moe_ext::cpu {
namespace {

// The kernels take weights of any layout in which one of the matrix's strides is 1.
at::Tensor with_unit_stride(const at::Tensor& weight) {
  const bool unit = !weight.defined() || weight.stride(1) == 1 || weight.stride(2) == 1;
  return unit ? weight : weight.contiguous();
}

}  // namespace

Experts check_memory(const char* op, FfnCall arguments) {
  Experts call{std::move(arguments)};
  for (at::Tensor* matrix : {&call.up_proj, &call.down_proj, &call.up_lora_a, &call.up_lora_b,
                             &call.down_lora_a, &call.down_lora_b}) {
    *matrix = with_unit_stride(*matrix);
  }
  call.dtype = dtype_of(call.x);
  check_plan_memory(op, call.expert_offsets, call.row_token, call.tokens);
  call.kept = call.offsets()[call.experts];
  const int32_t* row = call.assignment_row.const_data_ptr<int32_t>();
  bool ok = true;
  for (int64_t a = 0; a < call.assignment_row.numel(); ++a) ok &= row[a] < call.kept;
  TORCH_CHECK_VALUE(ok, op, ": assignment_row must be below expert_offsets[E] = ", call.kept);
  return call;
}

at::Tensor preactivations_of(const Experts& experts) {
  if (!experts.keep_preactivations) return at::empty({0}, experts.x.options());
  at::Tensor kept = empty_large({experts.rows, experts.width}, experts.x.options());
  kept.narrow(0, experts.kept, experts.rows - experts.kept).zero_();
  return kept;
}

Weight weight_of(const Experts& call, const at::Tensor& weight, int64_t expert, int64_t begin,
                 int64_t step, bool swapped) {
  const int64_t along_out = weight.stride(call.out_dim()), along_in = weight.stride(call.in_dim());
  const int64_t offset = expert * weight.stride(0) + begin * along_out;
  const void* at = static_cast<const char*>(weight.const_data_ptr()) + offset * size_of(call.dtype);
  if (swapped) return {at, call.dtype, along_in, step * along_out};
  return {at, call.dtype, step * along_out, along_in};
}

Weight factor_of(const Experts& call, const at::Tensor& factor, int64_t expert, int64_t n_dim,
                 int64_t begin, int64_t step) {
  const int64_t k_dim = 3 - n_dim;
  const int64_t offset = expert * factor.stride(0) + begin * factor.stride(n_dim);
  const void* at = static_cast<const char*>(factor.const_data_ptr()) + offset * size_of(call.dtype);
  // The stride of a rank of 1 says nothing; with packed rows it has to be 1.
  return {at, call.dtype, step * factor.stride(n_dim),
          factor.size(k_dim) == 1 ? 1 : factor.stride(k_dim)};
}

template <class T>
void combine_tokens(const Experts& call, const at::Tensor& y, const WorkspaceRows<T>& rows,
                    const T* weight) {
  const int32_t* row = call.assignment_row.const_data_ptr<int32_t>();
  const int64_t top_k = call.top_k;
  const RowsOut out = rows_out(y);
  const int64_t grain = 1 + (1 << 15) / std::max<int64_t>(1, call.hidden * top_k);
  at::parallel_for(0, call.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      row_kernels<T>().combine(out.from_row(t), rows.rows().with_index(row + t * top_k),
                               weight ? weight + t * top_k : nullptr, top_k, call.hidden);
    }
  });
}
template void combine_tokens<float>(const Experts&, const at::Tensor&, const WorkspaceRows<float>&,
                                    const float*);
template void combine_tokens<double>(const Experts&, const at::Tensor&,
                                     const WorkspaceRows<double>&, const double*);

}  // namespace moe_ext::cpu

// The experts on a CPU: what grouped_ffn and moe_forward share. Both check and
// describe their tensors with `Experts`, and run `ffn_forward` and `ffn_backward`
// on it; they differ in where a row's upstream gradient comes from and in what
// becomes of the rows.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

#include "checks/ffn.h"
#include "cpu/memory.h"
#include "kernels/kernels.h"

namespace moe_ext::cpu {

// A call with what only a CPU's plan can tell, and weights whose matrices have a stride of 1.
struct Experts : FfnCall {
  int64_t kept = 0;  // how many of the R rows hold something
  Dtype dtype = Dtype::f32;

  const int32_t* offsets() const { return expert_offsets.const_data_ptr<int32_t>(); }
};

// Reads the plan, so that no kernel can leave its arrays.
Experts check_memory(const char* op, FfnCall arguments);

// Room for the preactivations, if they are to be kept, its tail zero; else of shape (0).
at::Tensor preactivations_of(const Experts& experts);

// y_t (x's dtype) = the sum of token t's rows, by `weight` (T, K) or by 1 where that is null, in
// the order of j.
template <class T>
void combine_tokens(const Experts& experts, const at::Tensor& y, const WorkspaceRows<T>& rows,
                    const T* weight);

// Calls body(P()) with the type of this call's operands, see kernels.h.
template <class Body>
auto with_operands(const Experts& experts, Body body) {
  if (experts.dtype == Dtype::f64) return body(double());
  if (experts.dtype == Dtype::bf16 && multiplies_bf16()) return body(bf16());
  return body(float());
}

// Every kept row through its expert. `kept` receives the preactivations unless it is null.
template <class P>
void ffn_forward(const Experts& experts, const RowsOut& out, void* kept);

// The gradients that are wanted, the others of shape (0), with `weight` (R; null: 1) as the rows'
// weights. score (R), unless null, receives the gradient of each row's weight.
template <class P>
Gradients ffn_backward(const Experts& experts, const Sum<P>* weight, Sum<P>* score);

// ---- what both passes read

template <class T>
T* data(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// Outputs begin, begin + step, ... of an expert's weight as W(n, k), k being its inputs; the
// other way round where `swapped`.
Weight weight_of(const Experts& experts, const at::Tensor& weight, int64_t expert,
                 int64_t begin = 0, int64_t step = 1, bool swapped = false);

// An expert's factor of a low-rank part as W(n, k), n counting along its dimension n_dim from
// `begin` on in steps of `step`.
Weight factor_of(const Experts& experts, const at::Tensor& factor, int64_t expert, int64_t n_dim,
                 int64_t begin = 0, int64_t step = 1);

// A bias in the type of sums; undefined where there is none.
template <class T>
at::Tensor in_sums_type(const at::Tensor& bias) {
  if (!bias.defined()) return bias;
  return bias.to(sizeof(T) == 8 ? at::kDouble : at::kFloat).contiguous();
}

}  // namespace moe_ext::cpu

// The experts on a CPU: what grouped_ffn and moe_forward share. Both check and
// describe their tensors with `Experts`, and run `ffn_forward` and `ffn_backward`
// on it; they differ in where a row's upstream gradient comes from and in what
// becomes of the rows.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels/kernels.h"

namespace moe_ext::cpu {

// A call's experts, plan and options, checked; all sizes and strides are here.
struct Experts {
  at::Tensor x, expert_offsets, row_token, assignment_row;  // (T, H), the plan
  at::Tensor up_proj, down_proj, up_bias, down_bias;        // biases may be undefined
  ActivationSpec spec;
  bool transposed;

  int64_t tokens, hidden, intermediate, width, experts, top_k;  // width: of a preactivation row
  int64_t rows, kept;  // R, and how many of them hold something
  Dtype dtype;

  const int32_t* offsets() const { return expert_offsets.const_data_ptr<int32_t>(); }
};

Experts check_experts(const char* op, const at::Tensor& x, const at::Tensor& expert_offsets,
                      const at::Tensor& row_token, const at::Tensor& assignment_row,
                      const at::Tensor& up_proj, const at::Tensor& down_proj,
                      const std::optional<at::Tensor>& up_bias,
                      const std::optional<at::Tensor>& down_bias, std::string_view activation,
                      std::optional<double> limit, double alpha, double up_offset, bool transposed,
                      bool interleaved);

at::Tensor check_preactivations(const char* op, const Experts& experts, const at::Tensor& tensor);

// Room for the preactivations that a backward pass needs, its tail zero; shape (0) if none does.
at::Tensor preactivations_of(const Experts& experts, bool keep);

// y_t (x's dtype) = the sum of token t's rows (ld elements apart), by `weight` (T, K) or
// by 1 where that is null, in the order of j.
template <class T>
void combine_tokens(const Experts& experts, const at::Tensor& y, const T* rows, int64_t ld,
                    const T* weight);

// Calls body(T{}) with the type that this call computes in.
template <class Body>
auto with_compute_type(const Experts& experts, Body body) {
  return experts.dtype == Dtype::f64 ? body(double()) : body(float());
}

// A block of scratch memory for rows in the compute type, or for one thread's work.
template <class T>
at::Tensor workspace(int64_t elements);

// Every kept row through its expert. Row r of `out` (out_dtype, out_stride elements
// apart) is the expert's output; `kept` receives the preactivations unless it is null.
template <class T>
void ffn_forward(const Experts& experts, void* out, Dtype out_dtype, int64_t out_stride,
                 void* kept);

struct FfnGradients {
  at::Tensor x, up_proj, down_proj, up_bias, down_bias;  // of shape (0) where not asked for
};

// From the rows' upstream gradients and `weight` (R, in the compute type; null: 1) to
// the gradients that the mask asks for. score (R), unless null, receives the gradient
// of each row's weight.
template <class T>
FfnGradients ffn_backward(const Experts& experts, Rows upstream, const T* weight, T* score,
                          const at::Tensor& preactivations, std::array<bool, 5> mask);

}  // namespace moe_ext::cpu

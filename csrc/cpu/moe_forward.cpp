// moe_forward: y_t = sum_j w_tj ffn_e(x_t) over the kept j in ascending order, the
// rows never leaving float32 (float64). Backward takes each row's upstream gradient from
// dy through row_token, and gives dw_tj = <dA, A> + <dy, c> from inside the activation's
// backward pass. The work is ffn.h's, which grouped_ffn shares.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/ffn.h"
#include "cpu/tensors.h"

namespace moe_ext::cpu {
namespace {

// The routing weights in the sums' type.
template <class T>
at::Tensor weights_of(const Experts& call) {
  return call.weights.to(sizeof(T) == 8 ? at::kDouble : at::kFloat);
}

std::array<at::Tensor, 2> moe_forward(Arguments& args) {
  const Experts call = check_memory(args.op(), read_ffn(args));
  at::Tensor y = at::empty({call.tokens, call.hidden}, call.x.options());
  at::Tensor kept = preactivations_of(call);
  with_operands(call, [&](auto p) {
    using P = decltype(p);
    using T = Sum<P>;
    const at::Tensor w = weights_of<T>(call);
    const WorkspaceRows<T> rows(call.kept, call.hidden);
    ffn_forward<P>(call, rows.out(), call.keep_preactivations ? kept.mutable_data_ptr() : nullptr);
    combine_tokens<T>(call, y, rows, w.const_data_ptr<T>());
  });
  return {y, kept};
}

Gradients moe_backward(Arguments& args) {
  const Experts call = check_memory(args.op(), read_ffn(args));
  return with_operands(call, [&](auto p) {
    using P = decltype(p);
    using T = Sum<P>;
    const at::Tensor w = weights_of<T>(call);
    const int32_t* assignment = call.row_assignment.const_data_ptr<int32_t>();
    const Workspace<T> row_weight(call.kept), score(call.kept);
    for (int64_t r = 0; r < call.kept; ++r) {
      TORCH_CHECK_VALUE(assignment[r] >= 0 && assignment[r] < w.numel(), args.op(),
                        ": row_assignment must be in 0..T*K-1 where a row is kept");
      row_weight[r] = w.const_data_ptr<T>()[assignment[r]];
    }
    const bool wanted = call.wanted[kWeights];
    Gradients gradients = ffn_backward<P>(call, row_weight.data(), wanted ? score.data() : nullptr);
    at::Tensor& dweights = gradients[kWeights];
    dweights = wanted ? at::zeros(w.sizes(), w.options()) : at::empty({0}, w.options());
    for (int64_t r = 0; wanted && r < call.kept; ++r) {
      dweights.mutable_data_ptr<T>()[assignment[r]] = score[r];
    }
    dweights = dweights.to(call.weights.scalar_type());
    return gradients;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("moe_forward", kernel<&moe_forward>());
  m.impl("moe_backward", kernel<&moe_backward>());
}

}  // namespace moe_ext::cpu

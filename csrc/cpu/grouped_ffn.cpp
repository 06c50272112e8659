// grouped_ffn: every row through its expert, rows_r = down_e act(up_e x_t + b) + c, with
// t = row_token_r. The work is ffn.h's, which moe_forward shares.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/ffn.h"
#include "cpu/tensors.h"

namespace moe_ext::cpu {
namespace {

std::array<at::Tensor, 2> grouped_ffn(Arguments& args) {
  const Experts call = check_memory(args.op(), read_ffn(args));
  at::Tensor rows = at::empty({call.rows, call.hidden}, call.x.options());
  at::Tensor kept = preactivations_of(call);
  with_operands(call, [&](auto p) {
    ffn_forward<decltype(p)>(call, rows_out(rows),
                             call.keep_preactivations ? kept.mutable_data_ptr() : nullptr);
  });
  rows.narrow(0, call.kept, call.rows - call.kept).zero_();
  return {rows, kept};
}

GradientsOfRows grouped_ffn_backward(Arguments& args) {
  const Experts call = check_memory(args.op(), read_ffn(args));
  return without_weights(with_operands(
      call, [&](auto p) { return ffn_backward<decltype(p)>(call, nullptr, nullptr); }));
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("grouped_ffn", kernel<&grouped_ffn>());
  m.impl("grouped_ffn_backward", kernel<&grouped_ffn_backward>());
}

}  // namespace moe_ext::cpu

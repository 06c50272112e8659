// moe_forward: y_t = sum_j w_tj ffn_e(x_t) over the kept j in ascending order. Backward
// takes each row's upstream gradient from dy through row_token, and gives
// dw_tj = <dA, A> + <dy, c> from inside the activation's backward pass. The work is in
// ffn.cpp, which grouped_ffn shares.

#include <torch/library.h>

#include "cuda/ffn.h"

namespace moe_ext {
namespace {

std::array<at::Tensor, 2> moe_forward(Arguments& args) {
  const FfnCall call = read_ffn(args);
  const OnDevice device(call.x);
  const FfnRows result = ffn_forward(args.op(), device, call);
  return {combine_tokens(args.op(), device, call, result.rows, call.weights),
          result.preactivations};
}

Gradients moe_backward(Arguments& args) {
  const FfnCall call = read_ffn(args);
  return ffn_backward(args.op(), OnDevice(call.x), call);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) {
  m.impl("moe_forward", kernel<&moe_forward>());
  m.impl("moe_backward", kernel<&moe_backward>());
}

}  // namespace moe_ext

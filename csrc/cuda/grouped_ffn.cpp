// grouped_ffn: every row through its expert, rows_r = down_e act(up_e x_t + b) + c, with
// t = row_token_r. The work is in ffn.cpp, which moe_forward shares.

#include <torch/library.h>

#include "cuda/ffn.h"

namespace moe_ext {
namespace {

std::array<at::Tensor, 2> grouped_ffn(Arguments& args) {
  const FfnCall call = read_ffn(args);
  const OnDevice device(call.x);
  const FfnRows result = ffn_forward(args.op(), device, call);
  zero_tail(args.op(), device, call, result.rows);
  return {result.rows, result.preactivations};
}

GradientsOfRows grouped_ffn_backward(Arguments& args) {
  const FfnCall call = read_ffn(args);
  return without_weights(ffn_backward(args.op(), OnDevice(call.x), call));
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) {
  m.impl("grouped_ffn", kernel<&grouped_ffn>());
  m.impl("grouped_ffn_backward", kernel<&grouped_ffn_backward>());
}

}  // namespace moe_ext

// grouped_ffn: every row through its expert, rows_r = down_e act(up_e x_t + b) + c, with
// t = row_token_r. The work is in ffn.cpp, which moe_forward shares.

#include <torch/library.h>

#include "cuda/ffn.h"
#include "cuda/kernels/grouped_gemm_sm90.h"

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

// For the diagnosis: whether only the driver keeps Hopper's kernels from x's device.
bool sm90_is_refused(const at::Tensor& x) {
  return cuda::sm90_is_refused(OnDevice(x).sm(), x.const_data_ptr());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moe_ext, m) { m.def("sm90_is_refused(Tensor x) -> bool", &sm90_is_refused); }

TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) {
  m.impl("grouped_ffn", kernel<&grouped_ffn>());
  m.impl("grouped_ffn_backward", kernel<&grouped_ffn_backward>());
}

}  // namespace moe_ext

// Two products forward, five backward. A product's operands, layout and epilogue are told
// to csrc/cuda/kernels, which choose the kernel.

#include "cuda/ffn.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include "cuda/check_plan.h"
#include "cuda/kernels/weighted_combine.h"

namespace moe_ext {
namespace {

// Whether products of this dtype may round their operands to tf32. Only float32's could, so
// only for them is torch asked, and by the newer of its two switches: where a program has used
// that one (transformers does), the older question raises; and setting the older sets both.
bool allows_tf32(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32;
}

const void* pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

cuda::GemmContext context_of(const OnDevice& device, const FfnCall& call) {
  return {dtype_of(call.x),    device.sm(),          device.sm_count(),
          allows_tf32(call.x), call.batch_invariant, call.tokens,
          call.rows,           call.experts,         call.expert_offsets.const_data_ptr<int32_t>()};
}

// A (rows, columns) matrix of our own, or a tensor of tokens that rows are gathered from.
cuda::RowMatrix rows_of(const at::Tensor& matrix) {
  return {matrix.const_data_ptr(), matrix.stride(0), nullptr, 0};
}
cuda::RowMatrix gathered(const at::Tensor& tokens, const FfnCall& call) {
  return {tokens.const_data_ptr(), tokens.stride(0), call.row_token.const_data_ptr<int32_t>(),
          tokens.size(0)};
}

cuda::ExpertMatrix matrix_of(const at::Tensor& weight, int64_t n_dim, int64_t k_dim) {
  return {weight.const_data_ptr(), weight.stride(0), weight.stride(n_dim), weight.stride(k_dim)};
}

cuda::Epilogue store(const at::Tensor& out, const at::Tensor& bias = {}) {
  cuda::Epilogue e{};
  e.kind = cuda::EpilogueKind::kStore;
  e.columns = out.size(1);
  e.out = out.mutable_data_ptr();
  e.out_stride = out.stride(0);
  e.bias = pointer(bias);
  return e;
}

// The epilogues that know the activation: A or w A go to `out`, which may be undefined.
cuda::Epilogue activation(cuda::EpilogueKind kind, const FfnCall& call, const at::Tensor& out) {
  cuda::Epilogue e{};
  e.kind = kind;
  e.activation = call.spec;
  e.at = cuda::gate_columns(call.spec, call.intermediate);
  e.columns = call.intermediate;
  e.out = out.defined() ? out.mutable_data_ptr() : nullptr;
  e.out_stride = call.intermediate;
  return e;
}

void check_rows(const char* op, const FfnCall& call) {
  const int64_t used = check_offsets(op, call.expert_offsets, call.rows);
  check_indices(op, "row_token", call.row_token, call.tokens, false, used);
  check_indices(op, "assignment_row", call.assignment_row, call.rows, true);
  if (call.row_assignment.defined()) {
    check_indices(op, "row_assignment", call.row_assignment, call.assignment_row.numel(), false,
                  used);
  }
}

at::Tensor contiguous(const at::Tensor& bias) { return bias.defined() ? bias.contiguous() : bias; }

}  // namespace

// ---- forward

FfnRows ffn_forward(const char* op, const OnDevice& device, const FfnCall& call) {
  check_rows(op, call);
  const auto options = call.x.options();
  const cuda::GemmContext context = context_of(device, call);
  FfnRows result{at::empty({call.rows, call.hidden}, options),
                 call.keep_preactivations ? at::empty({call.rows, call.width}, options)
                                          : at::empty({0}, options)};
  const at::Tensor up_bias = contiguous(call.up_bias), down_bias = contiguous(call.down_bias);
  const at::Tensor activations = at::empty({call.rows, call.intermediate}, options);

  cuda::Epilogue up = activation(cuda::EpilogueKind::kActivate, call, activations);
  up.bias = pointer(up_bias);
  if (call.keep_preactivations) up.kept = result.preactivations.mutable_data_ptr();
  check_launch(op, cuda::rows_gemm({context, call.hidden, gathered(call.x, call),
                                    matrix_of(call.up_proj, call.out_dim(), call.in_dim()), up},
                                   device.stream()));
  check_launch(op, cuda::rows_gemm({context, call.intermediate, rows_of(activations),
                                    matrix_of(call.down_proj, call.out_dim(), call.in_dim()),
                                    store(result.rows, down_bias)},
                                   device.stream()));
  if (call.keep_preactivations) zero_tail(op, device, call, result.preactivations);
  return result;
}

void zero_tail(const char* op, const OnDevice& device, const FfnCall& call,
               const at::Tensor& rows) {
  check_launch(op,
               cuda::zero_tail({context_of(device, call), rows.mutable_data_ptr(), rows.size(1)},
                               device.stream()));
}

at::Tensor combine_tokens(const char* op, const OnDevice& device, const FfnCall& call,
                          const at::Tensor& rows, const at::Tensor& weights) {
  at::Tensor out = at::empty({call.tokens, call.hidden}, call.x.options());
  const cuda::Dtype dtype = dtype_of(call.x);
  const cuda::Dtype weights_dtype = weights.defined() ? dtype_of(weights) : dtype;
  const cuda::TokenRows plan{call.tokens,
                             call.top_k,
                             call.hidden,
                             call.rows,
                             dtype,
                             dtype == cuda::Dtype::f64 ? dtype : cuda::Dtype::f32,
                             call.assignment_row.const_data_ptr<int32_t>(),
                             pointer(weights),
                             weights_dtype};
  check_launch(op, cuda::sum_token_rows({plan, rows.const_data_ptr(), out.mutable_data_ptr()},
                                        device.stream()));
  return out;
}

// ---- backward

std::array<at::Tensor, kGradients> ffn_backward(const char* op, const OnDevice& device,
                                                const FfnCall& call) {
  check_rows(op, call);
  const auto options = call.x.options();
  const cuda::GemmContext context = context_of(device, call);
  const auto& wanted = call.wanted;
  const bool weighted = call.weights.defined();
  const cuda::Dtype weights_dtype = weighted ? dtype_of(call.weights) : cuda::Dtype::f32;
  const int32_t* row_assignment =
      weighted ? call.row_assignment.const_data_ptr<int32_t>() : nullptr;
  const cuda::RowMatrix dy = weighted ? gathered(call.upstream, call) : rows_of(call.upstream);
  const cuda::RowMatrix x = gathered(call.x, call);

  std::array<at::Tensor, kGradients> gradients;
  gradients.fill(at::empty({0}, options));

  // dA and what follows from it: dH, w A, and the parts of the routing weights' gradient.
  at::Tensor dh, wa;
  const bool want_dh = wanted[kX] || wanted[kUpProj] || wanted[kUpBias];
  if (want_dh) dh = at::empty({call.rows, call.width}, options);
  if (wanted[kDownProj]) wa = at::empty({call.rows, call.intermediate}, options);
  if (want_dh || wanted[kDownProj] || wanted[kWeights]) {
    cuda::RowsGemm gemm{context, call.hidden, dy,
                        matrix_of(call.down_proj, call.in_dim(), call.out_dim()),
                        activation(cuda::EpilogueKind::kBackward, call, wa)};
    cuda::Epilogue& e = gemm.epilogue;
    e.kept = const_cast<void*>(call.preactivations.const_data_ptr());
    e.dh = want_dh ? dh.mutable_data_ptr() : nullptr;
    e.weights = pointer(call.weights);
    e.weights_dtype = weights_dtype;
    e.row_assignment = row_assignment;
    e.assignments = call.assignment_row.numel();
    at::Tensor score_parts;
    const int64_t tiles = cuda::column_tiles(gemm);
    if (wanted[kWeights]) {
      const bool wide = call.x.scalar_type() == at::kDouble;
      score_parts = at::empty({tiles, call.rows}, options.dtype(wide ? at::kDouble : at::kFloat));
      e.score_parts = score_parts.mutable_data_ptr();
    }
    check_launch(op, cuda::rows_gemm(gemm, device.stream()));
    if (wanted[kWeights]) {
      const at::Tensor down_bias = contiguous(call.down_bias);
      at::Tensor& dweights = gradients[kWeights];
      dweights = at::empty({call.tokens, call.top_k}, call.weights.options());
      check_launch(
          op, cuda::score_gradient({context, dweights.numel(), tiles, call.hidden,
                                    call.assignment_row.const_data_ptr<int32_t>(), row_assignment,
                                    dy, score_parts.const_data_ptr(), pointer(down_bias),
                                    dweights.mutable_data_ptr(), weights_dtype},
                                   device.stream()));
    }
  }

  if (wanted[kX]) {
    const at::Tensor dx_rows = at::empty({call.rows, call.hidden}, options);
    check_launch(op, cuda::rows_gemm(
                         {context, call.width, rows_of(dh),
                          matrix_of(call.up_proj, call.in_dim(), call.out_dim()), store(dx_rows)},
                         device.stream()));
    gradients[kX] = combine_tokens(op, device, call, dx_rows, {});
  }

  // A weight's gradient has its shape, whichever way it lies.
  const auto weight_gradient = [&](Gradient which, const at::Tensor& weight,
                                   cuda::RowMatrix out_rows, cuda::RowMatrix in_rows) {
    gradients[which] = at::empty(weight.sizes(), options);
    check_launch(op,
                 cuda::weight_gradient(
                     {context, weight.size(1), weight.size(2), call.transposed ? in_rows : out_rows,
                      call.transposed ? out_rows : in_rows, gradients[which].mutable_data_ptr()},
                     device.stream()));
  };
  if (wanted[kUpProj]) weight_gradient(kUpProj, call.up_proj, rows_of(dh), x);
  if (wanted[kDownProj]) weight_gradient(kDownProj, call.down_proj, dy, rows_of(wa));

  const auto bias_gradient = [&](Gradient which, int64_t columns, cuda::RowMatrix rows,
                                 const at::Tensor& weights) {
    gradients[which] = at::empty({call.experts, columns}, options);
    check_launch(op, cuda::bias_gradient(
                         {context, columns, rows, pointer(weights), weights_dtype, row_assignment,
                          call.assignment_row.numel(), gradients[which].mutable_data_ptr()},
                         device.stream()));
  };
  if (wanted[kUpBias]) bias_gradient(kUpBias, call.width, rows_of(dh), {});
  if (wanted[kDownBias]) bias_gradient(kDownBias, call.hidden, dy, call.weights);
  return gradients;
}

}  // namespace moe_ext

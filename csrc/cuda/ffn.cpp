// Two products forward, five backward, and small ones for a low-rank part. A product's operands,
// layout and epilogue are told to csrc/cuda/kernels, which choose the kernel.

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
  return {dtype_of(call.x),    device.sm(),
          device.sm_count(),   device.smem(),
          allows_tf32(call.x), call.batch_invariant,
          call.tokens,         call.rows,
          call.experts,        call.expert_offsets.const_data_ptr<int32_t>()};
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

// The low-rank part's second factor in either direction, B forward and A backward, its elements
// side by side along the same dimension as the weight's: so tensor cores take both.
at::Tensor factor_beside(const at::Tensor& factor, bool along_last) {
  if (!factor.defined() || factor.stride(along_last ? 2 : 1) == 1) return factor;
  return along_last ? factor.contiguous() : factor.mT().contiguous().mT();
}

// The products of one call. Forward goes from a weight's inputs to its outputs, x W + (x A) B;
// backward from outputs to inputs, dh W^T + (dh B^T) A^T.
struct Products {
  const char* op;
  const OnDevice& device;
  const FfnCall& call;
  const cuda::GemmContext context = context_of(device, call);

  enum Way { kForward, kBackward };
  // A factor's dimension that is summed over.
  static int64_t k_dim(Way way) { return way == kForward ? 1 : 2; }

  void run(const cuda::RowsGemm& gemm) const {
    check_launch(op, cuda::rows_gemm(gemm, device.stream()));
  }

  // (R, r): rows through the first factor, A forward and B backward; undefined without one.
  at::Tensor inner(Way way, cuda::RowMatrix rows, const at::Tensor& factor) const {
    if (!factor.defined()) return factor;
    const int64_t k = k_dim(way), n = 3 - k;
    const at::Tensor out = at::empty({call.rows, factor.size(n)}, call.x.options());
    run({context, {factor.size(k), rows, matrix_of(factor, n, k)}, {}, store(out)});
    return out;
  }

  // Rows through a weight and, where `inner` is defined, that through the second factor.
  cuda::RowsGemm through(Way way, cuda::RowMatrix rows, const at::Tensor& weight,
                         const at::Tensor& inner, const at::Tensor& factor,
                         const cuda::Epilogue& epilogue) const {
    const int64_t k = way == kForward ? call.in_dim() : call.out_dim(), n = 3 - k;
    cuda::RowsGemm gemm{context, {weight.size(k), rows, matrix_of(weight, n, k)}, {}, epilogue};
    if (inner.defined()) {
      const int64_t r = k_dim(way);
      gemm.low_rank = {inner.size(1), rows_of(inner), matrix_of(factor, 3 - r, r)};
    }
    return gemm;
  }
};

}  // namespace

// ---- forward

FfnRows ffn_forward(const char* op, const OnDevice& device, const FfnCall& call) {
  check_rows(op, call);
  const auto options = call.x.options();
  const Products products{op, device, call};
  FfnRows result{at::empty({call.rows, call.hidden}, options),
                 call.keep_preactivations ? at::empty({call.rows, call.width}, options)
                                          : at::empty({0}, options)};
  const at::Tensor up_bias = contiguous(call.up_bias), down_bias = contiguous(call.down_bias);
  const at::Tensor activations = at::empty({call.rows, call.intermediate}, options);

  cuda::Epilogue up = activation(cuda::EpilogueKind::kActivate, call, activations);
  up.bias = pointer(up_bias);
  if (call.keep_preactivations) up.kept = result.preactivations.mutable_data_ptr();
  const auto product = [&](cuda::RowMatrix rows, const at::Tensor& weight, const at::Tensor& a,
                           const at::Tensor& b, const cuda::Epilogue& epilogue) {
    const at::Tensor inner = products.inner(Products::kForward, rows, a);
    const at::Tensor second = factor_beside(b, weight.stride(call.in_dim()) != 1);
    products.run(products.through(Products::kForward, rows, weight, inner, second, epilogue));
  };
  product(gathered(call.x, call), call.up_proj, call.up_lora_a, call.up_lora_b, up);
  product(rows_of(activations), call.down_proj, call.down_lora_a, call.down_lora_b,
          store(result.rows, down_bias));
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

Gradients ffn_backward(const char* op, const OnDevice& device, const FfnCall& call) {
  check_rows(op, call);
  const auto options = call.x.options();
  const Products products{op, device, call};
  const cuda::GemmContext& context = products.context;
  const auto& wanted = call.wanted;
  const bool weighted = call.weights.defined();
  const cuda::Dtype weights_dtype = weighted ? dtype_of(call.weights) : cuda::Dtype::f32;
  const int32_t* row_assignment =
      weighted ? call.row_assignment.const_data_ptr<int32_t>() : nullptr;
  const cuda::RowMatrix dy = weighted ? gathered(call.upstream, call) : rows_of(call.upstream);
  const cuda::RowMatrix x = gathered(call.x, call);

  Gradients gradients;
  gradients.fill(at::empty({0}, options));

  // dA and what follows from it: dH, w A, and the parts of the routing weights' gradient.
  at::Tensor dh, wa;
  at::Tensor dy_b;  // dy B^T of down_proj's low-rank part
  const bool want_dh =
      wanted[kX] || wanted[kUpProj] || wanted[kUpBias] || wanted[kUpLoraA] || wanted[kUpLoraB];
  const bool want_wa = wanted[kDownProj] || wanted[kDownLoraA] || wanted[kDownLoraB];
  if (want_dh) dh = at::empty({call.rows, call.width}, options);
  if (want_wa) wa = at::empty({call.rows, call.intermediate}, options);
  if (want_dh || want_wa || wanted[kWeights]) {
    dy_b = products.inner(Products::kBackward, dy, call.down_lora_b);
    const at::Tensor down_a =
        factor_beside(call.down_lora_a, call.down_proj.stride(call.out_dim()) == 1);
    cuda::RowsGemm gemm = products.through(Products::kBackward, dy, call.down_proj, dy_b, down_a,
                                           activation(cuda::EpilogueKind::kBackward, call, wa));
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
    products.run(gemm);
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

  at::Tensor dh_b;  // dh B^T of up_proj's low-rank part
  if (wanted[kX] || wanted[kUpLoraA]) {
    dh_b = products.inner(Products::kBackward, rows_of(dh), call.up_lora_b);
  }
  if (wanted[kX]) {
    const at::Tensor dx_rows = at::empty({call.rows, call.hidden}, options);
    const at::Tensor up_a = factor_beside(call.up_lora_a, call.up_proj.stride(call.out_dim()) == 1);
    products.run(products.through(Products::kBackward, rows_of(dh), call.up_proj, dh_b, up_a,
                                  store(dx_rows)));
    gradients[kX] = combine_tokens(op, device, call, dx_rows, {});
  }

  // out_e = sum over e's rows of left right^T, of the shape of `like`.
  const auto weight_gradient = [&](Gradient which, const at::Tensor& like, cuda::RowMatrix left,
                                   cuda::RowMatrix right) {
    gradients[which] = at::empty(like.sizes(), options);
    check_launch(op, cuda::weight_gradient({context, like.size(1), like.size(2), left, right,
                                            gradients[which].mutable_data_ptr()},
                                           device.stream()));
  };
  const auto full_gradient = [&](Gradient which, const at::Tensor& weight, cuda::RowMatrix out_rows,
                                 cuda::RowMatrix in_rows) {
    weight_gradient(which, weight, call.transposed ? in_rows : out_rows,
                    call.transposed ? out_rows : in_rows);
  };
  // Of a factor B, whose rows go with what the factor A makes of `in_rows`.
  const auto second_gradient = [&](Gradient which, const at::Tensor& a, const at::Tensor& b,
                                   cuda::RowMatrix in_rows, cuda::RowMatrix out_rows) {
    const at::Tensor inner = products.inner(Products::kForward, in_rows, a);
    weight_gradient(which, b, rows_of(inner), out_rows);
  };
  if (wanted[kUpProj]) full_gradient(kUpProj, call.up_proj, rows_of(dh), x);
  if (wanted[kDownProj]) full_gradient(kDownProj, call.down_proj, dy, rows_of(wa));
  if (wanted[kUpLoraA]) weight_gradient(kUpLoraA, call.up_lora_a, x, rows_of(dh_b));
  if (wanted[kDownLoraA]) weight_gradient(kDownLoraA, call.down_lora_a, rows_of(wa), rows_of(dy_b));
  if (wanted[kUpLoraB]) {
    second_gradient(kUpLoraB, call.up_lora_a, call.up_lora_b, x, rows_of(dh));
  }
  if (wanted[kDownLoraB]) {
    second_gradient(kDownLoraB, call.down_lora_a, call.down_lora_b, rows_of(wa), dy);
  }

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

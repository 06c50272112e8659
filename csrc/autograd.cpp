// The gradients of the ops, one mechanism for all: what a backward op takes is read off
// its schema, by name. For `rows_op(Tensor x, ...) -> (Tensor rows, Tensor kept)`, the op
// `rows_op_backward(Tensor grad_rows, Tensor x, Tensor kept, ..., bool[1] output_mask)
// -> (Tensor dx)` says that
//
//   grad_rows    is the gradient that arrives for the output `rows`,
//   x, kept      are an input and an output to keep; every other one is let go,
//   output_mask  is filled with which of the gradients are asked for,
//   dx           is the gradient of the input `x`.
//
// An output without a grad_ argument is not differentiable. A backward op has no
// gradient of its own: asking for one raises.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace moe_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

// Where a backward op's argument comes from, or an op's argument or output goes to.
struct Place {
  enum Kind { kGrad, kInput, kOutput, kMask } kind;
  int index;  // among the forward op's arguments or outputs
};

int index_of(const std::vector<c10::Argument>& among, const std::string& name) {
  const auto it = std::find_if(among.begin(), among.end(),
                               [&](const c10::Argument& a) { return a.name() == name; });
  return it == among.end() ? -1 : static_cast<int>(it - among.begin());
}

// What to do with one op. A backward op has a formula too, without a `backward`.
struct Formula {
  std::optional<c10::OperatorHandle> backward;
  std::vector<Place> arguments;      // of `backward`
  std::vector<int> results;          // of `backward`: the input whose gradient each one is
  std::vector<bool> differentiable;  // the op's own outputs

  Formula(const c10::FunctionSchema& op, const char* backward_name)
      : differentiable(op.returns().size(), backward_name == nullptr) {
    if (backward_name == nullptr) return;
    backward = c10::Dispatcher::singleton().findSchemaOrThrow(backward_name, "");
    for (const c10::Argument& argument : backward->schema().arguments()) {
      arguments.push_back(place_of(argument.name(), op));
      if (arguments.back().kind == Place::kGrad) differentiable[arguments.back().index] = true;
    }
    for (const c10::Argument& result : backward->schema().returns()) {
      results.push_back(index_of(op.arguments(), result.name().substr(1)));
      TORCH_INTERNAL_ASSERT(results.back() >= 0, backward_name, " gives ", result.name());
    }
  }

  static Place place_of(const std::string& name, const c10::FunctionSchema& op) {
    if (name == "output_mask") return {Place::kMask, 0};
    // Outputs first: topk_route's `experts` are those of the input, where it was given.
    if (const int i = index_of(op.returns(), name); i >= 0) return {Place::kOutput, i};
    if (const int i = index_of(op.arguments(), name); i >= 0) return {Place::kInput, i};
    const int i = name.rfind("grad_", 0) == 0 ? index_of(op.returns(), name.substr(5)) : -1;
    TORCH_INTERNAL_ASSERT(i >= 0, op.name(), " has nothing for its backward op's ", name);
    return {Place::kGrad, i};
  }
};

// What a call keeps beside its tensors.
struct Kept : torch::CustomClassHolder {
  std::shared_ptr<const Formula> formula;
  std::vector<c10::IValue> arguments;  // those that are no tensors, the others left empty
  std::vector<int> edges;              // by argument: its place among the call's tensors, or -1
  int tensors = 0;
};

c10::IValue optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? c10::IValue(tensor) : c10::IValue();
}

void run_below_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

struct Call : torch::autograd::Function<Call> {
  static constexpr int kUntracked = 4;  // forward's arguments before `tensors`

  // `tensors` are those among the arguments on the stack, `kept->edges` says which.
  static variable_list forward(AutogradContext* ctx, c10::intrusive_ptr<Kept> kept,
                               const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                               Stack* stack, at::TensorList tensors) {
    const Formula& formula = *kept->formula;
    run_below_autograd(op, keys, stack);
    variable_list outputs, constants, saved;
    for (const c10::IValue& output : torch::jit::last(*stack, formula.differentiable.size())) {
      outputs.push_back(output.toTensor());
      if (!formula.differentiable[outputs.size() - 1]) constants.push_back(outputs.back());
    }
    for (const auto [kind, i] : formula.arguments) {
      if (kind == Place::kOutput) saved.push_back(outputs[i]);
      if (kind == Place::kInput && kept->edges[i] >= 0) saved.push_back(tensors[kept->edges[i]]);
    }
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable(constants);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["kept"] = c10::IValue::make_capsule(std::move(kept));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto kept = c10::static_intrusive_pointer_cast<Kept>(ctx->saved_data["kept"].toCapsule());
    const Formula& formula = *kept->formula;
    TORCH_CHECK(formula.backward,
                "moe_ext: the gradient of a gradient (double backward) is not supported");
    variable_list result(kUntracked + kept->tensors);
    const auto defined = [](const at::Tensor& grad) { return grad.defined(); };
    if (std::none_of(grads.begin(), grads.end(), defined)) return result;

    const auto wanted = [&](int input) {
      return kept->edges[input] >= 0 && ctx->needs_input_grad(kept->edges[input]);
    };
    const variable_list saved = ctx->get_saved_variables();
    auto tensor = saved.begin();
    Stack stack;
    for (const auto [kind, i] : formula.arguments) {
      if (kind == Place::kGrad) {
        stack.push_back(optional_tensor(grads[i]));
      } else if (kind == Place::kMask) {
        c10::List<bool> mask;
        for (const int input : formula.results) mask.push_back(wanted(input));
        stack.emplace_back(std::move(mask));
      } else if (kind == Place::kOutput || kept->edges[i] >= 0) {
        stack.emplace_back(*tensor++);
      } else {
        stack.push_back(kept->arguments[i]);
      }
    }
    formula.backward->callBoxed(&stack);
    for (size_t r = 0; r < formula.results.size(); ++r) {
      const int input = formula.results[r];
      if (wanted(input)) result[kUntracked + kept->edges[input]] = stack[r].toTensor();
    }
    return result;
  }
};

bool wants_gradient(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> arguments) {
  bool wanted = false;
  for (const c10::IValue& argument : arguments) {
    if (!argument.isTensor()) continue;
    const at::Tensor& tensor = argument.toTensor();
    TORCH_CHECK(!tensor._fw_grad(/*level=*/0).defined(), schema.name(),
                ": forward-mode AD is not supported: use torch.autograd");
    wanted |= tensor.requires_grad();
  }
  return wanted && at::GradMode::is_enabled();
}

// The kernel of one op for the dispatch key Autograd.
class Differentiable final : public c10::OperatorKernel {
 public:
  explicit Differentiable(const char* backward) : backward_(backward) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const c10::FunctionSchema& schema = op.schema();
    const auto arguments = torch::jit::last(*stack, schema.arguments().size());
    if (!wants_gradient(schema, arguments)) return run_below_autograd(op, keys, stack);

    std::call_once(once_, [&] { formula_ = std::make_shared<Formula>(schema, backward_); });
    auto kept = c10::make_intrusive<Kept>();
    kept->formula = formula_;
    variable_list tensors;
    for (const c10::IValue& argument : arguments) {
      kept->edges.push_back(argument.isTensor() ? kept->tensors++ : -1);
      kept->arguments.push_back(argument.isTensor() ? c10::IValue() : argument);
      if (argument.isTensor()) tensors.push_back(argument.toTensor());
    }
    const variable_list outputs =
        Call::apply(std::move(kept), op, keys, stack, at::TensorList(tensors));
    torch::jit::drop(*stack, outputs.size());
    for (const at::Tensor& output : outputs) stack->emplace_back(output);
  }

 private:
  const char* const backward_;
  std::once_flag once_;
  std::shared_ptr<const Formula> formula_;
};

// The same for an op of inference alone.
class WithoutGradient final : public c10::OperatorKernel {
 public:
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const c10::FunctionSchema& schema = op.schema();
    const auto arguments = torch::jit::last(*stack, schema.arguments().size());
    TORCH_CHECK(!wants_gradient(schema, arguments), schema.name(),
                " has no gradient: call it under torch.no_grad()");
    run_below_autograd(op, keys, stack);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, Autograd, m) {
  constexpr std::pair<const char*, const char*> kGradients[] = {
      {"router_logits", "moe_ext::router_logits_backward"},
      {"topk_route", "moe_ext::topk_route_backward"},
      {"gather_rows", "moe_ext::gather_rows_backward"},
      {"grouped_ffn", "moe_ext::grouped_ffn_backward"},
      {"weighted_combine", "moe_ext::weighted_combine_backward"},
      {"moe_forward", "moe_ext::moe_backward"},
  };
  const auto add = [&](const char* op, const char* backward) {
    m.impl(op, torch::CppFunction::makeFromBoxedKernel(
                   c10::BoxedKernel::makeFromFunctor(std::make_unique<Differentiable>(backward))));
  };
  for (const auto& [op, backward] : kGradients) {
    add(op, backward);
    add(backward, nullptr);
  }
  m.impl("moe_infer", torch::CppFunction::makeFromBoxedKernel(
                          c10::BoxedKernel::makeFromFunctor(std::make_unique<WithoutGradient>())));
}

}  // namespace moe_ext

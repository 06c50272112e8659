// An op's arguments, read off torch's stack in the order of its schema, and its results, put
// there. So what several ops have in common (operands.h) is read by one piece of code, where
// a C++ function's parameters would repeat it in every signature.
//
//   std::array<at::Tensor, 1> scaled(Arguments& args) {
//     const at::Tensor& x = args.tensor("x");
//     return {x * args.number("scale")};
//   }
//   TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("scaled", kernel<&scaled>()); }
//
// Every read names its argument, and is refused where the schema has another one there.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace moe_ext {

class Arguments {
 public:
  Arguments(const c10::FunctionSchema& schema, const torch::jit::Stack& stack)
      : schema_(schema), values_(torch::jit::last(stack, schema.arguments().size())) {}

  // The op's name as its error messages have it.
  const char* op() const {
    const std::string& name = schema_.name();
    return name.c_str() + name.find_last_of(':') + 1;
  }

  // Whether the next argument is the one of that name.
  bool next_is(std::string_view name) const {
    return next_ < values_.size() && schema_.arguments()[next_].name() == name;
  }

  const c10::IValue& value(const char* name) {
    TORCH_INTERNAL_ASSERT(next_is(name), op(), ": argument ", next_, " is not ", name);
    return values_[next_++];
  }
  const at::Tensor& tensor(const char* name) { return value(name).toTensor(); }
  // Undefined for None.
  at::Tensor tensor_or_none(const char* name) {
    const c10::IValue& given = value(name);
    return given.isNone() ? at::Tensor() : given.toTensor();
  }
  std::optional<at::Tensor> optional_tensor(const char* name) {
    return value(name).toOptional<at::Tensor>();
  }
  int64_t integer(const char* name) { return value(name).toInt(); }
  bool flag(const char* name) { return value(name).toBool(); }
  double number(const char* name) { return value(name).toDouble(); }
  std::optional<double> optional_number(const char* name) {
    return value(name).toOptional<double>();
  }
  std::string_view text(const char* name) { return value(name).toStringView(); }
  c10::List<bool> flags(const char* name) { return value(name).toBoolList(); }

  // What `Operands::read` would read, for another op that takes the same.
  template <class Operands>
  c10::ArrayRef<c10::IValue> values_of() {
    const size_t first = next_;
    Operands::read(*this);
    return values_.slice(first, next_ - first);
  }

  bool all_read() const { return next_ == values_.size(); }

 private:
  const c10::FunctionSchema& schema_;
  const c10::ArrayRef<c10::IValue> values_;
  size_t next_ = 0;
};

template <auto function>
void call_with_arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments args(op.schema(), *stack);
  auto results = function(args);
  TORCH_INTERNAL_ASSERT(args.all_read(), args.op(), ": an argument was not read");
  torch::jit::drop(*stack, op.schema().arguments().size());
  std::apply([&](auto&... result) { torch::jit::push(*stack, std::move(result)...); }, results);
}

// `function` takes Arguments& and gives a tuple or an array of tensors.
template <auto function>
torch::CppFunction kernel() {
  return torch::CppFunction::makeFromBoxedFunction<&call_with_arguments<function>>();
}

}  // namespace moe_ext

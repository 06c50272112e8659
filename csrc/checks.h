// Argument checks, shared by every operator on every device. They run before any
// work and never read a tensor's memory, except where the name says so. A wrong
// dtype is a TypeError, a wrong shape, value, name or device a ValueError:
//
//   capacity_scatter: experts must be int32 or int64 of shape (T, K), got float32 (4, 2)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

namespace moe_ext {

// float32, as Python says it (c10 says Float).
inline const char* dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    case at::kShort:
      return "int16";
    case at::kChar:
      return "int8";
    case at::kByte:
      return "uint8";
    case at::kBool:
      return "bool";
    default:
      return c10::toString(dtype);
  }
}

// "float32 (4, 2)", "int64 (3,)", "bool ()"
inline std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) return "None";
  std::ostringstream text;
  text << dtype_name(tensor.scalar_type()) << " (";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline bool is_float(const at::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
         dtype == at::kDouble;
}

inline bool is_index(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong;
}

// The texts `expected...` read on from "must be", and cost nothing until they are
// needed: "int32 of shape (E+1,), with E = ", num_experts.
template <typename... Text>
inline void check_argument(const char* op, const char* name, const at::Tensor& tensor,
                           bool dtype_ok, bool shape_ok, const Text&... expected) {
  TORCH_CHECK_TYPE(dtype_ok, op, ": ", name, " must be ", expected..., ", got ", describe(tensor));
  TORCH_CHECK_VALUE(shape_ok, op, ": ", name, " must be ", expected..., ", got ", describe(tensor));
}

template <typename Got, typename... Text>
inline void check_value(const char* op, const char* name, bool ok, const Got& got,
                        const Text&... expected) {
  TORCH_CHECK_VALUE(ok, op, ": ", name, " must be ", expected..., ", got ", got);
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                              const char* reference_name, const at::Tensor& reference) {
  TORCH_CHECK_VALUE(tensor.device() == reference.device(), op, ": ", name, " must be on ",
                    reference_name, "'s device ", reference.device(), ", got ", tensor.device());
}

// The place of `got` among the known names.
inline int check_name(const char* op, const char* name, std::string_view got,
                      std::initializer_list<std::string_view> known) {
  int place = 0;
  for (const auto candidate : known) {
    if (candidate == got) return place;
    ++place;
  }
  std::ostringstream names;
  for (const auto candidate : known) names << (names.tellp() > 0 ? ", " : "") << candidate;
  TORCH_CHECK_VALUE(false, op, ": ", name, " must be one of ", names.str(), ", got ", got);
}

// A mask of tokens. An integer mask of the other sense is the usual mistake.
inline void check_padding_mask(const char* op, const at::Tensor& mask, int64_t tokens) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, op,
                   ": padding_mask must be bool of shape (T,) = (", tokens,
                   ",), True where a token is padding (attention_mask == 0), got ", describe(mask));
  TORCH_CHECK_VALUE(mask.dim() == 1 && mask.size(0) == tokens, op,
                    ": padding_mask must be bool of shape (T,) = (", tokens, ",), got ",
                    describe(mask));
}

// The parts of a plan, for T tokens and E experts; an op that takes no
// `row_assignment` leaves it out.
inline void check_plan(const char* op, const at::Tensor& expert_offsets,
                       const at::Tensor& row_token, const std::optional<at::Tensor>& row_assignment,
                       const at::Tensor& assignment_row, int64_t tokens, int64_t num_experts) {
  const auto is_int32 = [](const at::Tensor& t) { return t.scalar_type() == at::kInt; };
  check_argument(op, "expert_offsets", expert_offsets, is_int32(expert_offsets),
                 expert_offsets.dim() == 1 && expert_offsets.size(0) == num_experts + 1,
                 "int32 of shape (E+1,), with E = ", num_experts);
  check_argument(op, "assignment_row", assignment_row, is_int32(assignment_row),
                 assignment_row.dim() == 2 && assignment_row.size(0) == tokens,
                 "int32 of shape (T, K), with T = ", tokens);
  check_argument(op, "row_token", row_token, is_int32(row_token),
                 row_token.dim() == 1 && row_token.size(0) <= assignment_row.numel(),
                 "int32 of shape (R,), with R <= T*K = ", assignment_row.numel());
  check_same_device(op, "row_token", row_token, "expert_offsets", expert_offsets);
  check_same_device(op, "assignment_row", assignment_row, "expert_offsets", expert_offsets);
  if (row_assignment) {
    check_argument(op, "row_assignment", *row_assignment, is_int32(*row_assignment),
                   row_assignment->dim() == 1 && row_assignment->size(0) == row_token.size(0),
                   "int32 of shape (R,) like row_token");
    check_same_device(op, "row_assignment", *row_assignment, "expert_offsets", expert_offsets);
  }
}

// Reads a CPU plan's memory: offsets that rise from 0 to at most R, tokens below
// T. Past this, no kernel can leave its arrays. Both tensors contiguous.
inline void check_plan_memory(const char* op, const at::Tensor& expert_offsets,
                              const at::Tensor& row_token, int64_t tokens) {
  const int32_t* offsets = expert_offsets.const_data_ptr<int32_t>();
  const int64_t num_experts = expert_offsets.size(0) - 1;
  bool ok = offsets[0] == 0 && offsets[num_experts] <= row_token.size(0);
  for (int64_t e = 0; e < num_experts; ++e) ok &= offsets[e] <= offsets[e + 1];
  TORCH_CHECK_VALUE(ok, op, ": expert_offsets must rise from 0 to at most R = ", row_token.size(0));
  const int32_t* token = row_token.const_data_ptr<int32_t>();
  for (int64_t r = 0, rows = offsets[num_experts]; r < rows; ++r)
    ok &= token[r] >= 0 && token[r] < tokens;
  TORCH_CHECK_VALUE(ok, op, ": row_token must be in 0..T-1, with T = ", tokens);
}

// Reads a CPU plan's memory: rows, tokens or assignments below `limit`, so that no
// kernel can leave its arrays. Contiguous int32.
inline void check_memory_below(const char* op, const char* name, const at::Tensor& indices,
                               int64_t limit) {
  const int32_t* index = indices.const_data_ptr<int32_t>();
  int32_t largest = -1;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < indices.numel(); ++i) largest = index[i] > largest ? index[i] : largest;
  check_value(op, name, largest < limit, largest, "below ", limit);
}

}  // namespace moe_ext

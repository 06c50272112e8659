// The operands and options that several ops have in common, each written once: in a schema's
// text, and in the struct that reads it off an op's arguments.
#pragma once

#include "arguments.h"

namespace moe_ext {

// clang-format off: the strings are broken where they read best.

// How scores become weights and a choice.
#define ROUTE_OPTIONS                                                     \
  "str score_function=\"softmax\", bool norm_topk_prob=True, "            \
  "float routed_scaling_factor=1.0, int n_group=1, int topk_group=1, "    \
  "str group_score=\"max\""

struct RouteArguments {
  std::string_view score_function;
  bool norm_topk_prob;
  double routed_scaling_factor;
  int64_t n_group, topk_group;
  std::string_view group_score;

  static RouteArguments read(Arguments& args) {
    return {args.text("score_function"),
            args.flag("norm_topk_prob"),
            args.number("routed_scaling_factor"),
            args.integer("n_group"),
            args.integer("topk_group"),
            args.text("group_score")};
  }
};

// What every op that runs experts takes. up_proj is (E, 2I, H), or (E, I, H) when the
// activation has no gate; down_proj is (E, H, I); `transposed` swaps the last two.
#define EXPERT_OPERANDS                                                   \
  "Tensor up_proj, Tensor down_proj, Tensor? up_bias, Tensor? down_bias, "\
  "str activation=\"swiglu\", float? limit=None, float alpha=1.0, "       \
  "float up_offset=0.0, bool transposed=False, bool interleaved=False"

struct ExpertOperands {
  at::Tensor up_proj, down_proj;
  at::Tensor up_bias, down_bias;  // undefined where there is none
  std::string_view activation;
  std::optional<double> limit;
  double alpha, up_offset;
  bool transposed, interleaved;

  static ExpertOperands read(Arguments& args) {
    return {args.tensor("up_proj"),
            args.tensor("down_proj"),
            args.tensor_or_none("up_bias"),
            args.tensor_or_none("down_bias"),
            args.text("activation"),
            args.optional_number("limit"),
            args.number("alpha"),
            args.number("up_offset"),
            args.flag("transposed"),
            args.flag("interleaved")};
  }
};

// clang-format on

}  // namespace moe_ext

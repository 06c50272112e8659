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
// activation has no gate; down_proj is (E, H, I); `transposed` swaps the last two. LoRA's
// factors are (E, in, r) and (E, r, out), whichever way the matrix lies that they add to, and
// B holds the scale: x W_e + (x A_e) B_e.
#define EXPERT_OPERANDS                                                   \
  "Tensor up_proj, Tensor down_proj, Tensor? up_bias, Tensor? down_bias, "\
  "Tensor? up_lora_a=None, Tensor? up_lora_b=None, "                      \
  "Tensor? down_lora_a=None, Tensor? down_lora_b=None, "                  \
  "str activation=\"swiglu\", float? limit=None, float alpha=1.0, "       \
  "float up_offset=0.0, bool transposed=False, bool interleaved=False"

struct ExpertOperands {
  at::Tensor up_proj, down_proj;
  at::Tensor up_bias, down_bias;  // undefined where there is none, as are the factors
  at::Tensor up_lora_a, up_lora_b, down_lora_a, down_lora_b;
  std::string_view activation;
  std::optional<double> limit;
  double alpha, up_offset;
  bool transposed, interleaved;

  // In the order of EXPERT_GRADIENTS.
  std::array<const at::Tensor*, 8> tensors() const {
    return {&up_proj,   &down_proj, &up_bias,     &down_bias,
            &up_lora_a, &up_lora_b, &down_lora_a, &down_lora_b};
  }

  static ExpertOperands read(Arguments& args) {
    return {args.tensor("up_proj"),
            args.tensor("down_proj"),
            args.tensor_or_none("up_bias"),
            args.tensor_or_none("down_bias"),
            args.tensor_or_none("up_lora_a"),
            args.tensor_or_none("up_lora_b"),
            args.tensor_or_none("down_lora_a"),
            args.tensor_or_none("down_lora_b"),
            args.text("activation"),
            args.optional_number("limit"),
            args.number("alpha"),
            args.number("up_offset"),
            args.flag("transposed"),
            args.flag("interleaved")};
  }
};

// What a backward op gives for them: the end of its results.
#define EXPERT_GRADIENTS                                                  \
  "Tensor dup_proj, Tensor ddown_proj, Tensor dup_bias, Tensor ddown_bias, "\
  "Tensor dup_lora_a, Tensor dup_lora_b, Tensor ddown_lora_a, Tensor ddown_lora_b"

// clang-format on

// The gradients of moe_forward's inputs, in the order of its backward op.
enum Gradient {
  kX,
  kWeights,
  kUpProj,
  kDownProj,
  kUpBias,
  kDownBias,
  kUpLoraA,
  kUpLoraB,
  kDownLoraA,
  kDownLoraB,
  kGradients
};
using Gradients = std::array<at::Tensor, kGradients>;

// grouped_ffn has no routing weights.
using GradientsOfRows = std::array<at::Tensor, kGradients - 1>;
inline GradientsOfRows without_weights(const Gradients& gradients) {
  GradientsOfRows rest;
  for (int g = 0; g < kGradients - 1; ++g) rest[g] = gradients[g < kWeights ? g : g + 1];
  return rest;
}

}  // namespace moe_ext

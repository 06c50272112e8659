// Every operator of moe_ext, on one page; what several have in common is in operands.h. An
// implementation registers itself in its stage's file (csrc/cpu/<stage>.cpp,
// csrc/cuda/<stage>.cpp); fakes are in moe_ext/_ops.py, gradients in autograd.cpp;
// moe_ext/functional.py is the public face and documents arguments and results.
//
// T tokens, H hidden size, I intermediate size, E experts, K top_k,
// R = min(T*K, E*C*num_sequences) rows. The plan is
//   expert_offsets (E+1), row_token (R), row_assignment (R),
//   assignment_row (T, K), expert_counts (E), all int32.
// A backward op takes one bool an output; an output that is masked out comes
// back as an empty tensor of shape (0).

#include <torch/library.h>

#include "operands.h"

// clang-format off: the strings are broken where they read best.

TORCH_LIBRARY(moe_ext, m) {
  // ---- router_logits: x (T, H), weight (E, H), bias (E) -> logits (T, E) float32.
  //      Backward: dx and dweight in their tensors' dtypes, dbias in the logits'.
  m.def("router_logits(Tensor x, Tensor weight, Tensor? bias=None) -> (Tensor logits)");
  m.def(
      "router_logits_backward(Tensor grad_logits, Tensor x, Tensor weight, bool[3] output_mask)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");

  // ---- topk_route: logits (T, E) -> weights (T, K), experts (T, K) int32,
  //      counts (E) int32, score_sums (E), logsumexp (T).
  //      `experts` replays a recorded choice instead of choosing.
  m.def(
      "topk_route(Tensor logits, int top_k, Tensor? selection_bias=None, Tensor? padding_mask=None,"
      " Tensor? experts=None, " ROUTE_OPTIONS ")"
      " -> (Tensor weights, Tensor experts, Tensor counts, Tensor score_sums, Tensor logsumexp)");
  m.def(
      "topk_route_backward(Tensor? grad_weights, Tensor? grad_score_sums, Tensor? grad_logsumexp,"
      " Tensor logits, Tensor experts, Tensor? padding_mask, str score_function, bool norm_topk_prob,"
      " float routed_scaling_factor) -> (Tensor dlogits)");

  // ---- capacity_scatter: experts (T, K) -> the plan
  m.def(
      "capacity_scatter(Tensor experts, SymInt num_experts, SymInt? capacity=None,"
      " Tensor? weights=None, Tensor? padding_mask=None, str drop_policy=\"token\","
      " SymInt num_sequences=1) -> (Tensor expert_offsets, Tensor row_token, Tensor row_assignment,"
      " Tensor assignment_row, Tensor expert_counts)");

  // ---- gather_rows: x (T, H) -> rows (R, H), for rows that travel (expert parallelism);
  //      grouped_ffn gathers by itself. Backward: dx (T, H).
  m.def("gather_rows(Tensor x, Tensor row_token, Tensor assignment_row) -> (Tensor rows)");
  m.def("gather_rows_backward(Tensor grad_rows, Tensor assignment_row) -> (Tensor dx)");

  // ---- grouped_ffn: x (T, H) -> rows (R, H), preactivations (R, 2I or I)
  m.def(
      "grouped_ffn(Tensor x, Tensor expert_offsets, Tensor row_token, Tensor assignment_row, "
      EXPERT_OPERANDS
      ", bool keep_preactivations=True, bool batch_invariant=False)"
      " -> (Tensor rows, Tensor preactivations)");
  m.def(
      "grouped_ffn_backward(Tensor grad_rows, Tensor x, Tensor preactivations,"
      " Tensor expert_offsets, Tensor row_token, Tensor assignment_row, "
      EXPERT_OPERANDS
      ", *, bool[9] output_mask) -> (Tensor dx, " EXPERT_GRADIENTS ")");

  // ---- weighted_combine: rows (R, H), weights (T, K) -> (T, H)
  m.def(
      "weighted_combine(Tensor rows, Tensor weights, Tensor row_assignment, Tensor assignment_row)"
      " -> (Tensor y)");
  m.def(
      "weighted_combine_backward(Tensor grad_y, Tensor rows, Tensor weights, Tensor row_assignment,"
      " Tensor assignment_row, bool[2] output_mask) -> (Tensor drows, Tensor dweights)");

  // ---- moe_forward: grouped_ffn and weighted_combine in one, keeping
  //      only x and the preactivations -> y (T, H), preactivations (R, 2I or I)
  m.def(
      "moe_forward(Tensor x, Tensor weights, Tensor expert_offsets, Tensor row_token,"
      " Tensor row_assignment, Tensor assignment_row, " EXPERT_OPERANDS
      ", bool keep_preactivations=True, bool batch_invariant=False)"
      " -> (Tensor y, Tensor preactivations)");
  m.def(
      "moe_backward(Tensor grad_y, Tensor x, Tensor weights, Tensor preactivations,"
      " Tensor expert_offsets, Tensor row_token, Tensor row_assignment, Tensor assignment_row, "
      EXPERT_OPERANDS
      ", *, bool[10] output_mask) -> (Tensor dx, Tensor dweights, " EXPERT_GRADIENTS ")");

  // ---- accumulate_stats: adds one forward's routing to running sums; nothing while a
  //      backward pass runs, so that a recomputed forward counts once.
  //      counts, step_counts (E) int64, score_sums (E) float64, totals (7) float64:
  //      tokens, assignments, dropped assignments, tokens that lost all of theirs,
  //      sum of the tokens' entropies (nats), largest logit, forwards.
  m.def(
      "accumulate_stats(Tensor(a!) counts, Tensor(b!) score_sums, Tensor(c!) totals,"
      " Tensor(d!)? step_counts, Tensor logits, Tensor experts, Tensor expert_counts,"
      " Tensor route_score_sums, Tensor? assignment_row=None, Tensor? padding_mask=None,"
      " str score_function=\"softmax\") -> ()");

  // ---- moe_infer: a layer's inference, logits to output: x (..., H) and, where given, its
  //      padding_mask (...) -> y (..., H). No gradient. The sums are accumulate_stats'.
  m.def(
      "moe_infer(Tensor x, Tensor gate_weight, Tensor? gate_bias, Tensor(a!) counts,"
      " Tensor(b!) score_sums, Tensor(c!) totals, int top_k, " EXPERT_OPERANDS
      ", Tensor? selection_bias=None, Tensor? padding_mask=None, " ROUTE_OPTIONS
      ", SymInt? capacity=None, str drop_policy=\"token\", SymInt num_sequences=1,"
      " bool batch_invariant=False) -> (Tensor y)");
}

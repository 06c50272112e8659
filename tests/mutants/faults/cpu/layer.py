"""What is around the stages: the layer, its losses and statistics, autograd."""

from mutants.fault import collection

FAULTS, faults = collection()

# ---- the layer -------------------------------------------------------------------------------

fault = faults("moe_ext/moe.py")
fault(
    "the shared experts answer to padding",
    "if padding_mask is not None:\n            shared = shared",
    "if padding_mask is None:\n            shared = shared",
    "tests/test_moe.py::test_padding_is_as_if_the_tokens_were_not_there",
)
fault = faults("moe_ext/losses.py")
fault(
    "losses are injected in eval too",
    "        layer.training\n        and config.inject_losses",
    "        config.inject_losses",
    "tests/test_losses.py::test_nothing_is_injected_in_eval_or_without_gradients",
)
fault = faults("moe_ext/config.py")
fault(
    "a sequence's capacity comes from the whole batch",
    "tokens, num_sequences = shape[-2], max(",
    "tokens, num_sequences = math.prod(shape[:-1]), max(",
    "tests/test_moe.py::test_every_option_as_written_out",
)
fault(
    "capacity is rounded down",
    "rows = -(-(tokens * numerator * self.router.top_k) // denominator)",
    "rows = tokens * numerator * self.router.top_k // denominator",
    "tests/test_moe.py::test_capacity",
)
fault(
    "training takes the factor of evaluation",
    "self._ratios[1 if training else 0]",
    "self._ratios[0]",
    "tests/test_moe.py::test_capacity",
)

fault = faults("moe_ext/training.py")
fault(
    "loss-free balancing moves the bias towards the load",
    "torch.sign(n.mean() - n)",
    "torch.sign(n - n.mean())",
    "tests/test_stats.py::test_update_moves_the_bias_against_the_load",
)
fault = faults("moe_ext/routing.py")
fault(
    "the selection bias is not used",
    "selection_bias=self.float32_bias()",
    "selection_bias=None",
    "tests/integrations/test_transformers.py::test_deepseek_v3_bias_changes_the_choice",
)

# ---- inference in one op ---------------------------------------------------------------------

fault = faults("moe_ext/inference.py", "tests/test_inference.py", "tests/test_moe_infer.py")
fault(
    "a layer in training is taken for inference",
    "if layer.training or BACKEND",
    "if BACKEND",
)
fault(
    "forward hooks are passed over",
    'own["_forward_hooks"]\n        or ',
    "",
)
fault(
    "a forward of its own is passed over",
    """        or "forward" in own\n""",
    "",
)
fault(
    "frozen experts are enough to need no gradient",
    "functional._needs_gradient(x, *tensors)",
    "functional._needs_gradient(x, *tensors[3:])",
)
fault(
    "autocast is passed over",
    " or torch.is_autocast_enabled(x.device.type)",
    "",
)
fault(
    "batch invariance is forgotten",
    "functional._batch_invariant,",
    "False,",
)
fault(
    "tensor subclasses are passed over",
    "if tensor is not None and type(tensor) not in _PLAIN",
    "if False",
)

fault = faults("csrc/moe_infer.cpp", "tests/test_moe_infer.py")
fault(
    "the gate's bias is not used",
    "tokens, gate_weight, gate_bias)",
    "tokens, gate_weight, none)",
)
fault(
    "statistics count padding",
    "assignment_row, mask, score_function",
    "assignment_row, none, score_function",
)
fault(
    "a float64 router's weights go to the experts as they are",
    "x.scalar_type() == at::kDouble ? w ",
    "true ? w ",
)

# ---- losses ----------------------------------------------------------------------------------

fault = faults("moe_ext/losses.py", "tests/test_losses.py")
fault(
    "the balance loss is not divided by top_k",
    "/ (tokens * top_k)",
    "/ tokens",
)
fault(
    "the injected gradient ignores the loss scale",
    "per_token = scale.to(logsumexp) / tokens",
    "per_token = torch.ones_like(scale).to(logsumexp) / tokens",
)
fault(
    "the injected balance loss is not divided by top_k",
    "aux_coef * counts.shape[0] / ctx.top_k",
    "aux_coef * counts.shape[0]",
)
fault(
    "the injected z-loss has half its gradient",
    "per_token * (2 * z_coef)",
    "per_token * z_coef",
)
fault(
    "the z-loss counts padding",
    "logits.logsumexp(-1).masked_fill(padding_mask, 0)",
    "logits.logsumexp(-1)",
)

# ---- statistics ------------------------------------------------------------------------------

fault = faults(
    "csrc/cpu/accumulate_stats.cpp",
    "tests/test_stats.py",
    "tests/test_accumulate_stats.py",
    "tests/test_checkpoint.py",
)
fault(
    "a recomputed forward counts again",
    "if (is_recomputation()) return;",
    "",
)
fault(
    "padding counts as tokens",
    "if (padding && padding[t]) continue;",
    "",
)
fault(
    "a token that kept one of two assignments counts as lost",
    "assigned > 0 && kept == 0",
    "assigned > kept",
)

fault = faults("moe_ext/stats.py", "tests/test_stats.py")
fault(
    "MaxVio is the load over the mean, without the minus 1",
    "* num_experts / assignments - 1 if assignments",
    "* num_experts / assignments if assignments",
)

# ---- autograd wiring -------------------------------------------------------------------------

fault = faults("csrc/autograd.cpp")
fault(
    "a checkpointed forward pass is recomputed without autograd",
    "const variable_list saved = ctx->get_saved_variables();",
    "const at::AutoDispatchBelowAutograd below;\n"
    "    const variable_list saved = ctx->get_saved_variables();",
    "tests/test_checkpoint.py::test_checkpointing_changes_nothing",
)
fault(
    "frozen experts cost their gradient",
    "mask.push_back(wanted(input))",
    "mask.push_back(kept->edges[input] >= 0)",
    "tests/test_grouped_ffn.py::TestOperator::test_only_needed_gradients",
)
fault(
    "the output is kept for the backward pass",
    "ctx->save_for_backward(std::move(saved));",
    "saved.push_back(outputs[0]);\n    ctx->save_for_backward(std::move(saved));",
    "tests/test_moe_forward.py::TestOperator::test_bytes_kept_for_backward",
)
fault(
    "a gradient goes to another input",
    "stack[r].toTensor()",
    "stack[r ^ 1].toTensor()",
    "tests/test_weighted_combine.py",
)
fault(
    "forward-mode AD gives a silent zero",
    "!tensor._fw_grad(/*level=*/0).defined()",
    "true",
    "tests/test_moe.py::test_unsupported_derivatives_raise",
)

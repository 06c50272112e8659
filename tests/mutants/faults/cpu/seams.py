"""Where the layer meets other software: state, wrappers, options, masks, helpers."""

from mutants.fault import collection

FAULTS, faults = collection()

# ---- state, and who reads parameters ---------------------------------------------------------

fault = faults("moe_ext/stats.py", "tests/test_wrappers.py")
fault(
    "state begins on the meta device",
    'return "cpu" if device.type == "meta" else device',
    "return device",
)
fault = faults("moe_ext/moe.py", "tests/test_wrappers.py")
fault(
    "the loss scale has the default dtype",
    "torch.ones((), dtype=torch.float64, device=home(device))",
    "torch.ones((), device=home(device))",
)
fault = faults("moe_ext/routing.py", "tests/test_wrappers.py")
fault(
    "a selection bias keeps the dtype that it was given",
    "if bias is not None and bias.dtype != torch.float32:",
    "if False:",
)
fault = faults("moe_ext/inference.py", "tests/integrations/test_health.py")
fault("an inference is not told to those who watch", "layer._routing_watchers or ", "")
fault = faults("moe_ext/groups.py", "tests/test_groups.py")
fault(
    "the stages of a pipeline sum their counts",
    "if all(layers == mine for layers in everyones):",
    "if True:",
)

# ---- options ---------------------------------------------------------------------------------

fault = faults("moe_ext/options.py", "tests/test_options.py", "tests/test_config.py")
fault(
    "the router keeps the config that it was built with",
    "    layer._settings.config = config\n",
    "    layer._settings = type(layer._settings)(config)\n",
)
fault(
    "a config may have other parameters than the layer",
    "        if option(config, name) != option(before, name):",
    "        if False:",
)
fault(
    "a rate set later has no counts",
    "        layer._stats.count_steps()\n",
    "",
)
fault = faults("moe_ext/option_groups.py", "tests/test_options.py", "tests/test_config.py")
fault(
    "an option set later is not checked",
    'self._put(name, check("MoE", name, getattr(self, name), **limits))',
    "pass",
)
fault = faults("moe_ext/config.py", "tests/test_options.py", "tests/test_config.py")
fault(
    "a capacity factor set later is forgotten",
    "return dataclasses.replace(self, **changes)",
    'return dataclasses.replace(self, **{**changes, "capacity": self.capacity})',
)
fault(
    "a field of the activation resets the others",
    "whole._replace(**of_activation)",
    "Activation(**of_activation)",
)
fault("a later version is read as if it were ours", ") > VERSION:", ") > VERSION + 9:")

# ---- padding and losses ----------------------------------------------------------------------

fault = faults("moe_ext/moe.py", "tests/test_moe.py")
fault(
    "what padding holds reaches the gradients",
    "tokens = tokens.masked_fill(padding_mask[:, None], 0)",
    "pass",
)
fault = faults("moe_ext/_masks.py", "tests/test_masking.py")
fault(
    "the mask of a part is for all layers", "if layers is None or id(layer) in layers:", "if True:"
)
fault(
    "an outer mask goes before an inner one",
    "masks = ((mask, layers), *outer)",
    "masks = (*outer, (mask, layers))",
)
fault = faults("moe_ext/losses.py", "tests/test_losses.py")
fault(
    "padding's logits reach the balance loss",
    "layer_logits = layer_logits.masked_fill(~present[:, None], 0)",
    "pass",
)
fault(
    "every step counts as accumulation",
    "layer._step_seen == before and not recomputed",
    "not recomputed",
)
fault(
    "accumulation is not told",
    "return weight.grad is not None and",
    "return weight.grad is None and",
)

# ---- dense layers ----------------------------------------------------------------------------

fault = faults("moe_ext/dense.py", "tests/test_replace.py")
fault("the first of several activations is taken", "if len(fitting) == 1:", "if fitting:")
fault(
    "a clamped activation passes for its neighbour",
    "SCALES = (2.0, 50.0, 2000.0)",
    "SCALES = (2.0,)",
)
fault("the user's hooks see the trial", "        hooks.clear()\n", "        pass\n")

# ---- checkpoints and adapters ----------------------------------------------------------------

fault = faults("moe_ext/pretrained.py", "tests/test_pretrained.py")
fault(
    "the scales' exponents are taken for numbers",
    "value = torch.ldexp(torch.ones(exponent.shape), exponent.to(torch.int32) - 127)",
    "value = exponent.float()",
)
fault = faults("moe_ext/integrations/transformers/lora.py", "tests/integrations/test_lora.py")
fault(
    "every rank takes the factors of the first experts",
    'start = count * mesh.get_local_rank("ep" if "ep" in names else 0)',
    "start = 0",
)

# ---- helpers ---------------------------------------------------------------------------------

fault = faults("moe_ext/parameters.py", "tests/test_parameters.py")
fault("the experts' biases decay", ' or name.endswith("bias")', "")
fault("routers decay", " or parameter in kept", "")
fault("gate and up are one matrix", "parts = [slice(0, half), slice(half, None)]", "pass")
fault(
    "a matrix is that of the transposed expert",
    "stack[expert].t() if transposed",
    "stack[expert] if transposed",
)
fault("all experts are active", "r.top_k / r.num_experts", "1.0")
fault = faults("moe_ext/flops.py", "tests/test_flops.py")
fault("what is frozen costs FLOPs", "(up + up_a) * dx + up * dup", "(up + up_a) * dx + up")

# ---- edges -----------------------------------------------------------------------------------

fault = faults("csrc/cpu/kernels/topk_route.inl", "tests/test_edges.py")
fault(
    "softmax_topk chooses among scores that underflow",
    "(o.by_logits ? row.logits : row.scores)",
    "row.scores",
)
fault = faults("moe_ext/config.py", "tests/test_edges.py")
fault(
    "one token alone has no sequence",
    "shape = (1, *shape)[-max(len(shape), 2) :]",
    "shape = (*shape,)",
)

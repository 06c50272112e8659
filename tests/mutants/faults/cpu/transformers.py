"""Published models: checkpoints, blocks, the health of their routing."""

from mutants.fault import collection

FAULTS, faults = collection()

# ---- checkpoints -----------------------------------------------------------------------------

fault = faults("moe_ext/pretrained.py", "tests/test_pretrained.py")
fault(
    "gate and up are exchanged, in both directions",
    '("gate", view[:, 0], "e i h"), ("up", view[:, 1], "e i h")',
    '("gate", view[:, 1], "e i h"), ("up", view[:, 0], "e i h")',
)
fault(
    "interleaved experts are read as halves",
    "both = both.transpose(1, 2) if interleaved else both",
    "both = tensor.unflatten(1, (2, -1))",
)
fault(
    "axes stay in our order",
    'view = view.permute([axes.split().index(axis) for axis in re.findall(r"\\w", theirs)])',
    "view = view.contiguous()",
)
fault(
    "a scale counts for every n-th element instead of a block",
    "blocks = [(n, size // n)",
    "blocks = [(size // n, n)",
)
fault("a float32 router is rounded", "if dtype is None:  # a router", "if False:  # a router")
fault("what is left over goes unnoticed", "    if rest:", "    if rest and not prefix:")
fault("the first of several layers is taken", "if len(found) == 1:", "if found:")

# ---- blocks of transformers ------------------------------------------------------------------

BLOCKS = "moe_ext/integrations/transformers/blocks"
BLOCK_TESTS = "tests/integrations/test_blocks.py"

fault = faults(f"{BLOCKS}/base.py", BLOCK_TESTS)
fault(
    "frozen experts are trained",
    "nn.Parameter(stack, theirs[part].requires_grad)",
    "nn.Parameter(stack)",
)
fault("dropout also when evaluating", "if self.training and p > 0:", "if p > 0:")
fault("no dropout within experts", "if self.training and p > 0:", "if False:")
fault(
    "the weights of before come back",
    "theirs[part].copy_(view.reshape(theirs[part].shape))",
    "theirs[part].zero_()",
)
fault("half frozen experts become one parameter", "if 0 < len(frozen) < len(parts):", "if False:")
fault("a stack loads in silence without a part", "missing += absent", "pass")
fault("what is saved has the shapes of ours", "view.reshape(shapes[part]) for", "view for")
fault = faults(f"{BLOCKS}/switch_transformers.py", BLOCK_TESTS)
fault(
    "dropped tokens go to expert 0",
    "torch.where(dropped, self.num_experts, ",
    "torch.where(dropped, 0, ",
)
fault = faults(f"{BLOCKS}/nllb_moe.py", BLOCK_TESTS)
fault("token dropout is forgotten when evaluating", "weights * (1 - p))", "weights)")
fault(
    "first and second choice are exchanged",
    "(router_mask, 1 - router_mask), 1)",
    "(1 - router_mask, router_mask), 1)",
)
fault = faults(f"{BLOCKS}/dbrx.py", BLOCK_TESTS)
fault("gate and up are exchanged", '"mlp.w1": gate, "mlp.v1": up', '"mlp.w1": up, "mlp.v1": gate')
fault = faults(f"{BLOCKS}/jetmoe.py", BLOCK_TESTS)
fault("the block's bias is forgotten", "weights) + self.bias", "weights)")
fault(
    "softmax over all experts",
    "torch.softmax(top_k_logits, dim=1)",
    "torch.softmax(logits, dim=1).gather(1, top_k_index)",
)
fault = faults(f"{BLOCKS}/llama4.py", BLOCK_TESTS)
fault(
    "the score scales what comes out",
    "(tokens[:, None] * scores[..., None]).flatten(0, 1)",
    "tokens[:, None].expand(*scores.shape, -1).flatten(0, 1)",
)
fault = faults(f"{BLOCKS}/longcat_flash.py", BLOCK_TESTS)
fault(
    "identity experts give nothing",
    "return routed + (hidden_states * identity).to(routed.dtype)",
    "return routed",
)
fault = faults(f"{BLOCKS}/step3p7.py", BLOCK_TESTS)
fault(
    "no layer is clamped",
    "if module.limit == math.inf else ClampedExperts",
    "if module.limit else ClampedExperts",
)
fault = faults(f"{BLOCKS}/__init__.py", BLOCK_TESTS)
fault(
    "some blocks are replaced before another is refused",
    "        _check(name, module, ours)\n    checkpoints.install()\n    for module, ours in chosen.values():\n",
    "        _check(name, module, ours)\n        checkpoints.install()\n",
)

# ---- models of transformers with MoE layers: saved, loaded -----------------------------------

SAVING_TESTS = "tests/integrations/test_saving.py"

fault = faults("moe_ext/replace.py", SAVING_TESTS)
fault("replaced, but not recorded", "    _record(model)\n    return places", "    return places")
fault = faults("moe_ext/config.py", SAVING_TESTS)
fault(
    "the router's dtype is lost",
    'getattr(torch, values["router_dtype"], values["router_dtype"])',
    "None",
)
fault = faults("moe_ext/integrations/transformers/saving.py", SAVING_TESTS)
fault(
    "a model without its head has other names",
    "in (name, name.removeprefix(prefix), prefix + name):",
    "in (name, prefix + name):",
)
fault(
    "what changed since replace_ffn is not saved",
    "_first(record, PreTrainedModel.save_pretrained)",
    "PreTrainedModel.save_pretrained",
)
fault("what is dense again is built as an MoE", "    elif hasattr(config, KEY):", "    elif False:")

fault = faults("moe_ext/integrations/transformers/mixtral.py", SAVING_TESTS)
fault("what Mixtral lacks is exported", "if found[name] != value:", "if False:")
fault("Mixtral's own default of experts", 'num_experts_per_tok=sizes["top_k"],', "")
fault(
    "its own defaults of the rest too",
    "for name, value in llama.to_dict().items() if name in known}",
    "for name, value in llama.to_dict().items() if name in known and name != 'rope_parameters'}",
)

# ---- a Trainer that resumes ------------------------------------------------------------------

fault = faults(
    "moe_ext/integrations/transformers/resuming.py", "tests/integrations/test_resuming.py"
)
fault(
    "experts stay at random",
    "if renamed and isinstance(self.model, PreTrainedModel):",
    "if False:",
)
fault(
    "those of the best checkpoint too",
    "_converting(Trainer._load_best_model)",
    "Trainer._load_best_model",
)
fault("values just drawn count as loaded", " if name not in drawn}", "}")
fault("float32 routers are rounded", "functools.reduce(torch.promote_types, dtypes)", "model.dtype")
fault(
    "a checkpoint without the experts passes", "if missing := set(", "if missing := set() and set("
)

# ---- routing health --------------------------------------------------------------------------

fault = faults(
    "moe_ext/integrations/transformers/observing.py", "tests/integrations/test_health.py"
)
fault(
    "sentinels count for the last expert",
    "clamp(max=num_experts)",
    "clamp(max=num_experts - 1)",
)
fault("drops are not counted", 'if getattr(experts, "sentinels_are_drops", False):', "if False:")
fault(
    "evaluation moves the biases",
    "counting(watchers, experts.training)",
    "counting(watchers, True)",
)
fault = faults("moe_ext/integrations/transformers/health.py", "tests/integrations/test_health.py")
fault(
    "a second watcher takes the first one's place", "watchers.append(pair)", "watchers[:] = [pair]"
)
fault("a NaN is the best entropy for ever", "if math.isfinite(entropy):", "if True:")
fault(
    "a NaN goes unsaid",
    "if not (math.isfinite(entropy) and",
    "if False and not (math.isfinite(entropy) and",
)
fault("warns again", "self.warned.add((name, problem))", "pass")
fault("warns of a handful of tokens", "< 32 * len(", "< 0 * len(")
fault("a drop rate that is high from the start rises", 'drops > 2 * best["drop_rate"]', "drops > 0")
fault = faults("moe_ext/integrations/transformers/trainer.py", "tests/integrations/test_health.py")
fault(
    "logs of an evaluation have the numbers of training",
    'any(key.startswith("eval_") for key in logs)',
    "False",
)
fault("accumulation multiplies the losses", "scale / args.gradient_accumulation_steps", "scale")
fault("trackers get no numbers", "if isinstance(callback, RoutingCallback):", "if False:")
fault = faults("moe_ext/stats.py", "tests/integrations/test_health.py::test_sums_over_ranks")
fault(
    "the largest logit is summed over ranks",
    "            total[MAX_LOGIT] = maximum\n",
    "            pass\n",
)
fault = faults("moe_ext/training.py", "tests/integrations/test_health.py::test_sums_over_ranks")
fault(
    "every rank moves its biases by itself",
    "    if reduce:\n        dist.all_reduce(counts",
    "    if False:\n        dist.all_reduce(counts",
)

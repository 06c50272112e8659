"""An upcycled Llama as a Mixtral, which transformers and serving engines load without moe_ext."""

import os
from typing import Any

import transformers  # its models are imported when they are asked for

from ..._checks import describe
from ...moe import MoE

OP = "export_mixtral"


def export_mixtral(
    model: transformers.LlamaForCausalLM, folder: str | os.PathLike, **options: Any
) -> None:
    """Writes a LlamaForCausalLM whose FFNs are `MoE` layers as a Mixtral checkpoint.

        moe_ext.replace_ffn(llama, num_experts=8, top_k=2)
        ...                                     # train
        export_mixtral(llama, folder)
        MixtralForCausalLM.from_pretrained(folder)

    What is loaded computes what the model does in eval mode, within rounding. What counts in
    training alone (capacity_factor, losses, jitter) is left out. The model stays as it is; the
    experts are copied once on the way.

    Args:
        model: every layer's `mlp` is an `MoE` of one size: swiglu without biases, dropless in
            eval, weights from softmax that sum to 1.
        folder: of the checkpoint; made if need be.
        **options: of transformers' save_pretrained (max_shard_size="5GB").

    Raises:
        TypeError: model is no LlamaForCausalLM.
        ValueError: it has what Mixtral does not; nothing is written.
    """
    if not isinstance(model, transformers.LlamaForCausalLM):
        raise TypeError(f"{OP}: model must be a LlamaForCausalLM, got {describe(model)}")
    layers = [layer.mlp for layer in model.model.layers]
    config = _config(model.config, layers)
    state_dict = {name: t for name, t in model.state_dict().items() if ".mlp." not in name}
    for number, layer in enumerate(layers):
        state_dict |= layer.export_state_dict("mixtral", number)
    mixtral = transformers.MixtralForCausalLM.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=model.dtype
    )
    mixtral.generation_config = model.generation_config
    mixtral.save_pretrained(folder, **options)


# What an `MoE` must have to compute what a Mixtral's block does in eval mode.
_REQUIRED = dict(
    activation="swiglu", limit=None, alpha=1.0, up_offset=0.0, bias=False, gate_bias=False,
    score_correction_bias=False, shared_expert_intermediate_size=0, routed_scaling_factor=1.0,
    n_group=1, eval_capacity_factor=None, expert_capacity=None,
)  # fmt: skip
_SIZES = ("intermediate_size", "num_experts", "top_k")


def _config(llama, layers):
    """Its MixtralConfig; ValueError where Mixtral cannot hold the model."""
    if llama.attention_bias:
        raise ValueError(f"{OP}: attention_bias must be False, Mixtral's attention has none")
    sizes = {}
    for number, layer in enumerate(layers):
        where = f"{OP}: layers.{number}.mlp"
        if not isinstance(layer, MoE):
            raise ValueError(
                f"{where} must be a moe_ext.MoE, since all layers of a Mixtral have experts, got"
                f" {describe(layer)}"
            )
        found = layer.config.options()
        for name, value in _REQUIRED.items():
            if found[name] != value:
                raise ValueError(f"{where}: {name} must be {value!r}, got {found[name]!r}")
        sums_to_one = found["score_function"] == "softmax_topk" or (
            found["score_function"] == "softmax" and found["norm_topk_prob"]
        )
        if not sums_to_one:
            raise ValueError(
                f"{where}: score_function must be 'softmax' with norm_topk_prob=True, or"
                f" 'softmax_topk', got {found['score_function']!r} and {found['norm_topk_prob']}"
            )
        for name in _SIZES:
            if sizes.setdefault(name, found[name]) != found[name]:
                raise ValueError(
                    f"{where}: {name} must be that of all layers, {sizes[name]}, got {found[name]}"
                )
    known = transformers.MixtralConfig().to_dict().keys() - {"model_type", "architectures"}
    shared = {name: value for name, value in llama.to_dict().items() if name in known}
    return transformers.MixtralConfig(
        **shared
        | dict(
            intermediate_size=sizes["intermediate_size"],
            num_local_experts=sizes["num_experts"],
            num_experts_per_tok=sizes["top_k"],
            hidden_act="silu",
            sliding_window=None,
        )
    )

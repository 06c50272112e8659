"""A tiny random model for every experts class of the installed transformers.

names()      every class that `use_experts_implementation` decorates, found in the files
build(name)  the smallest text model of its file that has such experts
"""

import ast
import dataclasses
import importlib
import pathlib

import torch
import transformers

from support.oracle import unit

MODELS = pathlib.Path(transformers.__file__).parent / "models"

# Whatever a config has of these is set to them. Two layers, the first of full attention.
SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, head_dim=8, max_position_embeddings=64,
    initializer_range=0.2, attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    # experts
    num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8,
    num_experts_per_tok=2, moe_topk=2, moe_k=2, top_k_experts=2, moe_intermediate_size=16,
    n_group=2, topk_group=1, swiglu_limit=0.7, norm_topk_prob=True,
    # every layer has them
    mlp_layer_types=["sparse", "sparse"], first_k_dense_replace=0, num_dense_layers=0,
    # shared experts
    n_shared_experts=1, shared_expert_intermediate_size=16, shared_intermediate_size=16,
    # latent attention
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    index_head_dim=8, index_n_heads=2, index_topk=4,
    # linear attention
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_head_dim=8, linear_num_heads=4,
)  # fmt: skip

# What a model needs beyond that, by its folder.
OVERRIDES = dict(
    deepseek_v4=dict(
        mlp_layer_types=["hash_moe", "moe"], num_key_value_heads=1, o_groups=2, o_lora_rank=8
    ),
    ernie4_5_vl_moe=dict(
        moe_intermediate_size=[16, 24],
        rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2]),
    ),
    flint=dict(mlp_only_layers=[]),
    gemma4=dict(
        enable_moe_block=True, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8
    ),
    glm4v_moe=dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 0])),
    glm5_next=dict(qk_rope_head_dim=0, index_kpool=2),
    granitemoehybrid=dict(mamba_n_heads=4, mamba_d_state=8),
    hy_v4_vl=dict(rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1])),
    inkling=dict(swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_head_dim=8),
    inkling2=dict(swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_head_dim=8),
    lfm2_moe=dict(layer_types=["full_attention", "conv"]),
    mimo_v2_flash=dict(head_dim=24, num_key_value_heads=2),
    muse_spark=dict(moe_hidden_size=24),
    nemotron_h=dict(
        layers_block_type=["moe", "moe"], moe_latent_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    qwen3_omni_moe=dict(shared_expert_intermediate_size=16),
    zaya=dict(num_experts_per_tok=1, router_hidden_size=16),
)  # fmt: skip

# The model that has the experts, where it is not called <prefix>ForCausalLM or <prefix>Model.
CLASSES = {
    "AriaExperts": "AriaTextForCausalLM",
    "DiffusionGemmaTextExperts": "DiffusionGemmaEncoderTextModel",
    "Ernie4_5_VLMoeMoeExperts": "Ernie4_5_VLMoeTextModel",
    "HYV4VLExperts": "HYV4VLTextModel",
    "MuseSparkExperts": "MuseSparkTextModel",
    "Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel",
}


def names():
    """folder.ClassName of every decorated experts class, in the files' order."""
    found = []
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        source = file.read_text()
        if "@use_experts_implementation" in source:
            found += [
                f"{file.parent.name}.{node.name}"
                for node in ast.parse(source).body
                if isinstance(node, ast.ClassDef)
                and any("use_experts_implementation" in ast.unparse(d) for d in node.decorator_list)
            ]
    return found


def model_class(name):
    folder, experts = name.split(".")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    prefix = experts.removesuffix("Experts")
    for guess in (
        CLASSES.get(experts),
        f"{prefix.removesuffix('Text')}ForCausalLM",
        f"{prefix}Model",
    ):
        if guess and hasattr(module, guess):
            return getattr(module, guess)
    raise LookupError(f"{name}: its model must be named in CLASSES")


def config(name, **options):
    """A small config of the model's own class; `options` come on top."""
    config_class = model_class(name).config_class
    fields = {field.name for field in dataclasses.fields(config_class)}
    small = {option: value for option, value in SMALL.items() if option in fields}
    return config_class(**small | OVERRIDES.get(name.split(".")[0], {}) | options)


def build(name):
    """The model, in eval mode and float32, of weights that keep everything at unit scale."""
    model = model_class(name)(config(name)).eval()
    for experts in experts_of(model):
        for parameter in experts.parameters():
            fan_in = (
                1 if parameter.dim() < 3 else parameter.shape[1 if experts.is_transposed else 2]
            )
            parameter.data = unit(*parameter.shape, fan_in=fan_in)
    return model


def experts_of(model):
    """The modules that transformers' decorator made."""
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]


def inputs(model):
    """What the model takes for 2 sequences of 24 tokens."""
    taken = dict(input_ids=torch.randint(3, SMALL["vocab_size"], (2, 24)))
    name = type(model).__name__
    if name == "Ernie4_5_VLMoeTextModel":  # experts of its own for the images' tokens
        taken.update(moe_mm_token_type_ids=torch.randint(2, (2, 24)))
    if name == "Qwen3OmniMoeTalkerModel":  # has no table of ids
        taken = dict(inputs_embeds=unit(2, 24, SMALL["hidden_size"]))
    return taken

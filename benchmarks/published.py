"""MoE blocks of published models, as transformers builds them, with random weights."""

import copy
from typing import NamedTuple

import torch
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock


class Model(NamedTuple):
    """sizes: what the config.json of that checkpoint says of its MoE layers. tokens: of prefill
    and train; fewer where a token costs much, and where experts are halved most: in
    DeepSeek-V3 an expert has 16 of 64 tokens with 32 experts, as of 512 with all of its 256."""

    checkpoint: str
    config: type
    block: type
    sizes: dict
    tokens: int


MODELS = {
    "mixtral": Model(
        "mistralai/Mixtral-8x7B-v0.1",
        MixtralConfig,
        MixtralSparseMoeBlock,
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        tokens=128,
    ),
    "olmoe": Model(
        "allenai/OLMoE-1B-7B-0924",
        OlmoeConfig,
        OlmoeSparseMoeBlock,
        dict(
            hidden_size=2048,
            intermediate_size=1024,
            num_local_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=False,
        ),
        tokens=512,
    ),
    "qwen3": Model(
        "Qwen/Qwen3-30B-A3B",
        Qwen3MoeConfig,
        Qwen3MoeSparseMoeBlock,
        dict(
            hidden_size=2048,
            moe_intermediate_size=768,
            num_local_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
        ),
        tokens=512,
    ),
    "deepseek_v3": Model(
        "deepseek-ai/DeepSeek-V3",
        DeepseekV3Config,
        DeepseekV3MoE,
        dict(
            hidden_size=7168,
            moe_intermediate_size=2048,
            num_local_experts=256,
            num_experts_per_tok=8,
            n_shared_experts=1,
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        tokens=64,
    ),
    "gpt_oss": Model(
        "openai/gpt-oss-20b",
        GptOssConfig,
        GptOssMLP,
        dict(
            hidden_size=2880,
            intermediate_size=2880,
            num_local_experts=32,
            num_experts_per_tok=4,
            swiglu_alpha=1.702,
            swiglu_limit=7.0,
        ),
        tokens=256,
    ),
}
IMPLEMENTATIONS = ("moe_ext", "grouped_mm", "batched_mm", "eager")
LORA_RANK = 16
NUMBERS = (1 << 24) - 3  # random ones, a prime: no expert's weights repeat another's


def make_block(model, dtype, device, memory):
    """The model's MoE block, with as many of its experts as memory allows."""
    sizes = dict(model.sizes)
    while True:
        config = model.config(**sizes)
        config._experts_implementation = "eager"
        with torch.device("meta"):
            block = model.block(config).to(dtype)
        if 4 * weights_bytes(block) <= memory:
            break
        sizes["num_local_experts"] //= 2
        if sizes["num_local_experts"] < sizes["num_experts_per_tok"]:
            raise ValueError(f"--memory: a token's experts of {model.checkpoint} do not fit")
    block.to_empty(device=device)
    numbers = torch.randn(NUMBERS, device=device)
    for name, tensor in block.named_parameters():  # unit scale: a smaller one hides differences
        inputs = intermediate_size(config) if "down_proj" in name else config.hidden_size
        for part in tensor.data.view(-1).split(NUMBERS):
            part.copy_(numbers[: len(part)]).mul_(inputs**-0.5)
    for buffer in block.buffers():  # DeepSeek's selection biases
        buffer.zero_()
    return block


def intermediate_size(config):
    return getattr(config, "moe_intermediate_size", config.intermediate_size)


def weights_bytes(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


def on_every_implementation(block):
    """{implementation: the block again, over the very same parameters}"""
    shared = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    blocks = {}
    for implementation in IMPLEMENTATIONS:
        twin = blocks[implementation] = copy.deepcopy(block, dict(shared))
        experts_of(twin).config._experts_implementation = implementation
    return blocks


def experts_of(block):
    return next(m for m in block.modules() if hasattr(m, "is_concatenated"))


def output_of(block, x):
    y = block(x)
    return y[0] if isinstance(y, tuple) else y  # gpt-oss returns its routing weights, too


def add_adapters(block):
    """LoRA on both of the experts' stacks, through PEFT's target_parameters; the rest freezes.

    Raises ImportError where PEFT is missing or has no target_parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_parameters=targets)
    inject_adapter_in_model(config, block)
    for name, parameter in block.named_parameters():
        if "lora_B" in name:  # PEFT begins with zeros, which would hide differences
            torch.nn.init.normal_(parameter, std=LORA_RANK**-0.5)

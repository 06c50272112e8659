"""The MoE layers of published systems, as the config of an `MoE`.

    layer = moe_ext.MoE(moe_ext.presets.MIXTRAL_8X7B)
    small = moe_ext.presets.MIXTRAL_8X7B.replace(hidden_size=512, intermediate_size=1792)
    layer = moe_ext.MoE.from_pretrained_block(path, layer=3, preset="mixtral_8x7b")

Each names its source. `PRESETS` has them all by name. Balance losses are per layer here
and 1.0 at perfect balance, so a coefficient of Hugging Face's, whose loss is K there and
is taken over all L layers together, counts K / L of itself.

None names a drop_policy: all are dropless but Switch, which drops in token order as the
default does.

GPT-4 and Gemini are mixtures of experts by their authors' or others' word, but their
layers are undisclosed: there is nothing to preset.
"""

from .config import MoEConfig

__all__ = [
    "DEEPSEEK_V2",
    "DEEPSEEK_V3",
    "GROK_1",
    "MEGABLOCKS_DMOE_760M",
    "MIXTRAL_8X7B",
    "PRESETS",
    "SWITCH_BASE_8",
]

# Jiang et al. 2024, arXiv:2401.04088; config.json of mistralai/Mixtral-8x7B-v0.1, which
# has router_aux_loss_coef 0.02 and 32 layers.
MIXTRAL_8X7B = MoEConfig.of(
    hidden_size=4096,
    intermediate_size=14336,
    num_experts=8,
    top_k=2,
    activation="swiglu",
    score_function="softmax",
    norm_topk_prob=True,
    capacity_factor=None,
    aux_loss_coef=0.02 * 2 / 32,
)

# github.com/xai-org/grok-1: run.py (sizes), model.py (MoELayer, Router; jax.nn.gelu is the
# tanh approximation). How it was trained is undisclosed, so no loss.
GROK_1 = MoEConfig.of(
    hidden_size=6144,
    intermediate_size=32768,
    num_experts=8,
    top_k=2,
    activation="geglu_tanh",
    score_function="softmax",
    norm_topk_prob=False,
    capacity_factor=None,
    aux_loss_coef=0.0,
)

# DeepSeek-AI 2024, arXiv:2405.04434; config.json of deepseek-ai/DeepSeek-V2. The balance
# loss is its expert-level one (alpha_1), here over the batch; 2 shared experts side by side.
DEEPSEEK_V2 = MoEConfig.of(
    hidden_size=5120,
    intermediate_size=1536,
    num_experts=160,
    top_k=6,
    activation="swiglu",
    score_function="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    n_group=8,
    topk_group=3,
    group_score="max",
    shared_expert_intermediate_size=2 * 1536,
    capacity_factor=None,
    aux_loss_coef=3e-3,
)

# DeepSeek-AI 2024, arXiv:2412.19437; config.json of deepseek-ai/DeepSeek-V3. The biases
# move only when `update_router_biases` is called; the balance loss is theirs within a
# sequence, here over the batch.
DEEPSEEK_V3 = MoEConfig.of(
    hidden_size=7168,
    intermediate_size=2048,
    num_experts=256,
    top_k=8,
    activation="swiglu",
    score_function="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    n_group=8,
    topk_group=4,
    group_score="top2_sum",
    score_correction_bias=True,
    bias_update_rate=1e-3,
    shared_expert_intermediate_size=2048,
    capacity_factor=None,
    aux_loss_coef=1e-4,
)

# Fedus et al. 2021, arXiv:2101.03961 (losses, jitter); config.json of google/switch-base-8
# (sizes, and 64 rows an expert takes of each sequence).
SWITCH_BASE_8 = MoEConfig.of(
    hidden_size=768,
    intermediate_size=3072,
    num_experts=8,
    top_k=1,
    activation="relu",
    score_function="softmax",
    norm_topk_prob=False,
    expert_capacity=64,
    capacity_scope="sequence",
    capacity_factor=None,
    aux_loss_coef=1e-2,
    jitter_eps=1e-2,
    jitter_target="router",
)

# Gale et al. 2022, arXiv:2211.15841; github.com/databricks/megablocks: exp/dmoe/
# dmoe_760m_8gpu.sh (24 layers) and megablocks/layers/arguments.py.
MEGABLOCKS_DMOE_760M = MoEConfig.of(
    hidden_size=1536,
    intermediate_size=6144,
    num_experts=64,
    top_k=1,
    activation="gelu_tanh",
    score_function="softmax",
    norm_topk_prob=False,
    capacity_factor=None,
    aux_loss_coef=0.1 / 24,
)

PRESETS = {
    "mixtral_8x7b": MIXTRAL_8X7B,
    "grok_1": GROK_1,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "switch_base_8": SWITCH_BASE_8,
    "megablocks_dmoe_760m": MEGABLOCKS_DMOE_760M,
}

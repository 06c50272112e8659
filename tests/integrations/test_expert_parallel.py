"""moe_ext inside transformers' own expert parallelism: two ranks, against one process."""

import os
import traceback

import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from moe_ext.integrations.transformers import RoutingHealth, register  # noqa: E402
from support.oracle import HAS_OPS, relative_error  # noqa: E402
from support.ranks import over_ranks  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not HAS_OPS, reason="the reference needs no second proof"),
    pytest.mark.skipif(
        transformers.__version__.startswith("5.17."), reason="that release's is set up otherwise"
    ),
]

RANKS = 2
# A batch a rank, or the same on both.
MODES = {
    "fsdp": dict(fsdp_size=RANKS, ep_size=RANKS),
    "tp": dict(tp_size=RANKS, ep_size=RANKS),
}
SMALL = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64, num_experts_per_tok=2,
)  # fmt: skip


def deepseek_v3():
    config = transformers.DeepseekV3Config(
        **SMALL, intermediate_size=48, moe_intermediate_size=24, n_routed_experts=8, n_group=2,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=8)
    return transformers.MixtralForCausalLM(config)


def load(folder, **options):
    register()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="moe_ext", attn_implementation="eager", **options
    ).train()


def batches(mode):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 64, (RANKS, 3, 11), generator=generator)
    return ids if mode == "fsdp" else ids[:1]


def biases(model):
    return [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def adapted(model):
    config = peft.LoraConfig(
        r=4, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def health(folder, mode, own, **distributed):
    model = load(folder, **distributed)
    watch = RoutingHealth(model, bias_update_rate=0.01)
    for ids in own:
        model(ids)
    watch.update_biases()
    loads = [numbers.load.tolist() for numbers in watch.stats().values()]
    return loads, [bias.tolist() for bias in biases(model)]


def lora(folder, mode, own, **distributed):
    model = adapted(load(folder, **distributed))
    return [full(model(ids).logits).detach().tolist() for ids in own], None


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def of_rank(rank, port, what, folder, mode, results):
    try:
        os.environ |= dict(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
            WORLD_SIZE=str(RANKS),
        )  # fmt: skip
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        from transformers.distributed import DistributedConfig

        own = batches(mode)
        own = own[rank : rank + 1] if mode == "fsdp" else own
        config = DistributedConfig(**MODES[mode])
        results.put((rank, what(folder, mode, own, distributed_config=config)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))


def on_ranks(what, folder, mode):
    """What each rank found, in order."""
    got = sorted(over_ranks(RANKS, of_rank, what, folder, mode), key=lambda result: result[0])
    assert all(isinstance(found, tuple) for _, found in got), got
    return [found for _, found in got]


@pytest.mark.parametrize("mode", MODES)
def test_every_rank_counts_all_experts_by_their_ids(mode, tmp_path):
    deepseek_v3().save_pretrained(tmp_path)
    loads, moved = health(tmp_path, mode, batches(mode))
    assert sum(loads[0]) == len(batches(mode)) * 33 * 2 and any(map(any, moved))
    for found in on_ranks(health, tmp_path, mode):
        assert found == (loads, moved)


def test_adapters_are_those_of_the_rank_s_experts(tmp_path):
    mixtral().save_pretrained(tmp_path)
    expected, _ = lora(tmp_path, "fsdp", batches("fsdp"))
    plain = [load(tmp_path)(ids).logits for ids in batches("fsdp")]
    for ids, base, (found, _) in zip(expected, plain, on_ranks(lora, tmp_path, "fsdp")):
        ids = torch.tensor(ids).double()
        assert relative_error(torch.tensor(found[0]), ids) < 1e-5
        assert relative_error(base, ids) > 0.01

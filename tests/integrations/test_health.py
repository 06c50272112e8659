"""RoutingHealth: what is counted, when it warns, how biases move; alone, over ranks, in a Trainer."""

import copy
import logging
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import moe_ext
from oracle import unit

transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402
from test_blocks import longcat_flash  # noqa: E402

from moe_ext.integrations.transformers import (  # noqa: E402
    RoutingCallback,
    RoutingHealth,
    register,
    replace,
)

E, K = 8, 2
SMALL = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=64, num_experts_per_tok=K,
)  # fmt: skip
NAMES = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def deepseek_v3(implementation="moe_ext"):
    register()
    config = transformers.DeepseekV3Config(
        **SMALL, intermediate_size=24, moe_intermediate_size=20, n_routed_experts=E, n_group=2,
        topk_group=2, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8,
        experts_implementation=implementation,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def mixtral(implementation="moe_ext", **options):
    register()
    config = transformers.MixtralConfig(
        **SMALL, intermediate_size=20, num_local_experts=E, experts_implementation=implementation,
        **options,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def tokens(*shape):
    return torch.randint(3, 50, shape)


def choices(model, ids):
    """{name of the experts: the ids that its router gave them}."""
    given, hooks = {}, []
    for name in NAMES:
        hooks.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: given.update({name: args[1]})
            )
        )
    model(ids)
    for hook in hooks:
        hook.remove()
    return given


def collapse(model, layer=0):
    """Every token of the layer goes to the experts 0 and 1."""
    gate = model.model.layers[layer].mlp.gate
    gate.weight.data.zero_()
    gate.e_score_correction_bias[:2] = 10.0


def test_counts_what_the_routers_choose():
    model = deepseek_v3()
    health = RoutingHealth(model)
    given = choices(model, tokens(2, 11))
    stats = health.stats()
    assert list(stats) == NAMES
    for name, numbers in stats.items():
        load = torch.bincount(given[name].flatten(), minlength=E).double()
        share = load / load.sum()
        assert torch.equal(numbers["load"], load)
        assert numbers["tokens"] == 22 and numbers["forwards"] == 1
        entropy = -torch.special.xlogy(share, share).sum() / torch.tensor(float(E)).log()
        assert numbers["entropy"] == pytest.approx(entropy.item())
        assert numbers["max_violation"] == pytest.approx(
            load.max().item() * E / load.sum().item() - 1
        )
        assert numbers["dead_experts"] == (load == 0).sum()
        assert numbers["drop_rate"] == 0 and "max_logit" not in numbers
    model(tokens(1, 5))
    assert health.stats(reset=True)[NAMES[0]]["tokens"] == 27
    assert health.stats()[NAMES[0]]["tokens"] == 0


def test_a_layer_of_ours_counts_for_itself():
    model = torch.nn.Sequential(moe_ext.MoE(8, 12, E), torch.nn.Linear(8, 8))
    model(unit(2, 9, 8))
    stats = RoutingHealth(model).stats()
    assert list(stats) == ["0"] and stats["0"].keys() == model[0].stats().keys()
    assert torch.equal(stats["0"]["load"], model[0].stats()["load"])
    assert stats["0"]["max_logit"] == model[0].stats()["max_logit"] != 0


def test_counts_once_under_checkpointing():
    model = mixtral().train()
    model.gradient_checkpointing_enable()
    health = RoutingHealth(model)
    ids = tokens(2, 7)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert [numbers["tokens"] for numbers in health.stats().values()] == [14, 14]


def test_compiles_in_one_graph():
    model = mixtral()
    health = RoutingHealth(model)
    torch.compiler.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(tokens(2, 7))
    assert [numbers["tokens"] for numbers in health.stats().values()] == [14, 14]


def test_switch_drops_are_counted():
    config = transformers.SwitchTransformersConfig(
        vocab_size=50, d_model=32, d_kv=8, d_ff=20, num_heads=4, num_layers=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=0, expert_capacity=3,
    )  # fmt: skip
    model = transformers.SwitchTransformersEncoderModel(config)
    replace(model)
    health = RoutingHealth(model)
    router = model.encoder.block[1].layer[1].mlp.router
    masks = []
    router.register_forward_hook(lambda module, args, output: masks.append(output[0]))
    model(tokens(2, 20))
    (numbers,) = health.stats().values()
    kept = masks[0].sum().item()
    assert 8 <= kept <= 24 and numbers["tokens"] == 40
    assert numbers["drop_rate"] == numbers["lost_rate"] == pytest.approx(1 - kept / 40)
    assert numbers["load"].tolist() == masks[0].sum((0, 1)).tolist()


# ---- warnings ----------------------------------------------------------------------------


def check_quietly(health):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return health.check()


def test_warns_once_of_a_collapse(caplog):
    model = deepseek_v3().eval()
    health = RoutingHealth(model)
    model(tokens(8, 32))
    with caplog.at_level(logging.INFO, "moe_ext"):
        check_quietly(health)
    lines = [record.getMessage() for record in caplog.records if record.name == "moe_ext"]
    assert [line.partition(":")[0] for line in lines] == NAMES
    assert all("entropy 0." in line and "dead_experts 0" in line for line in lines)

    collapse(model)
    model(tokens(1, 3))
    check_quietly(health)  # too few tokens to tell
    model(tokens(8, 32))
    with pytest.warns(UserWarning) as caught:
        health.check()
    texts = [str(warning.message) for warning in caught]
    collapsed = (
        "RoutingHealth: the router collapses: model.layers.0.mlp.experts (entropy 0.33, once 0."
    )
    assert len(texts) == 2 and texts[0].startswith(collapsed)
    assert (
        texts[1] == "RoutingHealth: experts die: model.layers.0.mlp.experts (6 of 8 had no token)"
    )

    model(tokens(8, 32))
    check_quietly(health)  # said already
    collapse(model, 1)
    model(tokens(8, 32))
    with pytest.warns(UserWarning, match="collapses: model.layers.1.mlp.experts") as caught:
        health.check()
    assert "layers.0" not in str(caught[0].message)


def test_warns_of_rising_drops():
    layer = moe_ext.MoE(8, 12, 4, 1, expert_capacity=4, capacity_factor=None)
    health = RoutingHealth(layer, min_entropy=0.0, max_dead=1.0)
    for _ in range(64):
        layer(unit(4, 8))
    check_quietly(health)  # nothing can be dropped
    for _ in range(4):
        layer(unit(64, 8))
    from_the_start = RoutingHealth(copy.deepcopy(layer), min_entropy=0.0, max_dead=1.0)
    check_quietly(from_the_start)
    with pytest.warns(UserWarning, match=r"drops rise:  \(\d\d% of the assignments, once 0%\)"):
        health.check()


# ---- biases ------------------------------------------------------------------------------


def biases(model):
    return [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers]


def test_biases_move_against_the_load():
    model = deepseek_v3().train()
    health = RoutingHealth(model, bias_update_rate=0.01)
    ids, before = tokens(4, 16), [bias.clone() for bias in biases(model)]
    load = {n: torch.bincount(c.flatten(), minlength=E) for n, c in choices(model, ids).items()}
    model.eval()(torch.full((16, 32), 7))  # evaluation does not count, here of few experts
    health.update_biases()
    for name, bias, old in zip(NAMES, biases(model), before):
        expected = old + 0.01 * torch.sign(load[name].double().mean() - load[name]).float()
        assert torch.equal(bias, expected)
    health.update_biases()  # nothing was seen since
    moved = [bias.clone() for bias in biases(model)]
    assert all(torch.equal(a, b) for a, b in zip(moved, biases(model)))


@pytest.mark.parametrize(
    "name", ["afmoe", "ernie4_5_moe", "lfm2_moe", "longcat_flash", "minimax_m2"]
)
def test_biases_under_other_names_and_in_other_places(name):
    if name == "longcat_flash":  # whose identity experts have a bias too
        model = longcat_flash()
        replace(model)
    else:
        register()
        (experts,) = (n for n in tiny_models.names() if n.startswith(f"{name}."))
        model = tiny_models.build(experts)
        model.set_experts_implementation("moe_ext")
    tensors = [*model.named_buffers(), *model.named_parameters()]
    found = {n: t for n, t in tensors if n.endswith(("e_score_correction_bias", "expert_bias"))}
    before = {n: t.clone() for n, t in found.items()}
    health = RoutingHealth(model, bias_update_rate=0.5)
    assert len(health.biases) == len(health.layers) == len(found) > 0
    model.train()(input_ids=tokens(2, 9), use_cache=False)
    health.update_biases()
    for n, t in found.items():
        assert (
            set((t - before[n]).flatten().tolist()) <= {-0.5, 0.0, 0.5} and (t != before[n]).any()
        )


def test_biases_beside_experts_that_peft_has_wrapped():
    class Wrapper(torch.nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, *args):
            return self.base_layer(*args)

    model = deepseek_v3().train()
    for layer in model.model.layers:
        layer.mlp.experts = Wrapper(Wrapper(layer.mlp.experts))
    health = RoutingHealth(model, bias_update_rate=0.01)
    assert list(health.layers) == [f"{name}.base_layer.base_layer" for name in NAMES]
    model(tokens(4, 16))
    health.update_biases()
    assert all(bias.any() for bias in biases(model))


def test_biases_balance_a_collapsed_router():
    model = deepseek_v3().train()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.normal_(std=0.02)
        layer.mlp.gate.e_score_correction_bias[:2] = 0.05
    health = RoutingHealth(model, bias_update_rate=0.003)
    ids, seen = tokens(8, 16), []
    for _ in range(40):
        model(ids)
        health.update_biases()
        seen.append(max(n["max_violation"] for n in health.stats(reset=True).values()))
    assert seen[0] > 2 and seen[-1] < 1


def test_rate_of_a_layer_of_ours_is_its_own():
    layer, other = (moe_ext.MoE(8, 12, E, bias_update_rate=0.1) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    x = unit(20, 8)
    layer(x), other(x)
    RoutingHealth(layer).update_biases()
    moe_ext.update_router_biases(other)
    bias = layer.gate.e_score_correction_bias
    assert bias.any() and torch.equal(bias, other.gate.e_score_correction_bias)


@pytest.mark.parametrize(
    "error,make_model,options,text",
    [
        (TypeError, dict, {}, "model must be a torch.nn.Module, got dict"),
        (ValueError, lambda: torch.nn.Linear(3, 3), {}, "found no MoE layer in Linear: use moe_ext.MoE"),
        (ValueError, lambda: mixtral("eager"), {}, "found experts that run on 'eager' in Mixtral"),
        (ValueError, mixtral, dict(bias_update_rate=0.1), "must be 0 for routers without"),
        (ValueError, mixtral, dict(bias_update_rate=-1.0), "bias_update_rate must be a number of at"),
        (TypeError, lambda: deepseek_v3().bfloat16(), dict(bias_update_rate=0.1), "must be float32"),
    ],
)  # fmt: skip
def test_what_cannot_be_watched(error, make_model, options, text):
    with pytest.raises(error, match=text):
        RoutingHealth(make_model(), **options)


# ---- ranks and the Trainer -----------------------------------------------------------------

RANKS = 2


def of_rank(rank, port, results):
    try:
        torch.set_num_threads(1)
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
        torch.manual_seed(0)
        model, ids = deepseek_v3().train(), tokens(RANKS, 4, 16)
        model = torch.nn.ModuleDict({"hf": model, "ours": moe_ext.MoE(8, 12, E)})
        health = RoutingHealth(model, bias_update_rate=0.01)
        model["hf"](ids[rank])
        model["ours"](-unit(5, 8) if rank else unit(5, 8))
        health.update_biases()
        stats = health.stats()
        own = model["ours"].stats()["max_logit"]
        results.put((rank, stats, [b.tolist() for b in biases(model["hf"])], own))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None, None))


def test_sums_over_ranks():
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with __import__("socket").socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [context.Process(target=of_rank, args=(r, port, results)) for r in range(RANKS)]
    for worker in workers:
        worker.start()
    got = sorted((results.get() for _ in workers), key=lambda result: result[0])
    for worker in workers:
        worker.join()
    assert all(isinstance(stats, dict) for _, stats, _, _ in got), got

    torch.manual_seed(0)
    model, ids = deepseek_v3().train(), tokens(RANKS, 4, 16)
    alone = RoutingHealth(model, bias_update_rate=0.01)
    for half in ids:
        model(half)
    alone.update_biases()
    for name, expected in alone.stats().items():
        for _, stats, moved, _ in got:
            assert stats[f"hf.{name}"]["load"].tolist() == expected["load"].tolist()
            assert stats[f"hf.{name}"]["forwards"] == 2 == stats["ours"]["forwards"]
            assert moved == [bias.tolist() for bias in biases(model)]
            assert stats["ours"]["max_logit"] == max(largest for *_, largest in got)


def test_callback_without_a_trainer():
    model = deepseek_v3().train()
    callback = RoutingCallback(bias_update_rate=0.01)
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    callback.on_train_begin(None, state, control, model=model)
    model(tokens(2, 9))
    callback.on_step_end(None, state, control, model=model)
    assert biases(model)[0].any()
    callback.on_log(None, state, control, logs={"eval_loss": 1.0})
    logs = {"loss": 1.0}
    state.log_history.append(dict(logs))
    callback.on_log(None, state, control, logs=logs)
    assert logs[f"moe/{NAMES[0]}/tokens"] == 18 and state.log_history[0] == logs
    summary = {"train_runtime": 1.0}
    callback.on_log(None, state, control, logs=summary)
    assert summary == {"train_runtime": 1.0}  # nothing was seen since


class Tracker(transformers.TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_callback_in_a_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = deepseek_v3()
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 12)]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=4, per_device_train_batch_size=2, logging_steps=2,
        gradient_accumulation_steps=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    tracker = Tracker()
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[tracker])
    trainer.callback_handler.callbacks.insert(0, RoutingCallback(bias_update_rate=0.01))
    trainer.train()
    # 2 steps of 2 batches of 2 rows of 12 tokens between two logs.
    for logs in (trainer.state.log_history, tracker.logs):
        counted = [log[f"moe/{NAMES[1]}/tokens"] for log in logs if "loss" in log]
        assert counted == [96, 96]
    assert 0 < biases(model)[0].abs().max() <= 0.0401

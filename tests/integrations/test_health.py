"""RoutingHealth: what is counted, when it warns, how biases move; alone, over ranks, in a Trainer."""

import copy
import logging
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist

import moe_ext
from support.oracle import unit
from support.ranks import over_ranks

transformers = pytest.importorskip("transformers")

from test_blocks import longcat_flash  # noqa: E402

from moe_ext.integrations.transformers import (  # noqa: E402
    RoutingCallback,
    RoutingHealth,
    register,
    replace,
)
from support import tiny_models  # noqa: E402

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
    health = RoutingHealth(model)
    model(unit(2, 9, 8))
    stats = health.stats()
    assert list(stats) == ["0"] and stats["0"].keys() == model[0].stats().keys()
    assert torch.equal(stats["0"]["load"], model[0].stats()["load"])
    assert stats["0"]["max_logit"] == model[0].stats()["max_logit"] != 0


@pytest.mark.parametrize("make", [lambda: torch.nn.Sequential(moe_ext.MoE(32, 12, E)), mixtral])
def test_every_watcher_owns_its_counts(make):
    model = make()
    x = tokens(2, 10) if hasattr(model, "config") else unit(20, 32)

    def seen(health):
        return {numbers["tokens"] for numbers in health.stats().values()}

    first = RoutingHealth(model)
    model(x), model(x)
    second = RoutingHealth(model)
    model(x)
    assert seen(first) == {60} and seen(second) == {20}
    second.check()
    assert seen(first) == {60} and seen(second) == {0}
    for layer in model.modules():
        if isinstance(layer, moe_ext.MoE):
            assert layer.stats(reset=True)["tokens"] == 60
            assert seen(first) == {60}
    modules = list(first.layers.values())
    assert all(len(module._routing_watchers) == 2 for module in modules)
    del second
    assert all(len(module._routing_watchers) == 1 for module in modules)


@pytest.mark.parametrize("make", [lambda: torch.nn.Sequential(moe_ext.MoE(32, 12, E)), mixtral])
def test_training_and_evaluation_are_told_apart(make):
    model = make().train()
    x = tokens(2, 10) if hasattr(model, "config") else unit(20, 32)
    health = RoutingHealth(model)
    model(x)
    model.eval()
    model(x[:1])
    with torch.no_grad():
        model(x[:1])
    in_training, in_evaluation, in_both = (
        next(iter(health.stats(training=mode).values())) for mode in (True, False, None)
    )
    assert (in_training["forwards"], in_evaluation["forwards"], in_both["forwards"]) == (1, 2, 3)
    assert torch.equal(in_both.load, in_training.load + in_evaluation.load)
    if "max_logit" in in_both:
        largest = max(in_training["max_logit"], in_evaluation["max_logit"])
        assert in_both["max_logit"] == largest
    health.stats(reset=True, training=False)
    assert next(iter(health.stats().values()))["forwards"] == 1


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


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17."), reason="Switch drops nothing in that release"
)
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [lambda: torch.nn.Sequential(moe_ext.MoE(32, 12, E)), deepseek_v3])
def test_says_once_that_scores_are_nan_and_goes_on(make, bad):
    model = make()
    is_ours = not hasattr(model, "config")
    x = unit(512, 32) if is_ours else tokens(8, 32)
    health = RoutingHealth(model, min_entropy=0.0 if is_ours else 0.4)
    model(x)
    check_quietly(health)
    gate = model[0].gate if is_ours else model.model.layers[0].mlp.gate
    hook = gate.register_forward_pre_hook(lambda module, args: (args[0] * bad, *args[1:]))
    for _ in range(2):
        model(x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            health.check()
    assert not caught  # the second time
    hook.remove()
    assert {problem for _, problem in health.warned} >= {"scores are NaN or infinite"}
    if is_ours:
        gate.weight.data.zero_()
        gate.weight.data[0], gate.weight.data[1] = 5, 4
        model(unit(512, 32).abs())
        with pytest.warns(UserWarning, match="the router collapses: 0 "):
            health.check()
    else:
        collapse(model)
        model(x)
        with pytest.warns(UserWarning, match="the router collapses: model.layers.0"):
            health.check()


def test_summary_names_the_worst_of_all_layers():
    model = deepseek_v3()
    health = RoutingHealth(model)
    assert health.summary(health.stats()) == {}  # nothing was seen
    collapse(model, 1)
    model(tokens(8, 32))
    stats = health.stats()
    summary = health.summary(stats)
    assert all(type(value) is float for value in summary.values())
    assert summary["worst_entropy"] == stats[NAMES[1]]["entropy"] < stats[NAMES[0]]["entropy"]
    assert summary["worst_max_violation"] == stats[NAMES[1]]["max_violation"] == 3
    assert summary["dead_experts"] == sum(numbers["dead_experts"] for numbers in stats.values())
    assert summary["worst_entropy_layer"] == summary["dead_experts_layer"] == 1.0
    assert summary["worst_drop_rate"] == 0 and summary["tokens"] == 256


def test_warns_once_of_a_collapse(caplog):
    model = deepseek_v3().eval()
    health = RoutingHealth(model)
    model(tokens(8, 32))
    with caplog.at_level(logging.INFO, "moe_ext"):
        check_quietly(health)
    lines = [record.getMessage() for record in caplog.records if record.name == "moe_ext"]
    (line,) = lines  # not one a layer
    assert "worst_entropy 0." in line and "dead_experts 0 (model.layers.0.mlp.experts)" in line

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
    late = copy.deepcopy(layer)
    from_the_start = RoutingHealth(late, min_entropy=0.0, max_dead=1.0)
    for _ in range(4):
        layer(unit(64, 8)), late(unit(64, 8))
    assert next(iter(from_the_start.stats().values()))["drop_rate"] > 0.5
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
    got = sorted(over_ranks(RANKS, of_rank), key=lambda result: result[0])
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
    callback = RoutingCallback(bias_update_rate=0.01, all_layers=True)
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    callback.on_train_begin(None, state, control, model=model)
    model(tokens(2, 9))
    callback.on_step_end(None, state, control, model=model)
    assert biases(model)[0].any()
    nothing = {"eval_loss": 1.0}
    callback.on_log(None, state, control, logs=nothing)
    assert nothing == {"eval_loss": 1.0}  # nothing was evaluated
    logs = {"loss": 1.0}
    state.log_history.append(dict(logs))
    callback.on_log(None, state, control, logs=logs)
    assert logs[f"moe/{NAMES[0]}/tokens"] == 18 and state.log_history[0] == logs
    summary = {"train_runtime": 1.0}
    callback.on_log(None, state, control, logs=summary)
    assert summary == {"train_runtime": 1.0}  # nothing was seen since
    with pytest.raises(TypeError, match="all_layers must be True or False"):
        RoutingCallback(all_layers=1)


class Tracker(transformers.TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trainer(model, folder, rows=16, **options):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in tokens(rows, 12)]
    callbacks = options.pop("callbacks", [])
    arguments = dict(
        output_dir=folder, max_steps=4, per_device_train_batch_size=2, logging_steps=2,
        per_device_eval_batch_size=4, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(**arguments | options)
    return transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks
    )


@pytest.mark.parametrize("first", [False, True])
def test_numbers_reach_the_trackers(tmp_path, first):
    """With the callback after them, where `callbacks=` puts it, and before them."""
    model, tracker = deepseek_v3(), Tracker()
    routing = RoutingCallback(bias_update_rate=0.01)
    callbacks = [routing, tracker] if first else [tracker, routing]
    options = dict(gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=4)
    job = trainer(model, tmp_path, callbacks=callbacks, **options)
    job.train()
    for logs in (job.state.log_history, tracker.logs):
        # 2 steps of 2 batches of 2 rows of 12 tokens between two logs; 16 rows to evaluate.
        assert [log["moe/tokens"] for log in logs if "loss" in log] == [96, 96]
        assert [log["eval_moe/tokens"] for log in logs if "eval_loss" in log] == [192]
        numbers = [log for log in logs if "loss" in log or "eval_loss" in log]
        assert all(len([key for key in log if "moe/" in key]) == 9 for log in numbers)
        assert not any("moe" in key for log in logs if "train_runtime" in log for key in log)
    assert 0 < biases(model)[0].abs().max() <= 0.0401


def upcycled_gpt2(aux_loss_coef):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=50, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    moe_ext.replace_ffn(model, 4, 2, aux_loss_coef=aux_loss_coef)
    return model


def router_gradient(folder, steps, aux_loss_coef, callbacks):
    class Gradient(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.gradient = model.transformer.h[0].mlp.gate.weight.grad.clone()

    seen = Gradient()
    torch.manual_seed(1)
    trainer(
        upcycled_gpt2(aux_loss_coef), folder, callbacks=[*callbacks, seen], max_steps=1,
        per_device_train_batch_size=16 // steps, gradient_accumulation_steps=steps, max_grad_norm=0.0,
    ).train()  # fmt: skip
    return seen.gradient


def test_the_callback_scales_the_losses_under_accumulation(tmp_path):
    gradients = {}
    for steps in (1, 4):
        with_loss, without = (
            router_gradient(tmp_path, steps, coef, [RoutingCallback()]) for coef in (1.0, 0.0)
        )
        gradients[steps] = with_loss - without
    ratio = (gradients[4] * gradients[1]).sum() / gradients[1].square().sum()
    assert ratio.item() == pytest.approx(1.0, abs=0.2)


def test_without_the_callback_accumulation_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_ext.losses._warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router_gradient(tmp_path, 1, 1.0, [])
        router_gradient(tmp_path, 2, 0.0, [])  # nothing is injected
    with pytest.warns(UserWarning, match="moe_ext: accumulating gradients") as caught:
        router_gradient(tmp_path, 4, 1.0, [])
    assert len([w for w in caught if "moe_ext" in str(w.message)]) == 1

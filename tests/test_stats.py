"""stats(): what is counted, when, and that nothing else touches it; loss-free balancing."""

import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moe_ext
from support.layer_suite import E, H, assert_close, make
from support.naive_layer import naive_layer
from support.oracle import bits_equal, unit


@given(
    score_function=st.sampled_from(("softmax", "sigmoid", "softmax_topk")),
    num_experts=st.sampled_from((1, 2, 8)),
    top_k=st.sampled_from((1, 2)),
    capacity=st.sampled_from((None, 1, 3)),
    drop_policy=st.sampled_from(("choice", "token", "probs")),
    shape=st.sampled_from(((0,), (1,), (9,), (2, 11))),
    padded=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_stats_are_those_of_the_layer_written_out(
    score_function, num_experts, top_k, capacity, drop_policy, shape, padded, training, seed
):
    layer = make(
        num_experts, min(top_k, num_experts), score_function=score_function, seed=seed,
        expert_capacity=capacity, drop_policy=drop_policy, capacity_factor=None,
    ).train(training)  # fmt: skip
    x = unit(*shape, H, dtype=torch.float64)
    mask = torch.rand(shape) < 0.4 if padded else None
    layer(x, padding_mask=mask)
    stats = layer.stats()
    expected = naive_layer(layer, x, mask)[3]
    assert stats.load.tolist() == expected.pop("load")
    assert stats.pop("forwards") == 1
    if expected["tokens"] == 0:
        expected["entropy"] = expected["token_entropy"] = 0.0
    assert stats == pytest.approx(expected, abs=1e-9)


def test_forwards_add_up_and_a_reset_starts_again():
    layer, whole = make(capacity_factor=None, seed=3), make(capacity_factor=None, seed=3)
    x = unit(30, H, dtype=torch.float64)
    for part in x.split((7, 20, 3)):
        layer(part)
    whole(x)
    stats, expected = layer.stats(reset=True), whole.stats()
    assert stats.pop("forwards") == 3 and expected.pop("forwards") == 1
    assert torch.equal(stats.load, expected.load)
    assert stats == pytest.approx(expected)
    empty = layer.stats()
    assert not empty.load.any() and set(empty.values()) == {0.0}
    layer(x - 1e3)  # a largest logit below the one before the reset also counts
    assert layer.stats()["max_logit"] != expected["max_logit"]


def test_a_plain_dict_for_any_logger():
    layer = make()
    layer(unit(5, H, dtype=torch.float64))
    stats = layer.stats()
    load = stats.load
    assert load.shape == (E,) and load.device.type == "cpu"
    assert all(type(value) is float for value in stats.values())
    json.dumps(stats)
    assert list(stats) == ["drop_rate", "lost_rate", "entropy", "token_entropy", "max_violation",
                           "dead_experts", "max_logit", "tokens", "forwards"]  # fmt: skip
    assert stats["load"] is load and pickle.loads(pickle.dumps(stats)).load.equal(load)
    with pytest.raises(KeyError, match="loads"):
        stats["loads"]
    with pytest.raises(TypeError, match="reset must be True or False"):
        layer.stats(reset=1)


def test_what_a_collapse_looks_like():
    layer = make(top_k=1, capacity_factor=None)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[5] = 100.0
    layer(unit(40, H, dtype=torch.float64).abs())
    stats = layer.stats(reset=True)
    assert stats["entropy"] < 1e-6 and stats["token_entropy"] < 1e-6
    assert stats["max_violation"] == E - 1 and stats["dead_experts"] == E - 1
    with torch.no_grad():
        layer.gate.weight.zero_()
    layer(unit(40, H, dtype=torch.float64))  # all the same: ties go to expert 0
    stats = layer.stats()
    assert stats["entropy"] == pytest.approx(1.0) and stats["token_entropy"] == pytest.approx(1.0)
    assert stats["load"].tolist() == [40.0] + [0.0] * (E - 1)


def test_stats_are_neither_state_nor_buffers():
    layer = make(bias_update_rate=0.1)
    layer(unit(5, H, dtype=torch.float64))
    tensors = {id(t) for t in layer._stats.tensors()}
    assert not tensors & {id(t) for t in (*layer.buffers(), *layer.parameters())}
    fresh = make(bias_update_rate=0.1)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.stats()["forwards"] == 0
    layer.to(torch.bfloat16)
    assert layer.stats()["tokens"] == 5
    assert [t.dtype for t in layer._stats.tensors()] == [
        torch.int64, torch.float64, torch.float64, torch.int64
    ]  # fmt: skip


def test_replayed_routing_is_counted():
    layer = make()
    x = unit(6, H, dtype=torch.float64)
    _, routing = layer(x, return_routing=True)
    once = layer.stats(reset=True)
    layer(x, routing=routing)
    again = layer.stats()
    assert torch.equal(once.load, again.load) and once == again


# ---- loss-free balancing -------------------------------------------------------------


def test_update_moves_the_bias_against_the_load():
    layer = make(bias_update_rate=0.01, top_k=1)
    layer.gate.e_score_correction_bias.zero_()
    x = unit(50, H, dtype=torch.float64)
    for part in x.split(20):
        layer(part)
    layer.eval()(x)  # evaluation is not training load
    load = layer.stats()["load"]
    layer.stats(reset=True)  # reading the statistics changes nothing here
    moe_ext.update_router_biases(torch.nn.Sequential(layer))
    counts = torch.zeros(E, dtype=torch.float64)
    for part in x.split(20):
        scores = torch.nn.functional.linear(part, layer.gate.weight)
        counts += torch.bincount(scores.argmax(-1), minlength=E)
    assert load.sum() == 100 and counts.sum() == 50
    assert_close(
        layer.gate.e_score_correction_bias, (0.01 * torch.sign(counts.mean() - counts)).float()
    )
    before = layer.gate.e_score_correction_bias.clone()
    moe_ext.update_router_biases(layer)  # nothing since then: nothing moves
    assert bits_equal(layer.gate.e_score_correction_bias, before)


def test_balancing_balances():
    layer = make(bias_update_rate=0.01, score_function="sigmoid", capacity_factor=None)
    layer.gate.e_score_correction_bias.zero_()
    with torch.no_grad():
        layer.gate.weight[0] += 0.3
    x = unit(300, H, dtype=torch.float64) + 0.5
    layer(x)
    before = layer.stats(reset=True)["max_violation"]
    for _ in range(100):
        layer(x)
        moe_ext.update_router_biases(layer)
    layer.stats(reset=True)
    layer(x)
    after = layer.stats()["max_violation"]
    assert after < 0.25 < 1.0 < before


def test_the_hook_belongs_to_one_optimizer():
    layer, other = make(bias_update_rate=0.01), make(bias_update_rate=0.01)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.0)
    handle = moe_ext.update_router_biases_on_step(optimizer, layer)
    start = layer.gate.e_score_correction_bias.clone()
    x = unit(30, H, dtype=torch.float64)
    layer(x), other(x)
    elsewhere.step()
    assert bits_equal(layer.gate.e_score_correction_bias, start)
    optimizer.step()
    moved = layer.gate.e_score_correction_bias.clone()
    assert not bits_equal(moved, start) and layer._stats.step_counts.sum() == 0
    handle.remove()
    layer(x)
    optimizer.step()
    assert bits_equal(layer.gate.e_score_correction_bias, moved)


def test_a_given_bias_without_a_rate_never_moves():
    layer = make(score_correction_bias=True)
    before = layer.gate.e_score_correction_bias.clone()
    layer(unit(30, H, dtype=torch.float64))
    moe_ext.update_router_biases(layer)
    assert bits_equal(layer.gate.e_score_correction_bias, before)

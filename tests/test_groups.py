"""Whose counts are summed: those of the ranks that hold the same layers."""

import copy
import traceback

import pytest
import torch
import torch.distributed as dist

import moe_ext
from support.oracle import unit
from support.ranks import over_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

RANKS = 2


def make(seeds):
    layers = torch.nn.ModuleList()
    for seed in seeds:
        torch.manual_seed(seed)
        layers.append(moe_ext.MoE(8, 12, 8, bias_update_rate=0.1, capacity_factor=None))
    return layers


def biases(layers):
    return [layer.gate.e_score_correction_bias.tolist() for layer in layers]


def stages(rank, seeds):
    """Pipeline stages: what each rank's layers get equals what they get by themselves."""
    layers = make(seeds[rank])
    torch.manual_seed(rank)
    for layer in layers:
        layer(unit(40, 8))
    alone = copy.deepcopy(layers)
    itself = [dist.new_group([r]) for r in range(RANKS)][rank]
    moe_ext.update_router_biases(alone, process_group=itself)
    moe_ext.update_router_biases(layers)
    assert biases(layers) == biases(alone) and all(any(bias) for bias in biases(layers))


def replicas(rank, seeds):
    layers = make(seeds[rank])
    data = [unit(40, 8) for _ in range(RANKS)]
    together = copy.deepcopy(layers)
    for x in data:
        together[0](x)
    layers[0](data[rank])
    moe_ext.update_router_biases(layers)
    itself = [dist.new_group([r]) for r in range(RANKS)][rank]
    moe_ext.update_router_biases(together, process_group=itself)
    assert biases(layers) == biases(together)


def flat(rank, seeds):
    """As FSDP's first version leaves parameters between forwards."""
    layers = make(seeds[rank])
    layers[0].gate.weight = torch.nn.Parameter(layers[0].gate.weight.detach().flatten())
    with pytest.raises(ValueError, match="process_group must name the ranks that hold the same"):
        moe_ext.update_router_biases(layers)


def health_of_stages(rank, seeds):
    from moe_ext.integrations.transformers import RoutingHealth

    layers = make(seeds[rank])
    health = RoutingHealth(layers)
    for layer in layers:
        layer(unit(40 + rank, 8))
    stats = health.stats()
    assert list(stats) == [str(i) for i in range(len(layers))]
    assert all(numbers["tokens"] == 40 + rank for numbers in stats.values())
    health.update_biases()


def worker(rank, port, job, seeds, results):
    try:
        torch.set_num_threads(1)
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
        job(rank, seeds)
        results.put(None)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put(traceback.format_exc())


@pytest.mark.parametrize(
    "job,seeds",
    [
        (stages, ([0], [1])),
        (stages, ([0, 1], [2])),
        (stages, ([0, 1], [])),  # a stage without such layers
        (replicas, ([0], [0])),
        (flat, ([0], [0])),
        (health_of_stages, ([0], [1])),
        (health_of_stages, ([0, 1], [])),
    ],
)
def test_groups(job, seeds):
    if job is health_of_stages:
        pytest.importorskip("transformers")
    problems = over_ranks(RANKS, worker, job, seeds)
    assert problems == [None] * RANKS

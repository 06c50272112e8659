"""DDP and FSDP2 on two gloo processes: what one process computes on both halves."""

import copy
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import moe_ext
from support.layer_suite import E, H, assert_close, make
from support.oracle import bits_equal, relative_error, unit

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

RANKS = 2


def make_model(**options):
    torch.manual_seed(0)
    layers = (make(bias_update_rate=0.01, z_loss_coef=0.01, **options) for _ in range(2))
    return nn.Sequential(nn.Linear(H, H).double(), *layers)


def make_data():
    torch.manual_seed(1)
    return unit(RANKS, 3, 7, H, dtype=torch.float64)


def train_alone(model, data):
    """Two steps, each the mean over the halves, on one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    moe_ext.set_loss_scale(model, 1 / RANKS)
    for _ in range(2):
        optimizer.zero_grad()
        for half in data:
            (model(half).square().mean() / RANKS).backward()
        optimizer.step()
        moe_ext.update_router_biases(model)
    return model


def train_together(model, half, layers):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(half).square().mean().backward()
        optimizer.step()
        moe_ext.update_router_biases(layers)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_model(model, expected):
    for (name, actual), wanted in zip(model.state_dict().items(), expected.state_dict().values()):
        assert_close(full(actual), wanted.to(actual.dtype), 1e-7 if "correction" in name else 1e-11)


def ddp(rank):
    data, model = make_data(), make_model()
    expected = train_alone(copy.deepcopy(model), data)
    parallel = nn.parallel.DistributedDataParallel(model)
    if rank == 1:  # DDP broadcasts parameters and buffers from rank 0, and nothing else
        model[1]._stats.totals[0] = 1000
        moe_ext.set_loss_scale(model[2], 1.0)
    train_together(parallel, data[rank], model)
    assert_same_model(model, expected)
    assert model[1].stats()["tokens"] == 2 * 21 + 1000 * rank
    together = model[2].stats()["load"]
    dist.all_reduce(together)
    assert bits_equal(together, expected[2].stats()["load"])


def ddp_in_a_group_of_its_own(rank):
    """update_router_biases sums over the group that it is given, here a rank alone."""
    layer = make_model()[1]
    groups = [dist.new_group([r]) for r in range(RANKS)]
    alone = copy.deepcopy(layer)
    x = make_data()[rank]
    layer(x), alone(x)
    moe_ext.update_router_biases(layer, process_group=groups[rank])
    counts = alone._stats.step_counts.double()
    step = 0.01 * torch.sign(counts.mean() - counts)
    assert_close(
        layer.gate.e_score_correction_bias, alone.gate.e_score_correction_bias + step.float(), 1e-7
    )


def fsdp(rank):
    from torch.distributed.fsdp import fully_shard

    data, model = make_data(), make_model(shared_expert_intermediate_size=8, gate_bias=True)
    expected = train_alone(copy.deepcopy(model), data)
    fully_shard(model[1].experts)  # a unit inside of the layer
    for layer in model[1:]:
        fully_shard(layer)
    fully_shard(model)
    assert model[1].experts.down_proj.to_local().shape[0] == E // RANKS
    train_together(model, data[rank], model)
    assert_same_model(model, expected)
    assert model[1].stats()["tokens"] == 2 * 21


def fsdp_from_meta_in_mixed_precision(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(H, H), moe_ext.MoE(H, 12, E, 2, bias_update_rate=0.1, min_capacity=1)
        )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model[1], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device="cpu")
    for module in model:
        module.reset_parameters()
    y = model(make_data()[rank].float())
    y.square().mean().backward()
    assert y.dtype == torch.float32 and y.isfinite().all()
    assert model[1].gate.weight.grad.to_local().isfinite().all()
    assert model[1].gate.e_score_correction_bias.dtype == torch.float32
    assert model[1].stats()["tokens"] == 21


def fsdp_of_the_experts_alone_in_mixed_precision(rank):
    """The experts' own unit casts their parameters and what comes to them; the rest is float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model = make(dtype=torch.float32, shared_expert_intermediate_size=8, capacity_factor=None)
    expected = copy.deepcopy(model)
    fully_shard(model.experts, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model)
    x = make_data()[rank].float()
    y = model(x)
    y.square().mean().backward()
    assert y.dtype == torch.float32
    assert 0 < relative_error(y, expected(x).double()) < 2e-2
    assert model.experts.down_proj.grad.dtype == torch.float32


SCENARIOS = (
    ddp,
    ddp_in_a_group_of_its_own,
    fsdp,
    fsdp_from_meta_in_mixed_precision,
    fsdp_of_the_experts_alone_in_mixed_precision,
)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    for scenario in SCENARIOS:
        try:
            scenario(rank)
        except Exception:
            raise RuntimeError(f"{scenario.__name__}: {traceback.format_exc()}") from None
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """All scenarios in one pair of processes: starting them takes longer than running them."""
    mp.spawn(worker, (tmp_path,), nprocs=RANKS)

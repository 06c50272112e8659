"""Whether two builds compute the same bits: outputs and gradients of layers and stages.

    python benchmarks/same_bits.py save /tmp/before.json      # with one build
    python benchmarks/same_bits.py compare /tmp/before.json   # with the other one

Layers and arguments of the stages are drawn from a seed: dtypes, sizes from nothing to a few
hundred, options, masks. Each runs on every instruction set of this machine, and what is
written down is a digest of every result's bits, dtype and shape. `compare` names the results
that differ and exits with 1 if there are any. Shared experts are left out: they are torch's
products, whose bits follow the number of threads.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import warnings

import torch

import moe_ext
from moe_ext import functional
from moe_ext.types import Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GATED = ("swiglu", "geglu", "geglu_tanh", "reglu")
UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
SCORES = ("softmax", "sigmoid", "softmax_topk")
TOKENS = (0, 1, 2, 5, 13, 16, 17, 33, 48, 100, 257, 600)
SIZES = (1, 2, 7, 16, 31, 64, 100, 129, 256, 300)
LONG_SIZES = (1030, 2050)
EXPERTS = (1, 2, 3, 8, 17, 40, 64, 130, 300)


def digest(tensor):
    """Of what it holds; one NaN is as good as another."""
    flat = tensor.detach().contiguous().flatten()
    if flat.is_floating_point():
        flat = flat.where(~flat.isnan(), torch.nan)
    bits = hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {bits.hexdigest()}"


def normal(*shape, dtype, scale=1.0, leaf=True):
    """Drawn in float32, so that all dtypes hold nearly the same numbers."""
    return (torch.randn(shape) * scale).to(dtype).requires_grad_(leaf)


def gradients(results, **inputs):
    """Of a sum with drawn factors, by the inputs' names."""
    wanted = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    loss = sum((r * torch.randn(r.shape).to(r.dtype)).sum().double() for r in results)
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {f"{name}.grad": grad for name, grad in zip(wanted, found) if grad is not None}


def draw_sizes(draw):
    """Tokens, hidden and intermediate size, and never all of them large."""
    tokens, sizes = draw.choice(TOKENS), SIZES
    if tokens <= 48 and draw.random() < 0.3:
        sizes = LONG_SIZES
    return tokens, draw.choice(sizes), draw.choice(SIZES)


def draw_activation(draw):
    if draw.random() < 0.3:
        return {"activation": draw.choice(UNGATED), "transposed": draw.random() < 0.3}
    activation = draw.choice(GATED)
    clamped = draw.random() < 0.3
    return {
        "activation": activation,
        "limit": 1.5 if clamped else None,
        "alpha": 1.702 if clamped and activation == "swiglu" else 1.0,
        "up_offset": float(clamped),
        "transposed": draw.random() < 0.3,
        "interleaved": draw.random() < 0.3,
    }


def draw_routing(draw, num_experts):
    options = {
        "score_function": draw.choice(SCORES),
        "norm_topk_prob": draw.random() < 0.6,
        "routed_scaling_factor": draw.choice((1.0, 2.5)),
    }
    groups = draw.choice([g for g in (1, 2, 4) if num_experts % g == 0])
    if groups > 1:
        options |= {"n_group": groups, "topk_group": draw.randint(1, groups)}
        options["group_score"] = draw.choice(("max", "top2_sum"))
    eligible = num_experts // groups * options.get("topk_group", 1)
    return options, min(eligible, draw.choice((1, 2, 3, 8, 8, 40)))


def layer(draw):
    """moe_ext.MoE: training, with every loss, and inference."""
    (tokens, hidden, intermediate), num_experts = draw_sizes(draw), draw.choice(EXPERTS[:6])
    routing, top_k = draw_routing(draw, num_experts)
    dtype = draw.choice(DTYPES)
    options = draw_activation(draw) | routing
    options |= {
        "bias": draw.random() < 0.4,
        "gate_bias": draw.random() < 0.3,
        "score_correction_bias": draw.random() < 0.3,
        "capacity_factor": draw.choice((None, 0.6, 1.25)),
        "drop_policy": draw.choice(("token", "choice", "probs")),
        "renormalize_after_drop": draw.random() < 0.2,
        "aux_loss_coef": draw.choice((0.0, 0.01)),
        "z_loss_coef": draw.choice((0.0, 0.001)),
        "router_dtype": draw.choice((None, None, torch.float32)),
        "dtype": dtype,
    }
    name = f"MoE({hidden}, {intermediate}, {num_experts}, {top_k}, {options}) of {tokens} tokens"
    module = moe_ext.MoE(hidden, intermediate, num_experts, top_k, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for bias in (b for n, b in module.named_buffers() if n.endswith("e_score_correction_bias")):
        torch.nn.init.normal_(bias, std=0.1)
    x = normal(1, tokens, hidden, dtype=dtype)
    mask = torch.rand(1, tokens) < 0.2 if draw.random() < 0.3 else None
    y, route = module(x, padding_mask=mask, return_routing=True)
    found = {"y": y, **dict(zip(("weights", "experts"), (route.weights, route.experts)))}
    found |= {f"plan.{field}": value for field, value in route.plan._asdict().items()}
    found |= gradients([y], x=x, **dict(module.named_parameters()))
    module.eval()
    with torch.no_grad(), functional.batch_invariant(draw.random() < 0.3):
        found["inference"] = module(x, padding_mask=mask)
    return name, found | {f"buffer {n}": b for n, b in module.named_buffers()}


def router_logits(draw):
    (tokens, hidden, _), num_experts = draw_sizes(draw), draw.choice(EXPERTS)
    kinds = draw.choice(DTYPES), draw.choice(DTYPES)
    x = normal(tokens, hidden, dtype=kinds[0])
    weight = normal(num_experts, hidden, dtype=kinds[1], scale=hidden**-0.5)
    bias = normal(num_experts, dtype=kinds[1]) if draw.random() < 0.5 else None
    if draw.random() < 0.2:  # rows further apart than they are long
        x = normal(tokens, hidden + 3, dtype=kinds[0], leaf=False)[:, :hidden].requires_grad_()
    logits = functional.router_logits(x, weight, bias)
    found = {"logits": logits, **gradients([logits], x=x, weight=weight, bias=bias)}
    return f"router_logits of {tokens} x {hidden} x {num_experts}, {kinds}", found


def topk_route(draw):
    """And accumulate_stats, of the same logits."""
    tokens, num_experts, dtype = draw.choice(TOKENS), draw.choice(EXPERTS), draw.choice(DTYPES)
    options, top_k = draw_routing(draw, num_experts)
    logits = normal(tokens, num_experts, dtype=dtype, scale=draw.choice((1, 1, 30)))
    if tokens:
        with torch.no_grad():
            logits[tokens // 2, 0] = draw.choice((0.0, float("nan"), float("-inf")))
    mask = torch.rand(tokens) < 0.2 if draw.random() < 0.3 else None
    if draw.random() < 0.3:
        options["selection_bias"] = torch.randn(num_experts) * 0.1
    if draw.random() < 0.2:
        options["experts"] = torch.randint(0, num_experts + 1, (tokens, top_k))
    route = functional.topk_route(logits, top_k, padding_mask=mask, **options)
    found = route._asdict()
    found |= gradients([route.weights, route.score_sums, route.logsumexp], logits=logits)
    weights = functional.topk_route(logits, top_k, padding_mask=mask, **options).weights
    found["logits.grad of weights"] = gradients([weights], logits=logits)["logits.grad"]
    counts = torch.zeros(num_experts, dtype=torch.int64)
    sums, totals = torch.zeros(num_experts).double(), torch.zeros(7).double()
    torch.ops.moe_ext.accumulate_stats(
        counts, sums, totals, None, logits.detach(), route.experts, route.counts,
        route.score_sums.detach(), None, mask, options["score_function"],
    )  # fmt: skip
    found |= {"counts": counts, "stats.score_sums": sums, "stats.totals": totals}
    return f"topk_route of {tokens} x {num_experts}, top_k {top_k}, {dtype}, {options}", found


def experts(draw):
    """grouped_ffn, weighted_combine, moe_forward and gather_rows over one plan."""
    (tokens, hidden, intermediate), num_experts = draw_sizes(draw), draw.choice(EXPERTS[:6])
    top_k, dtype = min(num_experts, draw.choice((1, 2, 4))), draw.choice(DTYPES)
    options, capacity = draw_activation(draw), draw.choice((None, None, 1 + tokens // 4))
    width = intermediate * (2 if options["activation"] in GATED else 1)
    up_shape, down_shape = (width, hidden), (hidden, intermediate)
    if options["transposed"]:
        up_shape, down_shape = up_shape[::-1], down_shape[::-1]
    biased = draw.random() < 0.4
    inputs = {
        "x": normal(tokens, hidden, dtype=dtype),
        "up_proj": normal(num_experts, *up_shape, dtype=dtype, scale=hidden**-0.5),
        "down_proj": normal(num_experts, *down_shape, dtype=dtype, scale=intermediate**-0.5),
        "up_bias": normal(num_experts, width, dtype=dtype) if biased else None,
        "down_bias": normal(num_experts, hidden, dtype=dtype) if biased else None,
    }
    chosen = torch.randint(0, num_experts + 1, (tokens, top_k))
    plan = functional.capacity_scatter(chosen, num_experts, capacity)
    x, *parameters = inputs.values()
    weights = normal(tokens, top_k, dtype=draw.choice((dtype, torch.float32)))
    wide = normal(tokens, top_k, dtype=draw.choice((dtype, torch.float64)))
    activation = Activation(
        options["activation"], **{k: options[k] for k in options.keys() - {"activation"}}
    )
    with functional.batch_invariant(draw.random() < 0.3):
        rows = functional.grouped_ffn(x, plan, *parameters, activation=activation)
        y = functional.moe_forward(x, weights, plan, *parameters, activation=activation)
    gathered = functional.gather_rows(x, plan)
    leaf = rows.detach().clone().requires_grad_()
    combined = functional.weighted_combine(leaf, wide, plan)
    found = {"rows": rows, "y": y, "gathered": gathered, "combined": combined}
    found |= gradients([rows], **inputs)
    for name, result, of in (
        ("moe_forward", y, inputs | {"weights": weights}),
        ("gather_rows", gathered, {"x": x}),
        ("weighted_combine", combined, {"rows": leaf, "weights": wide}),
    ):
        found |= {f"{name}, {key}": grad for key, grad in gradients([result], **of).items()}
    sizes = f"{tokens} x {hidden} x {intermediate}, {num_experts} experts, top_k {top_k}"
    return f"experts of {sizes}, capacity {capacity}, bias {biased}, {dtype}, {options}", found


DRAWN = (layer, router_logits, topk_route, experts)


def digests(cases, seed):
    """{case: {result: digest}} on the instruction set that this process uses."""
    warnings.simplefilter("ignore")  # of layers that no one would train
    found = {}
    for number in range(cases):
        for kind in DRAWN:
            draw = random.Random(f"{seed} {number} {kind.__name__}")
            torch.manual_seed(draw.getrandbits(32))
            name, results = kind(draw)
            found[f"{number}: {name}"] = {key: digest(value) for key, value in results.items()}
    return found


def all_digests(cases, seed):
    """The same of every instruction set, each in a process of its own."""
    found = {}
    for name in sorted(torch.ops.moe_ext.cpu_instruction_sets()):
        command = [sys.executable, __file__, "digest", "-", f"--cases={cases}", f"--seed={seed}"]
        environment = os.environ | {"MOE_EXT_CPU": name}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        found[name] = json.loads(done.stdout)
    return found


def differences(before, after):
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield f"{name}: only one build has it"
            continue
        for case in before[name].keys() | after[name].keys():
            old, new = before[name].get(case, {}), after[name].get(case, {})
            keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            if keys:
                yield f"{name}, {case}: {', '.join(keys)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("save", "compare", "digest"))
    parser.add_argument("file", help="JSON; - with `digest`, which is what the others run")
    parser.add_argument("--cases", type=int, default=60, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.command == "digest":
        json.dump(digests(arguments.cases, arguments.seed), sys.stdout)
    elif arguments.command == "save":
        drawn = {"cases": arguments.cases, "seed": arguments.seed}
        with open(arguments.file, "w") as file:
            json.dump(drawn | {"digests": all_digests(**drawn)}, file)
    else:
        with open(arguments.file) as file:
            before = json.load(file)
        after = all_digests(before["cases"], before["seed"])
        found = list(differences(before["digests"], after))
        print(*found, sep="\n", end="\n" if found else "")
        results = sum(len(case) for cases in after.values() for case in cases.values())
        print(f"{results} results on {', '.join(after)}: {len(found)} cases differ")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()

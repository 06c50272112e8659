"""moe_ext.MoE beside transformers' block and beside the bound, in one run.

    python benchmarks/bench_layer.py                    # all shapes, both dtypes
    python benchmarks/bench_layer.py --shapes coarse decode_fine_1 --dtypes float32
    python benchmarks/bench_layer.py --update-docs      # also the table and the chart

ours   moe_ext.MoE, dropless, without losses: what the peers compute
peers  transformers' MixtralSparseMoeBlock over the same parameters, its experts
       `eager`, `grouped_mm`, and for at most 16 tokens `batched_mm`
bound  a dense SwiGLU of the same FLOPs through F.linear: T*K rows through one
       expert; for training plus one fresh write of every expert's gradient

Contestants are timed in turn, round by round (calls below 20 ms several in a row); a
number is the median over the rounds, a share or ratio the median of the rounds' own
ratios. Forward is inference (no_grad); forward+backward takes the gradient of x and of
all parameters, which are set to None between the calls. The tokens are such that every
side chooses the same experts, and outputs are compared before anything is timed.

With `--device cuda` bench_layer_cuda.py runs in its place.

Decoding is timed with the weights out of the caches, and counted in bytes of
weights of the chosen experts a second, as a share of the machine's read bandwidth,
which is measured in every round.
"""

import argparse
import statistics
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import harness
import moe_ext
import report_layer


class Shape(NamedTuple):
    tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    kind: str  # train: forward and forward+backward; decode: forward with cold caches


SHAPES = {
    "coarse": Shape(1024, 1024, 3584, 8, 2, "train"),
    "fine": Shape(1024, 1024, 512, 64, 8, "train"),
    "finest": Shape(512, 1024, 384, 128, 8, "train"),
    "decode_coarse_1": Shape(1, 1024, 3584, 8, 2, "decode"),
    "decode_coarse_16": Shape(16, 1024, 3584, 8, 2, "decode"),
    "decode_finest_1": Shape(1, 1024, 384, 128, 8, "decode"),
    "decode_finest_16": Shape(16, 1024, 384, 128, 8, "decode"),
    "overhead": Shape(16, 64, 128, 8, 2, "train"),
}
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def our_layer(shape, dtype, device):
    layer = moe_ext.MoE(
        shape.hidden, shape.intermediate, shape.num_experts, shape.top_k,
        capacity_factor=None, aux_loss_coef=0.0, dtype=dtype, device=device,
    )  # fmt: skip
    for parameter in layer.parameters():  # unit scale: a smaller one would hide differences
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer


def peer_block(implementation, shape, layer):
    """transformers' block over the layer's own parameters."""
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.load_state_dict(layer.state_dict(), assign=True)
    return block.requires_grad_(True)


def clear_tokens(layer, shape, dtype, device):
    """x (1, T, H): of four times as many, the tokens whose K-th choice is furthest ahead of
    the next one, so that a router in bfloat16 chooses the same experts."""
    candidates = torch.randn(4 * shape.tokens, shape.hidden, device=device).to(dtype)
    logits = candidates.double() @ layer.gate.weight.detach().double().T
    best = logits.topk(shape.top_k + 1).values
    clearest = (best[:, -2] - best[:, -1]).argsort(descending=True)[: shape.tokens]
    return candidates[clearest.sort().values][None]


class Dense(torch.nn.Module):
    """The bound: T*K rows through one expert."""

    def __init__(self, shape, dtype, device):
        super().__init__()
        kwargs = dict(bias=False, dtype=dtype, device=device)
        self.gate_up_proj = torch.nn.Linear(shape.hidden, 2 * shape.intermediate, **kwargs)
        self.down_proj = torch.nn.Linear(shape.intermediate, shape.hidden, **kwargs)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


def inference(module, x):
    def call():
        with torch.no_grad():
            module(x)

    return call


def training(module, x, grad):
    x = x.detach().clone().requires_grad_()

    def call():
        module(x).backward(grad)

    def reset():
        x.grad = None
        module.zero_grad(set_to_none=True)

    return call, reset


def check_agreement(name, layer, block, x):
    _, routing = layer(x, return_routing=True)
    theirs = block.gate(x)[2]
    if not torch.equal(routing.experts.long().sort(-1).values, theirs.sort(-1).values):
        raise RuntimeError(f"{name}: the peer chose other experts, the timings would not compare")
    ours, theirs = layer(x).double(), block(x).double()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    tolerance = TOLERANCE[str(x.dtype).removeprefix("torch.")]
    if not error <= tolerance:
        raise RuntimeError(f"{name}: outputs differ by {error:.2e} of their norm, over {tolerance}")


def bench_case(name, shape, dtype, device, repeats, read):
    """One case of the results file: every side's times, and what they mean."""
    torch.manual_seed(0)
    layer = our_layer(shape, dtype, device)
    x = clear_tokens(layer, shape, dtype, device)
    implementations = ["eager", "grouped_mm"] + ["batched_mm"] * (shape.tokens <= 16)
    sides = {"ours": layer}
    for implementation in implementations:
        sides[implementation] = peer_block(implementation, shape, layer)
        with torch.no_grad():
            check_agreement(implementation, layer.eval(), sides[implementation].eval(), x)
    dense = Dense(shape, dtype, device)
    rows = x[0].repeat_interleave(shape.top_k, 0)
    with torch.no_grad():
        counts = layer(x, return_routing=True)[1].plan.expert_counts
    case = {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        **{f: v for f, v in shape._asdict().items() if f != "kind"},
        "kind": shape.kind,
        "repeats": repeats,
        "max_load": counts.max().item() / counts.double().mean().item(),
    }

    calls = {side: inference(module.eval(), x) for side, module in sides.items()}
    calls["bound"] = inference(dense, rows)
    if shape.kind == "decode":
        calls["read"] = read
        times = harness.interleaved(calls, repeats, prepare=read, turn=0.0)
        reads = times.pop("read")
        case["forward"] = summary(times)
        active = int((counts > 0).sum())
        expert = sum(p[0].numel() for p in layer.experts.parameters())
        weights = (active * expert + layer.gate.weight.numel()) * x.element_size()
        case["weights_bytes"] = weights
        case["streamed"] = {
            side: harness.ratio(reads, seconds) * weights / read.bytes
            for side, seconds in times.items()
            if side != "bound"
        }
        return case

    case["forward"] = summary(harness.interleaved(calls, repeats))
    grad = torch.randn_like(x)
    pairs = {side: training(module.train(), x, grad) for side, module in sides.items()}
    pairs["bound"] = training(dense, rows, torch.randn_like(rows))
    calls = {side: call for side, (call, _) in pairs.items()}
    # What training cannot avoid: fresh memory for the experts' gradients, written once.
    written = []
    calls["write"] = lambda: written.extend(
        torch.empty_like(p).fill_(1.0) for p in layer.experts.parameters()
    )

    def reset():
        written.clear()
        for _, clear in pairs.values():
            clear()

    times = harness.interleaved(calls, repeats, prepare=reset)
    reset()
    case["write_seconds"] = statistics.median(times["write"])
    times["bound"] = [b + w for b, w in zip(times["bound"], times.pop("write"))]
    case["forward_backward"] = summary(times)
    x = x.detach().requires_grad_()
    case["saved_bytes"] = {
        side: harness.saved_bytes(lambda module=module: module(x), module.parameters())
        for side, module in sides.items()
    }
    return case


def summary(times):
    """Medians in seconds, ours as a share of the bound and against each peer."""
    result = harness.compared(times)
    share = result["against"].pop("bound")
    best = min(result["against"], key=result["seconds"].get)
    return {
        "seconds": result["seconds"],
        "fastest_seconds": result["fastest_seconds"],
        "share_of_bound": share,
        "best_peer": best,
        "against_best_peer": result["against"][best],
        "against": result["against"],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--repeats", type=int, default=11, help="rounds (default 11)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, for a first look")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", help="results file (default benchmarks/results/layer_cpu.json)")
    parser.add_argument("--dry-run", action="store_true", help="write no results")
    parser.add_argument("--update-docs", action="store_true")
    arguments = parser.parse_args()

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = arguments.out or harness.RESULTS / f"layer_{arguments.device}.json"
    read = harness.MemoryRead()
    about = dict(
        machine=harness.machine(),
        read_bandwidth=read.bandwidth(),
        import_seconds=harness.import_seconds(),
    )
    provenance = harness.provenance()  # before results change the checkout
    print(report_layer.describe(about), flush=True)
    for name in arguments.shapes:
        for dtype in arguments.dtypes:
            case = bench_case(
                name,
                SHAPES[name],
                getattr(torch, dtype),
                arguments.device,
                3 if arguments.quick else arguments.repeats,
                read,
            )
            case.update(provenance)
            print(report_layer.lines(case), flush=True)
            if not arguments.dry_run:
                harness.merge_results(path, [case], **about)
    if arguments.update_docs:
        report_layer.update_docs(path)


if __name__ == "__main__":
    if {"cuda", "--device=cuda"} & set(sys.argv):  # other shapes, other clocks: a file of its own
        import bench_layer_cuda

        bench_layer_cuda.main()
    else:
        main()

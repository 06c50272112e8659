"""Published models' MoE blocks inside transformers: moe_ext beside what transformers ships.

    python benchmarks/bench_models.py                                  # 14 minutes on two cores
    python benchmarks/bench_models.py --models olmoe --dtypes float32 --tasks train
    python benchmarks/bench_models.py --device cuda --memory 60 --tokens 4096
    python benchmarks/bench_models.py --models --update-docs           # only the tables and the chart

A row is one MoE block, router and shared experts included, of the class and the sizes that the
model has, with random weights. Contestants are `config._experts_implementation`, over the very
same block and parameters: `moe_ext` (ours), `eager`, `grouped_mm` and `batched_mm`.

prefill    forward without gradients, of `tokens` tokens in one sequence
decode_N   the same of N sequences of one token, the weights out of the caches
train      forward and backward of `tokens` tokens: the gradients of x and of all parameters,
           which are set to None between the calls; and the bytes kept for the backward pass
lora       the same with the block frozen under adapters of PEFT's target_parameters on both
           expert stacks, for the models in `--lora`; the peers go PEFT's own way. Left out
           where PEFT is not installed

Contestants are timed in turn, round by round; a number is the median over the rounds, a ratio
the median of the rounds' own ratios; outputs are compared before anything is timed. A model whose
weights take more than a quarter of `--memory` has its experts halved, once or more, as its row
says: training with `eager` takes four times as much. `batched_mm` copies the weights of every
token's experts, and is left out where they do not fit. A contestant that needs more than
`--patience` seconds for a call is timed once, and is stopped in its first training step after
8 times as long as the fastest takes.
"""

import argparse
import functools
import importlib.util

import torch

import harness
import published
import report_models
from moe_ext.integrations.transformers import register
from published import MODELS, experts_of, output_of, weights_bytes

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
GIVE_UP = 8


class Clock:
    """How a call ends on the device, and how caches are emptied before one."""

    def __init__(self, device):
        self.on_gpu = device == "cuda"

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def evictor(self):
        if not self.on_gpu:
            return harness.MemoryRead()
        size = max(256 << 20, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
        buffer = torch.empty(size, dtype=torch.int8, device="cuda")
        return lambda: (buffer.zero_(), torch.cuda.synchronize())

    def inference(self, block, x):
        def call():
            with torch.no_grad():
                block(x)
            self.synchronize()

        return call

    def training(self, block, x, grad):
        def call():
            output_of(block, x).backward(grad)
            self.synchronize()

        return call


def check_agreement(sides, x):
    """Outputs within the tolerance of eager's."""
    with torch.no_grad():
        outputs = {side: output_of(block, x).double() for side, block in sides.items()}
    tolerance = TOLERANCE[str(x.dtype).removeprefix("torch.")]
    for side, y in outputs.items():
        error = ((y - outputs["eager"]).norm() / outputs["eager"].norm()).item()
        if not error <= tolerance:
            raise RuntimeError(f"{side}: {error:.2e} of eager's norm away, over {tolerance}")


class Bench:
    """One model's block in one dtype; a method a task, which returns what the results file says
    of it."""

    def __init__(self, model, dtype, clock, arguments):
        self.clock, self.arguments = clock, arguments
        self.dtype, self.device = getattr(torch, dtype), arguments.device
        self.memory = arguments.memory * 2**30
        self.tokens = arguments.tokens or model.tokens
        torch.manual_seed(0)
        self.block = published.make_block(model, self.dtype, self.device, self.memory)
        self.config = self.block.experts.config
        self.sides = published.on_every_implementation(self.block)
        check_agreement(self.fitting(2)[0], self.random(1, 2))

    def prefill(self):
        return self.forward(self.random(1, self.tokens))

    def decode(self, count):
        evict = self.clock.evictor()
        return self.forward(self.random(count, 1), prepare=evict, turn=0.0, patience=0.5)

    def forward(self, x, **how):
        sides, left_out = self.fitting(x.shape[0] * x.shape[1])
        calls = {side: self.clock.inference(block.eval(), x) for side, block in sides.items()}
        return self.result(self.interleaved(calls, **how), left_out)

    def train(self):
        sides, left_out = self.fitting(self.tokens)
        x = self.random(1, self.tokens).requires_grad_()
        grad = self.random(1, self.tokens)
        calls = {side: self.clock.training(b.train(), x, grad) for side, b in sides.items()}

        def reset():
            x.grad = None
            self.block.zero_grad(set_to_none=True)

        times = self.interleaved(calls, prepare=reset, give_up=GIVE_UP)
        reset()
        left_out |= {side: f"took over {GIVE_UP}x as long" for side, t in times.items() if not t}
        saved = {
            side: harness.saved_bytes(functools.partial(block, x), block.parameters())
            for side, block in sides.items()
        }
        return {**self.result(times, left_out), "saved_bytes": saved}

    def lora(self):
        """As train, of adapters on the frozen experts. Changes the block: comes last."""
        published.add_adapters(self.block)
        self.sides = published.on_every_implementation(self.block)
        check_agreement(self.fitting(2)[0], self.random(1, 2))
        return {**self.train(), "rank": published.LORA_RANK}

    def random(self, *shape):
        x = torch.randn(*shape, self.config.hidden_size, device=self.device)
        return x.to(self.dtype)

    def fitting(self, tokens):
        """({side: block}, {side: why it is left out})"""
        expert = weights_bytes(experts_of(self.block)) / self.config.num_local_experts
        copies = tokens * self.config.num_experts_per_tok * expert
        if weights_bytes(self.block) + copies <= self.memory:
            return self.sides, {}
        why = f"would copy {copies / 1e9:.0f} GB of weights"
        return {s: b for s, b in self.sides.items() if s != "batched_mm"}, {"batched_mm": why}

    def interleaved(self, calls, **how):
        of = self.arguments
        limits = dict(at_least=1.0, at_most=of.seconds, patience=of.patience) | how
        return harness.interleaved(calls, of.repeats, **limits)

    @staticmethod
    def result(times, left_out):
        return {**harness.compared(times, "moe_ext"), "left_out": left_out}


TASKS = {
    "prefill": Bench.prefill,
    "decode_1": functools.partial(Bench.decode, count=1),
    "decode_16": functools.partial(Bench.decode, count=16),
    "train": Bench.train,
}


def bench_case(name, dtype, clock, arguments):
    """One case of the results file: a model in a dtype, the tasks, every side."""
    model = MODELS[name]
    bench = Bench(model, dtype, clock, arguments)
    config = bench.config
    tasks = {task: TASKS[task](bench) for task in arguments.tasks}
    if name in arguments.lora:
        tasks["lora"] = bench.lora()
    return {
        "shape": name,
        "dtype": dtype,
        "checkpoint": model.checkpoint,
        "block": model.block.__name__,
        "hidden": config.hidden_size,
        "intermediate": published.intermediate_size(config),
        "experts": config.num_local_experts,
        "experts_of_model": model.sizes["num_local_experts"],
        "top_k": config.num_experts_per_tok,
        "tokens": bench.tokens,
        "tasks": tasks,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lora", nargs="*", choices=MODELS, default=["olmoe"])
    parser.add_argument("--tokens", type=int, help="of prefill and train (default: by model)")
    parser.add_argument("--repeats", type=int, default=11, help="rounds (default 11)")
    parser.add_argument("--seconds", type=float, default=6, help="of rounds a task (default 6)")
    parser.add_argument("--patience", type=float, default=4, help="seconds a call (default 4)")
    parser.add_argument("--memory", type=float, default=12, help="GiB (default 12)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, for a first look")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", help="results file (default benchmarks/results/models_cpu.json)")
    parser.add_argument("--dry-run", action="store_true", help="write no results")
    parser.add_argument("--update-docs", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench_models.py --device cuda: torch sees no GPU")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.lora and importlib.util.find_spec("peft") is None:
        print("PEFT is not installed: training with LoRA is left out")
        arguments.lora = []
    if arguments.quick:
        arguments.repeats, arguments.seconds = 3, 0.0

    register()
    path = arguments.out or harness.RESULTS / f"models_{arguments.device}.json"
    provenance = harness.provenance()  # before results change the checkout
    if arguments.models:
        clock = Clock(arguments.device)
        about = dict(machine=harness.machine(arguments.device))
        print(report_models.describe(about), flush=True)
    for name in arguments.models:
        for dtype in arguments.dtypes:
            case = bench_case(name, dtype, clock, arguments)
            case.update(provenance)
            print(report_models.lines(case), flush=True)
            if not arguments.dry_run:
                harness.merge_results(path, [case], **about)
    if arguments.update_docs:
        report_models.update_docs(path)
        report_models.update_readme()


if __name__ == "__main__":
    main()

"""Two builds of moe_ext beside each other: whether a change has cost speed.

    python benchmarks/bench_builds.py ../before            # a checkout with its library built
    python benchmarks/bench_builds.py ../before --cases overhead olmoe --dry-run
    python benchmarks/bench_builds.py ../before --update-docs          # also the table

Cases are the layers of bench_layer.py and blocks of bench_models.py, on moe_ext in each of two
processes that take turns, round by round. A ratio is the median of the rounds' own ratios, the
time before over the time now: above 1 this checkout is faster. Weights and tokens are the same,
drawn from one seed.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
from pathlib import Path

import torch

import harness
import published
import report_builds
from bench_layer import SHAPES
from moe_ext.integrations.transformers import register
from sides import inference, our_layer, training
from workers import Process, serve

DTYPES = ("float32", "bfloat16")


@functools.cache
def evictor():
    """Decoding finds its weights in memory, not in a cache."""
    return harness.MemoryRead()


def layer_calls(shape, dtype):
    """(task, (call, reset)) of a layer of bench_layer.py, in turn"""
    decodes = shape.kind == "decode"
    layer = our_layer(shape, dtype, "cpu")
    x = torch.randn(1, shape.tokens, shape.hidden).to(dtype)
    yield "forward", (inference(layer.eval(), x), evictor() if decodes else None)
    if not decodes:
        yield "train", training(layer.train(), x, torch.randn_like(x))


def model_calls(name, dtype):
    """The same of a model's block, and of its training with LoRA."""
    model = published.MODELS[name]
    block = published.make_block(model, dtype, "cpu", 12 * 2**30)
    x = torch.randn(1, model.tokens, block.experts.config.hidden_size).to(dtype)

    def training(block):
        block = published.on_every_implementation(block)["moe_ext"].train()
        rows, grad = x.clone().requires_grad_(), torch.randn_like(x)

        def reset():
            rows.grad = None
            block.zero_grad(set_to_none=True)

        return lambda: published.output_of(block, rows).backward(grad), reset

    ours = published.on_every_implementation(block)["moe_ext"].eval()
    yield "prefill", (inference(ours, x), None)
    yield "decode", (inference(ours, x[:, :1]), evictor())
    yield "train", training(block)
    published.add_adapters(block)
    yield "lora", training(block)


def cases():
    """{name: function(dtype) that gives its tasks}"""
    layers = {name: functools.partial(layer_calls, shape) for name, shape in SHAPES.items()}
    models = {name: functools.partial(model_calls, name) for name in ("olmoe", "qwen3")}
    return layers | models


class Worker:
    """In a build's own process: makes a case's tasks one after another, and times calls."""

    def commit(self):
        return harness.provenance()["commit"]

    def make(self, name, dtype):
        torch.manual_seed(0)
        self.call = self.reset = None
        self.tasks = iter(cases()[name](getattr(torch, dtype)))

    def next_task(self):
        """Its name; None after the last."""
        name, (self.call, self.reset) = next(self.tasks, (None, (None, None)))
        return name

    def seconds(self):
        if self.reset:
            self.reset()
        return harness.seconds_of(self.call)


def start(checkout, threads):
    paths = [checkout, harness.ROOT / "benchmarks"]
    return Process([sys.executable, __file__, "worker"], threads, paths)


def bench_case(builds, name, dtype, repeats):
    """One case of the results file: {task: what was measured}."""
    for build in builds.values():
        build.ask("make", name, dtype)
    tasks = {}
    while task := {build.ask("next_task") for build in builds.values()}.pop():
        calls = {side: functools.partial(build.ask, "seconds") for side, build in builds.items()}
        times = harness.interleaved(calls, repeats, at_most=8.0, measure=lambda call: call())
        tasks[task] = harness.compared(times, "now")
        print(f"{name:18} {dtype:9} {task:8} {tasks[task]['against']['before']:.2f}", flush=True)
    return {"shape": name, "dtype": dtype, "tasks": tasks}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="the other checkout")
    parser.add_argument("--cases", nargs="+", choices=cases(), default=list(cases()))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--repeats", type=int, default=11, help="rounds (default 11)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default=harness.RESULTS / "builds_cpu.json")
    parser.add_argument("--dry-run", action="store_true", help="write no results")
    parser.add_argument("--update-docs", action="store_true")
    arguments = parser.parse_args()
    provenance = harness.provenance()
    provenance["command"] = provenance["command"].replace(arguments.before, "BEFORE")
    with contextlib.ExitStack() as stack:
        builds = {
            side: stack.enter_context(start(checkout, arguments.threads))
            for side, checkout in {"before": arguments.before, "now": harness.ROOT}.items()
        }
        provenance["before"] = builds["before"].ask("commit")
        for name in arguments.cases:
            for dtype in arguments.dtypes:
                case = bench_case(builds, name, dtype, arguments.repeats) | provenance
                if not arguments.dry_run:
                    about = {"machine": harness.machine()}
                    harness.merge_results(arguments.out, [case], **about)
    if arguments.update_docs:
        report_builds.update(json.loads(Path(arguments.out).read_text()))


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        register()
        serve(Worker())
    else:
        main()

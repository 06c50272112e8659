"""What Hopper's kernels should take, by arithmetic: a table to hold a GPU's times against.

    python benchmarks/predict_hopper.py              writes results/predicted_hopper.md
    python benchmarks/predict_hopper.py bench.json   prints what bench_layer_cuda.py measured beside it

Nothing is measured here. A kernel's time is the larger of two: that of its tiles, in clocks of
the tightest of tensor cores, shared memory and L2, with what the epilogue adds where no product
hides it; and that of every operand and result once through the memory. The chips' numbers are
those of large dense products and of copies on them. The same arithmetic, of another library's
kernels with published times, promises too much: REALITY is what was left of it there.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

RESULT = Path(__file__).parent / "results" / "predicted_hopper.md"


class Chip(NamedTuple):
    tensor: float  # FLOP/s of a large dense bfloat16 product
    memory: float  # bytes/s of a copy


CHIPS = {"H100": Chip(798e12, 3.0e12), "H200": Chip(788e12, 4.3e12)}
SMS, FLOP_A_CLOCK = 132, 4096  # multiprocessors; of a multiprocessor's tensor cores
SMEM_A_CLOCK, L2_A_CLOCK = 128, 8e6 / 1300  # bytes: a multiprocessor's, the chip's
MMA_SYNC = 0.5  # of a large dense product's speed: what the router's tiles reach by mma.sync
ROUTER_TILE = 128  # columns of its tiles
LAUNCHES = 20e-6  # s: top-k and the plan
REALITY = {"forward": 0.867, "backward": 0.827}

# ---- the tile: grouped_gemm_sm90.cuh ----------------------------------------------------------

TILE_M, TILE_N, TILE_K, ELEMENT = 128, 256, 64, 2
STAGE = (TILE_M + TILE_N) * TILE_K * ELEMENT
# Every m64n256k16 reads its A and its B from shared memory.
OPERANDS = TILE_M // 64 * TILE_K // 16 * (64 + TILE_N) * 16 * ELEMENT
CLOCKS = {  # of a stage
    "tensor": 2 * TILE_M * TILE_N * TILE_K / FLOP_A_CLOCK,
    "shared memory": (OPERANDS + STAGE) / SMEM_A_CLOCK,
    "L2": STAGE * SMS / L2_A_CLOCK,
}
GATHER = 1.03  # of a stage whose rows are gathered
# Clocks of a tile's epilogue: 64 bytes staged a clock; 2 special functions an activation, of which
# 16 go a clock; 26 instructions an element of the backward one, of which 128 go a clock.
EPILOGUES = {
    "store": TILE_M * TILE_N * ELEMENT / 64,
    "activate": TILE_M * TILE_N / 2 * 2 / 16 * 1.15,
    "backward": TILE_M * TILE_N * 26 / 128 * 1.15,
}


class Shape(NamedTuple):
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    published: tuple = ()  # SonicMoE's TFLOP/s on an H100, forward and backward

    @property
    def rows(self):
        return self.tokens * self.top_k


# The published ones are read off figure 14 of arXiv:2512.14080, to about 5.
SHAPES = {
    "7B n256": Shape(24576, 1536, 256, 128, 8, (363, 404)),
    "7B n512": Shape(24576, 1536, 512, 64, 4, (431, 438)),
    "7B n1024": Shape(24576, 1536, 1024, 32, 2, (463, 465)),
    "30B n256": Shape(32768, 4096, 256, 256, 16, (427, 459)),
    "30B n512": Shape(32768, 4096, 512, 128, 8, (502, 510)),
    "30B n1024": Shape(32768, 4096, 1024, 64, 4, (551, 553)),
    "120B n512": Shape(32768, 4096, 512, 256, 16, (517, 526)),
    "120B n1024": Shape(32768, 4096, 1024, 128, 8, (557, 566)),
    "120B n2048": Shape(32768, 4096, 2048, 64, 4, (594, 585)),
    "Mixtral": Shape(8192, 4096, 14336, 8, 2),
    "Qwen3-30B": Shape(32768, 2048, 768, 128, 8),
    "DeepSeek-V3": Shape(4096, 7168, 2048, 256, 8),
}
DECODING = {
    f"{name}, {tokens} tokens": SHAPES[name]._replace(tokens=tokens)
    for name, tokens in (("Mixtral", 1), ("Qwen3-30B", 1), ("DeepSeek-V3", 1))
}


# ---- kernels ------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    name: str
    flops: float
    bytes: float
    clocks: float  # of a multiprocessor

    def seconds(self, chip):
        clock = chip.tensor / (SMS * FLOP_A_CLOCK)
        return max(self.clocks / clock, self.bytes / chip.memory)


def tiles_in(count, size):
    return math.ceil(count / size)


def on_all(tiles, clocks):
    """Clocks until every tile is done: in whole turns, of which many even out."""
    turns = tiles / SMS
    return (math.ceil(turns) if turns < 20 else turns + 0.5) * clocks


def rows_product(name, s, n, k, epilogue, gathered, moved):
    row_tiles = s.rows / TILE_M + s.experts / 2  # an expert's last tile is half full
    stage = max(CLOCKS.values()) * (GATHER if gathered else 1)
    clocks = tiles_in(k, TILE_K) * stage + EPILOGUES[epilogue]
    return Kernel(
        name, 2 * s.rows * n * k, moved * ELEMENT,
        on_all(row_tiles * tiles_in(n, TILE_N), clocks),
    )  # fmt: skip


def weight_gradient(name, s, m, n, moved):
    stages = s.rows / s.experts / TILE_K + 0.5  # the last one is half full
    clocks = stages * max(CLOCKS.values()) * GATHER + EPILOGUES["store"]
    tiles = s.experts * tiles_in(m, TILE_M) * tiles_in(n, TILE_N)
    return Kernel(name, 2 * s.rows * m * n, moved * ELEMENT, on_all(tiles, clocks))


def kernels(s):
    """(forward, backward), in the order in which they run; the router apart."""
    R, H, I = s.rows, s.hidden, s.intermediate
    weight = s.experts * I * H
    combine = Kernel("combine", 0, (R * H + s.tokens * H) * ELEMENT, 0)
    forward = [
        rows_product("up", s, 2 * I, H, "activate", True, R * H + 2 * weight + 3 * R * I),
        rows_product("down", s, H, I, "store", False, R * I + weight + R * H),
        combine,
    ]
    backward = [
        rows_product("dA", s, I, H, "backward", True, R * H + weight + 5 * R * I),
        rows_product("dX", s, H, 2 * I, "store", False, 2 * R * I + 2 * weight + R * H),
        combine._replace(name="combine dX"),
        weight_gradient("dW up", s, H, 2 * I, R * H + 2 * R * I + 2 * weight),
        weight_gradient("dW down", s, H, I, R * H + R * I + weight),
    ]
    return forward, backward


def router(s, chip):
    """Seconds forward and backward on a chip, as router_product_sm80.cu runs: x from memory once
    a tile of columns; of the two gradients each is multiplied by two halves, and is x's size or
    reads x."""
    T, H, tiles = s.tokens, s.hidden, tiles_in(s.experts, ROUTER_TILE)
    product = 2 * T * H * tiles * ROUTER_TILE / (MMA_SYNC * chip.tensor)
    x = T * H * ELEMENT / chip.memory
    return max(product, tiles * x) + LAUNCHES, 2 * max(2 * product, x)


class Layer(NamedTuple):
    flops: float
    seconds: float  # without REALITY
    bound: float  # seconds of dense products, and the combine


def layers(s, chip):
    for parts, routing in zip(kernels(s), router(s, chip)):
        flops = sum(k.flops for k in parts)
        combine = sum(k.seconds(chip) for k in parts if not k.flops)
        yield Layer(
            flops,
            sum(k.seconds(chip) for k in parts) + routing,
            flops / chip.tensor + combine,
        )


def decoding(s):
    """Bytes of the weights that the chosen experts have, drawn at random."""
    chosen = s.experts * (1 - (1 - s.top_k / s.experts) ** s.tokens)
    return chosen * 3 * s.hidden * s.intermediate * ELEMENT


# ---- the table ----------------------------------------------------------------------------------


def summary():
    yield "| shape | H100: bound | predicted | x reality | SonicMoE | of it | H200: x reality |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    ratios = []
    for name, s in SHAPES.items():
        cells = {}
        for chip in CHIPS:
            both = list(layers(s, CHIPS[chip]))
            cells[chip, "bound"] = [x.flops / x.bound / 1e12 for x in both]
            cells[chip, "predicted"] = [x.flops / x.seconds / 1e12 for x in both]
            cells[chip, "real"] = [
                x * r for x, r in zip(cells[chip, "predicted"], REALITY.values())
            ]
        of = [a / b for a, b in zip(cells["H100", "real"], s.published)]
        ratios += [of] if of else []

        def show(values, digits=0):
            return " / ".join(f"{v:.{digits}f}" for v in values) or "-"

        shown = [cells["H100", "bound"], cells["H100", "predicted"], cells["H100", "real"]]
        yield (
            f"| {name} | {' | '.join(map(show, shown))} | {show(s.published)} | {show(of, 2)} |"
            f" {show(cells['H200', 'real'])} |"
        )
    means = " / ".join(f"{statistics.geometric_mean(x):.2f}" for x in zip(*ratios))
    yield f"| geometric mean | | | | | {means} | |"


def every_kernel():
    yield "| shape | kernel | TFLOP | GB | tiles, ms | memory, ms | predicted, ms |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    chip = CHIPS["H200"]
    clock = chip.tensor / (SMS * FLOP_A_CLOCK)
    for name, s in SHAPES.items():
        for kernel in sum(kernels(s), []):
            times = kernel.clocks / clock, kernel.bytes / chip.memory, kernel.seconds(chip)
            yield (
                f"| {name} | {kernel.name} | {kernel.flops / 1e12:.2f} | {kernel.bytes / 1e9:.2f} |"
                f" {' | '.join(f'{1e3 * t:.3f}' for t in times)} |"
            )
    for name, s in DECODING.items():
        moved = decoding(s)
        yield (
            f"| {name} | weights | | {moved / 1e9:.2f} | | {1e3 * moved / chip.memory:.3f} |"
            f" {1e3 * moved / chip.memory:.3f} |"
        )


def text():
    stage = ", ".join(f"{name} {clocks:.0f}" for name, clocks in CLOCKS.items())
    return "\n".join(
        [
            "# Hopper's kernels, predicted",
            "",
            "Written by `benchmarks/predict_hopper.py`, which says how. **Nothing here was measured.**",
            f"A stage of {TILE_M} x {TILE_N} x {TILE_K} takes so many clocks: {stage}.",
            "",
            "## Layers, TFLOP/s, forward / backward",
            "",
            "The router included. Bound: dense products and the combine.",
            f"Reality: {REALITY['forward']} / {REALITY['backward']}, the share of the same"
            " arithmetic that the published library reaches.",
            "SonicMoE: its published figures.",
            "",
            *summary(),
            "",
            "## Kernels on an H200",
            "",
            *every_kernel(),
            "",
        ]
    )


# ---- beside what was measured -------------------------------------------------------------------

# How a profiler names our kernels, and what one after the other they are, forward and backward.
LAUNCHED = {
    "rows_gemm_kernel": ("up", "down", "dA", "dX"),
    "weight_gradient_kernel": ("dW up", "dW down"),
    "sum_kernel": ("combine", "combine dX"),
}
OFF = 0.15  # beyond which a cause is to be named before anything is tuned


def measured_kernels(launched):
    """{kernel: seconds}; a kind of which there are more or fewer is left out."""
    result = {}
    for kind, names in LAUNCHED.items():
        seconds = [s for name, s in launched if kind in name]
        if len(seconds) == len(names):
            result |= zip(names, seconds, strict=True)
    return result


def pairs(results):
    """(what, predicted, measured), in seconds. Layers with REALITY, which a kernel's prediction
    has not; the chip first, for its part in all the others."""
    chip = next((c for n, c in CHIPS.items() if n in results["machine"]["gpu"]), CHIPS["H200"])
    product, copy = 2 * 8192**3, 2**31
    yield "a dense product of 8192", product / chip.tensor, product / results["dense_flops"]
    yield "a copy of 1 GiB", copy / chip.memory, copy / results["copy_bandwidth"]
    for case in results["cases"]:
        sizes = ("tokens", "hidden", "intermediate", "num_experts", "top_k")
        s = Shape(*(case[size] for size in sizes))
        if case["kind"] == "serve":
            weights = case["weights_bytes"] / chip.memory
            yield f"{case['shape']}: graph, by its weights", weights, case["graph_seconds"]
            continue
        measured = measured_kernels(case.get("kernels", ()))
        for kernel in sum(kernels(s), []):
            if kernel.name in measured:
                what = f"{case['shape']}: {kernel.name}"
                yield what, kernel.seconds(chip), measured[kernel.name]
        forward, backward = (
            layer.seconds / reality
            for layer, reality in zip(layers(s, chip), REALITY.values(), strict=True)
        )
        for what, predicted in (("forward", forward), ("forward_backward", forward + backward)):
            yield f"{case['shape']}: {what}", predicted, case[what]["seconds"]["ours"]


def beside(results):
    yield "| | predicted, ms | measured, ms | off |"
    yield "| --- | ---: | ---: | ---: |"
    for what, predicted, measured in pairs(results):
        off = measured / predicted - 1
        mark = f" **over {OFF:.0%}**" if abs(off) > OFF else ""
        yield f"| {what} | {1e3 * predicted:.3f} | {1e3 * measured:.3f} | {off:+.0%}{mark} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="?", type=Path)
    results = parser.parse_args().results
    if results is None:
        RESULT.write_text(text())
        print(RESULT)
    elif results.exists():
        print("\n".join(beside(json.loads(results.read_text()))))
    else:
        raise SystemExit(f"predict_hopper.py: nothing was measured yet, there is no {results}")


if __name__ == "__main__":
    main()

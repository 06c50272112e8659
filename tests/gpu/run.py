"""What `make gpu` and `make gpu-sm90` run on a machine with a GPU, part by part, in 15 minutes.

    python tests/gpu/run.py                         these parts, in this order:
        build         the library for this GPU, unless one that fits lies there already
        sm90_primitives    mbarriers, TMA, wgmma and stmatrix on the hardware
        primitives    the emulator's other primitives; their results become golden data
        sm90_kernels  Hopper's products against float64: layouts, tails, routings, same bits
        kernels       every stage's kernels, every tile of the products, against float64
        bench         three large shapes beside grouped_mm and the dense bound
        gpu_only      graphs, streams, no waiting, more than 2^31 elements
        layer         the layer, its losses and statistics, torch.compile
        memcheck, racecheck, synccheck, initcheck    compute-sanitizer over small.py
    python tests/gpu/run.py sm90                    the first minutes on a Hopper: build, the two
                                                    above whose names begin so, and
        sm90_bench    SonicMoE's nine shapes beside it and grouped_mm, each kernel's time; decoding
        sm90_score    that beside what predict_hopper.py says; needs no GPU
    python tests/gpu/run.py kernels bench           these
    python tests/gpu/run.py --dry                   without a GPU: the same steps as far as they go

A part that fails or takes too long ends itself and no other. Each prints a table as it goes,
and keeps a JSON file and its log in --out up to date, so that they are there when it is killed;
summary.json has the verdicts. The exit code is the worst of the parts'.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
STAGES = (
    "ffn_kernels", "router_logits", "topk_route", "capacity_scatter", "gather_rows", "grouped_ffn",
    "weighted_combine", "moe_forward", "accumulate_stats",
)  # fmt: skip
LAYER = ("moe", "layer_state", "losses", "stats", "checkpoint", "compile")
SHAPES = ("mixtral", "olmoe", "qwen3_30b_8k")
# First the two that tell most, should the time not do for all.
SM90_SHAPES = (
    "30b_n512", "7b_n256", "120b_n1024", "30b_n256", "7b_n512", "7b_n1024", "30b_n1024",
    "120b_n512", "120b_n2048", "serve_qwen3_30b_1", "serve_qwen3_30b_16", "serve_qwen3_30b_64",
)  # fmt: skip
SM90 = ("build", "sm90_primitives", "sm90_kernels", "sm90_bench", "sm90_score")
ONLY_SM90 = ("sm90_bench", "sm90_score")  # no part of `make gpu`
TIMED_OUT, NOTHING_RAN = 124, 5


class Part(NamedTuple):
    command: list
    seconds: int
    environment: dict = {}


# ---- the parts -----------------------------------------------------------------------


def files(names):
    return [f"tests/test_{name}.py" for name in names]


def parts(out, dry):
    """{name: Part}, in order."""
    backend = "emulated" if dry else "cuda"
    workers = str(min(2 if dry else 8, os.cpu_count()))  # they share the one GPU

    def pytest(name, *arguments):
        results = ["--results", out / f"{name}.json"]
        return [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *results,
            *arguments,
        ]

    def suite(name, tests, *few):
        """`few`: what a dry run takes of it."""
        return pytest(name, "--backend", backend, *(few if dry else ["-n", workers]), *tests)

    def bench(name, shapes, seconds):
        which = ["--dry"] if dry else ["--shapes", *shapes, "--seconds", str(seconds)]
        script, results = "benchmarks/bench_layer_cuda.py", ["--out", out / f"{name}.json"]
        return [sys.executable, script, *results, *which]

    setup = [sys.executable, "setup.py"]
    found = {
        "build": Part(
            [*setup, "--version"] if dry else [*setup, "build_ext", "--inplace"],
            300,
            {} if dry else {"MOE_EXT_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": archs()},
        ),
        "sm90_primitives": Part(
            pytest("sm90_primitives", "--backend", backend, "tests/emulator/test_hopper.py"), 90
        ),
        "primitives": Part(
            pytest("primitives", "--backend", backend, "tests/emulator/test_primitives.py"),
            90,
            {} if dry else {"MOE_EXT_GOLDEN": "write"},
        ),
        "sm90_kernels": Part(
            suite("sm90_kernels", files(["ffn_kernels_sm90"]), "-k", "layout0-dtype0"), 110
        ),
        "kernels": Part(
            suite("kernels", files(STAGES), "-k", "test_tiles and layout0 and 256 or test_no_token"),
            210,
        ),
        "bench": Part(bench("bench", SHAPES, 180), 180),
        "sm90_bench": Part(bench("sm90_bench", SM90_SHAPES, 290), 320),
        "sm90_score": Part(
            [sys.executable, "benchmarks/predict_hopper.py", out / "sm90_bench.json"], 20
        ),
        "gpu_only": Part(
            pytest("gpu_only", "tests/test_cuda.py", "tests/test_cuda_build.py"), 120
        ),
        "layer": Part(suite("layer", files(LAYER), "-k", "test_few_experts or test_autocast"), 150),
    }  # fmt: skip
    for tool in ("memcheck",) if dry else ("memcheck", "racecheck", "synccheck", "initcheck"):
        found[tool] = sanitizer(tool, dry)
    return found


def archs():
    """TORCH_CUDA_ARCH_LIST for the GPU that is there."""
    from_environment = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return from_environment or said_by_load("arch_list(torch.cuda.get_device_capability())")


def said_by_load(expression):
    """What an expression over moe_ext._load gives; no library is loaded."""
    code = f"import torch; from moe_ext._load import *; print({expression})"
    environment = os.environ | {"MOE_EXT_BACKEND": "reference", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.stdout.strip()


def sanitizer(tool, dry):
    program = None if dry else find_sanitizer()
    command = [sys.executable, "tests/gpu/small.py"]
    if program is not None:
        # initcheck must see torch's kernels write what ours read.
        ours = [] if tool == "initcheck" else ["--kernel-regex", "kns=moe_ext"]
        begin = [program, "--tool", tool, *ours, "--error-exitcode", "9", "--print-limit", "20"]
        command = [*begin, *command]
    elif not dry:
        command = [sys.executable, "-c", "raise SystemExit('no compute-sanitizer was found')"]
    # Without torch's pools every tensor is an allocation, whose end memcheck knows.
    environment = (
        {"MOE_EXT_BACKEND": "emulated"} if dry else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )
    return Part(command, 120, environment)


def find_sanitizer():
    from torch.utils.cpp_extension import CUDA_HOME

    names = [Path(CUDA_HOME or "/usr/local/cuda") / "bin" / "compute-sanitizer"]
    names += Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin/compute-sanitizer")
    names += Path("/opt/nvidia").glob("**/compute-sanitizer/compute-sanitizer")
    found = shutil.which("compute-sanitizer")
    return found or next((str(name) for name in names if name.exists()), None)


# ---- running them ----------------------------------------------------------------------


def run(part, seconds, log):
    """The exit code of a part, whose words go to the terminal and into its log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | part.environment
    tee = ["tee", str(log)]
    with subprocess.Popen(tee, stdin=subprocess.PIPE) as words:
        process = subprocess.Popen(
            [str(word) for word in part.command], cwd=ROOT, env=environment,
            stdout=words.stdin, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:  # its compilers and workers with it
            for last in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, last)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=3)


def ran_nothing(results):
    """Whether a part's tests were all skipped."""
    return results.exists() and json.loads(results.read_text()).get("passed") == 0


def verdict_of(code):
    if code == 0:
        return "passed"
    return "NOT FINISHED in time" if code == TIMED_OUT else f"FAILED (exit code {code})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="default: all but sm90's benchmark")
    parser.add_argument("--seconds", type=float, default=840, help="for all parts together")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT}")
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    known = parts(out, arguments.dry)
    wanted = arguments.parts or [n for n in known if arguments.dry or n not in ONLY_SM90]
    if wanted == ["sm90"]:
        wanted = SM90
    if unknown := set(wanted) - set(known):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")

    # Without a GPU what needs one, and on another GPU what needs a Hopper.
    may_skip = ("gpu_only",) if arguments.dry else ("sm90_primitives", "sm90_kernels")

    # A dry run builds the emulator, on a machine that may be slow; no device waits for it.
    patience = 5 if arguments.dry else 1
    end, summary = time.time() + patience * arguments.seconds, {}

    def note(name, verdict, seconds=0.0):
        summary[name] = {"verdict": verdict, "seconds": round(seconds, 1)}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    worst = 0
    for name in wanted:
        part, begin = known[name], time.time()
        if name == "build" and not arguments.dry and said_by_load("carried()") == "True":
            note(name, "passed (it fits already)")
            continue
        # The score is of what there is when the time is over, and takes a second.
        left = end - begin if name != "sm90_score" else part.seconds
        if left <= 0:
            code = TIMED_OUT
        else:
            print(f"==== {name}", flush=True)
            note(name, "running")
            code = run(part, min(patience * part.seconds, left), out / f"{name}.log")
        verdict = verdict_of(code)
        if code == 0 and ran_nothing(out / f"{name}.json"):
            verdict = "NOTHING RAN, all skipped"
            code = 0 if name in may_skip else NOTHING_RAN
        note(name, verdict, time.time() - begin)
        worst = max(worst, abs(code))
    print(f"==== {out}")
    for name, result in summary.items():
        print(f"{result['verdict']:<24} {result['seconds']:6.0f} s  {name}")
    golden = ROOT / "tests" / "emulator" / "golden"
    if golden.exists():
        shutil.copytree(golden, out / "golden", dirs_exist_ok=True)
    sys.exit(worst)


if __name__ == "__main__":
    main()

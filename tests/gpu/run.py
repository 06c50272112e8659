"""What `make gpu-tests` and `make gpu-sanitizer` run on a machine with a GPU.

    python tests/gpu/run.py tests        the primitives (written down as golden data for the
                                         emulator), the stages and the layer on CUDA tensors,
                                         what only a GPU can show
    python tests/gpu/run.py sanitizer    compute-sanitizer's four tools over small.py

Every part is run, whatever became of the one before; the exit code says whether all passed.
--seconds bounds them together.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    "router_logits", "topk_route", "capacity_scatter", "gather_rows", "grouped_ffn",
    "weighted_combine", "moe_forward", "accumulate_stats",
)  # fmt: skip
LAYER = ("moe", "losses", "stats", "checkpoint", "compile")


def pytest(*arguments):
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def tests():
    """(name, command, environment)"""
    files = [f"tests/test_{name}.py" for name in (*STAGES, *LAYER)]
    yield (
        "primitives",
        pytest("--backend", "cuda", "tests/emulator/test_primitives.py"),
        {"MOE_EXT_GOLDEN": "write"},
    )
    yield "only on a GPU", pytest("tests/test_cuda.py", "tests/test_cuda_build.py"), {}
    workers = str(min(8, os.cpu_count()))  # they share the one GPU
    yield "stages and layer", pytest("--backend", "cuda", "-n", workers, *files), {}


def sanitizer():
    program = find_sanitizer()
    if program is None:
        sys.exit("no compute-sanitizer (in the toolkit, or pip's nvidia-cuda-sanitizer-api)")
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        # initcheck must see torch's kernels write what ours read.
        ours = [] if tool == "initcheck" else ["--kernel-regex", "kns=moe_ext"]
        command = [
            program, "--tool", tool, *ours, "--error-exitcode", "9", "--print-limit", "20",
            sys.executable, "tests/gpu/small.py",
        ]  # fmt: skip
        # Without torch's pools every tensor is an allocation, whose end memcheck knows.
        yield tool, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def find_sanitizer():
    from torch.utils.cpp_extension import CUDA_HOME

    names = [Path(CUDA_HOME or "/usr/local/cuda") / "bin" / "compute-sanitizer"]
    names += Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin/compute-sanitizer")
    names += Path("/opt/nvidia").glob("**/compute-sanitizer/compute-sanitizer")
    found = shutil.which("compute-sanitizer")
    return found or next((str(name) for name in names if name.exists()), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("tests", "sanitizer"))
    parser.add_argument("--seconds", type=float, default=500)
    arguments = parser.parse_args()
    begin, verdicts = time.time(), []
    for name, command, environment in {"tests": tests, "sanitizer": sanitizer}[arguments.part]():
        left = arguments.seconds - (time.time() - begin)
        started = time.time()
        print(f"==== {name}", flush=True)
        try:
            environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
            code = subprocess.run(
                command, cwd=ROOT, env=os.environ | environment, timeout=max(left, 1)
            ).returncode
            verdict = "passed" if code == 0 else f"FAILED (exit code {code})"
        except subprocess.TimeoutExpired:
            verdict = "NOT FINISHED in time"
        verdicts.append(f"{verdict:<24} {time.time() - started:4.0f} s  {name}")
    print("\n".join(["====", *verdicts]))
    sys.exit(any(not verdict.startswith("passed") for verdict in verdicts))


if __name__ == "__main__":
    main()

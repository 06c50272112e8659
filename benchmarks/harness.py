"""What every benchmark needs: fair timing, the machine's description, results files."""

import contextlib
import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def seconds_of(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


class TooSlow(Exception):
    """Raised inside a call that `stopped_after` ends."""


@contextlib.contextmanager
def without_collections():
    """As in timeit: a collection of Python's garbage would fall on one contestant alone."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def stopped_after(seconds):
    """Ends what runs inside with TooSlow, at the first tensor that it saves for the backward
    pass, or takes up in it, after that many seconds. A call without a gradient runs on."""
    end = time.perf_counter() + seconds

    def check(tensor):
        if time.perf_counter() > end:
            raise TooSlow
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(check, check):
        yield


def interleaved(
    contestants,
    repeats,
    *,
    prepare=None,
    patience=20.0,
    give_up=math.inf,
    at_least=2.0,
    at_most=None,
    turn=20e-3,
    measure=seconds_of,
):
    """{name: [seconds a call, ...]}: the contestants take turns, round by round, so that a
    slow moment of the machine hits all of them.

    contestants: {name: function()}. prepare: called before each call, untimed. measure: how
    many seconds a call takes, where the function runs in another process. A turn is one
    call; of calls shorter than `turn` seconds, as many as fill it, since a model runs its
    small layers one after another. Short rounds are more than `repeats`, until they fill
    `at_least` seconds; long ones are fewer, but three, to keep within `at_most`. A
    contestant that takes longer than `patience` seconds after its warm-up counts by that one
    call; its list holds a single time. One whose warm-up takes longer than that and `give_up`
    times as long as the fastest of those before it is stopped, if it computes a gradient; its
    list is empty.
    """

    def timed(function, calls=1):
        seconds = 0.0
        for _ in range(calls):
            if prepare is not None:
                prepare()
            seconds += measure(function)
        return seconds / calls

    def warmed_up(function, limit):
        """[seconds] of the call after the first; [] if the first was stopped."""
        try:
            with stopped_after(limit) if limit < math.inf else contextlib.nullcontext():
                timed(function)
        except TooSlow:
            return []
        return [timed(function)]

    times, fastest = {}, math.inf
    for name, function in contestants.items():
        times[name] = warmed_up(function, max(patience, give_up * fastest))
        fastest = min([fastest, *times[name]])
    quick = {name: t[0] for name, t in times.items() if t and t[0] <= patience}
    calls = {name: max(1, int(turn / seconds)) for name, seconds in quick.items()}
    if quick:
        round_seconds = sum(calls[name] * seconds for name, seconds in quick.items())
        repeats = max(repeats, min(400, int(at_least / round_seconds)))
        if at_most is not None:
            repeats = max(3, min(repeats, int(at_most / round_seconds)))
    times.update({name: [] for name in quick})
    with without_collections():
        for _ in range(repeats):
            for name in quick:
                times[name].append(timed(contestants[name], calls[name]))
    return times


def compared(times, us="ours"):
    """What `interleaved` measured of us and of our peers: medians, the fastest times, and
    {peer: its time over ours, the median of the rounds' ratios}. Who was stopped is left out."""
    times = {side: seconds for side, seconds in times.items() if seconds}
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    ours = times[us]

    def against(side):  # a side too slow for the rounds was timed once
        rounds = times[side] if len(times[side]) == len(ours) else [medians[side]] * len(ours)
        return ratio(rounds, ours)

    return {
        "rounds": len(ours),
        "seconds": medians,
        "fastest_seconds": {side: min(seconds) for side, seconds in times.items()},
        "against": {side: against(side) for side in times if side != us},
    }


def ratio(numerators, denominators):
    """The median over the rounds of numerator / denominator."""
    return statistics.median(n / d for n, d in zip(numerators, denominators))


class MemoryRead:
    """Reads more memory than the caches hold, with all threads, in the fastest of some ways.

    After it a call finds its weights in memory and not in a cache, as in a model whose other
    layers ran in between; and its own time says how fast memory is at that moment.
    """

    def __init__(self, size=1 << 30):
        self.bytes = size
        buffer = torch.ones(size // 4)
        first, second = buffer.chunk(2)
        ways = (buffer.sum, lambda: torch.dot(first, second), lambda: buffer.view(-1, 4096).sum(1))
        self.way = min(ways, key=lambda way: min(seconds_of(way) for _ in range(4)))

    def __call__(self):
        self.way()

    def bandwidth(self):
        """Bytes a second, the fastest of some reads."""
        return self.bytes / min(seconds_of(self.way) for _ in range(4))


def saved_bytes(function, parameters):
    """Bytes that function() keeps for the backward pass, the parameters left out. Tensors
    that share their memory count once."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # alive until all is counted: no address is used twice
    del result
    return sum(kept.values())


def import_seconds():
    """How long `import moe_ext` takes beyond `import torch`; the best of three processes."""
    code = (
        "import time, torch; begin = time.perf_counter(); import moe_ext;"
        " print(time.perf_counter() - begin)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, cwd=ROOT) for _ in range(3)]
    return min(float(run.stdout) for run in runs)


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def cpu_flags():
    """What the processor can do, in the kernel's words."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


INSTRUCTION_SETS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "avx512bw": "AVX-512",
    "avx2": "AVX2",
}


def instruction_set():
    """The best of those that kernels are written for, which `cpu` may not tell: in a virtual
    machine processors of several kinds have one name."""
    flags = cpu_flags()
    return next((name for flag, name in INSTRUCTION_SETS.items() if flag in flags), "baseline")


def machine(device="cpu"):
    gpu = {}
    if device == "cuda":
        gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {
        **gpu,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def provenance():
    """Which sources a measurement was made from, and when."""
    from moe_ext import _load

    return {
        # On a machine without the repository: what the library was built from.
        "commit": _load.checkout_commit() or _load.BUILD_INFO["git"] or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
    }


def merge_results(path, cases, **about):
    """Writes {machine, ..., cases: [...]}: a case replaces the one of its name and dtype;
    cases of another machine or other versions go."""
    path = Path(path)
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = old.get("cases", []) if old.get("machine") == about["machine"] else []
    merged = {(case["shape"], case["dtype"]): case for case in [*kept, *cases]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "cases": [*merged.values()]}, indent=1) + "\n")

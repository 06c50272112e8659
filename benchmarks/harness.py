"""What every benchmark needs: fair timing, the machine's description, results files."""

import datetime
import json
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


def interleaved(contestants, repeats, *, prepare=None, patience=20.0, at_least=2.0, turn=20e-3):
    """{name: [seconds a call, ...]}: the contestants take turns, round by round, so that a
    slow moment of the machine hits all of them.

    contestants: {name: function()}. prepare: called before each call, untimed. A turn is
    one call; of calls shorter than `turn` seconds, as many as fill it, since a model runs
    its small layers one after another. Short rounds are more than `repeats`, until they
    fill `at_least` seconds. A contestant whose warm-up takes longer than `patience`
    seconds counts by that one call; its list holds a single time.
    """

    def timed(function, calls=1):
        seconds = 0.0
        for _ in range(calls):
            if prepare is not None:
                prepare()
            begin = time.perf_counter()
            function()
            seconds += time.perf_counter() - begin
        return seconds / calls

    times = {name: [timed(function)] for name, function in contestants.items()}
    quick = {name: f for name, f in contestants.items() if times[name][0] <= patience}
    calls = {name: max(1, int(turn / timed(function))) for name, function in quick.items()}
    round_seconds = sum(calls[name] * timed(function) for name, function in quick.items())
    times.update({name: [] for name in quick})
    for _ in range(max(repeats, min(400, int(at_least / round_seconds)))):
        for name, function in quick.items():
            times[name].append(timed(function, calls[name]))
    return times


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
        self.way = min(ways, key=lambda way: min(self.seconds(way) for _ in range(4)))

    def __call__(self):
        self.way()

    def bandwidth(self):
        """Bytes a second, the fastest of some reads."""
        return self.bytes / min(self.seconds(self.way) for _ in range(4))

    @staticmethod
    def seconds(function):
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin


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


def machine():
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def provenance():
    """Which sources a measurement was made from, and when."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True).stdout
    return {
        "commit": commit.strip(),
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

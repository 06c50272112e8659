"""The benchmark's side of the peers' workers: which run, and in which process."""

import functools
import subprocess

import harness
import peers
from workers import Process, WorkerFailed

READ = 1 << 30  # bytes before each call, more than caches hold


def start(venv, threads, patience=300):
    """A worker in an environment."""
    return Process(
        [peers.python_of(venv), "-m", "peers.worker", str(threads), str(READ)],
        threads,
        [harness.ROOT / "benchmarks", harness.ROOT],
        patience,
    )


@functools.cache
def runs_ours(venv):
    """Whether moe_ext's library fits an environment's Python and torch."""
    command = [peers.python_of(venv), "-c", "import moe_ext"]
    return not subprocess.run(command, cwd=harness.ROOT, capture_output=True).returncode


class Sides:
    """Ours and the peers that can run here, each in a process of its environment.

    present: {side: its environment}, None for the benchmark's own. Ours joins the first whose
    Python and torch fit the library: in one process nothing but the kernels differs.
    left_out: {peer: why}.
    """

    def __init__(self, modules, dtype, threads):
        self.modules = {peers.name_of(module): module for module in modules}
        obstacles = {side: peers.obstacle(module, dtype) for side, module in self.modules.items()}
        self.left_out = {side: why for side, why in obstacles.items() if why}
        self.present = {s: self.modules[s].VENV for s, why in obstacles.items() if not why}
        self.present["ours"] = next(filter(runs_ours, filter(None, self.present.values())), None)
        self.workers = {venv: start(venv, threads) for venv in dict.fromkeys(self.present.values())}

    def ask(self, side, method, *arguments):
        worker = self.workers[self.present[side]]
        return worker.ask(method, self.modules[side].__name__, *arguments)

    def each(self, method, *files):
        """Asks all, `{}` in a file's name being the side; a peer that fails is left out."""
        for side in list(self.present):
            try:
                self.ask(side, method, *(file.format(side) for file in files))
            except WorkerFailed as failure:
                if side == "ours":
                    raise
                self.left_out[side] = str(failure)
                del self.present[side]

    def calls(self, method):
        """{side: a function that asks it}"""
        return {side: functools.partial(self.ask, side, method) for side in self.present}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers.values():
            worker.close()

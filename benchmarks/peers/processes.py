"""The benchmark's side of the workers: starts them, asks them, stops them out of turn."""

import functools
import json
import os
import select
import signal
import subprocess
import tempfile

import harness
import peers

READ = 1 << 30  # bytes before each call, more than caches hold


class PeerFailed(Exception):
    """A peer raised, ended its process, or did not answer."""


class Process:
    """A worker in an environment. Out of turn it is stopped (SIGSTOP): some peers' threads
    spin while they wait, and would take the processor from whoever is timed."""

    def __init__(self, venv, threads, patience=300):
        self.patience = patience
        self.log = tempfile.TemporaryFile("w+")
        path = [harness.ROOT / "benchmarks", harness.ROOT, os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [peers.python_of(venv), "-m", "peers.worker", str(threads), str(READ)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": str(threads)},
        )

    def ask(self, method, *arguments):
        """The value that the worker's method returns."""
        self.process.send_signal(signal.SIGCONT)
        try:
            print(json.dumps([method, *arguments]), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise self.failure() from None
        if not select.select([self.process.stdout], [], [], self.patience)[0]:
            self.process.kill()
            raise PeerFailed(f"{method} took over {self.patience} s")
        line = self.process.stdout.readline()
        if not line:
            raise self.failure()
        self.process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer["value"]

    def failure(self):
        """What is known of a process that has ended."""
        self.log.seek(0)
        last = self.log.read().strip().rpartition("\n")[2]
        return PeerFailed(f"its process ended with {self.process.wait()}: {last}")

    def close(self):
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


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
        self.workers = {
            venv: Process(venv, threads) for venv in dict.fromkeys(self.present.values())
        }

    def ask(self, side, method, *arguments):
        worker = self.workers[self.present[side]]
        return worker.ask(method, self.modules[side].__name__, *arguments)

    def each(self, method, *files):
        """Asks all, `{}` in a file's name being the side; a peer that fails is left out."""
        for side in list(self.present):
            try:
                self.ask(side, method, *(file.format(side) for file in files))
            except PeerFailed as failure:
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

"""Processes that a benchmark drives through their standard streams, each in its turn.

A request is a line with a JSON list, a method of the worker and its arguments; the answer is a line
with {"value": ...} or {"error": "..."}. What the worker itself prints goes to standard error.
"""

import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile


class WorkerFailed(Exception):
    """It raised, ended its process, or did not answer."""


class Process:
    """A command that calls `serve`, with so many threads, and `paths` before Python's own.
    Out of turn it is stopped (SIGSTOP): some libraries' threads spin while they wait, and
    would take the processor from the one that is timed."""

    def __init__(self, command, threads, paths, patience=300):
        self.patience = patience
        self.log = tempfile.TemporaryFile("w+")
        path = [*paths, os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command,
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
            raise WorkerFailed(f"{method} took over {self.patience} s")
        line = self.process.stdout.readline()
        if not line:
            raise self.failure()
        self.process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer["value"]

    def failure(self):
        """What is known of a process that has ended."""
        self.log.seek(0)
        last = self.log.read().strip().rpartition("\n")[2]
        return WorkerFailed(f"its process ended with {self.process.wait()}: {last}")

    def close(self):
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def die_with_parent():
    """Even while stopped, when no end of the input is noticed (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def serve(worker):
    """Answers with the methods of `worker`, in the process that a benchmark started."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.disable()  # as in timeit
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(worker, method)(*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)

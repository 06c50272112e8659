"""A process that runs peers of one environment, driven through its standard streams.

    python -m peers.worker THREADS BYTES       # read before each call

A request is a line with a JSON list, a method of `Worker` and its arguments; the answer is a line
with {"value": ...} or {"error": "..."}. Tensors travel in files. What a peer itself prints
goes to standard error.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import sys

import torch

import harness


class Worker:
    def __init__(self, threads, read_bytes):
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.read = harness.MemoryRead(read_bytes)
        self.layers, self.calls = {}, {}

    def prepare(self, module, weights_file):
        """Brings a layer's weights, {gate_up_proj, down_proj}, into a peer's layout."""
        peer = importlib.import_module(module)
        self.layers[module] = peer.experts(**torch.load(weights_file))

    def bind(self, module, tokens_file, output_file):
        """Brings {x, weights, experts} into the peer's types; writes its y."""
        self.calls[module] = self.layers[module](**torch.load(tokens_file))
        torch.save(torch.as_tensor(self.calls[module]()).clone(), output_file)

    def seconds(self, module):
        """What a call takes that finds the weights in memory and not in a cache."""
        self.read()
        return harness.seconds_of(self.calls[module])


def die_with_parent():
    """Even while stopped, when no end of the input is noticed (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main():
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(*map(int, sys.argv[1:]))
    gc.disable()  # as in timeit
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(worker, method)(*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

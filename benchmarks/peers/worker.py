"""A process that runs peers of one environment. Tensors travel in files.

python -m peers.worker THREADS BYTES       # read before each call
"""

import importlib
import sys

import torch

import harness
from workers import serve


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


if __name__ == "__main__":
    serve(Worker(*map(int, sys.argv[1:])))

"""Other implementations of a layer's experts on a CPU, a module each, installed by `make peers`.

A module says, and can be imported without, what it needs:

    TITLE         what tables call it
    VENV          its environment, a folder of build/peers/; None: the benchmark's own
    REQUIREMENTS  pip's arguments, versions pinned to those that worked
    DTYPES        what it computes in
    NEEDS         flags of /proc/cpuinfo without which its kernels do not run

    experts(gate_up_proj, down_proj)
        takes the weights, (E, 2I, H) and (E, H, I), gates first, into the peer's own layout.
        Returns bind(x, weights, experts), with x (T, H) in the weights' dtype, weights (T, K)
        float32 and experts (T, K) int32, which brings the tokens into the peer's types; that
        returns run(), the call that is timed, whose result is y (T, H).
"""

import importlib
import sys

import harness

BUILD = harness.ROOT / "build" / "peers"
NAMES = ("sglang", "vllm", "ggml", "onnxruntime", "zentorch", "kt_kernel")


def modules(names):
    return [importlib.import_module(f"peers.{name}") for name in names]


def pins():
    return {name_of(peer): " ".join(peer.REQUIREMENTS) for peer in modules(NAMES)}


def name_of(peer):
    return peer.__name__.rpartition(".")[2]


def python_of(venv):
    return str(BUILD / venv / "bin" / "python") if venv else sys.executable


def stamp_of(venv):
    """The file that says which requirements are installed."""
    return BUILD / venv / "requirements"


def is_installed(peer):
    stamp = stamp_of(peer.VENV)
    return stamp.exists() and stamp.read_text().split("\n")[:-1] == list(peer.REQUIREMENTS)


def obstacle(peer, dtype):
    """Why a peer cannot run in that dtype here, or None."""
    if dtype not in peer.DTYPES:
        return f"has no {dtype}"
    missing = [flag for flag in peer.NEEDS if flag not in harness.cpu_flags()]
    if missing:
        return f"needs {', '.join(missing)}"
    if peer.VENV and not is_installed(peer):
        return "not installed as pinned (make peers)"

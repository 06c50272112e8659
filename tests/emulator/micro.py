"""Calls the micro-kernels of tests/emulator/kernels/, in the emulator or on a GPU.

On a GPU (MOE_EXT_BACKEND=cuda) nvcc compiles them, and what they give is the truth:
with MOE_EXT_GOLDEN=write it goes to golden/, and the emulator is held to it from then on.
"""

import ctypes
import json
import os
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
BACKEND = os.environ.get("MOE_EXT_BACKEND")


def load():
    if BACKEND == "emulated":
        import moe_ext  # noqa: F401 (puts guard pages around tensors)
        from emulator import control

        return control.primitives()
    return ctypes.CDLL(str(compile_for_gpu()))


def compile_for_gpu():
    from torch.utils.cpp_extension import CUDA_HOME

    root = HERE.parents[1]
    target = root / "build" / "primitives" / "libprimitives.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")  # as moe_ext/_load.py
    sources = [
        file for file in sorted(HERE.glob("kernels/*.cu"))
        if file.name != "faulty.cu" and (arch == "90a" or not file.name.startswith("hopper"))
    ]  # fmt: skip
    headers = [*HERE.glob("kernels/*.*h"), *root.glob("csrc/cuda/kernels/*.cuh")]
    newest = max(file.stat().st_mtime for file in [*sources, *headers])
    if not target.exists() or target.stat().st_mtime < newest:
        nvcc = f"{CUDA_HOME}/bin/nvcc" if CUDA_HOME else "nvcc"
        command = [
            nvcc, "-std=c++17", "-O2", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-I", root / "csrc",
            "-Xcompiler", "-fPIC", "-shared", "-o", target, *sources,
        ]  # fmt: skip
        subprocess.run(command, check=True)
    return target


def copied_to_gpu(tensor):
    """A copy that is as far from an aligned address as the tensor: .cuda() would align it."""
    offset = tensor.storage_offset()
    room = torch.empty(offset + tensor.numel(), dtype=tensor.dtype, device="cuda")
    return room[offset:].view(tensor.shape).copy_(tensor)


class Micro:
    """micro(kernel, *arguments) runs one; tensors are read and written in place."""

    def __init__(self):
        self.library = load()
        self.on_gpu = BACKEND == "cuda"

    def run(self, kernel, *arguments):
        """The error code, and the emulator's message."""
        held = []

        def convert(argument):
            if not isinstance(argument, torch.Tensor):
                return argument
            held.append((argument, copied_to_gpu(argument) if self.on_gpu else argument))
            return ctypes.c_void_p(held[-1][1].data_ptr())

        code = getattr(self.library, f"micro_{kernel}")(*map(convert, arguments))
        for tensor, on_device in held:
            if self.on_gpu:
                tensor.copy_(on_device)
        return code, "" if self.on_gpu else self.library.micro_error_text().decode()

    def __call__(self, kernel, *arguments):
        code, message = self.run(kernel, *arguments)
        assert code == 0, message if code < 0 else f"{kernel}: cudaError {code}"

    def golden(self, name, result):
        """Writes down what a GPU gave, or holds the emulator to it."""
        file = GOLDEN / f"{name}.json"
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[result.element_size()]
        bits = result.view(integer).flatten().tolist()
        if self.on_gpu and os.environ.get("MOE_EXT_GOLDEN") == "write":
            GOLDEN.mkdir(exist_ok=True)
            device = torch.cuda.get_device_name()
            file.write_text(json.dumps({"device": device, "bits": bits}) + "\n")
        elif file.exists():
            told = json.loads(file.read_text())
            assert bits == told["bits"], f"{name}: not what a {told['device']} gives"

"""Finds the compiled library, checks that it fits this process, and loads it.

A library that was compiled against another torch may load without a word and
then misbehave. So what it was built with, which csrc/build_info.cpp leaves in it
as one JSON string, is read from the file and compared first.

MOE_EXT_BACKEND forces a path: `reference` (plain PyTorch; nothing is loaded),
`cpu`, `cuda`, or `emulated` (the CUDA sources on the CPU, for tests: tests/emulator/).
Unset, a tensor's device decides.
"""

import importlib
import importlib.metadata
import json
import mmap
import os
import platform
import re
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
BACKENDS = ("reference", "cpu", "cuda", "emulated")

# The oldest torch and the newest with which the suite passes; pyproject.toml says the same.
TORCH = ((2, 11), (2, 14))

GIT_DESCRIBE = ("--always", "--dirty", "--abbrev=12", "--exclude=*")  # as in setup.py
_MARK = b"moe_ext build info: "


def backend_from_environment():
    """The path that MOE_EXT_BACKEND forces, or None."""
    name = os.environ.get("MOE_EXT_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"MOE_EXT_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def check_torch(version):
    """Refuses a torch older than what is supported, and warns of a newer one."""
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    oldest, newest = TORCH
    text = (
        f"moe_ext supports torch {'.'.join(map(str, oldest))} to {'.'.join(map(str, newest))},"
        f" found torch {version}"
    )
    if release < oldest:
        raise ImportError(text)
    if release > newest:
        warnings.warn(f"{text}: it is untested", stacklevel=2)


def rebuild_command():
    if (PACKAGE.parent / "setup.py").exists():
        return f"cd {PACKAGE.parent} && python setup.py build_ext --inplace"
    return (
        "pip install --no-build-isolation --no-deps --force-reinstall ., in the folder of"
        " moe_ext's sources"
    )


def build_for_cuda():
    return f"Rebuild it with `export MOE_EXT_BUILD=cuda`: {rebuild_command()}"


def find_library(folder=PACKAGE):
    """The library for this Python, else one for another Python, else None."""
    ours = [folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((path for path in (*ours, *sorted(folder.glob("_C.*"))) if path.exists()), None)


def read_build_info(library):
    """What a library was built with, read from the file without loading it."""
    with open(library, "rb") as file:
        if os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                begin = text.find(_MARK)
                if begin >= 0:
                    begin += len(_MARK)
                    return json.loads(text[begin : text.find(b"\0", begin)])
    raise ImportError(
        f"moe_ext: {library} does not say what it was built with, so it is damaged or not ours."
        f" Rebuild it: {rebuild_command()}"
    )


def running():
    """The counterpart of the build info: what runs in this process."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def checkout_commit():
    """The commit of the checkout that the Python sources lie in, as the build info
    has it, or None."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(PACKAGE.parent), "describe", *GIT_DESCRIBE]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def mismatches(built, runs):
    """One sentence for each thing in which a library does not fit the process."""

    def release(version):  # without the local part: 2.13.0+cpu and 2.13.0 are one torch
        return version.partition("+")[0]

    def minor(version):
        return version.split(".")[:2]

    different = {
        "torch": release(built["torch"]) != release(runs["torch"]),
        "cuda": built["cuda"] is not None and built["cuda"] != runs["cuda"],
        "python": minor(built["python"]) != minor(runs["python"]),
    }
    return [
        f"it was built with {name} {built[name]}, but {name} {runs[name] or '(none)'} runs"
        for name, differs in different.items()
        if differs
    ]


def runs_on(archs, capability):
    """Whether a library built for `archs` (of its build info) runs on a GPU of a compute
    capability (major, minor).

    Machine code of sm_86 runs on 8.6 and later ones of 8.x, of sm_90a on 9.0 only; PTX
    (compute_86) on everything from 8.6 on.
    """

    def fits(arch):
        kind, _, number = arch.partition("_")
        version = number.rstrip("af")
        if kind not in ("sm", "compute") or not version.isdigit():
            return False  # the CPU's
        built = divmod(int(version), 10)
        if version != number:
            return built == capability
        return built <= capability and (kind == "compute" or built[0] == capability[0])

    return any(map(fits, archs))


def arch_list(capability):
    """TORCH_CUDA_ARCH_LIST for a GPU: 9.0 alone would lack what only an H100 has."""
    return "{}.{}".format(*capability) + "a" * (capability == (9, 0))


def carried():
    """Whether a CUDA library of this checkout lies here that runs on the GPU of this machine."""
    library = find_library()
    built = read_build_info(library) if library else {"cuda": None}
    return (
        built["cuda"] is not None
        and not mismatches(built, running())
        and checkout_commit() in (None, built["git"])
        and runs_on(built["archs"], torch.cuda.get_device_capability())
    )


def hidden_installation():
    """Where a complete moe_ext is installed that this source tree stands in front of, or None."""
    if not (PACKAGE.parent / "setup.py").exists():
        return None
    for installed in importlib.metadata.distributions(name="moe_ext"):
        folder = Path(installed.locate_file("moe_ext")).resolve()
        if folder != PACKAGE and find_library(folder):
            return folder
    return None


def missing():
    """What to say where there is no library."""
    if installed := hidden_installation():
        return (
            f"moe_ext: the source tree {PACKAGE.parent}, which has no compiled library, hides the"
            f" installed package {installed}. Run Python in another folder, or build the library"
            f" here too: {rebuild_command()}"
        )
    return (
        f"moe_ext: the compiled library is missing. Build it: {rebuild_command()}"
        " (or set MOE_EXT_BACKEND=reference to run in plain PyTorch)"
    )


def find_emulated_library():
    kind = os.environ.get("MOE_EXT_EMULATOR_BUILD", "fast")
    library = PACKAGE.parent / "build" / "emulator" / kind / "moe_ext_emulated.so"
    if not library.exists():
        raise ImportError(
            f"moe_ext: MOE_EXT_BACKEND=emulated, but {library} is missing. Build it:"
            f" cd {PACKAGE.parent} && python tests/emulator/build.py {kind}"
        )
    return library


def load(backend):
    """Loads the library, or says why it cannot be; returns its build info."""
    library = find_emulated_library() if backend == "emulated" else find_library()
    if library is None:
        raise ImportError(missing())
    built = read_build_info(library)
    problems = mismatches(built, running())
    if problems:
        raise ImportError(
            f"moe_ext: {library} does not fit: {'; '.join(problems)}."
            f" Rebuild it: {rebuild_command()}"
        )
    if backend == "cuda" and built["cuda"] is None:
        raise ImportError(
            f"moe_ext: MOE_EXT_BACKEND=cuda, but {library} was built without CUDA."
            f" {build_for_cuda()}"
        )
    if backend is None and built["cuda"] is None and running()["cuda"] is not None:
        warnings.warn(
            f"moe_ext was built for the CPU alone, and this torch has CUDA {running()['cuda']}."
            f" {build_for_cuda()} (or set MOE_EXT_BACKEND=cpu, if no GPU is wanted)",
            stacklevel=2,
        )
    if backend != "emulated" or (library.parent / "needs_cpu").exists():
        importlib.import_module("moe_ext._C")
        torch.ops.moe_ext.cpu_instruction_sets()  # a wrong MOE_EXT_CPU is an error at once
    if backend == "emulated":
        torch.ops.load_library(library)
    try:
        importlib.import_module("moe_ext._ops")
        importlib.import_module("moe_ext.flops")
    except RuntimeError as error:  # a fake or a gradient for an op that the library lacks
        raise ImportError(
            f"moe_ext: {library} was built at commit {built['git'] or '(unknown)'}, but the Python"
            f" sources are at {checkout_commit() or '(unknown)'}, and they do not fit each other"
            f" ({str(error).splitlines()[0]}). Rebuild it: {rebuild_command()}"
        ) from error
    return built


def is_diagnosis():
    """Whether this is `python -m moe_ext`."""
    _, _, module = " ".join(sys.orig_argv).partition(" -m ")
    return module.split()[:1] == ["moe_ext"]


check_torch(torch.__version__)
BACKEND = backend_from_environment()
LOAD_ERROR = BUILD_INFO = None
try:
    if BACKEND != "reference":
        BUILD_INFO = load(BACKEND)
except ImportError as error:
    if not is_diagnosis():
        raise
    LOAD_ERROR, BACKEND = error, "reference"  # `python -m moe_ext` tells all the more

"""Builds the emulator, and moe_ext's CUDA sources for it, with the host compiler.

    python tests/emulator/build.py [fast|checked]

Writes a build.ninja for build/emulator/<kind>/ and runs ninja, so that only what changed
is compiled. It names our files from the root of the checkout: a copy of the whole, with its
times, needs no compiling. Four libraries, in build/emulator/<kind>/:

    libemulator.so        the runtime: tests/emulator/runtime/
    libkernels.so         csrc/cuda/kernels/*.cu. Nothing else, for its thread-local block is
                          the kernels' static shared memory
    libprimitives.so      tests/emulator/kernels/*.cu, the micro-kernels of the tests
    moe_ext_emulated.so   the ops: csrc/{schema,autograd,moe_infer}.cpp and csrc/cuda/*.cpp,
                          registered for CPU

`checked` instruments every access of the kernels; see docs/emulator.md.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("fast", "checked")

COMMON = "-std=c++17 -g1 -fPIC -march=x86-64-v3 -fno-strict-aliasing -DMOE_EXT_EMULATOR"
# -fno-gnu-unique: else two libraries in one process would share a template's statics.
# No tail calls, no merging of equal ends: a report names the line that called.
# -ftrivial-auto-var-init: what a kernel never wrote is garbage, not luck.
KERNEL = (
    "-x c++ -O2 -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-function -Wno-psabi"
    " -fno-optimize-sibling-calls -fno-tree-tail-merge -fno-crossjumping"
    " -fno-gnu-unique -fvisibility-inlines-hidden -ftrivial-auto-var-init=pattern"
)
CHECKED = (
    "-fsanitize=thread,bounds,shift,alignment"
    " --param tsan-instrument-func-entry-exit=0 --param tsan-distinguish-volatile=1"
)


def folder(kind):
    return ROOT / "build" / "emulator" / kind


def cuda_includes():
    """The folders of CUDA's headers; nothing else of the toolkit is used."""
    candidates = [
        Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    nvcc = shutil.which("nvcc")
    if nvcc:  # perhaps a wrapper: its own word counts, not its place
        said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        candidates += [Path(top.strip()) for top in re.findall(r"^#\$ TOP=(.*)$", said, re.M)]
        candidates.append(Path(nvcc).resolve().parents[1])
    candidates.append(Path("/usr/local/cuda"))
    packages = importlib.util.find_spec("nvidia")  # pip's nvidia-cuda-runtime and its like
    if packages:
        for place in packages.submodule_search_locations:
            candidates += sorted(Path(place).iterdir())
    for home in candidates:
        include = home / "include"
        if (include / "cuda_bf16.h").exists() and (include / "cuda_runtime_api.h").exists():
            return [p for p in (include, include / "cccl") if p.is_dir()]
    sys.exit(
        "the emulator needs the headers of a CUDA toolkit (cuda_bf16.h, cuda_runtime_api.h) and"
        " found none: set CUDA_HOME, put nvcc on the PATH, or pip install nvidia-cuda-runtime"
    )


def implemented(source):
    """The ops that a source registers."""
    return set(re.findall(r'm\.impl\(\s*"(\w+)"', source.read_text()))


def lacking():
    """The ops of the schema that csrc/cuda/ does not have yet."""
    schema = (ROOT / "csrc/schema.cpp").read_text()
    declared = set(re.findall(r'm\.def\(\s*"(\w+)\(', schema))
    ours = [ROOT / "csrc/moe_infer.cpp", *ROOT.glob("csrc/cuda/*.cpp")]
    return declared - set().union(*map(implemented, ours))


def sources():
    """(ops and their helpers as C++, kernels)"""
    ours = ["csrc/build_info.cpp", "tests/emulator/torch_allocator.cpp"]
    if not lacking():  # else the CPU library brings the schema, and the ops that we lack
        ours += ["csrc/schema.cpp", "csrc/autograd.cpp", "csrc/moe_infer.cpp"]
    cuda = sorted(ROOT.glob("csrc/cuda/*.cpp"))
    return [*map(ROOT.joinpath, ours), *cuda], sorted(ROOT.glob("csrc/cuda/kernels/*.cu"))


def build_info():
    """As setup.py writes it, for moe_ext/_load.py to compare with what runs."""
    import platform

    import torch

    return {
        "torch": torch.__version__,
        "cuda": None,
        "python": platform.python_version(),
        "archs": ["emulated"],
        "git": None,
        "compiler": "the emulator's",
    }


def write_ninja(kind):
    import torch
    from torch.utils import cpp_extension

    target = folder(kind).relative_to(ROOT)  # ninja runs there
    include = target / "include"
    (ROOT / include).mkdir(parents=True, exist_ok=True)
    header = ROOT / include / "build_info.h"
    text = f"#define MOE_EXT_BUILD_INFO {json.dumps(json.dumps(build_info()))}\n"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)

    cuda = " ".join(f"-isystem {path}" for path in cuda_includes())
    torch_include = " ".join(f"-isystem {path}" for path in cpp_extension.include_paths())
    torch_library = cpp_extension.library_paths()[0]
    ours = f"-Icsrc -Itests {cuda}"
    kernel = f"{KERNEL} {CHECKED if kind == 'checked' else ''}"
    lines = [
        f"builddir = {target}",
        "rule compile",
        f"  command = $cxx -MMD -MF $out.d {COMMON} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        "  command = $cxx -shared $in -o $out $flags",
        "  description = $out",
        f"cxx = {os.environ.get('CXX', 'g++')}",
    ]

    def compile_all(files, flags):
        objects = []
        for file in files:
            file = file.relative_to(ROOT)
            objects.append(f"{target / file}.o")
            lines.extend([f"build {objects[-1]}: compile {file}", f"  flags = {flags}"])
        return objects

    def link(name, objects, flags, needs=()):
        needed = " ".join(str(target / lib) for lib in needs)
        # || : what a library is linked with must be there; it may change without a new link
        lines.extend(
            [f"build {target / name}: link {' '.join(objects)} || {needed}",
             f"  flags = {needed} -Wl,-rpath,'$$ORIGIN' {flags}"]
        )  # fmt: skip

    ops, kernels = sources()
    runtime = sorted(ROOT.glob("tests/emulator/runtime/*.cpp"))
    link("libemulator.so", compile_all(runtime, f"-O3 -Wall -Wextra {ours}"), "-ldl")
    needs = ["libemulator.so"]
    micro = compile_all(sorted(ROOT.glob("tests/emulator/kernels/*.cu")), f"{kernel} {ours}")
    link("libprimitives.so", micro, "", needs)
    if kernels:
        link("libkernels.so", compile_all(kernels, f"{kernel} {ours}"), "", needs)
        needs = [*needs, "libkernels.so"]
    flags = (
        f"-O2 -g0 -fopenmp -fvisibility=hidden -I{include} {ours} {torch_include}"
        f" -DMOE_EXT_TORCH='\"{torch.__version__}\"'"
    )
    link(
        "moe_ext_emulated.so", compile_all(ops, flags),
        f"-L{torch_library} -lc10 -ltorch_cpu -ltorch -Wl,-rpath,{torch_library}", needs,
    )  # fmt: skip
    (folder(kind) / "needs_cpu").unlink(missing_ok=True)
    if lacking():
        (folder(kind) / "needs_cpu").touch()
    file = folder(kind) / "build.ninja"
    text = "\n".join(lines) + "\n"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return file


def build(kind="fast"):
    """Brings the libraries up to date; exits with the compiler's words where that fails."""
    file = write_ninja(kind)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run(
        [ninja(), "-f", str(file), *jobs], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"the emulated build failed:\n{done.stdout}")
    return done.stdout


def ninja():
    beside = Path(sys.executable).parent / "ninja"  # of a virtual environment that is not active
    return str(beside) if beside.exists() else "ninja"


if __name__ == "__main__":
    print(build(*sys.argv[1:2]), end="")

"""Builds moe_ext._C; everything static is in pyproject.toml.

MOE_EXT_BUILD=auto|cuda|cpu says what to build: `auto` takes CUDA when it can be
built here, `cuda` insists on it. MAX_JOBS limits the compilers that run at once.
A rebuild in place compiles only what changed: python setup.py build_ext --inplace
"""

import json
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "moe_ext is compiled against the torch that it will run with, and none is importable here:"
        " install torch, then run `pip install --no-build-isolation .`"
    )

ROOT = Path(__file__).resolve().parent


def sources(*patterns):
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


CUDA_SOURCES = sources("csrc/cuda/**/*.cpp", "csrc/cuda/**/*.cu")


def why_not_cuda():
    reasons = []
    if not CUDA_SOURCES:
        reasons.append("this version of moe_ext has no CUDA kernels (csrc/cuda holds no sources)")
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} was built without CUDA")
    if cpp_extension.CUDA_HOME is None:
        reasons.append("no CUDA toolkit was found (set CUDA_HOME, or put nvcc on the PATH)")
    return reasons


def wants_cuda():
    choice = os.environ.get("MOE_EXT_BUILD", "auto")
    if choice not in ("auto", "cuda", "cpu"):
        sys.exit(f"MOE_EXT_BUILD must be auto, cuda or cpu, got {choice!r}")
    reasons = why_not_cuda()
    if choice == "cuda" and reasons:
        sys.exit("MOE_EXT_BUILD=cuda: " + "; ".join(reasons))
    return choice != "cpu" and not reasons


def git_commit():
    """The commit that is built, "-dirty" where files differ from it, or None."""
    if not (ROOT / ".git").exists():
        return None  # a source archive, perhaps unpacked inside somebody else's repository
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class BuildExt(cpp_extension.BuildExtension):
    def finalize_options(self):
        if self.editable_mode:
            # pip's editable install compiles in a folder that it throws away; in the
            # usual one it shares its objects with `build_ext --inplace`.
            target = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / f"temp.{target}")
        super().finalize_options()

    def build_extensions(self):
        # One header for the one file that needs it: as a flag, a new commit would
        # recompile every file.
        compiler = subprocess.run(
            [*self.compiler.compiler_cxx[:1], "--version"], capture_output=True, text=True
        )
        info = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if WITH_CUDA else None,
            "python": platform.python_version(),
            "archs": [platform.machine()],
            "git": git_commit(),
            "compiler": compiler.stdout.partition("\n")[0],
        }
        header = Path(self.build_temp).resolve() / "include" / "build_info.h"
        text = f"#define MOE_EXT_BUILD_INFO {json.dumps(json.dumps(info))}\n"
        if not header.exists() or header.read_text() != text:
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_text(text)
        for extension in self.extensions:
            extension.include_dirs.append(str(header.parent))
        super().build_extensions()


WITH_CUDA = wants_cuda()
Extension = cpp_extension.CUDAExtension if WITH_CUDA else cpp_extension.CppExtension
extension = Extension(
    "moe_ext._C",
    sources("csrc/*.cpp", "csrc/cpu/**/*.cpp") + (CUDA_SOURCES if WITH_CUDA else []),
    include_dirs=[str(ROOT / "csrc")],
    # The torch version recompiles everything when torch changes under the build
    # folder. -fopenmp makes at::parallel_for parallel in our files; it is left out
    # of the link, so that the one OpenMP in the process is the one torch brings.
    extra_compile_args={
        "cxx": [
            "-O3",
            "-g0",
            "-fopenmp",
            "-fvisibility=hidden",
            f'-DMOE_EXT_TORCH="{torch.__version__}"',
        ],
    },
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})

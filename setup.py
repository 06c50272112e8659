"""Builds moe_ext._C; everything static is in pyproject.toml.

MOE_EXT_BUILD=auto|cuda|cpu says what to build: `auto` takes CUDA when it can be
built here (torch has CUDA, nvcc is found; a GPU is not needed), `cuda` insists on it.
TORCH_CUDA_ARCH_LIST="8.0;9.0a" names the GPUs to build for; unset, all that we support.
MAX_JOBS limits the compilers that run at once.
A rebuild in place compiles only what changed: python setup.py build_ext --inplace
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup


def said_by(*command):
    """What a program prints, stderr included; nothing where it cannot be run."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return ""
    return done.stdout


def find_toolkit():
    """CUDA_HOME for torch's builder, which takes the place of the nvcc on the PATH for its
    toolkit's. It may be a wrapper somewhere else, so nvcc itself is asked."""
    if "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    nvcc = shutil.which("nvcc")
    if nvcc and (home := re.search(r"^#\$ TOP=(.*)$", said_by(nvcc, "--dryrun", "x.cu"), re.M)):
        os.environ["CUDA_HOME"] = os.path.normpath(home[1].strip())


find_toolkit()  # before torch looks for it
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
    elif torch.version.cuda:
        release = re.search(r"release (\d+)\.\d+", said_by(nvcc(), "--version"))
        if release is None:
            reasons.append(f"{nvcc()} does not run")
        elif release[1] != torch.version.cuda.partition(".")[0]:
            reasons.append(f"{nvcc()} is CUDA {release[1]}'s, torch CUDA {torch.version.cuda}'s")
    return reasons


def nvcc():
    return os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")


def wants_cuda():
    choice = os.environ.get("MOE_EXT_BUILD", "auto")
    if choice not in ("auto", "cuda", "cpu"):
        sys.exit(f"MOE_EXT_BUILD must be auto, cuda or cpu, got {choice!r}")
    reasons = why_not_cuda()
    if choice == "cuda" and reasons:
        sys.exit("MOE_EXT_BUILD=cuda: " + "; ".join(reasons))
    if choice == "auto" and reasons and torch.version.cuda and CUDA_SOURCES:
        print(f"moe_ext: built for the CPU alone: {'; '.join(reasons)}", file=sys.stderr)
    return choice != "cpu" and not reasons


def default_archs():
    """A100, RTX 30, RTX 40, H100, B200, RTX 50, as far as nvcc knows them, and PTX for what
    comes after the last. 9.0a is 9.0 with all its instructions; nothing else runs either."""
    known = said_by(nvcc(), "--list-gpu-code").split()
    archs = ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"]
    archs = [arch for arch in archs if "sm_" + arch.replace(".", "").rstrip("a") in known]
    # 9.0a has no PTX that runs elsewhere.
    return ";".join(archs) + ("" if archs[-1] == "9.0a" else "+PTX")


def cuda_archs():
    """What is built for, as nvcc names it: sm_80 is machine code, compute_120 is PTX."""
    flags = cpp_extension._get_cuda_arch_flags()
    return sorted((flag.rpartition("code=")[2] for flag in flags), key=arch_order)


def arch_order(arch):
    kind, _, number = arch.partition("_")
    return kind == "compute", int(number.rstrip("af"))


def git_commit():
    """The commit that is built, "-dirty" where files differ from it, or None."""
    if not (ROOT / ".git").exists():
        return None  # a source archive, perhaps unpacked inside another repository
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
        if shutil.which(self.compiler.compiler_cxx[0]) is None:
            sys.exit(
                f"moe_ext: the C++ compiler {self.compiler.compiler_cxx[0]} was not found. Install"
                " one: `apt-get install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora, RHEL),"
                " or name another in CXX"
            )
        # One header for the one file that needs it: as a flag, a new commit would
        # recompile every file.
        compiler = subprocess.run(
            [*self.compiler.compiler_cxx[:1], "--version"], capture_output=True, text=True
        )
        gpus = cuda_archs() if WITH_CUDA else []
        info = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if WITH_CUDA else None,
            "python": platform.python_version(),
            "archs": [platform.machine(), *gpus],
            "git": git_commit(),
            "compiler": compiler.stdout.partition("\n")[0],
        }
        header = Path(self.build_temp).resolve() / "include" / "build_info.h"
        text = (
            f"#define MOE_EXT_BUILD_INFO {json.dumps(json.dumps(info))}\n"
            f"#define MOE_EXT_BUILT_FOR {json.dumps(', '.join(gpus))}\n"
        )
        if not header.exists() or header.read_text() != text:
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_text(text)
        for extension in self.extensions:
            extension.include_dirs.append(str(header.parent))
        super().build_extensions()


WITH_CUDA = wants_cuda()
# torch would look at the GPUs in this machine, and fail where there is none.
if WITH_CUDA and os.environ.get("TORCH_CUDA_ARCH_LIST", "") in ("", "all"):
    os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs()
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
        # The kernels include nothing of torch, so what torch's builder switches off for
        # its own headers is switched on again. No flag here may hold the word "arch":
        # torch would take it for the choice of the GPUs to build for.
        "nvcc": [
            "-O3",
            "-std=c++17",
            "-lineinfo",
            "-Xcompiler=-fvisibility=hidden",
            "-U__CUDA_NO_HALF_OPERATORS__",
            "-U__CUDA_NO_HALF_CONVERSIONS__",
            "-U__CUDA_NO_HALF2_OPERATORS__",
            "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
            # Hopper's kernels are there: a build for 9.0 alone does not have them.
            *(["-DMOE_EXT_SM90A"] if WITH_CUDA and "sm_90a" in cuda_archs() else []),
        ],
    },
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
